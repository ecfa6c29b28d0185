"""Public problem sets: what the fields of each format mean, and where the Hub has the sets that the paper uses.

A reader makes a Problem of one record. What it cannot use of a public set it leaves out, and load_problems counts it;
a record that breaks its own format is an error with file, line and reason. Nothing of a set is ever executed here:
tests run in sandbox.py, and a pickle is read as text.
"""
import ast
import base64
import fnmatch
import inspect
import json
import pickletools
import zlib
from collections import Counter
from typing import Any, Callable, Iterator, NamedTuple

from plumbing.problems import BadInput, Problem, check_test, first_line, read_json, read_problem

KEPT_TESTS = 50  # of an rStar-Coder problem, as many as the release keeps
KEPT_CHARACTERS = 1 << 20  # of them together: some generated inputs have a gigabyte
UNPACKED = 1 << 30  # bytes that private tests may unpack to; zlib makes a thousand of one


class LeftOut(Exception):
    """A record of a public set that we cannot use; the message completes "problems ..."."""


# ------------------------------------------------------------------------------------------------------- the sets


class HubSet(NamedTuple):
    """Where the Hub keeps a set, and which of it is meant."""
    repository: str
    files: tuple[str, ...]
    since: str = ""  # contest dates, of which the first is in the window and the last is not
    before: str = "9999"


# LiveCodeBench's releases grow by a file each: test6.jsonl is what v6 adds (until April 2025), test5.jsonl what v5 adds
# (until January 2025). So of the paper's windows only the first days can matter, not whether the last month is in.
# That, and the number of problems, no test can check offline: compare_with_paper() does when the set is loaded.
LIVE = "livecodebench/code_generation_lite"
HUB = {
    "rstar-coder": HubSet("microsoft/rStar-Coder", ("seed_testcase/*.parquet",)),
    "livecodebench-v5": HubSet(LIVE, ("test3.jsonl", "test4.jsonl", "test5.jsonl"), "2024-08-01", "2025-02-01"),
    "livecodebench-v6": HubSet(LIVE, ("test6.jsonl",), "2025-02-01", "2025-05-01"),
    "humaneval": HubSet("openai/openai_humaneval", ("openai_humaneval/test-*.parquet",)),
    "mbpp": HubSet("google-research-datasets/mbpp", ("full/test-*.parquet",)),
}
PAPER = {"livecodebench-v6": {"easy": 31, "medium": 39, "hard": 61}}  # section 3.1: 131 problems


def records(path_or_name: str) -> Iterator[tuple[str, str, Any]]:
    """File, place in it ("line 3") and record, one after the other, of a file or of a set by its name."""
    chosen = HUB.get(path_or_name)
    if chosen and chosen.files[0].endswith(".parquet"):
        parquet_reader(path_or_name)  # says what is missing before gigabytes are loaded
    for path in download(path_or_name, chosen) if chosen else [path_or_name]:
        for where, record in (read_parquet if path.endswith(".parquet") else read_json)(path):
            if not chosen or chosen.since <= record.get("contest_date", "") < chosen.before:
                yield path, where, record


def download(name: str, chosen: HubSet) -> Iterator[str]:
    """The files of a set on this disk, each fetched when it is its turn."""
    try:
        from huggingface_hub import HfApi, hf_hub_download
        files = chosen.files
        if "*" in files[0]:
            listed = sorted(HfApi().list_repo_files(chosen.repository, repo_type="dataset"))
            files = fnmatch.filter(listed, files[0])
        for file in files:
            yield hf_hub_download(chosen.repository, file, repo_type="dataset")
    except Exception as error:  # no network, no such file, a full disk: the Hub has an exception for each
        raise BadInput(f'cannot load {name} from the Hub ({first_line(error)}); or bring your own: a JSONL file whose '
                       'lines have "id", "question" and "tests"') from None


def parquet_reader(what: str) -> Callable:
    """pyarrow's ParquetFile. Raises BadInput, which names the package, where it is missing."""
    try:
        from pyarrow.parquet import ParquetFile
        return ParquetFile
    except ImportError:
        raise BadInput(f"{what} is in Parquet, which takes another package: pip install pyarrow") from None


