"""Report a run: means with bootstrap intervals, tables, plots, and the files that hold them.

`metrics` is dust.metrics_of(N), with N programs in a group. `rows` has the keys "base", "trained_judge" (the trained
judge on the base's candidates) and "trained". A row is a list of dust.RankedGroup, or of what `read_judged` returns.
`finals` has the same form; its groups are the finals of Best-of-2N, which the judge ranks in a second round.
"""
import contextlib
import json
from collections import defaultdict
from math import comb
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from plumbing import page
from plumbing.problems import write_atomic

CURVE = "curve"  # the folder, in that of the run, of the points of the curve
OF_THIS_MACHINE = {"out", "resume", "workers", "device"}  # settings that say nothing about what a run has done
SHOWN = 200  # characters of a test in groups.jsonl

# ------------------------------------------------------------------------------------------------------- the figures


def per_problem(judged: list, metric) -> np.ndarray:
    """Return [P, 2]: for each problem the sum of a metric over its groups, and how many of its groups count."""
    values = defaultdict(list)
    for one in judged:
        values[one.group.problem.id].append(metric(one.ranked, len(one.group.candidates)))
    counted = [[value for value in own if value is not None] for own in values.values()]
    return np.array([[sum(own), len(own)] for own in counted], dtype=float)


def best_of_n(judged: list, finals: list, metrics: dict) -> dict[str, np.ndarray]:
    """Return Best-of-N: N -> a table as per_problem returns it. Without finals there is no 2N."""
    n, top = len(judged[0].ranked), metrics[top_of(metrics)]
    tables = {"1": per_problem(judged, metrics["pass1"]), "2": per_problem(judged, metrics["best_of_2"])}
    return tables | {str(n): per_problem(judged, top)} | ({str(2 * n): per_problem(finals, top)} if finals else {})


def top_of(figures: dict) -> str:
    """Return the name of Best-of-N among figures or metrics: "best_of_4" for N = 4, beside which "best_of_2" stands."""
    return max((name for name in figures if name.startswith("best_of_")), key=lambda name: int(name[8:]))


def oracle_of_n(judged: list) -> dict[str, np.ndarray]:
    """Return the upper bound of Best-of-N: how often at least one of N programs is correct.

    If c of the P programs of a problem are correct, 1 - C(P - c, N) / C(P, N) is an unbiased estimate.
    """
    labels = defaultdict(list)
    for one in judged:
        labels[one.group.problem.id] += one.ranked
    most, size = min(map(len, labels.values())), len(judged[0].ranked)
    return {str(n): np.array([[1 - comb(own.count(0), n) / comb(len(own), n), 1.0] for own in labels.values()])
            for n in (1, 2, size, 2 * size) if n <= most}


def interval(tables: list[np.ndarray], seed: int = 0, draws: int = 4000) -> dict[str, float | None]:
    """Return the mean of a metric with its 95 % bootstrap interval, in per cent. Two tables (a, b): of the gain b - a.

    Each draw takes problems, not groups, because the groups of one problem are not independent. A gain is paired: a
    draw takes the same problems from both tables. The figures are None if no group counts.
    """
    drawn = np.random.default_rng(seed).integers(len(tables[0]), size=(draws, len(tables[0])))
    rows = np.vstack([np.arange(len(tables[0])), drawn])  # [1 + draws, P] problems; the first row is the mean's
    with np.errstate(invalid="ignore", divide="ignore"):
        means = [100 * table[rows, 0].sum(-1) / table[rows, 1].sum(-1) for table in tables]
        values = means[1] - means[0] if len(means) == 2 else means[0]
    return with_interval(values[0], values[1:])


def with_interval(mean: float, drawn: np.ndarray) -> dict[str, float | None]:
    """Return a mean with the middle 95 % of its bootstrap draws. A figure that is not finite becomes None."""
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) and np.isfinite(mean) else (np.nan, np.nan)
    figures = {"mean": mean, "low": low, "high": high}
    return {name: None if np.isnan(figure) else round(float(figure), 3) for name, figure in figures.items()}


