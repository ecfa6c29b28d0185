"""Test the studies without a model: their intervals, how they continue, what they write."""
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from data import study
from plumbing import report
from plumbing.problems import load_problems


# ------------------------------------------------------------------------------------------------- two-level intervals


def tables(values: np.ndarray) -> np.ndarray:
    """Return the table [S, P, 2] of values [S, P] with one group for each problem."""
    return np.stack([values, np.ones_like(values)], 2)


def width(figure: dict) -> float:
    return figure["high"] - figure["low"]


def test_identical_runs_add_no_spread_over_seeds():
    """If all seeds agree, the interval is that of a single run, which is over problems only."""
    one = np.random.default_rng(0).random((1, 80))
    several, alone = study.two_level([(1, tables(np.repeat(one, 4, 0)))]), report.interval([tables(one)[0]])
    assert several["seeds"] == [several["mean"]] * 4 == [alone["mean"]] * 4
    assert width(several) == pytest.approx(width(alone), rel=0.1)
    flat = study.two_level([(1, tables(np.full((4, 80), 0.3)))])
    assert (flat["low"], flat["high"]) == (30, 30)


def test_seeds_that_differ_widen_the_interval_although_the_problems_agree():
    """With an interval over problems only, the luck of one seed would look like a result."""
    figure = study.two_level([(1, tables(np.repeat([[0.2], [0.4], [0.6]], 50, 1)))])
    assert figure["mean"] == pytest.approx(40) and figure["low"] <= 27 and figure["high"] >= 53


def test_a_constant_shift_is_a_gain_of_exactly_that():
    """The seeds and the problems differ a lot. If either were not paired, the interval would be wide."""
    rng = np.random.default_rng(1)
    base = rng.random((5, 60)) * rng.random((5, 1))
    gain = study.two_level([(1, tables(base + 0.1)), (-1, tables(base))])
    assert [gain["mean"], gain["low"], gain["high"]] == pytest.approx([10, 10, 10], abs=1e-3)
    assert gain["seeds"] == pytest.approx([10] * 5, abs=1e-3) and not study.is_noise(gain)


def test_the_problems_of_a_draw_are_the_same_for_all_seeds():
    """If each seed drew other problems, more seeds would narrow the interval over problems. But all seeds are measured
    on the same problems, so more seeds say nothing about other problems."""
    hard_and_easy = np.repeat(np.tile([0.0, 1.0], 30)[None], 8, 0)
    figure = study.two_level([(1, tables(hard_and_easy))])
    assert width(figure) == pytest.approx(2 * 196 * 0.5 / 60**0.5, rel=0.1)


def test_problems_that_do_not_count_are_no_zeros():
    values = np.stack([np.array([[0.8, 0.0, 0.0, 0.8]] * 2), np.array([[1, 0, 0, 1]] * 2)], 2)
    assert study.two_level([(1, values)])["mean"] == pytest.approx(80)
    nothing = study.two_level([(1, np.zeros((2, 3, 2)))])
    assert nothing == {"mean": None, "low": None, "high": None, "seeds": [None, None]} and study.is_noise(nothing)


# ---------------------------------------------------------------------------------------------------------- the runs