def read_parquet(path: str) -> Iterator[tuple[str, dict]]:
    """The rows of a Parquet file, a few at a time, from one row group after another; nothing is read ahead."""
    number = 0
    try:
        with parquet_reader(path)(path, pre_buffer=False) as file:
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(batch_size=16, row_groups=[group]):
                    for number, record in enumerate(batch.to_pylist(), number + 1):
                        yield f"row {number}", {name: value for name, value in record.items() if value is not None}
    except (OSError, ValueError) as error:  # pyarrow's own are both
        raise BadInput(f"cannot read {path} after row {number}: {first_line(error)}") from None


def compare_with_paper(name: str, problems: list[Problem]) -> str:
    """A line that says so if this is not the set that the paper counts, or ""."""
    paper, here = PAPER.get(name), Counter(problem.difficulty for problem in problems)
    return f"{name}: {dict(here)} problems here, {paper} in the paper" if paper and paper != here else ""


# ----------------------------------------------------------------------------------------------------- the formats


def reader_of(record: Any) -> Callable[[Any], Problem]:
    """The reader of a record's format, by its fields; the project's own where no other fits."""
    for fields, reader in FORMATS.items():
        if isinstance(record, dict) and set(fields) <= record.keys():
            return reader
    return read_problem


def text(record: dict, name: str, optional: bool = False) -> str:
    """A field's text. Raises ValueError where it is none, or empty and not optional."""
    value = record.get(name) or ""
    if not isinstance(value, str) or not value and not optional:
        raise ValueError(f'"{name}" is missing or no text')
    return value


def make_test(given: Any, wanted: Any, function: str) -> dict:
    """A test on stdin or, as LiveCodeBench writes it, of a function: a JSON value a line, each an argument in turn."""
    if not isinstance(given, (str, list)):
        raise ValueError("a test's input is neither a text nor a list")
    if function:
        given = given if isinstance(given, list) else [json.loads(line) for line in given.split("\n") if line.strip()]
        wanted = json.loads(wanted) if isinstance(wanted, str) else wanted
        return {"fn_name": function, "args": given, "expected": wanted}
    return {"input": given, "output": wanted}


def read_livecodebench(record: dict) -> Problem:
    """Public and private tests together. Raises ValueError where a field has another form."""
    cases, private = json.loads(text(record, "public_test_cases")), text(record, "private_test_cases", optional=True)
    private = private if private.lstrip()[:1] in ("", "[") else unpickle_text(private)
    try:
        function = json.loads(text(record, "metadata", optional=True) or "{}").get("func_name") or ""
        cases = [(case["input"], case["output"]) for case in cases + json.loads(private or "[]")]
    except (LookupError, TypeError, AttributeError):
        raise ValueError('"public_test_cases", "private_test_cases" or "metadata" is of another form') from None
    return read_problem({"id": text(record, "question_id"), "question": text(record, "question_content"),
                         "starter_code": text(record, "starter_code", optional=True),
                         "difficulty": text(record, "difficulty", optional=True),
                         "tests": [make_test(*case, function) for case in cases]})


def unpickle_text(packed: str) -> str:
    """The one text in a base64 of a zlib of a pickle, found by reading the pickle's opcodes; none is ever executed."""
    unpack = zlib.decompressobj()
    try:
        data = unpack.decompress(base64.b64decode(packed, validate=True), UNPACKED)
    except (ValueError, zlib.error) as error:
        raise ValueError(f'"private_test_cases" is neither JSON nor packed JSON: {error}') from None
    if unpack.unconsumed_tail:
        raise ValueError(f'"private_test_cases" unpacks to more than {UNPACKED >> 20} MB')
    texts = []
    for opcode, argument, _ in pickletools.genops(data):  # raises ValueError
        if opcode.name.endswith("UNICODE") or opcode.name == "BINUNICODE8":
            texts.append(argument)
        elif opcode.name not in ("PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP"):
            raise ValueError(f'"private_test_cases" holds a pickle that is no plain text (opcode {opcode.name})')
    if len(texts) != 1:
        raise ValueError('"private_test_cases" holds a pickle that is not one text')
    return texts[0]


