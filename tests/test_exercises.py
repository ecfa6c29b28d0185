"""The exercises of the tutorial: each check fails on the code as it is, and passes on the solution that is kept.

An exercise is a folder tests/exercises/NN_name: task.md (what to do), check.py (pytest does not collect it by itself,
because its name does not begin with test_) and solution.patch. After a change of the code near it, make a patch anew:
change the code by hand as the patch says, `git diff -U2 > solution.patch`, and take the change back.
"""
import importlib
import io
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXERCISES = sorted(path.name for path in (ROOT / "tests" / "exercises").glob("[0-9]*"))
TUTORIAL = (ROOT / "tutorial.md").read_text(encoding="utf-8")
SECONDS = 180  # of a process on a busy machine; on an idle one it takes one to four, and all checks together twenty
# Each check needs a process with the modules of its tree, and importing torch takes longer than the check. So the
# processes are forks of a server that has imported what is not ours, and nothing else.
PRELOADED = ["pytest", "tqdm", "torch", "tokenizers", "safetensors.torch", "transformers.generation",
             "transformers.models.auto.modeling_auto", "transformers.models.qwen3.modeling_qwen3"]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(PRELOADED)


def copy_tree(folder: Path) -> Path:
    """What the checks need of the project, in a folder of its own."""
    tree = folder / "tree"
    nothing = shutil.ignore_patterns("__pycache__", "results")
    for name in ("data", "plumbing", "tests/exercises"):
        shutil.copytree(ROOT / name, tree / name, ignore=nothing)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tree)
    return tree


def apply(patch: Path, tree: Path) -> str:
    """Applies a patch; "" or, in words, why it does not apply. Lines around it may have moved, and one may differ."""
    command = ["patch", "-p1", "-F1", "--no-backup-if-mismatch", "-i", patch]
    if not shutil.which("patch"):
        command = ["git", "apply", "-C1", patch]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return "" if done.returncode == 0 else f"{patch} no longer applies: make it anew\n{done.stdout}{done.stderr}"


def check_here(tree: str, names: list[str], log: str) -> None:
    """Runs checks in this process, which imports from that tree and then ends with pytest's exit code."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = io.TextIOWrapper(open(1, "wb", 0, closefd=False), write_through=True)
    os.chdir(tree)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.dont_write_bytecode = True
    sys.path[:] = [tree] + [path for path in sys.path if not Path(path or ".").is_relative_to(ROOT)]
    ours = {path.stem for path in ROOT.glob("*.py")} | {"data", "plumbing"}
    assert not ours & sys.modules.keys(), "a module of the project was imported before the tree was"
    checks = [f"tests/exercises/{name}/check.py" for name in names]
    options = ["-q", "-rfE", "-p", "no:cacheprovider", "--import-mode=importlib", f"--rootdir={tree}"]
    code = importlib.import_module("pytest").main([*options, *checks])
    sys.stdout.flush()
    os._exit(int(code))


def check(tree: Path, names: list[str]) -> tuple[int, str]:
    """pytest's exit code for checks in a tree (0 passed, 1 failed, else they could not run) and what it printed."""
    log = tree.parent / "log"
    process = SERVER.Process(target=check_here, args=(str(tree), names, str(log)))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode, log.read_text(errors="replace") if log.exists() else ""


def failed(said: str) -> set[str]:
    """The exercises of which a check failed, by pytest's summary."""
    return set(re.findall(r"^FAILED tests/exercises/(\w+)/check.py::", said, flags=re.MULTILINE))


def test_each_check_fails_on_the_code_as_it_is(tmp_path):
    """An exercise that is solved already wastes somebody's weekend."""
    code, said = check(copy_tree(tmp_path), EXERCISES)
    assert code == 1 and set(EXERCISES) - failed(said) == set(), said


@pytest.mark.parametrize("name", EXERCISES)
def test_a_check_passes_on_the_solution(name, tmp_path):
    """An exercise that its own solution does not solve has no solution."""
    tree = copy_tree(tmp_path)
    why = apply(ROOT / "tests" / "exercises" / name / "solution.patch", tree)
    assert not why, why
    code, said = check(tree, [name])
    assert code == 0, said


def test_a_patch_that_no_longer_applies_says_so(tmp_path):
    tree = copy_tree(tmp_path)
    path = tree / "rank_prompt.py"
    path.write_text(path.read_text().replace("REWARDS = {", "PRICES = {"))
    patch = ROOT / "tests" / "exercises" / "01_reciprocal_rank" / "solution.patch"
    assert re.match(r".*01_reciprocal_rank/solution.patch no longer applies: make it anew\n.*rank_prompt.py",
                    apply(patch, tree), flags=re.DOTALL)


def test_an_exercise_is_whole():
    assert len(EXERCISES) >= 8
    for name in EXERCISES:
        folder = ROOT / "tests" / "exercises" / name
        task = (folder / "task.md").read_text(encoding="utf-8")
        for part in (r"^# \w", r"\n\*\*[^*]+\*\*.*Teaches: \w", r"\n\*\*(Change|Write)\*\* ", r"\n\*\*Expect\*\* "):
            assert re.search(part, task), (name, part)
        for target in re.findall(r"\]\(([^)#]+)\)", task):
            assert target.startswith("http") or (folder / target).exists(), (name, target)


def test_the_tutorial_lists_every_exercise():
    """With the command that checks it."""
    section = TUTORIAL.partition("\n## Exercises\n")[2]
    assert re.findall(r"^\| \[.*\]\(tests/exercises/(\w+)/task.md\) \|", section, flags=re.MULTILINE) == EXERCISES
    assert re.findall(r"`python -m pytest tests/exercises/(\w+)/check.py`", section) == EXERCISES
