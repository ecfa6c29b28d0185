"""Write page.html into the folder of a run: one file that opens from the disk, to look into groups and steps.

    python -m plumbing.page RUN

It is page_template.html with the run's data in it. All text of a model is data: as JSON in a script element, where no
"<" is left, and from there into text nodes. What a run lacks, or what would make the page too large, is left out, and
the page says so.
"""
import argparse
import json
import sys
from pathlib import Path

from plumbing.problems import BadInput, write_atomic
from plumbing.settings import prepare_terminal

LIMIT = 2_900_000  # bytes of the page
STEPS_LIMIT = 1_200_000  # of these, for the steps of the training
TEXT = 4_000  # characters of one text; a longer one is cut in the middle
TOKENS = 400  # tokens of one answer; of a longer one the first and the last are shown
RANKINGS = {"base": "base-rankings", "trained_judge": "judge-rankings", "trained": "trained-rankings"}  # files of words
GENERATORS = {"base": ("base", "trained_judge"), "trained": ("trained",)}  # who wrote -> who judged, rows of the report
UNCHANGED = {"out", "resume", "device", "workers", "optimizer", "preset"}  # settings that say little about the result
TEMPLATE = Path(__file__).with_name("page_template.html")

# ------------------------------------------------------------------------------------------------------ the run's files


def read(path: Path):
    """Return the JSON value of a file, or of a .jsonl file the list of its lines; None if there is no such file.

    Numbers that JSON does not know become None. Raises BadInput for a file that is damaged.
    """
    if not path.exists():
        return None
    number = 1
    try:
        lines = [text := path.read_text(encoding="utf-8")]
        if path.suffix == ".jsonl":
            lines = text.split("\n")[:-1]  # the last line of a run that goes on may be unfinished
        values = []
        for number, line in enumerate(lines, 1):
            values.append(json.loads(line, parse_constant=lambda _: None))
        return values if path.suffix == ".jsonl" else values[0]
    except (ValueError, RecursionError):
        raise BadInput(f"{path} is damaged near line {number}: delete that line, or make the run again") from None
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None


def cut(text: str) -> str:
    """Return a text with its middle left out if it is too long: the end of an answer is the ranking."""
    more = len(text) - TEXT
    return text if more <= 0 else f"{text[: TEXT // 2]}\n[... {more} characters left out ...]\n{text[-TEXT // 2 :]}"


