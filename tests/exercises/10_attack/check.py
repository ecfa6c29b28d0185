import importlib.util
import random
from pathlib import Path

import pytest

import sandbox

HERE = Path(__file__).resolve().parent
RIGHT = "print(sum(map(int, input().split())))"
SUMS = [{"input": "1 2\n", "output": "3\n"}, {"input": "2 2\n", "output": "4\n"}]


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unsolvable() -> list[dict]:
    """Tests whose outputs have nothing to do with their inputs; other ones each time."""
    return [{"input": f"{i}\n", "output": f"{random.getrandbits(64)}\n"} for i in range(3)]


RUNNERS = load("naive").RUNNERS


@pytest.mark.parametrize("name", RUNNERS)
def test_the_naive_runner_is_fooled_and_the_sandbox_is_not(name):
    assert (HERE / "attack.py").exists(), "write attack.py"
    code, tests = load("attack").ATTACKS[name], unsolvable()
    assert RUNNERS[name](code, tests), "the naive runner did not believe it"
    verdict = sandbox.run_tests(code, tests)
    assert not verdict.passed and verdict.failed_test == 0, "the sandbox believed it: tell us"
    assert sandbox.run_tests(RIGHT, SUMS).passed  # and is none the worse for it


@pytest.mark.parametrize("name", RUNNERS)
def test_the_naive_runners_know_right_from_wrong_if_no_program_cheats(name):
    """This one passes without your attack: a runner that believes every program would be no target."""
    assert RUNNERS[name](RIGHT, SUMS) and not RUNNERS[name]("print(3)", SUMS)
    assert not RUNNERS[name]("print(input(), 1 / 0)", SUMS)
