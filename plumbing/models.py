"""A model's weights: from a folder or the Hub, sharded over GPUs, with LoRA adapters, in an optimiser that moves bf16
ones too, in checkpoints and back."""
import contextlib
import copy
import pickle
import types
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from plumbing import ranks
from plumbing.problems import BadInput, first_line
from plumbing.chat import check_template

# ------------------------------------------------------------------------------------------------------------ loading


SHORT_NAMES = {  # the paper's models, and Qwen3's small ones
    "Qwen3-0.6B": "Qwen/Qwen3-0.6B",
    "Qwen3-1.7B": "Qwen/Qwen3-1.7B",
    "Qwen3-4B": "Qwen/Qwen3-4B",
    "Qwen3-8B": "Qwen/Qwen3-8B",
    "Qwen3-4B-Thinking": "Qwen/Qwen3-4B-Thinking-2507",
    "Qwen3-4B-Instruct": "Qwen/Qwen3-4B-Instruct-2507",
    "Qwen3-30B-Thinking": "Qwen/Qwen3-30B-A3B-Thinking-2507",
    "Qwen3-30B-Instruct": "Qwen/Qwen3-30B-A3B-Instruct-2507",
    "GPT-OSS-20B": "openai/gpt-oss-20b",
}


def model_folder(run_or_model: str) -> str:
    """The model of a run's folder; anything else names a model itself."""
    folder = Path(run_or_model or "-")
    return str(folder / "model") if (folder / "model").is_dir() and (folder / "args.json").exists() else run_or_model


def full_name(name: str) -> str:
    """A short name, or the last part of its model's, as the model's name on the Hub; all else, folders first, as it is.
    """
    known = {short.lower(): hub for short, hub in SHORT_NAMES.items()}
    known |= {hub.rpartition("/")[2].lower(): hub for hub in SHORT_NAMES.values()}
    return name if Path(name).is_dir() else known.get(name.lower(), name)


def refused(option: str, name: str, error: Exception) -> BadInput:
    """What to say of a model that cannot be had; of a gated one transformers says it in ten lines."""
    from huggingface_hub.errors import GatedRepoError

    cause = error
    while cause and not isinstance(cause, GatedRepoError):
        cause = cause.__cause__
    if cause:
        return BadInput(f"{option} {name} is gated: accept its licence at https://huggingface.co/{name}, "
                        "then `hf auth login`")
    return BadInput(f"{option} {name} does not load: {first_line(error)}")


def load_config(name: str, option: str = "--model") -> tuple:
    """(the configuration of a model folder or a model on the Hub, whether it is on this machine already)."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    local = True
    try:
        if not Path(name).is_dir():
            AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        local = False
        try:  # one quick question, for transformers itself would try for half a minute
            HfApi().model_info(name, timeout=5)
        except GatedRepoError as error:  # which is a RepositoryNotFoundError too
            raise refused(option, name, error) from None
        except RepositoryNotFoundError:
            raise BadInput(f"{option} {name}: no such folder, and no such model on the Hub") from None
        except Exception:
            raise BadInput(
                f"{option} {name}: no such folder, not downloaded before, and the Hub does not answer; "
                "give the folder of a model"
            ) from None
    try:
        return AutoConfig.from_pretrained(name, local_files_only=local), local
    except Exception as error:
        raise refused(option, name, error) from None


def plain_weights(name: str, config, option: str = "--model") -> dict:
    """What from_pretrained has to be told so that quantised weights become ordinary numbers, which can be trained.

    Raises BadInput for a format that transformers does not undo.
    """
    from transformers import Mxfp4Config

    how = getattr(config, "quantization_config", None)
    method = how.get("quant_method") if isinstance(how, dict) else getattr(how, "quant_method", None)
    if not how:
        return {}
    if method != "mxfp4":  # GPT-OSS's
        raise BadInput(f"{option} {name}: its weights are quantised ({method}) and cannot be trained; give the model "
                       "that they were made from")
    return {"quantization_config": Mxfp4Config(dequantize=True)}


def eos_ids(model, tokenizer) -> list[int]:
    """Whatever either the tokenizer or the generation config calls an end: models ship with the two disagreeing."""
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    return sorted({stop for stop in [*stops, tokenizer.eos_token_id] if stop is not None})


def fits_context(model, prompt: torch.Tensor, answer_tokens: int) -> bool:
    """Whether a prompt [L] and the longest answer fit the model's context; beyond it are positions it never saw."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return not context or len(prompt) + answer_tokens <= context