def to_json(value) -> str:
    """Return JSON in ASCII without "<", so that neither </script> nor <!-- can stand in it."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


# ------------------------------------------------------------------------------------------------------ what is shown


def groups_of(run: Path) -> list[dict]:
    """Return the evaluation groups: each has a part for each generator, its candidates and what the judges said."""
    judged, words = {name: [] for name in RANKINGS}, {}
    for line in read(run / "judged.jsonl") or []:
        if not line["final"]:
            judged[line["row"]].append(line)
    for name, file in RANKINGS.items():  # a line is [number of the group, [[text, whether it ended]]]
        words[name] = {key: text for key, ((text, _),) in read(run / f"{file}.jsonl") or []}
    written = {name: [] for name in GENERATORS}
    for line in read(run / "groups.jsonl") or []:
        written[line["row"]].append(line)

    groups = []
    for i, first in enumerate(judged["base"]):
        group = {"number": i + 1, "problem": first["problem"], "difficulty": first["difficulty"], "parts": {}}
        for generator, judges in GENERATORS.items():
            here = written[generator][i] if i < len(written[generator]) else {}
            group.setdefault("question", cut(here.get("question", "")))
            part = {"candidates": [c | {"code": c["code"] and cut(c["code"])} for c in here.get("candidates", [])]}
            for judge in [judge for judge in judges if judged[judge]]:
                one = judged[judge][i]
                part[judge] = {"ranked": one["ranked"], "order": one.get("order"), "malformed": one["malformed"],
                               "words": cut(words[judge].get(str(i), ""))}
            group["parts"][generator] = part
        groups.append(group)
    return groups


def pack_groups(groups: list[dict], limit: int) -> tuple[list, list]:
    """Return the groups that fit into a number of bytes, the first ones, and the list of their candidates.

    Many candidates are alike, so a group holds only their numbers in that list.
    """
    places, kept, size, used = {}, [], 0, 0
    for group in groups:
        for part in group["parts"].values():
            part["candidates"] = [places.setdefault(to_json(c), len(places)) for c in part["candidates"]]
        size += len(to_json(group)) + sum(len(text) + 1 for text in list(places)[used:]) + 1
        if size > limit:
            break
        kept.append(group)
        used = len(places)
    return kept, [json.loads(text) for text in list(places)[:used]]


def pack_steps(steps: list[dict], limit: int) -> list[dict]:
    """Return the steps that fit into a number of bytes, first those with tokens. The last line of a step counts.

    Of a long answer only the first and the last tokens are kept, with a number in between: how many are left out.
    """
    kept, size = [], 0
    steps = list({step["step"]: step for step in steps}.values())
    for step in sorted(steps, key=lambda step: not any("tokens" in group for group in step["groups"])):
        for group in step["groups"]:
            group |= {"prompt": cut(group["prompt"]), "answers": [cut(text) for text in group["answers"]]}
            for number, tokens in enumerate(group.get("tokens", [])):
                more, half = len(tokens) - TOKENS, TOKENS // 2
                group["tokens"][number] = [*tokens[:half], more, *tokens[-half:]] if more > 0 else tokens
        size += len(to_json(step)) + 1
        if size <= limit:
            kept.append(step)
    return sorted(kept, key=lambda step: step["step"])


def page_data(run: Path) -> dict:
    """Return all that the page shows. Raises BadInput for a folder that holds no run with a report."""
    report = read(run / "report.json")
    if report is None:
        raise BadInput(f"{run} holds no report.json: give the folder of a run that has ended, such as runs/tiny-1")
    if not isinstance(report, dict) or not {"rows", "args"} <= report.keys():
        raise BadInput(f"{run / 'report.json'} is not the report of a run")
    curve, steps = read(run / "curve.jsonl"), read(run / "steps.jsonl")
    changed = {name: value for name, value in report.get("changed", {}).items() if name not in UNCHANGED}
    data = {"run": run.resolve().name, "model": Path(report["args"].get("model", "")).name,
            "seed": report["args"].get("seed"), "mode": report["args"].get("mode"), "rows": report["rows"],
            "gains": report.get("gains", {}), "changed": changed, "curve": curve or [],
            "steps": pack_steps(steps or [], STEPS_LIMIT)}
    groups = groups_of(run)
    data["groups"], data["candidates"] = pack_groups(groups, LIMIT - len(TEMPLATE.read_bytes()) - len(to_json(data)))
    missing = {
        "Settings that differ from the defaults: report.json names none (an older run).": "changed" not in report,
        "The curve: there is no curve.jsonl (--eval-every makes it).": not curve and steps is not None,
        "The groups: there is no judged.jsonl.": not groups,
        "The programs of the groups: there is no groups.jsonl (an older run).": not (run / "groups.jsonl").exists(),
        "The steps of the training: there is no steps.jsonl (nothing was trained, or an older run).": steps is None,
        f"Groups {len(data['groups']) + 1} to {len(groups)}: the page would be larger than 3 MB.":
            len(data["groups"]) < len(groups),
        f"{len(steps or []) - len(data['steps'])} of {len(steps or [])} steps: the page would be larger than 3 MB.":
            len(data["steps"]) < len(steps or []),
    }
    return data | {"left_out": [sentence for sentence, applies in missing.items() if applies]}


def write_page(run: Path) -> Path:
    """Write page.html into a run's folder and return its path. Raises BadInput as page_data does."""
    before, after = TEMPLATE.read_text(encoding="utf-8").split("DATA_OF_THE_RUN")
    try:
        data = page_data(run)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise BadInput(f"{run}: its files do not belong together ({type(error).__name__}: {error})") from None
    write_atomic(run / "page.html", before + to_json(data) + after)
    return run / "page.html"


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, or 2 after an error that the user can correct."""
    parser = argparse.ArgumentParser(prog="python -m plumbing.page", description="Write page.html for a run.")
    parser.add_argument("run", type=Path, help="the run's folder, for example runs/tiny-1")
    try:
        print(write_page(parser.parse_args(argv).run))
        return 0
    except BadInput as error:
        print(f"page: {error}", file=sys.stderr)
    except OSError as error:
        print(f"page: {error.filename}: {error.strerror}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    prepare_terminal()
    raise SystemExit(main())
