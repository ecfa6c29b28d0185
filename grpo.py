"""GRPO by hand: sample G answers to each prompt, compare them with one another, make the better ones likelier.

This is section 2.4 of the paper. Read it in this order; a training step begins with the rollout:

    group_advantages  rewards -> how much better each answer did than the others to the same prompt, its siblings
    policy_loss       the clipped surrogate of each token, with a pull towards the frozen reference
    token_weights     how the tokens of a mini-batch are averaged: here GRPO, DAPO and Dr. GRPO differ
    update            PPO epochs over mini-batches of whole groups, one optimiser step for each mini-batch
    rollout           prompts -> a Rollout for each: G sampled answers and the log-prob of each of their tokens
    logprobs          the last section: how the model reads a long prompt once for all of its answers, exactly

Before you train a model here, set all of its dropout to 0, and call enable_sharing(model) once. Without that call the
results are the same up to rounding, but the model reads a prompt again for each answer, which is slower.

Shapes: B prompts or rows, G answers to a prompt (a "group" in this file), n rows being decoded, L prompt tokens, R
answer tokens, T packed tokens, N answer tokens of a batch, V vocabulary, H hidden. Log-probs: nats, in fp32.
"""
import math
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from plumbing import ranks
from plumbing.batches import (as_pairs, averages, draw_in_halves, head_rows, in_blocks, lay_out, my_micro_batches,
                              split_by_size)
from plumbing.fast_decode import SharedCache
from plumbing.models import backward_in_order, lora_disabled
from plumbing.other_models import (generate_with_transformers, has_key_cache, positions_follow_longest_row, run_plain,
                                   try_sharing)
from plumbing.shared_prompt import Packed, body, cache_arguments, plain_attention, shares_prompts

MAX_GRADIENT_NORM = 1.0
DRAWS_AHEAD = 64  # uniform random numbers that are made at a time for each answer
DRAWN_LOGITS = 2**21  # logits that draw_token handles at a time; a CPU is slower with more, because of memory traffic


@dataclass
class Rollout:
    """One prompt and G answers of the model to it. All tensors are on the CPU."""

    prompt: Tensor  # [L] token ids
    answers: list[Tensor]  # G tensors [R_g]: sampled ids, the EOS included if one was sampled
    logps: list[Tensor]  # G tensors [R_g]: log-prob of each token when it was sampled, at the sampling temperature
    finished: list[bool]  # G; False = cut off at max_new_tokens
    rewards: Tensor | None = None  # [G], filled in after the answers are scored


class Sampling(NamedTuple):
    """How tokens are drawn. Training needs top_p = 1 and top_k = 0 (no filters). Temperature 0: the likeliest token."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


# ----------------------------------------------------------------------------------------------------- the advantages


def equal_rewards(rewards: Tensor) -> Tensor:
    """[..., G] -> [...]: True where all G rewards are the same. Such a group teaches nothing."""
    return (rewards == rewards[..., :1]).all(-1)  # not std == 0: the computed std of equal floats may be above 0


def group_advantages(rewards: Tensor, eps: float = 1e-6) -> Tensor:
    """How much better each answer did than its siblings (paper 2.4): (r - mean) / (std + eps) along each row.

    rewards: [B, G] or [G], a row for each prompt. Returns the same shape. std is torch.std (divided by G - 1). A row of
    equal rewards gives exact zeros.
    """
    rewards = rewards.float()
    if rewards.shape[-1] == 1:
        return torch.zeros_like(rewards)  # no sibling to compare with
    centred = rewards - rewards.mean(-1, keepdim=True)
    advantages = centred / (rewards.std(-1, keepdim=True) + eps)
    return advantages.masked_fill(equal_rewards(rewards)[..., None], 0.0)


# ----------------------------------------------------------------------------------------------------------- the loss


def policy_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, ref_logp: Tensor | None = None, *,
                clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float | None = None,
                kl: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of each token: minus PPO's clipped surrogate, plus kl times the KL to a reference (paper 2.4).

    logp, old_logp, advantages, ref_logp: one shape, a value for each token; only logp carries a gradient. The ratio
    exp(logp - old_logp) is clipped to [1 - clip_low, 1 + clip_high]: 0.2 and 0.2 in the paper, 0.2 and 0.28 in its
    release. dual_clip (10 in the release) is an upper bound on the ratio where the advantage is negative.
    Also returns diagnostics of the same shape without gradients: "clip" (1 where clipping stopped the gradient),
    "old_kl" and, with ref_logp, "ref_kl" (KL by the estimator r - 1 - log r, which is never negative).
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


def importance_weights(logp: Tensor, sampled_logp: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Return factors of the advantages of answers that a server drew, and where they were cut: 1 or 0.

    logp, sampled_logp: one shape, the log-prob of each token by the model as it is here, and as it was drawn; two
    programs with the same weights round differently. The factor is min(exp(logp - sampled_logp), limit), without
    gradient: the expected gradient is then that of our own model, except for what the limit cuts off.
    """
    ratio = (logp - sampled_logp).detach().exp()
    return ratio.clamp(max=limit), (ratio > limit).float()