def load_model(name: str, *, optimizer: str, shard: bool, device: str, effort: str = "", option: str = "--model"):
    """(model, tokenizer); the weights in fp32 or bf16 as the optimiser wants them (see make_optimizer).

    effort: --reasoning-effort, which the chat template then has to know. option: what named this model, for an error.
    Raises BadInput where it does not load, or cannot be used.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config, local = load_config(name, option)
    # a shard is its own fp32 master: the forward casts what it has gathered
    dtype = torch.float32 if optimizer == "fp32" or (shard and optimizer == "masters") else torch.bfloat16
    plain = plain_weights(name, config, option)
    try:
        tokenizer = from_hub(AutoTokenizer, name, local)
        if not tokenizer("x y 1").input_ids:
            raise BadInput(f"{option} {name}: its tokenizer is empty")
        check_template(tokenizer, name, effort)
        model = from_hub(AutoModelForCausalLM, name, local, dtype=dtype, **plain)
    except BadInput:
        raise
    except Exception as error:  # three libraries, each with exceptions of its own
        raise refused(option, name, error) from None
    model.was_quantized = bool(plain)
    if dtype == torch.float32:
        model.float()  # with transformers 5.17 (not with 5.24) what was quantised comes as bf16
    if not eos_ids(model, tokenizer):
        raise BadInput(f"{option} {name}: nothing names an end-of-text token")
    if shard:
        shard_model(model, torch.float32 if optimizer == "fp32" else torch.bfloat16, device)
    return model.to(device).eval(), tokenizer


def from_hub(kind, name: str, local: bool, **settings):
    """from_pretrained; what was stopped while it was downloaded has a configuration here, and its weights not yet."""
    try:
        return kind.from_pretrained(name, local_files_only=local, **settings)
    except OSError:
        if not local or Path(name).is_dir():
            raise
        return kind.from_pretrained(name, **settings)


def checkpoint_layers(model) -> None:
    """Each layer keeps its input alone and computes the rest again for the backward pass: less memory, a third slower.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()  # two names of one thing, before and after transformers 5.24


# --------------------------------------------------------------------------------------------- sharded over the ranks


