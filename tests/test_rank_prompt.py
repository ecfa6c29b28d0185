"""Test the prompts, the readers and the rewards: against brute force, and on answers that fooled other parsers."""
import math
import re
from itertools import permutations, product

import pytest

from rank_prompt import (
    FORMAT_PENALTY, after_thinking, extract_code, generation_prompt, ndcg, pair_accuracy, parse_ranking, random_ndcg,
    ranking_prompt, score, selection,
)

ORDERS = [list(order) for order in permutations(range(1, 5))]
MIXED = [labels for labels in product([0, 1], repeat=4) if 0 < sum(labels) < 4]


# ------------------------------------------------------------------------------------------------------- the rewards


@pytest.mark.parametrize("labels", MIXED)
def test_pair_accuracy_is_the_share_of_pairs_in_the_right_order(labels):
    for order in ORDERS:
        place = {index: order.index(index) for index in range(1, 5)}
        good = [i for i in range(1, 5) if labels[i - 1]]
        bad = [i for i in range(1, 5) if not labels[i - 1]]
        wins = sum(place[g] < place[b] for g in good for b in bad)
        assert pair_accuracy(order, labels) == pytest.approx(wins / (len(good) * len(bad)))


@pytest.mark.parametrize("labels", MIXED)
def test_ndcg_is_dcg_over_the_best_dcg_of_all_orders(labels):
    def dcg(order):
        return sum(labels[index - 1] / math.log2(place + 2) for place, index in enumerate(order))

    best = max(dcg(order) for order in ORDERS)
    for order in ORDERS:
        assert ndcg(order, labels) == pytest.approx(dcg(order) / best)


@pytest.mark.parametrize("labels", MIXED)
def test_random_ndcg_is_the_mean_over_all_orders(labels):
    assert random_ndcg(labels) == pytest.approx(sum(ndcg(order, labels) for order in ORDERS) / len(ORDERS))


def test_random_ndcg_gives_the_three_values_of_a_group_of_four():
    values = [round(100 * random_ndcg([1] * n + [0] * (4 - n)), 1) for n in (1, 2, 3)]
    assert values == [64.0, 78.5, 90.2]


def test_selection_looks_at_the_top_one_only():
    for order, labels in product(ORDERS, MIXED):
        assert selection(order, labels) == labels[order[0] - 1]


@pytest.mark.parametrize("reward", [pair_accuracy, ndcg, selection])
def test_relabelling_under_a_shuffle_changes_no_reward(reward):
    """A reward that looks at indices instead of candidates passes every test on groups that are not shuffled."""
    order, labels = [3, 1, 4, 2], [0, 1, 1, 0]
    for shuffle in permutations(range(4)):
        shown = [labels[old] for old in shuffle]
        renamed = [shuffle.index(index - 1) + 1 for index in order]
        assert reward(renamed, shown) == reward(order, labels)


def test_a_group_that_is_not_mixed_earns_no_made_up_reward():
    assert ndcg([2, 1], [0, 0]) == 0.0
    assert ndcg([2, 1], [1, 1]) == 1.0
    for labels in ([0, 0, 0], [1, 1, 1]):
        with pytest.raises(ValueError, match="mixed"):
            pair_accuracy([1, 2, 3], labels)


def test_malformed_answers_get_the_penalty_and_others_their_reward():
    assert score("Ranking: 2, 1", [0, 1]) == 1.0
    assert score("Ranking: 1, 2", [0, 1]) == 0.0
    assert score("Ranking: 1, 1", [0, 1]) == FORMAT_PENALTY == -1.0
    assert score("Ranking: 1, 2, 3, 4", [0, 1, 1, 0], "ndcg") == pytest.approx(ndcg([1, 2, 3, 4], [0, 1, 1, 0]))
    assert score("Ranking: 2, 1, 3, 4", [0, 1, 1, 0], "selection") == 1.0


# ------------------------------------------------------------------------------------------------------- the readers

