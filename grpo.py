"""GRPO by hand: sample G answers to each prompt, compare them with their siblings, push up what did better.

    rollout           prompts -> a Rollout each: G sampled answers and the log-prob of every sampled token
    group_advantages  rewards -> how much better than its siblings each answer did          (paper 2.4)
    policy_loss       the clipped surrogate, with an optional pull towards a frozen reference (paper 2.4)
    update            PPO epochs over mini-batches of whole groups, one optimiser step a mini-batch

Shapes: B prompts or rows, G answers a prompt, L prompt tokens, R answer tokens, T = L + R, V vocabulary, H hidden,
N answer tokens of a whole batch laid end to end. Log-probs are natural logarithms, in fp32.
"""
import inspect
import warnings
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache


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


def left_pad(prompts: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids [B, L] and mask [B, L] (1 = real), from lengths and never from ids: the pad id may be a real token too."""
    longest = max(len(p) for p in prompts)
    ids = torch.stack([F.pad(p, (longest - len(p), 0)) for p in prompts])
    mask = torch.stack([F.pad(torch.ones(len(p), dtype=torch.long), (longest - len(p), 0)) for p in prompts])
    return ids.to(device), mask.to(device)


@torch.no_grad()
def rollout(
    model, prompts: list[Tensor], *, answers: int, max_new_tokens: int, eos_ids, temperature: float = 1.0,
    top_p: float = 1.0, top_k: int = 0, generator: torch.Generator | None = None, max_rows: int = 256,
    progress=None,
) -> list[Rollout]:
    """Sample `answers` answers to each prompt (LongTensors [L_i] of unequal lengths, at least one token each).

    Each prompt is encoded once for all of its answers. At most max_rows answers decode at a time; groups stay
    whole, and prompts of similar length go together. progress(n) is called whenever n more answers have ended.
    Returns one Rollout a prompt, in the order given. Best-of-N evaluation is the same call with answers=N.
    """
    was_training = model.training
    model.eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    step = max(1, max_rows // answers)
    results = {}
    for batch in (order[i : i + step] for i in range(0, len(order), step)):
        rollouts = decode(
            model, [prompts[i].cpu() for i in batch], answers, max_new_tokens, list(eos_ids),
            (temperature, top_p, top_k), generator, progress or (lambda n: None),
        )
        results.update(zip(batch, rollouts))
    model.train(was_training)
    return [results[i] for i in range(len(prompts))]


def decode(model, prompts, G, max_new_tokens, eos_ids, sampling, generator, progress) -> list[Rollout]:
    """The decode loop behind rollout: one prefill a prompt, then B * G rows in step until each has ended."""
    device, rows = model.device, len(prompts) * G
    ids, mask = left_pad(prompts, device)  # [B, L] each
    padded = bool((mask == 0).any())
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # [B, L], counted per row from its first real token

    def forward(net, ids, mask, positions):
        extra = {"position_ids": positions} if takes_positions else {}
        return net(ids, attention_mask=mask if padded else None, past_key_values=cache, use_cache=True, **extra)

    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    cache = DynamicCache(config=model.config)
    if ids.shape[1] > 1:  # all but the last token, without the head; the last one opens the answers, below
        forward(model.base_model, ids[:, :-1], mask[:, :-1], positions[:, :-1])
    cache.batch_repeat_interleave(G)
    token, position = ids[:, -1].repeat_interleave(G), positions[:, -1].repeat_interleave(G)  # [B * G]
    mask = F.pad(mask, (0, max_new_tokens), value=1).repeat_interleave(G, 0)  # [B * G, L + max_new_tokens]

    sampled = torch.zeros(rows, max_new_tokens, dtype=torch.long, device=device)
    logps = torch.zeros(rows, max_new_tokens, device=device)
    length = torch.full((rows,), max_new_tokens, device=device)
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    eos = torch.tensor(eos_ids, device=device)
    live = torch.arange(rows, device=device)  # the rows still in the batch
    where = generator.device if generator is not None else device
    for t in range(max_new_tokens):
        logits = forward(model, token[:, None], mask[:, : ids.shape[1] + t], position[:, None] + t).logits[:, -1]
        # one number for every row, ended or not: which rows have left must not change what the others draw
        uniform = torch.rand(rows, generator=generator, device=where).to(device)
        token, logp = sample(logits, uniform[live], *sampling)  # [live] each
        sampled[live, t], logps[live, t] = token, logp
        ends = torch.isin(token, eos) & ~ended[live]
        length[live[ends]], ended[live[ends]] = t + 1, True
        if n := int(ends.sum()):
            progress(n)
            keep = (~ended[live]).nonzero().squeeze(-1)
            if len(keep) == 0:
                break
            if len(keep) <= 0.9 * len(live):  # dropping rows copies the cache, so not for every single one
                cache.batch_select_indices(keep)
                token, position, mask, live = token[keep], position[keep], mask[keep], live[keep]
    progress(int((~ended).sum()))
    sampled, logps, length, ended = sampled.cpu(), logps.cpu(), length.tolist(), ended.tolist()
    sampled = [row[:n].clone() for row, n in zip(sampled, length)]  # rows * [R]
    logps = [row[:n].clone() for row, n in zip(logps, length)]
    groups = [slice(i, i + G) for i in range(0, rows, G)]
    return [Rollout(prompt, sampled[g], logps[g], ended[g]) for prompt, g in zip(prompts, groups)]


# ------------------------------------------------------------------------------------------------------ log-probs


def sequence_logprobs(model, prompts: list[Tensor], answers: list[Tensor], temperature: float):
    """Log-prob of every answer token, and the entropy it was drawn from: [N] each, the answers end to end.

    Row i is prompts[i] + answers[i], padded on the right and without a mask: causality keeps real tokens from
    seeing the padding. Differentiable. The entropy carries no gradient; it is a diagnostic.
    """
    rows = [torch.cat([p.cpu(), a.cpu()[:-1]]) for p, a in zip(prompts, answers)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)  # [B, T - 1]
    hidden = model.base_model(ids, use_cache=False)[0]  # [B, T - 1, H]
    row = torch.cat([torch.full((len(a),), i) for i, a in enumerate(answers)])  # [N]
    # the token at t is predicted at t - 1: the first one from the prompt's last position
    column = torch.cat([torch.arange(len(a)) + len(p) - 1 for p, a in zip(prompts, answers)])  # [N]
    live = hidden[row.to(model.device), column.to(model.device)]  # [N, H]: only these positions meet the head
    logits = model.get_output_embeddings()(live).float() / temperature  # [N, V]
    targets = torch.cat([a.cpu() for a in answers]).to(model.device)  # [N]
    total = logits.logsumexp(-1)  # [N]
    logp = logits.gather(-1, targets[:, None]).squeeze(-1) - total
    with torch.no_grad():
        entropy = total - ((logits - total[:, None]).exp() * logits).sum(-1)
    return logp, entropy


def answer_logprobs(model, prompt: Tensor, answers: list[Tensor], *, temperature: float = 1.0) -> list[Tensor]:
    """Log-probs [R_g] of G answers (LongTensors [R_g]) to one prompt (LongTensor [L]), differentiable."""
    logp, _ = sequence_logprobs(model, [prompt] * len(answers), answers, temperature)
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
    rollout_logp: Tensor  # [R], as it was sampled
    old_logp: Tensor | None = None  # [R], by the training forward before the first step; None: the current one
    ref_logp: Tensor | None = None  # [R], by the frozen reference


def make_examples(rollout: Rollout) -> list[Example]:
    """The answers of one group with their advantages; none at all where the rewards are equal."""
    if equal_rewards(rollout.rewards):
        return []
    advantages = group_advantages(rollout.rewards).tolist()
    return [Example(rollout.prompt, *rest) for rest in zip(rollout.answers, advantages, rollout.logps)]


def micro_batches(examples: list[Example], micro_tokens: int) -> list[list[Example]]:
    """Cut a list into batches of at most micro_tokens tokens each, padding included; one answer is the least."""
    batches = []
    for example in sorted(examples, key=lambda e: len(e.prompt) + len(e.answer)):
        width = len(example.prompt) + len(example.answer)  # sorted, so the newest is the widest
        if not batches or width * (len(batches[-1]) + 1) > micro_tokens:
            batches.append([])
        batches[-1].append(example)
    return batches


@torch.no_grad()
def remember_logprobs(model, name: str, examples: list[Example], micro_tokens: int, temperature: float) -> None:
    """Fill in old_logp or ref_logp (name) of every example with this model's log-probs."""
    for batch in micro_batches(examples, micro_tokens):
        logp, _ = sequence_logprobs(model, [e.prompt for e in batch], [e.answer for e in batch], temperature)
        for example, values in zip(batch, logp.split([len(e.answer) for e in batch])):
            setattr(example, name, values)


def backward(
    model, examples: list[Example], token_weight, micro_tokens: int, temperature: float, **clip_and_kl
) -> dict[str, float]:
    """Accumulate the gradients of one mini-batch, and return its loss and the sums of its diagnostics over tokens.

    token_weight(example) is the weight of each of its tokens, the denominator of the whole mini-batch included, so
    that the sum over micro-batches does not depend on how they were cut.
    """
    sums = dict.fromkeys(["loss", "clip", "old_kl", "ref_kl", "entropy", "rollout_gap", "tokens"], 0.0)
    for batch in micro_batches(examples, micro_tokens):
        logp, entropy = sequence_logprobs(model, [e.prompt for e in batch], [e.answer for e in batch], temperature)
        lengths = torch.tensor([len(e.answer) for e in batch])
        advantages = torch.tensor([e.advantage for e in batch]).repeat_interleave(lengths).to(logp)  # [N]
        weights = torch.tensor([token_weight(e) for e in batch]).repeat_interleave(lengths).to(logp)  # [N]
        # in a single on-policy step the old policy is the current one: the ratio is 1, with its gradient
        old = logp.detach() if batch[0].old_logp is None else torch.cat([e.old_logp for e in batch])  # [N]
        ref = None if batch[0].ref_logp is None else torch.cat([e.ref_logp for e in batch]).to(logp)  # [N]
        loss, diagnostics = policy_loss(logp, old, advantages, ref, **clip_and_kl)  # [N]
        loss = (loss * weights).sum()
        loss.backward()
        gap = (old - torch.cat([e.rollout_logp for e in batch]).to(old)).abs()  # [N]
        for name, values in {**diagnostics, "entropy": entropy, "rollout_gap": gap}.items():
            sums[name] += float(values.sum())
        sums["loss"] += float(loss.detach())
        sums["tokens"] += len(logp)
    return sums


def update(
    model, optimizer, rollouts: list[Rollout], *, mini_batch: int = 16, epochs: int = 1, temperature: float = 1.0,
    clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float | None = None, kl: float = 0.0, ref_model=None,
    aggregation: str = "sequence", max_grad_norm: float = 1.0, micro_tokens: int = 16384,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """Train on scored rollouts: `epochs` passes, shuffled, one optimiser step for every mini_batch prompts.

    temperature: the one they were sampled at. kl > 0 needs ref_model, the frozen start. aggregation: "sequence"
    takes the mean over an answer's tokens, then over the answers (the paper), "token" the mean over all tokens
    (the release). micro_tokens bounds the padded tokens of one forward: memory and speed, not the gradient.

    A group is never split between mini-batches. One whose rewards are all equal is left out, which changes
    nothing but its share of the KL term, for the denominator still counts it. A mini-batch of only such groups
    makes no step: momentum and weight decay would move the weights without a gradient.

    Returns averages over trained tokens: entropy, clip_share, old_kl, ref_kl, rollout_gap (how far the training
    forward's log-probs lie from those at sampling; warns above 0.05); averages over steps: loss, grad_norm (before
    clipping); and zero_variance (the share of such groups), tokens (trained, epochs counted), stepped (steps made).
    """
    if aggregation not in ("sequence", "token"):
        raise ValueError(f'aggregation is "sequence" or "token", not {aggregation!r}')
    was_training = model.training
    model.eval()  # with gradients, but without dropout: the ratio has to compare the policy with itself
    groups = [make_examples(r) for r in rollouts]
    everything = [e for group in groups for e in group]
    if epochs * len(rollouts) > mini_batch:
        remember_logprobs(model, "old_logp", everything, micro_tokens, temperature)
    if kl > 0:
        remember_logprobs(ref_model, "ref_logp", everything, micro_tokens, temperature)
    settings = dict(clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, kl=kl)
    totals, norms = Counter(), []
    for _ in range(epochs):
        order = torch.randperm(len(rollouts), generator=generator)
        for chosen in (part.tolist() for part in order.split(mini_batch)):
            examples = [e for i in chosen for e in groups[i]]
            if not examples:
                continue
            n_answers = sum(len(rollouts[i].answers) for i in chosen)
            n_tokens = sum(len(answer) for i in chosen for answer in rollouts[i].answers)
            by_answer = aggregation == "sequence"
            weigh = lambda e: 1 / (n_answers * len(e.answer) if by_answer else n_tokens)  # noqa: E731
            optimizer.zero_grad(set_to_none=True)
            totals.update(backward(model, examples, weigh, micro_tokens, temperature, **settings))
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)))
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.train(was_training)
    tokens, steps = max(totals["tokens"], 1), max(len(norms), 1)
    metrics = {name: totals[name] / tokens for name in ("entropy", "old_kl", "ref_kl", "rollout_gap")}
    if metrics["rollout_gap"] > 0.05:
        warnings.warn(f"rollout and update disagree by {metrics['rollout_gap']:.3f} nats a token", stacklevel=2)
    return metrics | {
        "clip_share": totals["clip"] / tokens, "loss": totals["loss"] / steps, "grad_norm": sum(norms) / steps,
        "zero_variance": sum(not g for g in groups) / max(len(groups), 1), "tokens": int(totals["tokens"]),
        "stepped": len(norms),
    }
