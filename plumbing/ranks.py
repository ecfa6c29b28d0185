"""Several processes share one run: which process does what, and how weights are spread over them (FSDP2, --shard).

torchrun starts the processes ("ranks", from 0). All of them walk through the same method: at each stage a rank does its
share of the work, and then gets the results of all ranks. Only rank 0 writes files and shows progress. Without torchrun
there is one rank, and nothing here communicates.
"""
import contextlib
import os
import shutil
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from plumbing.problems import first_line

LONG = timedelta(days=7)  # a rank may wait as long as this for the answers of another
LONG_PART = 30  # seconds after which a part of a stage gets a bar


def world() -> int:
    """Return how many processes share this run: 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0. (Elsewhere "ranking" is an order of candidates.)"""
    return dist.get_rank() if dist.is_initialized() else 0


def local_world() -> int:
    """Return how many ranks share this machine, its cores and its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world()))


def start() -> None:
    """Join the other ranks, if torchrun started this process. A wrong address is noticed after five minutes.

    Later a rank may wait long for the answers of another, also in the store, where ranks meet before NCCL's first
    collective. One that has died is noticed without a timeout: its connection closes (gloo), or torchrun ends the
    others.
    """
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys() or dist.is_initialized():
        return
    store, number, count = next(dist.rendezvous("env://", timeout=timedelta(minutes=5)))
    store.set_timeout(LONG)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=LONG)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="replace")


def print_once(text: str) -> None:
    """Print an error that every rank meets, on stderr, once for each machine."""
    if os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0":
        print(text, file=sys.stderr)


def stop() -> None:
    """Leave the other ranks at the end of a run."""
    if dist.is_initialized():
        dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------- work and results


def in_sight(items, name: str) -> tqdm:
    """Return the items of a part of a stage, to go through. A part that takes long has a bar below the stage's."""
    return tqdm(items, f"  {name:<16}", leave=False, delay=LONG_PART, unit="", dynamic_ncols=True, disable=rank() > 0)


def gather(value) -> list:
    """Return the list of all ranks' values, on every rank."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def share(work: list) -> list:
    """Return this rank's items of a list: rank, rank + world, rank + 2 world, ..."""
    return work[rank() :: world()]


def spread(work: list, do) -> list:
    """Call do(items) on each rank with its share, which may be empty; return one result an item, in order."""
    shares = gather(do(share(work)))
    return [shares[i % world()][i // world()] for i in range(len(work))]


def on_first(do):
    """Call do() on rank 0 only, because it reads or writes files; return its result, or raise its error, everywhere."""
    result = error = None
    try:
        result = do() if rank() == 0 else None
    except Exception as problem:
        error = problem
    result, error = gather((result, error))[0]
    if error:
        raise error
    return result


@torch.no_grad()
def sum_gradients(parameters) -> None:
    """Replace each gradient by the sum over all ranks, added in fp32. A missing gradient counts as zeros."""
    for p in parameters:
        if world() == 1 or not p.requires_grad or isinstance(p, DTensor):  # FSDP has summed a DTensor's gradient
            continue
        total = torch.zeros_like(p, dtype=torch.float32) if p.grad is None else p.grad.float()
        dist.all_reduce(total)
        p.grad = total.to(p.dtype)


# -------------------------------------------------------------------------------------------------- sharded weights


def shard_model(model, compute: torch.dtype, device: str, whole=None) -> None:
    """Spread a model over the ranks (FSDP2): each keeps 1 / world of every weight, its gradient and optimiser state.

    A model on the meta device gets its weights from `whole`, the same model with weights, which only rank 0 needs. The
    other ranks hold one whole weight at a time.

    A layer's weights are gathered for each pass, in the compute dtype. Gradients are summed in fp32, not averaged: the
    loss has the denominator of all ranks. All ranks make each forward, through `run_forward` or inside `unsharded`.
    """
    mesh = dist.init_device_mesh(device.split(":")[0], (world(),))
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    for module in [*layers, model]:
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32))
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum
    if model.device.type == "meta":
        model.to_empty(device=device)
        take_weights(model, whole)
    run_forward(model, lambda model: None)  # the first module to run forward becomes FSDP's root: make it the model
    model.reshard()


