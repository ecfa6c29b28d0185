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


class Seen(Exception):
    pass


@pytest.mark.parametrize("flag", [True, False])
def test_a_step_picks_from_it_only_when_asked(monkeypatch, flag):
    """What the first step's prompts are made of, caught before a model is needed."""
    args, seen = dust.Args(steps=6, batch=2, curriculum=flag, shuffle=False), []

    def caught(model, tokenizer, prompts, *rest):
        raise Seen

    monkeypatch.setattr(dust, "ranking_ids", lambda tokenizer, group, args: seen.append(group.problem.id))
    monkeypatch.setattr(dust, "draw_answers", caught)
    with pytest.raises(Seen):
        dust.experience(None, None, [], groups(), 0, args, None, None, None)
    every = names(dust.pick(groups(), 0, args))
    assert set(seen) == ({"p2", "p5"} if flag else set(every)) and set(every) != {"p2", "p5"}


def test_the_command_line_knows_it():
    assert dust.parse_args(["--curriculum"]).curriculum and not dust.parse_args([]).curriculum
