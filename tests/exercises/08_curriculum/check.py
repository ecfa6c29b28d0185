import math

import pytest

import dust
from plumbing.problems import Problem


def groups() -> list:
    """Twelve groups with 1, 2, 3, 1, 2, 3, ... right ones of four."""
    made = []
    for i in range(12):
        own = [dust.Candidate(f"p{i}", "", f"print({n})", correct=n <= i % 3) for n in range(4)]
        made.append(dust.Group(Problem(f"p{i}", "?", []), own))
    return made


def names(chosen) -> list[str]:
    return [group.problem.id for group in chosen]


EASIEST = ["p2", "p5", "p8", "p11", "p1", "p4", "p7", "p10", "p0", "p3", "p6", "p9"]


def test_the_list_grows_from_the_easiest_to_all():
    args = dust.Args(steps=6, batch=2)
    for step in range(6):
        assert names(dust.curriculum(groups(), step, args)) == EASIEST[: math.ceil(12 * (step + 1) / 6)]


def test_there_is_always_a_batch():
    assert names(dust.curriculum(groups(), 0, dust.Args(steps=60, batch=5))) == EASIEST[:5]


@pytest.mark.parametrize("mode", ["rank", "sft"])
@pytest.mark.parametrize("flag", [True, False])
def test_a_batch_comes_from_it_only_when_asked(flag, mode):
    args = dust.Args(steps=6, batch=2, curriculum=flag, mode=mode)
    assert (set(names(dust.batch_at(groups(), 0, args))) == {"p2", "p5"}) is flag


def test_modes_that_draw_from_problems_have_no_curriculum():
    problems = [Problem(f"p{i}", "?", []) for i in range(12)]
    args = dust.Args(steps=6, batch=2, mode="generate", curriculum=True)
    assert len(dust.batch_at(problems, 0, args)) == 2


def test_the_command_line_knows_it():
    assert dust.parse_args(["--curriculum"]).curriculum and not dust.parse_args([]).curriculum
