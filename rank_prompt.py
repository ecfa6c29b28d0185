"""What the model is asked, how its answers are read, and what a ranking is worth.

The text side of DuST, without a model or a tensor in it: two prompts (write a program, rank K programs), two readers
(the program in an answer, the ranking in an answer) and three rewards (paper 2.3). Everything here is a pure function
of its arguments, so that each can be tried by hand.

The readers are strict on purpose. A lenient parser pays for nonsense: one that takes the first K numbers it meets
reads "Candidate 1 fails on n=2 but 3 and 4 are fine. Ranking: 4, 3, 2, 1" as 1, 2, 3, 4, and training then rewards
the model for something it did not say.
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


# ------------------------------------------------------------------------------------------------- the three rewards
# All three take a ranking (1-based indices, best first) and the labels in the order in which the candidates stood in
# the prompt, and return a number from 0 to 1.


def pair_accuracy(ranking: list[int], labels: list[int]) -> float:
    """The share of (correct, incorrect) pairs in which the correct one comes earlier (paper 2.3; the default reward).

    n+ * n- comparisons; equal labels are not compared. Raises ValueError for a group that is not mixed: without a
    pair there is nothing to be right about, and a made-up 0 or 1 would be a reward for nothing.
    """
    ordered = [labels[index - 1] for index in ranking]
    pairs = [(first, second) for i, first in enumerate(ordered) for second in ordered[i + 1 :] if first != second]
    if not pairs:
        raise ValueError("pair accuracy needs a mixed group: at least one correct and one incorrect candidate")
    return sum(first > second for first, second in pairs) / len(pairs)


def ndcg(ranking: list[int], labels: list[int]) -> float:
    """Normalised discounted cumulative gain (paper 2.3): gain 2^y - 1, discount log2(position + 1), over the ideal.

    0.0 when no candidate is correct, as the paper's averages over all groups imply; 1.0 when all are.
    """
    ordered = [labels[index - 1] for index in ranking]

    def dcg(values: list[int]) -> float:
        return sum((2**y - 1) / math.log2(position + 1) for position, y in enumerate(values, 1))

    ideal = dcg(sorted(ordered, reverse=True))
    return dcg(ordered) / ideal if ideal else 0.0


def random_ndcg(labels: list[int]) -> float:
    """The mean NDCG of a random order of these labels: what a judge that knows nothing scores.

    Each position holds a correct candidate with probability n+/K, so no enumeration of orders is needed.
    """
    k, correct = len(labels), sum(labels)
    if not correct:
        return 0.0
    discounts = [1 / math.log2(position + 1) for position in range(1, k + 1)]
    return correct / k * sum(discounts) / sum(discounts[:correct])


def selection(ranking: list[int], labels: list[int]) -> float:
    """1.0 if the top-ranked candidate is correct, else 0.0 (paper 2.3)."""
    return float(labels[ranking[0] - 1])


REWARDS = {"pairacc": pair_accuracy, "ndcg": ndcg, "selection": selection}


def score(answer: str, labels: list[int], reward: str = "pairacc") -> float:
    """The reward of one ranking answer (paper 2.3): agreement with execution, or FORMAT_PENALTY if malformed.

    labels: 0 or 1 for each candidate, in the order in which the prompt showed them. reward: a key of REWARDS.
    """
    ranking = parse_ranking(answer, len(labels))
    return FORMAT_PENALTY if ranking is None else REWARDS[reward](ranking, labels)
