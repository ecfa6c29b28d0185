"""Decode the G answers to a prompt with one copy of its keys. The results are those of grpo.PlainCache, but faster.

A cache with a row for each answer would hold a prompt's keys and values G times, and every step would read all copies.
This cache holds them once: one matrix product multiplies them with the queries of all answers to the prompt. The keys
and values of the answer tokens are in a second buffer, a row for each answer.

Shapes: B prompts, G answers to a prompt, at most, n rows (answers being decoded), L prompt tokens, m answer
tokens so far, V vocabulary; Q query heads, K key heads, D numbers a head. The first dimension of both buffers is the
key heads, so that no matrix product has to copy the keys.
"""
from collections import defaultdict
from math import ceil, log2

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from plumbing import models, ranks, served
from plumbing.batches import split_by_size
from plumbing.shared_prompt import Packed, body, cache_arguments, plain_attention

PREFILL_TOKENS = 8192  # prompt tokens in one forward: bounds its memory
MOST_ROWS = 512  # without --rows: a stage that is killed loses at most this many answers of each process
SPARE = 0.1  # of the free memory, for activations and for the gaps between allocations


class SharedCache:
    """The keys and values of n answers, which grow by one token a step. The interface is that of grpo.PlainCache."""

    def __init__(self, model, prompts: list[Tensor], counts: list[int]):
        """Run the model once on each prompt, [L]. counts: [B], the number of answers to each prompt."""
        self.model, device = model, model.device
        kept, ends = defaultdict(list), []  # (layer, "keys" or "values"): a tensor [L, K, D] for each prompt
        for part in split_by_size([len(prompt) for prompt in prompts], PREFILL_TOKENS):
            packed = Packed([(prompt, []) for prompt in prompts[part]], device, keep=True)
            hidden = body(model, packed, packed.ids, packed.positions)[0]  # [T, H]
            ends.append(hidden[torch.tensor(packed.sizes).cumsum(0) - 1])  # the last token of each prompt
            for at, x in packed.kept.items():  # [1, K, T, D]
                kept[at] += x[0].transpose(0, 1).split(packed.sizes)
        del packed, x
        self.prompt = {}  # [K, B, L, D], padded on the right
        for at in list(kept):  # one at a time, so that memory never holds all of them twice
            self.prompt[at] = pad_sequence(kept.pop(at), True).permute(2, 0, 1, 3).contiguous()
        self.answer = {}  # [K, n, capacity, D], of which self.steps tokens are in use
        self.steps = 0
        self.length = torch.tensor([len(prompt) for prompt in prompts], device=device)  # [B]
        self.prompt_of_row = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(device)  # [n]
        self.logits = model.get_output_embeddings()(torch.cat(ends))[self.prompt_of_row]  # [n, V] of the next token
        self.place_rows()

    def place_rows(self) -> None:
        """Give each row one of B * G places, G for each prompt. If the counts differ, some places repeat a row."""
        counts = self.prompt_of_row.bincount(minlength=len(self.length))  # [B]
        self.G = int(counts.max())
        self.place = self.row_at = slice(None)  # all of them, because the rows are in the order of their prompts
        if len(self.prompt_of_row) < len(counts) * self.G:
            taken = (torch.arange(self.G, device=counts.device) < counts[:, None]).flatten()  # [B * G]
            self.place, self.row_at = taken.nonzero().squeeze(-1), taken.cumsum(0) - 1  # [n], [B * G]
        self.masks = {}

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows [n'], and only the prompts that they need."""
        prompts, self.prompt_of_row = self.prompt_of_row[rows].unique(return_inverse=True)
        if len(prompts) < len(self.length):
            self.length = self.length[prompts]
            for at, x in self.prompt.items():  # one at a time, so that memory never holds all of them twice
                self.prompt[at] = x[:, prompts]
        for at, x in self.answer.items():
            self.answer[at] = x[:, rows]
        self.logits = self.logits[rows]
        self.place_rows()

    def step(self, tokens: Tensor) -> None:
        """Run the model on one token of each row, [n], and set the logits of the next token."""
        self.masks = {window: mask for window, mask in self.masks.items() if not window}  # a window moves on
        positions = (self.length[self.prompt_of_row] + self.steps)[:, None]  # [n, 1]
        self.logits = self.model.get_output_embeddings()(body(self.model, self, tokens[:, None], positions)[:, 0])
        self.steps += 1

    def append(self, at: tuple[int, str], x: Tensor, window: int | None) -> Tensor:
        """Add keys or values of the newest token, [n, K, 1, D]. Return those of the tokens it sees, [K * n, m, D]."""
        if at not in self.answer:
            self.answer[at] = x.new_empty(x.shape[1], len(x), 32, x.shape[3])
        elif self.steps == self.answer[at].shape[2]:
            self.answer[at] = F.pad(self.answer[at], (0, 0, 0, self.steps))
        self.answer[at][:, :, self.steps] = x[:, :, 0].transpose(0, 1)
        end = self.steps + 1
        return self.answer[at].flatten(0, 1)[:, max(0, end - (window or end)) : end]

    def prompt_mask(self, window: int | None) -> Tensor | None:
        """Return [B, 1, L]: -inf at padding and at tokens before the window, else 0. None if nothing is hidden."""
        if window not in self.masks:
            at = torch.arange(self.prompt[0, "keys"].shape[2], device=self.length.device)  # [L]
            hidden = at >= self.length[:, None]  # [B, L]
            if window:
                hidden |= self.length[:, None] + self.steps - at >= window
            mask = torch.zeros_like(hidden, dtype=torch.float32).masked_fill_(hidden, -torch.inf)
            self.masks[window] = mask[:, None] if hidden.any() else None
        return self.masks[window]

    def by_prompt(self, x: Tensor) -> Tensor:
        """Join the rows of each prompt, [K * n, Q/K, X] -> [K * B, G * Q/K, X]."""
        x = x.unflatten(0, (-1, len(self.prompt_of_row)))[:, self.row_at]  # [K, B * G, Q/K, X]
        return x.reshape(-1, self.G * x.shape[2], x.shape[3])

    def by_row(self, x: Tensor) -> Tensor:
        """Undo by_prompt, [K * B, G * Q/K, X] -> [K * n, Q/K, X]."""
        x = x.reshape(-1, len(self.length) * self.G, x.shape[1] // self.G, x.shape[2])  # [K, B * G, Q/K, X]
        return x[:, self.place].flatten(0, 1)

    def attend(self, module, q: Tensor, k: Tensor, v: Tensor, scale: float, window, sinks) -> Tensor:
        """Add k and v of the newest token [n, K, 1, D], then attend from q [n, Q, 1, D] to all tokens -> [n, 1, Q, D].

        The number of operations decides the time, so there are few of them, and they work on three dimensions.
        """
        layer, n, K = module.layer_idx, len(q), k.shape[1]
        own_k, own_v = self.append((layer, "keys"), k, window), self.append((layer, "values"), v, window)
        prompt_k, prompt_v = (self.prompt[layer, name].flatten(0, 1) for name in ("keys", "values"))  # [K * B, L, D]
        q = (q * scale).reshape(n, K, -1, q.shape[-1]).transpose(0, 1).flatten(0, 1)  # [K * n, Q/K, D]
        to_prompt = torch.bmm(self.by_prompt(q), prompt_k.mT)  # [K * B, G * Q/K, L]
        if (mask := self.prompt_mask(window)) is not None:
            to_prompt = (to_prompt.unflatten(0, (K, -1)) + mask).flatten(0, 1)
        scores = [to_prompt, self.by_prompt(torch.bmm(q, own_k.mT))]  # the second: [K * B, G * Q/K, m]
        if sinks is not None:  # [Q]: the score of one more key, whose value is 0
            sinks = sinks.to(q).view(K, 1, 1, -1).expand(-1, len(self.length), self.G, -1)  # [K, B, G, Q/K]
            scores.append(sinks.reshape(len(to_prompt), -1, 1))
        weights = torch.cat(scores, -1).softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q)
        to_prompt, to_own, *_ = weights.split([score.shape[-1] for score in scores], -1)
        out = torch.baddbmm(self.by_row(torch.bmm(to_prompt, prompt_v)), self.by_row(to_own), own_v)  # [K * n, Q/K, D]
        return out.unflatten(0, (K, n)).transpose(0, 1).reshape(n, 1, q.shape[1] * K, -1)


@torch.no_grad()
def rows_that_fit(model, prompt_tokens: int, answer_tokens: int, free: float) -> int:
    """Return how many answers can be decoded at a time in `free` bytes, at least 1, each to a prompt of its own.

    prompt_tokens, answer_tokens: of the longest prompt and of the longest answer. The model reads two rows of 8 tokens,
    and what it keeps of them is measured. While decoding, the room for an answer doubles as it grows.
    """
    model.eval()  # after an update it is in training mode, where transformers 5.17 gives layers to checkpoint no cache
    cache, config = DynamicCache(config=model.config), model.config.get_text_config()
    ids = torch.zeros(2, 8, dtype=torch.long, device=model.device)
    with plain_attention(model):
        model(ids, **cache_arguments(model, cache))
    kept = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    a_token = sum(tensor.nbytes for tensor in kept if tensor is not None) / ids.numel()
    a_row = a_token * (prompt_tokens + 2 ** ceil(log2(answer_tokens))) + 4 * model.dtype.itemsize * config.vocab_size
    fitting = ((1 - SPARE) * free - ranks.gathered_bytes(model)) / a_row
    return min(max(int(fitting), 1), MOST_ROWS)


def rows_at_a_time(model, prompts: list[Tensor], limit: int, args) -> int:
    """Return how many answers to decode at a time: --rows, or as many as fit the memory that a GPU has free now.

    Every rank calls this at the start of a stage, because all take part in a sharded forward. prompts: [L], which fit.
    """
    if args.rows or served.requests_of(model) or model.device.type != "cuda" or not prompts:
        return args.rows or 256
    longest, context = max(map(len, prompts)), served.context_of(model)
    answer = min(limit, context - longest) if context else limit
    return rows_that_fit(model, longest, answer, models.room(args.device))
