"""Several processes share one run: who does what, and what is said when one of them ends.

torchrun starts the processes ("ranks", 0 to world - 1). All of them walk through the same method with the same weights.
At each stage a rank does its share of the work, and every rank gets all of the results, so that what follows is the
same everywhere. Rank 0 alone writes files and shows progress. Without torchrun the world is one rank, and nothing here
communicates.
"""
import os
import signal
import socket
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor


def world() -> int:
    """How many processes share this run; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0. (A number, no ranking of candidates.)"""
    return dist.get_rank() if dist.is_initialized() else 0


def on_this_machine() -> int:
    """How many ranks share this machine, its cores and its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world()))


def device(name: str) -> str:
    """A rank's own device: with several ranks each takes the GPU of its number on its machine."""
    if name != "cuda" or world() == 1:
        return name
    own = int(os.environ.get("LOCAL_RANK", rank()))
    if own >= torch.cuda.device_count():
        raise ValueError(f"this machine has {torch.cuda.device_count()} GPUs, and torchrun started more processes")
    torch.cuda.set_device(own)
    return f"cuda:{own}"


# ---------------------------------------------------------------------------------------------------- start and end


def start() -> None:
    """Join the other ranks where torchrun started this process, as its environment says: gloo, and nccl for GPUs.

    Once they have met, the timeout is long on purpose: ranks may wait for one that has the longest answers, and a rank
    that has ended is noticed without it, by the connection (gloo) or by torchrun.
    """
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys() or dist.is_initialized():
        return
    store, own, world_size = next(dist.rendezvous("env://", timeout=timedelta(minutes=5)))  # a wrong address ends here
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=own, world_size=world_size, timeout=timedelta(days=7))
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")
    # torchrun ends the other ranks with SIGTERM when one is gone. A rank that waits inside a collective never gets to
    # Python's own signal handlers, so a thread reads the signal, speaks and ends the process.
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    signal.set_wakeup_fd(theirs.fileno())
    signal.signal(signal.SIGTERM, lambda *_: None)

    def listen(theirs=theirs):  # the argument keeps the other end open
        while number := ours.recv(1):
            if number[0] == signal.SIGTERM:
                say_once(f"dust: {ENDED}")
                os._exit(2)

    threading.Thread(target=listen, daemon=True).start()


ENDED = "another process of this run has ended, or torchrun was told to stop; the same command with --resume goes on"


def stop() -> None:
    """Leave the other ranks after a whole run."""
    if dist.is_initialized():
        dist.destroy_process_group()


def say_once(text: str) -> None:
    """One line on stderr, from the rank that gets here first: what ends one rank ends them all, and once is enough."""
    first = True
    if world() > 1:
        try:
            first = dist.group.WORLD.get_group_store().add("said", 1) == 1
        except RuntimeError:
            pass  # whoever kept the count is gone, and did not say why
    if first:
        print(text, file=sys.stderr, flush=True)


def is_lost(error: Exception) -> bool:
    """Whether an error says that another rank is gone: gloo has no exception of its own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


# --------------------------------------------------------------------------------------------------- work and results


def every(value) -> list:
    """Each rank's value, on every rank."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def share(work: list) -> list:
    """This rank's items: rank, rank + world, ..."""
    return work[rank() :: world()]


def spread(work: list, do) -> list:
    """do(items) -> a result an item, on each rank with its share of the work; all results, in the work's order.

    Where there are fewer items than ranks, do gets an empty list.
    """
    shares = every(do(share(work)))
    return [shares[i % world()][i // world()] for i in range(len(work))]


def in_rounds(work: list, do):
    """do(item) of each item, in the work's order: an item a rank at a time, so that no result waits for all others."""
    for start in range(0, len(work), world()):
        yield from spread(work[start : start + world()], lambda own: [do(item) for item in own])


def on_first(do):
    """do() on rank 0, which may read and write files; every rank gets what it returned."""
    result = [do() if rank() == 0 else None]
    if world() > 1:
        dist.broadcast_object_list(result)
    return result[0]


@torch.no_grad()
def sum_gradients(parameters) -> None:
    """Each parameter's gradient becomes the sum of all ranks' gradients, added in fp32; none counts as zeros.

    Sharded parameters are left alone: FSDP has summed theirs in the backward pass.
    """
    for p in parameters if world() > 1 else ():
        if not p.requires_grad or isinstance(p, DTensor):
            continue
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        total = p.grad.float()
        dist.all_reduce(total)
        p.grad.copy_(total)
