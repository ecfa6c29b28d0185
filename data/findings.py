"""What the runs of a study say: intervals over seeds and problems, differences, the paper's figures beside them.

Nothing is run here: study.py hands over what each finished run judged, and writes down what comes back.
"""
import json
from functools import lru_cache
from pathlib import Path

import numpy as np

from data import BadInput, report

SHOWN = {"pass1": "pass@1", "ndcg_all": "NDCG", "ndcg_mixed": "NDCG mixed", "best_of_4": "Best-of-4"}
GAINS = {"judge": "trained_judge", "both": "trained"}  # each minus the base
ROW_OF = {"pass1": "both", "ndcg_all": "both", "ndcg_mixed": "judge", "best_of_4": "both"}  # judges on equal groups


def load_run(folder: Path) -> dict:
    """What counts of a finished run: tables[row][metric] as report.per_problem gives them, and the plain counts."""
    rows, finals = report.read_judged(folder / "judged.jsonl")
    saved, tables = json.loads((folder / "report.json").read_text()), {}
    for row, judged in rows.items():
        tables[row] = {metric: report.per_problem(judged, metric) for metric in report.METRICS}
        tables[row] |= {f"best_of_{n}": t for n, t in report.best_of_n(judged, finals.get(row, [])).items()}
        tables[row] |= {f"oracle_of_{n}": t for n, t in report.oracle_of_n(judged).items()}
    return {
        "tables": tables,
        "problems": list(dict.fromkeys(one.group.problem.id for one in rows["base"])),
        "malformed": {row: sum(one.malformed for one in judged) for row, judged in rows.items()},
        "groups": {row: len(judged) for row, judged in rows.items()},
        "seconds": round(sum(saved["seconds"].values()), 1),
        "args": saved["args"],
    }


