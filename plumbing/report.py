"""The figures of a run and how they are shown: metrics, bootstrap intervals, the paper's three rows, the files.

Of the method only the finals of Best-of-8 are here. A run hands over, for each row of the table, its evaluation groups
as a judge ordered them: objects with `group` (a dataclass: its `problem` and `candidates`), `ordered` (those,
best-ranked first), `ranked` (their labels), `answer` (the judge's words) and `malformed`. Its finals are of the same
kind: the two best-ranked of each of two groups of one problem, ranked once more, so that the winner is the best of
eight.
"""
import contextlib
import json
from collections import defaultdict
from dataclasses import replace
from math import comb
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from plumbing.problems import write_atomic
from rank_prompt import ndcg, pair_accuracy, random_ndcg

EVAL_CANDIDATES = 4  # N of Best-of-N (section 3.1)
CURVE = (1, 2, 4, 8)  # the N of the curve


def is_mixed(labels: list[int]) -> bool:
    """Both right and wrong ones among them."""
    return 0 < sum(labels) < len(labels)


def as_ranked(measure, ranked: list[int]) -> float:
    """A measure of rank_prompt.py for labels that stand in the judge's order already."""
    return measure(list(range(1, len(ranked) + 1)), ranked)


def best_of(n: int, ranked: list[int]) -> float:
    """The chance of submitting a correct program when n of the ranked ones are there: the mean over all subsets of n.

    Of each subset the best-ranked is submitted: place i is that of C(K - 1 - i, n - 1) of the C(K, n) subsets. The
    order is the one of all K, so this is what a ranking of n would be worth if the others did not change the judge's
    mind.
    """
    k = len(ranked)
    return sum(label * comb(k - 1 - i, n - 1) for i, label in enumerate(ranked)) / comb(k, n)


