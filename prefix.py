"""One prompt for all of its answers: how grpo.py has a model read each prompt once, exactly.

    Packed    one row [prompt, answer, answer, ..., prompt, ...] for the update, and for a rollout's prompts
    Decoding  one token a row and step for the rollout: a prompt's keys are held once, and serve all of its answers
    logprobs  the log-prob of each token of some answers, by Packed

Packed and Decoding are layouts: the model's own layers run as they are, and where they attend they call
`shared_attention`, which hands their queries, keys and values to the layout of this forward. That is all a model has to
offer for it. One that cannot gets plain_logprobs and plain_decode, which repeat the prompt; shares_prompts finds out.

Shapes: B prompts, G answers a prompt, n rows (answers being decoded), L prompt tokens, R answer tokens, T tokens of a
packed row, V vocabulary, H hidden, N answer tokens of a whole batch laid end to end; in attention Q query heads, K key
heads, D numbers a head.
"""
import contextlib
import inspect
from bdb import BdbQuit
from collections import defaultdict
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, GenerationConfig
from transformers.modeling_layers import GradientCheckpointingLayer

NAME = "grpo_shared"
HEAD_BLOCK = 2**24  # logits in memory at a time
PREFILL_TOKENS = 8192  # prompt tokens encoded in one forward of a rollout: bounds its memory
CHUNK = 128  # short answers attend to their prompt together, up to so many tokens: fewer calls, little masked waste
BLOCK = 1024  # queries in one call, of a prompt behind a window or of a long answer: no mask is [L, L] or [R, L + R]


def cut(sizes: list[int], bound: int) -> list[slice]:
    """Consecutive runs of a list whose sizes add up to at most bound; a larger one stands alone."""
    starts, used = [], bound
    for i, size in enumerate(sizes):
        if used + size > bound or not starts:
            starts, used = [*starts, i], 0
        used += size
    return [slice(*ends) for ends in zip(starts, [*starts[1:], len(sizes)])]