FAKE = '''
"""Stand in for dust.py: record each call; FAKE_HANGS and FAKE_FAILS name runs that hang or fail."""
import json, os, sys, time
from pathlib import Path
flags = sys.argv[1:]
value = lambda name, default="": flags[flags.index(name) + 1] if name in flags else default
out = Path(value("--out"))
found = sorted(p.stem for p in out.glob("*.jsonl"))
out.mkdir(parents=True, exist_ok=True)
with (out.parent / "calls").open("a") as calls:
    init = Path(value("--init", "."))
    calls.write(json.dumps({"run": out.name, "flags": flags, "journals": found,
                            "init finished": (init / "report.json").exists(),
                            "threads": os.environ.get("OMP_NUM_THREADS")}) + "\\n")
(out / "args.json").write_text("{}")
if out.name == os.environ.get("FAKE_HANGS"):
    (out.parent / "hangs").write_text(str(os.getpid()))
    time.sleep(60)
if out.name == os.environ.get("FAKE_FAILS"):
    print("  sampling:  3%\\rdust: the disk is full\\n\\n", file=sys.stderr)
    sys.exit(2)
for name in ("samples", "labels", "base-samples", "base-labels", "base-rankings", "base-finals", "trained-samples"):
    path = out / f"{name}.jsonl"
    if not path.exists():
        path.write_text(json.dumps([out.name, name]) + "\\n")
shift = len(value("--mode") + value("--reward") + value("--thinking")) % 3
lines = []
for row, level in (("base", 1), ("trained_judge", 1), ("trained", 2 + shift % 2)):
    for problem in range(8):
        ranked = [int((problem + int(value("--seed")) + place) % 4 < level) for place in range(4)]
        ranked.sort(reverse=row != "base")
        for final in (False, False, True):
            lines.append({"row": row, "problem": f"p{problem}", "difficulty": "", "ranked": ranked, "shown": 4,
                          "malformed": problem == 0 and row == "base", "final": final})
(out / "judged.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
args = {"seed": int(value("--seed")), "quick": "--quick" in flags, "steps": 60, "model": "/somewhere/tiny"}
(out / "report.json").write_text(json.dumps({"args": args}))
'''


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """Make a study with the fake and no plots: run(name, ...) -> exit code; calls() -> the fake's calls in order."""
    monkeypatch.setattr(study, "draw_study", lambda *a: None)
    (tmp_path / "fake.py").write_text(FAKE)
    out, results = tmp_path / "runs", tmp_path / "results"

    def run(*arguments) -> int:
        return study.main([*map(str, arguments), "--out", str(out)], dust=tmp_path / "fake.py", results=results)

    def calls() -> list[dict]:
        return [json.loads(line) for line in (out / "calls").read_text().splitlines()]

    return SimpleNamespace(run=run, calls=calls, out=out, results=results, fake=tmp_path / "fake.py",
                           draws=monkeypatch.undo)