def final_groups(judged: list, repeats: int) -> list:
    """For Best-of-8: of each two groups of a problem, the better half of both. Their judge ranks that once more.

    So a ranking never has more candidates than in training. judged: R groups a problem; an odd one is left out.
    """
    finals = []
    for start in range(0, len(judged), repeats):
        own = judged[start : start + repeats]
        for first, second in zip(own[::2], own[1::2]):
            best = [c for one in (first, second) for c in one.ordered[: len(one.ordered) // 2]]
            finals.append(replace(first.group, candidates=best))
    return finals


METRICS = {  # of one group's labels, best-ranked first; None: the group does not count
    "pass1": lambda ranked: sum(ranked) / len(ranked),
    "ndcg_all": lambda ranked: as_ranked(ndcg, ranked),  # 0 without a correct candidate, as the paper's figures imply
    "ndcg_mixed": lambda ranked: as_ranked(ndcg, ranked) if is_mixed(ranked) else None,
    "ndcg_random": lambda ranked: random_ndcg(ranked) if is_mixed(ranked) else None,
    "pair_accuracy": lambda ranked: as_ranked(pair_accuracy, ranked) if is_mixed(ranked) else None,
    "best_of_2": lambda ranked: best_of(2, ranked),
    "best_of_4": lambda ranked: float(ranked[0]),
    "oracle": lambda ranked: float(any(ranked)),
}


def mean(values: list) -> float:
    """0 for an empty list: a step of --mode rank-onpolicy may find no mixed group."""
    return sum(values) / len(values) if values else 0.0


def describe_rollouts(rollouts: list) -> dict[str, float]:
    """What to log of any scored grpo.Rollouts; means over all their answers."""
    return {
        "prompts": len(rollouts),
        "reward": mean([reward for r in rollouts for reward in r.rewards.tolist()]),
        "truncated": mean([not ended for r in rollouts for ended in r.finished]),
        "answer_tokens": mean([len(answer) for r in rollouts for answer in r.answers]),
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


def best_of_n(judged: list, finals: list) -> dict[str, np.ndarray]:
    """The curve of Best-of-N, for each N a table as per_problem gives it; N = 8 only where there are finals."""
    tables = {n: per_problem(judged, metric) for n, metric in zip("124", ("pass1", "best_of_2", "best_of_4"))}
    return tables | ({"8": per_problem(finals, "best_of_4")} if finals else {})


def oracle_of_n(judged: list) -> dict[str, np.ndarray]:
    """The bound of that curve: how often one of N programs is correct, 1 - C(n - c, N) / C(n, N) (unbiased).

    n programs of a problem, c of them correct, all its groups together; an N above n is left out.
    """
    labels = defaultdict(list)
    for one in judged:
        labels[one.group.problem.id] += one.ranked
    fewest = min(map(len, labels.values()))
    return {
        str(n): np.array([[1 - comb(len(own) - sum(own), n) / comb(len(own), n), 1.0] for own in labels.values()])
        for n in CURVE if n <= fewest
    }


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
    return with_interval(mean, drawn)


def with_interval(mean: float, drawn: np.ndarray) -> dict[str, float | None]:
    """A figure with the middle 95 % of its bootstrap draws; None where it is not finite."""
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) and np.isfinite(mean) else (np.nan, np.nan)
    figures = {"mean": mean, "low": low, "high": high}
    return {name: None if np.isnan(figure) else round(float(figure), 3) for name, figure in figures.items()}


def curves(rows: dict[str, list], finals: dict[str, list]) -> dict:
    """best_of_n of report.json: for each row and N the judge's choice; its bounds, an oracle's and a random one."""
    figures = {}
    for name, judged in rows.items():
        figures[name] = {n: interval([own]) for n, own in best_of_n(judged, finals.get(name, [])).items()}
        figures[name]["oracle"] = {n: interval([own]) for n, own in oracle_of_n(judged).items()}
        figures[name]["random"] = figures[name]["1"]  # pass@1, whatever N is
    return figures


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
    """How many groups were judged, and in how many something has to be known about them."""
    return {
        "groups": len(judged),
        "mixed groups": sum(is_mixed(one.ranked) for one in judged),
        "malformed rankings": sum(one.malformed for one in judged),
        "answers without a program": sum(len(one.ranked) - len(one.group.candidates) for one in judged),
    }


def judged_lines(rows: dict[str, list], finals: dict[str, list]) -> str:
    """judged.jsonl: a line for each group, so that every figure can be computed again; read_judged reads it."""
    lines = [
        json.dumps({
            "row": name, "problem": one.group.problem.id, "difficulty": one.group.problem.difficulty,
            "ranked": one.ranked, "shown": len(one.group.candidates), "malformed": one.malformed,
            "final": kind is finals,
        })
        for kind in (rows, finals) for name, judged in kind.items() for one in judged
    ]
    return "".join(line + "\n" for line in lines)


def read_judged(path: Path) -> tuple[dict[str, list], dict[str, list]]:
    """(rows, finals) as write_report took them, without programs and answers, from a run's judged.jsonl."""
    rows, finals = defaultdict(list), defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        one = json.loads(line)
        problem = SimpleNamespace(id=one["problem"], difficulty=one["difficulty"])
        group = SimpleNamespace(problem=problem, candidates=[None] * one["shown"])
        judged = SimpleNamespace(group=group, ranked=one["ranked"], answer="", malformed=one["malformed"])
        (finals if one["final"] else rows)[one["row"]].append(judged)
    return dict(rows), dict(finals)


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


OF_CANDIDATES = {"base": ("base", "trained_judge"), "trained": ("trained",)}  # whose candidates a row's judge ordered
CURVE_NOTE = (
    "Per cent. N = 1 is pass@1; N = 2 is the mean over all pairs of the four ranked; N = 8, where a problem has two "
    "groups (`--repeats`), is the winner of a final between the two best-ranked of each, ranked once more by the same "
    "judge. The oracle submits a correct program wherever there is one."
)


def cell(figure: dict | None, sign: str = "") -> str:
    """One figure with its interval, as it stands in a table."""
    if figure is None or figure["mean"] is None:
        return "-"
    return f"{figure['mean']:{sign}.1f} [{figure['low']:{sign}.1f}, {figure['high']:{sign}.1f}]"


def table(summary: dict) -> str:
    """The rows and gains as a Markdown table, intervals included."""

    def line(name: str, figures: dict, sign: str = "") -> str:
        return " | ".join([f"| {TITLES[name]}", *(cell(figures[column], sign) for column in COLUMNS)]) + " |"

    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [line(name, row) for name, row in summary["rows"].items()]
    return "\n".join(lines + [line(name, gain, "+") for name, gain in summary["gains"].items()])


def curve_table(figures: dict) -> str:
    """`curves` as a Markdown table: the oracle above the judges of the same candidates, the random choice below.

    An N of which there are not enough programs has no column.
    """
    shown = [n for n in CURVE if any(str(n) in own["oracle"] for own in figures.values())]

    def line(title: str, own: dict) -> str:
        return " | ".join([f"| {title}", *(cell(own.get(str(n))) for n in shown)]) + " |"

    lines = ["| Best-of-N | " + " | ".join(f"N = {n}" for n in shown) + " |", "|---" * (len(shown) + 1) + "|"]
    for owner, judges in OF_CANDIDATES.items():
        if owner in figures:
            lines.append(line(f"{owner}'s candidates: oracle", figures[owner]["oracle"]))
            lines += [line(TITLES[name], figures[name]) for name in judges if name in figures]
            chance = dict.fromkeys(map(str, CURVE), figures[owner]["random"])
            lines.append(line(f"{owner}'s candidates: random choice", chance))
    return "\n".join(lines)


def write_report(rows: dict[str, list], finals: dict[str, list], args: dict, seconds: dict[str, float],
                 out: Path) -> str:
    """report.json, report.md, examples.md, judged.jsonl and, where matplotlib is installed, curves.png and
    best_of_n.png; returns report.md's text.

    rows, finals: the groups of each row (base, trained_judge, trained) as its judge ordered them; finals may be empty,
    for one group a problem makes none.
    """
    summary, finals = summarise(rows), finals or {}
    for name, own in ((name, own) for name, own in finals.items() if own):
        summary["counts"][name] |= {"finals": len(own), "malformed finals": sum(one.malformed for one in own)}
    marks = sorted({one.group.problem.difficulty for one in rows["base"]})

    def only(mark: str) -> dict[str, list]:
        return {name: [one for one in own if one.group.problem.difficulty == mark] for name, own in rows.items()}

    summary["slices"] = {mark: summarise(only(mark)) for mark in marks} if len(marks) > 1 else {}
    summary |= {"best_of_n": curves(rows, finals), "args": args}
    summary["seconds"] = {name: round(s, 1) for name, s in seconds.items()}
    parts = [f"# DuST on `{Path(args['model']).name}`, seed {args['seed']}", table(summary), NOTE]
    parts += ["## Best-of-N", curve_table(summary["best_of_n"]), CURVE_NOTE]
    parts += [f"## Only: {mark or 'unmarked'}\n\n{table(own)}" for mark, own in summary["slices"].items()]
    counted = [f"- {TITLES[n]}: " + ", ".join(f"{v} {k}" for k, v in c.items()) for n, c in summary["counts"].items()]
    total = sum(seconds.values())
    spent = [f"- {name}: {s:.0f} s ({s / total:.0%})" for name, s in seconds.items()]
    parts += ["## Counts\n\n" + "\n".join(counted), f"## Time of this process: {total:.0f} s\n\n" + "\n".join(spent)]
    text = "\n\n".join(parts) + "\n"
    write_atomic(out / "judged.jsonl", judged_lines(rows, finals))
    write_atomic(out / "report.json", json.dumps(summary, indent=1))
    write_atomic(out / "report.md", text)
    write_atomic(out / "examples.md", examples(rows))
    with contextlib.suppress(ImportError):
        draw_best_of_n(summary["best_of_n"], out)
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


def new_figure(size: tuple[float, float]):
    """(pyplot, figure) of a file: no window, white with a frame on any page. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=size, layout="constrained", facecolor="white", edgecolor="#b8b8b8", linewidth=3)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # inches: a margin inside the frame
    return pyplot, figure


LOGGED = {  # of metrics.jsonl, what curves.png shows and its words for it
    "reward": "reward",
    "ref_kl": "KL to the reference, nats a token",
    "entropy": "entropy, nats a token",
    "malformed": "malformed, share",
    "zero_variance": "groups of equal rewards, share",
    "answer_tokens": "tokens an answer",
}


def draw_curves(out: Path) -> None:
    """curves.png: what metrics.jsonl says of the training, step by step. Raises ImportError without matplotlib."""
    path = out / "metrics.jsonl"
    steps = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    names = [name for name in LOGGED if any(name in step for step in steps)]
    if not any(step.get("ref_kl") for step in steps):  # no reference: --kl 0, or --mode sft, whose loss does fall
        names = ["loss" if name == "ref_kl" else name for name in names]
    if not names:
        return
    pyplot, figure = new_figure((10, 5))
    axes = figure.subplots(2, 3).flat
    for name, axis in zip(names, axes):
        title, numbers = LOGGED.get(name, name), [step["step"] for step in steps]
        axis.plot(numbers, [step.get(name) for step in steps])
        if name == "reward" and any("constant" in step for step in steps):  # what knowing nothing earns on these groups
            axis.plot(numbers, [step.get("constant") for step in steps], "--", color=COLOURS["base"])
            title += " (dashed: constant)"
        axis.set_title(title, fontsize=12)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    for axis in axes:  # those left over
        axis.set_axis_off()
    figure.savefig(out / "curves.png", dpi=120)
    pyplot.close(figure)


COLOURS = {"base": "#6b6b6b", "trained_judge": "#d1700f", "trained": "#1f5fbf"}  # of the rows, in every figure


def plot_best_of_n(axis, figures: dict) -> None:
    """`curves` as lines: a judge with its intervals, the oracle dashed above, the random choice dotted below."""
    for number, (name, own) in enumerate(figures.items()):
        curve, colour = {n: own[str(n)] for n in CURVE if str(n) in own}, COLOURS[name]
        means = [f["mean"] for f in curve.values()]
        ends = [[f["mean"] - f["low"] for f in curve.values()], [f["high"] - f["mean"] for f in curve.values()]]
        places = [n * 1.02 ** (number - 1) for n in curve]  # side by side, so that no interval hides another
        axis.plot(places, means, color=colour, marker="o", label=TITLES[name])
        axis.errorbar(places, means, ends, color=colour, fmt="none", capsize=3)
        if name in OF_CANDIDATES:  # the others' candidates are the base's
            oracle = {n: own["oracle"][str(n)]["mean"] for n in CURVE if str(n) in own["oracle"]}
            axis.plot(list(oracle), list(oracle.values()), "--", color=colour, label=f"{name}'s candidates: oracle")
            axis.plot(list(oracle), [own["random"]["mean"]] * len(oracle), ":", color=colour,
                      label=f"{name}'s candidates: random choice")
            axis.set_xscale("log", base=2)
            axis.set_xticks(list(oracle), list(map(str, oracle)))
    axis.set_title("Best-of-N", fontsize=13)
    axis.set_xlabel("N programs", fontsize=12)
    axis.set_ylabel("the submitted one is correct, %", fontsize=12)
    axis.set_ylim(0, 100)
    axis.tick_params(labelsize=12)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=12, loc="upper left", bbox_to_anchor=(1.01, 1))


def draw_best_of_n(figures: dict, out: Path) -> None:
    """best_of_n.png. Raises ImportError without matplotlib."""
    pyplot, figure = new_figure((10, 4.5))
    plot_best_of_n(figure.subplots(), figures)
    figure.savefig(out / "best_of_n.png", dpi=120)
    pyplot.close(figure)
