"""What the runs of a study say: intervals over seeds and problems, differences, the paper's figures beside them.

Nothing is run here: study.py hands over what each finished run judged, and writes down what comes back.
"""
import json
import textwrap
from functools import lru_cache
from pathlib import Path

import numpy as np

from plumbing import report
from plumbing.problems import BadInput

SHOWN = {"pass1": "pass@1", "ndcg_all": "NDCG", "ndcg_mixed": "NDCG mixed", "best_of_4": "Best-of-4"}
GAINS = {"judge": "trained_judge", "both": "trained"}  # each minus the base
ROW_OF = {"pass1": "both", "ndcg_all": "both", "ndcg_mixed": "judge", "best_of_4": "both"}  # judges on equal groups


def load_run(folder: Path) -> dict:
    """What counts of a finished run: tables[row][metric] as report.per_problem gives them, and the plain counts."""
    rows, finals = report.read_judged(folder / "judged.jsonl")
    args, tables = json.loads((folder / "report.json").read_text())["args"], {}
    for row, judged in rows.items():
        tables[row] = {metric: report.per_problem(judged, metric) for metric in report.METRICS}
        tables[row] |= {f"best_of_{n}": t for n, t in report.best_of_n(judged, finals.get(row, [])).items()}
        tables[row] |= {f"oracle_of_{n}": t for n, t in report.oracle_of_n(judged).items()}
    return {
        "tables": tables,
        "problems": list(dict.fromkeys(one.group.problem.id for one in rows["base"])),
        "malformed": {row: sum(one.malformed for one in judged) for row, judged in rows.items()},
        "groups": {row: len(judged) for row, judged in rows.items()},
        "args": args,
    }


