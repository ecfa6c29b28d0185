"""Test grpo.py. Each test is named after the bug that it guards against. Inputs are random and of unequal lengths."""
import copy
import os
import subprocess
import sys
import warnings
from bdb import BdbQuit
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import grpo
from grpo import Sampling
from plumbing import batches, other_models, shared_prompt
from plumbing.fast_decode import SharedCache
from plumbing.models import checkpoint_layers
from plumbing.shared_prompt import Packed

torch.set_num_threads(1)
EOS = 5
SHAPE = dict(vocab_size=37, max_position_embeddings=128, bos_token_id=1, eos_token_id=EOS, pad_token_id=EOS)


SIZE = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    initializer_range=0.2,  # large enough for peaked distributions
)
EXPERTS = dict(num_experts_per_tok=2, experts_implementation="eager")


def build(name, config=None, **settings):
    """Make a tiny random model. Norms and biases, which start as ones and zeros, become random too."""
    torch.manual_seed(3)
    head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    config = getattr(transformers, config or f"{name}Config")(**SHAPE, **settings)
    model = getattr(transformers, f"{name}{head}")(config)
    for p in model.parameters():
        if p.dim() == 1:
            p.data += 0.2 * torch.randn_like(p)
    grpo.enable_sharing(model)  # as after loading
    return model


def qwen3(**changes):
    """A model with grouped key heads, QK-norm, and the head tied to the embedding."""
    return build("Qwen3", **{**SIZE, "tie_word_embeddings": True, **changes})


def qwen3_untied():
    return qwen3(tie_word_embeddings=False)


def qwen3_moe(**changes):
    return build("Qwen3Moe", **SIZE | EXPERTS | changes, num_experts=4, moe_intermediate_size=16)


def llama():
    return build("Llama", **SIZE)


def gpt_oss(**changes):
    """A model with attention sinks, and in every second layer a window that is shorter than the prompts."""
    return build("GptOss", **SIZE | EXPERTS | changes, num_local_experts=4, sliding_window=6)


def mistral():
    """A model with a window in every layer, also in the last one."""
    return build("Mistral", **SIZE, sliding_window=6)


def deepseek():
    """A model whose values are narrower than its queries and keys."""
    size = SIZE | dict(num_key_value_heads=4, q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=16,
                       qk_rope_head_dim=8, v_head_dim=12, first_k_dense_replace=2)
    return build("DeepseekV3", **{k: v for k, v in size.items() if k != "head_dim"})


def gpt2():
    """A model with learned positions and dropout."""
    torch.manual_seed(4)
    config = transformers.GPT2Config(**SHAPE, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    model = transformers.GPT2LMHeadModel(config)
    grpo.enable_sharing(model)
    return model.train()


def opt():
    """A model whose head calls `model.decoder(...)`, not `model(...)`."""
    sizes = dict(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32)
    return build("OPT", **sizes, dropout=0.0, init_std=0.2)


def falcon_h1():
    """A model whose head asks its layers for a number, with attention and a state space in each layer."""
    return build("FalconH1", **SIZE, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8,
                 lm_head_multiplier=3.0)


def llama4():
    """A model that gives a wrong name for its layers."""
    return build("Llama4", "Llama4TextConfig", **SIZE, intermediate_size_mlp=48, num_local_experts=2)


def mamba():
    """A model without attention."""
    return build("Mamba", hidden_size=32, num_hidden_layers=2, initializer_range=0.2)


def qwen3_next():
    """A model with linear attention in three of four layers. With weights this small, the logits do not show it."""
    return build("Qwen3Next", **{**SIZE, "num_hidden_layers": 4, "initializer_range": 0.002}, **EXPERTS, num_experts=4)


def gemma2(**changes):
    """A model with soft-capped logits. With weights this small, the logits do not show it."""
    return build("Gemma2", **{**SIZE, "initializer_range": 0.002, "attn_logit_softcapping": None, **changes})


def gemma2_scores():
    """A model with soft-capped attention scores."""
    return gemma2(attn_logit_softcapping=50.0, final_logit_softcapping=None)


def granite():
    """A model whose logits are divided after the head."""
    return build("Granite", **{k: v for k, v in SIZE.items() if k != "head_dim"}, logits_scaling=3.0)


def phi3(**changes):
    """A model whose rotary positions depend on the longest row of the batch."""
    scaling = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[4.0] * 4, factor=4.0)
    size = {k: v for k, v in SIZE.items() if k != "head_dim"}
    return build("Phi3", **size, rope_parameters=scaling | changes, original_max_position_embeddings=16)


def dynamic():
    return qwen3(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=4.0))


SHARING = [qwen3, qwen3_untied, qwen3_moe, llama, gpt_oss, mistral, deepseek, gpt2, opt]


def ids(*lengths, seed=0):
    """Return a tensor of random token ids, without special ones, for each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(6, 37, (n,), generator=generator) for n in lengths]


def unshared(model):
    """Undo enable_sharing and return the model."""
    model.config._attn_implementation = "sdpa" if model._supports_sdpa else "eager"
    return model


def draw(model, prompts, answers=3, seed=7, sampling=Sampling(), max_new_tokens=9, eos_ids=(EOS,), **more):
    """Return rollouts with `answers` answers to each prompt."""
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(2**62, (len(prompts), answers), generator=generator).tolist()
    more |= dict(sampling=sampling, max_new_tokens=max_new_tokens, eos_ids=eos_ids)
    return grpo.rollout(model, prompts, seeds, **more)


def scored(model, rewards=((0.0, 1.0, 0.5), (2.0, -1.0, 0.0)), temperature=1.0):
    """Return rollouts of two prompts with rewards."""
    rollouts = draw(model, ids(4, 11), sampling=Sampling(temperature), eos_ids=[EOS, 6, 7, 8])
    for r, values in zip(rollouts, rewards):
        r.rewards = torch.tensor(values)
    return rollouts


def settings(**changes):
    """Return the settings that `update` reads of dust.Args: a single step, without KL."""
    args = dict(mode="rank", mini_batch=16, ppo_epochs=1, temperature=1.0, loss="sequence", clip=0.2, clip_high=0.0,
                dual_clip=0.0, kl=0.0, micro_tokens=16384, server_rollouts=False)
    return SimpleNamespace(**args | changes)


@pytest.fixture(autouse=True)
def unclipped(monkeypatch):
    """Switch off the bound on the norm of the gradients."""
    monkeypatch.setattr(grpo, "MAX_GRADIENT_NORM", float("inf"))


class Recorder(torch.optim.SGD):
    """Plain SGD that keeps the gradients of its last step."""

    def step(self):
        self.seen = [p.grad.clone() for p in self.param_groups[0]["params"]]
        super().step()


def gradients(model, rollouts, reference=None, **changes):
    """Return the gradients and the metrics of one update of a copy of the model."""
    model = copy.deepcopy(model)
    optimizer = Recorder(model.parameters(), lr=0.0)
    metrics = grpo.update(model, optimizer, rollouts, settings(**changes), reference=reference)
    return optimizer.seen, metrics


def distance(a, b):
    """Return the relative L2 distance between two lists of tensors."""
    a, b = (torch.cat([t.double().flatten() for t in x]) for x in (a, b))
    return float((a - b).norm() / b.norm())


def full_logps(model, prompt, answer, temperature):
    """Return the log-probs of one answer by their definition: from the model's logits over the whole row."""
    with grpo.plain_attention(model):
        logits = model(torch.cat([prompt, answer])[None], use_cache=False).logits[0]
    logps = (logits / temperature).log_softmax(-1)
    return logps[len(prompt) - 1 : -1].gather(-1, answer[:, None]).squeeze(-1)