@torch.no_grad()
def take_weights(model, whole) -> None:
    """Copy the weights and buffers of rank 0's `whole` into a sharded model. Collective."""
    state = whole.state_dict() if rank() == 0 else {}
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    buffers = on_first(lambda: dict(whole.named_buffers()))
    for name, buffer in model.named_buffers():  # some, as a rotary embedding's, are not in the state dict
        buffer.copy_(buffers[name])


def run_forward(model, forward, *inputs):
    """Return forward(model, *inputs). FSDP sees one forward pass, however often forward calls the model."""
    if not isinstance(model, FSDPModule):
        return forward(model, *inputs)

    def once(*inputs):
        del model.forward  # inside, model(...) is the model's own forward again
        return forward(model, *inputs)

    model.forward = once  # FSDP gathers the weights around model(...), which calls this
    return model(*inputs)


@contextlib.contextmanager
def unsharded(model):
    """Inside, every rank has all weights of a sharded model, so that no forward communicates. Collective."""
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
        forget_forwards(parts)


def forget_forwards(parts: list) -> None:
    """Empty the list in which FSDP notes each forward pass of a layer, also without gradients.

    Only a backward pass empties it, so sampling would fill the memory: 2 kB for each step of a model of 48 layers. And
    by this list the next backward pass gathers ahead: a rank that has drawn no answers would gather other weights than
    the rest, and all would wait for each other.
    """
    for part in parts:
        state = part._get_fsdp_state()
        state._comm_ctx.post_forward_order.clear()
        if state._fsdp_param_group:
            state._fsdp_param_group._post_forward_indices.clear()


def gathered_bytes(model) -> int:
    """Return the bytes that `unsharded` adds to this rank, at most (masters are gathered in bf16); 0 without shards."""
    return sum(p.element_size() * p.numel() for p in model.parameters() if isinstance(p, DTensor))


def full_state(value):
    """Return a sharded tensor in full, on the CPU; anything else unchanged. Collective."""
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def full_weights(model) -> dict:
    """Return a model's state dict, in full and on the CPU, on rank 0; an empty dict on the others. Collective."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def save_shards(folder: Path, state: dict, step: int) -> None:
    """Write a nested dict of tensors and numbers to folder/STEP, each rank its shards. Then delete older steps.

    torch writes the file .metadata last: a folder without it is of a run that was killed while writing. Collective.
    """
    try:
        dcp.save(state, checkpoint_id=folder / str(step))
    except dcp.CheckpointException as error:  # it is no Exception, and holds those of the ranks
        raise next(iter(error.failures.values()))[0] from None
    for older in folder.iterdir() if rank() == 0 else ():
        if older.name != str(step):
            shutil.rmtree(older, ignore_errors=True)


def newest_shards(folder: Path) -> tuple[int, dict]:
    """Return the last step that was saved as a whole, and name -> metadata of what it holds; (0, {}) without one."""
    steps = [int(path.parent.name) for path in folder.glob("*/.metadata")]
    if not steps:
        return 0, {}
    reader = dcp.FileSystemReader(folder / str(max(steps)))
    return max(steps), reader.read_metadata().state_dict_metadata


def room_for(kept, like: torch.Tensor):
    """Return what the saved value of this metadata can be read into: a tensor, cut as `like` if it has its shape."""
    if not isinstance(kept, dcp.metadata.TensorStorageMetadata):
        return None  # a number takes no room
    if kept.size == like.shape:
        return torch.empty_like(like, dtype=kept.properties.dtype)
    return torch.empty(kept.size, dtype=kept.properties.dtype, device=like.device)


def load_shards(folder: Path, state: dict, step: int) -> None:
    """Read what save_shards wrote into a dict like the one that was saved. ValueError if it is damaged. Collective."""
    try:
        dcp.load(state, checkpoint_id=folder / str(step))
    except dcp.CheckpointException as error:
        raise ValueError(first_line(next(iter(error.failures.values()))[0])) from None