@lru_cache
def draw(seeds: int, problems: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """What every interval is drawn with: ([D, S] seeds, [D, P] how often each problem)."""
    rng = np.random.default_rng(0)
    counts = rng.multinomial(problems, [1 / problems] * problems, size=draws).astype(float)
    chosen = rng.integers(seeds, size=(draws, seeds))
    chosen.flags.writeable = counts.flags.writeable = False  # every caller is given the same two
    return chosen, counts


def two_level(terms: list[tuple[int, np.ndarray]], draws: int = 4000) -> dict:
    """A mean over seeds with its 95 % interval over seeds and problems, in per cent, and each seed's value.

    terms: (sign, table [S, P, 2]) whose signed sum is the figure: one for a value, two for a gain, four for a
    difference of gains. All of them are drawn with the same seeds and problems, so they are paired; all seeds of a
    draw have the same problems, for they were measured on the same. A few seeds say little about all seeds: with two,
    half of the draws are one seed twice.
    """
    seeds, problems = terms[0][1].shape[:2]
    chosen, weights = draw(seeds, problems, draws)

    def values(weights: np.ndarray) -> np.ndarray:  # [D, P] -> [D, S]
        return sum(sign * 100 * (weights @ table[..., 0].T) / (weights @ table[..., 1].T) for sign, table in terms)

    with np.errstate(invalid="ignore", divide="ignore"):
        each = values(np.ones((1, problems)))[0]
        drawn = np.take_along_axis(values(weights), chosen, axis=1).mean(1)
    own = [round(float(value), 3) if np.isfinite(value) else None for value in each]
    return report.with_interval(each.mean(), drawn) | {"seeds": own}


def stack(runs: dict[int, dict], seeds: list[int], row: str, metric: str) -> np.ndarray:
    """[S, P, 2]: a metric's table of each seed."""
    return np.stack([runs[seed]["tables"][row][metric] for seed in seeds])


def analyse(runs: dict[str, dict[int, dict]], whole: bool = False) -> dict:
    """variants and differences of the results; runs: variant -> seed -> load_run; whole: every metric and the curve.

    A difference is of the gains, variant minus the first variant, over the seeds that both have; where they share the
    base, that is the difference of the values. It is noise where its interval holds zero.
    """
    if len({tuple(run["problems"]) for own in runs.values() for run in own.values()}) != 1:
        raise BadInput("the runs were evaluated on different problems: give another --out")
    variants, differences, first = {}, {}, next(iter(runs))
    for name, own in runs.items():
        seeds = sorted(own)
        rows, metrics = list(own[seeds[0]]["tables"]), list(own[seeds[0]]["tables"]["base"] if whole else SHOWN)

        def gain(runs, seeds, row, metric, sign=1):
            return [(sign, stack(runs, seeds, row, metric)), (-sign, stack(runs, seeds, "base", metric))]

        variants[name] = {
            "seeds": seeds,
            "rows": {r: {m: two_level([(1, stack(own, seeds, r, m))]) for m in metrics} for r in rows},
            "gains": {g: {m: two_level(gain(own, seeds, row, m)) for m in metrics} for g, row in GAINS.items()},
            "seeds with a gain": {f"{g}/{m}": sum(is_gain(own[seed], GAINS[g], m) for seed in seeds)
                                  for m, g in ROW_OF.items()},
            **{key: [own[seed][key] for seed in seeds] for key in ("malformed", "groups")},
        }
        both = sorted(own.keys() & runs[first].keys())
        if name != first and both:
            differences[name] = {
                g: {m: two_level(gain(own, both, row, m) + gain(runs[first], both, row, m, -1)) for m in SHOWN}
                for g, row in GAINS.items()
            }
            for figure in (figure for figures in differences[name].values() for figure in figures.values()):
                figure["noise"] = is_noise(figure)
    return {"variants": variants, "differences": differences}


def is_gain(run: dict, row: str, metric: str) -> bool:
    """Whether one run's gain has an interval above zero (over problems, as in its report)."""
    low = report.interval([run["tables"]["base"][metric], run["tables"][row][metric]])["low"]
    return low is not None and low > 0


def is_noise(figure: dict) -> bool:
    return figure["low"] is None or figure["low"] <= 0 <= figure["high"]


# ------------------------------------------------------------------------------------------------------ the paper's own

PAPER_METRICS = ("pass1", "ndcg_all", "best_of_4")
PAPER_MODELS = {  # table 2, each row: base; trained judge on the base's candidates; trained generator and judge
    "Qwen3-30B-Thinking": ((65.4, 70.1, 68.7), (65.4, 73.7, 70.4), (68.5, 76.3, 72.6)),
    "Qwen3-30B-Instruct": ((41.1, 47.2, 43.1), (41.1, 48.9, 45.2), (42.5, 49.4, 47.1)),
    "GPT-OSS-20B": ((62.7, 70.7, 65.2), (63.5, 72.0, 68.6), (65.0, 72.0, 69.4)),
    "Qwen3-4B-Thinking": ((45.8, 60.5, 55.0), (47.0, 63.1, 58.8), (49.1, 63.0, 59.4)),
}
PAPER_BASE = 65.4  # pass@1 of the model that the other figures are about
PAPER = {  # Qwen3-30B-Thinking; None: not given, or only in a curve
    "table3": {"rank": (68.3, 76.3, 72.6), "rank-onpolicy": (67.2, 75.3, 72.1), "generate": (67.1, 74.6, 71.4),
               "iterative": (66.9, 72.4, 71.4)},
    "figure3": {"rank": (68.5, 76.3, 72.6), "sft": (65.4, 73.6, None), "sft-then-rank": (66.9, None, 71.8)},
    "figure4": {"rank": (68.0, None, 72.7), "ndcg": (68.0, None, 71.9), "selection": (65.5, None, None)},
}


def paper_difference(study: str, name: str, metric: str) -> float | None:
    """What the paper has for variant minus method, in points; None where it gives no figure."""
    column = PAPER_METRICS.index(metric)
    first, own = PAPER[study]["rank"][column], PAPER[study][name][column]
    return None if first is None or own is None else round(own - first, 1)


def verdict(figure: dict, paper: float) -> str:
    if is_noise(figure):
        return "within noise" if paper else "the same direction"  # the paper sees no difference either
    return "the same direction" if figure["mean"] * paper > 0 else "different"


# ----------------------------------------------------------------------------------------------------------- the files


def lines_of(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *lines])


def value_table(result: dict) -> str:
    """The rows of each variant; a base that is shared stands there once."""
    lines, seen = [], []
    for name, own in result["variants"].items():
        for row, figures in own["rows"].items():
            if row == "base" and any(figures == other for other in seen):
                continue
            seen.append(figures)
            lines.append([f"{result['titles'][name]}: {report.TITLES[row]}", *(report.cell(figures[m]) for m in SHOWN)])
    return lines_of(["", *SHOWN.values()], lines)


