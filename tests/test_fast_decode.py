"""Test that the fast decoder gives the results of the plain decoder of grpo.py, on tiny random models."""
import os
import sys

import pytest
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import grpo
from grpo import Sampling
from plumbing import fast_decode
from plumbing.fast_decode import SharedCache
from test_grpo import EOS, deepseek, draw, gpt2, gpt_oss, ids, llama, mistral, qwen3, qwen3_moe, unshared

torch.set_num_threads(1)
FAMILIES = [qwen3, qwen3_moe, llama, gpt_oss, mistral, deepseek, gpt2]
SAMPLINGS = [Sampling(), Sampling(0.6, 0.9, 8), Sampling(0.0)]


def compare(fast, plain):
    """Assert that the rollouts of two decoders have the same tokens, and the same log-probs up to rounding."""
    for a, b in zip(fast, plain):
        assert [x.tolist() for x in a.answers] == [x.tolist() for x in b.answers] and a.finished == b.finished
        torch.testing.assert_close(a.logps, b.logps, atol=2e-5, rtol=0)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("make", FAMILIES)
def test_the_fast_decoder_draws_what_the_plain_one_draws(make, sampling):
    """The cases: prompts shorter and longer than the window, rows and whole prompts that end early, and answers that
    are longer than the first buffer of their keys."""
    prompts = ids(4, 19, 1, 11, 6)
    # with this seed no draw is so close to the border between two tokens that rounding decides
    how = dict(answers=4, seed=1, sampling=sampling, max_new_tokens=70, eos_ids=[EOS, 8])
    model = make()
    assert grpo.shares_prompts(model)  # else enable_sharing has found the bug, and the plain decoder would draw twice
    fast, plain = draw(model, prompts, **how), draw(unshared(make()), prompts, **how)
    compare(fast, plain)
    if sampling.temperature == 1:
        assert len({len(answer) for r in fast for answer in r.answers}) > 5


def test_each_decoder_is_the_one_that_the_test_above_means(monkeypatch):
    """If both runs used the same decoder, they would agree in any case, and the test above would show nothing."""
    fast, plain, made = qwen3(), unshared(qwen3()), []
    for name in ("SharedCache", "PlainCache"):
        monkeypatch.setattr(grpo, name, lambda *a, name=name, real=getattr(grpo, name): made.append(name) or real(*a))
    draw(fast, ids(4))
    draw(plain, ids(4))
    assert made == ["SharedCache", "PlainCache"]


def test_prompts_with_unequal_numbers_of_answers():
    """Some places of a prompt then stay empty. The numbers in them must not reach the answer of any row."""
    model, prompts = qwen3(), ids(5, 3, 9)
    seeds = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    how = dict(max_new_tokens=30, eos_ids=[EOS, 8])
    compare(grpo.rollout(model, prompts, seeds, **how), grpo.rollout(unshared(qwen3()), prompts, seeds, **how))


def test_the_prefill_in_parts_is_the_same(monkeypatch):
    """A batch with too many prompt tokens for one forward pass is cut into parts. Their keys must stay in order."""
    model, prompts, sizes = gpt_oss(), ids(5, 3, 9, 4), []
    whole = draw(model, prompts, max_new_tokens=12)
    monkeypatch.setattr(fast_decode, "PREFILL_TOKENS", 9)
    model.model.layers[0].register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[1]))
    compare(draw(model, prompts, max_new_tokens=12), whole)
    assert sizes[:4] == [3 + 4, 5, 9, 1]  # then a token of each row


def test_a_prompts_keys_are_held_once_and_only_while_they_are_needed():
    """With a copy of the keys for each answer, these copies would take most of a rollout's memory."""
    model = qwen3()
    with torch.inference_mode():
        cache = SharedCache(model, ids(7, 5), [3, 2])
        assert {x.shape for x in cache.prompt.values()} == {(2, 2, 7, 8)} and len(cache.prompt) == 4
        cache.step(torch.tensor([6, 7, 8, 9, 10]))
        assert {x.shape for x in cache.answer.values()} == {(2, 5, 32, 8)}
        cache.keep(torch.tensor([3]))
    assert {x.shape for x in cache.prompt.values()} == {(2, 1, 7, 8)} and cache.length.tolist() == [5]
    assert {x.shape for x in cache.answer.values()} == {(2, 1, 32, 8)} and cache.logits.shape == (1, 37)