def test_every_run_is_made_once_and_what_another_study_made_is_taken(lab, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert lab.run("table2", "--seeds", 2) == 0
    assert sorted(call["run"] for call in lab.calls()) == ["rank-s0", "rank-s1"]
    assert lab.run("figure4", "--seeds", 2) == 0
    assert sorted(call["run"] for call in lab.calls()[2:]) == ["ndcg-s0", "ndcg-s1", "selection-s0", "selection-s1"]
    assert lab.run("figure4", "--seeds", 2) == 0
    assert len(lab.calls()) == 6
    for call in lab.calls():
        assert call["threads"] == "1" and "--resume" not in call["flags"]
        assert call["flags"][:2] == ["--seed", call["run"][-1]] and "--workers" in call["flags"]
    assert {"--reward", "ndcg"} <= set(lab.calls()[2]["flags"] + lab.calls()[3]["flags"])


def test_a_run_that_was_begun_goes_on_with_resume_and_one_without_args_does_not(lab):
    """dust.py refuses to write into the folder of a started run unless it gets --resume."""
    (lab.out / "rank-s0").mkdir(parents=True)
    (lab.out / "rank-s0" / "args.json").write_text("{}")
    assert lab.run("table2", "--seeds", 2) == 0
    assert {call["run"]: "--resume" in call["flags"] for call in lab.calls()} == {"rank-s0": True, "rank-s1": False}


def test_variants_start_after_the_first_with_copies_of_what_the_base_did(lab):
    """Without the copy each variant samples and labels the same programs again, which takes half of its time."""
    assert lab.run("table3", "--seeds", 1, "--parallel", 4) == 0
    calls = lab.calls()
    assert calls[0]["run"] == "rank-s0" and calls[0]["journals"] == []
    for call in calls[1:]:
        assert call["journals"] == sorted(study.BY_GENERATOR + study.BY_JUDGE)
        copied = lab.out / call["run"] / "base-finals.jsonl"
        assert copied.read_text() == (lab.out / "rank-s0" / "base-finals.jsonl").read_text()
        assert not copied.is_symlink() and copied.stat().st_nlink == 1


def test_what_a_begun_run_wrote_into_its_journals_is_not_copied_over(lab):
    own = lab.out / "sft-s0" / "labels.jsonl"
    own.parent.mkdir(parents=True)
    own.write_text('["mine", 1]\n')
    assert lab.run("figure3", "--seeds", 1) == 0
    assert own.read_text() == '["mine", 1]\n'


def test_a_cell_shares_only_what_its_modes_leave_the_same(lab, monkeypatch):
    """If a run took the rankings of a judge that does not think for those of one that thinks, no error would show."""
    base = ["--model", "--preset"]
    monkeypatch.setattr(study, "NOT_QUICK", {"notation", "clumsy"})
    monkeypatch.setattr(study, "probe_all", lambda *a: {})  # it would need the models
    assert lab.run("transfer", "figure3", "--quick", "--seeds", 1) == 0
    copied = {}
    for call in lab.calls():
        folder = lab.out / call["run"]
        copied[call["run"]] = {name: json.loads((folder / f"{name}.jsonl").read_text())[0] for name in call["journals"]}
        assert not set(base) & set(call["flags"])
    generator, judge = study.BY_GENERATOR, study.BY_JUDGE
    assert copied.pop("rank-s0") == copied.pop("rankings-s0") == {}
    assert copied.pop("programs-s0") == dict.fromkeys(generator, "rank-s0")
    assert copied.pop("none-s0") == dict.fromkeys(generator, "rankings-s0")
    assert copied == dict.fromkeys(["sft-s0", "sft-then-rank-s0"], dict.fromkeys(generator + judge, "rank-s0"))
    for name, variant in study.VARIANTS.items():  # `like` must agree with `thinking` and `base`
        if variant.like:
            like = study.VARIANTS[variant.like]
            programs = [v.thinking in ("both", "programs") for v in (variant, like)]
            assert programs[0] == programs[1] and variant.base == like.base and not like.like, name


def test_training_that_goes_on_from_another_run_waits_for_it(lab, monkeypatch, capsys):
    assert lab.run("figure3", "--seeds", 1, "--parallel", 3) == 0
    assert [call["run"] for call in lab.calls()] == ["rank-s0", "sft-s0", "sft-then-rank-s0"]
    flags = lab.calls()[2]["flags"]
    assert flags[flags.index("--init") + 1] == str(lab.out / "sft-s0") and lab.calls()[2]["init finished"]


def test_a_run_that_fails_is_one_line_and_the_others_go_on(lab, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_FAILS", "sft-s1")
    assert lab.run("figure3", "--seeds", 2) == 2
    printed = capsys.readouterr().out
    line, = [line for line in printed.splitlines() if line.startswith("sft-s1: failed")]
    assert "exit code 2: dust: the disk is full" in line and "sft-s1.log" in line
    assert "sft-then-rank-s1: not run, because it needs sft-s1" in printed
    assert {call["run"] for call in lab.calls()} == {"rank-s0", "rank-s1", "sft-s0", "sft-s1", "sft-then-rank-s0"}
    assert "Missing, because they are not finished: sft-s1, sft-then-rank-s1." in (lab.results / "figure3.md").read_text()
    assert json.loads((lab.results / "figure3.json").read_text())["variants"]["sft"]["seeds"] == [0]
    monkeypatch.delenv("FAKE_FAILS")
    assert lab.run("figure3", "--seeds", 2) == 0  # the same command continues
    assert "--resume" in next(call["flags"] for call in reversed(lab.calls()) if call["run"] == "sft-s1")


def test_ctrl_c_ends_the_runs_and_says_how_to_go_on(lab, tmp_path):
    """The runs are in other sessions, so Ctrl-C does not reach them. Left alone, they would keep writing files."""
    code = ("import signal; from pathlib import Path; from data import study\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts without it\n"
            f"raise SystemExit(study.main(['table2', '--seeds', '1', '--out', '{lab.out}'], dust='{lab.fake}', "
            f"results=Path('{lab.results}')))")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=study.HERE.parent, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"FAKE_HANGS": "rank-s0"})
    began = time.time()
    while not (lab.out / "hangs").exists() or not (lab.out / "hangs").read_text():
        assert time.time() - began < 30
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert "the same command goes on" in process.communicate(timeout=20)[1] and process.returncode == 130
    with pytest.raises(ProcessLookupError):
        os.kill(int((lab.out / "hangs").read_text()), 0)


