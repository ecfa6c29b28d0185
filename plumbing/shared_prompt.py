"""How the G answers to a prompt share it, exactly: one row for all of them, and the attention inside it.

transformers calls `shared_attention` in each layer of a model whose attention is named SHARED_ATTENTION. It hands the
queries, keys and values to the layout of this forward, which knows which token sees which: `Packed` here, for the
update and for the prompts of a rollout; fast_decode.SharedCache for a step of a rollout. The layers run as they are.

Shapes: L prompt tokens, R answer tokens, N answer tokens of a batch laid end to end, T tokens of a packed row; Q query
heads, K key heads, D numbers a head.
"""
import contextlib
import inspect

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

SHARED_ATTENTION = "grpo_shared"  # its name in transformers
SHORT_ANSWERS = 128  # short answers attend in one call, up to so many tokens: fewer calls, little masked waste
QUERY_BLOCK = 1024  # queries in one call, behind a window or of a long answer, so that no mask is [L, L] or [R, L + R]


def shares_prompts(model) -> bool:
    """Whether grpo.enable_sharing has switched this model."""
    return model.config._attn_implementation == SHARED_ATTENTION


@contextlib.contextmanager
def plain_attention(model):
    """Inside, the model attends as transformers does by default."""
    before = model.config._attn_implementation
    if before == SHARED_ATTENTION:
        model.config._attn_implementation = "sdpa" if model._supports_sdpa else "eager"
    try:
        yield
    finally:
        model.config._attn_implementation = before


def takes(model, argument: str) -> bool:
    """Whether the model's forward has an argument of this name."""
    return argument in inspect.signature(model.forward).parameters


def has_key_cache(model) -> bool:
    """Whether grpo.generate can serve a model: it keeps keys and values at positions that it is told, and nothing else.

    Not so recurrent states (Mamba, Qwen3-Next), and rotary positions that change with the longest row.
    """
    return takes(model, "position_ids") and not model._is_stateful and not positions_follow_longest_row(model)


def positions_follow_longest_row(model) -> bool:
    """Whether the rotary positions of one row depend on the longest row of its batch."""
    config = model.config.get_text_config()
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    rotaries = [rotary, *(part for part in rotary.values() if isinstance(part, dict))]  # one for each type of layer
    kinds = [str(part.get("rope_type") or part.get("type")) for part in rotaries]
    return any("dynamic" in kind or kind == "longrope" for kind in kinds)


def body(model, layout, ids: Tensor, positions: Tensor) -> Tensor:
    """The model without its head, attending through the layout: ids, positions [b, t] -> hidden [b, t, H]."""
    return model.base_model(ids, position_ids=positions, use_cache=False, layout=layout)[0]


def shared_attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, layout=None, **settings):
    """What transformers calls in each layer of a model that shares prompts. The layout knows which token sees which.

    query [b, Q, t, D], key and value [b, K, t, D], positions already in them; values may have another D. Returns
    ([b, t, Q, D], None). ValueError if the model is called directly, without a layout.
    """
    if layout is None:
        raise ValueError("this model shares prompts; call it yourself only inside `with grpo.plain_attention(model):`")
    if settings.get("softcap"):
        raise NotImplementedError("soft-capped attention")
    scale = settings.get("scaling") or query.shape[-1] ** -0.5
    return layout.attend(module, query, key, value, scale, settings.get("sliding_window"), settings.get("s_aux")), None


AttentionInterface.register(SHARED_ATTENTION, shared_attention)  # without a mask function: transformers builds no masks