def shard_model(model, compute: torch.dtype, device: str) -> None:
    """FSDP2: every rank keeps 1 / world of each weight, its gradient and its optimiser state, in the weights' dtype.

    Each layer's weights are gathered for its forward and backward, in the compute dtype, and its gradients are summed
    (not averaged: the loss has the denominator of all ranks) in fp32. A forward is a collective: see run_forward.
    """
    mesh = torch.distributed.init_device_mesh(device.split(":")[0], (ranks.world(),))
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    for module in [*layers, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum
    model.run_forward = types.MethodType(lambda self, forward, *inputs: forward(self, *inputs), model)
    register_fsdp_forward_method(model, "run_forward")
    model.run_forward(lambda model: None)  # whoever has the first forward is FSDP's root: not a layer
    model.reshard()


def run_forward(model, forward, *inputs):
    """forward(model, *inputs); with a sharded model as one forward of FSDP's, whatever it calls of the model inside."""
    return model.run_forward(forward, *inputs) if isinstance(model, FSDPModule) else forward(model, *inputs)


@contextlib.contextmanager
def gathered(model):
    """Within it a sharded model has all its weights on every rank: a forward, a decode step, communicates nothing."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not model, recurse=False)


def whole(state):
    """The same nested dicts and lists with every sharded tensor in full, on the CPU. Collective."""
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, list):
        return [whole(value) for value in state]
    return state.full_tensor().cpu() if isinstance(state, DTensor) else state


def sharded(value, like: torch.Tensor):
    """A full tensor cut as `like` is; anything else as it is."""
    if not isinstance(like, DTensor) or not isinstance(value, torch.Tensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


# --------------------------------------------------------------------------------------------------------------- LoRA


def add_lora(model, rank: int, seed: int) -> None:
    """Trainable fp32 adapters of this rank on every linear layer but the head (package peft); the rest is frozen.

    The experts of a mixture are no layers of their own, and stay: peft would make whole copies of them in each forward.
    """
    from peft import LoraConfig, inject_adapter_in_model

    head = model.get_output_embeddings()
    layers = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]
    torch.manual_seed(seed)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers), model)
    for p in model.parameters():
        p.data = p.data.float() if p.requires_grad else p.data


def lora_layers(model) -> list[tuple[str, torch.nn.Module]]:
    """Name and layer of each linear layer that has adapters."""
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]


def frozen_copy(model, args):
    """The model before training, for the KL term; with LoRA that is the model itself with its adapters off.

    args: dust.Args.
    """
    if args.lora:
        return model
    if args.shard:  # what is sharded cannot be copied, but it can be read again
        again, _ = load_model(args.init or args.model, optimizer=args.optimizer, shard=True, device=args.device)
        again.config._attn_implementation = model.config._attn_implementation
        return again.requires_grad_(False)
    return copy.deepcopy(model).requires_grad_(False)


@contextlib.contextmanager
def lora_disabled(model):
    """Within it the model is the one that the adapters were added to; a model without adapters is as it is."""
    for _, layer in lora_layers(model):
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for _, layer in lora_layers(model):
            layer.enable_adapters(True)


@torch.no_grad()
def with_adapters_merged(model) -> dict[str, torch.Tensor]:
    """The state of an ordinary model that says what this one says: each adapter added to its layer's weight, in fp32.

    In bf16 half of what was learned would be rounded away, for a step at an adapter's learning rate is smaller than a
    weight's last bit. So it is for whoever loads what is saved in bf16 (load_model does, where fp32 does not fit).
    """
    state = {name.replace(".base_layer.", "."): weight for name, weight in model.state_dict().items()
             if ".lora_" not in name}
    for name, layer in lora_layers(model):
        (adapter,) = layer.active_adapters
        state[f"{name}.weight"] = layer.get_base_layer().weight.float() + layer.get_delta_weight(adapter).float()
    return state


# ------------------------------------------------------------------------------------------------------ the optimiser


class SmallStepAdam(torch.optim.Optimizer):
    """AdamW for bf16 weights that does not lose small steps.

    A bf16 number has 8 significant bits: a weight of 0.02 at a learning rate of 1e-6 is moved by far less than half its
    last bit, so that plain bf16 AdamW leaves 98 % of the weights where they are. keep says what is remembered of each
    weight beside fp32 moments (bf16 ones stand still too: 1 - beta2 is less than half a last bit):

        "masters"  the weight itself in fp32; the model's is its rounding              12 bytes of state a weight
        "kahan"    what rounding has taken away so far, in bf16: together about 16 significant bits   10 bytes
    """

    def __init__(self, parameters, lr: float, keep: str, weight_decay: float = 0.0, betas=(0.9, 0.999), eps=1e-8):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})
        self.keep = keep

    @torch.no_grad()
    def step(self):
        """One step of AdamW in fp32; what has no gradient is left alone."""
        for group in self.param_groups:
            (beta1, beta2), lr, eps = group["betas"], group["lr"], group["eps"]
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
                change = (m / scale).mul_(-lr / (1 - beta1 ** state["step"]))
                if group["weight_decay"]:
                    weight = state["kept"] if self.keep == "masters" else p.float()
                    change.sub_(weight, alpha=lr * group["weight_decay"])
                if self.keep == "masters":
                    p.copy_(state["kept"].add_(change))
                else:
                    exact = change.add_(state["kept"]).add_(p)  # the small ones first
                    p.copy_(exact)
                    state["kept"].copy_(exact.sub_(p))

    def load_state_dict(self, saved: dict) -> None:
        """torch would round all of the state to the weights' dtype, and with it the masters and the moments."""
        super().load_state_dict(saved)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, state in saved["state"].items():
            p = parameters[index]
            self.state[p] = {k: v.to(p.device) if isinstance(v, torch.Tensor) else v for k, v in state.items()}


def make_optimizer(model, kind: str, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """torch's AdamW where the trained weights are fp32, as LoRA's and shards (--shard) may be; else what kind keeps."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if all(p.dtype == torch.float32 for p in parameters):
        fused = True if parameters[0].is_cuda else None  # there the plain one makes temporaries as large as the model
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=fused)
    return SmallStepAdam(parameters, lr, kind, weight_decay)


def warm_up(optimizer, lr: float, step: int, steps: int) -> None:
    """Sets the learning rate of a step, counted from 0: over the first `steps` it grows evenly, a resumed run's too."""
    for group in optimizer.param_groups:
        group["lr"] = lr * min(1.0, (step + 1) / max(steps, 1))


# -------------------------------------------------------------------------------------------------------------- files


def save_checkpoint(path: Path, model, optimizer, step: int) -> None:
    """Trained weights, optimiser and step in one file, whole or not at all. All randomness follows from the step.

    Sharded ones are gathered for it, so that any number of ranks can go on from it.
    """
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    state = {"model": whole(trained), "optimizer": whole(optimizer.state_dict()), "step": step}
    if ranks.rank() == 0:
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)


@torch.no_grad()
def load_checkpoint(path: Path, model, optimizer) -> int:
    """Puts a checkpoint into model and optimiser; returns its step, 0 where there is none."""
    if not path.exists():
        return 0
    try:
        state = torch.load(path, map_location="cpu", mmap=model.device.type != "cpu")
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        for name, p in trained:
            p.copy_(sharded(state["model"][name], p))
        for index, own in state["optimizer"]["state"].items():
            own.update({name: sharded(value, trained[index][1]) for name, value in own.items()})
        optimizer.load_state_dict(state["optimizer"])
        return state["step"]
    except (RuntimeError, ValueError, LookupError, TypeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise BadInput(f"{path} cannot be read ({first_line(error)}); delete it, and training starts again") from None


def save_model(folder: Path, model, tokenizer) -> None:
    """An ordinary model folder, whatever the model is made of here: shards, adapters. The model stays as it is."""
    state = with_adapters_merged(model) if lora_layers(model) else whole(model.state_dict())
    if ranks.rank() == 0:
        # with transformers 5.17 (not 5.24) what was quantised would get its 4-bit names back: one for all layers
        model.save_pretrained(folder, state_dict=state, save_original_format=not getattr(model, "was_quantized", False))
        tokenizer.save_pretrained(folder)