# ------------------------------------------------------------------------------------------------------- rollout


@pytest.mark.parametrize("switch", [lambda model: model, unshared], ids=["shared", "plain"])
@pytest.mark.parametrize("make", [qwen3, gpt2])
def test_a_prompt_is_not_moved_by_the_padding_beside_longer_ones(make, switch):
    """Padding on the left shifts the positions, rotary and learned ones, unless they are counted for each row."""
    model, prompts = switch(make()), ids(3, 12, 7, 1)
    how = dict(answers=2, max_new_tokens=8, sampling=Sampling(temperature=0.0))
    together = draw(model, prompts, **how)
    for prompt, r in zip(prompts, together):
        alone = draw(model, [prompt], **how)[0]
        assert torch.equal(r.prompt, prompt)
        assert [a.tolist() for a in r.answers] == [a.tolist() for a in alone.answers]
        torch.testing.assert_close(r.logps, alone.logps, atol=1e-5, rtol=0)


@pytest.mark.parametrize("lengths, answers", [((4, 9, 6), 8), ((3, 5, 9, 2, 7, 8, 6, 4, 11, 10), 1)])
def test_rows_that_leave_the_batch_do_not_change_what_the_others_draw(lengths, answers):
    """Without an EOS no row leaves the batch. With an EOS, the same draws must give the same answers up to the EOS. In
    the case with one answer to each prompt, prompts leave as well."""
    model, prompts = qwen3(), ids(*lengths)
    some = draw(model, prompts, answers, seed=1, max_new_tokens=40, eos_ids=[EOS, 8])
    whole = draw(model, prompts, answers, seed=1, max_new_tokens=40, eos_ids=[])
    lengths = {len(a) for r in some for a in r.answers}
    assert len(lengths) > 5
    for short, long in zip(some, whole):
        for a, b, logp, full in zip(short.answers, long.answers, short.logps, long.logps):
            assert torch.equal(a, b[: len(a)])
            torch.testing.assert_close(logp, full[: len(a)], atol=1e-5, rtol=0)


def test_more_rows_than_fit_are_decoded_in_parts_and_draw_the_same():
    """The bound must hold within a group too. It must change neither the draws nor the order of the answers."""
    model, prompts, sizes = qwen3(), ids(9, 2, 5, 3), []
    how = dict(answers=6, seed=1, max_new_tokens=6, eos_ids=[EOS, 8])
    whole = draw(model, prompts, **how)
    model.model.layers[0].register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[:2]))
    for max_rows in (12, 4, 1):
        parts = draw(model, prompts, **how, max_rows=max_rows)
        for a, b in zip(parts, whole):
            assert torch.equal(a.prompt, b.prompt) and list(map(len, a.answers)) == list(map(len, b.answers))
            assert torch.equal(torch.cat(a.answers), torch.cat(b.answers)) and a.finished == b.finished
        assert max(rows for rows, _ in sizes) <= max_rows
        sizes.clear()


def test_no_prompts_are_an_empty_rollout():
    """A rank without prompts calls it too, because all ranks must take part in gathering a sharded model."""
    assert draw(qwen3(), []) == [] and draw(mamba(), []) == []


def test_an_answer_ends_with_one_eos_and_a_truncated_one_has_none():
    """Here the pad id is the EOS, which also occurs in a prompt. So lengths must come from sampling, not from ids."""
    model = qwen3()
    prompts = [torch.tensor([7, EOS, 9, EOS]), ids(8)[0]]
    rollouts = draw(model, prompts, answers=8, seed=2, max_new_tokens=12, eos_ids=[EOS, 6])
    flat = [(a, logp, f) for r in rollouts for a, logp, f in zip(r.answers, r.logps, r.finished)]
    assert {f for _, _, f in flat} == {True, False}
    for answer, logp, finished in flat:
        ends = torch.isin(answer, torch.tensor([EOS, 6]))
        assert len(answer) == len(logp) <= 12
        assert ends.sum() == finished and (ends[-1] if finished else len(answer) == 12)


@pytest.mark.parametrize("make", [*SHARING, mamba])
def test_log_probs_at_sampling_are_those_of_training_at_the_same_temperature(make):
    """If they are off by one position, or lack the temperature, only a ratio that does not start at 1 shows it."""
    model = make()
    for r in draw(model, ids(5, 13), max_new_tokens=10, sampling=Sampling(0.7)):
        trained = grpo.answer_logprobs(model, r.prompt, r.answers, temperature=0.7)
        torch.testing.assert_close(r.logps, trained, atol=1e-5, rtol=1e-5)
        for answer, logp in zip(r.answers, r.logps):
            torch.testing.assert_close(logp, full_logps(model, r.prompt, answer, 0.7), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [*SHARING, mamba])
def test_what_a_rollout_returns_and_leaves_in_the_model_can_meet_a_backward_pass(make):
    """Decoding runs in inference mode. Autograd cannot keep a tensor that was made there: an answer, a log-prob, or a
    tensor that a layer of the model holds between calls."""
    model = make()
    r = draw(model, ids(5), max_new_tokens=10)[0]
    for answer, logp in zip(r.answers, r.logps):
        embedded = model.get_input_embeddings()(answer)  # autograd keeps the ids
        (embedded.mean(-1) * logp).sum().backward()  # autograd keeps the log-probs
    torch.cat(grpo.answer_logprobs(model, r.prompt, r.answers)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_bf16_logits_are_tempered_in_fp32_at_sampling_and_in_training():
    """If one of the two divides in bf16, it rounds once more. With the logits of a larger model this makes a gap of
    0.02 nats a token, which looks like a policy that has changed."""
    model = qwen3().bfloat16()
    hidden = torch.randn(200, 32, generator=torch.Generator().manual_seed(0)).bfloat16() * 16
    logits = model.lm_head(hidden)
    uniform = torch.rand(200, generator=torch.Generator().manual_seed(1))
    tokens, kept = grpo.draw_token(logits, uniform, Sampling(0.7))
    trained, _ = grpo.token_logprobs(model.lm_head, hidden, tokens, 0.7)
    exact = (logits.double() / 0.7).log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    assert logits.dtype == torch.bfloat16 and (kept - exact).abs().mean() < 1e-5
    assert (trained - kept).abs().mean() < 1e-5
    r = draw(model, ids(13), answers=8, max_new_tokens=20, sampling=Sampling(0.7), eos_ids=[])[0]
    again = grpo.answer_logprobs(model, r.prompt, r.answers, temperature=0.7)
    assert (torch.cat(again) - torch.cat(r.logps)).abs().mean() < 0.02  # bf16 layers in another layout


def test_a_forbidden_token_is_never_drawn():
    """The case: tokens of probability 0 at both ends of the cumulative sum, and draws at both ends of [0, 1)."""
    logits = torch.tensor([[-torch.inf, 2.0, -torch.inf, 1.0, -torch.inf]]).repeat(3, 1)
    tokens, logps = grpo.draw_token(logits, torch.tensor([0.0, 0.5, 1 - 2**-24]), Sampling())
    assert tokens.tolist() == [1, 1, 3]
    torch.testing.assert_close(logps, logits.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1))