PARSED = {
    "Ranking: 2, 4, 1, 3": [2, 4, 1, 3],
    "Some words.\n\nRanking: 2,4,1,3\n": [2, 4, 1, 3],
    "**Ranking: 2, 4, 1, 3**": [2, 4, 1, 3],
    "**Ranking:** 2, 4, 1, 3.": [2, 4, 1, 3],
    "**Ranking**: 2, 4, 1, 3": [2, 4, 1, 3],
    "_Ranking: 2, 4, 1, 3_": [2, 4, 1, 3],
    "Ranking: `2, 4, 1, 3`": [2, 4, 1, 3],
    "My ranking:\n```\n2, 4, 1, 3\n```": [2, 4, 1, 3],
    "2, 4, 1, 3": [2, 4, 1, 3],  # the paper's own form, without words
    "<think>\n1, 2, 3, 4\n</think>\n\n**2, 4, 1, 3**": [2, 4, 1, 3],
    "<think>\n3 is best. Ranking: 3, 1, 2, 4\n</think>\n\nRanking: 2, 4, 1, 3": [2, 4, 1, 3],
    "thought without an opening mark</think>Ranking: 2, 4, 1, 3": [2, 4, 1, 3],
    "Ranking: 1, 2, 3, 4\nNo, wait.\nRanking: 2, 4, 1, 3": [2, 4, 1, 3],
    # the first four numbers are not the ranking
    "Candidate 1 fails on n=2 but 3 and 4 are fine. Ranking: 4, 3, 2, 1": [4, 3, 2, 1],
    "Candidate 1 fails on n=2 but 3 and 4 are fine.\nRanking: 4, 3, 2, 1": [4, 3, 2, 1],
}
MALFORMED = [
    "",
    "   \n",
    "2, 4, 1, 3, 5",
    "Best first: 2, 4, 1, 3",
    "2, 4, 1, 3\nis my ranking",
    "- 2, 4, 1, 3",
    "2 4 1 3",
    "<think>2, 4, 1, 3</think>",
    "1, 1, 2, 3, 4",
    "Ranking: 1, 1, 2, 3, 4",
    "Ranking: 1, 1, 2, 3",
    "Ranking: 1, 2, 3",
    "Ranking: 1, 2, 3, 5",
    "Ranking: 0, 1, 2, 3",
    "Ranking: 1, 2, 3, 4, 5",
    "Ranking: 1 2 3 4",
    "Ranking: 2 > 4 > 1 > 3",
    "Ranking: -1, 2, 3, 4",
    "Ranking: 1, 2, 3, " + "4" * 5000,
    "9" * 5000 + " 1 2 3 4",
    "Ranking: 7, 2, 4, 0, 1, 3",
    "Ranking: 12, 3, 4, 1, 2",
    "Ranking: 1, 2, 3, 4\nbecause 1 is best",
    "Ranking: 1, 2, 3, 4, and 3 is doubtful",
    "<think>1,2,3,4",
    "<think>Ranking: 1, 2, 3, 4",
    "Ranking: 1, 2, 3, 4<think>",
    "<think>a</think> <think>Ranking: 1, 2, 3, 4",
    "<think>Ranking: 1, 2, 3, 4</think>",
    "Ranking: <best>, ..., <worst>",
]


@pytest.mark.parametrize("answer", PARSED)
def test_a_ranking_is_read_from_the_last_line(answer):
    assert parse_ranking(answer, 4) == PARSED[answer]


@pytest.mark.parametrize("answer", MALFORMED, ids=lambda answer: repr(answer[:40]))
def test_a_malformed_ranking_is_none_and_never_half_read(answer):
    assert parse_ranking(answer, 4) is None


def test_every_order_of_every_k_is_read_back():
    for k in (2, 3, 5):
        for order in permutations(range(1, k + 1)):
            assert parse_ranking(f"Ranking: {', '.join(map(str, order))}", k) == list(order)
    assert parse_ranking("Ranking: 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1", 12) == list(range(12, 0, -1))


def test_the_thinking_part_is_cut_off_and_an_open_one_is_refused():
    assert after_thinking("a<think>b</think>c") == "c"
    assert after_thinking("c") == "c"
    assert after_thinking("<think>b") is None
    assert after_thinking("<think>b</think>c<think>d") is None


