"""The memory a run expects, by arithmetic: what the plan says before anything is loaded, and what to change.

All sizes are bytes; 1 GB is 1e9 of them.
"""
import itertools
import math
import os
from dataclasses import dataclass

import torch

from plumbing import ranks
from plumbing.problems import BadInput, first_line

# bytes of each weight (its gradient has as many), and of its optimiser state: fp32 m and v (8 together), then the fp32
# master (4) or the bf16 compensation (2); see SmallStepAdam in model.py
STORED = {"fp32": (4, 8), "masters": (2, 12), "kahan": (2, 10)}
HEAD_BLOCK = 2**24  # logits in memory at a time: prefix.py computes more of them again, block by block, in the backward
PROGRAM_TOKENS = 400  # of one candidate in a ranking prompt: a guess, for the plan comes before the candidates

OTHER_WAYS = (  # what to change where a model cannot be trained as asked, and what that means here
    ("--optimizer kahan", "kahan", {}),
    ("--lora 16", "kahan", {"lora": 16}),
    ("torchrun --nproc-per-node=8 with --shard", "masters", {"shards": 8, "lora": 0}),
)


@dataclass
class Shape:
    """What of a model decides how much memory it takes."""

    parameters: int
    layers: int
    hidden: int
    inner: int  # width of the MLP; of all experts together that one token meets
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    routed: int = 0  # experts that one token meets; 0: no mixture of experts

    @property
    def adapted(self) -> int:
        """Weights of LoRA adapters of rank 1, on every linear layer but the head: inputs + outputs of each.

        Experts have none; see add_lora in model.py.
        """
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        mlp = 0 if self.routed else (self.hidden + self.inner) * 3
        return self.layers * ((self.hidden + queries) * 2 + (self.hidden + keys) * 2 + mlp)


def shape_of(config, option: str = "--model") -> Shape:
    """The shape of a transformers configuration; the weights are counted without making them.

    Raises BadInput where transformers knows no language model for it.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    except Exception as error:  # code of any model there is
        raise BadInput(f"{option} {config.name_or_path} does not load: {first_line(error)}") from None
    text = config.get_text_config()
    heads, hidden = getattr(text, "num_attention_heads", None) or 1, text.hidden_size
    routed = getattr(text, "num_experts_per_tok", None) or 0
    inner = (routed and getattr(text, "moe_intermediate_size", None)) or getattr(text, "intermediate_size", None)
    return Shape(
        parameters, text.num_hidden_layers, hidden, (inner or 4 * hidden) * max(routed, 1), heads,
        getattr(text, "num_key_value_heads", None) or heads, getattr(text, "head_dim", None) or hidden // heads,
        text.vocab_size, getattr(text, "max_position_embeddings", None) or 2**31, routed,
    )


def expected(
    shape: Shape, optimizer: str, *, train: bool = True, kl: bool = True, lora: int = 0, rows: int, row_tokens: int,
    micro_tokens: int, shards: int = 1, checkpointing: bool = False, teacher: Shape | None = None,
) -> dict[str, float]:
    """Bytes of each part, on one GPU: weights, gradients, optimiser, reference, KV cache, activations.

    rows answers of row_tokens tokens each (prompt included) decode at a time; micro_tokens, but never less than one
    row, go through one training forward; shards GPUs share weights, gradients, optimiser and reference (--shard), and
    gather the weights while rows decode. teacher: another model in the reference's place, whose
    rankings are learned (--mode sft --teacher).
    """
    stored, state = STORED[optimizer]
    compute = 4 if optimizer == "fp32" else 2  # bytes of a number in the cache and the activations
    if shards > 1 and optimizer == "masters":
        stored, state = 4, 8  # the shards themselves are the masters; the forward casts them (--shard)
    weights, adapters = shape.parameters * stored, shape.adapted * lora
    trained = (adapters * 4, adapters * 8) if lora else (weights, shape.parameters * state)
    need = {"weights": weights + adapters * 4, "gradients": 0.0, "optimiser": 0.0, "reference": 0.0}
    if train:
        need["gradients"], need["optimiser"] = trained
        own = weights if kl and not lora else 0.0  # with LoRA: the model, adapters off
        need["reference"] = teacher.parameters * stored if teacher else own
    need = {name: size / shards for name, size in need.items()}
    row_tokens = min(row_tokens, shape.context)
    decoding = (shape, teacher or shape)  # one at a time
    need["KV cache"] = rows * row_tokens * 2 * max(s.layers * s.kv_heads * s.head_dim for s in decoding) * compute
    need["gathered weights"] = max(s.parameters for s in decoding) * compute if shards > 1 else 0.0
    need["activations"] = activations(shape, max(micro_tokens, row_tokens), compute, checkpointing) * train
    return need


def activations(shape: Shape, tokens: int, compute: int, checkpointing: bool) -> float:
    """Bytes kept for the backward pass of one training forward over so many tokens.

    What a layer keeps of a token was counted on small models of Qwen3, its MoE and GPT-OSS (by saved tensors; tests do
    it again); each expert that a token meets keeps two more copies of its hidden state. With checkpointing each layer
    keeps its input, and one layer at a time has all the rest. The head works in blocks.
    """
    of_heads = (5 * shape.heads + 10 * shape.kv_heads) * shape.head_dim
    a_layer = (8 + 2 * shape.routed) * shape.hidden + 4 * shape.inner + of_heads
    kept = shape.layers * shape.hidden + a_layer if checkpointing else shape.layers * a_layer
    return tokens * kept * compute + min(tokens * shape.vocab, HEAD_BLOCK) * 12  # logits, log-probs, one more in fp32


def peak(need: dict[str, float]) -> float:
    """The most that is there at one time: gradients and activations are gone while rows decode."""
    always = need["weights"] + need["optimiser"] + need["reference"]
    return always + max(need["KV cache"] + need["gathered weights"], need["gradients"] + need["activations"])


def room(device: str) -> float:
    """Bytes that this rank may use: what is free on its GPU, or its part of the machine's memory."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks.on_this_machine()


