from itertools import permutations, product

import pytest

import dust
import rank_prompt


def test_with_binary_labels_it_is_pair_accuracy():
    for labels in product([0, 1], repeat=4):
        if 0 < sum(labels) < 4:
            for order in permutations([1, 2, 3, 4]):
                assert rank_prompt.REWARDS["margin"](order, labels) == rank_prompt.pair_accuracy(order, labels)


def test_a_pair_weighs_by_its_difference():
    reward, labels = rank_prompt.REWARDS["margin"], [1.0, 0.9, 0.0]  # differences 0.1, 1.0 and 0.9
    assert reward([1, 2, 3], labels) == pytest.approx(1)
    assert reward([2, 1, 3], labels) == pytest.approx(1.9 / 2)
    assert reward([1, 3, 2], labels) == pytest.approx(1.1 / 2)
    assert reward([3, 2, 1], labels) == pytest.approx(0)


def test_a_random_order_earns_a_half():
    rewards = [rank_prompt.REWARDS["margin"](order, [1.0, 0.3, 0.3, 0.8]) for order in permutations([1, 2, 3, 4])]
    assert sum(rewards) / len(rewards) == pytest.approx(0.5)


def test_a_group_without_a_pair_is_refused():
    with pytest.raises(ValueError, match="mixed"):
        rank_prompt.REWARDS["margin"]([2, 1], [0.5, 0.5])


def test_the_command_line_knows_it():
    assert dust.parse_args(["--reward", "margin", "--labels", "fractional"]).reward == "margin"
