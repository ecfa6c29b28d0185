"""Problems: what the model is asked, and the tests that decide whether a program is correct (paper 2.2 and 3.1).

The project's own format is JSONL with one problem a line; "starter_code" and "difficulty" are optional:

    {"id": "p1", "question": "...", "tests": [{"input": "1 2\\n", "output": "3\\n"}]}

A test has one of three forms:

    {"input", "output"}              a program reads stdin and prints
    {"fn_name", "args", "expected"}  a function is called; it may be a method of class Solution
    {"asserts", "entry_point"}       Python code calls the program's functions; entry_point names the main one

Public sets are read by their name (HUB below), or from a JSONL or Parquet file in the format of that set. Their records
are converted to the project's own format first, so one function checks everything. No code from a data set runs here:
tests run in sandbox.py, and a pickle is parsed, never loaded.
"""
import ast
import base64
import fnmatch
import inspect
import json
import os
import pickletools
import re
import sys
import zlib
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

DATA = Path(__file__).resolve().parent.parent / "data"
NAMES = {"micro-train": DATA / "train.jsonl", "micro-eval": DATA / "eval.jsonl"}  # the shipped micro-lab

MAX_TESTS = 50  # tests to keep of an rStar-Coder problem, as in the authors' release
MAX_CHARACTERS = 1 << 20  # in the kept tests of an rStar-Coder problem; some generated inputs have a gigabyte
MAX_UNPACKED = 1 << 30  # bytes of private tests after unpacking; zlib can turn one byte into a thousand


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


def load_problems(path_or_name: str | Path, limit: int = 0) -> list[Problem]:
    """Return the problems of a JSONL or Parquet file, or of a known set, in their order.

    limit: the most problems to return; 0 means all. Raise BadInput with file, line and reason at a broken record, which
    would otherwise stop a long run much later, or make a test set smaller without notice. Only records of a public set
    that are known to be unusable are left out; a line on stderr counts them.
    """
    name = str(path_or_name)
    problems, place, statements, left_out = [], {}, set(), Counter()
    for path, where, record in read_records(name):
        convert = format_of(record)
        try:
            problem = read_problem(convert(record))
            statement = normalised(problem.question) if convert is from_rstar else ""  # rStar-Coder repeats problems
            if statement and (statement in statements or problem.id in place):
                raise LeftOut("that stand there already")
        except LeftOut as reason:
            left_out[str(reason)] += 1
            continue
        except (ValueError, SyntaxError, RecursionError) as error:
            raise BadInput(f"{path} {where}: {error}") from None
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
        for reason, count in left_out.items():
            print(f"{name}: left out {count} problems {reason}", file=sys.stderr)
        here = Counter(problem.difficulty for problem in problems)
        if not limit and here != PAPER_COUNTS.get(name, here):
            print(f"{name}: {dict(here)} problems here, {PAPER_COUNTS[name]} in the paper", file=sys.stderr)
    return problems


