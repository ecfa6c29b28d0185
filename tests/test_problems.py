"""Problems are read exactly, or refused with file, line and reason. Small files imitate the public sets."""
import base64
import builtins
import datetime
import decimal
import json
import os
import pickle
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest

import sandbox
from plumbing.problems import (HUB, LIVE, MAX_BYTES, BadInput, Problem, digest, load_problems, load_train_and_eval,
                               read_programs)


def write(path: Path, *records) -> Path:
    """Write a JSONL file of records. A record that is a text is written as it is."""
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    path.write_text("".join(line + "\n" for line in lines))
    return path


# --------------------------------------------------------------------------------------------- the project's format

GOOD = {"id": "a", "question": "Q", "tests": [{"input": "1\n", "output": "2\n"}]}


def test_problems_are_read_in_order_with_their_optional_fields(tmp_path):
    function = {"id": 7, "question": "Q2", "starter_code": "class Solution:", "difficulty": "hard",
                "tests": [{"fn_name": "f", "args": [1], "expected": None}]}
    first, second = load_problems(write(tmp_path / "x.jsonl", GOOD, "", function))
    assert (first.id, first.question, first.tests, first.starter_code) == ("a", "Q", GOOD["tests"], "")
    assert (second.id, second.starter_code, second.difficulty) == ("7", "class Solution:", "hard")


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"id": "b", ', "broken JSON"),
        ("[1, 2]", "not a JSON object"),
        (GOOD | {"id": "b", "tests": []}, '"tests" is missing or empty; every problem needs at least one test'),
        ({"id": "b", "question": "Q"}, '"tests" is missing'),
        ({"question": "Q", "tests": GOOD["tests"]}, '"id" is missing'),
        (GOOD | {"id": "b", "question": "\ud800"}, "surrogates not allowed"),
        (GOOD | {"id": "b", "question": " "}, '"question" is missing or empty'),
        (GOOD | {"id": "b", "tests": [{"input": "1"}]}, 'tests[0] needs "input" and "output"'),
        (GOOD | {"id": "b", "tests": [{"input": 1, "output": "2"}]}, 'tests[0] needs "input" and "output"'),
        (GOOD | {"id": "b", "tests": [GOOD["tests"][0], {"fn_name": "f", "args": 1, "expected": 2}]}, "tests[1] needs"),
        (GOOD | {"id": "b", "starter_code": 3}, '"starter_code" is not a string'),
        ({"id": "b", "question": "Q", "tests": [{"ouput": "1", "input": 2}]}, 'it has "ouput" (str), "input" (int)'),
        ({"id": "b", "question": "Q", "tests": [{"fn_name": "f()", "args": [], "expected": 1}]}, "only the name of the"),
        ({"id": "b", "question": "Q", "tests": [{"fn_name": "Solution.f", "args": [], "expected": 1}]}, "only the name"),
        (GOOD, 'id "a" stands in line 1 already'),
        ("[" * 100000, "line 3"),
    ],
)
def test_a_bad_line_is_reported_with_file_line_and_reason(tmp_path, line, reason):
    path = write(tmp_path / "x.jsonl", GOOD, "", line)
    with pytest.raises(BadInput) as error:
        load_problems(path)
    assert str(error.value).startswith(f"{path} line 3: ") and reason in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("code", [
    "f(1) == 2", "def check(f):\n    assert f(1) == 2\n", "import math\n'text'\nx = 3\n", "f(1) == 2 and f(2) == 3", "f", "pass",
])
def test_asserts_that_check_nothing_are_refused(tmp_path, code):
    """They pass every program that only defines the function, so all labels would be 1."""
    test = {"asserts": code, "entry_point": "f"}
    with pytest.raises(BadInput, match="checks nothing"):
        load_problems(write(tmp_path / "x.jsonl", GOOD | {"tests": [test]}))
    checked = code + {"def": "\ncheck(f)\n"}.get(code[:3], "\nassert f(1) == 2\n")
    assert load_problems(write(tmp_path / "x.jsonl", GOOD | {"tests": [test | {"asserts": checked}]}))


def test_a_field_with_a_typo_is_told_and_one_of_the_users_is_not(tmp_path, capsys):
    """Without the starter code the prompt asks for a program of another form, and every program is wrong."""
    typos = {"dificulty": "hard", "startercode": "def f():", "source": "me", "solution": "1"}
    assert load_problems(write(tmp_path / "x.jsonl", GOOD | typos, GOOD | typos | {"id": "b"}))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all(" is not read; is " in line for line in said)
    assert any('"dificulty" is not read; is "difficulty" meant?' in line for line in said)
    assert load_problems(write(tmp_path / "x.jsonl", GOOD | {"difficulty": "hard", "starter_code": ""}))
    assert capsys.readouterr().err == ""


def test_problems_in_two_sets_of_the_evaluation_are_counted(tmp_path, capsys):
    first, second = write(tmp_path / "a.jsonl", GOOD), write(tmp_path / "b.jsonl", GOOD, GOOD | {"id": "b", "question": "R"})
    args = SimpleNamespace(eval=f"{first},{second}", eval_limit=0, eval_only=True)
    assert len(load_train_and_eval(args)[1]) == 3
    assert f"1 problems of {second} stand in another set of --eval too" in capsys.readouterr().out