def test_the_sampler_draws_each_token_as_often_as_it_should():
    logits = torch.tensor([0.3, -1.0, 2.0, 0.9, 1.4])
    uniform = (torch.arange(20000) + 0.5) / 20000

    def shares(*sampling):
        tokens, _ = grpo.draw_token(logits.expand(20000, -1), uniform, Sampling(*sampling))
        return tokens.bincount(minlength=5) / 20000

    tempered = (logits / 0.6).softmax(-1)
    torch.testing.assert_close(shares(0.6), tempered, atol=2e-4, rtol=0)
    keep = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0]) * tempered  # top 3
    torch.testing.assert_close(shares(0.6, 1.0, 3), keep / keep.sum(), atol=2e-4, rtol=0)
    keep = torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0]) * tempered  # 0.64 + 0.24 is the first sum above 0.8
    torch.testing.assert_close(shares(0.6, 0.8, 3), keep / keep.sum(), atol=2e-4, rtol=0)
    assert shares(0.6, 0.1, 0).tolist() == [0, 0, 1, 0, 0]  # the likeliest always stays
    assert shares(0.0, 1.0, 0).tolist() == [0, 0, 1, 0, 0]


@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_top_p_without_top_k_draws_as_from_a_full_sort(spread):
    """Sorting a real vocabulary takes a second a step, so the likeliest few tokens are tried first. In this batch some
    rows need one token, others need hundreds."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 5000, generator=generator) * torch.linspace(0.2, spread, 40)[:, None]
    logits[3, 7] += 30
    uniform = torch.rand(40, generator=generator)
    for top_p in (0.05, 0.5, 0.95, 0.999):
        probs, ids = logits.softmax(-1).sort(descending=True)
        likelier = probs.cumsum(-1) - probs
        cdf = probs.masked_fill(likelier >= top_p, 0).cumsum(-1)
        expected = ids.gather(-1, torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)).squeeze(-1)
        tokens, _ = grpo.draw_token(logits, uniform, Sampling(top_p=top_p))
        assert torch.equal(tokens, expected)


def test_rows_that_are_drawn_in_parts_are_the_same(monkeypatch):
    """With a real vocabulary, drawing a few rows at a time is faster than drawing all at once."""
    logits, uniform = torch.randn(7, 50), torch.rand(7)
    for sampling in (Sampling(), Sampling(0.6, 0.9, 20), Sampling(0.0)):
        whole = grpo.draw_token(logits, uniform, sampling)
        monkeypatch.setattr(grpo, "DRAWN_LOGITS", 3 * 50)
        parts = grpo.draw_token(logits, uniform, sampling)
        monkeypatch.undo()
        assert all(torch.equal(a, b) for a, b in zip(whole, parts))


# -------------------------------------------------------------------------------------------------- shared prompts


def difference_of(model) -> str:
    """Return what the check of grpo.enable_sharing finds with this model itself."""
    draw = partial(grpo.generate, sampling=Sampling(), eos_ids=[])
    return other_models.find_difference(model, draw, grpo.packed_logprobs, grpo.plain_logprobs)


def value_and_gradient(model, logprobs):
    """Return log-probs [N] and the gradient of a random weighted sum of them, a tensor for each parameter."""
    model.zero_grad()
    logp = logprobs()
    (logp * torch.randn(len(logp), generator=torch.Generator().manual_seed(5)).to(logp)).sum().backward()
    gradient = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    return logp.detach(), gradient


def both_forms(model, prompt, answers):
    """Return log-probs and gradients of the shared form and of the plain form, at T = 0.7."""
    shared = value_and_gradient(model, lambda: torch.cat(grpo.answer_logprobs(model, prompt, answers, temperature=0.7)))
    return shared, value_and_gradient(model, lambda: grpo.plain_logprobs(model, prompt, answers, 0.7)[0])


@pytest.mark.parametrize("make", SHARING)
def test_prompt_gradient_is_not_lost_when_the_prompt_is_shared(make, monkeypatch):
    """The cases: an answer of one token, more answers than fit in one call, windows within and across prompt blocks."""
    monkeypatch.setattr(shared_prompt, "SHORT_ANSWERS", 16)
    monkeypatch.setattr(shared_prompt, "QUERY_BLOCK", 8)
    model = make()
    model.eval()
    prompt, *answers = ids(19, 7, 1, 12, 3, 40, 2)
    (logp, gradient), (expected, expected_gradient) = both_forms(model, prompt, answers)
    assert grpo.shares_prompts(model)
    torch.testing.assert_close(logp, expected, atol=1e-5, rtol=0)
    assert distance(gradient, expected_gradient) < 1e-5


@pytest.mark.parametrize("make", [qwen3, qwen3_untied, llama, gpt_oss, gpt2])
def test_in_double_precision_the_shared_form_is_the_plain_one(make):
    """Rounding in fp32 could hide an error. transformers' norms always compute in fp32, so they are replaced here."""
    model = make()
    model.eval().double()
    for name, module in list(model.named_modules()):
        if hasattr(module, "variance_epsilon"):
            norm = torch.nn.RMSNorm(len(module.weight), eps=module.variance_epsilon, dtype=torch.float64)
            norm.weight.data = module.weight.data
            model.set_submodule(name, norm)
    prompt, *answers = ids(19, 7, 1, 12, 3)
    (logp, gradient), (expected, expected_gradient) = both_forms(model, prompt, answers)
    assert grpo.shares_prompts(model) and (logp - expected).abs().max() < 1e-12
    assert distance(gradient, expected_gradient) < 1e-12


def test_a_prompt_under_no_grad_passes_the_values_and_fails_the_gradients(monkeypatch):
    """The control of the tests above: without gradients in the prompt's keys, they would fail."""
    model, (prompt, *answers) = qwen3(), ids(19, 7, 12, 3)
    assert grpo.shares_prompts(model)
    attend = Packed.attend

    def without_gradient(self, module, q, k, v, *rest):
        k, v = (torch.cat([x[:, :, : len(prompt)].detach(), x[:, :, len(prompt) :]], 2) for x in (k, v))
        return attend(self, module, q, k, v, *rest)

    monkeypatch.setattr(Packed, "attend", without_gradient)
    (logp, gradient), (expected, expected_gradient) = both_forms(model, prompt, answers)
    torch.testing.assert_close(logp, expected, atol=1e-5, rtol=0)
    assert distance(gradient, expected_gradient) > 0.1


def test_a_prompt_is_read_once_for_its_answers():
    """Reading the prompt again for each answer is exact too, so every other test would pass. It is only slower."""
    model, seen = qwen3(), []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2].numel()))
    rollouts = draw(model, ids(4, 11), max_new_tokens=5, eos_ids=[])
    assert seen == [4 + 11] + [6] * 4
    seen.clear()
    for r in rollouts:
        r.rewards = torch.tensor([0.0, 1.0, 0.5])
    gradients(model, rollouts)
    assert seen == [4 + 11 + 6 * 4]


