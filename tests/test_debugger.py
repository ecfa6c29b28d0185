"""--workers 0, the run that a debugger steps through, and the tour of the tutorial that needs it."""
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import dust
import sandbox
from plumbing.problems import load_problems
from data.make_tiny import LINES

ROOT = Path(dust.__file__).resolve().parent
SMALL = ["--workers", "0", "--limit", "6", "--eval-limit", "2", "--repeats", "1", "--candidates", "8", "--steps", "1",
         "--batch", "12", "--answers", "4"]  # twelve: every group there is
FIRST, LAST = "x = [int(v) for v in input().split()]", "print(*x)"
torch.set_num_threads(1)


def program(*lines) -> str:
    return "\n".join([FIRST, *lines, LAST])


def test_labels_are_those_of_the_pool():
    """A label of its own for the debugger, and one would step through another run than the one that is asked about."""
    problems = load_problems("micro-train")[:3]
    codes = [program(a, b, c) for a in LINES[::2] for b in LINES[1::3] for c in LINES[::3]]
    jobs = [(code, problem.tests) for problem in problems for code in codes]
    jobs += [(program(*re.findall("^x = .*(?=\n)", code, re.M)[1:]), problems[0].tests) for code in codes[:2]]
    jobs += [(program(), [{"input": "1 2 3\n", "output": "1 2 3\n"}])]
    ours = sandbox.InThisProcess()
    with sandbox.Pool(1) as pool:
        theirs = list(pool.judge(jobs))
    theirs = sorted(theirs, key=lambda verdict: verdict.job)
    for own, other in zip(ours.judge(jobs), theirs, strict=True):
        assert own._replace(results=[]) == other._replace(results=[]) and len(own.results) == len(other.results)
    assert {verdict.passed for verdict in theirs} == {True, False} and ours.foreign == 0


def test_a_foreign_program_is_not_run(tmp_path):
    """There is no isolation: what is not made of the world's own lines could do anything to the one who debugs."""
    mark = tmp_path / "was here"
    evil = f"open({str(mark)!r}, 'w')"
    echo = [{"input": "1 2 3\n", "output": "1 2 3\n"}]
    foreign = [evil, f"{evil}\n{program()}", program(evil), f"{program()}\n{evil}", program(f"{LINES[0]}; {evil}"), "",
               FIRST, LAST, f"{FIRST}; {evil}\n{LAST}", program(f"  {LINES[0]}"), program(LINES[0] + "\r"), program(""),
               f"{program()}\n"]
    pool = sandbox.InThisProcess()
    verdicts = list(pool.judge([(code, echo) for code in foreign]))
    assert not mark.exists() and not any(verdicts) and pool.foreign == len(foreign)
    assert {verdict.reason for verdict in verdicts} == {"no program of the micro-world: not run"}
    assert pool.label([(program(), echo), (evil, echo)]) == [True, False]  # and one of its own is run
    for tests in ([], [{"fn_name": "f", "args": [], "expected": 1}]):
        assert not next(pool.judge([(program(), tests)])).passed


def test_foreign_programs_are_counted_in_the_run(tmp_path, capsys):
    problem = load_problems("micro-train")[0]
    candidates = [dust.Candidate(problem.id, "", code) for code in (program(LINES[0]), "print(1)", "print(2)", None)]
    clock = dust.Clock({"label": 1})
    journal = dust.Journal(tmp_path / "labels.jsonl")
    dust.label([problem], candidates, dust.Args(workers=0), name="label", journal=journal, clock=clock)
    assert "2 programs are none of the micro-world: not run, and wrong" in capsys.readouterr().err
    assert not any(c.correct for c in candidates)


def test_it_takes_the_shipped_problems_only(tmp_path, capsys):
    other = tmp_path / "p.jsonl"
    other.write_text((ROOT / "data" / "eval.jsonl").read_text())
    for option in ("--train", "--eval"):
        assert dust.main(["--workers", "0", option, str(other), "--out", str(tmp_path / "run")]) == 2
        assert capsys.readouterr().err.startswith("dust: --workers 0 runs programs without isolation")
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------------- the tour