def test_mistakes_in_programs_are_told_before_a_run_has_a_folder(tmp_path):
    """A folder that holds the start of a failed run refuses the corrected command."""
    train, other = write(tmp_path / "a.jsonl", GOOD | {"id": 1}), write(tmp_path / "b.jsonl", GOOD | {"question": "R"})
    args = SimpleNamespace(train=str(train), eval=str(other), eval_limit=0, limit=0, eval_only=False)
    for lines, reason in (([{"problem_id": "1", "program": "print(1)"}], '"answer" or "code"'),
                          ([{"problem_id": "1"}], '"answer" or "code"'), ([{"id": "1", "code": "print(1)"}], "problem_id"),
                          ([{"problem_id": "2", "code": "print(1)"}], "0 programs for 0 of 1 problems")):
        args.programs = str(write(tmp_path / "p.jsonl", *lines))
        with pytest.raises(BadInput, match=reason):
            load_train_and_eval(args)
    args.programs = str(tmp_path / "gone.jsonl")
    with pytest.raises(BadInput, match="No such file or directory$"):
        load_train_and_eval(args)
    args.programs = str(write(tmp_path / "p.jsonl", {"problem_id": 1, "code": "print(1)"},
                              {"problem_id": "1", "answer": "", "code": None}))
    assert load_train_and_eval(args)
    assert read_programs(args.programs, load_problems(train)) == [("1", "", "print(1)"), ("1", "", None)]
    for field in ("code", "answer"):
        half = write(tmp_path / "p.jsonl", {"problem_id": 1, field: "\ud800"})
        with pytest.raises(BadInput, match="line 1: the program holds half of a surrogate pair"):
            read_programs(str(half), load_problems(train))


def test_a_missing_empty_or_binary_file_is_one_line(tmp_path):
    for content, reason in ((None, "No such file"), (b"", "holds no problems"), (b"\xff\xfe\x00", "not UTF-8")):
        path = tmp_path / "x.jsonl"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(BadInput, match=reason):
            load_problems(path)


# ------------------------------------------------------------------------------------ what tables make of a record

CALL = {"fn_name": "f", "args": [None, 1], "expected": None}
ASSERT = {"asserts": "assert f(1)", "entry_point": "f"}
STDIN = GOOD["tests"][0]
EMPTY = dict.fromkeys([*STDIN, *CALL, *ASSERT])  # a test of a table has the fields of all forms


