"""Compute each prompt once for all its G answers. The results are those of G separate rows.

If a model's attention is named SHARED_ATTENTION, transformers calls `shared_attention` in each layer. It hands queries,
keys and values to the layout of this forward pass, which decides which token sees which: `Packed` (below) for the
update and the prompts of a rollout, fast_decode.SharedCache for a step of a rollout. The layers stay as they are.

Shapes: L prompt tokens, R answer tokens, N answer tokens of a batch laid end to end, T tokens of a packed row; Q query
heads, K key heads, D numbers a head.
"""
import contextlib
import inspect

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from plumbing.batches import split_by_size

SHARED_ATTENTION = "grpo_shared"  # its name in transformers
SHORT_ANSWERS = 128  # short answers attend in one call, up to this many tokens: fewer calls, and little is masked
ALIGNED = 8  # CUDA's fast kernels need multiples of it: numbers a head, and where the rows of a mask start
QUERY_BLOCK = 1024  # queries in one call, with a window or for a long answer: no mask is then [L, L] or [R, L + R]


def shares_prompts(model) -> bool:
    """Return whether other_models.try_sharing has switched this model to SHARED_ATTENTION."""
    return model.config._attn_implementation == SHARED_ATTENTION


@contextlib.contextmanager
def plain_attention(model):
    """Give the model transformers' default attention inside the `with` block."""
    before = model.config._attn_implementation
    if before == SHARED_ATTENTION:
        model.config._attn_implementation = "sdpa" if model._supports_sdpa else "eager"
    try:
        yield
    finally:
        model.config._attn_implementation = before


def takes(model, argument: str) -> bool:
    """Return whether the model's forward has an argument of this name."""
    return argument in inspect.signature(model.forward).parameters


def cache_arguments(model, cache) -> dict:
    """Return the arguments that let a model's forward fill a cache, and compute only the last logits if it can."""
    name = "cache" if takes(model, "cache") else "past_key_values"  # another name since transformers 5.24
    return {"use_cache": True, name: cache} | ({"logits_to_keep": 1} if takes(model, "logits_to_keep") else {})


def layers_name(model) -> str:
    """Return the name of the part of a model that holds its layers; the other part is its head."""
    return model.base_model_prefix if hasattr(model, model.base_model_prefix) else "model"  # Llama 4's prefix is wrong


def body(model, layout, ids: Tensor, positions: Tensor) -> Tensor:
    """Run the model without its head; attention uses the layout: ids, positions [b, t] -> hidden [b, t, H]."""
    return getattr(model, layers_name(model))(ids, position_ids=positions, use_cache=False, layout=layout)[0]


def shared_attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, layout=None, **settings):
    """Attend by the layout. transformers calls this function in each layer of a model that shares prompts.

    query [b, Q, t, D], key and value [b, K, t, D], with the positions applied; values may have another D. Return
    ([b, t, Q, D], None). Raise ValueError if the model is called directly, without a layout.
    """
    if layout is None:
        raise ValueError("this model shares prompts; call it yourself only inside `with grpo.plain_attention(model):`")
    if settings.get("softcap"):
        raise NotImplementedError("soft-capped attention")
    scale = settings.get("scaling") or query.shape[-1] ** -0.5
    return layout.attend(module, query, key, value, scale, settings.get("sliding_window"), settings.get("s_aux")), None


