"""Hugging Face models: loading, chat templates, memory, LoRA, optimisers for bf16 weights, checkpoints and saving."""
import contextlib
import copy
import json
import os
import pickle
import re
import tempfile
from functools import cache, partial
from itertools import product
from pathlib import Path

import huggingface_hub
import torch
import transformers
from huggingface_hub import errors
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer
from transformers.utils import logging

from plumbing import ranks
from plumbing.problems import BadInput, first_line, seed_for, write_atomic

# ------------------------------------------------------------------------------------------------------------ loading

HUB_NAMES = [  # the paper's models, and Qwen3's small ones
    "Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B", "Qwen/Qwen3-4B", "Qwen/Qwen3-8B", "openai/gpt-oss-20b",
    "Qwen/Qwen3-4B-Thinking-2507", "Qwen/Qwen3-4B-Instruct-2507",
    "Qwen/Qwen3-30B-A3B-Thinking-2507", "Qwen/Qwen3-30B-A3B-Instruct-2507",
]
FILES = {"allow_patterns": ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja", "*.tiktoken"],
         "ignore_patterns": ["*/*", "consolidated*"]}  # the same weights once more, for other programs
LARGE = 1e8  # weights: a larger model computes its layers again in the backward pass


def full_name(name: str) -> str:
    """Return the absolute path of a folder, or the Hub's name for a short one, also without "-A3B" and "-2507"."""
    if name and Path(name).is_dir():
        return os.path.abspath(name)
    for hub in HUB_NAMES:
        last = hub.split("/")[1].lower()
        if name.lower() in (hub.lower(), last, last.replace("-a3b", "").replace("-2507", "")):
            return hub
    return name


def is_whole(folder: Path) -> bool:
    """Return whether a downloaded folder holds all of the weights that its index lists, and a tokenizer."""
    kind = "safetensors" if any(folder.glob("*.safetensors")) else "bin"
    indices = [json.loads(path.read_text()) for path in folder.glob(f"*.{kind}.index.json")]
    listed = {file for index in indices for file in index["weight_map"].values()} or {f"*.{kind}"}
    words = any(any(folder.glob(pattern)) for pattern in ("*token*", "*vocab*", "*.model"))
    return words and all(any(folder.glob(file)) for file in listed)


def find_model(name: str, option: str = "--model") -> str:
    """Return the folder of a model: name itself, the model of a run's folder, or the download of a name on the Hub.

    Only what is not on this machine is downloaded. (transformers would ask the Hub for each file, and retry for half a
    minute without a network.) Raises BadInput where there is no such model.
    """
    name = full_name(name)
    if (folder := Path(name)).is_dir():
        is_run = (folder / "model").is_dir() and (folder / "args.json").exists()
        return str(folder / "model") if is_run else name
    try:
        with contextlib.suppress(errors.LocalEntryNotFoundError):
            folder = Path(huggingface_hub.snapshot_download(name, local_files_only=True, **FILES))
            if is_whole(folder):  # otherwise its download was stopped
                return str(folder)
        tqdm.write(f"{name} is not on this machine: downloading it")
        return huggingface_hub.snapshot_download(name, **FILES)
    except errors.GatedRepoError:  # which is a RepositoryNotFoundError too
        raise BadInput(f"{option} {name} is gated: accept its licence at https://huggingface.co/{name}, "
                       "then `hf auth login`") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise BadInput(f"{option} {name}: no such folder, and no such model on the Hub") from None
    except Exception as error:  # of the network, the disk, or the Hub
        raise BadInput(f"{option} {name}: no such folder, and it cannot be downloaded: {first_line(error)}") from None


@contextlib.contextmanager
def loading(option: str, name: str, failure: str = "does not load"):
    """Turn an error inside into one line. Three libraries take part in loading, and each has exceptions of its own."""
    try:
        yield
    except Exception as error:
        message = f"{option} {name} {failure}: {first_line(error)}"
        raise error if isinstance(error, BadInput) else BadInput(message) from None


