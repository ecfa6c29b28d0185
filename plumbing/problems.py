"""Problems: what the model is asked, and the tests that decide whether a program is correct (paper 2.2 and 3.1).

The project's own format is JSONL with one problem a line; "starter_code" and "difficulty" are optional:

    {"id": "p1", "question": "...", "tests": [{"input": "1 2\\n", "output": "3\\n"}]}

A test has one of three forms:

    {"input": "1 2\\n", "output": "3\\n"}                  a program reads stdin and prints
    {"fn_name": "add", "args": [1, 2], "expected": 3}    a function is called; it may be a method of class Solution
    {"asserts": "assert add(1, 2) == 3", "entry_point": "add"}    Python code calls the program's functions

args is the list of arguments: a single list is [[1, 2]]. Values are compared exactly, floats too; where rounding may
differ, write an assert such as abs(f(1) - 0.3333) < 1e-4. What a function returns counts, not an argument that it
changes. A set never equals a list. entry_point names the function that the prompt asks for. What it
returns has to be made of Python's plain values: a range, a deque or an array is an error. Asserts see a copy of it.

Parquet files have the same fields. A field that is null counts as left out, because a table has every field in every
row; only the "expected" null of a function is a value. A column has one type and changes values to fit it (1 becomes
1.0), so "tests" or "args" may be a JSON text. If "args" is one, a text in "expected" is JSON too.

Public sets are read by their name (HUB below), or from a JSONL or Parquet file in the format of that set. Their records
are converted to the project's own format first, so one function checks everything. No code from a data set runs here:
tests run in sandbox.py, and a pickle is parsed, never loaded.
"""
import ast
import base64
import fnmatch
import inspect
import json
import marshal
import os
import pickletools
import re
import sys
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from dataclasses import fields as dataclass_fields
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Callable, Iterator

from plumbing.sandbox_child import OUTPUT_CAP, encode

DATA = Path(__file__).resolve().parent.parent / "data"
NAMES = {"micro-train": DATA / "train.jsonl", "micro-eval": DATA / "eval.jsonl",  # the shipped micro-lab
         "easy-train": DATA / "easy-train.jsonl", "easy-eval": DATA / "easy-eval.jsonl"}  # small Python functions

MAX_TESTS = 50  # tests to keep of an rStar-Coder problem, as in the authors' release
MAX_BYTES = 1 << 20  # of the kept tests of an rStar-Coder problem; some generated inputs have a gigabyte
MAX_UNPACKED = 1 << 30  # bytes of private tests after unpacking; zlib can turn one byte into a thousand
MAX_DIGITS = 100_000  # of an integer in a file; reading one takes a tenth of a second
MAX_DEPTH = 100  # of lists and objects in an expected value; the comparison recurses, and Python allows 1,000 calls


class BadInput(Exception):
    """An error that the user can correct. The message is one line and says what to do."""


class LeftOut(Exception):
    """A record of a public set that cannot be used. The message completes "left out 3 problems ..."."""


@dataclass
class Problem:
    """A task: its statement, its tests in one of the forms above, and the code that a program must start with."""

    id: str
    question: str
    tests: list[dict]
    starter_code: str = ""
    difficulty: str = ""
    set: str = ""  # the name in --eval that the problem comes from, if there are several


def load_problems(path_or_name: str | Path, limit: int = 0) -> list[Problem]:
    """Return the problems of a JSONL or Parquet file, or of a known set, in their order.

    limit: the most problems to return; 0 means all. Raise BadInput with file, line and reason at a broken record, which
    would otherwise stop a long run much later, or make a test set smaller without notice. Only records of a public set
    that are known to be unusable are left out; a line on stderr counts them.
    """
    name = str(path_or_name)
    problems, place, statements, left_out, mistyped = [], {}, set(), Counter(), {}
    for path, where, record in read_records(name):
        try:
            record = clean(record)
            convert = format_of(record)
            problem = read_problem(convert(record))
            if convert is as_it_is:
                mistyped |= mistyped_fields(record)
            statement = normalised(problem.question) if convert is from_rstar else ""  # rStar-Coder repeats problems
            if statement and (statement in statements or problem.id in place):
                raise LeftOut("that repeat earlier ones")
        except LeftOut as reason:
            left_out[str(reason)] += 1
            continue
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:  # MemoryError: from Python's parser
            raise BadInput(f"{path} {where}: {first_line(error)}") from None
        if problem.id in place:
            raise BadInput(f'{path} {where}: id "{problem.id}" stands in {place[problem.id]} already')
        place[problem.id] = where
        statements.add(statement)
        problems.append(problem)
        if len(problems) == limit:
            break
    if not problems:
        raise BadInput(f"{name} holds no problems" + " that can be used" * bool(left_out))
    if os.environ.get("RANK", "0") == "0":  # the other processes of torchrun read the same files and print nothing
        for wrong, right in mistyped.items():
            print(f'{name}: "{wrong}" is not read; is "{right}" meant?', file=sys.stderr)
        for reason, count in left_out.items():
            print(f"{name}: left out {count} problems {reason}", file=sys.stderr)
        here = Counter(problem.difficulty for problem in problems)
        if not limit and here != PAPER_COUNTS.get(name, here):
            print(f"{name}: {dict(here)} problems here, {PAPER_COUNTS[name]} in the paper", file=sys.stderr)
    return problems