def best_of_rows(rows: dict[str, list], finals: dict[str, list], metrics: dict) -> dict:
    """Return "best_of_n" of report.json: for each row and N, how good the judge, an oracle and chance choose."""
    figures = {}
    for name, judged in rows.items():
        figures[name] = {n: interval([own]) for n, own in best_of_n(judged, finals.get(name, []), metrics).items()}
        figures[name]["oracle"] = {n: interval([own]) for n, own in oracle_of_n(judged).items()}
        figures[name]["random"] = figures[name]["1"]  # a random choice is right as often as a program: pass@1
    return figures


def summarise(rows: dict[str, list], metrics: dict) -> dict:
    """Return "rows", "gains", "counts" and the headline of report.json. A gain is row 2 or 3 minus row 1 (table 2)."""
    tables = {name: {m: per_problem(judged, metrics[m]) for m in metrics} for name, judged in rows.items()}
    gains = {gain: row for gain, row in (("judge", "trained_judge"), ("both", "trained")) if row in rows}
    one_answer = [tables["base"][top_of(metrics)], tables["trained"]["pass1"]] if "trained" in rows else None
    return {
        "one answer against Best-of-N": one_answer and interval(one_answer),
        "rows": {name: {m: interval([own[m]]) for m in metrics} for name, own in tables.items()},
        "gains": {g: {m: interval([tables["base"][m], tables[row][m]]) for m in metrics} for g, row in gains.items()},
        "counts": {name: {
            "groups": len(judged),
            "mixed groups": sum(len(set(one.ranked)) > 1 for one in judged),
            "malformed rankings": sum(one.malformed for one in judged),
            "answers without a program": sum(len(one.ranked) - len(one.group.candidates) for one in judged),
        } for name, judged in rows.items()},
    }


# --------------------------------------------------------------------------------------------------------- the curve

def keep_point(file: Path, own: list, judge: list, metrics: dict) -> str:
    """Write a point of the curve, in the form of judged.jsonl. Return its figures as a line of text.

    own: a ranked group of each problem, of the model's own programs. judge: the same of the base's programs.
    """
    write_atomic(file, judged_lines({"own": own, "judge": judge}, {}))
    point = read_point(file, metrics)
    titles = columns(metrics)
    figures = ", ".join(f"{titles[m]} {cell(own)}" for m, own in point.items() if m in titles)
    return f"  step {point['step']}: {figures}"


def keep_ends(rows: dict[str, list], places: list[int], steps: int, metrics: dict, out: Path) -> None:
    """Keep the first and the last point of the curve, which are the groups of the rows at these places."""
    (out / CURVE).mkdir(exist_ok=True)
    for step, own, judge in ((0, "base", "base"), (steps, "trained", "trained_judge")):
        own, judge = ([rows[row][place] for place in places] for row in (own, judge))
        keep_point(out / CURVE / f"{step}.jsonl", own, judge, metrics)


def read_point(file: Path, metrics: dict) -> dict:
    """Return a point of the curve: its step, and its figures with intervals over problems."""
    return {"step": int(file.stem)} | {m: interval([own]) for m, own in point_tables(file, metrics).items()}


def point_tables(file: Path, metrics: dict) -> dict[str, np.ndarray]:
    """Return the figures of a point for each problem, as per_problem does. NDCG mixed is on the base's programs."""
    rows, _ = read_judged(file)
    row_of = {"pass1": "own", "ndcg_all": "own", "ndcg_mixed": "judge", top_of(metrics): "own"}
    return {m: per_problem(rows[row], metrics[m]) for m, row in row_of.items()}


def curve_files(out: Path) -> list[Path]:
    """Return the files of the points of a run's curve, in the order of steps; none if it has no curve."""
    files = [file for file in (out / CURVE).glob("*.jsonl") if file.stem.isdecimal()]
    return sorted(files, key=lambda file: int(file.stem))


