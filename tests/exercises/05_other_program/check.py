import pytest
import torch

import dust
import grpo

OURS = torch.tensor([0.70, 0.20, 0.08, 0.02]).log()
THEIRS = torch.tensor([0.50, 0.20, 0.02, 0.28]).log()  # the ratios are 1.4, 1, 4 and 1/14


def test_cut_has_a_limit_upwards_and_none_downwards():
    weights, cut = grpo.importance_weights(OURS, THEIRS, 2.0)
    assert weights.tolist() == pytest.approx([1.4, 1.0, 2.0, 1 / 14], abs=1e-5) and cut.tolist() == [0, 0, 1, 0]


def test_mask_leaves_out_what_is_too_far_in_either_direction():
    weights, masked = grpo.importance_weights(OURS, THEIRS, 2.0, "mask")
    assert weights.tolist() == pytest.approx([1.4, 1.0, 0.0, 0.0], abs=1e-5) and masked.tolist() == [0, 0, 1, 1]
    weights, masked = grpo.importance_weights(OURS, THEIRS, 20.0, kind="mask")
    assert weights.tolist() == pytest.approx([1.4, 1.0, 4.0, 1 / 14], abs=1e-4) and not masked.any()


@pytest.mark.parametrize("kind", ["cut", "mask"])
def test_without_a_limit_the_mean_is_that_of_our_own_model(kind):
    """The mean over the server's draws, each with its weight. A clip from below would pull it towards the server's."""
    values = torch.tensor([1.0, -2.0, 3.0, 5.0])
    weights, _ = grpo.importance_weights(OURS, THEIRS, 1e6, kind)
    assert float((THEIRS.exp() * weights * values).sum()) == pytest.approx(float((OURS.exp() * values).sum()), abs=1e-5)


def test_no_gradient_goes_through_the_weights():
    logp = OURS.clone().requires_grad_()
    for kind in ("cut", "mask"):
        assert not grpo.importance_weights(logp, THEIRS, 2.0, kind)[0].requires_grad


def test_the_update_trains_by_them(monkeypatch):
    """The kind that backward() hands on, caught there."""
    kinds, weights_of = [], grpo.importance_weights

    def spy(logp, sampled_logp, limit, kind="cut"):
        kinds.append(kind)
        return weights_of(logp, sampled_logp, limit, kind)

    def logprobs(model, groups, temperature):
        answers = [answer for _, its_answers in groups for answer in its_answers]
        values = model.weight.sum() * torch.ones(sum(map(len, answers)))
        return values, values.detach()

    monkeypatch.setattr(grpo, "importance_weights", spy)
    monkeypatch.setattr(grpo, "logprobs", logprobs)
    monkeypatch.setattr(grpo, "shares_prompts", lambda model: True)
    monkeypatch.setattr(grpo, "positions_follow_longest_row", lambda model: False)
    token = torch.tensor([1])
    rollout = grpo.Rollout(token, [token] * 2, [torch.zeros(1)] * 2, [True] * 2, torch.tensor([1.0, 0.0]))
    for kind in ("cut", "mask"):
        model = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(model.weight, 0.5)  # far enough from the log-prob 0 of the server's
        args = dust.Args(is_kind=kind, kl=0.0, server_rollouts=True)
        with pytest.warns(UserWarning, match="disagree"):
            grpo.update(model, torch.optim.SGD(model.parameters(), lr=0.1), [rollout], args)
    assert kinds == ["cut", "mask"]


def test_the_command_line_knows_it():
    assert dust.parse_args([]).is_kind == "cut"
    assert dust.parse_args(["--is-kind", "mask"]).is_kind == "mask"