def load_config(name: str, option: str) -> tuple:
    """Return (folder, configuration) of a model. Raises BadInput for quantised weights that cannot be trained.

    Dropout is off: the rollout and the update would see different models, and the ratio of their probabilities would
    be noise.
    """
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    folder = find_model(name, option)
    config = AutoConfig.from_pretrained(folder)
    for part in (config, config.get_text_config()):
        for key, value in vars(part).items():
            if "drop" in key and isinstance(value, float):  # dropout, attn_pdrop, layerdrop, ...
                setattr(part, key, 0.0)
    if quantised := getattr(config, "quantization_config", None):
        if (method := quantised.get("quant_method")) != "mxfp4":  # GPT-OSS's
            raise BadInput(f"{option} {name}: its weights are quantised ({method}) and cannot be trained; give the "
                           "model that they were made from")
        quantised["dequantize"] = True
    return folder, config


def count_parameters(name: str, option: str = "--model") -> int:
    """Return the number of a model's parameters, without loading them. Raises BadInput if it is no language model."""
    with loading(option, name), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(name, option)[1])
    return sum(p.numel() for p in model.parameters())


def load_model(name: str, *, optimizer: str, shard: bool, device: str, effort: str = "", option: str = "--model",
               weights: bool = True):
    """Return (model, tokenizer), with weights in fp32 or bf16 as the optimiser needs them.

    effort: --reasoning-effort. option: the command-line option that named the model. weights: False where a server has
    them; then the model is empty, on the device "meta". Raises BadInput where the model does not load, or where its
    chat template does not use the effort.
    """
    # a shard is its own fp32 master: the forward casts what it has gathered
    dtype = torch.float32 if optimizer == "fp32" or (shard and optimizer == "masters") else torch.bfloat16
    # older transformers multiply positions in fp32 too, and TF32 is wrong for those above 2,048
    exact = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24)
    if optimizer == "fp32" and exact and device.startswith("cuda"):
        torch.backends.cuda.matmul.allow_tf32 = True  # products with 11 significant bits, many times as fast
    with loading(option, name):
        folder, config = load_config(name, option)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if not tokenizer("x y 1").input_ids:
            raise BadInput(f"{option} {name}: its tokenizer is empty; copy tokenizer.json into the folder")
        check_template(tokenizer, name, effort)
        if not weights:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
            with contextlib.suppress(OSError):  # it need not be there
                model.generation_config = GenerationConfig.from_pretrained(folder)
            return model, tokenizer
        if shard:
            model, whole = read_on_first(folder, config, dtype)
        else:
            model, whole = read_weights(folder, config, dtype), None
    with loading(option, name, "cannot be saved"), tempfile.TemporaryDirectory() as trial:  # now, not after training
        for part in (model.config, that_saves(model.generation_config), tokenizer):
            part.save_pretrained(trial)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # a probability that is not in the configuration
    if sum(p.numel() for p in model.parameters()) > LARGE:
        checkpoint_layers(model)
    if shard:
        ranks.shard_model(model, torch.float32 if optimizer == "fp32" else torch.bfloat16, device, whole)
    return model.to(device).eval(), tokenizer


def read_weights(folder: str, config, dtype: torch.dtype):
    """Return a model with its weights, on the CPU."""
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype)
    if dtype == torch.float32:
        model.float()  # with transformers 5.17 (not with 5.24) what was quantised comes as bf16
    return model


def read_on_first(folder: str, config, dtype: torch.dtype) -> tuple:
    """Return (model on the meta device, on rank 0 also the model with its weights). The other ranks read no weights."""
    whole = []

    def read():
        model = read_weights(folder, config, dtype)
        head = model.get_output_embeddings()
        if head is not None and head.weight is not model.get_input_embeddings().weight:
            model.config.tie_word_embeddings = False  # it may say otherwise, but the files decide
        whole.append(model)
        return model.config, model.generation_config  # reading has changed both

    config, generation_config = ranks.on_first(read)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config = generation_config
    return model, whole[0] if whole else None


