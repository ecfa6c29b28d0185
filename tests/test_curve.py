"""Test the curve over the steps: what a point measures, that training does not notice it, and what the report says."""
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import dust
from dust import METRICS, Group
from plumbing import report
from plumbing.problems import Problem
from test_dust import run_dust
from test_report import SETTINGS, judged

POINTS = ["--steps", "4", "--repeats", "2"]


def parameters_of(folder: Path) -> list[torch.Tensor]:
    return list(AutoModelForCausalLM.from_pretrained(folder).parameters())


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def run(llama, tmp_path_factory) -> Path:
    """A run with a point after each step, which also keeps the models of the steps."""
    out = tmp_path_factory.mktemp("curve") / "run"
    assert run_dust(*llama["arguments"], *POINTS, "--eval-every", "1", "--keep-every", "1", "--out", out) == 0
    return out


def test_training_does_not_notice_the_curve_also_when_it_is_stopped_in_a_point(llama, run, tmp_path, monkeypatch):
    without, stopped = tmp_path / "without", tmp_path / "stopped"
    assert run_dust(*llama["arguments"], *POINTS, "--eval-every", "0", "--out", without) == 0
    assert not (without / "curve").exists() and not (without / "curve.jsonl").exists()
    assert all(map(torch.equal, parameters_of(run / "model"), parameters_of(without / "model")))

    rank_candidates = dust.rank_candidates

    def stop_in_the_second_point(*arguments):
        if arguments[4].name == "2-rankings.jsonl":
            raise KeyboardInterrupt
        return rank_candidates(*arguments)

    command = [*llama["arguments"], *POINTS, "--eval-every", "1", "--save-every", "3", "--out", stopped]
    monkeypatch.setattr(dust, "rank_candidates", stop_in_the_second_point)
    assert run_dust(*command) == 130
    assert [file.name for file in (stopped / "curve").glob("?.jsonl")] == ["1.jsonl"]
    monkeypatch.setattr(dust, "rank_candidates", rank_candidates)
    assert run_dust(*command, "--resume") == 0  # from the start again: the only checkpoint is that of step 3
    assert all(map(torch.equal, parameters_of(run / "model"), parameters_of(stopped / "model")))
    assert (stopped / "curve.jsonl").read_text() == (run / "curve.jsonl").read_text()


def test_every_point_has_the_seeds_of_the_evaluation(llama, run, tmp_path):
    """The first and the last point are cut out of the report's rows. Drawn by themselves they have to be the same."""
    args = dust.parse_args([*llama["arguments"], *POINTS, "--device", "cpu", "--optimizer", "fp32"])
    args = dust.replace(args, model=str(run / "model"))
    model, tokenizer = dust.load(args.model, args)
    _, held_out = dust.load_train_and_eval(args)
    (tmp_path / "again").mkdir()
    samples = tmp_path / "again" / "base"
    for kind in ("samples", "labels"):
        Path(f"{samples}-{kind}.jsonl").write_bytes((run / f"base-{kind}.jsonl").read_bytes())
    base = dust.evaluation_groups(model, tokenizer, held_out, args, samples)
    dust.measure(model, tokenizer, base, 4, args, tmp_path / "again")
    files = [out / "curve" / "4.jsonl" for out in (tmp_path / "again", run)]
    assert report.read_point(files[0], METRICS) == report.read_point(files[1], METRICS)
    again, kept = ([line for line in lines_of(file) if 0 < sum(line["ranked"]) < 4] for file in files)
    assert again == kept and {line["row"] for line in kept} == {"own", "judge"}
    kept = lines_of(files[0])
    assert sum(line["row"] == "own" for line in kept) == len(held_out)  # one group a problem, of two


def test_a_program_that_an_earlier_stage_has_labelled_does_not_run_again(tmp_path, monkeypatch):
    """Four of five programs of a point are programs of the base or of an earlier point."""
    problem = Problem("p", "", [{"input": "", "output": "1"}])
    ran, failures = [], dust.sandbox.Pool.failures
    monkeypatch.setattr(dust.sandbox.Pool, "failures", lambda self, jobs: failures(self, ran.extend(jobs) or jobs))
    (tmp_path / report.CURVE).mkdir()
    stages = [("base", "12", "12"), ("curve/1", "23", "3"), ("curve/2", "31", ""), ("trained", "1324", "4")]
    for stem, written, new in stages:
        ran.clear()
        drawn = [dust.Candidate("p", "", f"print({n})") for n in written]
        monkeypatch.setattr(dust, "sample", lambda *_, evaluation: drawn)
        args = dust.Args(workers=1, repeats=1, best_of=len(drawn))
        [group] = dust.evaluation_groups(None, None, [problem], args, tmp_path / stem)
        assert group.labels == [n == "1" for n in written]
        assert [c.failure and c.failure["printed"] for c in drawn] == [None if n == "1" else n for n in written]
        assert [code for code, _ in ran] == [f"print({n})" for n in new]
    assert len(dust.runs.known_labels(tmp_path / "curve/1-labels.jsonl")) == 2  # its own are for --resume to find


