import pytest
import torch

import dust
import grpo

REWARDS = torch.tensor([[1.0, 0.5, 0.0, 0.5], [1.0, 1.0, 1.0, 0.0]])


def test_each_answer_is_compared_with_the_mean_of_the_others():
    advantages = grpo.group_advantages(REWARDS, kind="loo")
    assert torch.allclose(advantages, torch.tensor([[2 / 3, 0, -2 / 3, 0], [1 / 3, 1 / 3, 1 / 3, -1]]), atol=1e-6)
    assert torch.allclose(advantages, 4 / 3 * (REWARDS - REWARDS.mean(-1, keepdim=True)))


def test_equal_rewards_teach_nothing_exactly():
    assert grpo.group_advantages(torch.full((2, 8), 0.7), kind="loo").eq(0).all()


def test_the_default_is_what_it_was():
    centred = REWARDS - REWARDS.mean(-1, keepdim=True)
    assert torch.allclose(grpo.group_advantages(REWARDS), centred / (REWARDS.std(-1, keepdim=True) + 1e-6))


def small_model():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=12, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    ))


def test_the_update_trains_by_them(monkeypatch):
    """The advantages that update() hands to the loss, one for each answer's only token."""
    caught, policy_loss, model = [], grpo.policy_loss, small_model()

    def catch(logp, old_logp, advantages, *more, **settings):
        caught.append(advantages.tolist())
        return policy_loss(logp, old_logp, advantages, *more, **settings)

    monkeypatch.setattr(grpo, "policy_loss", catch)
    token = torch.tensor([1])
    rollout = grpo.Rollout(token, [token] * 4, [torch.zeros(1)] * 4, [True] * 4, REWARDS[0])
    for kind in ("loo", "grpo"):
        args = dust.parse_args(["--advantages", kind, "--kl", "0"])
        grpo.update(model, torch.optim.SGD(model.parameters(), lr=0.0), [rollout], args)
    assert caught[0] == pytest.approx([2 / 3, 0, -2 / 3, 0])
    assert caught[1] == pytest.approx(grpo.group_advantages(REWARDS[0]).tolist())


def test_the_command_line_knows_it():
    assert dust.parse_args([]).advantages == "grpo"
    assert dust.parse_args(["--advantages", "loo"]).advantages == "loo"