def load_evaluation(names: str, limit: int) -> tuple[list[Problem], list[Problem]]:
    """Return all problems of --eval, and those of them to use. names: a file or set, or several with commas between.

    limit: the number of problems to use of each, evenly spread over it; 0: all. If there are several, the name of its
    set stands in front of a problem's id, because two sets may have the same id.
    """
    names = [names] if Path(names).exists() else [name.strip() for name in names.split(",")]
    everything, chosen, seen = [], [], set()
    for name in names:
        problems = load_problems(name)
        if len(names) > 1:
            problems = [replace(problem, id=f"{name}/{problem.id}", set=name) for problem in problems]
            statements = [normalised(problem.question) for problem in problems]
            if twice := sum(statement in seen for statement in statements):
                print(f"{twice} problems of {name} stand in another set of --eval too, and count in both")
            seen.update(statements)
        count = min(limit or len(problems), len(problems))
        everything += problems
        chosen += [problems[i * len(problems) // count] for i in range(count)]
    return everything, chosen


def load_train_and_eval(args) -> tuple[list[Problem], list[Problem]]:
    """Return the problems of --train (none with --eval-only) and those of --eval. args: dust.Args.

    A training problem that is also in --eval is left out and counted, because evaluation must not use training data.
    If both options name the same file, all problems stay, because then the user wants to see the model memorise.
    """
    held_out, spread = load_evaluation(args.eval, args.eval_limit)
    if args.eval_only:
        return [], spread
    if args.train == args.eval:
        print(f"--train and --eval are the same, {args.train}: the model is evaluated on its training problems")
        problems = load_problems(args.train, args.limit)
    else:
        problems = load_other_problems(args, held_out)
    if args.programs:  # a mistake in them is told before the run has a folder
        read_programs(args.programs, problems, say=print)
    return problems, spread


def load_other_problems(args, held_out: list[Problem]) -> list[Problem]:
    """Return the problems of --train that are not among those held out for the evaluation, at most --limit."""
    enough = args.limit and args.limit + len(held_out)  # do not read all of a long public set if a few will do
    loaded, seen = load_problems(args.train, enough), {normalised(problem.question) for problem in held_out}
    problems = [problem for problem in loaded if normalised(problem.question) not in seen]
    if len(problems) < len(loaded):
        left_out = len(loaded) - len(problems)
        print(f"{left_out} of {len(loaded)} problems of --train left out: they stand in --eval too")
    if not problems:
        raise BadInput(f"every problem of --train {args.train} stands in --eval {args.eval} too: use others")
    return problems[: args.limit or None]


def normalised(statement: str) -> str:
    """Return the statement without what can differ between copies of it: case, blanks and punctuation."""
    return re.sub(r"[\W_]+", " ", statement.casefold()).strip() or statement


def read_records(name: str) -> Iterator[tuple[str, str, Any]]:
    """Yield (file, place such as "line 3", record) for each record of a file, or of a set that is given by name."""
    repository, files = HUB.get(name, ("", [str(NAMES.get(name, name))]))
    if files[0].endswith(".parquet") and not find_spec("pyarrow"):
        raise BadInput(f"{name} is in Parquet, which takes another package: pip install pyarrow")
    since, before = WINDOWS.get(name, ("", ""))
    for path in download(name, repository, files) if repository else files:
        hint = "" if Path(path).exists() else f" (a JSONL or Parquet file, or one of {', '.join([*NAMES, *HUB])})"
        for where, record in read_parquet(path) if path.endswith(".parquet") else read_jsonl(path, hint):
            if not since or since <= str(record.get("contest_date")) < before:
                yield path, where, record


def read_jsonl(path: str, hint: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ("line 3", the parsed line) for each line that is not blank. Raise BadInput at a broken line.

    hint: what the error says behind the reason if the file cannot be read.
    """
    number = 0
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"line {number}", from_json(line)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", "it is not UTF-8 text; save it as UTF-8")
        raise BadInput(f"cannot read {path}: {reason}{hint}") from None
    except (ValueError, RecursionError) as error:
        form = "; each line has to be one JSON object" * str(error).startswith("broken JSON")
        raise BadInput(f"{path} line {number}: {error}{form}") from None


def read_parquet(path: str) -> Iterator[tuple[str, dict]]:
    """Yield ("row 3", the row). Read 16 rows at a time, because a file can have gigabytes."""
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=16):
                for number, row in enumerate(batch.to_pylist(), number + 1):
                    if unclear(row.get("tests")):  # every program would be wrong
                        raise BadInput(f'{path} row {number}: "tests" has a map, or a null in an object in "args" or '
                                       '"expected", where Parquet also writes null for a missing key: write a JSON '
                                       'text instead')
                    yield f"row {number}", row
    except (OSError, ValueError) as error:  # each of pyarrow's exceptions is one of these
        raise BadInput(f"cannot read {path} after row {number}: {first_line(error)}") from None


def unclear(value: Any, inside: bool = False) -> bool:
    """Return whether tests hold a map (pairs, here), or an object with a null. A test itself may have null fields."""
    if isinstance(value, dict):
        return inside and None in value.values() or any(unclear(part, True) for part in value.values())
    return isinstance(value, tuple) or isinstance(value, list) and any(unclear(part, inside) for part in value)


def from_json(value: Any) -> Any:
    """Parse a JSON text; raise ValueError if it is broken. Return any other value as it is: it is parsed already."""
    try:
        return json.loads(value, parse_int=read_int) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON: {error.msg} at column {error.colno}") from None


def read_int(digits: str) -> int:
    """Return an integer. Raise ValueError if it has more than MAX_DIGITS.

    int() refuses more than 4,300 digits: its time grows with the square of their number, so a small file could stop a
    run. Here large ones are read by halves, which is faster, and MAX_DIGITS bounds the time: a second for each MB.
    """
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer has more than {MAX_DIGITS:,} digits")
    if len(digits) <= 640:  # as many as int() takes in every configuration of Python
        return int(digits)
    middle, sign = len(digits) // 2, "-" * digits.startswith("-")
    return read_int(digits[:middle]) * 10 ** (len(digits) - middle) + read_int(sign + digits[middle:])


def clean(fields: Any) -> Any:
    """Return a record, or a test, without its empty fields: tables have null or NaN where there is nothing.

    What is inside of a field stays: None can be an argument. Bytes become text, because some writers of Parquet do not
    mark text as such. "tests" may be a JSON text, or an object of lists, as the package `datasets` writes it.
    """
    if not isinstance(fields, dict):
        return fields
    fields = {name: value.decode() if isinstance(value, bytes) else value for name, value in fields.items()}
    fields = {name: value for name, value in fields.items() if value is not None and value == value}  # NaN != NaN
    if tests := clean(from_json(fields.get("tests") or None)):
        if isinstance(tests, dict) and all(isinstance(values, list) for values in tests.values()):
            tests = [dict(zip(tests, values)) for values in zip(*tests.values(), strict=True)]
        fields["tests"] = tests
    return fields


# ------------------------------------------------------------------------------------------------ the project's format


def read_problem(record: Any) -> Problem:
    """Check one record in the project's format and return it as a Problem. Raise ValueError with the reason."""
    if not isinstance(record, dict):
        raise ValueError("not a JSON object; each problem has to be one")
    if record.get("id") in (None, ""):
        raise ValueError('"id" is missing')
    question = record.get("question")
    if not isinstance(question, str) or not question.strip():
        raise ValueError('"question" is missing or empty')
    for text in (question, str(record["id"]), str(record.get("starter_code", ""))):
        text.encode()  # raises UnicodeEncodeError, a ValueError, for half a surrogate pair
    tests = record.get("tests")
    if isinstance(tests, dict):
        raise ValueError('"tests" is one object; it has to be a list of tests')
    if not isinstance(tests, list) or not tests:
        raise ValueError('"tests" is missing or empty; every problem needs at least one test')
    tests = [read_test(test, f"tests[{index}]") for index, test in enumerate(tests)]
    if any(len(test.get("output", "").encode()) >= OUTPUT_CAP for test in tests):
        raise ValueError(f'an "output" is longer than the {OUTPUT_CAP >> 20} MB that a program may print')
    for name in ("starter_code", "difficulty"):
        if not isinstance(record.get(name, ""), str):
            raise ValueError(f'"{name}" is not a string')
    return Problem(str(record["id"]), question, tests, record.get("starter_code", ""), record.get("difficulty", ""))


def read_test(test: Any, where: str) -> dict:
    """Return the fields of a test's form. Raise ValueError unless sandbox.py can run it and compare what comes back."""
    try:
        match clean(test):  # an empty "asserts" or "fn_name" decides nothing: some tables have "" instead of null
            case {"asserts": code, **others} if code:
                name = others.get("entry_point", "")
                if isinstance(code, str) and isinstance(name, str):
                    tree = ast.parse(code.encode())
                    compile(tree, "asserts", "exec")  # it finds more than the parser does, such as a lone break
                    if not any(map(can_fail, tree.body)):  # every program would be right
                        raise ValueError('"asserts" checks nothing; write assert f(1) == 2, or call your check()')
                    return {"asserts": code, "entry_point": name}
            case {"fn_name": name, **others} if name:
                args = from_json(others.get("args"))
                expected = others.get("expected", test.get("expected"))  # null is a value here
                if isinstance(others.get("args"), str):
                    expected = from_json(expected)
                if isinstance(name, str) and isinstance(args, list) and "expected" in test:
                    if not name.isidentifier():  # every program would be wrong
                        raise ValueError(f'"fn_name" is {name[:60]!r}; write only the name of the function')
                    marshal.dumps(args)
                    check_expected(expected)
                    return {"fn_name": name, "args": args, "expected": expected}
            case {"input": str(given), "output": str(expected)}:
                (given + expected).encode()
                return {"input": given, "output": expected}
    except SyntaxError as error:
        raise ValueError(f'{where}: "asserts" is no Python: {error}') from None
    except (ValueError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"{where} cannot be used: {first_line(error)}") from None
    raise ValueError(f'{where} needs "input" and "output" (strings), or it needs "fn_name" (a string), "args" (a list) '
                     'and "expected", or it needs "asserts" (Python) and "entry_point" (a name, or empty); it has '
                     f'{kinds_of(test)}')


def can_fail(node: ast.stmt) -> bool:
    """Return whether a statement of asserts can fail. A definition cannot, nor a value that is thrown away."""
    if isinstance(node, ast.Expr) and isinstance(node.value, (ast.Compare, ast.BoolOp)):  # f(1) == 2 without assert
        return False
    if isinstance(node, (ast.Expr, ast.Assign, ast.AnnAssign)):
        return any(isinstance(part, ast.Call) for part in ast.walk(node))
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Pass)
    return not isinstance(node, definitions)


def kinds_of(test: Any) -> str:
    """Return the fields of a test with their types, for an error: "input" (str), "output" (int)."""
    if not isinstance(test, dict):
        return f"the form of a {type(test).__name__}"
    fields = [f'"{str(name)[:20]}" ({type(value).__name__})' for name, value in test.items()]
    return ", ".join(fields[:5]) or "nothing"


def mistyped_fields(record: dict) -> dict[str, str]:
    """Return the fields of a record in the project's format that look misspelt: its name -> the one that is meant."""
    known = {field.name for field in dataclass_fields(Problem)} - {"set"}
    guesses = {name: get_close_matches(name, known - record.keys(), 1, 0.7) for name in record.keys() - known}
    return {name: found[0] for name, found in guesses.items() if found}


def check_expected(value: Any) -> None:
    """Raise ValueError or TypeError if sandbox.py cannot compare this value, or if no answer can ever equal it."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list))]
        level = [part for parts in inner for part in parts]
    if level:
        raise ValueError(f'"expected" is nested more than {MAX_DEPTH} deep')
    answer = json.dumps(encode(value), separators=(",", ":"))
    if len(answer) >= OUTPUT_CAP:
        raise ValueError(f'"expected" is longer than the {OUTPUT_CAP >> 20} MB that a program may return')
    if value != value:
        raise ValueError('"expected" is NaN, which nothing equals')


# ------------------------------------------------------------------------------------------------- the public formats


def format_of(record: Any) -> Callable[[Any], Any]:
    """Return the function that converts a record to the project's format. The names of its fields decide."""
    formats = [(["question_content"], from_livecodebench), (["question_id", "question"], from_rstar),
               (["prompt", "entry_point"], from_humaneval), (["test_list"], from_mbpp)]
    fitting = (convert for fields, convert in formats if isinstance(record, dict) and record.keys() >= set(fields))
    return next(fitting, as_it_is)


def as_it_is(record: Any) -> Any:
    """Return a record that is in the project's format already."""
    return record


def from_livecodebench(record: dict) -> dict:
    """Convert a LiveCodeBench record, with its public and its private tests. Raise ValueError if it is broken."""
    private = record.get("private_test_cases") or []
    if isinstance(private, str) and not private.lstrip().startswith("["):
        private = unpickle_text(private)
    try:
        cases = from_json(record.get("public_test_cases")) + from_json(private)
        cases = [(case["input"], case["output"]) for case in cases]
        function = from_json(record.get("metadata") or {}).get("func_name") or ""
    except (LookupError, TypeError, AttributeError):
        raise ValueError('"public_test_cases", "private_test_cases" or "metadata" is of another form') from None
    return {"id": text_of(record, "question_id"), "question": text_of(record, "question_content"),
            "starter_code": text_of(record, "starter_code", ""), "difficulty": text_of(record, "difficulty", ""),
            "tests": [make_test(given, expected, function) for given, expected in cases]}


def unpickle_text(packed: str) -> str:
    """Return the text in base64(zlib(pickle(text))), or raise ValueError. Parse only: to load a pickle can run code."""
    unpack = zlib.decompressobj()
    try:
        data = unpack.decompress(base64.b64decode(packed, validate=True), MAX_UNPACKED)
    except (ValueError, zlib.error) as error:
        raise ValueError(f'"private_test_cases" is neither JSON nor packed JSON: {error}') from None
    if unpack.unconsumed_tail:
        raise ValueError(f'"private_test_cases" unpacks to more than {MAX_UNPACKED >> 20} MB')
    arguments = {opcode.name: argument for opcode, argument, _ in pickletools.genops(data)}  # raises ValueError
    texts = [argument for name, argument in arguments.items() if "UNICODE" in name]
    frame = {"PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP"}
    if len(texts) != 1 or len(arguments.keys() - frame) != 1:
        raise ValueError('"private_test_cases" holds a pickle that is no plain text, or not one text')
    return texts[0]


def from_rstar(record: dict) -> dict:
    """Convert a row of rStar-Coder's seed_testcase, with its first tests. Raise LeftOut if the row is unusable."""
    function = text_of(record, "func_name", "")
    if function and record.get("class_name", "Solution") not in ("", "Solution"):
        raise LeftOut("with a class that is not named Solution")
    starter = text_of(record, "starter_code", "")
    tests, size, names = [], 0, parameters_of(starter, function)
    try:
        inputs, outputs = (from_json(record[name]) + [] for name in ("inputs", "outputs"))  # + []: both are lists
        for given, expected in zip(inputs, outputs, strict=True):
            test = read_test(make_test(given, expected, function, names), "")
            if names and len(test["args"]) != len(names):  # no program could pass
                raise LeftOut("whose tests do not fit the parameters of the starter code")
            more = len(marshal.dumps(test))
            if len(tests) < MAX_TESTS and size + more <= MAX_BYTES:
                tests.append(test)
                size += more
    except (ValueError, TypeError, LookupError, RecursionError):
        raise LeftOut("with broken tests") from None
    if not tests:
        raise LeftOut("without a test that is small enough")
    return {"id": text_of(record, "question_id"), "question": text_of(record, "question"),
            "starter_code": starter, "tests": tests}


def parameters_of(starter_code: str, function: str) -> list[str]:
    """Return a function's parameters without self; [] if the starter code does not say how many arguments it takes."""
    found = function and re.search(rf"^\s*def\s+{re.escape(function)}\s*(\(.*?\)\s*(->[^\n]*)?):", starter_code,
                                   re.DOTALL | re.MULTILINE)
    try:
        given = ast.parse(f"def f{found[1]}: 0").body[0].args if found else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # each of them can come from Python's parser
        return []
    if not given or given.posonlyargs or given.vararg or given.kwonlyargs or given.kwarg or given.defaults:
        return []
    return [one.arg for one in given.args if one.arg not in ("self", "cls")]


def from_humaneval(record: dict) -> dict:
    """Convert a HumanEval record. Its docstring becomes the question, the code before that the starter code."""
    prompt, name = text_of(record, "prompt"), text_of(record, "entry_point")
    tree = ast.parse(prompt)
    function = next((node for node in tree.body if getattr(node, "name", "") == name), None)
    constants = [node for node in getattr(function, "body", []) if isinstance(getattr(node, "value", 0), ast.Constant)]
    if not constants or not isinstance(constants[0].value.value, str):  # imports may stand before the docstring
        raise ValueError(f'"prompt" has no function {name} with a docstring')
    starter = "\n".join(prompt.split("\n")[: max(function.lineno, constants[0].lineno - 1)])
    tree.body.remove(function)  # imports and helpers go into the asserts: there the program cannot redefine them
    asserts = f"{ast.unparse(tree)}\n{text_of(record, 'test')}\ncheck({name})\n"
    question = f"Write the Python function {name}.\n\n{inspect.cleandoc(constants[0].value.value)}"
    return {"id": text_of(record, "task_id"), "question": question, "starter_code": starter,
            "tests": [{"asserts": asserts, "entry_point": name}]}


def from_mbpp(record: dict) -> dict:
    """Convert an MBPP record. The question is the task and its first assert, as is usual for this set."""
    asserts, imports = record["test_list"] or None, record.get("test_imports") or []  # None: no test is refused too
    for name, lines in (("test_list", asserts), ("test_imports", imports)):
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            raise ValueError(f'"{name}" is not a list of asserts or imports')
    code = ast.parse(text_of(record, "code"))
    given = [ast.unparse(node) for node in code.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    given += [*imports, text_of(record, "test_setup_code", "")]
    tests = "\n".join([*given, *asserts])
    names = {node.id for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Name)}
    used = [node for node in code.body if getattr(node, "name", "") in names]
    if any(isinstance(node, ast.ClassDef) for node in used):  # only plain values pass between asserts and program
        raise LeftOut("whose asserts need objects of the program")
    function = next((node for node in used if isinstance(node, ast.FunctionDef)), None)
    if function is None:
        raise ValueError('no function of "code" stands in "test_list"')
    task = record.get("text") or text_of(record, "prompt")  # the sanitized form of the set has "prompt"
    number = f"mbpp/{record['task_id']}" if "task_id" in record else None
    return {"id": number, "question": f"{task}\nFor example: {asserts[0]}",
            "starter_code": f"def {function.name}({ast.unparse(function.args)}):",
            "tests": [{"asserts": tests, "entry_point": function.name}]}


def text_of(record: dict, name: str, default: str | None = None) -> str:
    """Return a text field. Raise ValueError if its value is not a text, or if it is empty and there is no default."""
    value = record.get(name) or default
    if not isinstance(value, str):
        raise ValueError(f'"{name}" is missing or no text')
    return value


def make_test(given: Any, expected: Any, function: str, names: list[str] | None = None) -> dict:
    """Return a test that calls the function of this name, or a stdin test if the name is empty. Raise ValueError.

    LiveCodeBench writes a call as two texts: the arguments, one JSON value a line, and the result, as JSON. For rows of
    rStar-Coder that name a function we take this, or a list of arguments and the result itself (there the text "12" is
    not the number 12). names: the function's parameters, if they are known. Then all arguments may also stand in one
    JSON value, as a list or by name.
    """
    if isinstance(given, dict) and names:
        given = [given]
    if not isinstance(given, (str, list)):
        raise ValueError("a test's input is neither a text nor a list")
    if not function:
        return {"input": given, "output": expected}
    if isinstance(given, str):
        given, expected = [from_json(line) for line in given.split("\n") if line.strip()], from_json(expected)
    if names and len(given) == 1:
        [one] = given
        if isinstance(one, dict) and one.keys() == set(names):
            given = [one[name] for name in names]
        elif isinstance(one, list) and len(one) == len(names) > 1:
            given = one
    return {"fn_name": function, "args": given, "expected": expected}


# ------------------------------------------------------------------------------------------------------------ the Hub


LIVE = "livecodebench/code_generation_lite"
HUB = {  # each set's repository and files
    "rstar-coder": ("microsoft/rStar-Coder", ["seed_testcase/*.parquet"]),
    "livecodebench-v5": (LIVE, ["test3.jsonl", "test4.jsonl", "test5.jsonl"]),
    "livecodebench-v6": (LIVE, ["test6.jsonl"]),
    "humaneval": ("openai/openai_humaneval", ["openai_humaneval/test-*.parquet"]),
    "mbpp": ("google-research-datasets/mbpp", ["full/test-*.parquet"]),
}
# The first contest date that is in the set, and the first that is too late. test6.jsonl holds the problems that v6
# adds, test5.jsonl those of v5, and both may hold earlier ones. No offline test can check this, so load_problems
# compares with PAPER_COUNTS.
WINDOWS = {"livecodebench-v5": ("2024-08-01", "2025-02-01"), "livecodebench-v6": ("2025-02-01", "2025-05-01")}
PAPER_COUNTS = {"livecodebench-v6": {"easy": 31, "medium": 39, "hard": 61}}  # section 3.1: 131 problems


def download(name: str, repository: str, files: list[str]) -> Iterator[str]:
    """Yield the local path of each file of a set. Fetch a file only when it is asked for. Raise BadInput on failure."""
    try:
        from huggingface_hub import HfApi, hf_hub_download

        if "*" in files[0]:
            files = fnmatch.filter(sorted(HfApi().list_repo_files(repository, repo_type="dataset")), files[0])
        for file in files:
            yield hf_hub_download(repository, file, repo_type="dataset")
    except Exception as error:  # no network, no such file, a full disk: the Hub raises another exception for each
        raise BadInput(f'cannot load {name} from the Hub ({first_line(error)}); give --train and --eval: JSONL files '
                       'with "id", "question" and "tests", or the shipped easy-train and easy-eval') from None


def read_programs(path: str, problems: list[Problem], say=None) -> list[tuple[str, str, str | None]]:
    """Return (problem_id, answer or "", code or None) of each line of --programs, a JSONL file of these fields.

    Lines of other problems are counted and left out. Raises BadInput for a line of another form, and if none is left.
    say: a function that prints how many programs there are.
    """
    known, programs, unknown = {problem.id for problem in problems}, [], 0
    for where, record in read_jsonl(path):
        values = record if isinstance(record, dict) else {}
        problem_id, answer, code = values.get("problem_id"), values.get("answer") or "", values.get("code")
        problem_id = str(problem_id) if type(problem_id) is int else problem_id  # as the ids of problems
        some = answer or code or {"answer", "code"} <= values.keys()  # candidates.jsonl has answers without a program
        if not isinstance(problem_id, str) or not isinstance(answer or code or "", str) or not some:
            raise BadInput(f'{path} {where}: a record needs "problem_id" and "answer" or "code", all of them text')
        if re.search("[\ud800-\udfff]", f"{answer}{code or ''}"):
            raise BadInput(f"{path} {where}: the program holds half of a surrogate pair, which is no text")
        if problem_id in known:
            programs.append((problem_id, answer, code))
        unknown += problem_id not in known
    found = {problem_id for problem_id, _, _ in programs}
    counts = (f"{len(programs)} programs for {len(found)} of {len(problems)} problems; {unknown} more are for problems "
              "that are not trained on")
    if not programs:
        raise BadInput(f"--programs {path}: {counts}; give ids of --train")
    if say and os.environ.get("RANK", "0") == "0":
        say(f"  {path}: {counts}")
    return programs


def first_line(error: Exception) -> str:
    """Return the first line of an error, or the name of its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def write_atomic(path: Path, text: str) -> None:
    """Write a text file completely or not at all, even if the process is killed meanwhile."""
    path.with_suffix(".new").write_text(text, encoding="utf-8", errors="backslashreplace")
    path.with_suffix(".new").replace(path)


def digest(problems: list[Problem]) -> int:
    """Return a number that changes with any problem. As bytes: str() refuses integers of more than 4,300 digits."""
    return zlib.crc32(marshal.dumps([vars(problem) for problem in problems], 2))  # 3 would note what is shared


def seed_for(*parts) -> int:
    """Return a seed, or a checksum, that depends on `parts` only: a resumed run draws the same numbers."""
    return zlib.crc32("/".join(map(str, parts)).encode())
