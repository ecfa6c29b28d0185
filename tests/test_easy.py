"""The shipped easy problems: their solutions pass, slightly wrong ones fail, and no two problems are alike.

A test set that takes a wrong program teaches a judge the wrong thing, and nobody sees it in the figures.
"""
import ast
import copy
import inspect
import json
import random
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import dust  # noqa: E402
import easy_solutions  # noqa: E402
import sandbox  # noqa: E402
from plumbing.problems import load_problems, normalised  # noqa: E402

TRAIN, EVAL = load_problems("easy-train"), load_problems("easy-eval")
PROBLEMS = TRAIN + EVAL

# What a mutant has in place of an operator, a function or a method.
OTHER = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult,
}
OTHER_NAMES = {
    "min": "max", "max": "min", "any": "all", "all": "any", "sum": "max", "abs": "int", "set": "list", "str": "bin",
    "sorted": "list", "capitalize": "upper", "upper": "lower", "count": "find", "values": "keys",
}


def name_of(problem) -> str:
    """Return the name of the function that a problem asks for."""
    return problem.id.split("/")[1]


def solution(problem) -> str:
    """Return the source of the reference solution."""
    return inspect.getsource(getattr(easy_solutions, name_of(problem)))


def as_json(value) -> str:
    """Return a text that is the same for equal JSON values only: True is not 1, and a dictionary has no order."""
    return json.dumps(value, sort_keys=True)


def kinds(problem) -> list[type]:
    """Return the types of the arguments."""
    return [type(value) for value in problem.tests[0]["args"]]


def solves(one, other) -> bool:
    """Return whether the solution of a problem passes the tests of another problem. Runs in this process.

    A problem with arguments of other types counts as another one: a text that is doubled again and again, as if it were
    a number, fills the memory.
    """
    if one is other or kinds(one) != kinds(other):
        return False
    function = getattr(easy_solutions, name_of(one))
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.1)  # a number below 0 may be doubled for ever
        return all(as_json(function(*copy.deepcopy(test["args"]))) == as_json(test["expected"]) for test in other.tests)
    except (TypeError, ValueError, LookupError, AttributeError, ZeroDivisionError, TimeoutError):
        return False
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def changes(node: ast.AST) -> list[tuple]:
    """Return (field, new value) for each small mistake that can be made at this place of a program."""
    match node:
        case ast.Constant(value=bool(value)):
            return [("value", not value)]
        case ast.Constant(value=int(value)):
            return [("value", value + 1), ("value", value - 1)]
        case ast.Constant(value=str(value)):
            return [("value", value + "?")]
        case ast.Compare(ops=[first, *others]):
            return [("ops", [OTHER[type(first)](), *others])]
        case ast.BinOp(op=op) | ast.AugAssign(op=op) | ast.BoolOp(op=op):
            return [("op", OTHER[type(op)]())]
        case ast.Name(id=name) if name in OTHER_NAMES:
            return [("id", OTHER_NAMES[name])]
        case ast.Attribute(attr=name) if name in OTHER_NAMES:
            return [("attr", OTHER_NAMES[name])]
        case ast.Call(args=[first, second]):
            return [("args", [second, first])]
        case ast.Call(func=ast.Attribute(attr="split"), args=[]):
            return [("args", [ast.Constant(" ")])]
        case ast.Dict(values=[first, second]):
            return [("values", [second, first])]
        case ast.DictComp(value=value):
            return [("key", value)]
        case ast.UnaryOp(op=ast.USub()):
            return [("op", ast.UAdd())]
        case ast.Assign(targets=[ast.Subscript(slice=key)]):
            return [("value", key)]
        case ast.If():
            return [("test", ast.Constant(False))]
        case ast.comprehension(iter=ast.Name() as items):
            return [("iter", ast.Subscript(items, ast.Slice(ast.Constant(1)), ast.Load()))]
    return []


def mutants(code: str) -> list[str]:
    """Return the program with one small mistake in each."""
    found = []
    for place, node in enumerate(ast.walk(ast.parse(code))):
        for field, value in changes(node):
            tree = ast.parse(code)
            setattr(list(ast.walk(tree))[place], field, value)
            found.append(ast.unparse(ast.fix_missing_locations(tree)))
    return found


# ------------------------------------------------------------------------------------------------------- the problems


def test_solutions_pass_and_slightly_wrong_ones_fail():
    """Tests that a wrong program passes teach a judge that it is right. Two mutants of each solution; one must fail."""
    right = [(solution(problem), problem.tests) for problem in PROBLEMS]
    wrong = []
    for problem in PROBLEMS:
        found = mutants(solution(problem))
        wrong += [(problem, code) for code in random.Random(problem.id).sample(found, min(2, len(found)))]
    with sandbox.Pool() as pool:
        assert [problem.id for problem, passed in zip(PROBLEMS, pool.label(right)) if not passed] == []
        pool.timeout = 1.0  # some mutants run for ever
        passes = pool.label([(code, problem.tests) for problem, code in wrong])
    told_apart = {problem.id for (problem, _), passed in zip(wrong, passes) if not passed}
    assert {problem.id for problem in PROBLEMS} - told_apart == set()


def test_no_program_passes_that_does_not_look_at_its_arguments():
    """A program that returns a constant, or one of its arguments as it is, must not be right."""
    for problem in PROBLEMS:
        expected = [as_json(test["expected"]) for test in problem.tests]
        counts = Counter(expected)
        assert len(expected) >= 5 and len(counts) > 1, problem.id
        assert min(counts.values()) > 1 or not set(counts) <= {"true", "false"}, problem.id  # each answer twice
        for position in range(len(problem.tests[0]["args"])):
            assert [as_json(test["args"][position]) for test in problem.tests] != expected, problem.id


