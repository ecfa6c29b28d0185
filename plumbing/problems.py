"""Problems: what the model is asked, and the tests that decide whether a program is correct.

    from plumbing.problems import load_problems
    problems = load_problems("data/train.jsonl")

Reads public sets by their name or from a file in their format (sets.py), and the project's own JSONL, one problem a
line:

    {"id": "p1", "question": "...", "tests": [{"input": "1 2\\n", "output": "3\\n"}]}

with optional "starter_code" and "difficulty". A test is {"input", "output"} for a program that reads stdin and prints,
or {"fn_name", "args", "expected"} for a function (also a method of class Solution), or {"asserts", "entry_point"}:
Python that calls the program's functions, and the name of the one it is about.
"""
import json
import os
import re
import sys
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

DATA = Path(__file__).resolve().parent.parent / "data"
NAMES = {"micro-train": DATA / "train.jsonl", "micro-eval": DATA / "eval.jsonl"}  # the shipped micro-lab


class BadInput(Exception):
    """Something that whoever started the run can put right; the message is one line that says what to do."""


def first_line(error: Exception) -> str:
    """An error's first line, or its type where it has no words."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@dataclass
class Problem:
    """A task: its statement, its tests (forms above), and what a program has to start with, where that is given."""

    id: str
    question: str
    tests: list[dict]
    starter_code: str = ""
    difficulty: str = ""


def load_problems(path_or_name: str | Path, limit: int = 0) -> list[Problem]:
    """The problems of a JSONL or Parquet file, or of a set by its name, in order; with a limit, the first so many.

    The format is recognised by its fields. Raises BadInput with the file, the line number and the reason for anything
    that is not as it should be: one bad line spoils a long run much later, or silently shrinks a test set. Only what is
    known to be broken in a public set is left out, and one line on stderr says how much of it.
    """
    from plumbing import sets  # not above: it stands on this module

    name = str(path_or_name)
    problems, place, statements, left_out = [], {}, set(), Counter()
    for path, where, record in sets.records(str(NAMES.get(name, name))):
        reader = sets.reader_of(record)
        try:
            problem = reader(record)
            if reader is sets.read_rstar:  # which has a row for each version of a problem
                statement = normalised(problem.question)
                if statement in statements or problem.id in place:
                    raise sets.LeftOut("that stand there already")
                statements.add(statement)
        except sets.LeftOut as reason:
            left_out[str(reason)] += 1
            continue
        except (ValueError, SyntaxError, RecursionError) as error:
            raise BadInput(f"{path} {where}: {error}") from None
        if problem.id in place:
            raise BadInput(f'{path} {where}: id "{problem.id}" stands in {place[problem.id]} already')
        place[problem.id] = where
        problems.append(problem)
        if len(problems) == limit:
            break
    if not problems:
        raise BadInput(f"{name} holds no problems" + " that can be used" * bool(left_out))
    notes = [f"{name}: left out {count} problems {reason}" for reason, count in left_out.items()]
    notes += [sets.compare_with_paper(name, problems)] if not limit else []
    if os.environ.get("RANK", "0") == "0":  # of several processes that read the same, one says so
        print(*filter(None, notes), sep="\n", end="\n" * any(notes), file=sys.stderr)
    return problems


def read_json(path: str) -> Iterator[tuple[str, Any]]:
    """Where it stands, and what it holds, of each line of a JSONL file."""
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                try:
                    record = json.loads(line) if line.strip() else None
                except json.JSONDecodeError as error:
                    raise BadInput(f"{path} line {number}: broken JSON: {error.msg} at column {error.colno}") from None
                except (ValueError, RecursionError) as error:
                    raise BadInput(f"{path} line {number}: {error}") from None
                if line.strip():
                    yield f"line {number}", record
    except (OSError, UnicodeDecodeError) as error:
        from plumbing.sets import HUB

        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        names = ", ".join([*NAMES, *HUB])
        raise BadInput(f"cannot read {path}: {reason} (a JSONL or Parquet file, or one of {names})") from None


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
    for text in (question, str(record["id"]), str(record.get("starter_code", ""))):
        text.encode()  # a lone surrogate is no text; UnicodeEncodeError is a ValueError
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
    """Raises ValueError, beginning with `where`, for a test of none of the three forms."""
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
        raise ValueError(f'{where} needs "input" and "output" (strings), or "fn_name", "args" and "expected", '
                         'or "asserts"')


def write_atomic(path: Path, text: str) -> None:
    """A file is there in full or not at all."""
    path.with_suffix(".new").write_text(text, encoding="utf-8")
    path.with_suffix(".new").replace(path)


def seed_for(*parts) -> int:
    """A seed for one unit of work. Each unit has its own, so that a resumed run draws what the whole one would have."""
    return zlib.crc32("/".join(map(str, parts)).encode())