def curve_part(curve: list[dict]) -> list[str]:
    """Return the part of report.md about the curve; nothing if there is none."""
    if len(curve) < 2:
        return []
    shown = {m: title for m, title in columns(curve[0]).items() if m in curve[0]}
    lines = [[str(point["step"]), *(cell(point[m]) for m in shown)] for point in curve]
    best = max(curve, key=lambda point: point["pass1"]["mean"])
    note = (f"The highest pass@1 is that of step {best['step']}. It is chosen by hindsight, so it is too good; the "
            f"result of the run is step {curve[-1]['step']}. Each point is one group of each of some evaluation "
            "problems, drawn from the same seeds; NDCG mixed is on the base's candidates.")
    return ["## The curve", markdown_table(["step", *shown.values()], lines), note]


# -------------------------------------------------------------------------------------------------------- the tables

TITLES = {"base": "base", "trained_judge": "trained judge, base's candidates", "trained": "trained generator and judge",
          "judge": "gain of the judge", "both": "gain of both"}
JUDGES = {"base": ("base", "trained_judge"), "trained": ("trained",)}  # generator -> the judges of its candidates
NOTE = ("Per cent, with 95 % bootstrap intervals over problems; gains are paired differences to the base. NDCG counts "
        "a group without a correct candidate as 0. NDCG mixed is over the groups with correct and wrong candidates; "
        "the next column is a random order on them. In the third row these are other groups than in the first (a "
        "better generator leaves harder wrong programs), so compare judges by the second row.")
BEST_OF_NOTE = ("Per cent. N = 1 is pass@1. N = 2 is the mean over all pairs of a ranked group. The largest N, where "
                "a problem has two groups (`--repeats`), is the winner of a final: the same judge ranks the better "
                "halves of both once more. The oracle submits a correct program if there is one.")


def columns(figures: dict) -> dict[str, str]:
    """Return the figures that the tables show, with their titles. figures: named as the metrics are."""
    n = top_of(figures).removeprefix("best_of_")
    return {"pass1": "pass@1", "ndcg_all": "NDCG", "ndcg_mixed": "NDCG mixed", "ndcg_random": "(random order)",
            f"best_of_{n}": f"Best-of-{n}", "oracle": f"oracle of {n}"}


def cell(figure: dict | None, sign: str = "") -> str:
    """Return the text of one figure with its interval."""
    if figure is None or figure["mean"] is None:
        return "-"
    return f"{figure['mean']:{sign}.1f} [{figure['low']:{sign}.1f}, {figure['high']:{sign}.1f}]"


