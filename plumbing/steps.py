"""Keep some of the training's answers in steps.jsonl, and look closely at a few steps: what moved each token, how far.

plumbing/page.py shows the file. Nothing here changes the training: there is no gradient and no random number.
"""
from pathlib import Path

import torch

from plumbing import models, ranks, runs

KEPT = 2  # groups of each step that are kept
CLOSE = 5  # steps that are looked at closely: the first, the last, and three between


def closely(steps: int) -> set[int]:
    """Return the numbers, from 0, of the steps to look at closely."""
    return {round(i * (steps - 1) / (CLOSE - 1)) for i in range(CLOSE)}


def keep_step(file: Path, step: int, rollouts: list, model, tokenizer, args, logprobs, group_advantages) -> None:
    """Append a line to steps.jsonl, after the update of a step (from 0): the prompt and the answers of a few groups.

    A group with unlike rewards comes before one with equal ones. At some steps the first group also has its tokens:
    the piece of text, the log-prob when it was sampled and after the update, and the entropy after it, in nats. With
    --mode sft there are no advantages, and no log-probs of this model from before. logprobs, group_advantages: those of
    grpo.py. Every rank calls this, because all of them take part in a sharded model's forward.
    """
    supervised = args.mode == "sft"
    answered = [rollout for rollout in rollouts if rollout.answers]
    chosen = sorted(answered, key=lambda rollout: bool((rollout.rewards == rollout.rewards[0]).all()))[:KEPT]
    groups = []
    for rollout in chosen:
        advantages = [] if supervised else group_advantages(rollout.rewards).tolist()
        texts = [models.answer_text(tokenizer, rollout.prompt, answer) for answer in rollout.answers]
        groups.append({"prompt": tokenizer.decode(rollout.prompt), "answers": texts, "ended": rollout.finished,
                       "rewards": rounded(rollout.rewards.tolist()), "advantages": rounded(advantages)})
    if chosen and step in closely(args.steps):
        groups[0]["tokens"] = tokens_of(chosen[0], model, tokenizer, args.temperature, logprobs, supervised)
    runs.append_lines(file, [{"step": step + 1, "groups": groups}])


@torch.no_grad()
def tokens_of(rollout, model, tokenizer, temperature: float, logprobs, supervised: bool) -> list[list]:
    """Return for each answer its tokens as [piece, log-prob before, log-prob after, entropy after].

    The model reads one answer at a time, so that this needs no more memory than the training.
    """
    model.eval()
    answers = []
    for answer, before in zip(rollout.answers, rollout.logps):
        pair = [(rollout.prompt, [answer])]
        after, entropy = (values.tolist() for values in ranks.run_forward(model, logprobs, pair, temperature))
        before = [None] * len(answer) if supervised else rounded(before.tolist())
        pieces = [piece_of(tokenizer, token) for token in answer.tolist()]
        answers.append([list(token) for token in zip(pieces, before, rounded(after), rounded(entropy))])
    return answers


def piece_of(tokenizer, token: int) -> str:
    """Return the text of one token. Half a character, or no text at all, becomes the token's name."""
    text = tokenizer.decode([token])
    name = tokenizer.convert_ids_to_tokens(token) or f"<{token}>"  # None: an id beyond the tokenizer's vocabulary
    if name.startswith("\u2581") and not text.startswith(" "):  # SentencePiece drops the space of a first token
        return " " + text
    return name if not text or "\ufffd" in text else text


def rounded(values: list[float]) -> list[float | None]:
    """Round to 4 decimals; None for what JSON cannot hold."""
    return [round(value, 4) if abs(value) < float("inf") else None for value in values]
