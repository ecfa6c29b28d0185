"""GRPO by hand: sample G answers to each prompt, compare them with their siblings, push up what did better.

    rollout           prompts -> a Rollout each: G sampled answers and the log-prob of every sampled token
    group_advantages  rewards -> how much better than its siblings each answer did          (paper 2.4)
    policy_loss       the clipped surrogate, with an optional pull towards a frozen reference (paper 2.4)
    update            PPO epochs over mini-batches of whole groups, one optimiser step a mini-batch

A ranking prompt is long and its G answers share it, so the model reads it once for all of them, exactly, in the
rollout and in the update alike. How it does that, and what a model gets that cannot, is in prefix.py.

Shapes: B prompts or rows, G answers a prompt, L prompt tokens, R answer tokens, V vocabulary, N answer tokens of a
whole batch laid end to end. Log-probs are natural logarithms, in fp32.
"""
import contextlib
import math
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from plumbing import ranks
from plumbing.models import lora_disabled
from prefix import NAME, Decoding, cut, evaluating, logprobs, plain_decode, shares_prompts, sharing

DRAWS = 64  # random numbers a row draws ahead


@dataclass
class Rollout:
    """One prompt and what the model answered to it, G times. All tensors on the CPU."""

    prompt: Tensor  # [L] token ids
    answers: list[Tensor]  # G tensors [R_g]: sampled ids, the EOS included where one was sampled
    logps: list[Tensor]  # G tensors [R_g]: log-prob of each sampled token when it was sampled, temperature applied
    finished: list[bool]  # G; False = cut off at max_new_tokens
    rewards: Tensor | None = None  # [G], filled in by whoever scores the answers


# ------------------------------------------------------------------------------------------------------- sampling


def sample(logits: Tensor, uniform: Tensor, temperature: float, top_p: float, top_k: int) -> tuple[Tensor, Tensor]:
    """One token a row, by inverting the cumulative distribution at `uniform`.

    logits: [B, V]; uniform: [B] in [0, 1), the only randomness. top_p = 1 and top_k = 0 switch the filters off, as
    training needs them; temperature 0 takes the likeliest token. Returns tokens [B] and their log-probs [B] under
    the tempered distribution before the filters (untempered at temperature 0).
    """
    logps = (logits.float() / (temperature or 1.0)).log_softmax(-1)  # [B, V]
    if temperature == 0:
        tokens = logps.argmax(-1)  # [B]
    else:
        probs, ids = logps.exp(), None  # [B, V]
        if top_k or top_p < 1:
            probs, ids = probs.topk(min(top_k or probs.shape[-1], probs.shape[-1]))  # [B, k], likeliest first
            probs = probs / probs.sum(-1, keepdim=True)
            probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0)  # by the mass of the likelier ones
        cdf = probs.cumsum(-1)  # [B, k]
        # right=True: the first entry above the threshold, so that a token of probability 0 is never drawn
        tokens = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True).clamp_(max=cdf.shape[-1] - 1)
        tokens = (tokens if ids is None else ids.gather(-1, tokens)).squeeze(-1)  # [B]
    return tokens, logps.gather(-1, tokens[:, None]).squeeze(-1)


@torch.no_grad()
def rollout(
    model, prompts: list[Tensor], *, answers: int, max_new_tokens: int, eos_ids, temperature: float = 1.0,
    top_p: float = 1.0, top_k: int = 0, generator: torch.Generator | None = None, max_rows: int = 256,
    progress=None, seeds: list[list[int]] | None = None,
) -> list[Rollout]:
    """Sample `answers` answers to each prompt (LongTensors [L_i] of unequal lengths, at least one token each).

    Each prompt is encoded once for all of its answers. At most max_rows answers decode at a time; prompts of similar
    length go together, and a prompt is encoded again only where its answers alone are more than max_rows. What an
    answer draws depends on the generator's state and on its place in the list, not on who shares its batch; or on its
    own seed, where seeds (answers of them for each prompt) are given.
    progress(n) is called whenever n more answers have ended. Returns one Rollout
    a prompt, in the order given.
    Best-of-N evaluation is the same call with answers=N.
    """
    where = generator.device if generator is not None else "cpu"
    seeds = seeds or torch.randint(2**62, (len(prompts), answers), generator=generator, device=where).tolist()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    parts = [(i, seeds[i][at : at + max_rows]) for i in order for at in range(0, answers, max_rows)]
    decode_part = partial(decode, Decoding) if shares_prompts(model) else plain_decode
    rows = [[] for _ in prompts]
    with evaluating(model):
        for chosen in cut([len(own) for _, own in parts], max_rows):
            batch = [(prompts[i].cpu(), own) for i, own in parts[chosen]]
            decoded = decode_part(
                model, batch, max_new_tokens, list(eos_ids), (temperature, top_p, top_k), progress or (lambda n: None)
            )
            # cloned, for what was made in inference mode could never be part of a backward pass
            decoded = ((tokens.clone(), logps.clone(), ended) for tokens, logps, ended in decoded)
            for i, own in parts[chosen]:
                rows[i] += [next(decoded) for _ in own]
    return [Rollout(prompt, *map(list, zip(*own))) for prompt, own in zip(prompts, rows)]


