"""The two prompts, how answers are read, and what a ranking earns: the text side of DuST, without model or tensors.

    paper 2.2  generation_prompt asks for a program, extract_code reads it
    paper 2.3  ranking_prompt asks for a ranking, parse_ranking reads it
    paper 2.3  pair_accuracy (the default), ndcg and selection are the three rewards; score is the reward of one answer
    paper 3.1  random_ndcg is the NDCG of a random order, to compare an NDCG with

Every function depends on its arguments only, so each can be tried by hand. An answer's thinking part stands between
<think> and </think>. If a model marks it in another way, plumbing/models.py first rewrites the answer into this form.

The readers are strict on purpose. A lenient reader that takes the first K numbers of "Candidate 1 fails on n=2 but 3
and 4 are fine. Ranking: 4, 3, 2, 1" gets 1, 2, 3, 4. Training would then reward a ranking that the model did not give.
"""
import math
import re

FORMAT_PENALTY = -1.0  # R_fmt in paper 2.3: an index is wrong, repeated or missing, or there is no ranking

# ---------------------------------------------------------------------------------------------------- the two prompts


def generation_prompt(question: str, starter_code: str = "", tests: list[dict] | None = None) -> str:
    """Return the user message that asks for a program (paper 2.2).

    starter_code: code that the program has to complete. Without it, the tests say what the program has to do: define
    the functions that they call, or read stdin and print. Without tests it reads stdin, too.
    """
    if starter_code.strip():
        return (
            f"{question}\n\nComplete this Python code and put the whole program in one ```python block:\n"
            f"```python\n{starter_code.strip()}\n```"
        )
    tasks = " and ".join(dict.fromkeys(task_of(test) for test in tests or [{}]))
    return f"{question}\n\nWrite a Python program that {tasks}. Put it in one ```python block."


def task_of(test: dict) -> str:
    """Return what a program has to do for a test, in words that follow "a program that"."""
    if "fn_name" in test or "asserts" in test:
        return f"defines the function {test.get('fn_name') or test.get('entry_point') or 'that is asked for'}"
    return "reads from standard input and prints the answer"


def ranking_prompt(question: str, codes: list[str], brief: bool = False) -> str:
    """Return the user message that asks for a ranking of K programs (paper 2.3), numbered from 1 in the given order.

    brief: ask for the ranking and nothing else, as the paper asks models that do not think (appendix C).

    Shuffle the candidates before each call. A judge that always sees them in the same order can learn the positions
    instead of the programs.
    """
    candidates = "\n\n".join(f"Candidate {i}:\n```python\n{code}\n```" for i, code in enumerate(codes, 1))
    return (
        f"{question}\n\nBelow are {len(codes)} candidate programs. Some may be wrong.\n\n{candidates}\n\n"
        "Order them from the most to the least likely to be correct, each number once. "
        f"{'Answer only with' if brief else 'End with'} a line of this form:\nRanking: <best>, ..., <worst>"
    )


# --------------------------------------------------------------------------------------------------- the two readers


def after_thinking(answer: str) -> str | None:
    """Return the text after the thinking part, or the whole answer if it has no thinking part.

    Returns None if a thinking part is opened and not closed, for example because the answer was cut off. Some chat
    templates open the thinking part inside the prompt. In that case, put "<think>" in front of the answer first.
    """
    before, closed, rest = answer.rpartition("</think>")
    if "<think>" in rest:
        return None
    return rest if closed else answer


def extract_code(answer: str) -> str | None:
    """Return the program in an answer (paper 2.2): the last fenced block after the thinking part that is marked as
    Python. If none is marked so, it is the last block of all.

    Returns None if there is no such block, if it is empty, or if a block was cut off before its closing fence.
    """
    rest = after_thinking(answer)
    if rest is None or len(re.findall(r"^```", rest, flags=re.MULTILINE)) % 2:
        return None
    blocks = re.findall(r"^```([^\n]*)\n(.*?)^```", rest, flags=re.DOTALL | re.MULTILINE)
    python = [code for mark, code in blocks if re.match(r"[`{. ]*(python|py)[0-9.]*(?![\w-])", mark, re.IGNORECASE)]
    program = (python or [code for _, code in blocks] or [""])[-1].rstrip()
    return program if program.strip() else None


