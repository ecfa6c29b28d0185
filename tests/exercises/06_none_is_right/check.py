import pytest

import dust
import rank_prompt
from plumbing.problems import Problem

PROBLEM = Problem("p", "?", [])


def group(*labels) -> list:
    return [dust.Candidate("p", "", f"print({i})", correct=bool(y)) for i, y in enumerate(labels)]


def test_the_reader_tells_none_from_malformed():
    read = rank_prompt.ranking_or_none
    assert read("<think>\nall off\n</think>\n\nRanking: none", 4) == []
    assert read("Ranking: 2, 1", 2) == [2, 1]
    for answer in ("", "none", "Ranking: 2, 2", "Ranking: none, 1", "Ranking: none\nor so", "<think>\nRanking: none"):
        assert read(answer, 2) is None, answer


@pytest.mark.parametrize("answer, labels, reward", [
    ("Ranking: none", [0, 0, 0], 1), ("Ranking: none", [0, 1, 0], 0), ("Ranking: 1, 2, 3", [0, 0, 0], 0),
    ("Ranking: 2, 1, 3", [0, 1, 0], 1), ("Ranking: 1, 3, 2", [0, 1, 0], 0), ("Ranking: 1, 2, 3", [0, 1, 0], 0.5),
    ("Ranking: 1", [0, 0, 0], -1),
])
def test_what_it_earns(answer, labels, reward):
    assert rank_prompt.score(answer, labels, "or-none") == reward


def test_the_other_rewards_are_what_they_were():
    assert rank_prompt.parse_ranking("Ranking: none", 4) is None
    for reward in ("pairacc", "ndcg", "selection"):
        assert rank_prompt.score("Ranking: none", [0, 1], reward) == rank_prompt.FORMAT_PENALTY
        assert rank_prompt.score("Ranking: 2, 1", [0, 1], reward) == 1


def test_the_constant_answer_can_be_scored_in_every_group():
    assert rank_prompt.REWARDS["or-none"]([1, 2], [0, 0]) == 0 and rank_prompt.REWARDS["or-none"]([1, 2], [1, 0]) == 1


def test_groups_without_a_right_one_are_kept_on_request():
    wrong, mixed, right = group(0, 0), group(1, 0), group(1, 1)
    kept = dust.make_groups([PROBLEM], wrong + mixed + right, 2, wrong_too=True)
    assert [g.labels for g in kept] == [[0, 0], [1, 0]]
    assert [g.labels for g in dust.make_groups([PROBLEM], wrong + mixed + right, 2)] == [[1, 0]]


def test_a_run_with_this_reward_trains_on_them(monkeypatch, tmp_path):
    drawn = group(0, 0) + group(1, 0) + group(1, 1)
    for name, does in (("sample", lambda *_: drawn), ("label", lambda *_: None), ("fitting_groups", lambda *its: its[2])):
        monkeypatch.setattr(dust, name, does)
    for reward, kept in (("or-none", [[0, 0], [1, 0]]), ("pairacc", [[1, 0]])):
        args = dust.Args(group_size=2, reward=reward)
        assert [g.labels for g in dust.training_groups(None, None, [PROBLEM], args, tmp_path)] == kept


def test_the_command_line_knows_it():
    assert dust.parse_args(["--reward", "or-none"]).reward == "or-none"