TOUR = (ROOT / "tutorial.md").read_text(encoding="utf-8").partition("\n## Debugger tour\n")[2].partition("\n## ")[0]
STATIONS = re.findall(r"`tbreak ([\w.]+)(?:, ([^`]+))?`", TOUR)


class Tourist:
    """A profiler that stops where a reader's debugger would: at one station after the other, in the tour's order."""

    def __init__(self):
        self.left, self.reached = list(STATIONS), []
        self.codes = [self.code_of(name) for name, _ in self.left]

    @staticmethod
    def code_of(name: str):
        module, _, function = name.rpartition(".")
        found = getattr(importlib.import_module(module), function)
        return getattr(found, "__wrapped__", found).__code__

    def __call__(self, frame, event, _):
        if event == "call" and self.codes and frame.f_code is self.codes[0]:
            condition = self.left[0][1]
            if not condition or eval(condition, frame.f_globals, frame.f_locals):
                self.reached.append(self.left.pop(0)[0])
                self.codes.pop(0)


@pytest.fixture(scope="module")
def twice(tmp_path_factory) -> tuple[list[Path], list[str]]:
    """Two runs with --workers 0, without a worker process, and the stations that were reached in the second one."""
    folder, threads, tourist = tmp_path_factory.mktemp("debugger"), torch.get_num_threads(), Tourist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox._Worker, "__init__", lambda self: pytest.fail("a sandbox process"))
        for name, profiler in (("a", None), ("b", tourist)):
            torch.set_num_threads(2)
            sys.setprofile(profiler)
            try:
                assert dust.main([*SMALL, "--out", str(folder / name)]) == 0
            finally:
                sys.setprofile(None)
            assert torch.get_num_threads() == 1
    torch.set_num_threads(threads)
    return [folder / name for name in "ab"], tourist.reached


def test_two_runs_are_the_same(twice):
    """Whoever stops at a token wants to find it there again."""

    def steps(out: Path) -> list[dict]:
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]

    (first, second), _ = twice
    assert steps(first) == steps(second) and len(steps(first)) == 1
    for name in ("candidates.jsonl", "judged.jsonl", "journal/trained-samples.jsonl"):
        assert (first / name).read_text() == (second / name).read_text()


def test_every_station_is_reached_in_the_order_of_the_tour(twice):
    """A breakpoint that is never hit sends a reader home. Eight of them, the conditions included."""
    assert twice[1] == [name for name, _ in STATIONS] and len(STATIONS) == 8


def test_the_tokens_of_the_tour_are_those_of_the_shipped_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny")
    yes, no = map(int, re.search(r"\[\[(\d+), (\d+)\]\]", TOUR).groups())
    assert tokenizer.convert_ids_to_tokens([yes, no]) == [": yes", ": no"]
    assert f"[{yes}]" in dict(STATIONS)["grpo.sample"]


def test_pdb_stops_there_and_steps_into_a_candidate(tmp_path):
    """With the commands of the page, in the debugger that everybody has; its streams are not the candidate's."""
    commands = ["tbreak sandbox.play_here", "c", *"nnnns", "n", "n", "p ('x is', x)", "q"]
    done = subprocess.run([sys.executable, "-m", "pdb", "dust.py", *SMALL, "--limit", "2", "--out", tmp_path / "run"],
                          cwd=ROOT, text=True, input="\n".join(commands) + "\n", capture_output=True)
    assert "> <candidate>(1)<module>()" in done.stdout and "('x is', [2, 0, 0])" in done.stdout, done.stdout[-2000:]


def test_the_launch_settings_start_what_is_there():
    settings = json.loads((ROOT / ".vscode" / "launch.json").read_text())["configurations"]
    programs = [one["program"].removeprefix("${workspaceFolder}/") for one in settings if "program" in one]
    assert programs == ["dust.py", "data/study.py"]
    assert [one["module"] for one in settings if "module" in one] == ["pytest"]
    assert dust.parse_args(settings[0]["args"]).workers == 0
    study = importlib.import_module("data.study")
    assert study.parse_args(settings[2]["args"]).quick