def markdown_table(header: list[str], lines: list[list[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *lines])


def table(summary: dict) -> str:
    """Return the rows and gains of `summarise` as a Markdown table."""
    shown = columns(summary["rows"]["base"])
    lines = [[TITLES[name], *(cell(own[m]) for m in shown)] for name, own in summary["rows"].items()]
    lines += [[TITLES[name], *(cell(own[m], "+") for m in shown)] for name, own in summary["gains"].items()]
    return markdown_table(["", *shown.values()], lines)


def headline(summary: dict) -> str:
    """Return the paper's headline for this run: is one answer of the trained model as good as the base's Best-of-N?"""
    difference, rows = summary["one answer against Best-of-N"], summary["rows"]
    top = top_of(rows["base"])
    verdict = ("is better than" if difference["low"] > 0 else "is not as good as" if difference["high"] < 0
               else "cannot be told from")
    return (f"One answer of the trained model {verdict} {columns(rows['base'])[top]} of the base: pass@1 "
            f"{rows['trained']['pass1']['mean']:.1f} against {rows['base'][top]['mean']:.1f}, a paired difference of "
            f"{cell(difference, '+')}.")


def best_of_table(figures: dict) -> str:
    """Return best_of_rows as a Markdown table. An N larger than a problem's number of programs gets no column."""
    shown = list(figures["base"]["oracle"])
    lines = []
    for owner in [name for name in JUDGES if name in figures]:
        lines.append([f"{owner}'s candidates: oracle", *(cell(figures[owner]["oracle"].get(n)) for n in shown)])
        for name in [name for name in JUDGES[owner] if name in figures]:
            lines.append([TITLES[name], *(cell(figures[name].get(n)) for n in shown)])
        lines.append([f"{owner}'s candidates: random choice", *(cell(figures[owner]["random"]) for _ in shown)])
    return markdown_table(["Best-of-N", *(f"N = {n}" for n in shown)], lines)


# --------------------------------------------------------------------------------------------------------- the files


def write_report(rows: dict[str, list], finals: dict[str, list], metrics: dict, args: dict, out: Path,
                 defaults: dict | None = None) -> str:
    """Write report.json, report.md, examples.md, page.html and the .jsonl files beside them. Return report.md's text.

    With matplotlib, write best_of_n.png and curves.png too. finals may be empty. args: the settings of the run.
    defaults: the same settings where nothing was given; report.json names those that differ.
    """
    summary = summarise(rows, metrics)
    for name, own in finals.items():
        if own:
            summary["counts"][name] |= {"finals": len(own), "malformed finals": sum(one.malformed for one in own)}
    summary["slices"] = {}
    for kind in ("set", "difficulty"):  # a set: one of several names in --eval
        marks = sorted({getattr(one.group.problem, kind) for one in rows["base"]})
        for mark in marks if len(marks) > 1 else []:
            only = {name: [one for one in own if getattr(one.group.problem, kind) == mark]
                    for name, own in rows.items()}
            summary["slices"][mark] = summarise(only, metrics)
    changed = {name: args[name] for name, value in (defaults or {}).items()
               if args[name] != value and name not in OF_THIS_MACHINE}
    curve = [read_point(file, metrics) for file in curve_files(out)]
    summary |= {"best_of_n": best_of_rows(rows, finals, metrics), "curve": curve, "args": args, "changed": changed}

    parts = [f"# DuST on `{Path(args['model']).name}`, seed {args['seed']}", table(summary), NOTE]
    parts += [headline(summary)] if "trained" in rows else []
    parts += curve_part(curve)
    parts += ["## Best-of-N", best_of_table(summary["best_of_n"]), BEST_OF_NOTE]
    parts += [f"## Only: {mark or 'unmarked'}\n\n{table(own)}" for mark, own in summary["slices"].items()]
    counted = [", ".join(f"{count} {what}" for what, count in own.items()) for own in summary["counts"].values()]
    parts += ["## Counts", "\n".join(f"- {TITLES[name]}: {words}" for name, words in zip(rows, counted))]
    text = "\n\n".join(parts) + "\n"

    write_atomic(out / "judged.jsonl", judged_lines(rows, finals))
    write_atomic(out / "groups.jsonl", group_lines(rows))
    write_atomic(out / "report.json", json.dumps(summary, indent=1))
    write_atomic(out / "report.md", text)
    if curve:
        write_atomic(out / "curve.jsonl", "".join(json.dumps(point) + "\n" for point in curve))
    write_atomic(out / "examples.md", examples(rows))
    with contextlib.suppress(ImportError):
        draw_best_of_n(summary["best_of_n"], out / "best_of_n.png")
        draw_curves(curve, out)
    page.write_page(out)
    return text


def in_order_shown(one) -> list:
    """Return the candidates of a ranked group as the judge saw them; after them the answers without a program."""
    return [*one.group.candidates, *(c for c in one.ordered if c.code is None)]


def order_of(one) -> list[int]:
    """Return the judge's order as numbers, from 1, of the candidates in_order_shown."""
    places = {id(candidate): number for number, candidate in enumerate(one.group.candidates, 1)}
    shown = [places[id(candidate)] for candidate in one.ordered if candidate.code is not None]
    return [*shown, *range(len(shown) + 1, len(one.ordered) + 1)]


def group_lines(rows: dict[str, list]) -> str:
    """Return the text of groups.jsonl: what the base and the trained generator wrote, a line for each of their groups.

    The candidates stand in the order shown, each with its label and, if it is wrong, the first failed test.
    """
    lines = []
    for row, one in [(row, one) for row in JUDGES for one in rows.get(row, [])]:
        problem, candidates = one.group.problem, []
        for c in in_order_shown(one):
            failure = c.failure and c.failure | test_text(problem.tests[c.failure["test"]])
            candidates.append({"code": c.code, "correct": c.correct, "failure": failure})
        lines.append({"row": row, "problem": problem.id, "question": problem.question, "candidates": candidates})
    return "".join(json.dumps(line) + "\n" for line in lines)


def test_text(test: dict) -> dict[str, str]:
    """Return the first characters of a test: what goes in, and what should come out."""
    given, wanted = test.get("input", test.get("asserts", "")), test.get("output", "")
    if "fn_name" in test:
        with contextlib.suppress(ValueError, RecursionError):  # a number of many digits, a list that is nested too deep
            wanted = repr(test["expected"])
            given = f"{test['fn_name']}({', '.join(map(repr, test['args']))})"
    return {"given": given[:SHOWN], "wanted": wanted[:SHOWN]}


def judged_lines(rows: dict[str, list], finals: dict[str, list]) -> str:
    """Return the text of judged.jsonl: a line for each group, from which every figure can be computed again."""
    lines = []
    for part in (rows, finals):
        for row, one in [(row, one) for row, judged in part.items() for one in judged]:
            problem, shown = one.group.problem, len(one.group.candidates)
            lines.append({"row": row, "problem": problem.id, "difficulty": problem.difficulty, "set": problem.set,
                          "ranked": one.ranked, "order": order_of(one), "shown": shown, "malformed": one.malformed,
                          "final": part is finals})
    return "".join(json.dumps(line) + "\n" for line in lines)


def read_judged(path: Path) -> tuple[dict[str, list], dict[str, list]]:
    """Read judged.jsonl and return (rows, finals) as write_report took them, without programs and answers."""
    rows, finals = defaultdict(list), defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        one = SimpleNamespace(**json.loads(line))
        problem = SimpleNamespace(id=one.problem, difficulty=one.difficulty, set=getattr(one, "set", ""))
        one.group = SimpleNamespace(problem=problem, candidates=[None] * one.shown)
        (finals if one.final else rows)[one.row].append(one)
    return dict(rows), dict(finals)


def examples(rows: dict[str, list]) -> str:
    """Return the text of examples.md: three groups with labels, and the judge's answers before and after training."""
    parts, base = ["# Examples"], rows["base"]
    mixed = [i for i, one in enumerate(base) if len(set(one.ranked)) > 1]
    for i in (mixed or range(len(base)))[:3]:
        group = base[i].group
        parts.append(f"## {group.problem.id}\n\n{group.problem.question}")
        for number, c in enumerate(group.candidates, 1):
            parts.append(f"Candidate {number}, {'correct' if c.correct else 'wrong'}:\n```python\n{c.code}\n```")
        for name in [name for name in JUDGES["base"] if name in rows]:
            parts.append(f"The judge's answer, {TITLES[name]}:\n\n````\n{rows[name][i].answer}\n````")
    return "\n\n".join(parts) + "\n"


# --------------------------------------------------------------------------------------------------------- the plots

COLOURS = {"base": "#6b6b6b", "trained_judge": "#d1700f", "trained": "#1f5fbf"}  # of the rows, in every plot
LOGGED = {"reward": "reward", "ref_kl": "KL to the reference, nats a token", "entropy": "entropy, nats a token",
          "malformed": "malformed, share", "zero_variance": "groups of equal rewards, share",
          "answer_tokens": "tokens an answer"}  # the metrics that curves.png shows, and their titles


def new_figure(size: tuple[float, float]):
    """Return a white figure with a frame. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", facecolor="white", edgecolor="#b8b8b8", linewidth=3)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # inches: a margin inside the frame
    return figure


def draw_curves(curve: list[dict], out: Path) -> None:
    """Draw curves.png: the curve, and metrics.jsonl step by step. Raises ImportError without matplotlib."""
    path = out / "metrics.jsonl"
    steps = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    names = [name for name in LOGGED if any(name in step for step in steps)]
    if not any(step.get("ref_kl") for step in steps):  # no KL term (--kl 0 or --mode sft): show the loss instead
        names = ["loss" if name == "ref_kl" else name for name in names]
    if not names:
        return
    rows = 3 if len(curve) > 1 else 2
    figure = new_figure((10, 2.5 * rows))
    axes, numbers = iter(figure.subplots(rows, 3).flat), [step["step"] for step in steps]
    if rows == 3:
        for name in ("pass1", "ndcg_mixed", top_of(curve[0])):
            draw_band(next(axes), curve, name, COLOURS["trained"])
    for name in names:
        axis = next(axes)
        axis.plot(numbers, [step.get(name) for step in steps])
        axis.set(title=LOGGED.get(name, name), xlabel="step")
        axis.grid(alpha=0.3)
        if name == "reward" and any("constant" in step for step in steps):  # what the answer 1, 2, ..., K would earn
            axis.plot(numbers, [step.get("constant") for step in steps], "--", color=COLOURS["base"])
            axis.set_title("reward (dashed: constant)")
    for axis in axes:  # unused panels
        axis.set_axis_off()
    figure.savefig(out / "curves.png", dpi=120)


def draw_band(axis, curve: list[dict], name: str, colour: str, label: str = "") -> None:
    """Draw one figure of a curve over the steps, with its intervals as a band. curve: points as of read_point."""
    there = [point for point in curve if point[name]["mean"] is not None]
    steps = [point["step"] for point in there]
    mean, low, high = ([point[name][part] for point in there] for part in ("mean", "low", "high"))
    axis.plot(steps, mean, marker="o", markersize=4, color=colour, label=label)
    axis.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
    axis.set(title=f"{columns(curve[0])[name]}, %", xlabel="step")
    axis.grid(alpha=0.3)


def draw_best_of_n(figures: dict, path: Path) -> None:
    """Draw `curves`: the judges with intervals, oracles dashed, random choices dotted. Raise ImportError, as above."""
    figure = new_figure((8.4, 3.8))  # inches: small, so that the words are large
    axis = figure.subplots()
    for number, (name, own) in enumerate(figures.items()):
        colour, counts = COLOURS[name], [int(n) for n in own if n.isdecimal()]
        mean, low, high = (np.array([own[str(n)][part] for n in counts]) for part in ("mean", "low", "high"))
        places = [n * 1.02 ** (number - 1) for n in counts]  # side by side, so that no interval hides another
        axis.errorbar(places, mean, [mean - low, high - mean], color=colour, marker="o", capsize=3, label=TITLES[name])
        if name in JUDGES:  # a generator; "trained_judge" has the base's candidates
            counts, best = [int(n) for n in own["oracle"]], [one["mean"] for one in own["oracle"].values()]
            axis.plot(counts, best, "--", color=colour, label=f"{name}'s candidates: oracle")
            chance = [own["random"]["mean"]] * len(counts)
            axis.plot(counts, chance, ":", color=colour, label=f"{name}'s candidates: random choice")
            axis.set_xscale("log", base=2)
            axis.set_xticks(counts, counts)
    axis.set(title="Best-of-N", xlabel="N programs", ylabel="the submitted one is correct, %", ylim=(0, 100))
    axis.grid(alpha=0.3)
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.savefig(path, dpi=144)