def test_quick_runs_are_never_taken_for_whole_ones_nor_their_results_put_beside_them(lab, capsys):
    assert lab.run("table3", "--quick") == 0
    assert {call["run"][-2:] for call in lab.calls()} == {"s0", "s1"} and "--quick" in lab.calls()[0]["flags"]
    assert (lab.out / "results" / "table3.md").exists() and not lab.results.exists()
    assert lab.run("table2", "--seeds", 2) == 2
    assert "rank-s0 is a run with --quick: give another --out" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- the results


def test_table_2_holds_every_figure_of_every_seed(lab):
    assert lab.run("table2", "--seeds", 3) == 0
    result, text = json.loads((lab.results / "table2.json").read_text()), (lab.results / "table2.md").read_text()
    own = result["variants"]["rank"]
    assert own["rows"]["base"]["pass1"]["seeds"] == [25] * 3 and own["rows"]["trained"]["pass1"]["seeds"] == [50] * 3
    assert own["gains"]["both"]["pass1"]["mean"] == 25 and own["gains"]["judge"]["pass1"]["mean"] == 0
    assert own["gains"]["judge"]["ndcg_mixed"]["low"] > 0
    assert own["rows"]["trained"]["best_of_8"]["mean"] == own["rows"]["trained"]["oracle_of_8"]["mean"] == 100
    assert own["rows"]["trained"]["best_of_2"]["mean"] == pytest.approx(100 * 5 / 6, abs=1e-3)
    assert own["malformed"] == [{"base": 2, "trained_judge": 0, "trained": 0}] * 3
    assert "/somewhere" not in json.dumps(result["settings"])  # results are committed, so they hold no local paths
    for part in ("Seeds, of 3,", "pass@1 3, NDCG 3, NDCG mixed 3, Best-of-4 3", "N = 8", " | 2, 2, 2 |", "## Reading",
                 "| Qwen3-30B-Thinking | 65.4 / 70.1 / 68.7 | 65.4 / 73.7 / 70.4 | 68.5 / 76.3 / 72.6 |"):
        assert part in text, part


def test_a_difference_is_that_of_the_gains_and_called_noise_where_its_interval_holds_zero(lab):
    assert lab.run("table3", "--seeds", 2) == 0
    result = json.loads((lab.results / "table3.json").read_text())
    for name, own in result["differences"].items():
        variants = result["variants"]
        for metric, figure in own["both"].items():
            apart = variants[name]["gains"]["both"][metric]["mean"], variants["rank"]["gains"]["both"][metric]["mean"]
            if None not in apart:
                assert figure["mean"] == pytest.approx(apart[0] - apart[1], abs=2e-3)
            assert figure["noise"] == (figure["mean"] is None or figure["low"] <= 0 <= figure["high"])
    shifts = {name: own["both"]["pass1"]["noise"] for name, own in result["differences"].items()}
    assert set(shifts.values()) == {True, False}  # the fake has both


def test_a_variant_is_also_compared_with_the_one_that_it_starts_from(lab):
    """What GRPO adds after SFT cannot be read from two differences to a third variant."""
    assert lab.run("figure3", "--seeds", 2) == 0
    result = json.loads((lab.results / "figure3.json").read_text())
    assert list(result["differences"]) == ["sft", "sft-then-rank", "sft-then-rank - sft"]
    gains = [result["variants"][name]["gains"]["both"]["pass1"]["mean"] for name in ("sft-then-rank", "sft")]
    figure = result["differences"]["sft-then-rank - sft"]["both"]["pass1"]
    assert figure["mean"] == pytest.approx(gains[0] - gains[1], abs=2e-3)
    assert "| GRPO after SFT, minus SFT on rankings | " in (lab.results / "figure3.md").read_text()


def test_the_bar_counts_seeds_by_each_ones_own_interval(lab):
    assert lab.run("table2", "--seeds", 2) == 0
    file = lab.out / "rank-s1" / "judged.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:  # seed 1 gains nothing
        line["ranked"] = [1, 0, 0, 0]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert lab.run("table2", "--seeds", 2, "--plot-only") == 0
    assert "Seeds, of 2," in (text := (lab.results / "table2.md").read_text()) and "pass@1 1, NDCG 1" in text