def choose(shape: Shape, there: float, kinds=tuple(STORED), **settings) -> tuple[str, bool]:
    """The optimiser for so much memory, and whether to checkpoint layers: the first that fits, or else the last.

    Plain fp32 if that fits, else bf16 weights with masters, else with kahan; each of them with checkpointing, which
    computes every layer twice, where it does not fit without. If none fits, then as if rows were 1: that is easily
    changed, and the plan says so.
    """
    for rows, kind, checkpointing in itertools.product((settings["rows"], 1), kinds, (False, True)):
        need = expected(shape, kind, checkpointing=checkpointing, **settings | {"rows": rows})
        if peak(need) <= there:
            return kind, checkpointing
    return list(kinds)[-1], True


def size(number: float) -> str:
    """Bytes in words."""
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.0f} MB"


def describe(shape: Shape, optimizer: str, there: float, **settings) -> list[str]:
    """Lines for the plan: what the run expects to need, and, where that is more than there is, what to change."""
    need = expected(shape, optimizer, **settings)
    parts = ", ".join(f"{name} {size(number)}" for name, number in need.items() if number)
    lines = [f"{parts}", f"at most {size(peak(need))} of them at a time, of {size(there)} (--optimizer {optimizer})"]
    if peak(need) <= there:
        return lines
    changes, fixed = [], need["weights"] + need["optimiser"] + need["reference"]
    phases = ("rows", "KV cache", "gathered weights"), ("micro_tokens", "activations", "gradients")
    for option, part, beside in phases:
        fitting = math.floor(settings[option] * (there - fixed - need[beside]) / max(need[part], 1))
        if 1 <= fitting < settings[option]:
            changes.append(f"--{option.replace('_', '-')} {fitting}")
    advice = " and ".join(changes) or "fewer tokens at a time (--max-new-tokens)"
    least = settings | {"rows": 1, "micro_tokens": 1, "checkpointing": True}
    if peak(expected(shape, optimizer, **least)) > there:  # however little goes through the model at a time
        fits = [words for words, kind, other in OTHER_WAYS if peak(expected(shape, kind, **least | other)) <= there]
        advice = " or ".join(fits) or "a smaller model, or --shard on more GPUs"
    return lines + [f"that will not fit: {advice}"]