def gain_table(titles: dict[str, str], gains: dict[str, dict], marked: bool = False) -> str:
    """A line a variant; marked: with "noise" beside what is."""

    def cell(figure: dict) -> str:
        return report.cell(figure, "+") + (" noise" if marked and is_noise(figure) else "")

    lines = [[titles[name], *(cell(own[ROW_OF[m]][m]) for m in SHOWN)] for name, own in gains.items()]
    return lines_of(["", *(f"{title}, {ROW_OF[m]}" for m, title in SHOWN.items())], lines)


def paper_table(result: dict) -> str:
    if result["study"] == "table2":
        named = {f"{model}: {report.TITLES[row]}": own for model, rows in PAPER_MODELS.items()
                 for row, own in zip(("base", "trained_judge", "trained"), rows)}
    else:
        named = {result["titles"].get(name, name): own for name, own in PAPER[result["study"]].items()}
    lines = [[name, *("-" if value is None else f"{value:.1f}" for value in own)] for name, own in named.items()]
    return lines_of(["the paper, LiveCodeBench v6", *(SHOWN[m] for m in PAPER_METRICS)], lines)


def reading(result: dict) -> str:
    """A list made from the numbers: what goes the paper's way, what does not, what nobody can tell; counted on top."""
    study, said, verdicts = result["study"], [], []
    if study == "transfer":
        return transfer_reading(result)

    def compare(what: str, figure: dict, theirs: float, words: str) -> None:
        verdicts.append(verdict(figure, theirs))
        said.append(f"- {what}: {report.cell(figure, '+')}, {words}: {verdicts[-1]}")

    if study == "table2":
        for gain, place in (("judge", 1), ("both", 2)):
            for metric in PAPER_METRICS[gain == "judge":]:  # the judge's pass@1 is its base's
                column, figure = PAPER_METRICS.index(metric), result["variants"]["rank"]["gains"][gain][metric]
                theirs = [rows[place][column] - rows[0][column] for rows in PAPER_MODELS.values()]
                compare(f"{SHOWN[metric]}, gain of {gain}", figure, min(theirs),
                        f"the paper's four models {min(theirs):+.1f} to {max(theirs):+.1f}")
    for name, own in result["differences"].items():
        title = result["titles"][name]
        for metric in PAPER_METRICS:
            if (theirs := paper_difference(study, name, metric)) is not None:
                what = f"{title} minus the method, {SHOWN[metric]}"
                compare(what, own["both"][metric], theirs, f"the paper {theirs:+.1f}")
        if (theirs := PAPER[study][name][0]) is not None:  # what it does to the generator, whatever the method does
            theirs, gain = round(theirs - PAPER_BASE, 1), result["variants"][name]["gains"]["both"]["pass1"]
            compare(f"{title}, pass@1 over the base", gain, theirs, f"the paper {theirs:+.1f}")
    counts = [f"{verdicts.count(kind)} {words}" for kind, words in (
        ("the same direction", "go the paper's way"), ("different", "do not"), ("within noise", "are within noise"))]
    head = f"Of {len(verdicts)} comparisons with a figure of the paper, {', '.join(counts)}."
    return "\n".join([head, "", *said])


def transfer_reading(result: dict) -> str:
    """Each variant's gains against the prediction."""
    said, hits = [], []
    for name, own in result["variants"].items():
        predicted = result["prediction"][name]
        generator, judge = own["gains"]["both"]["pass1"], own["gains"]["judge"]["ndcg_mixed"]
        less = result["differences"].get(name, {}).get("both", {}).get("pass1")
        hits.append({
            "a gain": not is_noise(generator) and generator["mean"] > 0,
            "none": is_noise(generator),
            "less than the first": less is not None and not is_noise(less) and less["mean"] < 0,
        }[predicted])
        said.append(f"- {result['titles'][name]}: pass@1 {report.cell(generator, '+')} (predicted: {predicted}; "
                    f"{'confirmed' if hits[-1] else 'not confirmed'}); the judge's NDCG mixed "
                    f"{report.cell(judge, '+')}{', within noise' if is_noise(judge) else ''}")
    head = (f"The prediction for pass@1 holds in {sum(hits)} of {len(hits)} variants. \"None\" counts as met where the "
            "interval holds zero, which a small gain can do too; where the judge itself gained nothing, there was "
            "nothing to transfer.")
    return "\n".join([head, "", *said])