def test_a_paragraph_written_by_hand_does_not_outlive_its_numbers(lab):
    """The tables are made again after new runs. The text below them would still state the numbers of old runs."""
    there = [name for name in study.STUDIES if (study.HERE / "results" / f"{name}.json").exists()]
    assert len(there) >= 5
    for name in there:
        reading = study.written_by_hand(name)["Reading"]
        result = json.loads((study.HERE / "results" / f"{name}.json").read_text())
        text = study.markdown(result)
        assert reading in text and text == (study.HERE / "results" / f"{name}.md").read_text(), name
        figure = result["variants"][study.STUDIES[name][0]]["gains"]["both"]["pass1"]
        stated = f"{figure['mean']:.1f}" in reading
        figure["mean"] += 1
        assert ("To be written" in study.markdown(result)) == stated, name
    assert lab.run("figure3", "--seeds", 2) == 0
    text = (lab.results / "figure3.md").read_text().split("## Reading")[1]
    assert "To be written" in text and study.written_by_hand("figure3")["Reading"] not in text


def test_nobody_can_change_what_all_intervals_are_drawn_with():
    """The draws are cached, so one in-place operation would change every later interval of the process."""
    for array in study.draw(2, 3, 5):
        with pytest.raises(ValueError, match="read-only"):
            array += 1


def test_transfer_prints_its_prediction_before_the_result(lab, monkeypatch):
    """A prediction that is written after the result is worthless. It is written by hand and comes first in the file."""
    skills = {f"{task}/{name}": 0.5 if task == "gen" else 0.25 for task in ("gen", "rank")
              for name in ("step", "jump", "careful", "yes_same", "yes_off")}
    skills |= {"copy": float("nan"), "pass1": 0.4, "ndcg_mixed": 0.8, "ndcg_random": 0.725}
    monkeypatch.setattr(study, "probe_model", lambda folder, problems, file: file.write_text(json.dumps(skills)))
    assert lab.run("transfer", "--quick", "--seeds", 1) == 0
    text = (lab.out / "results" / "transfer.md").read_text()
    prediction = study.written_by_hand("transfer")["The prediction"]
    places = [text.index(part) for part in (prediction, "## Gains", "## Skills", "## Reading")]
    assert places == sorted(places)
    assert "|  | off-policy ranking, PairAcc (the method) | thinking generator, direct judge |" in text
    assert "| `rank/yes_same` | 0.250 -> 0.250 | 0.250 -> 0.250 |" in text and "(a random order: 0.725)" in text
    assert "| `copy` | - -> - |" in text  # nothing could be counted: neither 0 nor nan
    assert "with thinking switched on for both tasks" in text  # otherwise its pass1 is taken for the study's pass@1
    assert "notation" not in " ".join(call["run"] for call in lab.calls())


def test_bases_are_made_first_and_their_runs_take_the_laptops_settings(lab, monkeypatch):
    """By default any model except the shipped one gets the paper's settings, such as 64 candidates: far too slow."""
    begun = []
    monkeypatch.setattr(study, "run_side_by_side", lambda commands, parallel: begun.append(commands) or 0)
    args = study.parse_args(["transfer", "--seeds", "1", "--out", str(lab.out)])
    args.dust = "dust.py"
    assert study.run_all(args, study.STUDIES["transfer"]) == 0
    assert [folder.name for folder in begun[0]] == ["notation", "clumsy"]
    assert begun[0][lab.out / "bases" / "clumsy"][2:4] == ["--base", "clumsy"]
    flags = begun[1][lab.out / "clumsy-s0"]
    assert flags[flags.index("--preset") + 1] == "laptop"
    assert flags[flags.index("--model") + 1] == str(lab.out / "bases" / "clumsy")


