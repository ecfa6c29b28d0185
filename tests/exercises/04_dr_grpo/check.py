import inspect
from types import SimpleNamespace

import pytest
import torch

import dust
import grpo


def test_the_standard_deviation_is_left_out():
    rewards = torch.tensor([[1.0, 0.5, 0.0, 0.5]])
    assert grpo.group_advantages(rewards, scale=False).tolist() == [[0.5, 0.0, -0.5, 0.0]]
    assert grpo.group_advantages(torch.full((1, 8), 0.7), scale=False).eq(0).all()
    assert grpo.group_advantages(rewards)[0, 0] == pytest.approx(0.5 / rewards.std().item(), abs=1e-4)


def weights(monkeypatch, lengths, **settings) -> list:
    """The weight of a token of each answer, as update() gives it to backward()."""
    caught = []

    def backward(model, groups, token_weight, *_, **__):
        caught.extend(token_weight(SimpleNamespace(answer=torch.zeros(n))) for n in lengths)
        return {"loss": 0.0}

    monkeypatch.setattr(grpo, "backward", backward)
    monkeypatch.setattr(grpo, "averages", lambda totals, norms: {})
    answers = [torch.ones(n, dtype=torch.long) for n in lengths]
    rewards = torch.arange(len(lengths)).float()
    rollout = grpo.Rollout(torch.tensor([1]), answers, [torch.zeros(n) for n in lengths], [True] * 4, rewards)
    model = torch.nn.Linear(1, 1)
    grpo.update(model, torch.optim.SGD(model.parameters(), lr=0.1), [rollout], **settings)
    return caught


def test_a_token_weighs_the_same_in_every_answer(monkeypatch):
    own = weights(monkeypatch, [1, 5, 2, 4], aggregation="constant", longest=8, scale=False)
    assert own == pytest.approx([1 / (4 * 8)] * 4)


def test_answers_of_the_longest_length_weigh_what_they_did(monkeypatch):
    constant = weights(monkeypatch, [5, 5, 5, 5], aggregation="constant", longest=5)
    assert constant == pytest.approx(weights(monkeypatch, [5, 5, 5, 5]))


def test_the_two_other_ways_are_what_they_were(monkeypatch):
    assert weights(monkeypatch, [1, 5, 2, 4]) == pytest.approx([1 / 4, 1 / 20, 1 / 8, 1 / 16])
    assert weights(monkeypatch, [1, 5, 2, 4], aggregation="token") == pytest.approx([1 / 12] * 4)


def test_the_command_line_knows_both():
    args = dust.parse_args(["--loss", "constant", "--no-scale"])
    assert args.loss == "constant" and args.scale is False and dust.parse_args([]).scale is True
    source = inspect.getsource(dust.train)
    assert "scale=args.scale" in source and "longest=args.max_new_tokens" in source