def test_the_last_fenced_block_after_the_thinking_part_is_the_program():
    assert extract_code("```python\na = 1\n```") == "a = 1"
    assert extract_code("```\na = 1\nb = 2\n```\nthat is it") == "a = 1\nb = 2"
    assert extract_code("first\n```python\na\n```\nbetter:\n```py\nb\n```\n") == "b"
    assert extract_code("```Python3\na\n```\nrun it:\n```sh\npython a.py\n```\nit prints\n```\n6\n```") == "a"
    assert extract_code("```\na\n```\nor better\n```\nb\n```") == "b"
    assert extract_code("```{.python}\na\n```\nit prints\n```pycon\n>>> a\n```\n```pytb\nx\n```") == "a"
    assert extract_code("<think>```python\na\n```</think>\n```python\nb\n```") == "b"
    assert extract_code("```python\n    indented()\n```") == "    indented()"


@pytest.mark.parametrize(
    "answer",
    ["", "a = 1", "<think>```python\na\n```", "<think>```python\na\n```</think>nothing", "```python\n\n```",
     "```python\na = 1", "```python\na\n```\n```python\nb = "],
)
def test_an_empty_or_cut_off_program_is_not_extracted(answer):
    assert extract_code(answer) is None


# ------------------------------------------------------------------------------------------------------- the prompts


def test_the_prompts_carry_everything_that_is_needed():
    prompt = ranking_prompt("Add two numbers.", ["A()", "B()", "C()"])
    places = [prompt.index(part) for part in ("Add two", "Candidate 1:", "A()", "Candidate 2:", "B()", "Candidate 3:", "C()")]
    assert places == sorted(places) and "3 candidate" in prompt
    assert "class Solution:" in generation_prompt("Q?", "class Solution:\n    def f(self): ")


STDIN = ("Q?\n\nWrite a Python program that reads from standard input and prints the answer. "
         "Put it in one ```python block.")


@pytest.mark.parametrize("tests, task", [
    ([{"fn_name": "add", "args": [1], "expected": 1}] * 2, "defines the function add"),
    ([{"asserts": "assert add(1)", "entry_point": "add"}], "defines the function add"),
    ([{"asserts": "assert add(1)", "entry_point": ""}], "defines the function that is asked for"),
    ([{"fn_name": "put", "args": [], "expected": 1}, {"fn_name": "get", "args": [], "expected": 1}],
     "defines the function put and defines the function get"),
    ([{"fn_name": "add", "args": [1], "expected": 1}, {"input": "", "output": ""}],
     "defines the function add and reads from standard input and prints the answer"),
    ([{"input": "", "output": ""}] * 2, "reads from standard input and prints the answer"),
])
def test_the_prompt_asks_for_what_the_tests_call(tests, task):
    """A problem that asks for a function ended with "a program that reads from standard input": models did that."""
    prompt = f"Q?\n\nWrite a Python program that {task}. Put it in one ```python block."
    assert generation_prompt("Q?", "", tests) == generation_prompt("Q?", " \n", tests) == prompt
    assert generation_prompt("Q?", "def add(x):", tests) == generation_prompt("Q?", "def add(x):")


def test_the_prompt_of_stdin_problems_is_the_one_that_the_shipped_model_knows():
    assert generation_prompt("Q?") == generation_prompt("Q?", "", [{"input": "", "output": ""}]) == STDIN


def test_the_model_is_shown_the_prompt_that_follows_the_tests(monkeypatch):
    import dust
    from plumbing.problems import Problem

    monkeypatch.setattr(dust.models, "encode", lambda tokenizer, prompt, *options: prompt)
    problem = Problem("p", "Q?", [{"fn_name": "add", "args": [1], "expected": 1}])
    assert "the function add" in dust.program_ids(None, problem, dust.Args())


def test_the_prompt_itself_holds_no_ranking_that_could_be_copied():
    """From an example such as "Ranking: 2, 4, 1, 3" in the prompt, a weak model learns to copy that order."""
    for brief in (False, True):
        prompt = ranking_prompt("Q", ["a", "b", "c", "d"], brief)
        assert not re.search(r"[0-9][ ]*,[ ]*[0-9]", prompt) and parse_ranking(prompt, 4) is None
