"""--workers 0, the run that a debugger steps through, and the tour of the tutorial that needs it."""
import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import dust

ROOT = Path(dust.__file__).resolve().parent
SMALL = ["--workers", "0", "--limit", "6", "--eval-limit", "2", "--repeats", "1", "--candidates", "8", "--steps", "1",
         "--batch", "12", "--answers", "4"]  # twelve: every group there is
torch.set_num_threads(1)


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
    """Two runs with --workers 0, and the stations that were reached in the second one."""
    folder, threads, tourist = tmp_path_factory.mktemp("debugger"), torch.get_num_threads(), Tourist()
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


def test_the_launch_settings_start_what_is_there():
    settings = json.loads((ROOT / ".vscode" / "launch.json").read_text())["configurations"]
    programs = [one["program"].removeprefix("${workspaceFolder}/") for one in settings if "program" in one]
    assert programs == ["dust.py", "data/study.py"]
    assert [one["module"] for one in settings if "module" in one] == ["pytest"]
    assert dust.parse_args(settings[0]["args"]).workers == 0
    study = importlib.import_module("data.study")
    assert study.parse_args(settings[2]["args"]).quick
