"""Public problem sets in small files of their shape: read rightly, judged rightly, and never executed by the reader."""
import base64
import builtins
import json
import os
import pickle
import zlib

import pytest

import sandbox
from data import BadInput, Problem, load_problems, sets, without_overlap


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def packed(text, protocol=4) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(text, protocol))).decode()


def case(given, wanted, kind="stdin"):
    return {"input": given, "output": wanted, "testtype": kind}


def live(name="a", **fields):
    """One LiveCodeBench record; its fields are strings that hold JSON."""
    return {
        "question_title": "t", "question_content": f"Print {name}.", "platform": "atcoder", "question_id": name,
        "contest_id": "c", "contest_date": "2025-02-08T00:00:00", "starter_code": "", "difficulty": "easy",
        "public_test_cases": json.dumps([case("1\n", "2\n")]), "private_test_cases": json.dumps([case("3\n", "4\n")]),
        "metadata": "{}",
    } | fields


def verdicts(problem: Problem, *programs: str) -> list[bool]:
    return [bool(sandbox.judge(program, problem.tests, timeout=10)) for program in programs]


# ------------------------------------------------------------------------------------------------------ LiveCodeBench


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_livecodebench_has_public_and_private_tests(tmp_path, protocol):
    """The public ones alone are the examples of the statement: a program that prints them would pass."""
    private = packed(json.dumps([case("5\n", "6\n")]), protocol)
    path = write(tmp_path / "a.jsonl", live("a"), live("b", private_test_cases=private, difficulty="hard"))
    first, second = load_problems(path)
    assert [test["input"] for test in first.tests] == ["1\n", "3\n"] and first.difficulty == "easy"
    assert [test["output"] for test in second.tests] == ["2\n", "6\n"] and second.difficulty == "hard"
    assert verdicts(second, "print(int(input()) + 1)", "print(2 if input() == '1' else 0)") == [True, False]


def test_livecodebench_functions_take_a_json_value_a_line(tmp_path):
    tests = json.dumps([case("[1, 2]\n3", "[4, 5]", "functional")])
    starter = "class Solution:\n    def add(self, nums, k):\n        "
    path = write(tmp_path / "a.jsonl", live(starter_code=starter, public_test_cases=tests, private_test_cases="[]",
                                            metadata='{"func_name": "add"}'))
    [problem] = load_problems(path)
    assert problem.tests == [{"fn_name": "add", "args": [[1, 2], 3], "expected": [4, 5]}]
    right = "class Solution:\n def add(self, nums, k): return tuple(n + k for n in nums)"  # a tuple counts as a list
    assert verdicts(problem, right, right.replace("+", "-")) == [True, False]


class Touch:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_hostile_pickle_executes_nothing(tmp_path):
    """pickle.loads of a downloaded file runs whatever its author liked."""
    mark = tmp_path / "touched"
    pickle.loads(pickle.dumps(Touch(mark)))
    assert mark.exists()  # so the control is one
    mark.rmdir()
    for value in (Touch(mark), [json.dumps([case("1", "2")])], b"[]"):
        path = write(tmp_path / "a.jsonl", live(private_test_cases=packed(value)))
        with pytest.raises(BadInput, match="line 1: .*private_test_cases"):
            load_problems(path)
    assert not mark.exists()


@pytest.mark.parametrize("private", ["!", base64.b64encode(b"no zlib").decode(), packed("not json")])
def test_private_tests_that_cannot_be_read_are_one_line(tmp_path, private):
    with pytest.raises(BadInput, match="line 1: "):
        load_problems(write(tmp_path / "a.jsonl", live(private_test_cases=private)))


def test_packed_tests_do_not_unpack_without_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(sets, "UNPACKED", 1 << 16)
    path = write(tmp_path / "a.jsonl", live(private_test_cases=packed(" " * (1 << 20))))
    with pytest.raises(BadInput, match="unpacks to more than"):
        load_problems(path)


def test_a_version_is_a_window_of_contest_dates(tmp_path, monkeypatch, capsys):
    """v6 is February to April 2025: a file that holds more must not make the evaluation another one."""
    dates = ("2025-01-31T23:59:59", "2025-02-01T00:00:00", "2025-04-30T23:59:59", "2025-05-01T00:00:00")
    path = write(tmp_path / "test6.jsonl", *(live(date, contest_date=date) for date in dates))
    monkeypatch.setattr(sets, "download", lambda name, chosen: [str(path)])
    assert [problem.id for problem in load_problems("livecodebench-v6")] == list(dates[1:3])
    assert "131" in str(sum(sets.PAPER["livecodebench-v6"].values())) and "in the paper" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- rStar-Coder


def rstar(name, question, inputs=("1\n",), outputs=("2\n",), **fields):
    return {"question_id": name, "question": question, "starter_code": "", "inputs": json.dumps(inputs),
            "outputs": json.dumps(outputs), "func_name": "", "class_name": ""} | fields