def parquet_file(path: Path, rows) -> Path:
    """Write a Parquet file of rows, or of a table. Arrow fills the fields that a row does not have with null."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows) if isinstance(rows, list) else rows, path)
    return path


@pytest.mark.parametrize("null", [None, float("nan")])
def test_null_fields_count_as_left_out(tmp_path, null):
    """Tools that write tables put null or NaN for what a record does not have; they were read as values."""
    fields = {"starter_code": null, "difficulty": null, "question_content": null, "test_list": null, "inputs": null}
    tests = [dict.fromkeys(EMPTY, null) | test for test in (STDIN, CALL, ASSERT)]
    [problem] = load_problems(write(tmp_path / "x.jsonl", GOOD | fields | {"tests": tests}))
    assert problem == Problem("a", "Q", [STDIN, CALL, ASSERT])
    for name in ("id", "question", "tests"):
        with pytest.raises(BadInput, match=f'"{name}" is missing'):
            load_problems(write(tmp_path / "x.jsonl", GOOD | {name: null}))
    with pytest.raises(BadInput, match=r"tests\[0\] needs"):  # null is the value of "expected" only if it is there
        load_problems(write(tmp_path / "x.jsonl", GOOD | {"tests": [{"fn_name": "f", "args": [1]}]}))


def test_empty_texts_of_a_table_do_not_decide_the_form_of_a_test(tmp_path):
    blank = dict.fromkeys(EMPTY, "")
    tests = [blank | STDIN, blank | CALL, blank | ASSERT]
    [problem] = load_problems(write(tmp_path / "x.jsonl", GOOD | {"tests": tests}))
    assert problem.tests == [STDIN, CALL, ASSERT]
    for broken in (blank | CALL | {"args": None}, blank | ASSERT | {"entry_point": 3}, blank | CALL | {"fn_name": 3}):
        with pytest.raises(BadInput, match=r"tests\[0\] needs"):  # not a program that passes by printing nothing
            load_problems(write(tmp_path / "x.jsonl", GOOD | {"tests": [broken]}))


def test_public_records_with_nulls_are_read_as_those_without(tmp_path, capsys):
    """Rows of rStar-Coder without a class name were left out, with a message about another class."""
    bare = seed(1, func_name="f", class_name=None, starter_code=None, inputs="[[1]]", outputs="[null]")
    path = write(tmp_path / "x.jsonl", bare, seed(2, func_name=None, class_name=None), seed(3, inputs=None),
                 live(4, starter_code=None, metadata=None, private_test_cases=None, difficulty=None),
                 MBPP[1] | {"test_setup_code": None, "text": None}, MBPP[0] | {"test_imports": None})
    first, second, third, *others = load_problems(path)
    assert first == Problem("seed_1", "Add, 1.", [{"fn_name": "f", "args": [1], "expected": None}])
    assert second.tests == third.tests == [{"input": "1 2\n", "output": "3\n"}] and len(others) == 2
    assert capsys.readouterr().err == f"{path}: left out 1 problems with broken tests\n"
    with pytest.raises(BadInput, match='"id" is missing'):
        load_problems(write(path, MBPP[0] | {"task_id": None}))


def test_the_projects_format_is_read_from_parquet(tmp_path):
    """Arrow fills the tests of one form with nulls for the fields of the others, and no such file was accepted."""
    rows = [GOOD | {"id": "a", "starter_code": "s"}, GOOD | {"id": "b", "tests": [ASSERT, STDIN]},
            GOOD | {"id": "c", "tests": [CALL | {"args": [1, None], "expected": 2}, CALL | {"args": []}]}]
    first, second, third = load_problems(parquet_file(tmp_path / "x.parquet", rows))
    assert (first, second.tests) == (Problem("a", "Q", [STDIN], "s"), [ASSERT, STDIN])
    assert third.tests == rows[2]["tests"] and second.starter_code == ""


@pytest.mark.parametrize("tests", [
    json.dumps([STDIN, CALL | {"args": [1, "a", [None]]}]),
    [STDIN, {"fn_name": "f", "args": '[1, "a", [null]]', "expected": "null"}],
    {"input": ["1\n", None], "output": ["2\n", None], "fn_name": [None, "f"], "args": [None, '[1, "a", [null]]'],
     "expected": [None, None], "asserts": None},
    [{name: value.encode() for name, value in STDIN.items()},
     {"fn_name": b"f", "args": b'[1, "a", [null]]', "expected": b"null"}],
])
def test_tests_of_a_table_may_be_json_texts_columns_or_bytes(tmp_path, tests):
    """One column holds one type, so arguments of several types can stand there only as a JSON text."""
    path = parquet_file(tmp_path / "x.parquet", [GOOD | {"question": b"Q", "tests": tests}])
    [problem] = load_problems(path)
    assert problem == Problem("a", "Q", [STDIN, CALL | {"args": [1, "a", [None]]}])


@pytest.mark.parametrize("columns", [False, True])
def test_a_null_of_a_table_that_may_stand_for_a_missing_key_is_refused(tmp_path, columns):
    """{"a": 1} and {"b": 1} in one column are {"a": 1, "b": null} and so on: no program would return these."""
    tests = [{"fn_name": "f", "args": [key], "expected": {key: 1}} for key in "ab"]
    as_text = json.dumps([tests[0] | {"expected": {"a": None}}])
    path = parquet_file(tmp_path / "x.parquet", [GOOD | {"tests": as_text}])
    assert load_problems(path)[0].tests[0]["expected"] == {"a": None}
    tests = {name: [test[name] for test in tests] for name in tests[0]} if columns else tests
    with pytest.raises(BadInput, match="x.parquet row 1: .*write a JSON text instead$"):
        load_problems(parquet_file(path, [GOOD | {"tests": tests}]))
    same = {"fn_name": "f", "args": [{"a": 1}], "expected": {"a": 1}}
    assert load_problems(parquet_file(path, [GOOD | {"tests": [same, STDIN]}]))[0].tests == [same, STDIN]


def test_a_map_of_a_table_is_refused_because_no_program_returns_its_pairs(tmp_path):
    """DuckDB and Arrow keep an object with many keys as a map, and pyarrow reads that as a list of pairs."""
    pyarrow = pytest.importorskip("pyarrow")
    fields = {"fn_name": pyarrow.string(), "args": pyarrow.list_(pyarrow.int64()),
              "expected": pyarrow.map_(pyarrow.string(), pyarrow.int64())}
    tests = pyarrow.array([[CALL | {"args": [1], "expected": [("a", 1)]}]], pyarrow.list_(pyarrow.struct(fields)))
    path = parquet_file(tmp_path / "x.parquet", pyarrow.table({"id": ["a"], "question": ["Q"], "tests": tests}))
    with pytest.raises(BadInput, match="x.parquet row 1: .*write a JSON text instead$"):
        load_problems(path)


@pytest.mark.parametrize("tests", [{"input": "1\n", "output": "2\n"}, {"input": {"0": "1"}, "output": {"0": "2"}}])
def test_one_object_in_place_of_the_list_of_tests_is_refused(tmp_path, tests):
    """Two texts of one length were read as two columns, and each pair of their characters as a test."""
    for value in (tests, json.dumps(tests)):
        with pytest.raises(BadInput, match='line 1: "tests" is one object'):
            load_problems(write(tmp_path / "x.jsonl", GOOD | {"tests": value}))


@pytest.mark.parametrize("tests, reason", [
    ("[{", "broken JSON"), ("", '"tests" is missing'), ('{"input": ["1"], "output": []}', "zip"),
    ([{"fn_name": "f", "args": "[1", "expected": "1"}], r"tests\[0\] .*broken JSON"),
    ([{"fn_name": "f", "args": "1", "expected": "1"}], r"tests\[0\] needs"),
])
def test_broken_json_inside_of_a_record_is_one_line_with_its_place(tmp_path, tests, reason):
    with pytest.raises(BadInput, match=f"x.jsonl line 2: .*{reason}"):
        load_problems(write(tmp_path / "x.jsonl", GOOD, GOOD | {"id": "b", "tests": tests}))


def test_a_byte_order_mark_is_no_part_of_the_first_record(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n")
    assert load_problems(path) == [Problem("a", "Q", [STDIN])]


# ------------------------------------------------------------------------------------ values that are hard to judge


@pytest.mark.parametrize("sign, length", [(1, 5000), (-1, 20_000), (1, 100_000)])
def test_integers_of_any_reasonable_length_are_read_everywhere(tmp_path, sign, length):
    """Python's int() refuses more than 4,300 digits, and one such integer refused the whole file."""
    number, digits = sign * (10 ** (length - 1) + 7), "-" * (sign < 0) + "1" + "0" * (length - 2) + "7"
    cases = f'[{{"input": "{digits}", "output": "[{digits}]"}}]'
    call = '{"fn_name": "f", "args": [%s], "expected": [%s]}' % (digits, digits)
    path = write(tmp_path / "x.jsonl", json.dumps(GOOD).replace(json.dumps(STDIN), call),
                 seed(2, func_name="f", inputs=f"[[{digits}]]", outputs=f"[[{digits}]]"),
                 live(3, public_test_cases=cases, private_test_cases=pack(cases), metadata='{"func_name": "f"}'))
    tests = [test for problem in load_problems(path) for test in problem.tests]
    assert len(tests) == 4 and all(test["args"] == [number] == test["expected"] for test in tests)
    assert sandbox.run_tests("def f(x): return [x]", tests) and not sandbox.run_tests("def f(x): return [x + 1]", tests)
    first, again = load_problems(path), load_problems(path)
    assert digest(first) == digest(again)  # every run needs it; it was made of str(), which refuses such integers
    again[0].tests[0]["args"][0] += 1
    assert digest(first) != digest(again)