def read_rstar(record: dict) -> Problem:
    """A row of rStar-Coder's seed_testcase, with its first tests as far as they are not too many or too large."""
    function, tests, size = text(record, "func_name", optional=True), [], 0
    starter = text(record, "starter_code", optional=True)
    if function and record.get("class_name", "Solution") not in ("", "Solution"):
        raise LeftOut("with a class that is not named Solution")
    try:
        inputs, outputs = json.loads(text(record, "inputs")), json.loads(text(record, "outputs"))
        for given, wanted in zip(inputs + [], outputs + [], strict=True):  # TypeError unless both are lists
            test, more = make_test(given, wanted, function), len(str(given)) + len(str(wanted))
            check_test(test, "")
            if len(tests) < KEPT_TESTS and size + more <= KEPT_CHARACTERS:
                tests, size = [*tests, test], size + more
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise LeftOut("with broken tests") from None
    if not tests:
        raise LeftOut("without a test that is small enough")
    if function and not starter:  # or the prompt would ask for a program that reads stdin
        starter = f"class Solution:\n    def {function}(self, ...):"
    return read_problem({"id": text(record, "question_id"), "question": text(record, "question"), "tests": tests,
                         "starter_code": starter})


def read_humaneval(record: dict) -> Problem:
    """The question is the docstring, the starter code what stands before it.

    The asserts keep the rest of the prompt, imports and helpers: those are given, not the program's to redefine.
    """
    prompt, name = text(record, "prompt"), text(record, "entry_point")
    tree = ast.parse(prompt)
    function = next((node for node in tree.body if getattr(node, "name", "") == name), None)
    lines = [node for node in getattr(function, "body", []) if isinstance(getattr(node, "value", 0), ast.Constant)]
    if not lines or not isinstance(lines[0].value.value, str):
        raise ValueError(f'"prompt" has no function {name} with a docstring')
    tree.body.remove(function)
    head = "\n".join(prompt.split("\n")[: max(function.lineno, lines[0].lineno - 1)])
    asserts = f"{ast.unparse(tree)}\n{text(record, 'test')}\ncheck({name})\n"
    question = f"Write the Python function {name}.\n\n{inspect.cleandoc(lines[0].value.value)}"
    return read_problem({"id": text(record, "task_id"), "question": question, "starter_code": head,
                         "tests": [{"asserts": asserts, "entry_point": name}]})


def read_mbpp(record: dict) -> Problem:
    """The question is the task with its first assert, as is customary; the starter code the reference's `def` line."""
    asserts, code = record.get("test_list"), ast.parse(text(record, "code"))
    if not isinstance(asserts, list) or not asserts or not all(isinstance(each, str) for each in asserts):
        raise ValueError('"test_list" is not a list of asserts')
    given = [ast.unparse(node) for node in code.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    imports = record.get("test_imports") or []
    if not isinstance(imports, list) or not all(isinstance(each, str) for each in imports):
        raise ValueError('"test_imports" is not a list of lines')
    given += [*imports, text(record, "test_setup_code", optional=True)]
    names = {node.id for node in ast.walk(ast.parse("\n".join([*given, *asserts]))) if isinstance(node, ast.Name)}
    if any(isinstance(node, ast.ClassDef) and node.name in names for node in code.body):
        raise LeftOut("whose asserts need objects of the program")
    functions = [node for node in code.body if isinstance(node, ast.FunctionDef) and node.name in names]
    if not functions:
        raise ValueError('no function of "code" stands in "test_list"')
    task = record.get("text") or text(record, "prompt")  # the sanitized form has the latter
    return read_problem({
        "id": f"mbpp/{record.get('task_id')}", "question": f"{task}\nFor example: {asserts[0]}",
        "starter_code": f"def {functions[0].name}({ast.unparse(functions[0].args)}):",
        "tests": [{"asserts": "\n".join([*given, *asserts]), "entry_point": functions[0].name}]})


FORMATS = {("question_content",): read_livecodebench, ("inputs", "outputs"): read_rstar,
           ("prompt", "entry_point"): read_humaneval, ("test_list",): read_mbpp}