@torch.inference_mode()  # less to keep account of than under no_grad: a tenth of a step's time
def decode(layout, model, batch, max_new_tokens, eos_ids, sampling, progress) -> list[tuple[Tensor, Tensor, bool]]:
    """The loop behind rollout. layout: Decoding, or one of its kind. batch: each prompt with a seed for each of its
    answers; n answers in all.

    Returns, for each answer, its tokens [R], their log-probs [R], and whether it ended by itself.
    """
    device, n = model.device, sum(len(seeds) for _, seeds in batch)
    generators = [torch.Generator().manual_seed(seed) for _, seeds in batch for seed in seeds]
    state = layout(model, [prompt for prompt, _ in batch], [len(seeds) for _, seeds in batch])
    tokens = torch.zeros(n, max_new_tokens, dtype=torch.long, device=device)
    logps = torch.zeros(n, max_new_tokens, device=device)
    length = torch.full((n,), max_new_tokens, device=device)
    eos = torch.tensor(eos_ids, device=device)
    live = torch.arange(n, device=device)  # the rows still in the batch
    going = torch.ones(n, dtype=torch.bool, device=device)  # those of them that have not ended
    for t in range(max_new_tokens):
        if t % DRAWS == 0:
            uniform = torch.stack([torch.rand(DRAWS, generator=generators[i]) for i in live.tolist()])
            uniform = uniform.t().to(device)  # [DRAWS, live]
        token, logp = sample(state.logits, uniform[t % DRAWS], *sampling)  # [live] each
        tokens[live, t], logps[live, t] = token, logp
        ends = (token[:, None] == eos).any(-1) & going
        if n_ends := int(ends.sum()):
            length[live[ends]] = t + 1
            going &= ~ends
            progress(n_ends)
            keep = going.nonzero().squeeze(-1)
            if len(keep) == 0:
                break
            if len(keep) <= 0.9 * len(live):  # dropping rows copies their keys, so not for every single one
                state.keep(keep)
                token, live, going, uniform = token[keep], live[keep], going[keep], uniform[:, keep]
        if t + 1 < max_new_tokens:
            state.step(model, token)
    progress(int(going.sum()))
    length = length.tolist()
    going = set(live[going].tolist())
    return [(tokens[i, :r].cpu(), logps[i, :r].cpu(), i not in going) for i, r in enumerate(length)]


# ------------------------------------------------------------------------------------------------------ log-probs


def answer_logprobs(model, prompt: Tensor, answers: list[Tensor], *, temperature: float = 1.0) -> list[Tensor]:
    """Log-probs [R_g] of G answers (LongTensors [R_g]) to one prompt (LongTensor [L]), differentiable.

    Raises ValueError for a model with gradient checkpointing outside `sharing`, where its backward pass would run the
    layers again with another attention.
    """
    again = any(getattr(m, "gradient_checkpointing", False) and m.training for m in model.modules())
    if torch.is_grad_enabled() and again and shares_prompts(model) and model.config._attn_implementation != NAME:
        raise ValueError("with gradient checkpointing, call this and backward() inside `with prefix.sharing(model):`")
    logp, _ = logprobs(model, [(prompt, answers)], temperature)
    return list(logp.split([len(a) for a in answers]))


# ------------------------------------------------------------------------------------------------- GRPO's formulae


def equal_rewards(rewards: Tensor) -> Tensor:
    """[..., G] -> [...]: True where all G rewards are the same, so that the group teaches nothing.

    By comparing rewards: the standard deviation of equal floats need not come out as zero.
    """
    return (rewards == rewards[..., :1]).all(-1)