def test_an_integer_that_would_take_minutes_to_read_is_refused(tmp_path):
    """Reading takes time that grows with the square of the length: 10 million digits would take hours."""
    digits = "1" * 10_000_000
    call = '{"fn_name": "f", "args": [1], "expected": %s}' % digits
    with pytest.raises(BadInput, match="line 1: an integer has more than 100,000 digits"):
        load_problems(write(tmp_path / "x.jsonl", json.dumps(GOOD).replace(json.dumps(STDIN), call)))


def nest(depth: int, form: str) -> str:
    """Return the JSON of a value with lists or objects in each other."""
    return {"list": "[" * depth + "]" * depth, "object": '{"a":' * depth + "1" + "}" * depth}[form]


@pytest.mark.parametrize("expected", [
    nest(600, "list"), nest(600, "object"), nest(102, "object"), "NaN", '"' + "x" * (16 << 20) + '"',
], ids=["deep list", "deep object", "a bit too deep", "NaN", "long"])
def test_an_expected_value_that_no_answer_can_match_is_refused_at_loading(tmp_path, expected):
    """It ended a run in the middle of labelling with a RecursionError, or made every program wrong."""
    call = '{"fn_name": "f", "args": [1], "expected": %s}' % expected
    broken = json.dumps(GOOD | {"id": "b"}).replace(json.dumps(STDIN), call)
    with pytest.raises(BadInput, match='x.jsonl line 2: tests.0. cannot be used: "expected" ') as error:
        load_problems(write(tmp_path / "x.jsonl", GOOD, broken))
    assert len(str(error.value)) < 300
    row = seed(1, func_name="f", inputs="[[1]]", outputs=f"[{expected}]")
    assert [problem.id for problem in load_problems(write(tmp_path / "x.jsonl", row, seed(2)))] == ["seed_2"]


@pytest.mark.parametrize("form", ["list", "object"])
def test_the_deepest_expected_value_that_is_read_can_be_compared(tmp_path, form):
    """A thread has less room for calls than the loader, and Python 3.10 needs two calls for one list."""
    call = '{"fn_name": "f", "args": [%s], "expected": %s}' % (nest(400, form), nest(100, form))
    [problem] = load_problems(write(tmp_path / "x.jsonl", json.dumps(GOOD).replace(json.dumps(STDIN), call)))
    program = "def f(x):\n for _ in range(300):\n  [x] = x.values() if isinstance(x, dict) else x\n return x"
    with sandbox.Pool(1) as pool:
        assert pool.label([(program, problem.tests), ("def f(x): return x", problem.tests)]) == [True, False]


@pytest.mark.parametrize("fields", [
    {"args": [decimal.Decimal("1.5")]}, {"args": [datetime.date(2025, 1, 1)]}, {"expected": decimal.Decimal("1.5")},
    {"expected": [datetime.datetime(2025, 1, 1)]},
])
def test_values_of_tables_that_are_no_json_are_refused_at_loading(tmp_path, fields):
    test = {"fn_name": "f", "args": [], "expected": 1} | fields
    path = parquet_file(tmp_path / "x.parquet", [GOOD | {"tests": [test]}])
    with pytest.raises(BadInput, match=r"x.parquet row 1: tests\[0\] cannot be used: "):
        load_problems(path)


@pytest.mark.parametrize("test", [
    {"input": "\ud800", "output": ""}, {"input": "", "output": "\ud800"}, {"asserts": "-" * 200_000 + "1"},
])
def test_texts_that_cannot_be_passed_on_are_refused_at_loading(tmp_path, test):
    with pytest.raises(BadInput, match=r"x.jsonl line 1: tests\[0\] cannot be used: "):
        load_problems(write(tmp_path / "x.jsonl", GOOD | {"tests": [test]}))


def test_an_expected_output_that_no_program_may_print_is_refused_at_loading(tmp_path):
    """The sandbox ends a program at 16 MB (bytes, not characters) of output, so every program was wrong."""
    test = STDIN | {"output": "\u00e9" * (8 << 20)}
    with pytest.raises(BadInput, match='line 1: an "output" is longer than the 16 MB that a program may print'):
        load_problems(write(tmp_path / "x.jsonl", GOOD | {"tests": [STDIN, test]}))


# --------------------------------------------------------------------------------------------------- the public sets