def load_train_and_eval(args) -> tuple[list[Problem], list[Problem]]:
    """Return the problems of --train (none with --eval-only) and those of --eval. args: dust.Args.

    A training problem that is also in --eval is left out and counted, because evaluation must not use training data.
    If both options name the same file, all problems stay, because then the user wants to see the model memorise.
    """
    held_out = load_problems(args.eval)
    count = min(args.eval_limit or len(held_out), len(held_out))
    spread = [held_out[i * len(held_out) // count] for i in range(count)]
    if args.eval_only:
        return [], spread
    if args.train == args.eval:
        print(f"--train and --eval are the same, {args.train}: the model is evaluated on its training problems")
        return load_problems(args.train, args.limit), spread
    enough = args.limit and args.limit + len(held_out)  # do not read all of a long public set if a few will do
    loaded, seen = load_problems(args.train, enough), {normalised(problem.question) for problem in held_out}
    problems = [problem for problem in loaded if normalised(problem.question) not in seen]
    if len(problems) < len(loaded):
        left_out = len(loaded) - len(problems)
        print(f"{left_out} of {len(loaded)} problems of --train left out: they stand in --eval too")
    if not problems:
        raise BadInput(f"every problem of --train {args.train} stands in --eval {args.eval} too: use others")
    return problems[: args.limit or None], spread


def normalised(statement: str) -> str:
    """Return the statement without what can differ between copies of it: case, blanks and punctuation."""
    return re.sub(r"[\W_]+", " ", statement.casefold()).strip() or statement


def read_records(name: str) -> Iterator[tuple[str, str, Any]]:
    """Yield (file, place such as "line 3", record) for each record of a file, or of a set that is given by name."""
    hub_set, path = HUB.get(name), str(NAMES.get(name, name))
    if (hub_set.files[0] if hub_set else path).endswith(".parquet") and not find_spec("pyarrow"):
        raise BadInput(f"{name} is in Parquet, which takes another package: pip install pyarrow")
    for path in download(name, hub_set) if hub_set else [path]:
        read_file = read_parquet if path.endswith(".parquet") else read_jsonl
        for where, record in read_file(path):
            if not hub_set or hub_set.since <= record.get("contest_date", "") < hub_set.before:
                yield path, where, record


def read_jsonl(path: str) -> Iterator[tuple[str, Any]]:
    """Yield ("line 3", the parsed line) for each line that is not blank. Raise BadInput at a broken line."""
    number = 0
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"line {number}", json.loads(line)
    except json.JSONDecodeError as error:
        raise BadInput(f"{path} line {number}: broken JSON: {error.msg} at column {error.colno}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", "it is not UTF-8 text")
        names = ", ".join([*NAMES, *HUB])
        raise BadInput(f"cannot read {path}: {reason} (a JSONL or Parquet file, or one of {names})") from None
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, or brackets nested too deep
        raise BadInput(f"{path} line {number}: {error}") from None


def read_parquet(path: str) -> Iterator[tuple[str, dict]]:
    """Yield ("row 3", the row without its empty fields). Read 16 rows at a time, because a file can have gigabytes."""
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=16):
                for number, row in enumerate(batch.to_pylist(), number + 1):
                    yield f"row {number}", {name: value for name, value in row.items() if value is not None}
    except (OSError, ValueError) as error:  # each of pyarrow's exceptions is one of these
        raise BadInput(f"cannot read {path} after row {number}: {first_line(error)}") from None


# ------------------------------------------------------------------------------------------------ the project's format


def read_problem(record: Any) -> Problem:
    """Check one record in the project's format and return it as a Problem. Raise ValueError with the reason."""
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    if "id" not in record:
        raise ValueError('"id" is missing')
    question = record.get("question")
    if not isinstance(question, str) or not question.strip():
        raise ValueError('"question" is missing or empty')
    for text in (question, str(record["id"]), str(record.get("starter_code", ""))):
        text.encode()  # raises UnicodeEncodeError, a ValueError, for half a surrogate pair
    tests = record.get("tests")
    if not isinstance(tests, list) or not tests:
        raise ValueError('"tests" is missing or empty; every problem needs at least one test')
    for index, test in enumerate(tests):
        check_test(test, f"tests[{index}]")
    for name in ("starter_code", "difficulty"):
        if not isinstance(record.get(name, ""), str):
            raise ValueError(f'"{name}" is not a string')
    return Problem(str(record["id"]), question, tests, record.get("starter_code", ""), record.get("difficulty", ""))


def check_test(test: Any, where: str) -> None:
    """Raise ValueError, whose message begins with `where`, unless the test has one of the three forms."""
    if isinstance(test, dict) and "asserts" in test:
        if not isinstance(test["asserts"], str) or not isinstance(test.get("entry_point", ""), str):
            raise ValueError(f'{where} needs "asserts" (Python) and "entry_point" (a function\'s name, or empty)')
        try:
            compile(test["asserts"].encode(), "asserts", "exec")
        except (SyntaxError, ValueError) as error:
            raise ValueError(f'{where}: "asserts" is no Python: {error}') from None
    elif isinstance(test, dict) and "fn_name" in test:
        if not isinstance(test["fn_name"], str) or not isinstance(test.get("args"), list) or "expected" not in test:
            raise ValueError(f'{where} needs "fn_name" (a string), "args" (a list) and "expected"')
    elif not isinstance(test, dict) or not all(isinstance(test.get(name), str) for name in ("input", "output")):
        others = '"fn_name", "args" and "expected", or "asserts"'
        raise ValueError(f'{where} needs "input" and "output" (strings), or {others}')


# ------------------------------------------------------------------------------------------------- the public formats


def format_of(record: Any) -> Callable[[Any], Any]:
    """Return the function that converts a record to the project's format. The names of its fields decide."""
    formats = [(["question_content"], from_livecodebench), (["inputs", "outputs"], from_rstar),
               (["prompt", "entry_point"], from_humaneval), (["test_list"], from_mbpp)]
    fitting = (convert for fields, convert in formats if isinstance(record, dict) and record.keys() >= set(fields))
    return next(fitting, lambda own: own)


def from_livecodebench(record: dict) -> dict:
    """Convert a LiveCodeBench record, with its public and its private tests. Raise ValueError if it is broken."""
    private = text_of(record, "private_test_cases", "[]")
    if not private.lstrip().startswith("["):
        private = unpickle_text(private)
    try:
        cases = json.loads(text_of(record, "public_test_cases")) + json.loads(private)
        cases = [(case["input"], case["output"]) for case in cases]
        function = json.loads(text_of(record, "metadata", "{}")).get("func_name") or ""
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
    texts = []
    for opcode, argument, _ in pickletools.genops(data):  # raises ValueError
        if "UNICODE" in opcode.name:
            texts.append(argument)
        elif opcode.name not in ("PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP"):
            raise ValueError(f'"private_test_cases" holds a pickle that is no plain text (opcode {opcode.name})')
    if len(texts) != 1:
        raise ValueError('"private_test_cases" holds a pickle that is not one text')
    return texts[0]


def from_rstar(record: dict) -> dict:
    """Convert a row of rStar-Coder's seed_testcase, with its first tests. Raise LeftOut if the row is unusable."""
    function, starter = (text_of(record, name, "") for name in ("func_name", "starter_code"))
    if function and record.get("class_name", "Solution") not in ("", "Solution"):
        raise LeftOut("with a class that is not named Solution")
    tests, characters = [], 0
    try:
        inputs, outputs = json.loads(text_of(record, "inputs")), json.loads(text_of(record, "outputs"))
        for given, expected in zip(inputs + [], outputs + [], strict=True):  # + []: TypeError unless both are lists
            test, more = make_test(given, expected, function), len(str(given)) + len(str(expected))
            check_test(test, "")
            if len(tests) < MAX_TESTS and characters + more <= MAX_CHARACTERS:
                tests.append(test)
                characters += more
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise LeftOut("with broken tests") from None
    if not tests:
        raise LeftOut("without a test that is small enough")
    if function and not starter:  # without starter code the prompt would ask for a program that reads stdin
        starter = f"class Solution:\n    def {function}(self, ...):"
    return {"id": text_of(record, "question_id"), "question": text_of(record, "question"), "starter_code": starter,
            "tests": tests}


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
    asserts, imports = record.get("test_list"), record.get("test_imports") or []
    if not isinstance(asserts, list) or not asserts or not all(isinstance(line, str) for line in asserts):
        raise ValueError('"test_list" is not a list of asserts')
    if not isinstance(imports, list) or not all(isinstance(line, str) for line in imports):
        raise ValueError('"test_imports" is not a list of lines')
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
    return {"id": f"mbpp/{record.get('task_id')}", "question": f"{task}\nFor example: {asserts[0]}",
            "starter_code": f"def {function.name}({ast.unparse(function.args)}):",
            "tests": [{"asserts": tests, "entry_point": function.name}]}


def text_of(record: dict, name: str, default: str | None = None) -> str:
    """Return a text field. Raise ValueError if its value is not a text, or if it is empty and there is no default."""
    value = record.get(name) or default
    if not isinstance(value, str):
        raise ValueError(f'"{name}" is missing or no text')
    return value


def make_test(given: Any, expected: Any, function: str) -> dict:
    """Return a test that calls the function of this name, or a stdin test if the name is empty. Raise ValueError."""
    if not isinstance(given, (str, list)):
        raise ValueError("a test's input is neither a text nor a list")
    if not function:
        return {"input": given, "output": expected}
    # Arguments are a list or, as in LiveCodeBench, a text with one JSON value a line.
    args = given if isinstance(given, list) else [json.loads(line) for line in given.split("\n") if line.strip()]
    expected = json.loads(expected) if isinstance(expected, str) else expected
    return {"fn_name": function, "args": args, "expected": expected}


# ------------------------------------------------------------------------------------------------------------ the Hub


class HubSet(NamedTuple):
    """The place of a set on the Hub, and the part of it that is used."""

    repository: str
    files: tuple[str, ...]
    since: str = ""  # the first contest date that is included
    before: str = "9999"  # the first contest date that is too late


# test6.jsonl holds the problems that LiveCodeBench v6 adds (until April 2025), test5.jsonl those of v5 (until January
# 2025). Both may hold earlier ones. No offline test can check this, so load_problems compares with PAPER_COUNTS.
LIVE = "livecodebench/code_generation_lite"
HUB = {
    "rstar-coder": HubSet("microsoft/rStar-Coder", ("seed_testcase/*.parquet",)),
    "livecodebench-v5": HubSet(LIVE, ("test3.jsonl", "test4.jsonl", "test5.jsonl"), "2024-08-01", "2025-02-01"),
    "livecodebench-v6": HubSet(LIVE, ("test6.jsonl",), "2025-02-01", "2025-05-01"),
    "humaneval": HubSet("openai/openai_humaneval", ("openai_humaneval/test-*.parquet",)),
    "mbpp": HubSet("google-research-datasets/mbpp", ("full/test-*.parquet",)),
}
PAPER_COUNTS = {"livecodebench-v6": {"easy": 31, "medium": 39, "hard": 61}}  # section 3.1: 131 problems


def download(name: str, hub_set: HubSet) -> Iterator[str]:
    """Yield the local path of each file of a set. Fetch a file only when it is asked for. Raise BadInput on failure."""
    files = hub_set.files
    try:
        from huggingface_hub import HfApi, hf_hub_download

        if "*" in files[0]:
            listed = sorted(HfApi().list_repo_files(hub_set.repository, repo_type="dataset"))
            files = fnmatch.filter(listed, files[0])
        for file in files:
            yield hf_hub_download(hub_set.repository, file, repo_type="dataset")
    except Exception as error:  # no network, no such file, a full disk: the Hub raises another exception for each
        raise BadInput(f'cannot load {name} from the Hub ({first_line(error)}); or bring your own: a JSONL file whose '
                       'lines have "id", "question" and "tests"') from None


def read_programs(path: str, problems: list[Problem]) -> list[dict]:
    """Return the records of --programs, a JSONL file of {"problem_id", "answer"} or {"problem_id", "code"}.

    Prints how many there are, and for how many problems. Raises BadInput for a record of another form, and where no
    record is of one of the problems.
    """
    known, records, unknown = {problem.id for problem in problems}, [], 0
    for where, record in read_jsonl(path):
        values = record if isinstance(record, dict) else {}
        text = values.get("answer") or values.get("code")
        if not isinstance(values.get("problem_id"), str) or not isinstance(text or "", str):
            raise BadInput(f'{path} {where}: a record needs "problem_id" and "answer" or "code", all of them text')
        if values["problem_id"] in known:
            records.append(values)
        unknown += values["problem_id"] not in known
    found = {record["problem_id"] for record in records}
    counts = (f"{len(records)} programs for {len(found)} of {len(problems)} problems; {unknown} more are for problems "
              "that are not in --train")
    if not records:
        raise BadInput(f"--programs {path}: {counts}")
    if os.environ.get("RANK", "0") == "0":
        print(f"  {path}: {counts}")
    return records


def first_line(error: Exception) -> str:
    """Return the first line of an error, or the name of its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def write_atomic(path: Path, text: str) -> None:
    """Write a text file completely or not at all, even if the process is killed meanwhile."""
    path.with_suffix(".new").write_text(text, encoding="utf-8")
    path.with_suffix(".new").replace(path)


def seed_for(*parts) -> int:
    """Return the seed of one unit of work. It depends on `parts` only, so a resumed run draws the same numbers."""
    return zlib.crc32("/".join(map(str, parts)).encode())