SKILLS = {  # of make_tiny.probe, in the order of a trace
    "step": "of the attempts that write the state after each line, the share with the right result",
    "jump": "of those that jump to the result, the share with the right one",
    "careful": "the share of attempts that write the state after each line",
    "yes_same": "how often it says yes where it has marked every digit as the same",
    "yes_off": "how often it says yes where it has marked some digit as off",
    "copy": "the program it writes is the one it has accepted",
    "pass1": "the program it writes fits the problem's example",
    "ndcg_mixed": "NDCG of its rankings of four programs, one or two of them right (a random order: {random:.3f})",
}
PROBED = (
    "The steps of a trace, one by one: executing a program, the verdict on what came out, copying the accepted one. "
    "Each model is probed on 200 validation problems, **with thinking switched on for both tasks, whatever the "
    "variant's own way of answering**. So `pass1` is not the study's pass@1: it shows what the weights can do when they "
    "are asked to think. Before -> after training, a mean over the seeds:"
)


def skill_tables(titles: dict[str, str], skills: dict) -> str:
    """What the skills are; then a small table for each variant, each skill before -> after, in either task.

    skills: variant -> name as make_tiny.probe has it -> [before, after], None where nothing could be counted.
    """

    def change(pair: list[float | None] | None) -> str:
        return "-" if pair is None else " -> ".join("-" if value is None else f"{value:.3f}" for value in pair)

    (chance, _), *_ = [own.get("ndcg_random") or [float("nan")] * 2 for own in skills.values()]
    parts = [PROBED, "\n".join(f"- `{name}`: {words.format(random=chance)}" for name, words in SKILLS.items())]
    for variant, own in skills.items():
        lines = []
        for name in SKILLS:
            alone = [None, own.get(name)] if name == "ndcg_mixed" else [own.get(name), None]
            both = [own[f"gen/{name}"], own[f"rank/{name}"]] if f"gen/{name}" in own else alone
            lines.append([f"`{name}`", *map(change, both)])
        parts.append(lines_of([f"**{titles[variant]}**", "when generating", "when ranking"], lines))
    return "\n\n".join(parts)


def markdown(result: dict, prediction: str) -> str:
    """The file of a study; a prediction, where there is one, stands before everything that was found."""
    study, settings, titles = result["study"], result["settings"], result["titles"]
    first = next(iter(result["variants"].values()))
    parts = [f"# {result['title']}", *([f"## The prediction\n\n{prediction}"] if prediction else [])]
    parts.append(
        f"`python data/study.py {study}{' --quick' if settings['quick'] else ''}`: seeds 0 to {settings['seeds'] - 1}, "
        f"{settings['problems']} evaluation problems, {settings['args']['steps']} steps. Per cent; 95 % intervals over "
        "seeds and problems (bootstrap; few seeds say little about all seeds, so they are rather too narrow). NDCG "
        f"mixed compares judges on the base's candidates. {result['note']}".strip()
    )
    parts += [f"Missing, for they are not finished: {', '.join(result['missing'])}."] if result["missing"] else []
    gains = {name: own["gains"] for name, own in result["variants"].items()}
    parts += ["## Gains over the base", gain_table(titles, gains)]
    if study == "table2":
        bar = [f"{SHOWN[m]} ({g}) in {first['seeds with a gain'][f'{g}/{m}']}" for m, g in ROW_OF.items()]
        parts.append(f"Seed by seed: of {len(first['seeds'])} seeds, a gain's own interval, over problems alone, lies "
                     f"above zero for {', '.join(bar)}.")
    if result["differences"]:
        parts += ["## Variant minus the first", gain_table(titles, result["differences"], marked=True)]
    parts += ["## Values", value_table(result)]
    if study == "table2":
        parts += ["## Best-of-N", report.curve_table(curve_of(first)), report.CURVE_NOTE]
    if result.get("skills"):
        parts += ["## Skills", skill_tables(titles, result["skills"])]
    parts += ["## In the paper", paper_table(result)] if study != "transfer" else []
    parts += ["## Reading", reading(result), *malformed(result)]
    return "\n\n".join(parts) + "\n"


