"""Problems: what the model is asked, and the tests that decide whether a program is correct.

    from data import load_problems
    problems = load_problems("data/train.jsonl")

Reads the project's own JSONL, one problem a line:

    {"id": "p1", "question": "...", "tests": [{"input": "1 2\\n", "output": "3\\n"}]}

with optional "starter_code" and "difficulty". A test is {"input", "output"} for a program that reads stdin and prints,
or {"fn_name", "args", "expected"} for a function (also a method of class Solution).
"""
import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAMES = {"micro-train": HERE / "train.jsonl", "micro-eval": HERE / "eval.jsonl"}  # the shipped micro-lab


class BadInput(Exception):
    """Something that whoever started the run can put right; the message is one line that says what to do."""


@dataclass
class Problem:
    id: str
    question: str
    tests: list[dict]
    starter_code: str = ""
    difficulty: str = ""


def load_problems(path_or_name: str | Path) -> list[Problem]:
    """The problems of a JSONL file, or of a shipped set by its name (micro-train, micro-eval), in the file's order.

    Raises BadInput with the file, the line number and the reason for anything that is not as it should be: one bad
    line spoils a long run much later, or silently shrinks a test set.
    """
    path = NAMES.get(str(path_or_name), Path(path_or_name))
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        names = ", ".join(NAMES)
        raise BadInput(f"cannot read {path}: {reason} (a JSONL file of problems, or one of {names})") from None
    problems, first_line = [], {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            problem = read_problem(json.loads(line))
        except json.JSONDecodeError as error:
            raise BadInput(f"{path} line {number}: broken JSON: {error.msg} at column {error.colno}") from None
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path} line {number}: {error}") from None
        if problem.id in first_line:
            raise BadInput(f'{path} line {number}: id "{problem.id}" stands in line {first_line[problem.id]} already')
        first_line[problem.id] = number
        problems.append(problem)
    if not problems:
        raise BadInput(f"{path} holds no problems")
    return problems


def normalised(statement: str) -> str:
    """A statement without what can differ between copies of it: case, blanks, punctuation."""
    return re.sub(r"[\W_]+", " ", statement.casefold()).strip() or statement


def without_overlap(train: list[Problem], held_out: list[Problem]) -> tuple[list[Problem], int]:
    """The training problems whose statements are in no held-out problem, and how many are: they would be leaked."""
    seen = {normalised(problem.question) for problem in held_out}
    kept = [problem for problem in train if normalised(problem.question) not in seen]
    return kept, len(train) - len(kept)


def read_problem(record) -> Problem:
    """One parsed JSON line as a Problem. Raises ValueError with the reason."""
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    if "id" not in record:
        raise ValueError('"id" is missing')
    question = record.get("question")
    if not isinstance(question, str) or not question.strip():
        raise ValueError('"question" is missing or empty')
    question.encode()  # a lone surrogate is no text; UnicodeEncodeError is a ValueError
    tests = record.get("tests")
    if not isinstance(tests, list) or not tests:
        raise ValueError('"tests" is missing or empty; every problem needs at least one test')
    for index, test in enumerate(tests):
        check_test(test, f"tests[{index}]")
    for name in ("starter_code", "difficulty"):
        if not isinstance(record.get(name, ""), str):
            raise ValueError(f'"{name}" is not a string')
    return Problem(str(record["id"]), question, tests, record.get("starter_code", ""), record.get("difficulty", ""))


def check_test(test, where: str) -> None:
    if isinstance(test, dict) and "fn_name" in test:
        if not isinstance(test["fn_name"], str) or not isinstance(test.get("args"), list) or "expected" not in test:
            raise ValueError(f'{where} needs "fn_name" (a string), "args" (a list) and "expected"')
    elif not isinstance(test, dict) or not all(isinstance(test.get(name), str) for name in ("input", "output")):
        raise ValueError(f'{where} needs "input" and "output" (strings), or "fn_name", "args" and "expected"')


def write_whole(path: Path, text: str) -> None:
    """A file is there in full or not at all."""
    path.with_suffix(".new").write_text(text, encoding="utf-8")
    path.with_suffix(".new").replace(path)


def derive(*parts) -> int:
    """A seed for one unit of work. Each unit has its own, so that a resumed run draws what the whole one would have."""
    return zlib.crc32("/".join(map(str, parts)).encode())
