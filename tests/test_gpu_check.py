"""Test the frame of gpu_check.py, without a GPU. Device time is lent once and for minutes: a fault in one part must not
cost what the other parts would have found."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]
import gpu_check
from gpu_check import Check, read_lines, run_plan, tables

PARTS = {  # what the process of a part does in these tests, after it has read its line
    "hangs": "import subprocess, time; print(subprocess.Popen(['sleep', '60']).pid, file=open('child', 'w')); "
             "print('', file=open('begun', 'w')); time.sleep(60)",
    "crashes": "import os; os.abort()",
    "fails": "raise SystemExit(7)",
    "works": "print('', file=open('works', 'w'))",
    "finds no device": f"raise SystemExit({gpu_check.NO_DEVICE})",
}


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Return a function that runs groups of the parts above, with an alarm after a second, and returns their lines."""

    def open_part(check):
        code = f"import sys; sys.stdin.readline(); {PARTS[check.part]}"
        return subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdin=subprocess.PIPE, text=True,
                                start_new_session=True)

    monkeypatch.setattr(gpu_check, "open_part", open_part)

    def run(*groups, kept=None, last=600, alarm=3):
        seconds = [{part: 60 if part == "works" else alarm for part in group} for group in groups]
        folder, kept = str(tmp_path), [] if kept is None else kept
        run_plan(seconds, time.monotonic() + last, lambda part: Check(part, "cpu", True, folder, time.monotonic()),
                 lambda: kept.append(tables(folder)))
        return {line["part"]: line["result"] for line in read_lines(str(tmp_path))}

    return run


def test_part_that_hangs_is_cut_with_its_children_and_the_next_one_runs(plan, tmp_path):
    began, kept = time.monotonic(), []
    lines = plan(["hangs"], ["works"], kept=kept)
    assert time.monotonic() - began < 50
    assert list(lines) == ["hangs"] and "alarm" in lines["hangs"] and (tmp_path / "works").exists()
    assert len(kept) == 2 and "alarm" in kept[0]  # the tables are kept after each part
    for _ in range(50):
        if not running(int((tmp_path / "child").read_text())):
            break
        time.sleep(0.1)
    else:
        raise AssertionError("the child of the part that was cut still runs")


def test_parts_end_with_the_time_for_all_of_them(plan, tmp_path):
    began = time.monotonic()
    lines = plan(["hangs"], ["works"], last=1, alarm=60)
    assert time.monotonic() - began < 30 and "alarm" in lines["hangs"]


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0]


@pytest.mark.parametrize("part, words", [("crashes", "exit code -6"), ("fails", "exit code 7")])
def test_part_that_dies_is_named_and_the_others_run(part, words, plan, tmp_path):
    lines = plan([part, "works"])
    assert words in lines[part] and "works" not in lines and (tmp_path / "works").exists()


def test_no_device_ends_the_check_at_once(plan, tmp_path):
    assert plan(["finds no device"], ["works"]) == {} and not (tmp_path / "works").exists()


def test_error_in_one_line_does_not_lose_the_next(tmp_path, capsys):
    check = Check("exact", "cpu", True, str(tmp_path), time.monotonic())

    def breaks():
        raise ValueError("first line\nsecond | line")

    check.measure("one", breaks)
    check.measure("two", lambda: ("far off", False))
    check.measure("three", lambda: "a | b")
    assert [line["good"] for line in read_lines(str(tmp_path))] == [False, False, True]
    printed = capsys.readouterr().out
    assert "ValueError: first line" in printed and "second" not in printed and "WRONG: far off" in printed
    (tmp_path / "about.json").write_text(json.dumps({"card": "NVIDIA X, 80 GB", "software": "torch 3"}))
    text = tables(str(tmp_path))
    assert text.splitlines()[0] == "# Measured on a GPU: NVIDIA X, 80 GB" and "| three | a / b |" in text


@pytest.mark.parametrize("name", gpu_check.FIGURES)
@pytest.mark.parametrize("value, inside", [(30.0, True), (29.96, True), (29.8, False), (40.04, True), (40.2, False)])
def test_figure_outside_the_interval_is_wrong(name, value, inside):
    known = {figure: {"low": 30.0, "high": 40.0} for figure in gpu_check.FIGURES}
    row = {figure: {"mean": 35.0} for figure in gpu_check.FIGURES} | {name: {"mean": value}}
    assert gpu_check.within(row, known)[1] == inside


def test_missing_gpu_is_one_line(tmp_path):
    command = [sys.executable, HERE.parent / "gpu_check.py", "--device", "cuda:99", "--only", "step,exact",
               "--write", tmp_path / "gpu.md"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    said = done.stdout + done.stderr
    assert done.returncode and "Traceback" not in said and ("no GPU" not in said or said.count("\n") == 1)
    assert "no GPU that torch can use is here" in said or "--device cuda:99 does not work here" in said