def token_weights(lengths: list[int], loss: str) -> list[float]:
    """For each answer of a mini-batch, the weight of each of its tokens in the loss. Over all tokens they sum to 1.

    lengths: the number of tokens of every answer in the mini-batch, groups of equal rewards included. So the weights
    do not depend on how the mini-batch is later cut into micro-batches, or shared over ranks.
    loss: "sequence" takes the mean over each answer's tokens, then over the answers (GRPO and the paper). "token" takes
    the mean over all tokens, so a long answer counts more (DAPO and the paper's release). Else ValueError.
    """
    if loss == "sequence":
        return [1 / (len(lengths) * length) for length in lengths]
    if loss == "token":
        return [1 / sum(lengths) for _ in lengths]
    raise ValueError(f'loss is "sequence" or "token", not {loss!r}')


# --------------------------------------------------------------------------------------------------------- the update


@dataclass
class Example:
    """One answer on its way through the update."""

    prompt: Tensor  # [L]
    answer: Tensor  # [R]
    advantage: float
    rollout_logp: Tensor | None  # [R], recorded when the answer was sampled; None for answers to imitate (sft)
    old_logp: Tensor | None = None  # [R], computed before the first optimiser step; None: the current log-prob
    ref_logp: Tensor | None = None  # [R], of the frozen reference; None: no KL term
    weight: float = 0.0  # of each token of the answer, in the current mini-batch


def update(model, optimizer, rollouts: list[Rollout], args, *, reference=None, generator=None) -> dict[str, float]:
    """Train on scored rollouts: shuffled PPO epochs, one optimiser step for every args.mini_batch prompts.

    args: dust.Args or any object with its fields mode, mini_batch, ppo_epochs, temperature (that of the rollouts), loss
    (see token_weights), clip, clip_high (0: as clip), dual_clip (0: none), kl, micro_tokens (a bound for memory: the
    gradient does not depend on it), server_rollouts (see importance_weights) and is_clip. kl > 0 needs a reference, the
    frozen model that training starts from; with LoRA it is the model itself. generator: torch.Generator for the
    shuffling. Each rank gets the same rollouts and computes a share of each mini-batch.

    A group is never split between mini-batches. A group of equal rewards is skipped. Only its KL term is lost: the
    denominator still includes it. A mini-batch of only such groups makes no step, because momentum and weight decay
    would move the weights without a gradient. With args.mode "sft" every answer is learned by cross-entropy, without
    rewards, logps, finished, clipping and kl.

    Returns averages over trained tokens: entropy, clip_share, old_kl, ref_kl, rollout_gap (mean distance to the
    log-probs at sampling, in nats; warns above 0.05), with server_rollouts is_weight and is_cut (mean factor,
    share of tokens whose factor was cut); averages over optimiser steps: loss, grad_norm (before clipping); and
    zero_variance (share of groups with equal rewards), tokens (each counted once an epoch), stepped (optimiser
    steps made), skipped (those left out because the gradient was not finite; warns).
    """
    supervised = args.mode == "sft"
    if args.kl > 0 and not supervised and reference is None:
        raise ValueError("kl > 0 needs reference, the frozen start")
    groups = [make_examples(rollout, supervised) for rollout in rollouts]
    taught = [group for group in groups if teaches(group)]
    orders = [torch.randperm(len(groups), generator=generator) for _ in range(args.ppo_epochs)]
    mini_batches = [part.tolist() for order in orders for part in order.split(args.mini_batch)]
    if len(mini_batches) > 1 and not supervised:  # in a single step the old policy is the current one
        remember_logprobs(model, taught, "old_logp", args)
    if args.kl > 0 and not supervised:
        with lora_disabled(reference):
            remember_logprobs(reference, taught, "ref_logp", args)
    for module in model.modules():  # eval mode; but gradient checkpointing works only in training mode
        module.training = getattr(module, "gradient_checkpointing", False)
    totals, norms = Counter(), []
    for mini_batch in mini_batches:
        chosen = [groups[i] for i in mini_batch]
        if not any(map(teaches, chosen)):
            continue
        examples = [example for group in chosen for example in group]
        weights = token_weights([len(example.answer) for example in examples], args.loss)
        for example, weight in zip(examples, weights):
            example.weight = weight
        optimizer.zero_grad(set_to_none=True)
        sums = backward(model, list(filter(teaches, chosen)), args, supervised)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        norms.append(float(ranks.full_state(norm)))
        if math.isfinite(norms[-1]):  # else every weight would become NaN, and the checkpoint with them
            optimizer.step()
            totals.update(sums)
    optimizer.zero_grad(set_to_none=True)
    metrics = averages(totals, norms, corrected=args.server_rollouts)
    return metrics | {"zero_variance": (len(groups) - len(taught)) / max(len(groups), 1)}


