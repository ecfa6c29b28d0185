"""Cut work into batches that fit into memory. An example has a prompt and an answer; a group shares one prompt."""
import math
import warnings
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from plumbing import ranks

HEAD_LOGITS = 2**24  # logits in memory at a time in the update; the backward pass computes each such block again
HEAD_LOGITS_ON_GPU = 2**26  # the same on a GPU, which needs larger blocks to be busy


def my_micro_batches(groups: list[list], micro_tokens: int, shared: bool) -> Iterable[tuple[list[list], bool]]:
    """Return (micro-batch, whether it counts) for this rank's share of the groups. shared: as in micro_batches.

    Every rank gets the same number of batches, because the forward pass of a sharded model waits for all ranks. A rank
    with less work repeats the shortest of all answers, in batches that do not count.
    """
    batches = micro_batches(ranks.share(groups), micro_tokens, shared)
    missing = max(ranks.gather(len(batches))) - len(batches)
    shortest = sorted((e for group in groups for e in group), key=lambda e: len(e.prompt) + len(e.answer))[:1]
    counted = [(batch, True) for batch in batches] + [([shortest], False)] * missing
    return ranks.in_sight(counted, "micro-batches")


def micro_batches(groups: list[list], micro_tokens: int, shared: bool) -> list[list[list]]:
    """Return batches of groups with at most micro_tokens tokens each. A larger group is cut into parts.

    shared: the answers to a prompt share it. If not, each answer is a padded row, and the padding counts too. Then a
    batch is one part of a group, as this is one forward pass, and all ranks of a sharded model make equally many.
    """
    parts, sizes = [], []
    for group in groups:
        prompt, longest = len(group[0].prompt), max(len(e.answer) for e in group)
        answers = [len(e.answer) if shared else prompt + longest for e in group]
        once = prompt if shared else 0  # tokens that each part adds to its answers
        for part in split_by_size(answers, micro_tokens - once):
            parts.append(group[part])
            sizes.append(once + sum(answers[part]))
    return [parts[batch] for batch in split_by_size(sizes, micro_tokens if shared else 1)]


def split_by_size(sizes: list[int], bound: int) -> list[slice]:
    """Cut a list into slices so that the sizes in each add up to at most bound. A larger item is a slice by itself."""
    starts, used = [], bound
    for i, size in enumerate(sizes):
        if used + size > bound or not starts:
            starts.append(i)
            used = 0
        used += size
    return [slice(*ends) for ends in zip(starts, [*starts[1:], len(sizes)])]


def as_pairs(groups: list[list]) -> list[tuple[Tensor, list[Tensor]]]:
    """Convert groups to the (prompt [L], answers [R]) that grpo.logprobs takes."""
    return [(group[0].prompt, [example.answer for example in group]) for group in groups]


def lay_out(groups: list[list], like: Tensor, name: str) -> Tensor | None:
    """Return one field of all examples as [N], of the kind of `like`: numbers are repeated. None if it is None."""
    examples = [example for group in groups for example in group]
    values = [getattr(example, name) for example in examples]
    if values[0] is None:
        return None
    if isinstance(values[0], Tensor):
        return torch.cat(values).to(like)
    lengths = torch.tensor([len(example.answer) for example in examples])
    return torch.tensor(values).repeat_interleave(lengths).to(like)


def averages(totals: dict[str, float], norms: list[float], corrected: bool) -> dict[str, float]:
    """Return grpo.update's metrics, and those of importance weights if `corrected`. totals: sums over the steps made.

    norms: the gradient norm of every step.
    """
    finite = [norm for norm in norms if math.isfinite(norm)]
    tokens, steps, skipped = max(totals["tokens"], 1), max(len(finite), 1), len(norms) - len(finite)
    names = ["entropy", "old_kl", "ref_kl", "rollout_gap"] + ["is_weight", "is_cut"] * corrected
    metrics = {name: totals[name] / tokens for name in names}
    if metrics["rollout_gap"] > 0.05:
        warnings.warn(f"rollout and update disagree by {metrics['rollout_gap']:.3f} nats a token", stacklevel=3)
    if skipped:
        warnings.warn(f"{skipped} optimiser steps left out: a reward or a gradient is not finite", stacklevel=3)
    return metrics | {
        "clip_share": totals["clip"] / tokens, "loss": totals["loss"] / steps, "grad_norm": sum(finite) / steps,
        "tokens": int(totals["tokens"]), "stepped": len(finite), "skipped": skipped,
    }


def draw_in_halves(draw: Callable, parts: list[tuple[Tensor, list[int], int]], model, *how) -> list[tuple]:
    """Call draw for (prompt [L], its seeds, its limit). If the memory runs out, do the answers in two halves.

    grpo.generate gives the same answers then, as each has its seed. draw: it or another; how: its sampling and eos_ids.
    """
    prompts, seeds, limits = map(list, zip(*parts))
    try:
        return draw(model, prompts, seeds, limits, *how)
    except torch.OutOfMemoryError:
        rows = sum(map(len, seeds))
        if rows == 1:
            raise
    # behind the except block, in which the failed call's tensors are still held
    torch.cuda.empty_cache()
    warnings.warn(f"out of memory with {rows} answers at a time: going on with half; lower --rows", stacklevel=2)
    first, second, left = [], [], rows // 2
    for prompt, its_seeds, limit in parts:
        cut = min(left, len(its_seeds))
        first += [(prompt, its_seeds[:cut], limit)] * (cut > 0)
        second += [(prompt, its_seeds[cut:], limit)] * (cut < len(its_seeds))
        left -= cut
    return draw_in_halves(draw, first, model, *how) + draw_in_halves(draw, second, model, *how)


def in_blocks(score: Callable, hidden: Tensor, targets: Tensor, rows: int) -> tuple[Tensor, ...]:
    """Return score(hidden [N, H], targets [N]), a tuple of [N], by `rows` positions: all logits never exist at once."""
    # with several blocks the backward pass computes each again
    run = score if len(targets) <= rows else partial(checkpoint, score, use_reentrant=False)
    return tuple(map(torch.cat, zip(*map(run, hidden.split(rows), targets.split(rows)))))


def head_rows(model) -> int:
    """Return for how many positions the head computes logits at a time."""
    logits = HEAD_LOGITS_ON_GPU if model.device.type == "cuda" else HEAD_LOGITS
    return max(1, logits // model.config.get_text_config().vocab_size)