def test_one_pretraining_makes_the_bases_of_all_its_steps(lab):
    args = study.parse_args(["strength", "--out", str(lab.out)])
    commands = study.base_commands(args, study.STUDIES["strength"])
    assert [folder.name for folder in commands] == ["pretrained", "teacher"]
    command = commands[lab.out / "bases" / "pretrained"]
    assert command[command.index("--keep") + 1 :][: len(study.POINTS)] == list(map(str, study.POINTS))
    for step in study.POINTS:
        (lab.out / "bases" / f"pretrained-{step}").mkdir(parents=True)
        (lab.out / "bases" / f"pretrained-{step}" / "tokenizer_config.json").write_text("{}")
    assert [folder.name for folder in study.base_commands(args, study.STUDIES["strength"])] == ["teacher"]


def test_a_study_has_the_seeds_it_asks_for_and_a_shared_variant_those_of_the_largest(lab, monkeypatch, capsys):
    begun = []
    monkeypatch.setattr(study, "run_side_by_side", lambda commands, parallel: begun.extend(commands) or 0)
    monkeypatch.setattr(study, "is_finished", lambda folder, args: folder.name.startswith("rank-"))
    args = study.parse_args(["noise", "table2", "--out", str(lab.out)])
    args.dust = "dust.py"
    assert study.run_all(args, study.STUDIES["noise"]) == 0
    names = [folder.name for folder in begun]
    assert names.count("flip-20-s2") == 1 and "flip-20-s3" not in names
    begun.clear()
    monkeypatch.setattr(study, "is_finished", lambda folder, args: False)
    assert study.run_all(args, ("rank",)) == 0
    assert [folder.name for folder in begun] == [f"rank-s{seed}" for seed in range(5)]
    assert lab.run("strength", "--quick") == 2 and "no --quick" in capsys.readouterr().err