def checkpoint_layers(model) -> None:
    """Let each layer keep only its input and compute the rest again in the backward pass: a third slower."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()  # two names of one thing, before and after transformers 5.24


# ----------------------------------------------------------------------------------------- chat templates and answers
# rank_prompt.py reads Qwen3's form: <think>, the thinking part, </think>, the answer. A template may write the <think>
# itself. Mistral and Seed have other marks. GPT-OSS sends messages through channels, and only the final channel is the
# answer (OpenAI's "harmony" format). `answer_text` turns all of them into the one form.

OPEN, CLOSE = "<think>", "</think>"
OTHER_MARKS = {"[THINK]": OPEN, "[/THINK]": CLOSE, "<seed:think>": OPEN, "</seed:think>": CLOSE}
MARKS = {OPEN, CLOSE, *OTHER_MARKS}
CHANNEL, MESSAGE, END = "<|channel|>", "<|message|>", "<|end|>"  # harmony's
PLAIN_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n\n{% endfor %}"
# Some templates ask for today's date: a run that is resumed tomorrow would then ask something else. Jinja drops the
# line break behind the macro, so that the template itself is read as without the macro.
ALWAYS_TODAY = "{% macro strftime_now(format) %}2026-01-01{% endmacro %}\n"
CUT = "\ufdd0\ufdd1"  # marks a place in a text: Unicode says that no text holds these two
SHOWN = 2000  # characters of a prompt on the screen


def render(tokenizer, *turns: str, thinking: bool = True, effort: str = "", ask: bool = True) -> str:
    """Return a conversation as the model reads it; with `ask`, up to where its next answer begins.

    turns: what the user says, then what the model says, and so on.
    """
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    extra = {"reasoning_effort": effort} if effort else {}
    template = tokenizer.get_chat_template() if tokenizer.chat_template else PLAIN_TEMPLATE
    return tokenizer.apply_chat_template(messages, chat_template=ALWAYS_TODAY + template, tokenize=False,
                                         add_generation_prompt=ask, enable_thinking=thinking, **extra)


def spell_out(tokenizer, text: str, keep: tuple[str, ...] = ()) -> str:
    """Put CUT into every control token that a text spells, so that `to_ids` reads it as text. keep: tokens to leave.

    Control tokens are the special ones, the marks of a thinking part, and those that the template writes, because some
    models do not flag these as special. Other added tokens are words.
    """
    written = {i for ids, _ in ways_to_ask(tokenizer, str(tokenizer.chat_template)) for i in ids}
    control = {token.content for i, token in tokenizer.added_tokens_decoder.items() if len(token.content) > 1
               and (token.special or token.content in MARKS or i in written and token.content.strip())} - {*keep}
    spelled = "|".join(map(re.escape, sorted(control))) or "(?!)"  # which matches nothing
    return re.sub(f"(?={spelled}).", rf"\g<0>{CUT}", text, flags=re.DOTALL)  # one token may begin inside another


def to_ids(tokenizer, text: str) -> list[int]:
    """Return the token ids of a text. Each of its pieces between CUTs is read by itself."""
    ids_of = partial(tokenizer.encode, add_special_tokens=False)
    first, *pieces = text.split(CUT)
    ids, line = ids_of(first), ids_of("\n")
    for piece in pieces:  # read behind a line break, because some tokenizers put a blank in front of a text
        behind = ids_of("\n" + piece)
        ids += behind[len(line) :] if behind[: len(line)] == line else ids_of(piece)
    return ids


def encode(tokenizer, prompt: str, thinking: bool, effort: str = "") -> torch.Tensor:
    """Return one user turn as token ids [L], through the model's chat template. The prompt's text is only text."""
    text = render(tokenizer, spell_out(tokenizer, prompt), thinking=thinking, effort=effort)
    return torch.tensor(to_ids(tokenizer, text))


@cache
def ways_to_ask(tokenizer, template: str) -> list[tuple[list[int], str]]:
    """Return, for each setting of thinking, a short prompt's token ids, and the text in it behind the user's turn."""
    ways = []
    for thinking, effort in product((True, False), ("", "low", "medium", "high")):
        with contextlib.suppress(Exception):  # any template's code runs here, and some refuse an effort
            ids = to_ids(tokenizer, render(tokenizer, "?", thinking=thinking, effort=effort))
            asked, turn = (render(tokenizer, CUT, thinking=thinking, effort=effort, ask=ask) for ask in (True, False))
            ways.append((ids, (asked.removeprefix(turn) or asked).rpartition(CUT)[2]))  # some templates always ask
    return ways


def text_before_answer(tokenizer, prompt: torch.Tensor) -> str:
    """Return what the template has put between the user's turn and the answer, in a prompt of token ids [L]."""
    backwards = prompt.tolist()[::-1]
    alike = {text: len(os.path.commonprefix([backwards, ids[::-1]]))
             for ids, text in ways_to_ask(tokenizer, str(tokenizer.chat_template))}
    return max(alike, key=alike.get)