def pack(value) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def live(number: int = 1, **fields) -> dict:
    case = {"input": "1 2\n", "output": "3\n", "testtype": "stdin"}
    return {"question_title": "Sum", "question_content": f"Add, {number}.", "platform": "atcoder", "contest_id": "c",
            "question_id": f"q{number}", "contest_date": "2025-02-08T00:00:00", "starter_code": "",
            "difficulty": "easy",
            "public_test_cases": json.dumps([case]), "private_test_cases": pack(json.dumps([case])),
            "metadata": "{}"} | fields


def seed(number: int = 1, **fields) -> dict:
    return {"question_id": f"seed_{number}", "question": f"Add, {number}.", "starter_code": "",
            "inputs": '["1 2\\n"]', "outputs": '["3\\n"]', "is_synthesized": "[0]", "test_case_type": "",
            "func_name": "", "class_name": ""} | fields


# ------------------------------------------------------------------------------------------------------ LiveCodeBench


def test_livecodebench_rows_keep_all_tests_of_both_kinds(tmp_path):
    """Most tests are private. Without these, nearly every program would pass."""
    calls = [{"input": '[1, 2]\n"a"', "output": "[3, null]", "testtype": "functional"}]
    function = live(2, starter_code="class Solution:", difficulty="hard", public_test_cases=json.dumps(calls),
                    private_test_cases=json.dumps(calls), metadata='{"func_name": "go"}')
    stdin, functional = load_problems(write(tmp_path / "x.jsonl", live(), function))
    assert stdin == Problem("q1", "Add, 1.", [{"input": "1 2\n", "output": "3\n"}] * 2, "", "easy")
    assert functional.tests == [{"fn_name": "go", "args": [[1, 2], "a"], "expected": [3, None]}] * 2
    assert (functional.starter_code, functional.difficulty) == ("class Solution:", "hard")
    assert sandbox.run_tests("class Solution:\n def go(self, a, b): return (3, None)", functional.tests)


class Touch:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("make", [
    lambda path: Touch(path), lambda path: ["[]", Touch(path)], lambda path: {Touch(path): 1},
])
def test_a_hostile_pickle_executes_nothing(tmp_path, make):
    """The private tests are pickled. A plain pickle.loads would run any code that the file contains."""
    packed = pack(make(tmp_path / "made"))
    with pytest.raises(BadInput) as error:
        load_problems(write(tmp_path / "x.jsonl", live(), live(2, private_test_cases=packed)))
    assert str(error.value).startswith(f"{tmp_path / 'x.jsonl'} line 2: ") and "\n" not in str(error.value)
    assert "private_test_cases" in str(error.value) and not (tmp_path / "made").exists()
    pickle.loads(zlib.decompress(base64.b64decode(packed)))
    assert (tmp_path / "made").exists(), "this pickle does no harm to a bare loads either"


@pytest.mark.parametrize("packed, reason", [
    ("%%%", "neither JSON nor packed"), (base64.b64encode(b"abc").decode(), "neither JSON nor packed"),
    (pack(b"[]"), "no plain text"), (pack(builtins.eval), "pickle that is no"), (pack(["[]"]), "no plain text"),
    (base64.b64encode(zlib.compress(b"\x80\x04.")).decode(), "not one text"), (pack("[{"), "line 1: "),
    (base64.b64encode(zlib.compress(b"r\xff\xff\xff\x7f")).decode(), "line 1: "),
    (pack("x" * (3 << 20)), "more than 1 MB"),
    (pack('[{"input": "1"}]'), "of another form"),
])
def test_broken_private_tests_are_one_clear_line(tmp_path, monkeypatch, packed, reason):
    monkeypatch.setattr("plumbing.problems.MAX_UNPACKED", 1 << 20)
    with pytest.raises(BadInput, match=reason) as error:
        load_problems(write(tmp_path / "x.jsonl", live(private_test_cases=packed)))
    assert str(error.value).startswith(f"{tmp_path / 'x.jsonl'} line 1: ") and "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------------- rStar-Coder


def test_rstar_is_deduplicated_capped_and_counted(tmp_path, capsys):
    """The release has several rows for one problem, rows with up to a gigabyte of tests, and some broken rows."""
    many = json.dumps([str(i) for i in range(200)])
    large = json.dumps(["x" * (MAX_BYTES + 1), "1"])
    function = seed(3, func_name="add", class_name="Solution", inputs="[[1, 2]]", outputs="[3]")
    path = write(
        tmp_path / "x.jsonl", seed(1, inputs=many, outputs=many), seed(9, question=" add 1"), seed(1, question="Other"),
        seed(2, inputs='["1'), seed(2, inputs='["1", "2"]'), seed(2, inputs='"12"', outputs='"12"'),
        seed(2, inputs="[1]"), function, seed(4, inputs=large, outputs='["1", "1"]'),
        seed(5, inputs=json.dumps([json.loads(large)[0]])),
        seed(6, func_name="f", class_name="Other", inputs="[[1]]", outputs="[1]"))
    first, second, third = load_problems(path)
    assert (first.id, second.id, third.id) == ("seed_1", "seed_3", "seed_4")
    assert [test["input"] for test in first.tests] == [str(i) for i in range(50)]
    assert second.tests == [{"fn_name": "add", "args": [1, 2], "expected": 3}]
    assert third.tests == [{"input": "1", "output": "1"}]
    said = capsys.readouterr().err.splitlines()
    assert sorted(said) == sorted(f"{path}: left out {text}" for text in (
        "2 problems that repeat earlier ones", "4 problems with broken tests",
        "1 problems without a test that is small enough", "1 problems with a class that is not named Solution"))
    with pytest.raises(BadInput, match="that can be used"):
        load_problems(write(path, seed(2, inputs="[")))
    path.write_text(json.dumps(seed()) + '\n{"question_id')  # the release has no such line, so it is not left out
    with pytest.raises(BadInput, match="line 2: broken JSON"):
        load_problems(path)