def malformed(result: dict) -> list[str]:
    """Malformed rankings of each run."""
    rows = list(next(iter(result["variants"].values()))["rows"])
    lines = [[result["titles"][name], *(", ".join(str(run[row]) for run in own["malformed"]) for row in rows)]
             for name, own in result["variants"].items()]
    groups = next(iter(result["variants"].values()))["groups"][0]["base"]
    return [f"## Malformed rankings (of {groups}), for each seed",
            lines_of(["", *(report.TITLES[row] for row in rows)], lines)]


def curve_of(own: dict) -> dict:
    """A variant's rows as report.curves gives them."""
    return {
        row: {n: figures[f"best_of_{n}"] for n in map(str, report.CURVE) if f"best_of_{n}" in figures}
        | {"oracle": {n: figures[f"oracle_of_{n}"] for n in map(str, report.CURVE) if f"oracle_of_{n}" in figures},
           "random": figures["pass1"]}
        for row, figures in own["rows"].items()
    }


def points_of(result: dict, metric: str) -> dict[str, tuple[str, dict]]:
    """title -> (colour, figure): what a study's panel of a metric shows, from the top, in the words of its tables."""
    variants, gain, titles = result["variants"], ROW_OF[metric], result["titles"]
    first, blue = next(iter(variants.values()))["rows"], report.COLOURS["trained"]
    if result["study"] == "table2":
        return {report.TITLES[row]: (report.COLOURS[row], figures[metric]) for row, figures in first.items()}
    if result["study"] == "transfer":  # the bases differ
        return {titles[name]: (blue, own["gains"][gain][metric]) for name, own in variants.items()}
    trained = {titles[name]: (blue, own["rows"][GAINS[gain]][metric]) for name, own in variants.items()}
    return {"base": (report.COLOURS["base"], first["base"][metric])} | trained


def plot_points(axis, points: dict[str, tuple[str, dict]], named: bool) -> None:
    """A line for each: its mean in figures, its interval, and below it a dot for each run. Zero is always there."""
    over = dict(textcoords="offset points", ha="center", fontsize=11, bbox=dict(facecolor="white", lw=0, pad=0.5))
    for place, (colour, figure) in enumerate(points.values()):
        if (mean := figure["mean"]) is None:
            continue
        ends = [[mean - figure["low"]], [figure["high"] - mean]]
        dots = [value for value in figure["seeds"] if value is not None]
        axis.errorbar([mean], [place], xerr=ends, fmt="s", capsize=4, color=colour)
        axis.plot(dots, [place + 0.28] * len(dots), "o", color=colour, alpha=0.5, markersize=4)
        axis.annotate(f"{mean:.1f}", (mean, place), (0, 6), **over)
    axis.axvline(0, color="black", linewidth=0.8)
    low, high = axis.get_xlim()
    axis.set(xlim=(min(low, 0), max(1.03 * high, 0)), ylim=(len(points) - 0.4, -0.7))
    axis.set_yticks(range(len(points)), [textwrap.fill(title, 22) for title in points] if named else [""] * len(points))
    axis.tick_params(labelsize=12)
    axis.grid(alpha=0.3, axis="x")


def draw_study(result: dict, path: Path) -> None:
    """Mean and interval of each variant, each run a dot; the method with its Best-of-N. Raises ImportError without
    matplotlib.
    """
    with_curve, gains = result["study"] == "table2", result["study"] == "transfer"
    heights = [0.92 * len(points_of(result, "pass1")) + 1.7, *([3.4] if with_curve else [])]
    pyplot, figure = report.new_figure((10, sum(heights)))
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for place, (axis, (metric, title)) in enumerate(zip(parts[0].subplots(2, 2).flat, SHOWN.items())):
        plot_points(axis, points_of(result, metric), named=place % 2 == 0)
        row = "" if with_curve else f", {ROW_OF[metric]}"
        axis.set_title(f"{title}{row}, {'gain in points' if gains else '%'}", fontsize=13)
    if with_curve:
        report.plot_best_of_n(parts[1].subplots(), curve_of(next(iter(result["variants"].values()))))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