@pytest.mark.parametrize("make, reason", [
    (mamba, "not all of its layers attend"), (qwen3_next, "not all of its layers attend"),
    (gemma2, "its logits are soft-capped"), (gemma2_scores, "soft-capped attention"), (granite, "update is off by"),
    (phi3, "depend on the longest row"), (dynamic, "depend on the longest row"),
])
def test_a_model_that_cannot_share_falls_back_and_says_why(make, reason):
    """Sharing would be wrong for these models. They use the plain form, which must give the definition's numbers."""
    model = make()
    assert reason in grpo.enable_sharing(model) and not grpo.shares_prompts(model)
    rollouts = draw(model, ids(4, 9), max_new_tokens=6, eos_ids=[EOS, 8], sampling=Sampling(0.7))
    for r, values in zip(rollouts, ([0.0, 1.0, 0.5], [2.0, -1.0, 0.0])):
        r.rewards = torch.tensor(values)
        trained = grpo.answer_logprobs(model, r.prompt, r.answers, temperature=0.7)
        for answer, logp, sampled in zip(r.answers, trained, r.logps):
            expected = full_logps(model, r.prompt, answer, 0.7)
            torch.testing.assert_close(logp, expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(sampled, expected, atol=1e-5, rtol=1e-5)
        for answer, finished in zip(r.answers, r.finished):
            ends = torch.isin(answer, torch.tensor([EOS, 8])).tolist()
            assert ends == [False] * (len(answer) - 1) + [finished] and (finished or len(answer) == 6)
    expected = definition_gradients(model, rollouts, "sequence", 0.7)
    seen, _ = gradients(model, rollouts, temperature=0.7, micro_tokens=30)
    assert distance(seen, expected) < 1e-5


def test_an_answer_is_not_moved_by_a_longer_one_whose_positions_are_others():
    """Phi-3's rotary positions change at 4,096 tokens, here at 16. Padded to 21, a row of 12 had the others."""
    model, (prompt, *answers) = phi3(), ids(10, 3, 12)
    assert model.config.rope_parameters["original_max_position_embeddings"] == 16
    for answer, logp in zip(answers, grpo.answer_logprobs(model, prompt, answers, temperature=0.7)):
        torch.testing.assert_close(logp, full_logps(model, prompt, answer, 0.7), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("error", [
    BdbQuit(), torch.OutOfMemoryError("CUDA out of memory."), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: can't allocate memory: you tried ..."),
], ids=["debugger", "cuda", "python", "cpu"])
def test_what_ends_the_self_check_from_outside_is_not_a_finding_about_the_model(monkeypatch, error):
    """After `q` at a breakpoint in the self-check, the run took the model for one that cannot share, and was slow. Full
    memory must not have this effect either."""
    def quit_here(*_):
        raise error

    model = unshared(qwen3())
    monkeypatch.setattr(other_models, "find_difference", quit_here)
    with pytest.raises(type(error)):
        grpo.enable_sharing(model)
    assert not grpo.shares_prompts(model)
    monkeypatch.undo()
    assert grpo.enable_sharing(model) == "" and grpo.shares_prompts(model)


@pytest.mark.parametrize("make", [qwen3, qwen3_moe, gpt_oss])
def test_rounding_in_bf16_is_not_a_finding_about_the_model(make):
    """Two exact layouts of a random mixture of experts differ by up to 0.7 nats a token in bf16, because a rounded
    score can choose another expert. So the check refused models that share prompts exactly."""
    model = unshared(make(hidden_size=256, initializer_range=0.3, num_hidden_layers=6)).bfloat16()
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("the model itself was run"))
    assert grpo.enable_sharing(model) == "" and model.dtype == torch.bfloat16


def test_the_check_of_a_model_tries_each_kind_of_layer_but_not_each_layer():
    """A layer of another kind may come late, and a list of kinds does not have to say so. All 48 layers of a large
    model in fp32 would not fit beside it."""
    moe = dict(mlp_only_layers=[0, 1], num_experts=4, moe_intermediate_size=16, **EXPERTS)
    model = build("Qwen3Moe", **SIZE | moe | dict(num_hidden_layers=12)).bfloat16()
    small = other_models.small_model(model)
    assert [hasattr(layer.mlp, "experts") for layer in small.model.layers] == [False, False, True, True]
    assert small.dtype == torch.float32 and small.model.layers[3].mlp.gate.weight.shape == (4, 32)
    assert model.config.num_hidden_layers == 12 and other_models.small_model(model).lm_head.weight.equal(
        small.lm_head.weight)
    kinds = ["full_attention"] * 4 + ["linear_attention"] + ["full_attention"] * 7
    late = build("Qwen3Next", **SIZE | dict(num_hidden_layers=12, layer_types=kinds, num_experts=4), **EXPERTS)
    assert grpo.enable_sharing(late) == "not all of its layers attend"


def test_the_check_of_a_model_tries_a_long_window(monkeypatch):
    """A window of more than 1,024 tokens was never tried, because it needs a prompt that is longer."""
    model = unshared(build("Mistral", **SIZE, sliding_window=4000))
    assert grpo.enable_sharing(model) == "" and model.config.sliding_window == 4000
    in_blocks = Packed.in_blocks
    monkeypatch.setattr(Packed, "in_blocks", lambda *a: in_blocks(*a[:6], None, a[7]))  # without the window
    assert "is off by" in grpo.enable_sharing(unshared(model))


def test_a_model_that_shares_prompts_is_copied_and_saved_as_an_ordinary_one(tmp_path):
    """The reference is a copy of the model. A saved model must load in any other program."""
    model = qwen3()
    assert grpo.shares_prompts(copy.deepcopy(model))
    model.save_pretrained(tmp_path)
    assert shared_prompt.SHARED_ATTENTION not in (tmp_path / "config.json").read_text()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    with grpo.plain_attention(model):
        assert torch.equal(model(ids(5)[0][None]).logits, loaded(ids(5)[0][None]).logits)
    assert grpo.shares_prompts(model)
    with pytest.raises(ValueError, match="only inside `with grpo.plain_attention"):
        model(ids(5)[0][None])


def test_the_check_of_a_model_sees_a_padded_prompt(monkeypatch):
    """For models without a window, the check used two prompts of equal length. It could not see wrong padding."""
    model = qwen3()
    assert difference_of(model) == ""
    monkeypatch.setattr(SharedCache, "prompt_mask", lambda self, window: None)
    assert difference_of(model).startswith("the shared rollout is off by")


def test_penalties_in_a_models_own_generation_config_do_not_reach_its_answers():
    """Only the models that decode through transformers read this configuration. grpo.generate never does."""
    model = mamba()
    plain = draw(model, ids(6), max_new_tokens=12)[0].answers
    model.generation_config.repetition_penalty = 5.0
    assert all(map(torch.equal, draw(model, ids(6), max_new_tokens=12)[0].answers, plain))


def test_a_rollout_that_is_interrupted_leaves_the_model_as_it_was(monkeypatch):
    """Otherwise code that catches the exception would generate without the model's settings from then on."""
    model = mamba()
    before = model.generation_config

    def interrupt(*args, **kwargs):
        assert model.generation_config is not before
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "generate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        draw(model, ids(4))
    assert model.generation_config is before


@pytest.mark.parametrize("make", [qwen3, granite, mamba])
def test_the_plain_form_asks_for_logits_of_answers_only(make):
    """The logits of 8 whole rows with their prompts are the first tensors to fill the memory."""
    model, (prompt, *answers), rows = make(), ids(19, 7, 12, 3), []
    model.lm_head.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[:-1].numel()))
    logp, _ = grpo.plain_logprobs(model, prompt, answers, 0.7)
    assert rows == [7 + 12 + 3]
    expected = torch.cat([full_logps(model, prompt, answer, 0.7) for answer in answers])
    torch.testing.assert_close(logp, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [qwen3, mamba, qwen3_next, gemma2, granite, phi3, opt, falcon_h1, llama4])
