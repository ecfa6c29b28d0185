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
    assert grpo.token_weights([5, 5, 5], "constant", 5) == pytest.approx(grpo.token_weights([5, 5, 5], "sequence"))


def test_the_two_other_ways_are_what_they_were():
    assert grpo.token_weights([1, 5, 2, 4], "sequence") == pytest.approx([1 / 4, 1 / 20, 1 / 8, 1 / 16])
    assert grpo.token_weights([1, 5, 2, 4], "token") == pytest.approx([1 / 12] * 4)
    with pytest.raises(ValueError):
        grpo.token_weights([1, 5, 2, 4], "mean")


def test_the_update_trains_by_both(monkeypatch):
    """The weights and advantages that update() hands on to backward(), caught there."""
    caught = []
    monkeypatch.setattr(grpo, "backward", lambda model, groups, *_: caught.extend(groups[0]) or {})
    answers = [torch.ones(length, dtype=torch.long) for length in (1, 5, 2, 4)]
    rewards = torch.tensor([1.0, 0.5, 0.0, 0.5])
    rollout = grpo.Rollout(torch.tensor([1]), answers, [torch.zeros(len(a)) for a in answers], [True] * 4, rewards)
    model = torch.nn.Linear(1, 1)
    args = dust.Args(loss="constant", scale=False, max_new_tokens=8, kl=0.0)
    grpo.update(model, torch.optim.SGD(model.parameters(), lr=0.1), [rollout], args)
    assert [example.weight for example in caught] == pytest.approx([1 / (4 * 8)] * 4)
    assert [example.advantage for example in caught] == pytest.approx([0.5, 0.0, -0.5, 0.0])


def test_the_command_line_knows_both():
    args = dust.parse_args(["--loss", "constant", "--no-scale"])
    assert args.loss == "constant" and args.scale is False and dust.parse_args([]).scale is True