def backward(model, groups: list[list[Example]], args, supervised: bool) -> dict[str, float]:
    """Accumulate the gradients of one mini-batch. Return its loss and the sums of its diagnostics over tokens.

    Each rank computes a share of the groups, then gets the gradients and sums of all.
    """
    names = ["loss", "clip", "old_kl", "ref_kl", "entropy", "rollout_gap", "tokens", "is_weight", "is_cut"]
    sums = dict.fromkeys(names, 0.0)
    clips = dict(clip_low=args.clip, clip_high=args.clip_high or args.clip, dual_clip=args.dual_clip or None)
    for micro_batch, counts in micro_batches_for(model, groups, args):
        logp, entropy = ranks.run_forward(model, logprobs, as_pairs(micro_batch), args.temperature)  # [N]
        field = partial(lay_out, micro_batch, logp)  # name -> that field of Example for each token, [N]
        old = logp.detach() if field("old_logp") is None else field("old_logp")  # detached: ratio 1, with gradient
        sampled = old if field("rollout_logp") is None else field("rollout_logp")
        factor, cut = importance_weights(old, sampled, args.is_clip) if args.server_rollouts else (1.0, None)
        loss, diagnostics = policy_loss(logp, old, field("advantage") * factor, field("ref_logp"), kl=args.kl, **clips)
        if supervised:
            loss = -logp
        loss = (loss * field("weight")).sum() * counts
        backward_in_order(loss)
        if not counts:  # this rank has no work left: its forward only keeps up with the other ranks
            continue
        diagnostics |= {"entropy": entropy, "rollout_gap": (old - sampled).abs()}
        diagnostics |= {"is_weight": factor, "is_cut": cut} if args.server_rollouts else {}
        for name, values in diagnostics.items():
            sums[name] += float(values.sum())
        sums["loss"] += float(loss.detach())
        sums["tokens"] += len(logp)
    ranks.sum_gradients(model.parameters())
    return {name: sum(part[name] for part in ranks.gather(sums)) for name in sums}


def micro_batches_for(model, groups: list[list[Example]], args):
    """Return my_micro_batches. Where padding would move the positions of an answer, each is a batch by itself."""
    bound = 1 if positions_follow_longest_row(model) else args.micro_tokens
    return my_micro_batches(groups, bound, shares_prompts(model))


def make_examples(rollout: Rollout, supervised: bool) -> list[Example]:
    """The answers to one prompt with their advantages. Supervised: advantage 1 for all, whatever their rewards."""
    count = len(rollout.answers)
    advantages = [1.0] * count if supervised else group_advantages(rollout.rewards).tolist()
    logps = [None] * count if supervised else rollout.logps
    return [Example(rollout.prompt, *fields) for fields in zip(rollout.answers, advantages, logps)]


def teaches(group: list[Example]) -> bool:
    """Return whether a group has a gradient. With equal rewards all of its advantages are 0."""
    return any(example.advantage for example in group)