def parse_ranking(answer: str, k: int) -> list[int] | None:
    """Return the ranking in an answer (paper 2.3): the numbers 1 to k, best first. Return None if it is malformed.

    Only the last line is read: what stands behind "Ranking:", or all of it, because the paper's own answers are only
    numbers (appendix C). It must name each of 1..k exactly once, with commas between. Markdown around it
    (`**Ranking:** 2, 1`, a fence) and a final full stop are allowed. Numbers in the thinking part, or anywhere before
    the last line, are never read.
    """
    lines = (after_thinking(answer) or "").replace("`", "").strip().splitlines()
    if not lines:
        return None
    found = re.search(r"(?:^|Ranking[*_]*:)[ *_]*([0-9]{1,9}(?:[ ]*,[ ]*[0-9]{1,9})*)[ .*_]*$", lines[-1])
    if not found:
        return None
    ranking = [int(number) for number in found[1].split(",")]
    return ranking if sorted(ranking) == list(range(1, k + 1)) else None


# ------------------------------------------------------------------------------------------------- the three rewards
# Each takes a ranking (numbers from 1, best first) and the labels (1: correct, 0: wrong). labels[i - 1] is the label of
# candidate i. Each returns a number from 0 to 1. parse_ranking has checked that the ranking names each candidate once.


def pair_accuracy(ranking: list[int], labels: list[int]) -> float:
    """Return the fraction of (correct, wrong) pairs in which the correct candidate comes first (paper 2.3).

    n+ correct and n- wrong candidates make n+ * n- pairs; candidates with equal labels are not compared. Raises
    ValueError if all labels are equal, because then there is no pair.
    """
    ordered = [labels[index - 1] for index in ranking]
    pairs = [(first, second) for i, first in enumerate(ordered) for second in ordered[i + 1 :] if first != second]
    if not pairs:
        raise ValueError("pair accuracy needs a mixed group: at least one correct and one incorrect candidate")
    return sum(first > second for first, second in pairs) / len(pairs)


def ndcg(ranking: list[int], labels: list[int]) -> float:
    """Return the normalised discounted cumulative gain (paper 2.3): the DCG of the ranking over the best possible DCG.

    Returns 1.0 if all candidates are correct, and 0.0 if none is, as the paper's averages over all groups imply.
    """
    ordered = [labels[index - 1] for index in ranking]
    ideal = dcg(sorted(ordered, reverse=True))
    return dcg(ordered) / ideal if ideal else 0.0


def dcg(ordered: list[int]) -> float:
    """Return the discounted cumulative gain of labels in ranked order: gain 2^y - 1, discount log2(position + 1)."""
    return sum((2**y - 1) / math.log2(position + 1) for position, y in enumerate(ordered, 1))


def random_ndcg(labels: list[int]) -> float:
    """Return the mean NDCG over all orders of these labels: the score of a judge that orders at random.

    Each position holds each of the K candidates with probability 1/K, so the orders need not be enumerated.
    """
    ideal = dcg(sorted(labels, reverse=True))
    gain = sum(2**y - 1 for y in labels) / len(labels)
    return gain * dcg([1] * len(labels)) / ideal if ideal else 0.0


def selection(ranking: list[int], labels: list[int]) -> float:
    """Return 1.0 if the candidate that is ranked first is correct, else 0.0 (paper 2.3)."""
    return float(labels[ranking[0] - 1])


REWARDS = {"pairacc": pair_accuracy, "ndcg": ndcg, "selection": selection}


def score(answer: str, labels: list[int], reward: str = "pairacc") -> float:
    """Return the reward of one ranking answer (paper 2.3), or FORMAT_PENALTY if the answer is malformed.

    labels: 1 or 0 for each candidate, in the order in which the prompt showed them. reward: a key of REWARDS.
    """
    ranking = parse_ranking(answer, len(labels))
    return FORMAT_PENALTY if ranking is None else REWARDS[reward](ranking, labels)