def test_the_plain_form_has_logits_of_a_few_positions_at_a_time(make, monkeypatch):
    """All of them are [G, R, V] numbers, several times: 40 GB at 8,192 tokens and a vocabulary of 150,000. The models
    cap or scale their logits after the head, or call their layers in a way of their own."""
    model, (prompt, *answers) = unshared(make()).eval(), ids(19, 7, 12, 3)
    expected = value_and_gradient(model, lambda: torch.cat([full_logps(model, prompt, a, 0.7) for a in answers]))
    monkeypatch.setattr(batches, "HEAD_LOGITS", 5 * 37)
    rows, layers = [], []
    model.lm_head.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[:-1].numel()))
    body = getattr(model, shared_prompt.layers_name(model))
    body.register_forward_pre_hook(lambda *_: layers.append(1))
    logp, gradient = value_and_gradient(model, lambda: grpo.plain_logprobs(model, prompt, answers, 0.7)[0])
    assert rows[:5] == [5, 5, 5, 5, 2] and sorted(rows[5:]) == [2, 5, 5, 5, 5]  # forward, then in the backward pass
    assert len(layers) == 1
    torch.testing.assert_close(logp, expected[0], atol=1e-5, rtol=1e-5)
    assert distance(gradient, expected[1]) < 1e-5


def test_the_plain_form_scores_what_it_sampled_a_row_at_a_time(monkeypatch):
    """Otherwise 256 answers would be read at once, which needs more memory than drawing them."""
    model, rows = mamba(), []
    score = grpo.plain_logprobs
    monkeypatch.setattr(grpo, "plain_logprobs", lambda *args: rows.append(len(args[2])) or score(*args))
    r = draw(model, ids(6), answers=5, max_new_tokens=8, sampling=Sampling(0.7))[0]
    assert rows == [1] * 5
    for answer, logp in zip(r.answers, r.logps):
        torch.testing.assert_close(logp, full_logps(model, r.prompt, answer, 0.7), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [qwen3, gpt_oss])
def test_the_last_layer_does_not_attend_where_nobody_reads(make, monkeypatch):
    """Only its output at the prompt's end is used. In six layers, up to a sixth of the attention was wasted."""
    model, (prompt, *answers), rows = make(), ids(11, 4, 6), []
    assert grpo.shares_prompts(model)
    real = shared_prompt.fused_attention
    monkeypatch.setattr(shared_prompt, "fused_attention", lambda q, *rest: rows.append(q.shape[2]) or real(q, *rest))
    layers = model.config.num_hidden_layers
    grpo.packed_logprobs(model, [(prompt, answers)], 1.0)
    assert rows == [11, 3 + 5] * (layers - 1) + [1, 3 + 5]
    rows.clear()
    SharedCache(model, [prompt], [2])
    assert rows == [11] * (layers - 1) + [1]


@pytest.mark.parametrize("make", [qwen3, gpt_oss])
def test_no_mask_of_a_long_answer_is_answer_by_row(make, monkeypatch):
    """There was a mask [R, L + R] for each answer's length, with sinks for each layer too: 16 GB at 32,000 tokens."""
    monkeypatch.setattr(shared_prompt, "QUERY_BLOCK", 8)
    monkeypatch.setattr(shared_prompt, "SHORT_ANSWERS", 4)
    model, (prompt, *answers), masks = make(), ids(11, 7, 48, 3, 9, 2, 33), {}
    assert grpo.shares_prompts(model)
    real = shared_prompt.fused_attention

    def attend(q, k, v, scale, sinks, mask):
        if mask is not None:
            assert mask.shape == (q.shape[2], k.shape[2] + (sinks is not None)) and len(mask) <= 8
            assert mask.stride(0) % 8 == 0 and mask.stride(1) == 1 and mask.storage_offset() % 8 == 0
            masks[mask.untyped_storage().data_ptr()] = mask.untyped_storage().nbytes() // 4
        return real(q, k, v, scale, sinks, mask)

    monkeypatch.setattr(shared_prompt, "fused_attention", attend)
    (logp, gradient), (expected, expected_gradient) = both_forms(model, prompt, answers)
    torch.testing.assert_close(logp, expected, atol=1e-5, rtol=0)
    assert distance(gradient, expected_gradient) < 1e-5
    # a mask for all blocks, and one for blocks behind a window; the length of a row is a multiple of 8
    whole, windowed, short = 8 * (1 + 11 + 48 + 4), 8 * (1 + 6 + 8 + 1), 4 * (1 + 11 + 4)
    assert max(masks.values()) <= whole and sum(masks.values()) <= whole + 2 * windowed + 4 * short


@pytest.mark.parametrize("make", [qwen3, gpt_oss, mistral])
def test_attention_gets_only_shapes_that_a_gpu_is_fast_with(make, monkeypatch):
    """CUDA's fast kernels take multiples of eight numbers a head, and masks whose rows start at such. With 65 numbers,
    one more for the sinks, only the kernel that holds all scores was left. Other masks were copied in each call."""
    model, seen, real = make(), [], torch.nn.functional.scaled_dot_product_attention

    def attend(q, k, v, attn_mask=None, **settings):
        seen.append(attn_mask)
        assert all(x.shape[-1] % 8 == 0 for x in (q, k, v))
        if attn_mask is not None:
            assert attn_mask.stride(0) % 8 == 0 and attn_mask.stride(1) == 1 and attn_mask.storage_offset() % 8 == 0
        return real(q, k, v, attn_mask=attn_mask, **settings)

    monkeypatch.setattr(shared_prompt.F, "scaled_dot_product_attention", attend)
    prompt, *answers = ids(19, 7, 2, 3)
    grpo.packed_logprobs(model, [(prompt, answers)], 0.7)
    assert any(mask is not None for mask in seen)


