"""Models of any kind: try whether one can share prompts, and run those that cannot.

Shapes: B prompts, G answers to a prompt, L prompt tokens, R answer tokens, n positions, V vocabulary, H hidden.
"""
import copy
import dataclasses
from bdb import BdbQuit
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import GenerationConfig

from plumbing.shared_prompt import SHARED_ATTENTION, Packed, body, layers_name, takes


def try_sharing(model, draw: Callable, shared: Callable, plain: Callable) -> str:
    """Do grpo.enable_sharing's work. It tries a small model of the same structure: see find_difference."""
    try:
        small = small_model(model)
        small.config._attn_implementation = SHARED_ATTENTION
        reason = find_difference(small, draw, shared, plain)
    except BdbQuit:  # a reader has left the debugger
        raise
    except Exception as error:  # any model's code may run here
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            raise  # this says nothing about the model
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    if not reason:
        model.config._attn_implementation = SHARED_ATTENTION
    return reason


@torch.no_grad()
def find_difference(model, draw: Callable, shared: Callable, plain: Callable) -> str:
    """Return why a model cannot share prompts, or where its log-probs differ if it does; "" if all is the same.

    draw: grpo.generate with its sampling and eos_ids; shared: packed_logprobs; plain: plain_logprobs.
    """
    config = model.config.get_text_config()
    if getattr(config, "final_logit_softcapping", None):
        return "its logits are soft-capped"
    if "chunked_attention" in (getattr(config, "layer_types", None) or []):
        return "its attention is chunked"
    if positions_follow_longest_row(model):
        return "its rotary positions depend on the longest row"
    window = getattr(config, "sliding_window", None) or 0
    vocabulary = model.get_input_embeddings().num_embeddings
    prompts = [torch.arange(7, 7 + length) * 31 % vocabulary for length in ((window or 2) + 3, 3)]
    packed = Packed([(prompt, []) for prompt in prompts], model.device, keep=True)
    body(model, packed, packed.ids, packed.positions)
    if len(packed.kept) < 2 * config.num_hidden_layers:  # keys and values of each layer
        return "not all of its layers attend"
    answers, drawn, _ = zip(*draw(model, prompts, [[0, 1], [2, 3]], [3, 3]))
    for prompt, rows in zip(prompts, (slice(2), slice(2, 4))):
        expected, _ = plain(model, prompt, answers[rows], 1.0)
        update, _ = shared(model, [(prompt, answers[rows])], 1.0)
        for name, logps in (("update", update), ("rollout", torch.cat(drawn[rows]).to(expected))):
            gap = float((logps - expected).abs().mean())
            if not gap < 3e-4:
                return f"the shared {name} is off by {gap:.2g} nats a token"
    return ""


def small_model(model):
    """Return a model of the same structure, random, in fp32 on the CPU, to try what a structure allows.

    In bf16, rounding alone makes two exact layouts of a mixture of experts differ. The widths are kept. Only
    the first layers are kept, so many that each kind occurs, and not only as the last. A window becomes short.
    """
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    count = text.num_hidden_layers
    lists = [name for name, value in vars(text).items() if isinstance(value, list) and len(value) == count]
    stacks = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    layers = stacks[0] if stacks else [None] * count
    kinds = [(repr(layer), *(getattr(text, name)[i] for name in lists)) for i, layer in enumerate(layers)]
    text.num_hidden_layers = min(count, 2 + max(map(kinds.index, kinds)))
    for name in lists:
        setattr(text, name, getattr(text, name)[: text.num_hidden_layers])
    text.initializer_range = text.hidden_size**-0.5  # scores and logits that are far from equal
    text.vocab_size, text.pad_token_id = min(text.vocab_size, 64), 0
    if getattr(text, "sliding_window", None):
        text.sliding_window = min(text.sliding_window, 4)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # the same on all ranks
        small = type(model)(config).float().eval()
        for p in small.parameters():  # norms and biases too
            p.data += 0.2 * torch.randn_like(p) if p.dim() == 1 else 0
    return small


def has_key_cache(model) -> bool:
    """Return whether grpo.generate can decode with this model: it keeps only keys and values, and takes positions.

    Recurrent states (Mamba, Qwen3-Next) do not work, nor do rotary positions that depend on the longest row.
    """
    return takes(model, "position_ids") and not model._is_stateful and not positions_follow_longest_row(model)


def positions_follow_longest_row(model) -> bool:
    """Return whether the rotary positions of one row depend on the longest row of its batch."""
    config = model.config.get_text_config()
    # as text, because a config may hold one kind of positions, or a dictionary for each type of layer
    rotary = str([getattr(config, name, None) for name in ("rope_parameters", "rope_scaling")])
    return "dynamic" in rotary or "longrope" in rotary


def run_plain(model, ids: Tensor) -> tuple[Tensor, Callable]:
    """Return the last hidden states [G, T, H] of a model's layers for ids [G, T], and its head, [n, H] -> [n, V].

    The head is the model's own forward, which may scale or cap logits, with hidden states in place of its layers.
    """
    name = layers_name(model)
    output = getattr(model, name)(ids, use_cache=False)

    def head(hidden: Tensor) -> Tensor:
        def layers(*_, **__):
            return dataclasses.replace(output, last_hidden_state=hidden[None])

        # what some models ask of their layers: FalconH1 a number, and OPT calls model.decoder(...)
        vars(layers).update(vars(getattr(model, name)), decoder=layers)
        headed = object.__new__(type(model))  # the same model, except for its layers; the model itself does not change
        headed.__dict__ = vars(model) | {name: layers}
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        return type(model).forward(headed, ids, use_cache=False).logits[0]

    return output.last_hidden_state, head


def generate_with_transformers(logprobs: Callable, model, prompts: list[Tensor], seeds: list[list[int]],
                               limits: list[int], sampling, eos_ids: list[int]) -> list[tuple]:
    """Replace grpo.generate where has_key_cache says no: call model.generate, for all answers of one prompt at a time.

    It draws for them together, from the first of their seeds, so an answer depends on the others. logprobs:
    grpo.plain_logprobs.
    """
    choice = {"do_sample": True} | sampling._asdict() if sampling.temperature else {}
    # the model's own config may hold penalties, which the log-probs of training do not have
    own_config, model.generation_config = model.generation_config, GenerationConfig()
    results = []
    try:
        for prompt, prompt_seeds, limit in zip(prompts, seeds, limits):
            ids = prompt.expand(len(prompt_seeds), -1).to(model.device)  # [G, L]
            with torch.random.fork_rng():
                torch.manual_seed(prompt_seeds[0])
                rows = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit,
                    eos_token_id=eos_ids or None, pad_token_id=eos_ids[0] if eos_ids else 0, **choice,
                )[:, len(prompt) :].cpu()  # [G, R]
            ended = [torch.isin(row, torch.tensor(eos_ids)).nonzero() for row in rows]
            answers = [row[: int(ends[0]) + 1] if len(ends) else row for row, ends in zip(rows, ended)]
            logps = [logprobs(model, prompt, [answer], sampling.temperature or 1.0)[0].cpu() for answer in answers]
            results += zip(answers, logps, [len(ends) > 0 for ends in ended])
    finally:
        model.generation_config = own_config
    return results