def fused_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, sinks: Tensor | None, mask: Tensor | None) -> Tensor:
    """Attention of q [1, Q, n, D] to k, v [1, K, m, D] -> [1, n, Q, D].

    mask: [n, m], 0 where a query sees a key and -inf elsewhere, after a first column of 0 if there are sinks. None
    means causal, with n == m.
    """
    heads, n, groups = q.shape[1], q.shape[2], k.shape[1]
    if sinks is not None:
        # A sink [Q] is the score of one more key, with value 0. One more coordinate makes it: sink / scale in the
        # queries, 1 in the new first key, 0 in the others. If causal, a first query keeps the diagonal in its place.
        q = torch.cat([q, (sinks / scale).to(q).view(1, -1, 1, 1).expand(-1, -1, n, -1)], -1)
        k = torch.cat([F.one_hot(torch.tensor([k.shape[-1]])).to(k).expand(1, groups, 1, -1), F.pad(k, (0, 1))], 2)
        v = F.pad(v, (0, 1, 1, 0))
        q = F.pad(q, (0, 0, 1, 0)) if mask is None else q
    # each key head serves Q / K query heads: as a batch of K such heads, the keys need not be repeated
    q = q.reshape(groups, heads // groups, -1, q.shape[-1])  # [K, Q/K, n, D]
    k, v = (x.transpose(0, 1).expand(-1, heads // groups, -1, -1) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    if sinks is not None:
        out = out[:, :, -n:, :-1]
    return out.reshape(1, heads, n, -1).transpose(1, 2)


class Packed:
    """One row [prompt 1, answer 1a, answer 1b, ..., prompt 2, answer 2a, ...]: no padding, and no prompt twice.

    An answer sees its prompt and itself, and its positions continue where its prompt ends. Its last token is left out,
    because it predicts nothing. Compared with a cache expanded to G padded rows, this needs no copies of the prompt's
    keys, several groups share a forward, and gradient checkpointing works.

    ids, positions: [1, T]. live: [N], where in the row each answer token is predicted, the first by its prompt's end.
    kept: None, or with keep {(layer, "keys" or "values"): [1, K, T, D]}, which each layer fills in.
    """

    def __init__(self, groups: list[tuple[Tensor, list[Tensor]]], device: torch.device, keep: bool = False):
        ids, positions, live, at = [], [], [torch.zeros(0, dtype=torch.long)], 0
        self.groups = []  # for each group L, and the answers that attend together: [[tokens of each], ...]
        self.sizes = []  # tokens of the prompt, then of each such list of answers; all groups end to end
        for prompt, answers in groups:
            L, together = len(prompt), []
            ids.append(prompt.cpu())
            positions.append(torch.arange(L))
            last, at = at + L - 1, at + L
            for answer in answers:
                r = max(len(answer) - 1, 0)
                ids.append(answer.cpu()[:r])
                positions.append(torch.arange(L, L + r))
                live.append(torch.cat([torch.tensor([last]), torch.arange(at, at + r)])[: len(answer)])
                if together and sum(together[-1]) + r <= SHORT_ANSWERS:
                    together[-1].append(r)
                elif r:
                    together.append([r])
                at += r
            self.groups.append((L, together))
            self.sizes += [L, *map(sum, together)]
        self.ids, self.positions = torch.cat(ids)[None].to(device), torch.cat(positions)[None].to(device)  # [1, T]
        self.live = torch.cat(live).to(device)  # [N]
        self.masks, self.kept = {}, {} if keep else None

    def mask(self, like: Tensor, before: int, lengths: list[int], window: int | None, sink: bool) -> Tensor:
        """[n, sink + before + n] for n = sum(lengths) queries. All see the first `before` keys, and each its own run of
        tokens up to itself; with a window, what of these is nearer than the window. One tensor serves all layers.
        """
        key = (before, *lengths, window, sink)
        if key not in self.masks:
            run = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))  # [n]
            place = torch.cat([torch.arange(before, before + r) for r in lengths])  # [n]
            key_run, key_place = F.pad(run, (before, 0), value=-1), torch.cat([torch.arange(before), place])
            seen = ((key_run == -1) | (key_run == run[:, None])) & (key_place <= place[:, None])
            if window is not None:
                seen &= place[:, None] - key_place < window
            seen = F.pad(seen, (int(sink), 0), value=True)
            self.masks[key] = torch.zeros_like(seen, dtype=like.dtype).masked_fill_(~seen, -torch.inf).to(like.device)
        return self.masks[key]

    def in_blocks(self, q: Tensor, k: Tensor, v: Tensor, longest: int, scale: float, window, sinks) -> Tensor:
        """The last n of m tokens, q [1, Q, n, D] to k, v [1, K, m, D] -> [1, n, Q, D]: queries in blocks, each with the
        keys up to its end. longest: the largest n of this prompt, so that its answers share a mask.
        """
        at, sink, out = k.shape[2] - q.shape[2], sinks is not None, []
        last = at + (longest - 1) // QUERY_BLOCK * QUERY_BLOCK
        for part in q.split(QUERY_BLOCK, 2):
            end = at + part.shape[2]
            before = at if window is None else min(at, window - 1)  # keys that the block's first query sees
            # without a window each block's mask is a part of the last one's: its first columns are seen by all
            most = last if window is None else before
            mask = self.mask(q, most, [min(QUERY_BLOCK, longest)], window, sink)
            mask = mask[: end - at, most - before : sink + most + end - at]
            keys, values = k[:, :, at - before : end], v[:, :, at - before : end]
            out.append(fused_attention(part, keys, values, scale, sinks, mask))
            at = end
        return torch.cat(out, 1)

    def attend(self, module, q: Tensor, k: Tensor, v: Tensor, scale: float, window, sinks) -> Tensor:
        """q [1, Q, T, D], k, v [1, K, T, D] -> [1, T, Q, D], one group after the other.

        In the last layer only the prompt's final position is read, so only that one is computed; the others are zeros.
        """
        if self.kept is not None:
            self.kept |= {(module.layer_idx, "keys"): k, (module.layer_idx, "values"): v}
        last_layer = module.layer_idx == module.config.num_hidden_layers - 1
        # split, not slices: the gradient of a slice is a whole row of zeros
        parts = iter(zip(q.split(self.sizes, 2), k.split(self.sizes, 2), v.split(self.sizes, 2)))
        out = []
        for L, together in self.groups:
            q_prompt, k_prompt, v_prompt = next(parts)
            if last_layer:
                end = self.in_blocks(q_prompt[:, :, -1:], k_prompt, v_prompt, 1, scale, window, sinks)
                out.append(F.pad(end, (0, 0, 0, 0, L - 1, 0)))
            elif window is None or L <= window:
                out.append(fused_attention(q_prompt, k_prompt, v_prompt, scale, sinks, None))
            else:
                out.append(self.in_blocks(q_prompt, k_prompt, v_prompt, L, scale, window, sinks))
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
