"""The debugger tour of the tutorial: pdb reaches its stations, and a run that is debugged is an ordinary one."""
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import dust

ROOT = Path(dust.__file__).resolve().parent
SMALL = ["--workers", "1", "--limit", "6", "--eval-limit", "2", "--repeats", "1", "--candidates", "8", "--steps", "1",
         "--batch", "12", "--answers", "4"]  # twelve: every group there is
TOUR = (ROOT / "tutorial.md").read_text(encoding="utf-8").partition("\n## Debugger tour\n")[2].partition("\n## ")[0]
STATIONS = re.findall(r"`(tbreak ([\w.]+)(?:, [^`]+)?)`", TOUR)  # [(what to type, the function), ...]
WRITE = re.search(r'`(!Path\("(/tmp/candidate.py)"\)[^`]+)`', TOUR)  # a candidate is written into this file


def pdb(script: list[str], typed: list[str]) -> str:
    """What a script prints in pdb, on one thread, to somebody who types these lines."""
    done = subprocess.run([sys.executable, "-m", "pdb", *script], input="\n".join(typed), capture_output=True, cwd=ROOT,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    return done.stdout


@pytest.fixture(scope="module")
def tour(tmp_path_factory) -> tuple[Path, str]:
    """The folder of a run in pdb that stops at every station, with the candidate of station 2; and what pdb printed."""
    folder, typed = tmp_path_factory.mktemp("debugger"), []
    for command, function in STATIONS:
        typed += [command, "c"]
        if function == "dust.label":
            typed += ["r", WRITE[1].replace(WRITE[2], str(folder / "candidate.py"))]
    return folder, pdb(["dust.py", *SMALL, "--out", str(folder / "run")], [*typed, "c", "q"])


def test_every_station_is_reached_in_the_order_of_the_tour(tour):
    """A breakpoint that is never hit sends a reader home. pdb does not follow threads and other processes."""
    _, printed = tour
    stops = r"^(?:\(Pdb\) )*Deleted breakpoint .*\n> .*/(\w+)\.py\(\d+\)(\w+)\("
    reached = re.findall(stops, printed, flags=re.MULTILINE)
    assert [".".join(names) for names in reached] == [function for _, function in STATIONS], printed
    assert len(STATIONS) == 8


def test_a_run_in_the_debugger_is_the_run_without_it(tour, tmp_path):
    """Somebody who stops at a token wants to find it there again."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert dust.main([*SMALL, "--out", str(tmp_path / "run")]) == 0
    finally:
        torch.set_num_threads(threads)

    def steps(out: Path) -> list[dict]:
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]

    first, second = tour[0] / "run", tmp_path / "run"
    assert steps(first) == steps(second) and len(steps(first)) == 1
    for name in ("candidates.jsonl", "judged.jsonl", "trained-samples.jsonl", "judge-rankings.jsonl"):
        assert (first / name).read_text() == (second / name).read_text()


def test_the_candidate_goes_through_the_states_of_the_tour(tour):
    """Station 2, in the other terminal: the first `n` reads what is typed, and each further one runs a line."""
    states = re.findall(r"\[\d, \d, \d\]", " ".join(TOUR.split()).partition("`p x`")[2].partition("3. **")[0])
    typed = ["n", re.search(r"type `([\d ]+)`", TOUR)[1], "p x"] + ["n", "p x"] * 3 + ["q"]
    printed = pdb([str(tour[0] / "candidate.py")], typed)
    assert re.findall(r"^\(Pdb\) (\[.*\])$", printed, flags=re.MULTILINE) == states and len(states) == 4


def test_the_tokens_of_the_tour_are_those_of_the_shipped_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny")
    yes, no = map(int, re.search(r"\[\[(\d+), (\d+)\]\]", TOUR).groups())
    assert tokenizer.convert_ids_to_tokens([yes, no]) == [": yes", ": no"]
    (command,) = [command for command, function in STATIONS if function == "grpo.draw_token"]
    assert f"[{yes}]" in command


def test_the_launch_settings_start_what_is_there():
    settings = json.loads((ROOT / ".vscode" / "launch.json").read_text())["configurations"]
    programs = [one["program"].removeprefix("${workspaceFolder}/") for one in settings if "program" in one]
    assert programs == ["dust.py", "data/study.py"]
    assert [one["module"] for one in settings if "module" in one] == ["pytest"]
    assert "python -m pdb dust.py " + " ".join(settings[0]["args"]) in TOUR  # the same run as in the tour
    assert all(one["env"] == {"OMP_NUM_THREADS": "1"} for one in settings) and "OMP_NUM_THREADS=1 python" in TOUR
    assert dust.parse_args(settings[0]["args"]).workers == 1
    study = importlib.import_module("data.study")
    assert study.parse_args(settings[2]["args"]).quick
