import pytest
import torch

import dust
import grpo


def test_the_standard_deviation_is_left_out():
    rewards = torch.tensor([[1.0, 0.5, 0.0, 0.5]])
    assert grpo.group_advantages(rewards, scale=False).tolist() == [[0.5, 0.0, -0.5, 0.0]]
    assert grpo.group_advantages(torch.full((1, 8), 0.7), scale=False).eq(0).all()
    assert grpo.group_advantages(rewards)[0, 0] == pytest.approx(0.5 / rewards.std().item(), abs=1e-4)


def test_a_token_weighs_the_same_in_every_answer():
    assert grpo.token_weights([1, 5, 2, 4], "constant", 8) == pytest.approx([1 / (4 * 8)] * 4)


def test_answers_of_the_longest_length_weigh_what_they_did():
    assert grpo.token_weights([5, 5], "constant", 5) == pytest.approx(grpo.token_weights([5, 5], "sequence", 5))


def test_the_two_other_ways_are_what_they_were():
    assert grpo.token_weights([1, 5, 2, 4], "sequence", 8) == pytest.approx([1 / 4, 1 / 20, 1 / 8, 1 / 16])
    assert grpo.token_weights([1, 5, 2, 4], "token", 8) == pytest.approx([1 / 12] * 4)


def small_model():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=12, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    ))


def test_the_update_trains_by_both(monkeypatch):
    """A step's loss, at ratio 1: minus the sum over tokens of weight * advantage."""
    model, rewards, lengths = small_model(), [1.0, 0.5, 0.0, 0.5], [1, 5, 2, 4]
    answers = [torch.ones(n, dtype=torch.long) for n in lengths]
    logps = [torch.zeros(n) for n in lengths]
    rollout = grpo.Rollout(torch.tensor([1]), answers, logps, [True] * 4, torch.tensor(rewards))
    args = dust.parse_args(["--loss", "constant", "--no-scale", "--max-new-tokens", "8", "--kl", "0"])
    with pytest.warns(UserWarning, match="disagree"):  # the log-probs above are made up
        metrics = grpo.update(model, torch.optim.SGD(model.parameters(), lr=0.0), [rollout], args)
    advantages = [0.5, 0.0, -0.5, 0.0]
    expected = -sum(n * a / (4 * 8) for n, a in zip(lengths, advantages))
    assert metrics["loss"] == pytest.approx(expected, rel=1e-4)


def test_the_command_line_knows_both():
    args = dust.parse_args(["--loss", "constant", "--no-scale"])
    assert args.loss == "constant" and args.scale is False and dust.parse_args([]).scale is True
