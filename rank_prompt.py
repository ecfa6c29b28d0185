"""What the model is asked, how its answers are read, and what a ranking is worth.

The text side of DuST, without a model or a tensor in it: two prompts (write a program, rank K programs), two readers
(the program in an answer, the ranking in an answer) and three rewards (paper 2.3). Everything here is a pure function
of its arguments, so that each can be tried by hand. Answers come with their thinking part between <think> and
</think>, whatever the model's family calls it: plumbing/chat.py sees to that.

The readers are strict on purpose. A lenient parser pays for nonsense: one that takes the first K numbers it meets
reads "Candidate 1 fails on n=2 but 3 and 4 are fine. Ranking: 4, 3, 2, 1" as 1, 2, 3, 4, and training then rewards
the model for something it did not say. The authors' release has one; --parser lenient is there to compare.
"""
import math
import re

FORMAT_PENALTY = -1.0  # paper 2.3, R_fmt: wrong, repeated or missing indices, or no ranking at all

# ---------------------------------------------------------------------------------------------------- the two prompts


def generation_prompt(question: str, starter_code: str = "") -> str:
    """The user turn that asks for a program (paper 2.2). With starter_code, the program has to complete it."""
    if starter_code:
        return (
            f"{question}\n\nComplete this Python code and put the whole program in one ```python block:\n"
            f"```python\n{starter_code.strip()}\n```"
        )
    return (
        f"{question}\n\nWrite a Python program that reads from standard input and prints the answer. "
        "Put it in one ```python block."
    )


def ranking_prompt(question: str, codes: list[str]) -> str:
    """The user turn that asks for a ranking of K programs (paper 2.3), numbered from 1 in the order given.

    Whoever calls it shuffles the candidates first: a judge that always meets them in the order of sampling can learn
    the position instead of the program.
    """
    candidates = "\n\n".join(f"Candidate {i}:\n```python\n{code}\n```" for i, code in enumerate(codes, 1))
    return (
        f"{question}\n\nBelow are {len(codes)} candidate programs. Some may be wrong.\n\n{candidates}\n\n"
        "Order them from the most to the least likely to be correct, each number once. "
        "End with a line of this form:\nRanking: <best>, ..., <worst>"
    )


# --------------------------------------------------------------------------------------------------- the two readers


def after_thinking(answer: str) -> str | None:
    """The part of an answer that counts: what follows the thinking part, or all of it where there is none.

    None when a thinking part was opened and never closed (the answer was cut off, or only pretends to have ended).
    Where the chat template itself opens the thinking part, put that opening in front of the answer first.
    """
    before, closed, rest = answer.rpartition("</think>")
    if "<think>" in rest:
        return None
    return rest if closed else answer


def extract_code(answer: str) -> str | None:
    """The program in an answer: the last fenced block after the thinking part, or None when there is none.

    A block that is empty, or that was cut off before its closing fence, is a failed extraction (None) too.
    """
    rest = after_thinking(answer)
    if rest is None or len(re.findall(r"^```", rest, flags=re.MULTILINE)) % 2:
        return None
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", rest, flags=re.DOTALL | re.MULTILINE)
    if not blocks or not blocks[-1].strip():
        return None
    return blocks[-1].rstrip()


def parse_ranking(answer: str, k: int) -> list[int] | None:
    """The ranking in an answer: k indices from 1, best first; None when it is malformed.

    Only the last line counts, and only from its "Ranking:" on; it has to name each of 1..k exactly once, separated
    by commas. Emphasis around it (`**Ranking: 2, 1**`) and a full stop behind it are allowed. Numbers in the thinking
    part, or anywhere before that line, are never read.
    """
    rest = after_thinking(answer)
    if rest is None or not rest.strip():
        return None
    last_line = rest.strip().splitlines()[-1]
    found = re.search(r"Ranking:[ *]*([0-9]{1,9}(?:[ ]*,[ ]*[0-9]{1,9})*)[ .*`]*$", last_line)
    if not found:
        return None
    ranking = [int(number) for number in found[1].split(",")]
    return ranking if sorted(ranking) == list(range(1, k + 1)) else None


