"""The figures of a run and how they are shown: metrics, bootstrap intervals, the paper's three rows, the files.

Nothing of the method is here. A run hands over, for each row of the table, its evaluation groups as a judge ordered
them: objects with `group` (its `problem` and `candidates`), `ranked` (labels, best-ranked first), `answer` (the judge's
words) and `malformed`.
"""
import contextlib
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from data import write_whole
from rank_prompt import ndcg, random_ndcg

EVAL_CANDIDATES = 4  # N of Best-of-N (section 3.1)


def is_mixed(labels: list[int]) -> bool:
    return 0 < sum(labels) < len(labels)


def ranked_ndcg(ranked: list[int]) -> float:
    return ndcg(list(range(1, len(ranked) + 1)), ranked)


METRICS = {  # of one group's labels, best-ranked first; None: the group does not count
    "pass1": lambda ranked: sum(ranked) / len(ranked),
    "ndcg_all": ranked_ndcg,  # 0 for a group without a correct candidate, as the paper's figures imply
    "ndcg_mixed": lambda ranked: ranked_ndcg(ranked) if is_mixed(ranked) else None,
    "ndcg_random": lambda ranked: random_ndcg(ranked) if is_mixed(ranked) else None,
    "best_of_4": lambda ranked: float(ranked[0]),
    "oracle": lambda ranked: float(any(ranked)),
}


def per_problem(judged: list, metric: str) -> np.ndarray:
    """[P, 2]: for each problem the sum of a metric over its groups, and how many groups that are."""
    sums = defaultdict(lambda: [0.0, 0])
    for one in judged:
        value, entry = METRICS[metric](one.ranked), sums[one.group.problem.id]
        if value is not None:
            entry[0] += value
            entry[1] += 1
    return np.array(list(sums.values()))


def interval(tables: list[np.ndarray], seed: int = 0, draws: int = 4000) -> dict[str, float | None]:
    """A metric's mean with its 95 % bootstrap interval over problems, in per cent; of two tables, b - a, paired.

    Resampling problems, not groups: the groups of one problem are not independent. Both tables of a difference are
    drawn with the same problems. None where nothing counted.
    """

    def value(rows: np.ndarray) -> np.ndarray:  # rows: [..., P] indices of problems
        means = [100 * table[rows, 0].sum(-1) / table[rows, 1].sum(-1) for table in tables]
        return means[1] - means[0] if len(means) == 2 else means[0]

    count = len(tables[0])
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = value(np.arange(count))
        drawn = value(np.random.default_rng(seed).integers(count, size=(draws, count)))
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) and np.isfinite(mean) else (np.nan, np.nan)
    figures = {"mean": mean, "low": low, "high": high}
    return {name: None if np.isnan(figure) else round(float(figure), 3) for name, figure in figures.items()}


def summarise(rows: dict[str, list]) -> dict:
    """rows, gains and counts of report.json. gains: rows 2 and 3 minus row 1, the base (table 2 of the paper)."""
    tables = {name: {metric: per_problem(judged, metric) for metric in METRICS} for name, judged in rows.items()}
    gains = {gain: row for gain, row in (("judge", "trained_judge"), ("both", "trained")) if row in rows}
    return {
        "rows": {name: {m: interval([own[m]]) for m in METRICS} for name, own in tables.items()},
        "gains": {g: {m: interval([tables["base"][m], tables[row][m]]) for m in METRICS} for g, row in gains.items()},
        "counts": {name: counts(judged) for name, judged in rows.items()},
    }


def counts(judged: list) -> dict[str, int]:
    return {
        "groups": len(judged),
        "mixed groups": sum(is_mixed(one.ranked) for one in judged),
        "malformed rankings": sum(one.malformed for one in judged),
        "answers without a program": sum(len(one.ranked) - len(one.group.candidates) for one in judged),
    }


# --------------------------------------------------------------------------------------------------------- the files