AttentionInterface.register(SHARED_ATTENTION, shared_attention)  # no mask function, so transformers builds no masks
# cuDNN makes a plan for each new shape, which takes about 0.4 s. Here almost every prompt and answer has a new shape.
torch.backends.cuda.enable_cudnn_sdp(False)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, sinks: Tensor | None, mask: Tensor | None) -> Tensor:
    """Attend from q [1, Q, n, D] to k, v [1, K, m, D] -> [1, n, Q, D].

    mask: [n, m], 0 where a query sees a key and -inf elsewhere. With sinks it has one more column, the first, of 0.
    Without a mask (None) attention is causal, with n == m.
    """
    heads, n, groups = q.shape[1], q.shape[2], k.shape[1]
    if sinks is not None:
        # A sink [Q] is the score of one extra key with value 0. One extra coordinate gives this score: sink / scale in
        # the queries, 1 in the extra first key, 0 in the others. An extra first query keeps the causal diagonal.
        D = k.shape[-1]
        q = torch.cat([q, F.pad((sinks / scale).to(q).view(1, -1, 1, 1), (0, ALIGNED - 1)).expand(-1, -1, n, -1)], -1)
        sink = F.pad(k.new_ones(1), (D, ALIGNED - 1)).expand(1, groups, 1, -1)
        k, v = torch.cat([sink, F.pad(k, (0, ALIGNED))], 2), F.pad(v, (0, ALIGNED, 1, 0))
        q = F.pad(q, (0, 0, 1, 0)) if mask is None else q
    # Each key head serves Q / K query heads. With the key heads as the batch, the keys need not be repeated.
    q = q.reshape(groups, heads // groups, -1, q.shape[-1])  # [K, Q/K, n, D]
    k, v = (x.transpose(0, 1).expand(-1, heads // groups, -1, -1) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    if sinks is not None:
        out = out[:, :, -n:, :-ALIGNED]
    return out.reshape(1, heads, n, -1).transpose(1, 2)


class Packed:
    """One row [prompt 1, answer 1a, answer 1b, ..., prompt 2, answer 2a, ...] without padding. Each prompt occurs once.

    An answer sees its prompt and itself, and its positions continue where its prompt ends. Its last token is left out,
    because it predicts nothing. Compared with a cache expanded to G padded rows, this needs no copies of the prompt's
    keys, several groups share a forward pass, and gradient checkpointing works.

    ids, positions: [1, T]. live: [N], the place in the row that predicts each answer token (for the first token, the
    prompt's end). kept: None; if `keep` is set, {(layer, "keys" or "values"): [1, K, T, D]}, filled by the layers.
    """

    def __init__(self, groups: list[tuple[Tensor, list[Tensor]]], device: torch.device, keep: bool = False):
        ids, positions, live = [], [], []
        self.groups = []  # for each group (L, [[tokens of an answer, ...], ...]); answers in one list attend together
        self.sizes = []  # for each group the tokens of its prompt, then the tokens of each such list
        for prompt, answers in groups:
            L, last = len(prompt), len(positions) + len(prompt) - 1
            ids += [prompt, *(answer[:-1] for answer in answers)]
            positions += range(L)
            for answer in answers:
                live += [last, *range(len(positions), len(positions) + len(answer) - 1)][: len(answer)]
                positions += range(L, L + len(answer) - 1)
            lengths = [len(answer) - 1 for answer in answers if len(answer) > 1]
            together = [lengths[part] for part in split_by_size(lengths, SHORT_ANSWERS)]
            self.groups.append((L, together))
            self.sizes += [L, *map(sum, together)]
        self.ids = torch.cat([x.cpu() for x in ids])[None].to(device)  # [1, T]
        self.positions = torch.tensor(positions, device=device)[None]  # [1, T]
        self.live = torch.tensor(live, dtype=torch.long, device=device)  # [N]
        self.masks, self.kept = {}, {} if keep else None

    def mask(self, like: Tensor, before: int, lengths: list[int], window: int | None, sink: bool) -> Tensor:
        """Return a mask [n, sink + before + n] for n = sum(lengths) queries in runs of these lengths. A query sees the
        first `before` keys, and its run up to itself. A window hides the keys outside it. All layers share the mask.
        """
        key = (before, *lengths, window, sink)
        if key not in self.masks:
            run = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))  # [n]
            place = torch.cat([torch.arange(before, before + r) for r in lengths])  # [n]
            run, place = run.to(like.device), place.to(like.device)  # small; what follows is [n, before + n]
            key_run = F.pad(run, (before, 0), value=-1)
            key_place = torch.cat([torch.arange(before, device=like.device), place])
            seen = ((key_run == -1) | (key_run == run[:, None])) & (key_place <= place[:, None])
            if window is not None:
                seen &= place[:, None] - key_place < window
            width = sink + before + len(run)
            seen = F.pad(seen, (int(sink), -width % ALIGNED), value=True)
            mask = torch.zeros_like(seen, dtype=like.dtype).masked_fill_(~seen, -torch.inf)
            self.masks[key] = mask[:, :width]
        return self.masks[key]

    def in_blocks(self, q: Tensor, k: Tensor, v: Tensor, longest: int, scale: float, window, sinks) -> Tensor:
        """Attend from the last n of m tokens, q [1, Q, n, D] to k, v [1, K, m, D] -> [1, n, Q, D], block by block. A
        block gets the keys up to its end. longest: the largest n of this prompt, so that its answers share a mask. A
        whole prompt without a window needs neither blocks nor masks.
        """
        at, sink, out = k.shape[2] - q.shape[2], sinks is not None, []
        if at == 0 and (window is None or longest <= window):
            return fused_attention(q, k, v, scale, sinks, None)
        last = at + (longest - 1) // QUERY_BLOCK * QUERY_BLOCK
        for part in q.split(QUERY_BLOCK, 2):
            end = at + part.shape[2]
            before = at if window is None else min(at, window - 1)  # keys that the block's first query sees
            # Without a window, cut each block's mask out of the last block's, whose first columns every query sees.
            most = last if window is None else before
            mask = self.mask(q, most, [min(QUERY_BLOCK, longest)], window, sink)
            mask = mask[: end - at, most - before : sink + most + end - at]
            keys, values = k[:, :, at - before : end], v[:, :, at - before : end]
            out.append(fused_attention(part, keys, values, scale, sinks, mask))
            at = end
        return torch.cat(out, 1)

    def attend(self, module, q: Tensor, k: Tensor, v: Tensor, scale: float, window, sinks) -> Tensor:
        """Attend from q [1, Q, T, D] to k, v [1, K, T, D] -> [1, T, Q, D], one group after the other.

        In the last layer only the prompt's final position is read, so only that one is computed; the others are zeros.
        """
        if self.kept is not None:
            self.kept |= {(module.layer_idx, "keys"): k, (module.layer_idx, "values"): v}
        last_layer = module.layer_idx == module.config.num_hidden_layers - 1
        # Use split: the gradient of each slice would be a tensor of zeros as long as the whole row.
        parts = iter(zip(q.split(self.sizes, 2), k.split(self.sizes, 2), v.split(self.sizes, 2)))
        out = []
        for L, together in self.groups:
            q_prompt, k_prompt, v_prompt = next(parts)
            n = 1 if last_layer else L
            read = self.in_blocks(q_prompt[:, :, -n:], k_prompt, v_prompt, n, scale, window, sinks)
            out += [read.new_zeros(1, L - n, *read.shape[2:]), read]
            for lengths in together:
                q_own, k_own, v_own = next(parts)
                keys, values = torch.cat([k_prompt, k_own], 2), torch.cat([v_prompt, v_own], 2)
                if len(lengths) == 1:
                    longest = max(map(sum, together))
                    out.append(self.in_blocks(q_own, keys, values, longest, scale, window, sinks))
                else:
                    mask = self.mask(q, L, lengths, window, sinks is not None)
                    out.append(fused_attention(q_own, keys, values, scale, sinks, mask))
        return torch.cat(out, 1)