def test_no_two_problems_are_alike():
    """A training problem that stands in the evaluation under another name would look like a gain."""
    for different in (lambda p: normalised(p.question), name_of, lambda p: as_json([t["args"] for t in p.tests]),
                      renamed):
        values = Counter(different(problem) for problem in PROBLEMS)
        assert [value for value, count in values.items() if count > 1] == []

    def stop(*_):
        raise TimeoutError

    signal.signal(signal.SIGVTALRM, stop)
    assert [f"{one.id} solves {other.id}" for one in PROBLEMS for other in PROBLEMS if solves(one, other)] == []


def renamed(problem) -> str:
    """Return the solution with its names numbered in the order in which they come, and without the function's name."""
    tree = ast.parse(solution(problem))
    function, names = tree.body[0], {}
    function.name = "f"
    own = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    own |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.arg = names.setdefault(node.arg, f"v{len(names)}")
        elif isinstance(node, ast.Name) and node.id in own:
            node.id = names.setdefault(node.id, f"v{len(names)}")
    return ast.unparse(tree)


def test_the_two_halves_are_of_one_mix():
    """Else a model that is trained on one topic is measured on another."""
    for problems, count in ((TRAIN, 15), (EVAL, 5)):
        mix = Counter((problem.id.split("/")[0], problem.difficulty) for problem in problems)
        topics = ("numbers", "lists", "strings", "dictionaries")
        assert mix == {(topic, difficulty): count for topic in topics for difficulty in ("easy", "medium")}
        topics_of_the_first = {problem.id.split("/")[0] for problem in problems[:8]}
        assert topics_of_the_first == set(topics)  # with --limit, too


def test_a_problem_says_what_its_tests_ask():
    """The question shows the first test, the starter code has the solution's parameters, and "easy" is one line."""
    for problem in PROBLEMS:
        name, first = name_of(problem), problem.tests[0]
        tree = ast.parse(solution(problem)).body[0]
        head = f"{name}({ast.unparse(tree.args)})"
        assert problem.question.startswith(f"Write the Python function {head} that returns "), problem.id
        shown = f"{name}({', '.join(map(repr, first['args']))}) returns {first['expected']!r}."
        assert problem.question.endswith(f".\nFor example, {shown}"), problem.id
        assert problem.starter_code == f"def {head}:", problem.id
        assert {test["fn_name"] for test in problem.tests} == {name}
        assert all(len(test["args"]) == len(tree.args.args) for test in problem.tests)
        assert (problem.difficulty == "easy") == (len(tree.body) == 1), problem.id


def test_values_survive_json():
    """A tuple or a number as a key would come back from JSON as another value, and no program could ever be right."""
    for problem in PROBLEMS:
        for test in problem.tests:
            value = getattr(easy_solutions, name_of(problem))(*copy.deepcopy(test["args"]))
            assert json.loads(json.dumps(value)) == value and not isinstance(value, float), problem.id


# ---------------------------------------------------------------------------------------------------- a run with them


@pytest.fixture
def settings(llama, tmp_path) -> list[str]:
    """Return the options of a small run of the random Llama, with a token that is a program with all solutions."""
    program = Path(easy_solutions.__file__).read_text()
    shutil.copytree(llama["folder"] / "model", tmp_path / "model")
    for file in (tmp_path / "model").glob("token*.json"):
        file.write_text(file.read_text().replace(json.dumps("print(1)")[1:-1], json.dumps(program)[1:-1]))
    return [*llama["arguments"], "--model", str(tmp_path / "model"), "--train", "easy-train", "--eval", "easy-eval",
            "--limit", "16", "--eval-limit", "8", "--out", str(tmp_path / "run")]


def test_a_run_with_the_easy_problems_goes_from_sample_to_report(settings, tmp_path):
    assert dust.main(settings) == 0
    made = json.loads((tmp_path / "run" / "report.json").read_text())
    assert list(made["rows"]) == ["base", "trained_judge", "trained"] and list(made["slices"]) == ["easy", "medium"]
    assert 0 < made["rows"]["base"]["pass1"]["mean"] < 100


def test_the_probe_goes_on_where_it_was_stopped(settings, tmp_path, monkeypatch):
    """It takes an hour, so it must not begin anew after a stop in its warm-up or in its run."""
    from data import smollm2

    monkeypatch.setattr(sys, "argv", ["smollm2.py", *settings, "--save-every", "1"])
    update, calls = smollm2.grpo.update, []

    def stopped_twice(*args, **more):
        calls.append(1)
        if len(calls) in (4, 19):  # 3 of 16 steps of the warm-up are made; then 13 of it and 1 of 2 of the run
            raise OSError("no room")
        return update(*args, **more)

    monkeypatch.setattr(smollm2.grpo, "update", stopped_twice)
    with pytest.raises(OSError, match="no room"):
        smollm2.main()
    with pytest.raises(smollm2.BadInput, match="run has stopped, see above"):
        smollm2.main()
    smollm2.main()
    assert len(calls) == 16 + 2 + 2
    written = (tmp_path / "run" / "smollm2.md").read_text()
    assert written.startswith("# A first look") and written.count("## What came out") == 1
    assert "1. The form: refuted. Pair accuracy" in written and "\n3. pass@1: " in written


if __name__ == "__main__":  # all mutants: print those that no test tells from the solution; look whether one could
    jobs = [(code, problem.tests) for problem in PROBLEMS for code in mutants(solution(problem))]
    with sandbox.Pool(timeout=5) as pool:
        survivors = [code for (code, _), passed in zip(jobs, pool.label(jobs)) if passed]
    print("\n\n".join(survivors), f"\n{len(survivors)} of {len(jobs)}")