def lenient_ranking(answer: str, k: int) -> list[int] | None:
    """The ranking as the authors' release reads it: the first k different numbers from 1 to k, wherever they stand.

    Repeated and larger numbers are skipped, and a thinking part counts where it was not closed. None only where fewer
    than k such numbers are there. For comparison (--parser lenient): it reads rankings that nobody gave.
    """
    rest = answer.rpartition("</think>")[2]
    numbers = [int(number) for number in re.findall(r"[0-9]+", rest) if len(number) < 10]
    ranking = list(dict.fromkeys(number for number in numbers if 1 <= number <= k))
    return ranking if len(ranking) == k else None


READERS = {"strict": parse_ranking, "lenient": lenient_ranking}

# ------------------------------------------------------------------------------------------------- the three rewards
# All three take a ranking (1-based indices, best first) and the labels in the order in which the candidates stood in
# the prompt, and return a number from 0 to 1. A label is 0 or 1, or, as in the release, the share of its tests that a
# program passes (--labels fractional); then any two different shares are a pair.


def pair_accuracy(ranking: list[int], labels: list[float]) -> float:
    """The share of (correct, incorrect) pairs in which the correct one comes earlier (paper 2.3; the default reward).

    n+ * n- comparisons; equal labels are not compared. With shares as labels the pairs are (better, worse). Raises
    ValueError for a group that is not mixed: without a pair there is nothing to be right about, and a made-up 0 or 1
    would be a reward for nothing.
    """
    ordered = [labels[index - 1] for index in ranking]
    pairs = [(first, second) for i, first in enumerate(ordered) for second in ordered[i + 1 :] if first != second]
    if not pairs:
        raise ValueError("pair accuracy needs a mixed group: at least one correct and one incorrect candidate")
    return sum(first > second for first, second in pairs) / len(pairs)


def ndcg(ranking: list[int], labels: list[float]) -> float:
    """Normalised discounted cumulative gain (paper 2.3): gain 2^y - 1, discount log2(position + 1), over the ideal.

    0.0 when no candidate is correct, as the paper's averages over all groups imply; 1.0 when all are.
    """
    ordered = [labels[index - 1] for index in ranking]

    ideal = dcg(sorted(ordered, reverse=True))
    return dcg(ordered) / ideal if ideal else 0.0


def dcg(ordered: list[float]) -> float:
    return sum((2**y - 1) / math.log2(position + 1) for position, y in enumerate(ordered, 1))


def random_ndcg(labels: list[float]) -> float:
    """The mean NDCG of a random order of these labels: what a judge that knows nothing scores.

    Each position holds each candidate with probability 1/K, so no enumeration of orders is needed.
    """
    ideal = dcg(sorted(labels, reverse=True))
    gain = sum(2**y - 1 for y in labels) / len(labels)
    return gain * dcg([1] * len(labels)) / ideal if ideal else 0.0


def selection(ranking: list[int], labels: list[float]) -> float:
    """1.0 if the top-ranked candidate is correct, else 0.0 (paper 2.3); with shares as labels, its share."""
    return float(labels[ranking[0] - 1])


REWARDS = {"pairacc": pair_accuracy, "ndcg": ndcg, "selection": selection}


def score(answer: str, labels: list[float], reward: str = "pairacc", parser: str = "strict") -> float:
    """The reward of one ranking answer (paper 2.3): agreement with execution, or FORMAT_PENALTY if malformed.

    labels: of each candidate, in the order in which the prompt showed them. reward, parser: keys of REWARDS, READERS.
    """
    ranking = READERS[parser](answer, len(labels))
    return FORMAT_PENALTY if ranking is None else REWARDS[reward](ranking, labels)
