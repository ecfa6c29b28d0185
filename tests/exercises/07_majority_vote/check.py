import dust
from plumbing.problems import Problem

TESTS = [{"input": f"{n}\n", "output": "looked at"} for n in (1, 2, 3)]
SAME, SAME_TOO = "print(int(input()) + 1)", "n = int(input())\nprint(n + 1)"
LONELY, ONCE, CRASH, CRASH_TOO = "print(7)", "print(2)", "print(int(input()) / 0)", "raise ValueError"


def order(*codes) -> list:
    """The codes as the vote orders them. The labels say the opposite, so a vote that reads them is found out."""
    candidates = [dust.Candidate("p", "", code, correct=code in (CRASH, LONELY)) for code in codes]
    judged = dust.vote(dust.Group(Problem("p", "?", TESTS), candidates), dust.Args(workers=1))
    assert isinstance(judged, dust.RankedGroup) and not judged.malformed and judged.group.candidates == candidates
    return [c.code for c in judged.ordered]


def test_the_largest_party_comes_first():
    assert order(LONELY, SAME, CRASH, SAME_TOO) == [SAME, SAME_TOO, LONELY, CRASH]


def test_agreement_is_on_all_inputs():
    """On the first input all three print 2."""
    assert order(ONCE, SAME, SAME_TOO) == [SAME, SAME_TOO, ONCE]


def test_a_program_that_crashes_agrees_with_no_other():
    assert order(CRASH, CRASH_TOO, LONELY) == [LONELY, CRASH, CRASH_TOO]
    assert order(None, None, LONELY) == [LONELY, None, None]


def test_ties_keep_their_order():
    assert order(ONCE, LONELY, SAME) == [ONCE, LONELY, SAME]
