"""Rows by memory: as many answers as fit a GPU, for models whose shapes are real and whose weights are not there."""
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig, Qwen3Config, Qwen3MoeConfig

import dust
import grpo
from plumbing import fast_decode

SHAPES = {
    "Qwen3-4B": Qwen3Config(
        vocab_size=151936, hidden_size=2560, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, intermediate_size=9728, max_position_embeddings=40960, tie_word_embeddings=True),
    "Qwen3-30B": Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
        head_dim=128, intermediate_size=6144, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
        max_position_embeddings=262144),
}
SMALL = dict(vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=64)


def on_meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


@torch.no_grad()
def grow(cache, tokens: int) -> None:
    for _ in range(tokens):
        cache.step(torch.tensor([1, 2, 3, 4]))


@pytest.mark.parametrize("name, gigabytes, weights, rows", [
    ("Qwen3-4B", 24, 8, 10), ("Qwen3-4B", 80, 8, 47), ("Qwen3-4B", 141, 8, 88),
    ("Qwen3-30B", 24, 61, 1),  # the weights do not fit: the least there is
    ("Qwen3-30B", 80, 61, 18), ("Qwen3-30B", 141, 61, 79),
])
def test_rows_follow_the_memory_that_is_free(name, gigabytes, weights, rows):
    """By hand: Qwen3-4B keeps 2 x 36 x 8 x 128 numbers of 2 bytes a token, and a row has 1000 + 8192 tokens."""
    assert fast_decode.rows_that_fit(on_meta(SHAPES[name]), 1000, 8192, (gigabytes - weights) * 1e9) == rows


def test_the_rows_that_are_counted_are_those_that_the_decoder_holds():
    """Both decoders: what they hold at the end of the longest answers must stay within what was counted for it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)).eval()
    prompts, n, tokens = [torch.arange(3, 40), torch.arange(5, 30)], 4, 70
    free = 10 * 2**20
    counted = free * (1 - fast_decode.SPARE) / fast_decode.rows_that_fit(model, 37, tokens, free)  # bytes a row, rounded up
    plain = grpo.PlainCache(model, prompts, [2, 2])
    grow(plain, tokens)
    held = sum(x.nbytes for layer in plain.cache.layers for x in (layer.keys, layer.values))
    assert 0.5 * n * counted < held < n * counted
    assert grpo.enable_sharing(model) == ""
    shared = grpo.SharedCache(model, prompts, [2, 2])
    grow(shared, tokens)
    held = sum(x.nbytes for x in [*shared.prompt.values(), *shared.answer.values(), shared.logits])
    assert 0.5 * n * counted < held < n * counted


def test_rows_are_never_too_many_and_a_model_without_keys_gets_some():
    assert fast_decode.rows_that_fit(on_meta(LlamaConfig(**SMALL)), 10, 10, 1e12) == fast_decode.MOST_ROWS
    mamba = MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=4)
    assert fast_decode.rows_that_fit(on_meta(mamba), 10, 10, 1e6) == fast_decode.MOST_ROWS
    assert fast_decode.rows_that_fit(on_meta(LlamaConfig(**SMALL)), 10, 10, 1) == 1


def test_rows_are_counted_without_what_training_has_switched_on():
    """After an update layers are in training mode. With transformers 5.17 they then keep no keys, and all rows fit."""
    model, modes = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)).train(), []
    model.register_forward_pre_hook(lambda *_: modes.append(any(part.training for part in model.modules())))
    fast_decode.rows_that_fit(model, 10, 10, 1e6)
    assert modes == [False]


def test_the_prompts_keys_are_padded_one_layer_at_a_time(monkeypatch):
    """While those of all layers were there twice, the memory ran out where the count said that they fit."""
    model, padded, real = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)).eval(), [], fast_decode.pad_sequence

    def pad_sequence(keys, first):
        assert not any(before() is not None for before in padded)
        padded.extend(map(weakref.ref, keys))
        return real(keys, first)

    assert grpo.enable_sharing(model) == ""
    monkeypatch.setattr(fast_decode, "pad_sequence", pad_sequence)
    grpo.SharedCache(model, [torch.arange(3, 40), torch.arange(5, 30)], [2, 2])
    assert len(padded) == 2 * 2 * SMALL["num_hidden_layers"]


def test_the_device_is_asked_at_the_start_of_each_stage(monkeypatch):
    """What an optimiser holds must not be charged to the stages before it, and must be to those behind it."""
    class Model:
        device, config = torch.device("cuda"), LlamaConfig(**SMALL)

    free = iter([64e9, 8e9])
    monkeypatch.setattr(dust.models, "room", lambda device: next(free))
    monkeypatch.setattr(fast_decode, "rows_that_fit", lambda model, *asked: asked)
    prompts, args = [torch.zeros(3), torch.zeros(7), torch.zeros(5)], dust.Args(device="cuda", max_new_tokens=64)
    assert [fast_decode.rows_at_a_time(Model, prompts, 64, args) for _ in range(2)] == [(7, 64, 64e9), (7, 64, 8e9)]
    assert fast_decode.rows_at_a_time(Model, prompts, 64, dust.replace(args, rows=5)) == 5
    Model.device = torch.device("cpu")
    assert fast_decode.rows_at_a_time(Model, prompts, 64, args) == 256


def test_when_the_memory_runs_out_the_answers_are_drawn_in_halves_and_are_the_same(monkeypatch):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)).eval()
    prompts, seeds = [torch.tensor([3, 4, 5]), torch.tensor([6, 7])], [[1, 2, 3], [4, 5, 6, 7]]
    how = dict(sampling=grpo.Sampling(), max_new_tokens=9, eos_ids=[2])
    whole, generate, tried = grpo.rollout(model, prompts, seeds, **how), grpo.generate, []

    def with_room_for_two(model, prompts, seeds, *rest):
        tried.append(sum(map(len, seeds)))
        if tried[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(model, prompts, seeds, *rest)

    monkeypatch.setattr(grpo, "generate", with_room_for_two)
    with pytest.warns(UserWarning, match="out of memory with 7 answers at a time: going on with half"):
        halves = grpo.rollout(model, prompts, seeds, **how)
    for one, other in zip(whole, halves):
        assert all(map(torch.equal, one.answers, other.answers)) and one.finished == other.finished
    assert tried == [7, 3, 1, 2, 4, 2, 2]
    monkeypatch.setattr(grpo, "generate", lambda *_: with_room_for_two(model, [], [[1, 2, 3]]))
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning):
        grpo.rollout(model, prompts, seeds, **how)