def group_advantages(rewards: Tensor, eps: float = 1e-6) -> Tensor:
    """How much better each answer did than its siblings (paper 2.4): (r - mean) / (std + eps) along each row.

    rewards: [B, G] or [G], one row a prompt; std as in torch.std (divided by G - 1). Returns the same shape.
    A row of equal rewards gives zeros, exactly.
    """
    rewards = rewards.float()
    if rewards.shape[-1] == 1:
        return torch.zeros_like(rewards)  # no sibling to compare with
    centred = rewards - rewards.mean(-1, keepdim=True)
    advantages = centred / (rewards.std(-1, keepdim=True) + eps)
    return advantages.masked_fill(equal_rewards(rewards)[..., None], 0.0)


def policy_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, ref_logp: Tensor | None = None, *, clip_low: float = 0.2,
    clip_high: float = 0.2, dual_clip: float | None = None, kl: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate a token, to be minimised (paper 2.4), plus kl times the distance from a reference.

    logp, old_logp, advantages, ref_logp: one shape, a value a token; only logp carries a gradient. The ratio
    exp(logp - old_logp) is clipped to [1 - clip_low, 1 + clip_high]: 0.2 / 0.2 in the paper, 0.2 / 0.28 in its
    release, with dual_clip 10, which also bounds the loss where the advantage is negative and the ratio large.
    Returns the loss, and diagnostics of the same shape without gradients: "clip" (1 where clipping stopped the
    gradient), "old_kl" and "ref_kl" (the estimator r - 1 - log r, never negative; ref_kl needs ref_logp).
    """
    log_ratio = logp - old_logp
    ratio = log_ratio.exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high))
    with torch.no_grad():
        clipped = torch.where(advantages > 0, ratio > 1 + clip_high, (ratio < 1 - clip_low) & (advantages < 0))
        if dual_clip is not None:
            clipped |= (advantages < 0) & (ratio > dual_clip)
        diagnostics = {"clip": clipped.float(), "old_kl": ratio - 1 - log_ratio}
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    if ref_logp is not None:
        to_ref = ref_logp - logp
        ref_kl = to_ref.exp() - 1 - to_ref
        loss = loss + kl * ref_kl
        diagnostics["ref_kl"] = ref_kl.detach()
    return loss, diagnostics


# --------------------------------------------------------------------------------------------------------- update


@dataclass
class Example:
    """One answer on its way through the update."""

    prompt: Tensor  # [L]
    answer: Tensor  # [R]
    advantage: float
    rollout_logp: Tensor | None  # [R], as it was sampled; None: nobody has sampled it here
    old_logp: Tensor | None = None  # [R], by the training forward before the first step; None: the current one
    ref_logp: Tensor | None = None  # [R], by the frozen reference


def make_examples(rollout: Rollout, supervised: bool) -> list[Example]:
    """The answers of one group with their advantages; none at all where the rewards are equal. Supervised: all."""
    if supervised:
        return [Example(rollout.prompt, answer, 1.0, None) for answer in rollout.answers]
    if equal_rewards(rollout.rewards):
        return []
    advantages = group_advantages(rollout.rewards).tolist()
    return [Example(rollout.prompt, *rest) for rest in zip(rollout.answers, advantages, rollout.logps)]


def micro_batches(groups: list[list[Example]], micro_tokens: int, shared: bool) -> list[list[list[Example]]]:
    """Batches of groups, of at most micro_tokens tokens each, the padding of the plain form included.

    A larger group is cut into parts of its answers, each with the prompt again; one answer with it is the least.
    """
    parts, sizes = [], []
    for group in filter(None, groups):
        prompt, longest = len(group[0].prompt), max(len(e.answer) for e in group)
        answers = [len(e.answer) if shared else prompt + longest for e in group]
        prompt *= shared  # once in each part
        for run in cut(answers, micro_tokens - prompt):
            parts.append(group[run])
            sizes.append(prompt + sum(answers[run]))
    return [parts[run] for run in cut(sizes, micro_tokens)]


def group_logprobs(model, groups: list[list[Example]], temperature: float) -> tuple[Tensor, Tensor]:
    """logprobs of groups of examples: log-probs and entropies [N], in their order."""
    return logprobs(model, [(group[0].prompt, [e.answer for e in group]) for group in groups], temperature)


def my_batches(model, groups: list[list[Example]], micro_tokens: int) -> list[tuple[list[list[Example]], bool]]:
    """The micro-batches of this rank's share of the groups, and whether each counts.

    Every rank runs as many forwards, for a sharded one waits for all ranks: a rank with less work repeats the shortest
    answer of all, which does not count.
    """
    groups = list(filter(None, groups))
    batches = micro_batches(ranks.share(groups), micro_tokens, shares_prompts(model))
    missing = max(ranks.gather(len(batches))) - len(batches)
    filler = sorted((e for group in groups for e in group), key=lambda e: len(e.prompt) + len(e.answer))[:1]
    return [(batch, True) for batch in batches] + [([filler], False)] * missing


@torch.no_grad()
def remember_logprobs(model, name: str, groups: list[list[Example]], micro_tokens: int, temperature: float) -> None:
    """Fill in old_logp or ref_logp (name) of every example with this model's log-probs; on every rank."""
    for batch, _ in my_batches(model, groups, micro_tokens):
        examples = [e for group in batch for e in group]
        with evaluating(model):
            logp, _ = ranks.run_forward(model, group_logprobs, batch, temperature)
        for example, values in zip(examples, logp.split([len(e.answer) for e in examples])):
            setattr(example, name, values.cpu())
    groups = list(filter(None, groups))  # shared out as in my_batches
    known = ranks.spread(groups, lambda own: [[getattr(e, name) for e in group] for group in own])
    for group, values in zip(groups, known):
        for example, value in zip(group, values):
            setattr(example, name, value)