def shared_attention(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask, *, layout, scaling: float | None = None,
    sliding_window: int | None = None, s_aux: Tensor | None = None, softcap: float | None = None, **unused,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer inside `sharing`; the layout knows which token may see which.

    query [b, Q, t, D], key and value [b, K, t, D], positions already in them; values may have a D of their own. Returns
    ([b, t, Q, D], None).
    """
    if softcap:
        raise NotImplementedError("soft-capped attention")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    last = module.layer_idx == module.config.num_hidden_layers - 1
    return layout.attend(module.layer_idx, query, key, value, scale, sliding_window, s_aux, last), None


AttentionInterface.register(NAME, shared_attention)  # without a mask function: transformers builds no masks


@contextlib.contextmanager
def sharing(model):
    """Inside, the model's layers attend through the layout that each forward names. The backward pass of a model with
    gradient checkpointing belongs inside too, for it runs the layers again."""
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before


@contextlib.contextmanager
def evaluating(model, checkpointing: bool = False):
    """Inside, no module is in training mode, so that there is no dropout; but with checkpointing, layers that have it
    on are, for transformers checkpoints in training mode only. Afterwards each is in the mode that it was in."""
    before = [(module, module.training) for module in model.modules()]
    for module, _ in before:
        layer = checkpointing and isinstance(module, GradientCheckpointingLayer)
        module.training = layer and module.gradient_checkpointing
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, sinks: Tensor | None, mask: Tensor | None) -> Tensor:
    """Fused attention of q [1, Q, n, D] to k, v [1, K, m, D] -> [1, n, Q, D].

    mask: [n, m], 0 where a query sees a key and -inf elsewhere, after a first column of 0 where there are sinks; None
    is causal, with n == m.
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


def hide(hidden: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What to add to scores: -inf where hidden, else 0."""
    return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, -torch.inf)


class Packed:
    """One row [prompt 1, answer 1a, answer 1b, ..., prompt 2, answer 2a, ...]: no padding, and no prompt twice.

    An answer sees its prompt and itself, and its positions go on where its prompt's end; its last token is left out,
    for it predicts nothing. One layout for all lengths: against a cache expanded to G padded rows it needs no copies
    of the prompt's keys, several groups share a forward, and gradient checkpointing works.

    ids, positions: [1, T]. live: [N], where in the row each answer token is predicted, the first by its prompt's end.
    """

    def __init__(self, groups: list[tuple[Tensor, list[Tensor]]], device: torch.device):
        ids, positions, live, self.groups, self.sizes, at = [], [], [], [], [], 0
        for prompt, answers in groups:
            L, chunks = len(prompt), []
            ids.append(prompt.cpu())
            positions.append(torch.arange(L))
            last, at = at + L - 1, at + L
            for answer in answers:
                r = max(len(answer) - 1, 0)
                ids.append(answer.cpu()[:r])
                positions.append(torch.arange(L, L + r))
                live.append(torch.cat([torch.tensor([last]), torch.arange(at, at + r)])[: len(answer)])
                if chunks and sum(chunks[-1]) + r <= CHUNK:
                    chunks[-1].append(r)
                elif r:
                    chunks.append([r])
                at += r
            self.groups.append((L, chunks))
            self.sizes += [L, *map(sum, chunks)]
        self.ids, self.positions = torch.cat(ids)[None].to(device), torch.cat(positions)[None].to(device)  # [1, T]
        self.live = torch.cat(live).to(device) if live else None  # [N]
        self.masks, self.kept = {}, None  # kept: a dict to which each layer adds its keys and values, for Decoding

    def mask(self, like: Tensor, before: int, lengths: list[int], window: int | None, sink: bool) -> Tensor:
        """[n, sink + before + n] for n = sum(lengths) queries: all see the first `before` keys, and each its own run
        of tokens up to itself, or what of that is nearer than the window. One tensor for all layers."""
        key = (before, *lengths, window, sink)
        if key not in self.masks:
            run = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))  # [n]
            place = torch.cat([torch.arange(before, before + r) for r in lengths])  # [n]
            key_run, key_place = F.pad(run, (before, 0), value=-1), torch.cat([torch.arange(before), place])
            seen = ((key_run == -1) | (key_run == run[:, None])) & (key_place <= place[:, None])
            if window is not None:
                seen &= place[:, None] - key_place < window
            seen = F.pad(seen, (int(sink), 0), value=True)
            self.masks[key] = hide(~seen, like.dtype).to(like.device)
        return self.masks[key]

    def in_blocks(self, q: Tensor, k: Tensor, v: Tensor, longest: int, scale: float, window, sinks) -> Tensor:
        """The last n of m tokens, q [1, Q, n, D] to k, v [1, K, m, D] -> [1, n, Q, D]: queries in blocks, each with the
        keys up to its end. longest: the largest n of this prompt, so that its answers share a mask."""
        at, sink, out = k.shape[2] - q.shape[2], sinks is not None, []
        last = at + (longest - 1) // BLOCK * BLOCK
        for part in q.split(BLOCK, 2):
            end = at + part.shape[2]
            before = at if window is None else min(at, window - 1)  # keys that the block's first query sees
            # without a window each block's mask is a part of the last one's: its first columns are seen by all
            most = last if window is None else before
            mask = self.mask(q, most, [min(BLOCK, longest)], window, sink)
            mask = mask[: end - at, most - before : sink + most + end - at]
            keys, values = k[:, :, at - before : end], v[:, :, at - before : end]
            out.append(attend(part, keys, values, scale, sinks, mask))
            at = end
        return torch.cat(out, 1)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window, sinks, last: bool) -> Tensor:
        """q [1, Q, T, D], k, v [1, K, T, D] -> [1, T, Q, D], one group after the other.

        last: this is the last layer. What it makes of a prompt is read at the prompt's end alone: zeros elsewhere.
        """
        if self.kept is not None:
            self.kept[layer] = k, v
        # split, not slices: the gradient of a slice is a whole row of zeros
        parts = iter(zip(q.split(self.sizes, 2), k.split(self.sizes, 2), v.split(self.sizes, 2)))
        out = []
        for L, chunks in self.groups:
            q_prompt, k_prompt, v_prompt = next(parts)
            if last:
                end = self.in_blocks(q_prompt[:, :, -1:], k_prompt, v_prompt, 1, scale, window, sinks)
                out.append(F.pad(end, (0, 0, 0, 0, L - 1, 0)))
            elif window is None or L <= window:
                out.append(attend(q_prompt, k_prompt, v_prompt, scale, sinks, None))
            else:
                out.append(self.in_blocks(q_prompt, k_prompt, v_prompt, L, scale, window, sinks))
            for lengths in chunks:
                q_own, k_own, v_own = next(parts)
                keys, values = torch.cat([k_prompt, k_own], 2), torch.cat([v_prompt, v_own], 2)
                if len(lengths) == 1:
                    longest = max(map(sum, chunks))
                    out.append(self.in_blocks(q_own, keys, values, longest, scale, window, sinks))
                else:
                    mask = self.mask(q, L, lengths, window, sinks is not None)
                    out.append(attend(q_own, keys, values, scale, sinks, mask))
        return torch.cat(out, 1)


def body(model, layout, ids: Tensor, positions: Tensor) -> Tensor:
    """The model without its head, attending through the layout: ids, positions [b, t] -> hidden [b, t, H]."""
    with sharing(model):
        return model.base_model(ids, position_ids=positions, use_cache=False, layout=layout)[0]


class Decoding:
    """Answers being decoded, a token a row and step: each prompt's keys and values once for all of its answers, and
    beside them each answer's own, in buffers that double when they are full.

    counts: [B], answers to each prompt; rows are ordered by prompt. logits: [n, V], of the next token of each row.
    """

    def __init__(self, model, prompts: list[Tensor], counts: list[int]):
        pieces, last = defaultdict(list), []
        for part in cut([len(p) for p in prompts], PREFILL_TOKENS):
            packed = Packed([(p, []) for p in prompts[part]], model.device)
            packed.kept = {}
            hidden = body(model, packed, packed.ids, packed.positions)[0]  # [T, H]
            last.append(hidden[torch.tensor(packed.sizes).cumsum(0) - 1])  # the last token of each prompt
            for layer, both in packed.kept.items():
                for i, x in enumerate(both):  # [1, K, T, D]
                    pieces[layer, i] += x[0].transpose(0, 1).split(packed.sizes)  # [L, K, D] each
        # [K, B, L, D], padded on the right, two a layer; key heads come first, so that no product needs a copy
        self.prompt = {at: pad_sequence(x, True).permute(2, 0, 1, 3).contiguous() for at, x in pieces.items()}
        self.length = torch.tensor([len(p) for p in prompts], device=model.device)  # [B]
        self.owner = torch.repeat_interleave(torch.tensor(counts, device=model.device))  # [n], each row's prompt
        self.own, self.t = {}, 0  # [K, n, capacity, D], two a layer; the first t are in use
        self.logits = model.get_output_embeddings()(torch.cat(last))[self.owner]
        self.arrange()

    def arrange(self) -> None:
        """Gives each row a slot [B, G] beside its prompt; G is the largest group, so some slots may stay empty."""
        counts = self.owner.bincount(minlength=len(self.length))  # [B]
        self.G, self.masks = int(counts.max()), {}
        rank = torch.arange(len(self.owner), device=counts.device) - (counts.cumsum(0) - counts)[self.owner]
        self.slot = None if len(self.owner) == len(counts) * self.G else self.owner * self.G + rank  # [n]

    def keep(self, rows: Tensor) -> None:
        """Only these rows [n'] go on, and only the prompts that they need."""
        kept, self.owner = self.owner[rows].unique(return_inverse=True)
        if len(kept) < len(self.length):
            self.length = self.length[kept]
            for at, x in self.prompt.items():  # one by one, for there need not be memory for all of them twice
                self.prompt[at] = x[:, kept]
        for at, x in self.own.items():
            self.own[at] = x[:, rows]
        self.logits = self.logits[rows]
        self.arrange()

    def step(self, model, tokens: Tensor) -> None:
        """Feeds one token a row, [n], and sets the logits of the next."""
        self.forward(model, tokens, self.t)
        self.t += 1

    def forward(self, model, tokens: Tensor, place) -> None:
        """The model's part of a step. place: t, or a tensor [1] of it."""
        self.masks = {key: mask for key, mask in self.masks.items() if key is None}  # the others depend on the place
        positions = (self.length[self.owner] + place)[:, None]  # [n, 1]
        self.logits = model.get_output_embeddings()(body(model, self, tokens[:, None], positions)[:, 0])

    def by_prompt(self, x: Tensor) -> Tensor:
        """[K * n, Q/K, X] -> [K * B, G * Q/K, X]; empty slots hold zeros."""
        if self.slot is not None:
            by_head = x.unflatten(0, (-1, len(self.owner)))  # [K, n, Q/K, X]
            slots = x.new_zeros(len(by_head), len(self.length) * self.G, *x.shape[1:])
            x = slots.index_copy_(1, self.slot, by_head).flatten(0, 1)
        return x.reshape(-1, self.G * x.shape[1], x.shape[2])

    def by_row(self, x: Tensor) -> Tensor:
        """The way back: [K * B, G * Q/K, X] -> [K * n, Q/K, X]."""
        x = x.reshape(-1, x.shape[1] // self.G, x.shape[2])
        return x if self.slot is None else x.unflatten(0, (-1, len(self.length) * self.G))[:, self.slot].flatten(0, 1)

    def remember(self, at: tuple[int, int], x: Tensor, window: int | None) -> Tensor:
        """Adds the newest token's keys or values [n, K, 1, D]; returns [K * n, m, D], the m that are seen."""
        if at not in self.own:
            self.own[at] = x.new_empty(x.shape[1], len(x), 32, x.shape[3])
        elif self.t == self.own[at].shape[2]:
            self.own[at] = torch.cat([self.own[at], torch.empty_like(self.own[at])], 2)
        self.own[at][:, :, self.t] = x[:, :, 0].transpose(0, 1)
        seen = slice(max(0, self.t + 1 - window) if window else 0, self.t + 1)
        return self.own[at].flatten(0, 1)[:, seen]

    def mask(self, window: int | None) -> Tensor | None:
        """[B, 1, L], -inf at padding and at what the window has left behind; None where there is neither."""
        if window not in self.masks:
            hidden = self.hidden(window, self.t)
            self.masks[window] = hide(hidden)[:, None] if hidden.any() else None
        return self.masks[window]

    def hidden(self, window: int | None, place) -> Tensor:
        """[B, L], True where an answer's token at this place (t, or a tensor [1] of it) sees no token of its prompt."""
        at = torch.arange(self.prompt[0, 0].shape[2], device=self.length.device)  # [L]
        hidden = at >= self.length[:, None]
        return hidden if window is None else hidden | (self.length[:, None] + place - at >= window)

    def own_mask(self, window: int | None) -> Tensor | None:
        """What `remember` returned beyond what a row may see: nothing here."""
        return None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window, sinks, last: bool) -> Tensor:
        """q [n, Q, 1, D], k, v [n, K, 1, D] -> [n, 1, Q, D]. The answers to one prompt meet its keys in one product.

        Nearly all that this costs is the number of its operations: so three dimensions, and few of them.
        """
        n, heads, _, D = q.shape
        prompt_k, prompt_v = (self.prompt[layer, i].flatten(0, 1) for i in (0, 1))  # [K * B, L, D]
        own_k, own_v = (self.remember((layer, i), x, window) for i, x in enumerate((k, v)))  # [K * n, m, D]
        q = (q * scale).reshape(n, k.shape[1], -1, D).transpose(0, 1).flatten(0, 1)  # [K * n, Q/K, D]
        shared = torch.bmm(self.by_prompt(q), prompt_k.mT)  # [K * B, G * Q/K, L]
        if (mask := self.mask(window)) is not None:
            shared = (shared.unflatten(0, (-1, len(mask))) + mask).flatten(0, 1)
        own = torch.bmm(q, own_k.mT)
        if (mask := self.own_mask(window)) is not None:
            own = own + mask
        scores = [shared, self.by_prompt(own)]  # [K * B, G * Q/K, t + 1]
        if sinks is not None:  # [Q]: one more score, with value 0
            sinks = sinks.to(q).view(k.shape[1], 1, 1, -1).expand(-1, len(self.length), self.G, -1)  # [K, B, G, Q/K]
            scores.append(sinks.reshape(len(shared), -1, 1))  # [K * B, G * Q/K, 1]
        weights = torch.cat(scores, -1).softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q)
        on_prompt, on_own, *_ = weights.split([score.shape[-1] for score in scores], -1)
        out = self.by_row(torch.bmm(on_prompt, prompt_v))  # [K * n, Q/K, D]
        out = torch.baddbmm(out, self.by_row(on_own), own_v)
        return out.unflatten(0, (-1, n)).transpose(0, 1).reshape(n, 1, heads, -1)


# ------------------------------------------------------------------------------------------------------ the log-probs


def token_logprobs(head, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-prob [N] of each target [N], and the entropy [N] of what it was drawn from. head: hidden -> logits [N, V]."""
    logits = head(hidden)  # [N, V]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature  # as in grpo.sample
    logps = logits.log_softmax(-1)
    known = logps.detach()  # the entropy is a diagnostic, without a gradient; clamped, for 0 * -inf is no number
    entropy = -known.exp().mul_(known.clamp(min=-1e4)).sum(-1)
    return logps.gather(-1, targets[:, None]).squeeze(-1), entropy


def packed_logprobs(model, groups: list[tuple[Tensor, list[Tensor]]], temperature: float) -> tuple[Tensor, Tensor]:
    """logprobs with each prompt read once. Only live positions meet the head, in blocks that the backward pass
    computes again where there are several: [T, V] never exists.
    """
    packed = Packed(groups, model.device)
    hidden = body(model, packed, packed.ids, packed.positions)[0, packed.live]  # [N, H]
    targets = torch.cat([a for _, answers in groups for a in answers]).to(model.device)  # [N]
    head = model.get_output_embeddings()
    rows = max(1, HEAD_BLOCK // head.weight.shape[0])
    run = token_logprobs if len(targets) <= rows else partial(checkpoint, token_logprobs, use_reentrant=False)
    blocks = zip(hidden.split(rows), targets.split(rows))
    logps, entropies = zip(*(run(head, x, y, temperature) for x, y in blocks))
    return torch.cat(logps), torch.cat(entropies)


def logprobs(model, groups: list[tuple[Tensor, list[Tensor]]], temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [N] of all answers [R_g] to some prompts [L], end to end; the former differentiable."""
    if shares_prompts(model):
        return packed_logprobs(model, groups, temperature)
    return tuple(map(torch.cat, zip(*(plain_logprobs(model, *group, temperature) for group in groups))))


# ------------------------------------------------------------------------------------------ where it cannot be shared


def plain_logprobs(model, prompt: Tensor, answers: list[Tensor], temperature: float) -> tuple[Tensor, Tensor]:
    """logprobs of one group by the definition, a row [prompt, answer] for each answer: the form that a model falls
    back to, and that the other one is tested against. Padded on the right, where causality keeps it from real tokens.
    """
    rows = [torch.cat([prompt.cpu(), a.cpu()[:-1]]) for a in answers]
    longest = max(map(len, answers))
    keep = {"logits_to_keep": longest} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits = model(pad_sequence(rows, True).to(model.device), use_cache=False, **keep).logits[:, -longest:]  # [G, R, V]
    live = torch.cat([own[: len(a)] for own, a in zip(logits, answers)])  # [N, V]
    return token_logprobs(lambda x: x, live, torch.cat(answers).to(model.device), temperature)


def plain_decode(model, batch, max_new_tokens, eos_ids, sampling, progress) -> list[tuple[Tensor, Tensor, bool]]:
    """grpo.decode for a model that cannot share: transformers' own generation, each prompt repeated for its answers.

    It draws for all answers of a call at once: those of one prompt share one seed here, the first of theirs.
    """
    temperature, top_p, top_k = sampling
    choice = dict(do_sample=True, temperature=temperature, top_p=top_p, top_k=top_k) if temperature else {}
    # the model's own config may hold penalties that training knows nothing of
    own, model.generation_config = model.generation_config, GenerationConfig()
    results = []
    try:
        for prompt, seeds in batch:
            ids = prompt.expand(len(seeds), -1).to(model.device)  # [G, L]
            with torch.random.fork_rng():
                torch.manual_seed(seeds[0])
                rows = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens,
                    eos_token_id=eos_ids or None, pad_token_id=eos_ids[0] if eos_ids else 0, **choice,
                )[:, len(prompt) :].cpu()  # [G, R]
            ended = [torch.isin(row, torch.tensor(eos_ids)).nonzero() for row in rows]
            answers = [row[: int(ends[0]) + 1] if len(ends) else row for row, ends in zip(rows, ended)]
            sizes = [len(a) for a in answers]
            blocks = cut(sizes, HEAD_BLOCK // model.config.get_text_config().vocab_size)  # not all [G, R, V] at a time
            logps = [plain_logprobs(model, prompt, answers[block], temperature or 1.0)[0] for block in blocks]
            results += zip(answers, torch.cat(logps).cpu().split(sizes), [len(ends) > 0 for ends in ended])
            progress(len(answers))
    finally:
        model.generation_config = own
    return results


def shares_prompts(model) -> bool:
    """Whether the shared forms say of this model what the plain one says; found out once, and if not, told in a line.

    Linear attention and state spaces keep no keys, some attention adds biases of its own, some heads cap their
    logits: all of that differs from the definition on two short prompts, or never calls `shared_attention`.
    """
    if not hasattr(model, "_shares_prompts"):
        try:
            with evaluating(model):
                reason = differs_from_plain(model)
        except BdbQuit:  # whoever leaves a debugger in here wants out
            raise
        except Exception as error:  # code of any model there is
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        model._shares_prompts = not reason
        if reason:
            print(f"grpo: {type(model).__name__} reads the prompt again for each answer, which is slower: {reason}")
    return model._shares_prompts


@torch.no_grad()
def differs_from_plain(model) -> str:
    """In a few words where the shared forms differ from the plain one; empty where they do not."""
    config = model.config.get_text_config()
    if getattr(config, "final_logit_softcapping", None):
        return "its logits are soft-capped"
    if "chunked_attention" in (getattr(config, "layer_types", None) or []):
        return "its attention is chunked"
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    rotaries = [rotary, *(own for own in rotary.values() if isinstance(own, dict))]  # one for each type of layer
    kinds = [str(own.get("rope_type") or own.get("type")) for own in rotaries]
    if any("dynamic" in kind or kind == "longrope" for kind in kinds):
        return "its rotary positions depend on the longest row"
    window = getattr(config, "sliding_window", None) or 0
    lengths = [window + 3 if 0 < window <= 1024 else 5, 3]  # a larger window is taken on trust
    vocabulary = model.get_input_embeddings().num_embeddings
    prompts = [torch.arange(7, 7 + length) * 31 % vocabulary for length in lengths]
    packed = Packed([(p, []) for p in prompts], model.device)
    packed.kept = {}
    body(model, packed, packed.ids, packed.positions)
    if len(packed.kept) < config.num_hidden_layers:
        return "not all of its layers attend"
    steps, place = [], torch.arange(4, device=model.device)[:, None] % 2
    with torch.inference_mode():  # as in grpo.decode
        state = Decoding(model, prompts, [2, 2])
        for t in range(3):
            if t:
                state.step(model, steps[-1][0])
            # the likeliest token for a prompt's first answer, the second likeliest for its second
            steps.append([x.gather(1, place)[:, 0] for x in state.logits.float().log_softmax(-1).topk(2)][::-1])
    tokens, decoded = (torch.stack(x, 1) for x in zip(*steps))  # [4, 3] each
    groups = [(p, list(own)) for p, own in zip(prompts, tokens.split(2))]
    plain = torch.cat([plain_logprobs(model, *group, 1.0)[0] for group in groups])
    for name, values in (("update", packed_logprobs(model, groups, 1.0)[0]), ("rollout", decoded.flatten())):
        gap = float((values - plain).abs().mean())
        if not gap < max(torch.finfo(model.dtype).eps, 1e-7) ** 0.5:
            return f"the shared {name} is off by {gap:.2g} nats a token"
    return ""