def can_think(tokenizer) -> bool:
    """Return whether the chat template has a switch for thinking, or opens a thinking part."""
    ways = ways_to_ask(tokenizer, str(tokenizer.chat_template))
    return len({tuple(ids) for ids, _ in ways}) > 1 or any(mark in text for _, text in ways for mark in MARKS)


def turn_end(tokenizer) -> int | None:
    """Return the id of the token that the template puts behind an assistant's message, or None if it puts none there.

    In harmony <|end|> does not count: it also ends the messages of the thinking part.
    """
    try:
        text = render(tokenizer, "?", CUT, ask=False)
        if text.rstrip().endswith(CUT):  # some templates end a message only where another one follows
            text = render(tokenizer, "?", CUT, "?", ask=False)
    except Exception:  # any template's code runs here, and some refuse an assistant's message
        return None
    before, found, behind = text.rpartition(CUT)
    begin, end = (tokenizer.encode(part.strip(), add_special_tokens=False) for part in (before, behind))
    begin = [i for i in begin if i != tokenizer.bos_token_id]
    if not found or not end or end[:1] == begin[:1]:  # the latter: no end, and a template that always asks
        return None
    token = tokenizer.added_tokens_decoder.get(end[0])
    if not token or (CHANNEL in str(tokenizer.chat_template) and token.content == END):
        return None
    return end[0] if token.special or behind.split()[0] == token.content else None


def check_template(tokenizer, name: str, effort: str) -> None:
    """Set a plain template where there is none, and say what a template ignores. BadInput if that is the effort."""
    if not tokenizer.chat_template:
        tqdm.write(f"{name} has no chat template: the prompt is given as plain text (is it a base model? A "
                   "template is in chat_template.jinja or tokenizer_config.json)")
        tokenizer.chat_template = PLAIN_TEMPLATE
    elif render(tokenizer, "?", thinking=True) == render(tokenizer, "?", thinking=False):
        tqdm.write(f"{name}: its chat template has no switch for thinking, so --thinking changes nothing")
    if effort and render(tokenizer, "?", effort="low") == render(tokenizer, "?", effort="high"):
        raise BadInput(f"--reasoning-effort {effort}: the chat template of {name} does not use it; leave it out")


def answer_text(tokenizer, prompt: torch.Tensor, answer: torch.Tensor) -> str:
    """Return an answer as text, in Qwen3's form. prompt, answer: token ids [L], [R].

    Special tokens are left out, except those that mark the thinking part. Where the template itself opens the thinking
    part, the opening is put back in front.
    """
    channels = CHANNEL in str(tokenizer.chat_template)
    marks = {CHANNEL, MESSAGE, END} if channels else MARKS  # elsewhere <|end|> just ends a text
    added = tokenizer.added_tokens_decoder
    dropped = {i for i, token in added.items() if token.special and token.content not in marks}
    text = tokenizer.decode([i for i in answer.tolist() if i not in dropped])
    before = text_before_answer(tokenizer, prompt)
    for other, mark in OTHER_MARKS.items():
        text, before = text.replace(other, mark), before.replace(other, mark)
    if not channels:
        return f"{OPEN}\n{text}" if before.rfind(OPEN) > before.rfind(CLOSE) else text
    thinking, _, last = text.rpartition(CHANNEL)  # all is thinking, except a last message in the final channel
    channel, began, content = last.partition(MESSAGE)
    if not began or channel.split()[:1] != ["final"]:
        return f"{OPEN}\n{text}"
    return f"{OPEN}\n{thinking}{CLOSE}{content.partition(END)[0]}"


def encode_answers(tokenizer, prompt: torch.Tensor, texts: list[str], end: int) -> list[torch.Tensor]:
    """Return another model's answers in this model's tokens, [R] each, with the token `end` behind each.

    An opening of the thinking part that this model's template has already written in the prompt [L] is left out.
    """
    opening = answer_text(tokenizer, prompt, prompt[:0])
    texts = [spell_out(tokenizer, text.removeprefix(opening), keep=(OPEN, CLOSE)) for text in texts]
    return [torch.tensor([*to_ids(tokenizer, text), end]) for text in texts]


