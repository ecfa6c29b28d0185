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


def test_the_update_trains_by_them(monkeypatch):
    """The advantages that update() hands on to backward(), caught there."""
    caught = []
    monkeypatch.setattr(grpo, "backward", lambda model, groups, *_: caught.append(groups) or {})
    token = torch.tensor([1])
    rollout = grpo.Rollout(token, [token] * 4, [torch.zeros(1)] * 4, [True] * 4, REWARDS[0])
    model = torch.nn.Linear(1, 1)
    for kind in ("loo", "grpo"):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        grpo.update(model, optimizer, [rollout], dust.Args(advantages=kind, kl=0.0))
    loo, plain = ([example.advantage for example in groups[0]] for groups in caught)
    assert loo == pytest.approx([2 / 3, 0, -2 / 3, 0])
    assert plain == pytest.approx(grpo.group_advantages(REWARDS[0]).tolist())


def test_the_command_line_knows_it():
    assert dust.parse_args([]).advantages == "grpo"
    assert dust.parse_args(["--advantages", "loo"]).advantages == "loo"
