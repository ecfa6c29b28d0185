from itertools import permutations

import pytest

import dust
import rank_prompt


def test_it_is_one_over_the_place_of_the_first_right_one():
    reward = rank_prompt.REWARDS["rr"]
    for ranking, value in (([1, 2, 3, 4], 1), ([2, 1, 3, 4], 1 / 2), ([2, 4, 1, 3], 1 / 3), ([4, 3, 2, 1], 1 / 4)):
        assert reward(ranking, [1, 0, 0, 0]) == pytest.approx(value)
    assert reward([2, 3, 4, 1], [1, 0, 1, 0]) == pytest.approx(1 / 2)
    assert reward([2, 1], [0, 0]) == 0


def test_a_random_order_earns_what_the_task_says():
    orders = list(permutations([1, 2, 3, 4]))
    assert sum(rank_prompt.score(f"Ranking: {str(list(o))[1:-1]}", [0, 1, 0, 0], "rr") for o in orders) / 24 == \
        pytest.approx(0.5208, abs=1e-4)


def test_the_command_line_knows_it():
    assert dust.parse_args(["--reward", "rr"]).reward == "rr"