def test_a_gpus_settings_are_made_before_they_are_needed():
    """cuDNN's attention plans each new shape for 0.4 s. The allocator reads its setting when torch is imported; without
    it, rows of many lengths leave memory in pieces. No GPU measures it here."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    code = """if True:
        import os, sys
        class Watch:
            def find_spec(self, name, *rest):
                if name == "torch":
                    print(os.environ["PYTORCH_CUDA_ALLOC_CONF"], flush=True)
                    os._exit(0)
        sys.meta_path.insert(0, Watch())
        import dust"""
    name, ours = "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"
    for given, seen in ({}, ours), ({name: "backend:native"}, "backend:native"):
        env = {key: value for key, value in os.environ.items() if key != name} | given
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.stdout.strip() == seen, done.stderr


@pytest.mark.parametrize("names", [
    {"rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "dynamic"}}},
    {"rope_parameters": None, "rope_scaling": {"type": "longrope"}}, {"rope_parameters": {"rope_type": "dynamic_ntk"}},
])
def test_positions_that_depend_on_the_longest_row_are_found_wherever_a_config_says_so(names):
    """A config may have a dictionary for each type of layer, or older names. Two short prompts show no difference."""
    model = qwen3()
    assert difference_of(model) == ""
    del model.config.rope_parameters
    model.config.__class__ = type("Other", (type(model.config),), names)
    assert difference_of(model) == "its rotary positions depend on the longest row"


def test_checkpointed_layers_run_again_with_the_same_attention(monkeypatch):
    """If the layers attended in another way the second time, only the gradients would show it."""
    model, checkpointed = qwen3(), qwen3()
    checkpoint_layers(checkpointed)
    rollouts, calls = scored(model), []
    expected, _ = gradients(model, rollouts)
    attend = Packed.attend
    monkeypatch.setattr(Packed, "attend", lambda self, *args: (calls.append(self), attend(self, *args))[1])
    seen, _ = gradients(checkpointed, rollouts)
    assert distance(seen, expected) < 1e-6 and calls.count(calls[-1]) == 2 * 2  # each of two layers twice


def test_a_gpu_gets_larger_blocks_of_logits():
    """Blocks that suit a CPU leave a GPU idle between their many small operations."""
    config = transformers.Qwen3Config(vocab_size=151936)
    rows = [batches.head_rows(SimpleNamespace(device=torch.device(name), config=config)) for name in ("cpu", "cuda:1")]
    assert rows == [2**24 // 151936, 2**26 // 151936]


def test_the_head_sees_answer_positions_only_and_in_blocks(monkeypatch):
    """The logits of a whole row, or of all answers at once, are the first tensors to fill the memory."""
    model, (prompt, *answers) = qwen3(), ids(19, 7, 12, 3)
    whole = value_and_gradient(model, lambda: torch.cat(grpo.answer_logprobs(model, prompt, answers)))
    monkeypatch.setattr(batches, "HEAD_LOGITS", 5 * 37)
    rows = []
    model.lm_head.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    logp, gradient = value_and_gradient(model, lambda: torch.cat(grpo.answer_logprobs(model, prompt, answers)))
    assert rows[:5] == [5, 5, 5, 5, 2] and sorted(rows[5:]) == [2, 5, 5, 5, 5]  # forward, then in the backward pass
    torch.testing.assert_close(logp, whole[0])
    assert distance(gradient, whole[1]) < 1e-6


@pytest.mark.parametrize("form", [grpo.packed_logprobs, lambda m, g, t: grpo.plain_logprobs(m, *g[0], t)])
def test_an_answer_is_not_moved_by_a_longer_sibling(form):
    """A longer sibling adds 50 tokens of padding in the plain form, and 50 tokens to the row in the shared form."""
    model, (prompt, answer, other) = qwen3(), ids(9, 6, 56)

    def first(answers):
        return value_and_gradient(model, lambda: form(model, [(prompt, answers)], 1.0)[0][:6])

    (alone, gradient), (beside, same_gradient) = first([answer]), first([answer, other])
    torch.testing.assert_close(beside, alone, atol=1e-5, rtol=0)
    assert distance(same_gradient, gradient) < 1e-5


# ------------------------------------------------------------------------------------------------------ formulae


def test_advantages_by_hand_and_exact_zeros_for_equal_rewards():
    advantages = grpo.group_advantages(torch.tensor([[0.0, 1.0], [5.0, 7.0], [0.1, 0.1]]), eps=0.0)
    torch.testing.assert_close(advantages, torch.tensor([[-1.0, 1.0], [-1.0, 1.0], [0.0, 0.0]]) * 0.5**0.5)
    assert grpo.group_advantages(torch.full((1, 7), 0.1)).tolist() == [[0.0] * 7]
    assert grpo.group_advantages(torch.tensor([3.0])).tolist() == [0.0]


def test_advantages_follow_a_permutation_within_the_group_and_ignore_other_groups():
    rewards, order = torch.tensor([[0.5, -1.0, 0.25, 1.0], [9.0, 2.0, 4.0, 4.0]]), torch.tensor([2, 0, 3, 1])
    advantages = grpo.group_advantages(rewards)
    torch.testing.assert_close(grpo.group_advantages(rewards[:, order]), advantages[:, order])
    torch.testing.assert_close(grpo.group_advantages(rewards[1]), advantages[1])


@pytest.mark.parametrize("ratio, advantage, dual, loss, slope", [
    # slope: d loss / d log-prob = -A * ratio where the unclipped branch is active, else 0
    (0.5, 1.0, None, -0.5, -0.5), (1.0, 1.0, None, -1.0, -1.0), (1.5, 1.0, None, -1.28, 0.0),
    (12.0, 1.0, 10.0, -1.28, 0.0), (0.5, -1.0, None, 0.8, 0.0), (1.0, -1.0, None, 1.0, 1.0),
    (1.5, -1.0, None, 1.5, 1.5), (12.0, -1.0, None, 12.0, 12.0), (12.0, -1.0, 10.0, 10.0, 0.0),
])
def test_a_clip_on_the_wrong_side_of_a_negative_advantage(ratio, advantage, dual, loss, slope):
    old = torch.tensor([-2.0], dtype=torch.float64)
    logp = (old + torch.tensor(ratio, dtype=torch.float64).log()).requires_grad_()
    value, seen = grpo.policy_loss(
        logp, old, torch.full_like(old, advantage), clip_low=0.2, clip_high=0.28, dual_clip=dual
    )
    (grad,) = torch.autograd.grad(value.sum(), logp)
    assert value.item() == pytest.approx(loss) and grad.item() == pytest.approx(slope)
    assert seen["clip"].item() == (slope == 0.0)


def test_the_reference_pulls_from_both_sides_and_not_where_it_agrees():
    logp = torch.tensor([-1.0, -3.0, -2.0], dtype=torch.float64, requires_grad=True)
    ref = torch.full_like(logp, -2.0)
    loss, seen = grpo.policy_loss(logp, logp.detach(), torch.zeros_like(ref), ref, kl=0.5)
    (grad,) = torch.autograd.grad(loss.sum(), logp)
    torch.testing.assert_close(grad, 0.5 * (1 - (ref - logp.detach()).exp()))
    assert grad[0] > 0 > grad[1] and grad[2] == 0 and seen["ref_kl"][2] == 0 and bool((loss >= 0).all())


# -------------------------------------------------------------------------------------------------------- update


def definition_gradients(model, rollouts, loss, temperature):
    """Return the policy gradient of one mini-batch by its definition, row by row from the model's full logits."""
    model = copy.deepcopy(model)
    terms = []  # per-token -A * logp of every answer; at ratio 1 its gradient is the surrogate's
    for r in rollouts:
        advantages = (r.rewards - r.rewards.mean()) / (r.rewards.std() + 1e-6)
        terms += [-a * full_logps(model, r.prompt, x, temperature) for a, x in zip(advantages, r.answers)]
    value = torch.cat(terms).mean() if loss == "token" else sum(t.mean() for t in terms) / len(terms)
    value.backward()
    return [p.grad for p in model.parameters()]


def test_the_weights_of_tokens_are_means_over_the_whole_mini_batch():
    assert grpo.token_weights([1, 5, 2, 4], "sequence") == pytest.approx([1 / 4, 1 / 20, 1 / 8, 1 / 16])
    assert grpo.token_weights([1, 5, 2, 4], "token") == pytest.approx([1 / 12] * 4)
    with pytest.raises(ValueError, match='"sequence" or "token", not \'mean\''):
        grpo.token_weights([1, 5], "mean")