@pytest.mark.parametrize("inputs, outputs, program", [
    ([["21"]], ["12"], "def f(x): return x[::-1]"), ([["21"]], [12], "def f(x): return int(x[::-1])"),
    (["21"], ["12"], "def f(x): return int(str(x)[::-1])"), (['"21"'], ['"12"'], "def f(x): return x[::-1]"),
    ([["a", [1]]], ["null"], "def f(x, y): return 'null'"), (["1\n2"], [3], "def f(x, y): return x + y"),
])
def test_both_sides_of_a_functional_row_are_read_the_same_way(tmp_path, inputs, outputs, program):
    """A result was parsed as JSON even where the arguments were plain lists: the text "12" became the number."""
    row = seed(func_name="f", inputs=json.dumps(inputs), outputs=json.dumps(outputs))
    [problem] = load_problems(write(tmp_path / "x.jsonl", row))
    assert sandbox.run_tests(program, problem.tests) and not sandbox.run_tests("def f(*x): return x", problem.tests)


@pytest.mark.parametrize("inputs, outputs", [
    (["2\n7"], ["5"]), ([[2, 7]], [5]), (["[2, 7]"], ["5"]), ([[[2, 7]]], [5]), (['{"a": 2, "b": 7}'], ["5"]),
    ([{"b": 7, "a": 2}], [5]), ([[{"b": 7, "a": 2}]], [5]),
])
@pytest.mark.parametrize("starter", ["class Solution:\n    def f(self, a: int, b: List[int]) -> int:", "def f(a, b):\n"])
def test_arguments_in_one_value_are_told_apart_by_the_starter_code(tmp_path, inputs, outputs, starter):
    """As one argument, a list or an object of all of them, no program could pass, and nothing would say so."""
    row = seed(func_name="f", starter_code=starter, inputs=json.dumps(inputs), outputs=json.dumps(outputs))
    [problem] = load_problems(write(tmp_path / "x.jsonl", row))
    assert problem.tests == [{"fn_name": "f", "args": [2, 7], "expected": 5}]


@pytest.mark.parametrize("given, args", [('{"x": 1}', [{"x": 1}]), ("[2, 7]", [[2, 7]]), ('{"d": [1]}', [[1]])])
def test_one_parameter_takes_a_list_or_an_object(tmp_path, given, args):
    row = seed(func_name="f", starter_code="def f(d):", inputs=json.dumps([given]), outputs='["1"]')
    assert load_problems(write(tmp_path / "x.jsonl", row))[0].tests == [{"fn_name": "f", "args": args, "expected": 1}]


def test_arguments_that_do_not_fit_the_starter_code_are_left_out_and_counted(tmp_path, capsys):
    row = seed(1, func_name="f", starter_code="def f(self, a, b):", inputs='["1"]', outputs='["1"]')
    assert [one.id for one in load_problems(write(tmp_path / "x.jsonl", row, seed(2)))] == ["seed_2"]
    assert "1 problems whose tests do not fit the parameters of the starter code" in capsys.readouterr().err
    for code in ("def f(a, b, c=1):", "def f(a, *b):", "def f(a, *, b=1):", "def f(a, **b):", "def f(a, /, b):", "# def f(a):",
                 "class Solution:\n    @classmethod\n    def f(cls, a, b):", "def f((a)):", "def f(\0):"):
        unsure = seed(1, func_name="f", starter_code=code, inputs='["1\\n2"]', outputs='["1"]')
        assert load_problems(write(tmp_path / "x.jsonl", unsure))[0].tests[0]["args"] == [1, 2], code


