import json

import pytest

import sandbox
from plumbing.problems import BadInput, load_problems, read_problem

RECORD = {"id": "p1", "question": "Double each digit.", "examples": ["2 0 0 -> 4 0 0", "1 5 9 -> 2 0 8"]}


def test_an_example_is_a_test():
    problem = read_problem(RECORD)
    assert problem.tests == [{"input": "2 0 0\n", "output": "4 0 0\n"}, {"input": "1 5 9\n", "output": "2 0 8\n"}]
    assert sandbox.run_tests("print(*[int(v) * 2 % 10 for v in input().split()])", problem.tests).passed
    assert not sandbox.run_tests("print('4 0 0')", problem.tests).passed


@pytest.mark.parametrize("change", [
    {"examples": []}, {"examples": "1 -> 2"}, {"examples": [3]}, {"examples": ["1 2"]}, {"examples": ["1 -> 2 -> 3"]},
    {"tests": [{"input": "1\n", "output": "2\n"}]},
])
def test_bad_examples_are_refused_with_a_reason(change, tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps(RECORD) + "\n" + json.dumps(RECORD | {"id": "p2"} | change) + "\n")
    with pytest.raises(BadInput, match="line 2: .*examples"):
        load_problems(tmp_path / "p.jsonl")


def test_a_file_of_them_is_a_set_of_problems(tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps(RECORD) + "\n")
    assert [problem.id for problem in load_problems(tmp_path / "p.jsonl")] == ["p1"]


def test_other_records_are_what_they_were():
    test = {"input": "1\n", "output": "2\n"}
    assert read_problem({"id": "p", "question": "?", "tests": [test]}).tests == [test]
    with pytest.raises(ValueError, match="tests"):
        read_problem({"id": "p", "question": "?"})