def show_first(out: Path, kind: str, tokenizer, prompt: torch.Tensor) -> None:
    """Print the first prompt [L] of a kind, and write all of it to out/prompts.txt: a wrong template is seen here."""
    path, heading = out / "prompts.txt", f"----- the first prompt for {kind} -----\n"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if ranks.rank() or heading in text:
        return
    asked = tokenizer.decode(prompt)
    write_atomic(path, f"{text}{heading}{asked}\n\n")
    if (more := len(asked) - SHOWN) > 0:
        asked = f"{asked[: SHOWN // 2]}\n[... {more} characters, all in {path} ...]\n{asked[-SHOWN // 2 :]}"
    tqdm.write(f"{heading}{asked}\n-----")


# --------------------------------------------------------------------------------------------------------------- LoRA


def add_lora(model, rank: int, seed: int) -> None:
    """Add trainable fp32 adapters of this rank to every linear layer except the head (package peft); freeze the rest.

    peft's "all-linear" would include the experts of a mixture, and copy all of their weights in each forward.
    """
    from peft import LoraConfig, inject_adapter_in_model

    head = model.get_output_embeddings()
    layers = [name for name, m in model.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D)) and m is not head]
    torch.manual_seed(seed)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers), model)
    for p in model.parameters():
        p.data = p.data.float() if p.requires_grad else p.data


def blank_lora(model, rank: int):
    """Return an empty model of this kind, on the device "meta", with adapters that change nothing, for save_adapter."""
    with torch.device("meta"):
        blank = AutoModelForCausalLM.from_config(model.config)
    add_lora(blank, rank, 0)
    return blank


def lora_layers(model) -> list[tuple[str, torch.nn.Module]]:
    """Return the name and the module of each layer that has adapters."""
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]


@contextlib.contextmanager
def lora_disabled(model):
    """Inside, the model is the one that the adapters were added to. A model without adapters does not change."""
    for _, layer in lora_layers(model):
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for _, layer in lora_layers(model):
            layer.enable_adapters(True)


# ------------------------------------------------------------------------------------------ optimisers and their memory

# bytes of each trained weight: the weight itself, its gradient, and the optimiser's state (see SmallStepAdam)
BYTES = {"fp32": 4 + 4 + 8, "masters": 2 + 2 + 12, "kahan": 2 + 2 + 10}