@torch.no_grad()
def remember_logprobs(model, groups: list[list[Example]], name: str, args) -> None:
    """Set the field name (old_logp or ref_logp) of every example to this model's log-probs, on every rank."""
    model.eval()
    mine = []  # log-probs [R] of each example in this rank's share
    for micro_batch, counts in micro_batches_for(model, groups, args):
        logp, _ = ranks.run_forward(model, logprobs, as_pairs(micro_batch), args.temperature)
        mine += logp.cpu().split([len(e.answer) for group in micro_batch for e in group]) if counts else []
    for rank, values in enumerate(ranks.gather(mine)):
        examples = [e for group in groups[rank :: ranks.world()] for e in group]  # as in ranks.share
        for example, value in zip(examples, values):
            setattr(example, name, value)


# -------------------------------------------------------------------------------------------------------- the rollout


@torch.no_grad()
def rollout(model, prompts: list[Tensor], seeds: list[list[int]], *, sampling: Sampling = Sampling(),
            max_new_tokens: int | list[int], eos_ids: list[int], max_rows: int = 256) -> list[Rollout]:
    """Sample an answer for each seed of each prompt. Returns one Rollout for each prompt, in the order given.

    prompts: LongTensors [L], of any lengths above 0. seeds: G seeds for each prompt; if has_key_cache(model), no
    answer depends on those decoded beside it. max_new_tokens: the longest answer; a list has one for each prompt.
    At most max_rows answers are decoded at a time. Prompts of similar length go together, and a prompt is read once for
    all of its answers in a batch.
    """
    model.eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    parts = [(i, seeds[i][at : at + max_rows]) for i in order for at in range(0, len(seeds[i]), max_rows)]
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    draw = generate if has_key_cache(model) else partial(generate_with_transformers, plain_logprobs)
    rollouts = [Rollout(prompt, [], [], []) for prompt in prompts]
    with ranks.unsharded(model):
        for batch in split_by_size([len(part_seeds) for _, part_seeds in parts], max_rows):
            work = [(prompts[i].cpu(), part_seeds, limits[i]) for i, part_seeds in parts[batch]]
            answers = draw_in_halves(draw, work, model, sampling, list(eos_ids))
            owners = [i for i, part_seeds in parts[batch] for _ in part_seeds]
            for i, (tokens, logps, finished) in zip(owners, answers):
                # clone: tensors made in inference mode cannot enter a backward pass
                rollouts[i].answers.append(tokens.clone())
                rollouts[i].logps.append(logps.clone())
                rollouts[i].finished.append(finished)
    return rollouts


@torch.inference_mode()  # a tenth faster than no_grad
def generate(model, prompts: list[Tensor], seeds: list[list[int]], limits: list[int], sampling: Sampling,
             eos_ids: list[int]) -> list[tuple[Tensor, Tensor, bool]]:
    """Read the prompts, then draw one token a step for each of n answers, until each has ended or is too long.

    limits: the longest answer to each prompt, in tokens. Returns for each answer its tokens [R], their log-probs [R],
    and whether it ended by itself.
    """
    cache_class = SharedCache if shares_prompts(model) else PlainCache
    cache = cache_class(model, prompts, [len(prompt_seeds) for prompt_seeds in seeds])
    device = model.device
    generators = [torch.Generator().manual_seed(seed) for prompt_seeds in seeds for seed in prompt_seeds]
    n, eos = len(generators), torch.tensor(eos_ids, device=device)
    limit = torch.tensor([limit for limit, its_seeds in zip(limits, seeds) for _ in its_seeds], device=device)  # [n]
    tokens = torch.zeros(n, max(limits), dtype=torch.long, device=device)
    logps = torch.zeros(n, max(limits), device=device)
    length = limit.clone()
    live = torch.arange(n, device=device)  # the answers of the cache's rows
    going = torch.ones(n, dtype=torch.bool, device=device)  # those of them that have not ended
    for t in ranks.in_sight(range(max(limits)), "tokens"):
        if t % DRAWS_AHEAD == 0:
            draws = torch.stack([torch.rand(DRAWS_AHEAD, generator=generators[i]) for i in live.tolist()]).to(device)
        token, logp = draw_token(cache.logits, draws[:, t % DRAWS_AHEAD], sampling)  # [live] each
        tokens[live, t], logps[live, t] = token, logp
        ended = (torch.isin(token, eos) | (limit[live] == t + 1)) & going
        if ended.any():
            length[live[ended]] = t + 1
            going &= ~ended
            rows = going.nonzero().squeeze(-1)
            if len(rows) == 0:
                break
            if len(rows) <= 0.9 * len(live):  # dropping rows copies their keys, so not for every single one
                live, token, draws, going = live[rows], token[rows], draws[rows], going[rows]
                cache.keep(rows)
        cache.step(token)
    last = tokens.gather(-1, length[:, None] - 1).squeeze(-1)
    lengths, finished = length.tolist(), torch.isin(last, eos).tolist()
    return [(tokens[i, :r].cpu(), logps[i, :r].cpu(), finished[i]) for i, r in enumerate(lengths)]