TITLES = {
    "base": "base",
    "trained_judge": "trained judge, base's candidates",
    "trained": "trained generator and judge",
    "judge": "gain of the judge",
    "both": "gain of both",
}
COLUMNS = {
    "pass1": "pass@1",
    "ndcg_all": "NDCG",
    "ndcg_mixed": "NDCG mixed",
    "ndcg_random": "(random order)",
    "best_of_4": "Best-of-4",
    "oracle": "oracle of 4",
}
NOTE = (
    "Per cent, with 95 % bootstrap intervals over problems; gains are paired differences to the base. NDCG counts a "
    "group without a correct candidate as 0; NDCG mixed has only groups with both kinds, and a random order scores "
    "there what the next column says. The last row's mixed groups are not the first row's (a better generator leaves "
    "harder wrong programs): compare judges by the second row."
)


def table(summary: dict) -> str:
    """The rows and gains as a Markdown table, intervals included."""

    def line(name: str, figures: dict, sign: str = "") -> str:
        cells = [
            "-" if f["mean"] is None else f"{f['mean']:{sign}.1f} [{f['low']:{sign}.1f}, {f['high']:{sign}.1f}]"
            for f in (figures[column] for column in COLUMNS)
        ]
        return " | ".join([f"| {TITLES[name]}", *cells]) + " |"

    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [line(name, row) for name, row in summary["rows"].items()]
    return "\n".join(lines + [line(name, gain, "+") for name, gain in summary["gains"].items()])


def write_report(rows: dict[str, list], args: dict, seconds: dict[str, float], out: Path) -> str:
    """report.json, report.md, examples.md and, where matplotlib is installed, curves.png; returns report.md's text."""
    summary = summarise(rows)
    marks = sorted({one.group.problem.difficulty for one in rows["base"]})

    def only(mark: str) -> dict[str, list]:
        return {name: [one for one in own if one.group.problem.difficulty == mark] for name, own in rows.items()}

    summary["slices"] = {mark: summarise(only(mark)) for mark in marks} if len(marks) > 1 else {}
    summary |= {"args": args, "seconds": {name: round(s, 1) for name, s in seconds.items()}}
    parts = [f"# DuST on `{Path(args['model']).name}`, seed {args['seed']}", table(summary), NOTE]
    parts += [f"## Only: {mark or 'unmarked'}\n\n{table(own)}" for mark, own in summary["slices"].items()]
    counted = [f"- {TITLES[n]}: " + ", ".join(f"{v} {k}" for k, v in c.items()) for n, c in summary["counts"].items()]
    total = sum(seconds.values())
    spent = [f"- {name}: {s:.0f} s ({s / total:.0%})" for name, s in seconds.items()]
    parts += ["## Counts\n\n" + "\n".join(counted), f"## Time of this process: {total:.0f} s\n\n" + "\n".join(spent)]
    text = "\n\n".join(parts) + "\n"
    write_whole(out / "report.json", json.dumps(summary, indent=1))
    write_whole(out / "report.md", text)
    write_whole(out / "examples.md", examples(rows))
    if (out / "metrics.jsonl").exists():
        with contextlib.suppress(ImportError):
            draw_curves(out)
    return text


def examples(rows: dict[str, list], count: int = 3) -> str:
    """A few groups to look at: the statement, the candidates with labels, the judge's answer before and after."""
    parts, base = ["# Examples"], rows["base"]
    mixed = [i for i, one in enumerate(base) if is_mixed(one.ranked)]
    for i in (mixed or range(len(base)))[:count]:
        group = base[i].group
        parts.append(f"## {group.problem.id}\n\n{group.problem.question}")
        for number, c in enumerate(group.candidates, 1):
            parts.append(f"Candidate {number}, {'correct' if c.correct else 'wrong'}:\n```python\n{c.code}\n```")
        for name in ("base", "trained_judge"):
            if name in rows:
                parts.append(f"The judge's answer, {TITLES[name]}:\n\n````\n{rows[name][i].answer}\n````")
    return "\n\n".join(parts) + "\n"


def draw_curves(out: Path) -> None:
    """curves.png: what metrics.jsonl says of the training, step by step. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    figure, axes = pyplot.subplots(1, 4, figsize=(14, 3), layout="constrained")
    for axis, name in zip(axes, ("reward", "malformed", "entropy", "answer_tokens")):
        axis.plot([step["step"] for step in steps], [step[name] for step in steps])
        axis.set(title=name.replace("_", " "), xlabel="step")
    figure.savefig(out / "curves.png", dpi=120)
    pyplot.close(figure)