@lru_cache
def draw(seeds: int, problems: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """What every interval is drawn with: ([D, S] seeds, [D, P] how often each problem)."""
    rng = np.random.default_rng(0)
    counts = rng.multinomial(problems, [1 / problems] * problems, size=draws)
    return rng.integers(seeds, size=(draws, seeds)), counts.astype(float)


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
            **{key: [own[seed][key] for seed in seeds] for key in ("malformed", "groups", "seconds")},
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
    """One paragraph, made from the numbers: what goes the paper's way, what does not, what nobody can tell."""
    study, said, verdicts = result["study"], [], []
    if study == "transfer":
        return transfer_reading(result)
    if study == "table2":
        for gain, place in (("judge", 1), ("both", 2)):
            for metric in PAPER_METRICS[gain == "judge":]:  # the judge's pass@1 is its base's
                column, figure = PAPER_METRICS.index(metric), result["variants"]["rank"]["gains"][gain][metric]
                theirs = [rows[place][column] - rows[0][column] for rows in PAPER_MODELS.values()]
                verdicts.append(verdict(figure, min(theirs)))
                said.append(f"{SHOWN[metric]}, gain of {gain}: {report.cell(figure, '+')}, the paper's four models "
                            f"{min(theirs):+.1f} to {max(theirs):+.1f}: {verdicts[-1]}.")
    for name, own in result["differences"].items():
        for metric in PAPER_METRICS:
            if (theirs := paper_difference(study, name, metric)) is not None:
                verdicts.append(verdict(own["both"][metric], theirs))
                said.append(f"{result['titles'][name]} minus the method, {SHOWN[metric]}: "
                            f"{report.cell(own['both'][metric], '+')}, the paper {theirs:+.1f}: {verdicts[-1]}.")
        if (theirs := PAPER[study][name][0]) is not None:  # what it does to the generator, whatever the method does
            said.append(f"{result['titles'][name]}, pass@1 over the base: "
                        f"{report.cell(result['variants'][name]['gains']['both']['pass1'], '+')}, the paper "
                        f"{theirs - PAPER_BASE:+.1f}.")
    counts = [f"{verdicts.count(kind)} {words}" for kind, words in (
        ("the same direction", "go the paper's way"), ("different", "do not"), ("within noise", "are within noise"))]
    return f"Of {len(verdicts)} comparisons with a figure of the paper, {', '.join(counts)}. " + " ".join(said)


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
        said.append(f"{result['titles'][name]}: pass@1 {report.cell(generator, '+')} (predicted: {predicted}; "
                    f"{'so it is' if hits[-1] else 'not so'}), the judge's NDCG mixed {report.cell(judge, '+')}"
                    f"{', within noise' if is_noise(judge) else ''}.")
    return (f"The prediction for pass@1 holds in {sum(hits)} of {len(hits)} variants. \"None\" counts as met where the "
            "interval holds zero, which a small gain can do too; where the judge itself gained nothing, there was "
            "nothing to transfer. " + " ".join(said))


def skill_table(titles: dict[str, str], skills: dict) -> str:
    """Sub-skills before and after training, the generator's beside the judge's; what only one task has, on its side."""

    def pair(own: dict, name: str) -> list[str]:
        return ["-" if value is None else f"{value:.3f}" for value in own.get(name, (None, None))]

    lines = []
    for variant, own in skills.items():
        for skill in dict.fromkeys(name.split("/")[-1] for name in own):
            alone = ("", skill) if skill in ("ndcg_mixed", "ndcg_random", "malformed") else (skill, "")
            ours, theirs = (f"gen/{skill}", f"rank/{skill}") if f"gen/{skill}" in own else alone
            lines.append([titles[variant], skill, *pair(own, ours), *pair(own, theirs)])
    return lines_of(["", "skill", "generator before", "after", "judge before", "after"], lines)


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
        parts.append(f"The bar: of {len(first['seeds'])} seeds the gain's own interval, over problems, is above zero: "
                     f"{', '.join(bar)}.")
    if result["differences"]:
        parts += ["## Variant minus the first", gain_table(titles, result["differences"], marked=True)]
    parts += ["## Values", value_table(result)]
    if study == "table2":
        parts += ["## Best-of-N", report.curve_table(curve_of(first)), report.CURVE_NOTE]
    if result.get("skills"):
        parts += ["## Skills", skill_table(titles, result["skills"])]
    parts += ["## In the paper", paper_table(result)] if study != "transfer" else []
    parts += ["## Reading", reading(result), *cost(result)]
    return "\n\n".join(parts) + "\n"


def cost(result: dict) -> list[str]:
    """Malformed rankings and seconds of each run."""
    rows = list(next(iter(result["variants"].values()))["rows"])
    lines = [[result["titles"][name], *(", ".join(str(run[row]) for run in own["malformed"]) for row in rows),
              ", ".join(f"{seconds:.0f}" for seconds in own["seconds"])] for name, own in result["variants"].items()]
    groups = next(iter(result["variants"].values()))["groups"][0]["base"]
    return [f"## Malformed rankings (of {groups}) and seconds, for each seed",
            lines_of(["", *(report.TITLES[row] for row in rows), "seconds of its last process"], lines)]


def curve_of(own: dict) -> dict:
    """A variant's rows as report.curves gives them."""
    return {
        row: {n: figures[f"best_of_{n}"] for n in map(str, report.CURVE) if f"best_of_{n}" in figures}
        | {"oracle": {n: figures[f"oracle_of_{n}"] for n in map(str, report.CURVE) if f"oracle_of_{n}" in figures},
           "random": figures["pass1"]}
        for row, figures in own["rows"].items()
    }


def points_of(result: dict, metric: str) -> dict[str, dict]:
    """name -> figure, what a study's panel of this metric shows."""
    variants, gain = result["variants"], ROW_OF[metric]
    first = next(iter(variants.values()))["rows"]
    if result["study"] == "table2":
        return {row.replace("_", " "): figures[metric] for row, figures in first.items()}
    if result["study"] == "transfer":  # the bases differ
        return {name: own["gains"][gain][metric] for name, own in variants.items()}
    return {"base": first["base"][metric]} | {n: own["rows"][GAINS[gain]][metric] for n, own in variants.items()}


def draw_study(result: dict, path: Path) -> None:
    """Mean and interval of each variant, each run a dot. Raises ImportError without matplotlib."""
    with_curve, gains = result["study"] == "table2", result["study"] == "transfer"
    pyplot, figure, axes = report.new_figure(5 if with_curve else 4, (20 if with_curve else 15, 4.2))
    for axis, (metric, title) in zip(axes, SHOWN.items()):
        points = points_of(result, metric)
        for place, (name, f) in enumerate(points.items()):
            if f["mean"] is None:
                continue
            colour = report.COLOURS.get(name.replace(" ", "_"), report.COLOURS["trained"])
            dots = [value for value in f["seeds"] if value is not None]
            axis.errorbar([place], [f["mean"]], [[f["mean"] - f["low"]], [f["high"] - f["mean"]]], fmt="s", capsize=5,
                          color=colour)
            axis.plot([place + 0.2] * len(dots), dots, "o", color=colour, alpha=0.5, markersize=4)
        axis.set_xticks(range(len(points)), list(points), rotation=30, ha="right")
        axis.set(title=f"{title}{', gain' if gains else ''}, %", xlim=(-0.5, len(points) - 0.3))
        axis.grid(alpha=0.3, axis="y")
        if gains:
            axis.axhline(0, color="black", linewidth=0.8)
    if with_curve:
        report.plot_best_of_n(axes[4], curve_of(next(iter(result["variants"].values()))))
    figure.suptitle(result["title"])
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
