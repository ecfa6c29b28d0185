"""Best-of-N by hand, and the studies: their intervals, how they go on, what they write; no model in any of it."""
import json
import sys
from itertools import combinations, permutations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data import Problem, report


PROGRAM = SimpleNamespace(code="print(1)", correct=True)


def judged(name: str, *rankings: list[int], malformed: bool = False, shown: int = 4) -> list:
    """Groups of one problem as a judge ordered them, best-ranked label first."""
    group = SimpleNamespace(problem=Problem(name, "Q", [], difficulty="seen order"), candidates=[PROGRAM] * shown)
    return [SimpleNamespace(group=group, ranked=ranked, answer="", malformed=malformed) for ranked in rankings]


# ------------------------------------------------------------------------------------------------------------ Best-of-N


def test_best_of_two_is_the_mean_over_all_pairs_and_not_the_top_two():
    """Of [0, 1, 0, 0] the pair (0, 1) submits the first, wrong; (1, 2) and (1, 3) the second, right; the other three
    are wrong: 2 of 6. Taking the two best-ranked instead would say 0."""
    assert report.METRICS["best_of_2"]([0, 1, 0, 0]) == pytest.approx(2 / 6)
    assert report.METRICS["best_of_2"]([1, 0, 0, 0]) == pytest.approx(3 / 6)
    assert report.METRICS["best_of_2"]([0, 0, 0, 1]) == 0 and report.METRICS["best_of_2"]([1, 1, 1, 0]) == 1
    for labels in permutations([1, 1, 0, 0]):
        for n in (1, 2, 3, 4):
            picked = [labels[min(places)] for places in combinations(range(4), n)]
            assert report.best_of(n, labels) == pytest.approx(np.mean(picked))
        assert report.best_of(1, labels) == report.METRICS["pass1"](labels)
        assert report.best_of(4, labels) == report.METRICS["best_of_4"](labels)


def test_the_oracle_of_n_counts_all_programs_of_a_problem_together():
    """Two groups of a problem with 2 of 8 correct: 1 - C(6, N) / C(8, N). By group it would be biased at N = 4, and
    there would be no N = 8."""
    oracle = report.oracle_of_n(judged("a", [1, 0, 0, 0], [0, 0, 1, 0]) + judged("b", [0, 0, 0, 0], [0, 0, 0, 0]))
    assert list(oracle) == ["1", "2", "4", "8"]
    assert [own[0, 0] for own in oracle.values()] == pytest.approx([2 / 8, 1 - 15 / 28, 1 - 15 / 70, 1])
    assert all((own[1] == [0, 1]).all() for own in oracle.values())
    assert list(report.oracle_of_n(judged("a", [1, 0, 0, 0]))) == ["1", "2", "4"]  # no 8 of four


def test_best_of_eight_is_the_finals_winner_and_absent_without_finals(tmp_path):
    rows = {"base": judged("a", [0, 1, 0, 0], [1, 0, 0, 0]) + judged("b", [0, 0, 1, 0], [0, 0, 0, 0])}
    finals = {"base": judged("a", [1, 1, 0, 0]) + judged("b", [0, 0, 0, 0])}
    for own, eight in ((finals, 50.0), ({}, None)):
        report.write_report(rows, own, {"model": "m", "seed": 0}, {"all": 1.0}, tmp_path)
        curve = json.loads((tmp_path / "report.json").read_text())["best_of_n"]["base"]
        means = [curve[n]["mean"] for n in "124"]
        assert means == pytest.approx([100 * 3 / 16, 100 * (2 + 3 + 1) / 24, 25], abs=1e-3)
        assert curve["random"] == curve["1"] and curve["oracle"]["8"]["mean"] == 100
        assert curve["8"]["mean"] == eight if eight else "8" not in curve
        table = (tmp_path / "report.md").read_text().split("## Best-of-N")[1].splitlines()
        lines = [line for line in table if line.startswith("|")][2:5]
        assert ["oracle" in lines[0], lines[1].startswith("| base |"), "random" in lines[2]] == [True] * 3
        assert lines[1].split("|")[-2].startswith(" 50.0" if eight else " -")


def test_every_figure_can_be_computed_again_from_judged_jsonl(tmp_path):
    rows = {"base": judged("a", [1, 0, 0, 0], shown=3) + judged("b", [0, 1, 1, 0], malformed=True),
            "trained": judged("a", [1, 1, 0, 0]) + judged("b", [1, 1, 1, 0])}
    finals = {"trained": judged("a", [1, 1, 1, 0], malformed=True)}
    report.write_report(rows, finals, {"model": "m", "seed": 0}, {"all": 1.0}, tmp_path)
    saved = json.loads((tmp_path / "report.json").read_text())
    again, again_finals = report.read_judged(tmp_path / "judged.jsonl")
    assert report.curves(again, again_finals) == saved["best_of_n"]
    for name, part in report.summarise(again).items():
        assert part == {row: {key: saved[name][row][key] for key in own} for row, own in part.items()}
    assert saved["counts"]["base"]["answers without a program"] == saved["counts"]["base"]["malformed rankings"] == 1
    assert saved["counts"]["trained"]["malformed finals"] == 1


def test_a_run_has_its_figures_where_matplotlib_is_and_its_tables_where_it_is_not(tmp_path, monkeypatch):
    rows = {"base": judged("a", [1, 0, 0, 0])}
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report.write_report(rows, {}, {"model": "m", "seed": 0}, {"all": 1.0}, tmp_path)
    assert (tmp_path / "report.md").exists() and not (tmp_path / "best_of_n.png").exists()
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 2, "reward": 1}\n')
    report.write_report(rows, {}, {"model": "m", "seed": 0}, {"all": 1.0}, tmp_path)
    assert (tmp_path / "best_of_n.png").stat().st_size > 5000 and (tmp_path / "curves.png").exists()
