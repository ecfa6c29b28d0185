"""Test the figures of a run without a model: Best-of-N by hand, intervals, the files of the report."""
import json
import sys
from itertools import combinations, permutations
from types import SimpleNamespace

import numpy as np
import pytest

import rank_prompt
from dust import METRICS, best_of
from plumbing import report
from plumbing.problems import Problem

SETTINGS = {"model": "m", "seed": 0}


def judged(name: str, *rankings: list[int], malformed: bool = False, shown: int = 4) -> list:
    """Return ranked groups of one problem. A ranking lists the labels, the best-ranked first."""
    groups = []
    for ranked in rankings:
        ordered = [SimpleNamespace(code="print(1)" if place < shown else None, correct=bool(label), failure=None)
                   for place, label in enumerate(ranked)]
        group = SimpleNamespace(problem=Problem(name, "Q", [], difficulty="seen order"), candidates=ordered[:shown])
        groups.append(SimpleNamespace(group=group, ordered=ordered, ranked=ranked, answer="", malformed=malformed))
    return groups


# ------------------------------------------------------------------------------------------------------------ Best-of-N


def test_best_of_two_is_the_mean_over_all_pairs_and_not_the_top_two():
    """A pair submits its better-ranked program. In [0, 1, 0, 0] only the pairs of places (1, 2) and (1, 3) submit the
    right program: 2 of 6 pairs. If only the pair of the two best-ranked counted, the figure would be 0."""
    assert METRICS["best_of_2"]([0, 1, 0, 0]) == pytest.approx(2 / 6)
    assert METRICS["best_of_2"]([1, 0, 0, 0]) == pytest.approx(3 / 6)
    assert METRICS["best_of_2"]([0, 0, 0, 1]) == 0 and METRICS["best_of_2"]([1, 1, 1, 0]) == 1
    for labels in permutations([1, 1, 0, 0]):
        for n in (1, 2, 3, 4):
            picked = [labels[min(places)] for places in combinations(range(4), n)]
            assert best_of(n, labels) == pytest.approx(np.mean(picked))
        assert best_of(1, labels) == METRICS["pass1"](labels)
        assert best_of(4, labels) == METRICS["best_of_4"](labels)


def test_the_oracle_of_n_counts_all_programs_of_a_problem_together():
    """Problem a has two groups with 2 of 8 programs correct: 1 - C(6, N) / C(8, N). Group by group, the figure would be
    biased at N = 4, and N = 8 would not exist."""
    oracle = report.oracle_of_n(judged("a", [1, 0, 0, 0], [0, 0, 1, 0]) + judged("b", [0, 0, 0, 0], [0, 0, 0, 0]))
    assert list(oracle) == ["1", "2", "4", "8"]
    assert [own[0, 0] for own in oracle.values()] == pytest.approx([2 / 8, 1 - 15 / 28, 1 - 15 / 70, 1])
    assert all((own[1] == [0, 1]).all() for own in oracle.values())
    assert list(report.oracle_of_n(judged("a", [1, 0, 0, 0]))) == ["1", "2", "4"]  # one group has four programs


def test_best_of_eight_is_the_finals_winner_and_absent_without_finals(tmp_path):
    rows = {"base": judged("a", [0, 1, 0, 0], [1, 0, 0, 0]) + judged("b", [0, 0, 1, 0], [0, 0, 0, 0])}
    finals = {"base": judged("a", [1, 1, 0, 0]) + judged("b", [0, 0, 0, 0])}
    for own, eight in ((finals, 50.0), ({}, None)):
        report.write_report(rows, own, METRICS, SETTINGS, tmp_path)
        curve = json.loads((tmp_path / "report.json").read_text())["best_of_n"]["base"]
        means = [curve[n]["mean"] for n in "124"]
        assert means == pytest.approx([100 * 3 / 16, 100 * (2 + 3 + 1) / 24, 25], abs=1e-3)
        assert curve["random"] == curve["1"] and curve["oracle"]["8"]["mean"] == 100
        assert curve["8"]["mean"] == eight if eight else "8" not in curve
        table = (tmp_path / "report.md").read_text().split("## Best-of-N")[1].splitlines()
        lines = [line for line in table if line.startswith("|")][2:5]
        assert ["oracle" in lines[0], lines[1].startswith("| base |"), "random" in lines[2]] == [True] * 3
        assert lines[1].split("|")[-2].startswith(" 50.0" if eight else " -")


def test_one_group_a_problem_leaves_no_empty_column_for_best_of_eight(tmp_path):
    """The report of a quick run had a column of dashes, and a reader thought that something had failed."""
    rows = {"base": judged("a", [0, 1, 0, 0]) + judged("b", [0, 0, 1, 0])}
    report.write_report(rows, {}, METRICS, SETTINGS, tmp_path)
    table = (tmp_path / "report.md").read_text().split("## Best-of-N")[1]
    assert "| Best-of-N | N = 1 | N = 2 | N = 4 |\n" in table and "The largest N, where a problem has two groups" in table
    assert {line.count("|") for line in table.splitlines() if line.startswith("|")} == {5}


def test_every_figure_can_be_computed_again_from_judged_jsonl(tmp_path):
    rows = {"base": judged("a", [1, 0, 0, 0], shown=3) + judged("b", [0, 1, 1, 0], malformed=True),
            "trained": judged("a", [1, 1, 0, 0]) + judged("b", [1, 1, 1, 0])}
    finals = {"trained": judged("a", [1, 1, 1, 0], malformed=True)}
    report.write_report(rows, finals, METRICS, SETTINGS, tmp_path)
    saved = json.loads((tmp_path / "report.json").read_text())
    again, again_finals = report.read_judged(tmp_path / "judged.jsonl")
    assert report.best_of_rows(again, again_finals, METRICS) == saved["best_of_n"]
    again = report.summarise(again, METRICS)
    assert again.pop("one answer against Best-of-N") == saved["one answer against Best-of-N"]
    for name, part in again.items():
        assert part == {row: {key: saved[name][row][key] for key in own} for row, own in part.items()}
    assert saved["counts"]["base"]["answers without a program"] == saved["counts"]["base"]["malformed rankings"] == 1
    assert saved["counts"]["trained"]["malformed finals"] == 1