def draw_token(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draw one token for each row: the first whose cumulative probability is above the row's random number.

    logits: [B, V]; uniform: random numbers [B] in [0, 1). At temperature 0 the likeliest token is taken. Returns tokens
    [B] and their log-probs [B] at the temperature (for 0: at temperature 1), before top-k and top-p.
    """
    rows = max(1, (16 if logits.is_cuda else 1) * DRAWN_LOGITS // logits.shape[-1])
    if len(logits) > rows:
        parts = [draw_token(*part, sampling) for part in zip(logits.split(rows), uniform.split(rows))]
        return tuple(map(torch.cat, zip(*parts)))
    logps = (logits.float() / (sampling.temperature or 1.0)).log_softmax(-1)  # [B, V]
    if sampling.temperature == 0:
        tokens = logps.argmax(-1, keepdim=True)  # [B, 1]
    else:
        probs, ids = likeliest(logps.exp(), sampling)  # [B, k]
        cdf = probs.cumsum(-1)  # [B, k]
        # right=True: the first entry above the threshold, so that a token of probability 0 is never drawn
        tokens = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True).clamp_(max=cdf.shape[-1] - 1)
        tokens = tokens if ids is None else ids.gather(-1, tokens)  # [B, 1]
    return tokens.squeeze(-1), logps.gather(-1, tokens).squeeze(-1)


def likeliest(probs: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Apply top-k, then top-p to probs [B, V]. Return what is left [B, k], likeliest first, and its token ids [B, k].

    Tokens after the likeliest ones that reach top_p get 0. Without a filter, return probs as they are, and None.
    """
    vocabulary = probs.shape[-1]
    if not sampling.top_k and sampling.top_p >= 1:
        return probs, None
    count = min(sampling.top_k or 256, vocabulary)  # top-p rarely keeps more than 256, and sorting all is slow
    while True:
        best, ids = probs.topk(count)
        best = best / (best if sampling.top_k else probs).sum(-1, keepdim=True)
        likelier = best.cumsum(-1) - best  # [B, k], the mass of the likelier tokens
        enough = sampling.top_k or count == vocabulary or (likelier + best)[:, -1].min() >= sampling.top_p
        if enough:
            return best.masked_fill(likelier >= sampling.top_p, 0), ids
        count = min(8 * count, vocabulary)


class PlainCache:
    """Keys and values of n answers in transformers' cache, a row for each. logits: [n, V], for the next tokens.

    Each prompt is read once, padded on the left. Then its row is repeated for each of its answers (counts: [B]).
    """

    def __init__(self, model, prompts: list[Tensor], counts: list[int]):
        self.model, self.cache = model, DynamicCache(config=model.config)
        self.arguments = cache_arguments(model, self.cache)
        longest = max(map(len, prompts))
        ids = torch.stack([F.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts]).to(model.device)  # [B, L]
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)  # [B]
        positions = torch.arange(longest, device=model.device) - (longest - lengths)[:, None]  # [B, L], < 0 in padding
        self.mask = (positions >= 0).long()
        self.read(ids, positions.clamp(min=0))
        self.length = lengths[:, None]
        self.keep(torch.arange(len(prompts)).repeat_interleave(torch.tensor(counts)).to(model.device))

    def read(self, ids: Tensor, positions: Tensor) -> None:
        """Read tokens [n, t] at positions [n, t], and set the logits of the next tokens."""
        self.logits = self.model(ids, attention_mask=self.mask, position_ids=positions, **self.arguments).logits[:, -1]

    def step(self, tokens: Tensor) -> None:
        """Read one token for each row, [n]."""
        self.mask = F.pad(self.mask, (0, 1), value=1)
        self.read(tokens[:, None], self.length)
        self.length = self.length + 1

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows [n'], in this order."""
        self.cache.batch_select_indices(rows)
        self.mask, self.length, self.logits = self.mask[rows], self.length[rows], self.logits[rows]


# ---------------------------------------------------------------------- one prompt for all of its answers, exactly
# A ranking prompt is long, and its G answers share it. So the model reads it once for all of them, in the rollout and
# in the update. Log-probs and gradients are the same as with a row for each answer. The layers run as they are; only
# their attention is replaced: plumbing/shared_prompt.py decides which token sees which.


def token_logprobs(head, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return log-probs [N] of targets [N] and the entropy [N] of each distribution. head: hidden [N, H] -> [N, V]."""
    logits = head(hidden)  # [N, V]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature  # as in draw_token
    logps = logits.log_softmax(-1)
    known = logps.detach()  # the entropy is a diagnostic, without a gradient
    entropy = -known.exp().mul_(known.clamp(min=-1e4)).sum(-1)  # clamped, because 0 * -inf is not a number
    return logps.gather(-1, targets[:, None]).squeeze(-1), entropy


def packed_logprobs(model, groups: list[tuple[Tensor, list[Tensor]]], temperature: float) -> tuple[Tensor, Tensor]:
    """logprobs with each prompt read once. The head sees only positions that predict an answer token."""
    packed = Packed(groups, model.device)
    hidden = body(model, packed, packed.ids, packed.positions)[0]  # [T, H]
    # index_select, because the backward pass of hidden[live] adds the gradients of one place in an order that varies
    hidden = hidden.index_select(0, packed.live)  # [N, H]
    targets = torch.cat([answer for _, answers in groups for answer in answers]).to(model.device)  # [N]
    score = partial(token_logprobs, model.get_output_embeddings(), temperature=temperature)
    return in_blocks(score, hidden, targets, head_rows(model))


def plain_logprobs(model, prompt: Tensor, answers: list[Tensor], temperature: float) -> tuple[Tensor, Tensor]:
    """logprobs of one group by definition, for models that cannot share prompts: a row [prompt, answer] for each."""
    rows = [torch.cat([prompt.cpu(), answer.cpu()[:-1]]) for answer in answers]
    # padded on the right: tokens look back only, so the padding changes nothing (where it does, see logprobs)
    with plain_attention(model):
        hidden, head = run_plain(model, pad_sequence(rows, batch_first=True).to(model.device))  # [G, L + R - 1, H]
    predicting = [row[len(prompt) - 1 :][: len(answer)] for row, answer in zip(hidden, answers)]
    score = partial(token_logprobs, head, temperature=temperature)
    return in_blocks(score, torch.cat(predicting), torch.cat(answers).to(model.device), head_rows(model))


def logprobs(model, groups: list[tuple[Tensor, list[Tensor]]], temperature: float) -> tuple[Tensor, Tensor]:
    """Return log-probs [N], with gradient, and entropies [N] of all answers [R] to some prompts [L], end to end."""
    if shares_prompts(model):
        return packed_logprobs(model, groups, temperature)
    if positions_follow_longest_row(model):  # padding would move an answer's positions, so each is read by itself
        groups = [(prompt, [answer]) for prompt, answers in groups for answer in answers]
    return tuple(map(torch.cat, zip(*(plain_logprobs(model, *group, temperature) for group in groups))))


def answer_logprobs(model, prompt: Tensor, answers: list[Tensor], *, temperature: float = 1.0) -> list[Tensor]:
    """Return log-probs [R], with gradient, of each of G answers (LongTensors [R]) to one prompt (LongTensor [L])."""
    logps, _ = logprobs(model, [(prompt, answers)], temperature)
    return list(logps.split([len(answer) for answer in answers]))


def enable_sharing(model) -> str:
    """Let a model read each prompt once for all of its answers. Call this once, after loading it, on every rank.

    Returns "", or the reason if the shared forms differ from plain_logprobs; then the model stays as it is.
    """
    return try_sharing(model, partial(generate, sampling=Sampling(), eos_ids=[]), packed_logprobs, plain_logprobs)