def backward(
    model, groups: list[list[Example]], token_weight, micro_tokens: int, temperature: float, supervised: bool = False,
    **clip_and_kl,
) -> dict[str, float]:
    """Accumulate the gradients of one mini-batch, and return its loss and the sums of its diagnostics over tokens.

    Each rank computes a share of the groups; gradients and sums are those of all ranks, on every rank.
    token_weight(example) is the weight of each of its tokens, the denominator of the whole mini-batch included, so
    that the sum over micro-batches does not depend on how they were cut.
    """
    sums = dict.fromkeys(["loss", "clip", "old_kl", "ref_kl", "entropy", "rollout_gap", "tokens"], 0.0)
    shared = shares_prompts(model)
    for groups_here, counts in my_batches(model, groups, micro_tokens):
        batch = [e for group in groups_here for e in group]
        logp, entropy = ranks.run_forward(model, group_logprobs, groups_here, temperature)
        lengths = torch.tensor([len(e.answer) for e in batch])
        advantages = torch.tensor([e.advantage for e in batch]).repeat_interleave(lengths).to(logp)  # [N]
        weights = torch.tensor([token_weight(e) for e in batch]).repeat_interleave(lengths).to(logp)  # [N]
        # in a single on-policy step the old policy is the current one: the ratio is 1, with its gradient
        old = logp.detach() if batch[0].old_logp is None else torch.cat([e.old_logp for e in batch]).to(logp)  # [N]
        ref = None if batch[0].ref_logp is None else torch.cat([e.ref_logp for e in batch]).to(logp)  # [N]
        loss, diagnostics = policy_loss(logp, old, advantages, ref, **clip_and_kl)  # [N]
        loss = -logp if supervised else loss  # at advantage 1 and ratio 1 the gradients are the same
        loss = (loss * weights).sum() * counts
        with sharing(model) if shared else contextlib.nullcontext():  # checkpointed layers run again
            loss.backward()
        if not counts:
            continue
        sampled = old if batch[0].rollout_logp is None else torch.cat([e.rollout_logp for e in batch]).to(old)  # [N]
        for name, values in {**diagnostics, "entropy": entropy, "rollout_gap": (old - sampled).abs()}.items():
            sums[name] += float(values.sum())
        sums["loss"] += float(loss.detach())
        sums["tokens"] += len(logp)
    ranks.sum_gradients(model.parameters())
    return {name: sum(own[name] for own in ranks.gather(sums)) for name in sums}