@pytest.mark.parametrize("loss", ["sequence", "token"])
@pytest.mark.parametrize("tied", [True, False])
def test_padding_and_micro_batches_leave_the_gradient_alone(loss, tied):
    """The whole mini-batch has one denominator, however it is cut: all rows at once, a few, or one at a time."""
    model = qwen3(tie_word_embeddings=tied)
    rollouts = scored(model, temperature=0.7)
    assert len({len(a) for r in rollouts for a in r.answers}) > 1
    expected = definition_gradients(model, rollouts, loss, 0.7)
    for micro_tokens in (10**6, 45, 1):
        seen, metrics = gradients(model, rollouts, loss=loss, temperature=0.7, micro_tokens=micro_tokens)
        assert distance(seen, expected) < 1e-5
        assert metrics["stepped"] == 1 and metrics["tokens"] == sum(len(a) for r in rollouts for a in r.answers)


@pytest.mark.parametrize("shared", [True, False])
def test_no_forward_holds_more_than_micro_tokens(shared):
    """A group larger than the bound must be cut too. Otherwise the answers to one long prompt fill the memory."""
    model, sizes = qwen3(), []
    rollouts = scored(model)
    model = model if shared else unshared(model)
    expected, _ = gradients(model, rollouts)
    for micro_tokens, forwards in ((120, 1), (45, 2), (28, 3)):
        copied = copy.deepcopy(model)
        copied.model.layers[0].register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[:2].numel()))
        seen, _ = gradients(copied, rollouts, micro_tokens=micro_tokens)
        assert distance(seen, expected) < 1e-5
        assert max(sizes) <= micro_tokens and len(sizes) >= forwards * (1 if shared else 2) - (not shared)
        sizes.clear()


def test_a_group_of_equal_rewards_costs_nothing_and_counts_in_the_denominator():
    model = qwen3()
    rollouts = scored(model, rewards=((0.3, 0.3, 0.3), (2.0, -1.0, 0.0)))
    expected = definition_gradients(model, rollouts, "sequence", 1.0)
    seen, metrics = gradients(model, rollouts)
    assert distance(seen, expected) < 1e-5
    assert metrics["zero_variance"] == 0.5 and metrics["tokens"] == sum(len(a) for a in rollouts[1].answers)


def test_no_step_is_made_when_no_group_has_a_gradient():
    """Momentum and weight decay change the weights even if the gradient is zero."""
    model = qwen3()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    assert grpo.update(model, optimizer, scored(model), settings())["stepped"] == 1
    before = copy.deepcopy(model.state_dict())
    equal = scored(model, rewards=((0.1, 0.1, 0.1), (-1.0, -1.0, -1.0)))
    metrics = grpo.update(model, optimizer, equal, settings())
    assert metrics["stepped"] == 0 and metrics["zero_variance"] == 1 and metrics["tokens"] == 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def ppo_by_hand(model, rollouts, order, lr, temperature, low, high, dual):
    """Do plain SGD on the clipped surrogate. The old policy is the one before the first step."""
    examples = {i: list(zip(r.answers, grpo.group_advantages(r.rewards))) for i, r in enumerate(rollouts)}
    frozen = copy.deepcopy(model)
    for chosen in order:
        terms = []
        for i in chosen:
            for answer, advantage in examples[i]:
                logp = full_logps(model, rollouts[i].prompt, answer, temperature)
                ratio = (logp - full_logps(frozen, rollouts[i].prompt, answer, temperature).detach()).exp()
                gain = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + (high or low)) * advantage)
                gain = torch.maximum(gain, advantage * dual) if dual and advantage < 0 else gain
                terms.append(-gain.mean())
        model.zero_grad()
        torch.stack(terms).mean().backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= lr * p.grad


@pytest.mark.parametrize("mini_batch, temperature, low, high, dual", [
    (1, 1.0, 0.2, 0.0, 0.0), (2, 0.7, 0.1, 0.3, 0.0), (16, 0.7, 0.3, 0.1, 1.4),
])
def test_later_steps_compare_with_the_policy_before_the_first(mini_batch, temperature, low, high, dual, recwarn):
    """If the current policy is taken for the old one, the ratio is always 1 and nothing is clipped. A second epoch is a
    later step too. There the gap to the rollout was measured against the changed policy, and gave a false warning."""
    model = qwen3()
    rollouts = scored(model, temperature=temperature)
    frozen, by_hand = copy.deepcopy(model), copy.deepcopy(model)
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    how = dict(temperature=temperature, clip=low, clip_high=high, dual_clip=dual)
    once = grpo.update(model, sgd, rollouts, settings(kl=0.01, **how), reference=frozen)
    assert once["old_kl"] == once["clip_share"] == 0 and once["rollout_gap"] < 1e-5 and once["ref_kl"] < 1e-9
    model.load_state_dict(frozen.state_dict())
    generator = torch.Generator().manual_seed(0)
    many = grpo.update(model, sgd, rollouts, settings(ppo_epochs=3, mini_batch=mini_batch, **how), generator=generator)
    assert many["stepped"] == (6 if mini_batch == 1 else 3) and many["old_kl"] > 1e-4 and many["clip_share"] > 0
    assert many["rollout_gap"] < 1e-5 and not recwarn.list
    generator.manual_seed(0)
    order = [part.tolist() for _ in range(3) for part in torch.randperm(2, generator=generator).split(mini_batch)]
    ppo_by_hand(by_hand, rollouts, order, 0.05, temperature, low, high, dual)
    moves = [[p - q for p, q in zip(m.parameters(), frozen.parameters())] for m in (model, by_hand)]
    assert distance(*moves) < 1e-4


def test_the_reference_pulls_with_the_weight_of_the_setting():
    """If only the metric saw the KL, the policy would leave the reference, and ref_kl would grow all the same."""
    model = qwen3()
    rollouts, reference, by_hand = scored(model, temperature=0.7), copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        reference.model.norm.weight.mul_(1.1)
    terms = []
    for r in rollouts:
        for answer in r.answers:
            to_ref = full_logps(reference, r.prompt, answer, 0.7).detach() - full_logps(by_hand, r.prompt, answer, 0.7)
            terms.append((to_ref.exp() - 1 - to_ref).mean())
    (0.5 * sum(terms) / len(terms)).backward()
    without, _ = gradients(model, rollouts, temperature=0.7)
    seen, metrics = gradients(model, rollouts, reference=reference, temperature=0.7, kl=0.5)
    assert metrics["ref_kl"] > 1e-4
    assert distance([a - b for a, b in zip(seen, without)], [p.grad for p in by_hand.parameters()]) < 1e-4


def test_a_reference_in_training_mode_is_read_without_dropout():
    """With dropout, the KL between a model and a copy of it was 0.27 nats."""
    model = gpt2()
    rollouts, reference = scored(model), copy.deepcopy(model).train()
    _, metrics = gradients(model, rollouts, reference=reference, kl=0.1)
    assert metrics["ref_kl"] < 1e-9


def test_a_pull_towards_no_reference_is_one_clear_line():
    model = qwen3()
    with pytest.raises(ValueError, match="kl > 0 needs reference"):
        gradients(model, scored(model), kl=0.1)


