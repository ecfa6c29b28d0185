"""Write page.html into the folder of a run: one file that opens from the disk, to look into groups and steps.

    python -m plumbing.page RUN

It is page_template.html with the run's data in it. All text of a model is data: as JSON in a script element, where no
"<" is left, and from there into text nodes. What a run lacks, or what would make the page too large, is left out, and
the page says so.
"""
import argparse
import json
import sys
from itertools import accumulate
from pathlib import Path

from plumbing.problems import BadInput, write_atomic
from plumbing.settings import prepare_terminal

LIMIT = 2_900_000  # bytes of the page; at most half of them are steps
TEXT = 4_000  # characters of one text
TOKENS = 400  # tokens of one answer
GAP = "\n[... the middle is left out ...]\n"
FILES = ("judged", "groups", "base-rankings", "judge-rankings", "curve", "steps")
WORDS = {"base": "base-rankings", "trained_judge": "judge-rankings"}  # a judge's row in the report -> its file of words
FILTERS = {  # the labels of the programs that the judges put first, before and after the training
    (0, 1): "mended by training", (1, 0): "broken by it", (1, 1): "both right", (0, 0): "both wrong",
    (1,): "right", (0,): "wrong",  # of a run without training
}
TEMPLATE = Path(__file__).with_name("page_template.html")


def read(path: Path) -> list:
    """Return the values in a file: of report.json one, of a .jsonl file one a line, without an unfinished last line.

    A missing file has none. A number that JSON does not know becomes None. Raises BadInput for a damaged file.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    parts = text.split("\n")[:-1] if path.suffix == ".jsonl" else [text]
    try:
        return [json.loads(part, parse_constant=lambda _: None) for part in parts]
    except (ValueError, RecursionError):
        raise BadInput(f"{path} is damaged: delete its broken lines, and run it again with --resume") from None


def to_json(value) -> str:
    """Return JSON in ASCII without "<", so that neither </script> nor <!-- can stand in it."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def cut(whole, most: int = TEXT, gap=GAP):
    """Return a text or a list; a long one without its middle. The end of an answer is the ranking."""
    return whole if len(whole) <= most else whole[: most // 2] + gap + whole[-most // 2 :]


def first_that_fit(values: list, limit: int) -> list:
    """Return the first values, as many as fit into a number of bytes of JSON."""
    sizes = accumulate(len(to_json(value)) + 1 for value in values)
    return [value for value, size in zip(values, sizes) if size <= limit]


def make_groups(files: dict[str, list], judges: list[str]) -> list[dict]:
    """Return the groups of the base's programs, each with the order and the words of every judge."""
    if not files["groups"] or not files["judged"]:
        return []
    written = [line for line in files["groups"] if line["row"] == "base"]
    orders = [[line for line in files["judged"] if line["row"] == judge and not line["final"]] for judge in judges]
    words = [{key: text for key, ((text, _),) in files[WORDS[judge]]} for judge in judges]

    for i, (group, *judged) in enumerate(zip(written, *orders, strict=True)):
        group["number"] = i + 1
        group["question"] = cut(group["question"])
        for one in group["candidates"]:
            one["code"] = one["code"] and cut(one["code"])
        group["judges"] = [one | {"words": cut(said.get(str(i), ""))} for one, said in zip(judged, words)]
        group["filters"] = ["all", FILTERS[tuple(one["ranked"][0] for one in judged)]]
        if any(one["malformed"] for one in judged):
            group["filters"].append("malformed")
    return written


def make_steps(lines: list[dict]) -> list[dict]:
    """Return the groups whose tokens are kept, each with the number of its step."""
    steps = [group | {"number": line["step"]} for line in lines for group in line["groups"] if "tokens" in group]
    for step in steps:
        step["answers"] = None  # the tokens say the same
        step["prompt"] = cut(step["prompt"])
        step["tokens"] = [cut(tokens, TOKENS, [[GAP, None, None, None]]) for tokens in step["tokens"]]
    return steps


def page_data(run: Path) -> dict:
    """Return all that the page shows. Raises BadInput for a folder that holds no run with a report."""
    [report] = read(run / "report.json") or [None]
    if report is None:
        raise BadInput(f"{run} holds no report.json: give the folder of a run that has ended, such as runs/tiny-1")
    files = {name: read(run / f"{name}.jsonl") for name in FILES}
    judges = [judge for judge in WORDS if judge in report["rows"]]
    groups, steps = make_groups(files, judges), make_steps(files["steps"])

    data = {name: report[name] for name in ("rows", "gains", "changed")}
    data |= {"run": run.resolve().name, "curve": files["curve"], "steps": first_that_fit(steps, LIMIT // 2)}
    names = ["all", *(name for labels, name in FILTERS.items() if len(labels) == len(judges)), "malformed"]
    data["groups"] = first_that_fit(groups, LIMIT - len(TEMPLATE.read_bytes()) - len(to_json(data)))
    data["filters"] = {name: sum(name in group["filters"] for group in data["groups"]) for name in names}
    data["left_out"] = [f"{name}.jsonl: the run has no such file, or an empty one" for name in FILES if not files[name]]
    for name, whole in (("groups", groups), ("steps", steps)):
        if more := len(whole) - len(data[name]):
            data["left_out"].append(f"the last {more} of {len(whole)} {name}: the page would be larger than 3 MB")
    return data


def write_page(run: Path) -> Path:
    """Write page.html into a run's folder and return its path. Raises BadInput as page_data does."""
    before, after = TEMPLATE.read_text(encoding="utf-8").split("DATA_OF_THE_RUN")
    try:
        data = page_data(run)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise BadInput(f"{run}: its files do not fit together ({type(error).__name__}: {error}); run it again with "
                       "--resume") from None
    write_atomic(run / "page.html", before + to_json(data) + after)
    return run / "page.html"


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, or 2 after an error that the user can correct."""
    parser = argparse.ArgumentParser(prog="python -m plumbing.page", description="Write page.html for a run.")
    parser.add_argument("run", type=Path, help="the run's folder, for example runs/tiny-1")
    try:
        print(write_page(parser.parse_args(argv).run))
        return 0
    except (BadInput, OSError) as error:
        print(f"page: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    prepare_terminal()
    raise SystemExit(main())