def test_parquet_is_read_a_few_rows_at_a_time(tmp_path):
    """A file of gigabytes was once read completely for its first problems. Here reading the later rows would fail."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "x.parquet"
    rows = [seed(i, starter_code=None) for i in range(400)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=40, compression="gzip")
    problems = load_problems(path)
    assert len(problems) == 400 and problems[3] == Problem("seed_3", "Add, 3.", [{"input": "1 2\n", "output": "3\n"}])
    assert len(load_problems(path, limit=7)) == 7
    start = parquet.ParquetFile(path).metadata.row_group(2).column(0).dictionary_page_offset
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(b"\xff" * 200)
    assert load_problems(path, limit=80) == problems[:80]
    with pytest.raises(BadInput, match="^cannot read .* after row [0-9]+: [^\n]+$"):
        load_problems(path)
    path.write_bytes(b"no Parquet")
    with pytest.raises(BadInput, match="^cannot read .* after row 0: [^\n]+$"):
        load_problems(path)


# ------------------------------------------------------------------------------------- HumanEval, MBPP: asserts judge

HUMANEVAL = [
    {"task_id": "T/0", "entry_point": "mean_gap",
     "prompt": "from typing import List\nimport math\n\n\ndef mean_gap(xs: List[float]) -> float:\n"
               '    """ Mean distance of neighbours.\n    >>> mean_gap([1.0, 2.5])\n    1.5\n    """\n',
     "canonical_solution": "    if len(xs) < 2:\n        raise ValueError('too few')\n"
                           "    return sum(abs(a - b) for a, b in zip(xs, xs[1:])) / (len(xs) - 1)\n",
     "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert abs(candidate([0.0, 0.1, 0.3]) - 0.15) < 1e-6\n"
             "    assert math.isclose(candidate([1.0, 2.5]), 1.5)\n    try:\n        candidate([1.0])\n"
             "    except ValueError:\n        pass\n    else:\n        assert False\n\n"},
    {"task_id": "T/1", "entry_point": "unroll",
     "prompt": "def roll(s: str):\n    \"\"\"\n    The last letter first.\n    \"\"\"\n    return s[-1:] + s[:-1]\n\n\n"
               "def unroll(s: str):\n    import math\n    \"\"\"\n    Undoes roll.\n    \"\"\"\n",
     "canonical_solution": "    return s[1:] + s[:1]\n",
     "test": "def check(candidate):\n    for text in ('abc', '', 'xy'):\n"
             "        assert candidate(roll(text)) == text\n"},
]
MBPP = [
    {"task_id": 7, "text": "Write a function to find the pairs of two lists.", "test_setup_code": "",
     "code": "import math\ndef sum(a, b=()):\n    return tuple(zip(a, b)), math.inf", "challenge_test_list": [],
     "test_list": ["assert sum([1, 2], 'ab') == (((1, 'a'), (2, 'b')), math.inf)",
                   "assert sum([]) == ((), math.inf)"]},
    {"task_id": 8, "prompt": "Write a function for the gcd.", "test_imports": ["import random"],
     "code": "def gcd(a, b):\n    return gcd(b, a % b) if b else a\ndef half(x):\n    return x / 2",
     "test_list": ["assert gcd(4, 6) == 2", "assert gcd(0, random.choice([5])) == 5", "assert half(gcd(9, 6)) == 1.5"]},
]


def test_canonical_solutions_pass_and_mutated_ones_fail(tmp_path):
    files = write(tmp_path / "h.jsonl", *HUMANEVAL), write(tmp_path / "m.jsonl", *MBPP)
    problems = [problem for path in files for problem in load_problems(path)]
    codes = [row["prompt"] + row["canonical_solution"] for row in HUMANEVAL] + [row["code"] for row in MBPP]
    wrong = [codes[0].replace("raise ValueError", "return ValueError"), codes[0].replace("abs(a", "(a"),
             codes[1].replace("s[1:] + s[:1]", "s[:1] + s[1:]"), codes[2].replace("tuple", "list"),
             codes[3].replace("else a", "else 1"), codes[3].replace("gcd", "other")]
    with sandbox.Pool(2) as pool:
        assert pool.label([(code, problem.tests) for code, problem in zip(codes, problems)]) == [True] * 4
        tests = [problems[i].tests for i in (0, 0, 1, 2, 3, 3)]
        assert pool.label(list(zip(wrong, tests))) == [False] * 6
        exits = [("import os\nos._exit(0)", problem.tests) for problem in problems]
        cheat = "def roll(s): return ''\ndef unroll(s): return next(t)\nt = iter(('abc', '', 'xx'))"
        assert pool.label([*exits, (cheat, problems[1].tests)]) == [False] * 5


def test_what_the_model_reads_of_assert_style_problems(tmp_path):
    """The judge reads only the question, so it must hold the task. The generator needs the name that is called."""
    first, second = load_problems(write(tmp_path / "h.jsonl", *HUMANEVAL))
    assert first.question.startswith("Write the Python function mean_gap.\n\nMean distance of neighbours.\n>>> mean")
    assert first.starter_code.endswith("import math\n\n\ndef mean_gap(xs: List[float]) -> float:")
    assert second.question.endswith("\n\nUndoes roll.")
    assert second.starter_code.endswith("unroll(s: str):\n    import math")
    first, second = load_problems(write(tmp_path / "m.jsonl", *MBPP))
    assert (first.id, first.starter_code) == ("mbpp/7", "def sum(a, b=()):")
    assert first.question.endswith(f"lists.\nFor example: {MBPP[0]['test_list'][0]}")
    assert "for the gcd" in second.question


def test_mbpp_problems_on_objects_are_left_out_and_counted(tmp_path, capsys):
    """Only plain values pass between the asserts and the program, so asserts on objects could never succeed."""
    objects = MBPP[0] | {"code": "class P:\n    pass\ndef f(p):\n    return 1", "test_list": ["assert f(P()) == 1"]}
    path = write(tmp_path / "m.jsonl", objects, MBPP[1])
    assert [problem.id for problem in load_problems(path)] == ["mbpp/8"]
    assert capsys.readouterr().err == f"{path}: left out 1 problems whose asserts need objects of the program\n"


@pytest.mark.parametrize("record, reason", [
    (HUMANEVAL[0] | {"prompt": "def mean_gap(:"}, "line 1: invalid syntax"),
    (HUMANEVAL[0] | {"entry_point": "other"}, "has no function other"),
    (HUMANEVAL[0] | {"test": None}, '"test" is missing'), (HUMANEVAL[0] | {"test": "assert ("}, "no Python"),
    (MBPP[0] | {"test_list": []}, "not a list of asserts"),
    (MBPP[0] | {"test_imports": "import math"}, "test_imports"),  # taken for a list, each letter would be a line
    (MBPP[0] | {"code": "def g(): pass"}, 'no function of "code"'),
    (live(question_id=""), '"question_id" is missing'), (live(metadata="[]"), "of another form"),
    ({"id": "a", "question": "Q", "tests": [{"asserts": "assert f(", "entry_point": "f"}]}, "no Python"),
    ({"id": "a", "question": "Q", "tests": [{"asserts": 3}]}, 'needs "asserts"'),
])
def test_a_broken_record_of_a_known_format_is_one_line(tmp_path, record, reason):
    with pytest.raises(BadInput, match=reason) as error:
        load_problems(write(tmp_path / "x.jsonl", record))
    assert str(error.value).startswith(f"{tmp_path / 'x.jsonl'} line 1: ") and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------- sets by name


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Replace the Hub by a folder. Return the folder and the list of the files that were asked for."""
    import huggingface_hub

    asked = []

    def fetch(repository, file, repo_type):
        asked.append(file)
        return str(tmp_path / repository / file)

    def listed(self, repository, repo_type):
        files = [str(path.relative_to(tmp_path / repository)) for path in (tmp_path / repository).rglob("*.*")]
        return sorted(files, reverse=True)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", listed)
    return tmp_path, asked