def test_noise_changes_the_labels_of_training_and_no_others(lab):
    """The evaluation has to be the same for all variants. A run whose labels are turned round in part only is none."""
    lines = [[f"p/{i}", 1 if i % 4 else {"test": 2, "why": "wrong", "printed": "7"}] for i in range(4000)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    turned = [json.loads(line) for line in study.turned_round(text, 0.1, 0).splitlines()]
    assert [key for key, _ in turned] == [key for key, _ in lines]
    for kind in (True, False):  # right and wrong ones alike
        changed = [(new == 1) != kind for (_, old), (_, new) in zip(lines, turned) if (old == 1) == kind]
        assert np.mean(changed) == pytest.approx(0.1, abs=0.03)
    assert study.turned_round(text, 0.1, 0) == study.turned_round(text, 0.1, 0) != study.turned_round(text, 0.1, 1)

    args = study.parse_args(["noise", "--out", str(lab.out)])
    (lab.out / "rank-s1").mkdir(parents=True)
    for name in study.BY_GENERATOR + study.BY_JUDGE:
        (lab.out / "rank-s1" / f"{name}.jsonl").write_text(text)
    for variant in ("first-test", "flip-10"):
        study.copy_base_files(args, variant, 1)
    turned, first = lab.out / "flip-10-s1", lab.out / "first-test-s1"
    assert (turned / "labels.jsonl").read_text() == study.turned_round(text, 0.1, 1)
    assert not (first / "labels.jsonl").exists()
    for name in set(study.BY_GENERATOR + study.BY_JUDGE) - {"labels"}:
        assert (turned / f"{name}.jsonl").read_text() == (first / f"{name}.jsonl").read_text() == text


def test_wrong_labels_are_counted_in_the_groups_that_are_trained_on(tmp_path):
    """Among all programs there are more wrong labels: those of groups that no step sees."""
    labels = {"true": [1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1], "noisy": [1, 0, 1, 0, 0, 1, 0, 0, 1, 1, 1, 1]}
    for run, own in labels.items():
        (tmp_path / run).mkdir()
        lines = [{"problem_id": "p", "answer": "", "code": str(i), "correct": bool(y)} for i, y in enumerate(own)]
        (tmp_path / run / "candidates.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    # two of three groups are mixed, the second one only because of a wrong label; 3 of 8 labels, 2 of 3 labels 1
    assert study.wrong_labels(tmp_path / "noisy", tmp_path / "true") == pytest.approx([3 / 8, 2 / 3, 1 / 2], abs=1e-4)
    assert study.wrong_labels(tmp_path / "true", tmp_path / "true") == [0, 0, 0]


def test_labels_of_the_first_test_only_come_from_problems_with_one_test(lab):
    args = study.parse_args(["noise", "--out", str(lab.out)])
    args.dust = "dust.py"
    study.write_first_tests(lab.out / "first-test.jsonl")
    command = study.dust_command(args, "first-test", 0)
    problems = load_problems(command[command.index("--train") + 1])
    shipped = load_problems("micro-train")
    assert [(p.id, p.question, p.tests) for p in problems] == [(p.id, p.question, p.tests[:1]) for p in shipped]
    assert "--train" not in study.dust_command(args, "flip-5", 0)


def test_noise_waits_for_all_labels_of_the_run_that_it_copies(lab, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_FAILS", "rank-s0")
    assert lab.run("noise", "--seeds", 1) == 2
    said = capsys.readouterr()
    assert "flip-20-s0: not run, because it needs rank-s0" in said.out
    assert [call["run"] for call in lab.calls()] == ["rank-s0"]


def test_a_result_names_every_state_of_the_code_that_made_its_runs(lab, monkeypatch, tmp_path):
    for name in ("rank_prompt", "dust", "grpo", "sandbox"):
        (tmp_path / f"{name}.py").write_text(f'"""Text."""\n\n\ndef {name}():\n    """Say."""\n    return 1\n')
    before = study.code_hash(tmp_path)
    (tmp_path / "grpo.py").write_text('"""Other."""\ndef grpo():\n    """X."""\n    return 1  # one\n')
    assert study.code_hash(tmp_path) == before
    (tmp_path / "grpo.py").write_text('"""Other."""\ndef grpo():\n    """X."""\n    return 2\n')
    assert study.code_hash(tmp_path) != before

    monkeypatch.setattr(study, "code_hash", lambda: "first")
    monkeypatch.setenv("FAKE_FAILS", "rank-s1")
    assert lab.run("table2", "--seeds", 2) == 2
    monkeypatch.setattr(study, "code_hash", lambda: "second")
    monkeypatch.delenv("FAKE_FAILS")
    assert lab.run("table2", "--seeds", 2) == 0
    assert json.loads((lab.results / "table2.json").read_text())["code"] == ["first", "second"]
    assert "State of the code: first, second." in (lab.results / "table2.md").read_text()


def test_only_the_studies_that_show_a_curve_pay_for_it(lab):
    args = study.parse_args(["table2", "--out", str(lab.out)])
    args.dust = "dust.py"
    with_curve = {name for name in study.VARIANTS if "--eval-every" not in study.dust_command(args, name, 0)}
    assert with_curve == {"rank", "ndcg", "selection"}


def test_a_result_is_rendered_again_without_its_runs(lab):
    """The runs are not kept for ever. The text of a result must be editable after they are deleted."""
    assert lab.run("table2", "--seeds", 1) == 0
    text = (lab.results / "table2.md").read_text()
    for path in [*lab.out.rglob("judged.jsonl"), lab.results / "table2.md"]:
        path.unlink()
    calls = len(lab.calls())
    assert lab.run("table2", "--seeds", 1, "--render") == 0 and len(lab.calls()) == calls
    assert (lab.results / "table2.md").read_text() == text


def test_plot_only_runs_nothing_and_says_what_it_misses(lab, capsys):
    assert lab.run("table2", "--plot-only") == 2
    assert "no run of rank in" in capsys.readouterr().err
    assert lab.run("table2", "--seeds", 1) == 0 and len(lab.calls()) == 1
    assert lab.run("table2", "--seeds", 3, "--plot-only") == 0 and len(lab.calls()) == 1
    assert "not finished: rank-s1, rank-s2" in (lab.results / "table2.md").read_text()


def test_without_matplotlib_the_tables_are_written_and_one_line_says_what_to_install(lab, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    lab.draws()
    assert lab.run("table2", "--seeds", 1) == 0 and (lab.results / "table2.png").stat().st_size > 5000
    for path in lab.results.iterdir():
        path.unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert lab.run("table2", "--seeds", 1) == 0
    assert "pip install matplotlib" in capsys.readouterr().out
    assert sorted(path.name for path in lab.results.iterdir()) == ["table2.json", "table2.md"]