class SmallStepAdam(torch.optim.Optimizer):
    """AdamW for bf16 weights that does not lose small steps.

    A bf16 number has 8 significant bits. At a learning rate of 1e-6 a weight of 0.02 moves by far less than half its
    last bit, so plain bf16 AdamW leaves 98 % of the weights where they are. The moments are in fp32 here, because bf16
    moments stand still too (1 - beta2 is less than half a last bit). keep says what else is stored for each weight:

        "masters"  the weight in fp32; the model has its rounding                                    12 bytes of state
        "kahan"    what rounding has taken away so far, in bf16: together about 16 significant bits  10 bytes
    """

    def __init__(self, parameters, lr: float, keep: str, weight_decay: float = 0.0):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})
        self.keep = keep

    @torch.no_grad()
    def step(self):
        """Make one step of AdamW in fp32; leave weights without a gradient where they are."""
        beta1, beta2, eps = 0.9, 0.999, 1e-8
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, grad = self.state[p], p.grad.float()
                if not state:
                    state |= {"step": 0, "m": torch.zeros_like(grad), "v": torch.zeros_like(grad)}
                    state["kept"] = p.float() if self.keep == "masters" else torch.zeros_like(p)
                state["step"] += 1
                m = state["m"].lerp_(grad, 1 - beta1)
                v = state["v"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                scale = (v / (1 - beta2 ** state["step"])).sqrt_().add_(eps)
                change = (m / scale).mul_(-group["lr"] / (1 - beta1 ** state["step"]))
                decay = group["lr"] * group["weight_decay"]
                change.sub_(state["kept"] if self.keep == "masters" else p, alpha=decay)
                if self.keep == "masters":
                    p.copy_(state["kept"].add_(change))
                else:
                    exact = change.add_(state["kept"]).add_(p)  # the small ones first
                    p.copy_(exact)
                    state["kept"].copy_(exact.sub_(p))


def make_optimizer(model, kind: str, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """Return torch's AdamW where the trained weights are fp32 (LoRA's are always); otherwise SmallStepAdam."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if all(p.dtype == torch.float32 for p in parameters):
        fused = True if parameters[0].is_cuda else None  # there the plain one makes temporaries as large as the model
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=fused)
    return SmallStepAdam(parameters, lr, kind, weight_decay)


def backward_in_order(loss: torch.Tensor) -> None:
    """Call loss.backward(), on a CPU so that gradients are added in a fixed order, with any number of threads.

    transformers' experts copy a row for each expert that it goes to, and torch adds the copies' gradients in parallel.
    """
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(max(before, 1) if loss.device.type == "cpu" else before)  # 1: warn
    try:
        loss.backward()
    finally:
        torch.set_deterministic_debug_mode(before)


def room(device: str) -> float:
    """Return the bytes this rank may use: the free memory of its GPU, or its part of the machine's memory."""
    if device.startswith("cuda"):
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # kept by torch
        return torch.cuda.mem_get_info(device)[0] + unused
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks.local_world()


def choose_optimizer(args, given: str) -> tuple[str, str]:
    """Return the optimiser of a run, and the plan's line about memory. args: dust.Args; given: the user's choice.

    Without a choice it is the first one that leaves half of the memory to the KV cache and the activations, or else the
    smallest. fp32 is not tried on a GPU, where bf16 is faster and smaller. LoRA's adapters are
    not counted. Raises BadInput where a model is missing or is not a language model.
    """
    parameters, there = count_parameters(args.model), min(ranks.gather(room(args.device)))
    frozen = parameters * (args.kl > 0 and args.mode != "sft" and not args.lora)  # the reference
    frozen = count_parameters(args.teacher, "--teacher") if args.teacher else frozen
    if args.init:
        count_parameters(args.init, "--init")  # raises BadInput for a wrong name now, not in hours
    kinds = [kind for kind in BYTES if kind != "fp32" or not args.device.startswith("cuda")]
    for kind in [given] if given else kinds:
        weight = 4 if kind == "fp32" or args.shard and kind == "masters" else 2  # as load_model loads them
        need = parameters * (weight if args.lora or args.eval_only else BYTES[kind])
        need = (need + frozen * weight * (not args.eval_only)) / (ranks.world() if args.shard else 1)
        if need <= there / 2:
            break
    line = f"{in_words(need)} of {in_words(there)} for weights, gradients, optimiser and reference (--optimizer {kind})"
    if args.server and args.eval_only:
        return kind, "none for weights, which the server has"
    return kind, line + (", which will not fit: take a smaller model, --lora 16 or --shard" if need > there else "")


def check_others(tokenizer, args) -> None:
    """Raise BadInput if --init or --teacher does not go with --model: now, not after hours of sampling."""
    if args.teacher and any(mark in str(tokenizer.chat_template) for mark in (CHANNEL, *OTHER_MARKS)):
        raise BadInput(f"--teacher: {args.model} marks its thinking part in a way of its own; leave --teacher out")
    if args.init:
        with loading("--init", args.init):
            vocabulary = AutoTokenizer.from_pretrained(find_model(args.init, "--init")).get_vocab()
        if vocabulary != tokenizer.get_vocab():
            raise BadInput(f"--init {args.init} has other tokens than --model: training goes on within a family")


def in_words(size: float) -> str:
    """Return a number of bytes in words; 1 GB is 1e9 bytes."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"


# -------------------------------------------------------------------------------------------------------------- files


def save_checkpoint(path: Path, model, optimizer, step: int) -> None:
    """Write trained weights, optimiser and step, all of it or nothing: to one file, or shards to a folder beside it."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if isinstance(model, ranks.FSDPModule):
        state = {"model": trained, "optimizer": state_by_name(model, optimizer)}
        ranks.save_shards(path.with_suffix(""), state, step)
    elif ranks.rank() == 0:
        state = {"model": trained, "optimizer": optimizer.state_dict(), "step": step}
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)


def state_by_name(model, optimizer) -> dict[str, dict]:
    """Return parameter name -> the optimiser's state of that parameter (the dict itself, not a copy)."""
    return {name: optimizer.state[p] for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_checkpoint(path: Path, model, optimizer) -> int:
    """Load a checkpoint into model and optimiser; return its step, 0 where there is none."""
    damages = (ValueError, LookupError, TypeError, EOFError, OSError, pickle.UnpicklingError)
    if isinstance(model, ranks.FSDPModule):  # there a RuntimeError says that another rank has ended
        path, load = path.with_suffix(""), load_shards
    else:
        load, damages = load_file, (RuntimeError, *damages)
    try:
        return load(path, model, optimizer)
    except damages as error:
        if isinstance(error, torch.OutOfMemoryError):  # a RuntimeError, which says nothing about the file
            raise
        raise BadInput(f"{path} cannot be read ({first_line(error)}); delete it, and training starts again") from None


def load_file(path: Path, model, optimizer) -> int:
    """Do load_checkpoint's work for a model in one piece."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", mmap=model.device.type != "cpu")
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for name, p in trained:
        p.copy_(state["model"][name])
    for index, values in state["optimizer"]["state"].items():
        p = trained[index][1]  # optimizer.load_state_dict would round masters and moments to its dtype
        optimizer.state[p] = {k: v.to(p.device) if isinstance(v, torch.Tensor) else v for k, v in values.items()}
    return state["step"]


def load_shards(folder: Path, model, optimizer) -> int:
    """Do load_checkpoint's work for a sharded model. The number of ranks may have changed."""
    step, saved = ranks.on_first(lambda: ranks.newest_shards(folder))
    if not step:
        return 0
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for key, kept in saved.items():
        part, _, key = key.partition(".")
        name, _, field = key.rpartition(".")
        if part == "optimizer":  # make room: a new optimiser has no state
            p = trained[name]
            optimizer.state[p][field] = ranks.room_for(kept, p)
    state = {"model": {name: p.detach() for name, p in trained.items()}, "optimizer": state_by_name(model, optimizer)}
    ranks.load_shards(folder, state, step)
    return step


def with_turn_end(config: GenerationConfig, tokenizer) -> GenerationConfig:
    """Return a copy that also names the template's end of a turn, because other programs stop only where it says so."""
    config, end = copy.deepcopy(config), turn_end(tokenizer)
    stops = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if end not in (None, *stops):
        config.eos_token_id = [*(stop for stop in stops if stop is not None), end]
    return config


def that_saves(config: GenerationConfig) -> GenerationConfig:
    """Return the generation config, or as much of it as transformers saves: before 5.23 not all that it has loaded."""
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    for settings in (config.to_dict() | {"do_sample": True}, ids):
        try:
            with tempfile.TemporaryDirectory() as trial:
                config.save_pretrained(trial)
            return config
        except ValueError:
            config = GenerationConfig.from_dict(settings)
    return config


def save_adapter(folder: Path, model) -> int:
    """Write the adapters in PEFT's format, for a server or for peft. Return a number that their weights determine."""
    if ranks.rank() > 0:
        return 0
    (config,) = model.peft_config.values()
    config.save_pretrained(folder)
    named = {name.replace(".default.", "."): p for name, p in model.named_parameters() if ".lora_" in name}
    weights = {f"base_model.model.{name}": torch.zeros(p.shape) if p.is_meta else p.detach().cpu().contiguous()
               for name, p in named.items()}
    save_file(weights, folder / "adapter_model.safetensors")
    return seed_for((folder / "adapter_model.safetensors").read_bytes())


@torch.no_grad()
def save_model(folder: Path, model, tokenizer) -> None:
    """Write an ordinary model folder, even from shards or adapters. The model does not change. Collective.

    All weights are collected on the CPU of rank 0. Each adapter is added to its layer's weight there, in fp32: in bf16
    up to half of what it learned would be rounded away, and a GPU that just holds the model has no room for that. A new
    model without weights writes the folder: transformers would save adapters alone, or give weights that were once
    quantised their 4-bit names back (with 5.17).
    """
    state = ranks.full_weights(model)
    if ranks.rank():
        return
    state = {key.replace(".base_layer.", "."): weight for key, weight in state.items() if ".lora_" not in key}
    for name, layer in lora_layers(model):
        (adapter,) = layer.active_adapters
        state[f"{name}.weight"] = state[f"{name}.weight"].float() + layer.get_delta_weight(adapter).float().cpu()
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype)
    plain.generation_config = that_saves(with_turn_end(model.generation_config, tokenizer))
    plain.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)