def test_a_report_holds_any_text(tmp_path):
    """A folder whose name is not UTF-8 has half characters in it, and a model's name stands in the report's title."""
    report.write_report({"base": judged("题", [1, 0, 0, 0])}, {}, METRICS, SETTINGS | {"model": "模\udcff"}, tmp_path)
    assert "模\\udcff" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_a_run_has_its_figures_where_matplotlib_is_and_its_tables_where_it_is_not(tmp_path, monkeypatch):
    rows = {"base": judged("a", [1, 0, 0, 0])}
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report.write_report(rows, {}, METRICS, SETTINGS, tmp_path)
    assert (tmp_path / "report.md").exists() and not (tmp_path / "best_of_n.png").exists()
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 2, "reward": 1}\n')
    report.write_report(rows, {}, METRICS, SETTINGS, tmp_path)
    assert (tmp_path / "best_of_n.png").stat().st_size > 5000 and (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("logged, panels", [
    ({"reward": 1.0, "constant": 0.5, "loss": 0.0, "ref_kl": 0.1, "zero_variance": 0.0},
     {"reward (dashed: constant)": 2, "KL to the reference, nats a token": 1, "groups of equal rewards, share": 1}),
    ({"reward": 1.0, "loss": 2.0, "ref_kl": 0.0}, {"reward": 1, "loss": 1}),
])
def test_the_curves_show_the_constant_answer_and_the_loss_only_where_it_falls(logged, panels, tmp_path, monkeypatch):
    """The loss of GRPO is about zero at every step. Its panel showed nothing, but beginners looked at it first."""
    figures, seen = pytest.importorskip("matplotlib.figure"), {}
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, *how, **more: seen.update(
        {axis.get_title(): len(axis.lines) for axis in figure.axes if axis.axison}))
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1} | logged) + "\n")
    report.draw_curves([], tmp_path)
    assert seen == panels


# ------------------------------------------------------------------------------------------------- means and intervals


def test_the_metrics_of_a_hand_made_evaluation():
    groups = judged("a", [1, 0, 0, 0], [0, 0, 0, 0]) + judged("b", [0, 1, 1, 0]) + judged("c", [1, 1, 1, 1])
    mean = {m: report.interval([report.per_problem(groups, METRICS[m])])["mean"] for m in METRICS}
    second = rank_prompt.ndcg([1, 2, 3, 4], [0, 1, 1, 0])
    assert mean["pass1"] == pytest.approx(100 * (1 + 0 + 2 + 4) / 16, abs=1e-3)
    assert mean["ndcg_all"] == pytest.approx(100 * (1 + 0 + second + 1) / 4, abs=1e-3)
    assert mean["ndcg_mixed"] == pytest.approx(100 * (1 + second) / 2, abs=1e-3)
    assert mean["ndcg_random"] == pytest.approx((64.04 + 78.51) / 2, abs=0.02)
    assert mean["best_of_4"] == pytest.approx(100 * 2 / 4) and mean["oracle"] == pytest.approx(100 * 3 / 4)


@pytest.mark.parametrize("ranked, shown", [([1, 0, 0, 0], 2), ([0, 1, 1, 0], 3), ([1, 1, 1, 0], 3), ([0, 1, 0, 1], 4)])
def test_a_random_order_leaves_answers_without_a_program_last_as_every_judge_does(ranked, shown):
    """Over all four answers a random order scored less than any judge can, so a guess looked better than chance."""
    [[value, count]] = report.per_problem(judged("a", ranked, shown=shown), METRICS["ndcg_random"])
    orders = [[*order, *ranked[shown:]] for order in permutations(ranked[:shown])]
    assert count == 1 and value == pytest.approx(np.mean([METRICS["ndcg_mixed"](order) for order in orders]))


def test_a_paired_difference_is_drawn_with_the_same_problems():
    """Drawn independently, a gain that is the same on all problems would get an interval as wide as their spread."""
    rng = np.random.default_rng(0)
    base = np.stack([rng.random(50), np.ones(50)], 1)
    better = base + np.array([0.1, 0])
    gain = report.interval([base, better])
    assert gain["mean"] == pytest.approx(10) and gain["high"] - gain["low"] < 0.01
    alone = report.interval([base])
    assert alone["low"] < alone["mean"] < alone["high"] and alone["high"] - alone["low"] > 5


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        values = rng.random((60, 1)) < 0.3
        figure = report.interval([np.concatenate([values, np.ones((60, 1))], 1)], seed=trial, draws=500)
        hits += figure["low"] <= 30 <= figure["high"]
    assert 180 <= hits <= 199


def test_an_interval_is_the_middle_95_per_cent_of_the_draws():
    drawn = np.append(np.random.default_rng(0).permutation(1001) / 10, [np.nan, np.nan])
    assert report.with_interval(50.0, drawn) == {"mean": 50.0, "low": 2.5, "high": 97.5}


def test_an_evaluation_without_mixed_groups_has_no_made_up_ndcg():
    nothing = report.interval([report.per_problem(judged("a", [1, 1, 1, 1]), METRICS["ndcg_mixed"])])
    assert nothing == {"mean": None, "low": None, "high": None}
