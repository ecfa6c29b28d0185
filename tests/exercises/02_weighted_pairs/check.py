import math
from itertools import permutations, product

import pytest

import dust
import rank_prompt

ORDERS = [list(order) for order in permutations([1, 2, 3, 4])]
MIXED = [labels for labels in product([0, 1], repeat=4) if 0 < sum(labels) < 4]


def reward(ranking, labels) -> float:
    return rank_prompt.REWARDS["weighted"](ranking, labels)


def brute_force(ranking, labels) -> float:
    """The same, from the position of each candidate and a weight for each pair."""
    position = {candidate: place for place, candidate in enumerate(ranking, 1)}
    right = [i for i in position if labels[i - 1]]
    wrong = [i for i in position if not labels[i - 1]]
    weights = {(r, w): 1 / math.log2(1 + min(position[r], position[w])) for r in right for w in wrong}
    return sum(weights[r, w] for r, w in weights if position[r] < position[w]) / sum(weights.values())


@pytest.mark.parametrize("labels", MIXED)
def test_it_is_the_weight_of_the_pairs_in_the_right_order(labels):
    for order in ORDERS:
        assert reward(order, labels) == pytest.approx(brute_force(order, labels))


@pytest.mark.parametrize("labels", MIXED)
def test_a_perfect_order_earns_1_and_its_reverse_0(labels):
    perfect = sorted([1, 2, 3, 4], key=lambda i: -labels[i - 1])
    assert reward(perfect, labels) == pytest.approx(1) and reward(perfect[::-1], labels) == 0


def test_a_mistake_at_the_top_costs_more():
    assert reward([1, 2, 3, 4], [1, 0, 0, 1]) == pytest.approx(0.6388, abs=1e-4)
    assert reward([1, 2, 3, 4], [0, 1, 1, 0]) == pytest.approx(0.3612, abs=1e-4)


def test_numbering_the_candidates_anew_changes_nothing():
    order, labels = [3, 1, 4, 2], [0, 1, 1, 0]
    for shuffle in permutations(range(4)):
        shown = [labels[old] for old in shuffle]
        renamed = [shuffle.index(index - 1) + 1 for index in order]
        assert reward(renamed, shown) == pytest.approx(reward(order, labels))


@pytest.mark.parametrize("right, mean", [(1, 0.448), (2, 0.5), (3, 0.552)])
def test_a_random_order_earns_what_the_task_says(right, mean):
    labels = [1] * right + [0] * (4 - right)
    assert sum(reward(order, labels) for order in ORDERS) / 24 == pytest.approx(mean, abs=5e-4)


def test_a_group_without_a_pair_is_refused_and_a_malformed_answer_pays():
    for labels in ([0, 0], [1, 1]):
        with pytest.raises(ValueError, match="mixed"):
            reward([2, 1], labels)
    assert rank_prompt.score("Ranking: 1, 1", [0, 1], "weighted") == rank_prompt.FORMAT_PENALTY
    assert rank_prompt.score("Ranking: 2, 1", [0, 1], "weighted") == 1


def test_the_command_line_knows_it():
    assert dust.parse_args(["--reward", "weighted"]).reward == "weighted"