def test_the_norm_of_the_gradient_is_bounded_and_reported_as_it_was(monkeypatch):
    model = qwen3()
    rollouts = scored(model)
    expected, metrics = gradients(model, rollouts)
    assert metrics["grad_norm"] > 0.2
    monkeypatch.setattr(grpo, "MAX_GRADIENT_NORM", 0.1)
    seen, clipped = gradients(model, rollouts)
    assert clipped["grad_norm"] == pytest.approx(metrics["grad_norm"])
    assert distance(seen, [g * 0.1 / metrics["grad_norm"] for g in expected]) < 1e-4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_does_not_reach_the_weights(bad):
    """One NaN would make every weight NaN, then the checkpoint. Momentum would keep it as well."""
    model = qwen3()
    rollouts = scored(model, rewards=((0.0, bad, 0.5), (2.0, -1.0, 0.0)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    alone = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="1 optimiser steps left out") as warned:
        metrics = grpo.update(model, optimizer, rollouts, settings(mini_batch=1))
    assert len(warned) == 1 and (metrics["stepped"], metrics["skipped"]) == (1, 1)
    assert all(torch.tensor(value).isfinite() for value in metrics.values())
    grpo.update(alone, torch.optim.AdamW(alone.parameters(), lr=0.01), rollouts[1:], settings())
    assert distance(list(model.parameters()), list(alone.parameters())) < 1e-6


@pytest.fixture
def eight_threads():
    """With several threads torch may add numbers in parallel, in any order, once there are 32,768 of them."""
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(1)


WIDE = dict(hidden_size=256, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4)
FOUR = dict(num_experts_per_tok=4, initializer_range=0.2, head_dim=32)  # without a choice of how the experts are run


@pytest.mark.parametrize("name, more", [
    ("Qwen3", dict(head_dim=32)), ("Granite", dict(logits_scaling=3.0)),
    ("GPT2", dict(n_embd=256, n_layer=2, n_head=8)),
    ("GptOss", dict(**FOUR, num_local_experts=8, sliding_window=6)),
    ("Qwen3Moe", dict(**FOUR, num_experts=8, moe_intermediate_size=16)),
], ids=lambda x: x if isinstance(x, str) else "")
def test_two_identical_updates_have_the_same_gradients_with_several_threads(name, more, eight_threads):
    """Where a row is read several times (a prompt's end by its answers, a token by its experts), its gradients were
    added in parallel, in any order. Then no run could be repeated."""
    model = build(name, **({} if name == "GPT2" else WIDE) | more)
    prompt, *answers = ids(40, *[24] * 8)
    rollouts = [grpo.Rollout(prompt, answers, [torch.zeros(24)] * 8, [True] * 8, torch.arange(8.0))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these answers were not sampled here
        first, *others = [gradients(model, rollouts)[0] for _ in range(10)]
    assert all(torch.equal(a, b) for seen in others for a, b in zip(seen, first))
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_prompts_end_gets_its_gradients_in_order_in_any_backward_pass(eight_threads):
    """update orders the additions itself. A backward pass that a reader calls has no such help."""
    model, (prompt, *answers) = build("Qwen3", **WIDE, head_dim=32), ids(40, *[24] * 8)
    seen = [value_and_gradient(model, lambda: torch.cat(grpo.answer_logprobs(model, prompt, answers)))[1]
            for _ in range(10)]
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(other, seen[0]))


# ---------------------------------------------------------------------------------------------------- supervised


def cross_entropy_by_hand(model, rollouts, loss):
    """Return value and gradients of torch's cross-entropy on the model's full logits."""
    model.zero_grad()
    terms = []
    for r in rollouts:
        for answer in r.answers:
            with grpo.plain_attention(model):
                logits = model(torch.cat([r.prompt, answer])[None]).logits[0, len(r.prompt) - 1 : -1]
            terms.append(torch.nn.functional.cross_entropy(logits, answer, reduction="none"))
    value = torch.cat(terms).mean() if loss == "token" else sum(t.mean() for t in terms) / len(terms)
    value.backward()
    return value.item(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("loss", ["sequence", "token"])
def test_supervised_learning_is_cross_entropy(loss):
    """If the second step used the old policy, its gradient would be scaled and clipped. A prompt without answers must
    not count, and neither rewards nor log-probs are needed."""
    model, (a, b, c, *answers) = qwen3(), ids(4, 11, 6, 7, 1, 12, 3)
    rollouts = [grpo.Rollout(a, answers[:1], [], []), grpo.Rollout(b, answers[1:], [], []), grpo.Rollout(c, [], [], [])]
    by_hand, optimizer = copy.deepcopy(model), Recorder(model.parameters(), lr=0.3)
    for _ in range(2):
        args = settings(mode="sft", loss=loss, kl=0.1, micro_tokens=25)
        metrics = grpo.update(model, optimizer, rollouts, args)
        value, expected = cross_entropy_by_hand(by_hand, rollouts, loss)
        assert distance(optimizer.seen, expected) < 1e-5 and metrics["loss"] == pytest.approx(value, rel=1e-5)
        assert metrics["clip_share"] == metrics["old_kl"] == 0 and metrics["tokens"] == 7 + 1 + 12 + 3
        with torch.no_grad():
            for p, gradient in zip(by_hand.parameters(), expected):
                p -= 0.3 * gradient
    assert distance(list(model.parameters()), list(by_hand.parameters())) < 1e-5


def test_supervised_epochs_go_on_from_the_policy_as_it_is():
    """Four steps in one call must equal four calls with one step each. Equal rewards leave nothing out."""
    model = qwen3()
    rollouts = scored(model, rewards=((0.3, 0.3, 0.3), (2.0, -1.0, 0.0)))
    apart, sgd = copy.deepcopy(model), torch.optim.SGD(model.parameters(), lr=0.3)
    metrics = grpo.update(model, sgd, rollouts, settings(mode="sft", ppo_epochs=4))
    assert metrics["stepped"] == 4 and metrics["old_kl"] == 0 and metrics["zero_variance"] == 0
    for _ in range(4):
        grpo.update(apart, torch.optim.SGD(apart.parameters(), lr=0.3), rollouts, settings(mode="sft"))
    assert distance(list(model.parameters()), list(apart.parameters())) < 1e-6


def test_dropout_does_not_part_training_from_sampling():
    """With dropout, training and sampling give a token different log-probs. Loading sets dropout to 0; here it is on.
    Only layers with gradient checkpointing may be in training mode, but not the dropout modules inside them."""
    model = gpt2()
    rollouts = scored(model)
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_layers(model)
        model.train()
        _, metrics = gradients(model, rollouts)
        assert metrics["rollout_gap"] < 1e-5


def test_a_rollout_from_other_weights_is_reported():
    model = qwen3()
    rollouts = scored(model)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    with pytest.warns(UserWarning, match="rollout and update disagree"):
        _, metrics = gradients(model, rollouts)
    assert metrics["rollout_gap"] > 0.05


def test_a_token_that_cannot_be_drawn_leaves_the_entropy_a_number():
    """0 * -inf is not a number. Some heads give their padding tokens a logit of -inf."""
    logits = torch.tensor([[0.0, -torch.inf, 1.0, 3.0], [2.0, -1e9, 2.0, -torch.inf]])
    _, entropy = grpo.token_logprobs(lambda x: x, logits, torch.tensor([0, 2]), 0.7)
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits / 0.7).entropy())


def test_entropy_is_that_of_the_distribution_sampled_from():
    model = qwen3()
    r = scored(model, temperature=0.7)[1]
    r.rewards = torch.tensor([1.0, 0.0, 0.5])

    def logits_of(row):
        with grpo.plain_attention(model):
            return model(row[None]).logits[0, 10:-1]

    _, metrics = gradients(model, [r], temperature=0.7)
    entropies = [
        torch.distributions.Categorical(logits=logits_of(torch.cat([r.prompt, a])) / 0.7).entropy() for a in r.answers
    ]
    assert metrics["entropy"] == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-4)