def test_livecodebench_windows_begin_with_their_first_day(hub, capsys):
    """The file of v6 also has problems of January 2025. Only without them v6 has its 131 problems."""
    folder, asked = hub
    (folder / LIVE).mkdir(parents=True)
    dates = ("2024-07-31", "2024-08-01", "2025-01-31", "2025-02-01", "2025-04-30", "2025-05-01")
    for number, name in enumerate(("test3.jsonl", "test4.jsonl", "test5.jsonl", "test6.jsonl")):
        rows = [live(10 * number + i, contest_date=f"{date}T00:00:00") for i, date in enumerate(dates)]
        write(folder / LIVE / name, *rows)
    assert [problem.id for problem in load_problems("livecodebench-v6")] == ["q33", "q34"] and asked == ["test6.jsonl"]
    assert "'easy': 31, 'medium': 39, 'hard': 61} in the paper" in capsys.readouterr().err
    asked.clear()
    assert [problem.id for problem in load_problems("livecodebench-v5")] == ["q1", "q2", "q11", "q12", "q21", "q22"]
    assert asked == ["test3.jsonl", "test4.jsonl", "test5.jsonl"]
    asked.clear()
    assert len(load_problems("livecodebench-v5", limit=1)) == 1 and asked == ["test3.jsonl"]


def test_the_papers_count_is_said_only_where_it_is_not_met(hub, capsys):
    folder, _ = hub
    levels = ["easy"] * 31 + ["medium"] * 39 + ["hard"] * 61
    (folder / LIVE).mkdir(parents=True)
    write(folder / LIVE / "test6.jsonl", *(live(i, difficulty=level) for i, level in enumerate(levels)))
    assert len(load_problems("livecodebench-v6")) == 131 and capsys.readouterr().err == ""


@pytest.mark.parametrize("name, file, rows", [
    ("rstar-coder", "seed_testcase/data-0000{}-of-00002.parquet", [seed(1), seed(2)]),
    ("humaneval", "openai_humaneval/test-0000{}-of-00002.parquet", HUMANEVAL),
    ("mbpp", "full/test-0000{}-of-00002.parquet", MBPP),
])
def test_sets_in_parquet_come_file_after_file(hub, name, file, rows):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder, asked = hub
    for number, row in enumerate(rows):
        path = folder / HUB[name][0] / file.format(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist([row]), path)
        write(path.parent.parent / "README.md")
    assert len(load_problems(name)) == 2 and asked == [file.format(0), file.format(1)]


def test_without_network_or_package_it_is_one_line_with_a_way_out(monkeypatch):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise ConnectionError("no route to host\nand much more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", fail)
    monkeypatch.setattr("plumbing.problems.find_spec", lambda package: True)
    for name in HUB:
        with pytest.raises(BadInput) as error:
            load_problems(name)
        assert str(error.value) == (f'cannot load {name} from the Hub (no route to host); give --train and --eval: JSONL files '
                                    'with "id", "question" and "tests", or the shipped easy-train and easy-eval')
    monkeypatch.undo()
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", fail)
    monkeypatch.setattr("plumbing.problems.find_spec", lambda package: None)
    for name in ("rstar-coder", "some/file.parquet"):  # the error comes before anything is fetched
        with pytest.raises(BadInput, match=f"^{name} is in Parquet, .*: pip install pyarrow$"):
            load_problems(name)
    with pytest.raises(BadInput, match="or one of micro-train, micro-eval, easy-train, easy-eval, rstar-coder, .*mbpp"):
        load_problems("livecodebench-v7")


# ------------------------------------------------------------------------------------------------------------- overlap


def test_training_problems_that_are_evaluated_are_removed(tmp_path, capsys):
    """A statement that differs only in case, blanks or punctuation is the same problem: evaluating on it is a leak."""
    texts = "Add, twice.", "add\n  TWICE!", "Add thrice", "+", "-"
    test = {"input": "", "output": ""}
    train = write(tmp_path / "train.jsonl", *({"id": str(i), "question": q, "tests": [test]} for i, q in enumerate(texts)))
    held_out = write(tmp_path / "eval.jsonl", {"id": "e", "question": "Add twice", "tests": [test]},
                     {"id": "f", "question": "+", "tests": [test]})
    args = SimpleNamespace(train=str(train), eval=str(held_out), limit=0, eval_limit=0, eval_only=False, programs="")
    kept, evaluated = load_train_and_eval(args)
    assert [problem.id for problem in kept] == ["2", "4"] and [problem.id for problem in evaluated] == ["e", "f"]
    assert "3 of 5 problems of --train left out" in capsys.readouterr().out