def averages(totals: dict[str, float], norms: list[float]) -> dict[str, float]:
    """What update returns of its steps, from the sums over those made and the gradient norms of all."""
    finite = [norm for norm in norms if math.isfinite(norm)]
    tokens, steps, skipped = max(totals["tokens"], 1), max(len(finite), 1), len(norms) - len(finite)
    metrics = {name: totals[name] / tokens for name in ("entropy", "old_kl", "ref_kl", "rollout_gap")}
    if metrics["rollout_gap"] > 0.05:
        warnings.warn(f"rollout and update disagree by {metrics['rollout_gap']:.3f} nats a token", stacklevel=3)
    if skipped:
        warnings.warn(f"{skipped} optimiser steps left out: a reward or a gradient is not finite", stacklevel=3)
    return metrics | {
        "clip_share": totals["clip"] / tokens, "loss": totals["loss"] / steps, "grad_norm": sum(finite) / steps,
        "tokens": int(totals["tokens"]), "stepped": len(finite), "skipped": skipped,
    }


def update(
    model, optimizer, rollouts: list[Rollout], *, mini_batch: int = 16, epochs: int = 1, temperature: float = 1.0,
    clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float | None = None, kl: float = 0.0, ref_model=None,
    aggregation: str = "sequence", max_grad_norm: float = 1.0, micro_tokens: int = 16384, supervised: bool = False,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """Train on scored rollouts: `epochs` passes, shuffled, one optimiser step for every mini_batch prompts.

    temperature: the one they were sampled at. kl > 0 needs ref_model, the frozen start (with LoRA the model itself: its
    adapters are then off). aggregation: "sequence" takes the mean over an answer's tokens, then over the answers (the
    paper), "token" the mean over all tokens (the release). micro_tokens bounds the padded tokens of one forward: memory
    and speed, not the gradient. Several ranks have the same rollouts, and compute a share of the groups each.

    A group is never split between mini-batches. One whose rewards are all equal is left out, which changes nothing but
    its share of the KL term, for the denominator still counts it. A mini-batch in which every group has equal rewards
    makes no step: momentum and weight decay would move the weights without a gradient.

    supervised: learn every answer instead, by cross-entropy; any number of them a prompt, and their rewards, logps and
    finished, clipping and kl play no part.

    Returns averages over trained tokens: entropy, clip_share, old_kl, ref_kl, rollout_gap (how far the training
    forward's log-probs lie from those at sampling; warns above 0.05); averages over steps: loss, grad_norm (before
    clipping); and zero_variance (the share of groups left out), tokens (trained, epochs counted), stepped (steps made),
    skipped (steps left out, and warned of, because their gradient was not finite).
    """
    if aggregation not in ("sequence", "token"):
        raise ValueError(f'aggregation is "sequence" or "token", not {aggregation!r}')
    kl = 0.0 if supervised else kl
    if kl > 0 and ref_model is None:
        raise ValueError("kl > 0 needs ref_model, the frozen start")
    groups = [make_examples(r, supervised) for r in rollouts]
    if not supervised and (epochs > 1 or len(rollouts) > mini_batch):  # else a single step, with ratio 1
        remember_logprobs(model, "old_logp", groups, micro_tokens, temperature)
    if kl > 0:
        with lora_disabled(ref_model):  # with LoRA the reference is the model itself
            remember_logprobs(ref_model, "ref_logp", groups, micro_tokens, temperature)
    settings = dict(supervised=supervised, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, kl=kl)
    order = [torch.randperm(len(rollouts), generator=generator).split(mini_batch) for _ in range(epochs)]
    totals, norms = Counter(), []
    for chosen in (part.tolist() for parts in order for part in parts if any(groups[i] for i in part)):
        lengths = [len(answer) for i in chosen for answer in rollouts[i].answers]
        by_answer = aggregation == "sequence"
        weigh = lambda e: 1 / (len(lengths) * len(e.answer) if by_answer else sum(lengths))  # noqa: E731
        optimizer.zero_grad(set_to_none=True)
        with evaluating(model, checkpointing=True):  # without dropout: the ratio compares the policy with itself
            sums = backward(model, [groups[i] for i in chosen], weigh, micro_tokens, temperature, **settings)
        norms.append(float(ranks.full_state(torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm))))
        if math.isfinite(norms[-1]):  # or else every weight would be NaN, and the checkpoint
            optimizer.step()
            totals.update(sums)
    optimizer.zero_grad(set_to_none=True)
    zero_variance = sum(not g for g in groups) / max(len(groups), 1)
    return averages(totals, norms) | {"zero_variance": zero_variance}