def test_rstar_keeps_one_of_each_statement_and_a_bounded_number_of_tests(tmp_path, capsys):
    many = [f"{i}\n" for i in range(80)]
    path = write(tmp_path / "a.jsonl", rstar("a", "Add one.", many, many), rstar("b", "add  ONE"),
                 rstar("c", "Broken.", outputs=()), rstar("d", "Broken.", inputs="{"), rstar("e", "Other."))
    problems = load_problems(path)
    assert [problem.id for problem in problems] == ["a", "e"] and len(problems[0].tests) == sets.KEPT_TESTS
    said = capsys.readouterr().err
    assert "1 problems that stand there already" in said and "2 problems with broken tests" in said
    assert [problem.id for problem in load_problems(path, limit=1)] == ["a"]


def test_parquet_is_read_or_its_package_named_in_one_line(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *rest: (_ for _ in ()).throw(ImportError(name))
                        if name.startswith("pyarrow") else real(name, *rest))
    with pytest.raises(BadInput, match="pip install pyarrow"):
        load_problems(path)
    monkeypatch.undo()
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([rstar("a", "One."), rstar("b", "Two.")]), path)
    assert [problem.id for problem in load_problems(path)] == ["a", "b"]


def test_without_the_network_there_is_a_way_out(monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(BadInput) as caught:
        load_problems("livecodebench-v6")
    message = str(caught.value)
    assert "no route" in message and '"tests"' in message and "\n" not in message


# -------------------------------------------------------------------------------------------------- HumanEval and MBPP

TWICE = {
    "task_id": "HE/0", "entry_point": "twice", "canonical_solution": "    return helper(x) + x\n",
    "prompt": "from math import inf\n\ndef helper(x):\n    return x\n\ndef twice(x: float) -> float:\n"
              '    """Twice x; of a negative number ValueError.\n    >>> twice(2)\n    4\n    """\n',
    "test": "def check(candidate):\n    assert abs(candidate(0.1) - 0.2) < 1e-9\n    assert candidate(inf) == inf\n"
            "    assert candidate([1]) == [1, 1]\n",
}
EVENS = {
    "task_id": 7, "text": "Write a function to keep the even numbers.", "test_setup_code": "",
    "code": "import math\ndef evens(xs):\n    return tuple(x for x in xs if x % 2 == 0)",
    "test_list": ["assert evens([1, 2, 4]) == (2, 4)", "assert evens([]) == ()"],
}


def test_humaneval_and_mbpp_take_the_canonical_solution_and_refuse_a_mutated_one(tmp_path):
    first, second = load_problems(write(tmp_path / "h.jsonl", TWICE)) + load_problems(write(tmp_path / "m.jsonl", EVENS))
    whole = TWICE["prompt"] + TWICE["canonical_solution"]
    assert verdicts(first, whole, whole.replace("+ x", "+ x + x"), whole.replace("+ x", "* 2.0")) == [True, False, False]
    assert verdicts(second, EVENS["code"], EVENS["code"].replace("== 0", "== 1")) == [True, False]
    assert "Twice x" in first.question and first.starter_code.endswith("def twice(x: float) -> float:")
    assert "evens([1, 2, 4])" in second.question and second.starter_code == "def evens(xs):"


@pytest.mark.parametrize("program", ["import os\nos._exit(0)", "raise SystemExit(0)", "def twice(x):\n import os\n os._exit(0)",
                                     "def evens(x):\n import sys\n sys.exit(0)", ""])
def test_an_early_exit_passes_no_asserts(tmp_path, program):
    for record in (TWICE, EVENS):
        [problem] = load_problems(write(tmp_path / "a.jsonl", record))
        assert verdicts(problem, program) == [False]


# --------------------------------------------------------------------------------------------------------- all of them


def test_a_broken_record_names_file_line_and_reason(tmp_path):
    """The user's own line is an error, not a problem fewer."""
    for record, reason in ((live(question_content=""), "question_content"), (TWICE | {"prompt": "def f("}, "line 2"),
                           (EVENS | {"test_list": []}, "test_list"), (live(public_test_cases="{"), "line 2")):
        path = write(tmp_path / "a.jsonl", live("first"), record)
        with pytest.raises(BadInput, match=reason) as caught:
            load_problems(path)
        assert "a.jsonl line 2" in str(caught.value)


def test_what_stands_in_the_evaluation_is_not_trained_on():
    """Copies differ in case, blanks and punctuation; two problems do not become one because both are all symbols."""
    train = [Problem(str(i), text, []) for i, text in enumerate(("Add  one!", "add two", "+-", "*/"))]
    kept, removed = without_overlap(train, [Problem("x", "ADD ONE.", []), Problem("y", "+-", [])])
    assert [problem.id for problem in kept] == ["1", "3"] and removed == 2