def test_the_model_of_a_step_is_kept_as_a_folder(llama, run, tmp_path):
    assert run_dust(*llama["arguments"], "--steps", "2", "--eval-every", "0", "--out", tmp_path / "two") == 0
    assert sorted(path.name for path in run.glob("model*")) == ["model", "model-1", "model-2", "model-3"]
    pairs = zip(parameters_of(run / "model-2"), parameters_of(tmp_path / "two" / "model"))
    assert all(torch.equal(*pair) for pair in pairs)
    others = zip(parameters_of(run / "model-1"), parameters_of(run / "model-2"))
    assert not all(torch.equal(*pair) for pair in others)


def test_the_points_are_first_groups_of_problems_evenly_spread():
    args = dust.Args(repeats=2)
    groups = [Group(Problem(f"p{i // 2}", "Q", []), []) for i in range(500)]
    places = dust.curve_places(groups, args)
    assert len(places) == 100 and places[:4] == [0, 4, 10, 14] and places[-1] == 494
    assert dust.curve_places(groups[:6], args) == [0, 2, 4]


def test_a_point_says_one_line_and_its_stages_none(llama, tmp_path, capsys):
    assert run_dust(*llama["arguments"], "--steps", "3", "--eval-every", "2", "--out", tmp_path / "run") == 0
    said = capsys.readouterr().out.splitlines()
    points = [line for line in said if line.startswith("  step ")]
    assert len(points) == 1 and points[0].startswith("  step 2: pass@1 ") and "Best-of-4" in points[0]
    assert sum("without a program" in line for line in said) == 3 + 3  # training, base, trained; the report's counts


def test_the_report_names_the_best_step_and_that_it_was_chosen_by_hindsight(tmp_path):
    (tmp_path / "curve").mkdir()
    for step, labels in ((0, [1, 0, 0, 0]), (5, [1, 1, 1, 0]), (10, [1, 1, 0, 0])):
        own, judge = judged("a", labels), judged("a", labels)
        assert f"step {step}: pass@1 {25 * sum(labels)}.0" in report.keep_point(
            tmp_path / "curve" / f"{step}.jsonl", own, judge, METRICS)
    text = report.write_report({"base": judged("a", [1, 0, 0, 0])}, {}, METRICS, SETTINGS, tmp_path)
    assert "The highest pass@1 is that of step 5. It is chosen by hindsight" in text
    assert "the result of the run is step 10" in text.replace("\n", " ")
    assert [point["step"] for point in lines_of(tmp_path / "curve.jsonl")] == [0, 5, 10]


@pytest.mark.parametrize("trained, verdict", [
    ([[1, 1, 1, 1]] * 8, "is better than"), ([[0, 0, 0, 0]] * 8, "is not as good as"),
    ([[1, 1, 1, 1], [0, 0, 0, 0]] * 4, "cannot be told from"),
])
def test_the_report_compares_one_answer_with_the_bases_best_of_four(tmp_path, trained, verdict):
    """The paper's headline. The base's judge puts a correct program first for half of the problems: 50 per cent."""
    base = sum([judged(f"p{i}", [i % 2, 0, 0, 0]) for i in range(8)], [])
    rows = {"base": base, "trained": sum([judged(f"p{i}", labels) for i, labels in enumerate(trained)], [])}
    if verdict == "is better than":
        base[:] = sum([judged(f"p{i}", [0, 0, 0, 0]) for i in range(8)], [])
    text = report.write_report(rows, {}, METRICS, SETTINGS, tmp_path)
    assert f"One answer of the trained model {verdict} Best-of-4 of the base" in text
    saved = json.loads((tmp_path / "report.json").read_text())["one answer against Best-of-N"]
    assert saved["mean"] == pytest.approx(100 * sum(map(sum, trained)) / 32 - 100 * (verdict != "is better than") / 2)


def test_a_group_that_no_judge_orders_keeps_an_order_of_its_own_programs(monkeypatch, tmp_path):
    """An answer without a program stands last, as in every order. Otherwise one program is named twice."""
    monkeypatch.setattr(dust, "rank_candidates", lambda *_: [])
    drawn = [dust.Candidate("p", "", code) for code in ("print(1)", None, "print(2)", "print(3)")]
    [one] = dust.rank_mixed(None, None, [dust.Group(None, drawn)], dust.Args(), tmp_path / "10-judge.jsonl", [0])
    assert [c.code for c in one.ordered] == ["print(1)", "print(2)", "print(3)", None]
    assert report.order_of(one) == [1, 2, 3, 4] and len(one.group.candidates) == 3
