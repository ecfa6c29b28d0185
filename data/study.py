"""The paper's tables and figures in small: many runs of dust.py, each variant under several seeds, and what they say.

    python data/study.py table2                     # the method: five runs, about half an hour on a laptop
    python data/study.py table3 figure3 --quick     # several studies, small runs, two seeds: to see how it works
    python data/study.py transfer --plot-only       # no runs: write the results again from the finished ones
    python data/study.py transfer --render          # write .md and .png again from the .json

Each run has its folder below runs/study and is made once, whichever study needs it. The results are
data/results/NAME.md, .json and .png. Stop it at any moment: the same command continues.

The tables are generated. The paragraph below them is written by hand (`reading` in STUDIES), and is left out where one
of its numbers does not stand in the tables.
"""
import argparse
import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from plumbing import report  # noqa: E402
from plumbing.problems import BadInput, write_atomic  # noqa: E402

# ------------------------------------------------------------------------------------------------------- the studies


@dataclass(frozen=True)
class Variant:
    """One way to run dust.py, the same for every seed."""

    title: str
    flags: tuple[str, ...] = ()
    thinking: str = "both"  # which of the two tasks is answered with thinking
    init: str = ""  # training continues from the trained model of this variant
    base: str = ""  # a base that make_tiny.py makes; "": the shipped model
    like: str = "rank"  # the variant whose base writes the same programs; "": none before it


@dataclass(frozen=True)
class Study:
    """Variants, each compared with the first one, and what is written about them by hand."""

    title: str
    variants: tuple[str, ...]
    reading: str
    note: str = ""
    paper: str = ""  # the figures of the paper, as a table
    prediction: str = ""


VARIANTS = {
    "rank": Variant("off-policy ranking, PairAcc (the method)", like=""),
    "rank-onpolicy": Variant("on-policy ranking", ("--mode", "rank-onpolicy")),
    "generate": Variant("on-policy generation only", ("--mode", "generate")),
    "iterative": Variant("15 steps of one, 15 of the other", ("--mode", "iterative", "--block", "15")),
    "sft": Variant("SFT on rankings", ("--mode", "sft")),
    "sft-then-rank": Variant("GRPO after SFT", init="sft"),
    "ndcg": Variant("reward NDCG", ("--reward", "ndcg")),
    "selection": Variant("reward Selection", ("--reward", "selection")),
    "programs": Variant("thinking generator, direct judge", thinking="programs"),
    "rankings": Variant("direct generator, thinking judge", thinking="rankings", like=""),
    "none": Variant("direct generator, direct judge", thinking="none", like="rankings"),
    "notation": Variant("the judge's thinking in another notation", base="notation", like=""),
    "clumsy": Variant("a base that copies its accepted program badly", base="clumsy", like=""),
}
NOT_QUICK = {"iterative", "ndcg", "rankings", "none", "notation", "clumsy"}  # too long for a look at how it works

STUDIES = {
    "table2": Study(
        "Table 2: the method", ("rank",),
        paper="""\
| the paper, LiveCodeBench v6: pass@1 / NDCG / Best-of-4 | base | trained judge | trained generator and judge |
| --- | --- | --- | --- |
| Qwen3-30B-Thinking | 65.4 / 70.1 / 68.7 | 65.4 / 73.7 / 70.4 | 68.5 / 76.3 / 72.6 |
| Qwen3-30B-Instruct | 41.1 / 47.2 / 43.1 | 41.1 / 48.9 / 45.2 | 42.5 / 49.4 / 47.1 |
| GPT-OSS-20B | 62.7 / 70.7 / 65.2 | 63.5 / 72.0 / 68.6 | 65.0 / 72.0 / 69.4 |
| Qwen3-4B-Thinking | 45.8 / 60.5 / 55.0 | 47.0 / 63.1 / 58.8 | 49.1 / 63.0 / 59.4 |""",
        reading="""\
As in the paper, all three numbers rise. The trained judge takes the base's candidates from 60.5 to 70.9 in NDCG and
from 45.0 to 65.0 in Best-of-4. With the trained generator, pass@1 gains +23.4 [+21.3, +25.6] and Best-of-4 gains +34.9
[+30.7, +39.0]. None of this is noise: each gain is above zero in each of the five seeds. One program of the trained
model is correct more often than the base's Best-of-4 (55.8 against 45.0). The paper's gains are a few points
(Qwen3-30B-Thinking: pass@1 from 65.4 to 68.5). These are larger, probably because this model starts with poor verdicts,
and a verdict is most of what it has to learn. So their size says nothing about large models.""",
    ),
    "table3": Study(
        "Table 3: training modes", ("rank", "rank-onpolicy", "generate", "iterative"),
        note="Iterative training switches every 15 steps, not every 50, because the whole run has 60 steps.",
        paper="""\
| the paper, Qwen3-30B-Thinking, LiveCodeBench v6 (base: 65.4 / 70.1 / 68.7) | pass@1 | NDCG | Best-of-4 |
| --- | --- | --- | --- |
| off-policy ranking (the method) | 68.3 | 76.3 | 72.6 |
| on-policy ranking | 67.2 | 75.3 | 72.1 |
| on-policy generation only | 67.1 | 74.6 | 71.4 |
| 50 steps of one, 50 of the other | 66.9 | 72.4 | 71.4 |""",
        reading="""\
In pass@1 the four modes end at the same place; the differences from the method, +0.1 to +0.3, are noise. So here a
reward for rankings improves the generator as much as a reward for programs does. Generation only is worse for the
judge, by -3.0 [-5.0, -1.3] in NDCG mixed, and so in Best-of-4, by -3.8 [-7.9, -0.1]; that goes the paper's way (71.4
against 72.6). All other differences are noise. The paper's are half a point to four points, too little for five seeds
to show here. So these runs neither confirm nor refute that the method is first in all three numbers.""",
    ),
    "figure3": Study(
        "Figure 3: SFT against GRPO", ("rank", "sft", "sft-then-rank"),
        note="SFT learns from the base's own rankings that have each pair right, with GRPO's steps and learning rate; "
             "the paper's SFT learns from a larger teacher. GRPO after SFT has the steps of both.",
        paper="""\
| the paper, Qwen3-30B-Thinking, LiveCodeBench v6 (base: 65.4 / 70.1 / 68.7) | pass@1 | NDCG | Best-of-4 |
| --- | --- | --- | --- |
| GRPO (the method) | 68.5 | 76.3 | 72.6 |
| SFT on rankings | 65.4 | 73.6 | - |
| GRPO after SFT | 66.9 | - | 71.8 |""",
        reading="""\
As in the paper, SFT stays behind GRPO: by -12.0 [-13.8, -10.0] in pass@1 and by -12.7 [-15.1, -10.4] in NDCG (the
paper: 65.4 against 68.5, and 73.6 against 76.3). Two things do not go the paper's way. SFT gains +11.5 [+9.1, +14.0] in
pass@1 here, about half as much as GRPO; the paper's SFT leaves pass@1 at the base's 65.4. And GRPO after SFT ends above
the method, by +2.9 [+1.1, +4.9] in pass@1 and +4.8 [+1.6, +7.9] in Best-of-4; the paper's ends below it (66.9 against
68.5, and 71.8 against 72.6). But here it takes twice as many steps. None of these differences is noise.""",
    ),
    "figure4": Study(
        "Figure 4: rewards", ("rank", "ndcg", "selection"),
        note="The paper plots pass@1 and Best-of-4 over the steps; these are the values after the last step.",
        paper="""\
| the paper, Qwen3-30B-Thinking, LiveCodeBench v6 (base: 65.4 / 70.1 / 68.7) | pass@1 | NDCG | Best-of-4 |
| --- | --- | --- | --- |
| reward PairAcc (the method) | 68.0 | - | 72.7 |
| reward NDCG | 68.0 | - | 71.9 |
| reward Selection | 65.5 | - | - |""",
        reading="""\
PairAcc and NDCG cannot be told apart, as in the paper: the difference in pass@1, +1.3 [-0.2, +2.8], is noise. Selection
does not go the paper's way. There its pass@1 stays at 65.5 (base 65.4) while PairAcc reaches 68.0; here it gains +23.9
[+21.0, +26.8]. Its difference from PairAcc, +0.4 [-1.6, +2.4], is noise, and so small that the paper's difference of
two and a half points is not in the interval.""",
    ),
    "transfer": Study(
        "Transfer: which trained steps reach the generator",
        ("rank", "programs", "rankings", "none", "notation", "clumsy"),
        prediction="""\
Written before any of these runs. Training rewards rankings only; what can reach the generator are steps that both
tasks take in the same words: executing a program in mind, comparing digits, saying yes or no.

- Thinking generator, thinking judge: pass@1 rises with the judge.
- The three other cells: no transfer. Where one of the two answers without thinking, no trained step is shared.
- Another notation for the judge's thinking: the judge rises, the generator little or not at all.
- A base that copies badly: the judge rises, pass@1 less than with the shipped base, for copying is a step that only
  the generator takes and nothing trains it.""",
        reading="""\
All predictions are confirmed, some by a weaker test than others. "Noise" means that the interval holds zero; a gain of
a point or two would look the same.

- Thinking generator, thinking judge: confirmed. The judge gains +14.4 [+12.8, +16.0] in NDCG mixed, pass@1 gains +23.4.
- The three other cells: confirmed. Their pass@1 changes by -0.8, +0.2 and +0.5, which is noise. Only one cell is a
  strong test: the thinking judge of the direct generator gains +15.5 [+13.0, +18.0], and pass@1 does not follow, +0.2
  [-0.9, +1.4]. The two direct judges gain nothing themselves (+0.2 and +0.9, noise), so they had nothing to transfer.
- Another notation: confirmed. The judge gains +6.5 [+4.8, +8.4]; pass@1 gains +0.9 [-1.0, +2.8], which is noise. But
  this judge gains less than the first variant's, by -7.9 [-10.3, -5.5], so there was also less to transfer.
- A base that copies badly: confirmed. The judge gains as much as the first variant's (a difference of -0.5, noise), and
  pass@1 gains +14.1 [+12.1, +16.1], less than the first variant's by -9.3 [-12.2, -6.4].""",
    ),
}

# --------------------------------------------------------------------------------------------------------- the runs

JOURNALS = "."  # where a run keeps what it has drawn, below its folder
BY_GENERATOR = ("samples", "labels", "base-samples", "base-labels")  # these depend on how the base writes programs
BY_JUDGE = ("base-rankings", "base-finals")  # these also on how the base ranks them


def run_folder(args, name: str, seed: int) -> Path:
    """The folder of one run."""
    return args.out / f"{name}-s{seed}"


def is_finished(folder: Path, args) -> bool:
    """Whether a run has ended. Raises BadInput if only one of the run and this study is quick."""
    if not all((folder / name).exists() for name in ("judged.jsonl", "report.json")):
        return False
    if bool(json.loads((folder / "report.json").read_text())["args"].get("quick")) != args.quick:
        raise BadInput(f"{folder} is a run {'without' if args.quick else 'with'} --quick: give another --out")
    return True


def dust_command(args, name: str, seed: int) -> list[str]:
    """The command line of one run; with --resume if the run was begun before."""
    variant, folder = VARIANTS[name], run_folder(args, name, seed)
    flags = ["--seed", seed, "--out", folder, "--workers", 1, *variant.flags]
    flags += ["--thinking", variant.thinking] if variant.thinking != "both" else []
    flags += ["--init", run_folder(args, variant.init, seed)] if variant.init else []
    flags += ["--model", args.out / "bases" / variant.base, "--preset", "laptop"] if variant.base else []
    flags += ["--quick", "--steps", 5] if args.quick else []
    flags += ["--resume"] if (folder / "args.json").exists() else []
    return [sys.executable, *map(str, [args.dust, *flags])]


def copy_base_files(args, name: str, seed: int) -> None:
    """Gives a run what the same base has done in an earlier run of this seed. A copy that is cut short does no harm."""
    like = VARIANTS[name].like
    for file in BY_GENERATOR + (BY_JUDGE if like and VARIANTS[like].thinking == VARIANTS[name].thinking else ()):
        source, target = (run_folder(args, of, seed) / JOURNALS / f"{file}.jsonl" for of in (like, name))
        if like and source.exists() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def run_all(args, variants: tuple[str, ...]) -> int:
    """Makes the bases and the runs that are missing; returns how many failed.

    First run the variants whose base no other run has sampled, then those that copy from them, then those that train
    from another run's model.
    """
    bases = {}
    for base in filter(None, [VARIANTS[name].base for name in variants]):
        folder = args.out / "bases" / base
        if not (folder / "tokenizer_config.json").exists():
            bases[folder] = [sys.executable, str(HERE / "make_tiny.py"), "--base", base, "--out", str(folder),
                             "--work", f"{folder}-work"]
    failures = run_side_by_side(bases, args.parallel)
    first = [name for name in variants if not VARIANTS[name].like]
    last = [name for name in variants if VARIANTS[name].init]
    for wave in (first, [name for name in variants if name not in first + last], last):
        commands = {}
        for name, seed in [(name, seed) for name in wave for seed in range(args.seeds)]:
            folder, init = run_folder(args, name, seed), VARIANTS[name].init
            if is_finished(folder, args):
                continue
            if init and not is_finished(run_folder(args, init, seed), args):
                print(f"{folder.name}: not run, because it needs {init}-s{seed}, which failed", flush=True)
                failures += 1
                continue
            copy_base_files(args, name, seed)
            commands[folder] = dust_command(args, name, seed)
        failures += run_side_by_side(commands, args.parallel)
    return failures


def run_side_by_side(commands: dict[Path, list[str]], parallel: int) -> int:
    """Runs commands, `parallel` at a time; returns how many failed. Each writes to a log beside its folder."""
    waiting, going, failures = list(commands), {}, 0
    try:
        while waiting or going:
            while waiting and len(going) < parallel:
                folder = waiting.pop(0)
                folder.parent.mkdir(parents=True, exist_ok=True)
                print(f"{folder.name}: started; {len(waiting)} waiting", flush=True)
                with folder.with_name(f"{folder.name}.log").open("ab") as log:
                    process = subprocess.Popen(commands[folder], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                               env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)
                going[folder] = time.time(), process
            for folder, (began, process) in [item for item in going.items() if item[1][1].poll() is not None]:
                del going[folder]
                if process.returncode == 0:
                    print(f"{folder.name}: done in {(time.time() - began) / 60:.1f} min", flush=True)
                    continue
                failures += 1
                log = folder.with_name(f"{folder.name}.log")
                lines = [line.strip() for line in log.read_text(errors="replace").split("\n") if line.strip()]
                said = lines[-1] if lines else "no output"
                print(f"{folder.name}: failed, exit code {process.returncode}: {said} ({log})", flush=True)
            time.sleep(0.1)
    finally:  # after Ctrl-C; else none is left
        stop([process for _, process in going.values()])
    return failures


def stop(processes: list[subprocess.Popen]) -> None:
    """Ends runs as Ctrl-C would; kills those that are still there after ten seconds.

    Each has a session of its own, so a Ctrl-C at the terminal reaches it only from here, once.
    """
    for number in (signal.SIGINT, signal.SIGKILL):
        for process in [process for process in processes if process.poll() is None]:
            with contextlib.suppress(OSError):  # it has just ended
                os.killpg(process.pid, number)
        until = time.time() + 10
        while time.time() < until and any(process.poll() is None for process in processes):
            time.sleep(0.05)


# ------------------------------------------------------------------------------------------------------- the figures

SHOWN = {"pass1": "pass@1", "ndcg_all": "NDCG", "ndcg_mixed": "NDCG mixed", "best_of_4": "Best-of-4"}
GAINS = {"judge": "trained_judge", "both": "trained"}  # each minus the base
ROW_OF = {"pass1": "both", "ndcg_all": "both", "ndcg_mixed": "judge", "best_of_4": "both"}  # judges on equal groups


def load_run(folder: Path) -> dict:
    """Reads a finished run: tables[row][metric] as report.per_problem returns them, counts and settings."""
    from dust import METRICS  # here, because it imports torch, which takes seconds

    rows, finals = report.read_judged(folder / "judged.jsonl")
    tables = {}
    for row, judged in rows.items():
        tables[row] = {name: report.per_problem(judged, metric) for name, metric in METRICS.items()}
        curve = report.best_of_n(judged, finals.get(row, []), METRICS)
        tables[row] |= {f"best_of_{n}": table for n, table in curve.items()}
        tables[row] |= {f"oracle_of_{n}": table for n, table in report.oracle_of_n(judged).items()}
    return {
        "tables": tables,
        "problems": list(dict.fromkeys(one.group.problem.id for one in rows["base"])),
        "malformed": {row: sum(one.malformed for one in judged) for row, judged in rows.items()},
        "groups": {row: len(judged) for row, judged in rows.items()},
        "args": json.loads((folder / "report.json").read_text())["args"],
    }


@lru_cache
def draw(seeds: int, problems: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """The random draws of every interval: ([D, S] seeds, [D, P] how often each problem)."""
    rng = np.random.default_rng(0)
    counts = rng.multinomial(problems, [1 / problems] * problems, size=draws).astype(float)
    chosen = rng.integers(seeds, size=(draws, seeds))
    chosen.flags.writeable = counts.flags.writeable = False  # the cache hands the same two to every caller
    return chosen, counts


def two_level(terms: list[tuple[int, np.ndarray]], draws: int = 4000) -> dict:
    """A mean over seeds with its 95 % bootstrap interval over seeds and problems, in per cent, and each seed's value.

    terms: (sign, table [S, P, 2]); the figure is their signed sum: one term for a value, two for a gain, four for a
    difference of gains. All terms are drawn with the same seeds and problems, so differences are paired. In a draw all
    seeds have the same problems, because they were measured on the same ones. A few seeds say little about all seeds:
    with two, half of the draws are one seed twice.
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
    """[S, P, 2]: the table of a metric for each seed."""
    return np.stack([runs[seed]["tables"][row][metric] for seed in seeds])


def gain_terms(runs: dict[int, dict], seeds: list[int], row: str, metric: str, sign: int = 1) -> list:
    """The terms of a row's gain over the base, for two_level."""
    return [(sign, stack(runs, seeds, row, metric)), (-sign, stack(runs, seeds, "base", metric))]


def analyse(runs: dict[str, dict[int, dict]], whole: bool = False) -> dict:
    """variants and differences of the results. runs: variant -> seed -> load_run. whole: every metric and the curve.

    A difference is between gains, variant minus the first variant, over the seeds that both have; if they share the
    base, it is the difference of the values too. It is noise if its interval holds zero.
    """
    if len({tuple(run["problems"]) for own in runs.values() for run in own.values()}) != 1:
        raise BadInput("the runs were evaluated on different problems: give another --out")
    variants, differences, first = {}, {}, next(iter(runs))
    for name, own in runs.items():
        seeds = sorted(own)
        rows = list(own[seeds[0]]["tables"])
        metrics = list(own[seeds[0]]["tables"]["base"] if whole else SHOWN)
        variants[name] = {
            "seeds": seeds,
            "rows": {row: {m: two_level([(1, stack(own, seeds, row, m))]) for m in metrics} for row in rows},
            "gains": {g: {m: two_level(gain_terms(own, seeds, row, m)) for m in metrics} for g, row in GAINS.items()},
            "seeds with a gain": {f"{gain}/{m}": sum(is_gain(own[seed], GAINS[gain], m) for seed in seeds)
                                  for m, gain in ROW_OF.items()},
            **{key: [own[seed][key] for seed in seeds] for key in ("malformed", "groups")},
        }
        both = sorted(own.keys() & runs[first].keys())
        if name == first or not both:
            continue
        differences[name] = {gain: {} for gain in GAINS}
        for gain, row in GAINS.items():
            for m in SHOWN:
                figure = two_level(gain_terms(own, both, row, m) + gain_terms(runs[first], both, row, m, -1))
                differences[name][gain][m] = figure | {"noise": is_noise(figure)}
    return {"variants": variants, "differences": differences}


def is_gain(run: dict, row: str, metric: str) -> bool:
    """Whether the gain of one run has an interval above zero (over problems, as in its report)."""
    low = report.interval([run["tables"]["base"][metric], run["tables"][row][metric]])["low"]
    return low is not None and low > 0


def is_noise(figure: dict) -> bool:
    """Whether an interval holds zero, or there is none."""
    return figure["low"] is None or figure["low"] <= 0 <= figure["high"]


def probe_model(folder: Path, problems: int, file: Path) -> None:
    """Measures the skills of a model as make_tiny.py defines them, and writes them to a file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from data import make_tiny

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    write_atomic(file, json.dumps(make_tiny.probe(model, AutoTokenizer.from_pretrained(folder), problems=problems)))


def probe_all(args, variants: tuple[str, ...]) -> dict:
    """variant -> skill -> [before, after training], means over the finished seeds; None if nothing could be counted."""
    skills = {}
    for name in variants:
        base = VARIANTS[name].base
        folders = [run_folder(args, name, seed) for seed in range(args.seeds)]
        models = {folder / "probe.json": folder / "model" for folder in folders if is_finished(folder, args)}
        before = args.out / f"probe-{base or 'shipped'}.json"
        for file, model in ({before: args.out / "bases" / base if base else HERE / "tiny"} | models).items():
            if not file.exists() and not args.plot_only:
                print(f"probing {model}", flush=True)
                probe_model(model, 50 if args.quick else 200, file)
        pair = [[json.loads(file.read_text()) for file in files if file.exists()] for files in ([before], models)]
        if all(pair):
            skills[name] = {skill: [mean_of([one[skill] for one in side]) for side in pair] for skill in pair[0][0]}
    return skills


def mean_of(values: list[float]) -> float | None:
    """The mean without what could not be counted (nan); None if nothing is left."""
    counted = [value for value in values if not math.isnan(value)]
    return round(sum(counted) / len(counted), 4) if counted else None


# -------------------------------------------------------------------------------------------------------- the tables

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
    "Each model is probed on 200 validation problems (50 with `--quick`), **with thinking switched on for both tasks, "
    "whatever the variant's own way of answering**. So `pass1` is not the study's pass@1: it shows what the weights "
    "can do when they are asked to think. The steps of a trace, one by one, when generating (`gen/`) and when ranking "
    "(`rank/`); before -> after training, a mean over the seeds:"
)


def gain_table(titles: dict[str, str], gains: dict[str, dict], marked: bool = False) -> str:
    """A line for each variant; if marked, noise is called so."""

    def cell(figure: dict) -> str:
        return report.cell(figure, "+") + (" noise" if marked and is_noise(figure) else "")

    lines = [[titles[name], *(cell(own[ROW_OF[m]][m]) for m in SHOWN)] for name, own in gains.items()]
    return report.markdown_table(["", *(f"{title}, {ROW_OF[m]}" for m, title in SHOWN.items())], lines)


def value_table(result: dict) -> str:
    """The rows of each variant, with each seed's malformed rankings. A base that variants share is shown once."""
    lines, seen = [], []
    for name, own in result["variants"].items():
        for row, figures in own["rows"].items():
            if row == "base" and figures in seen:
                continue
            seen.append(figures)
            malformed = ", ".join(str(run[row]) for run in own["malformed"])
            lines.append([f"{result['titles'][name]}: {report.TITLES[row]}", *(report.cell(figures[m]) for m in SHOWN),
                          malformed])
    groups = next(iter(result["variants"].values()))["groups"][0]["base"]
    return report.markdown_table(["", *SHOWN.values(), f"malformed of {groups}, each seed"], lines)


def skill_table(titles: dict[str, str], skills: dict) -> str:
    """Each skill of each variant, before -> after training.

    skills: variant -> name as make_tiny.probe has it -> [before, after], None if nothing could be counted.
    """

    def change(pair: list[float | None]) -> str:
        return " -> ".join("-" if value is None else f"{value:.3f}" for value in pair)

    there = next(iter(skills.values()))
    keys = [key for name in SKILLS for key in (f"gen/{name}", f"rank/{name}", name) if key in there]
    lines = [[f"`{key}`", *(change(own[key]) for own in skills.values())] for key in keys]
    return report.markdown_table(["", *(titles[name] for name in skills)], lines)


def checked_reading(reading: str, tables: str) -> str:
    """The paragraph that was written by hand, if each of its numbers stands in the tables; else a line that says so."""
    there = set(re.findall(r"\d+\.\d+", tables))
    other = [number for number in dict.fromkeys(re.findall(r"\d+\.\d+", reading)) if number not in there]
    return reading if not other else (
        f"To be written: the paragraph in data/study.py is about other numbers than these ({', '.join(other)}).")


def markdown(result: dict) -> str:
    """The file of a study. A prediction, if there is one, stands before everything that was found."""
    study, settings, titles = STUDIES[result["study"]], result["settings"], result["titles"]
    first = next(iter(result["variants"].values()))
    command = f"python data/study.py {result['study']}{' --quick' if settings['quick'] else ''}"
    parts = [f"# {study.title}", *([f"## The prediction\n\n{study.prediction}"] if study.prediction else [])]
    parts.append(
        f"`{command}`: seeds 0 to {settings['seeds'] - 1}, {settings['problems']} evaluation problems, "
        f"{settings['args']['steps']} steps. Per cent; 95 % bootstrap intervals over seeds and problems (rather too "
        "narrow, because few seeds say little about all seeds). NDCG mixed compares judges on the base's candidates. "
        f"{study.note}".strip()
    )
    parts += [f"Missing, because they are not finished: {', '.join(result['missing'])}."] if result["missing"] else []
    parts += ["## Gains over the base", gain_table(titles, {n: own["gains"] for n, own in result["variants"].items()})]
    if result["study"] == "table2":
        counted = ", ".join(f"{SHOWN[m]} {first['seeds with a gain'][f'{gain}/{m}']}" for m, gain in ROW_OF.items())
        parts.append(f"Seeds, of {len(first['seeds'])}, whose own interval over problems lies above zero: {counted}.")
    if result["differences"]:
        parts += ["## Variant minus the first", gain_table(titles, result["differences"], marked=True)]
    parts += ["## Values", value_table(result)]
    if result["study"] == "table2":
        parts += ["## Best-of-N", report.curve_table(curve_of(first)), report.CURVE_NOTE]
    if result.get("skills"):
        chance = next(iter(result["skills"].values()))["ndcg_random"][0]
        meanings = "\n".join(f"- `{name}`: {words.format(random=chance)}" for name, words in SKILLS.items())
        parts += ["## Skills", PROBED, meanings, skill_table(titles, result["skills"])]
    parts += ["## In the paper", study.paper] if study.paper else []
    return "\n\n".join([*parts, "## Reading", checked_reading(study.reading, "\n".join(parts))]) + "\n"


# -------------------------------------------------------------------------------------------------------- the figure


def curve_of(own: dict) -> dict:
    """The rows of a variant in the form of report.curves."""
    curves = {}
    for row, figures in own["rows"].items():
        chosen, oracle = ({str(n): figures[f"{name}_of_{n}"] for n in report.CURVE if f"{name}_of_{n}" in figures}
                          for name in ("best", "oracle"))
        curves[row] = chosen | {"oracle": oracle, "random": figures["pass1"]}
    return curves


def draw_study(result: dict, path: Path) -> None:
    """Draws the gains of each variant, a panel for each metric; for the method, Best-of-N. Needs matplotlib."""
    variants, blue = result["variants"], report.COLOURS["trained"]
    if result["study"] == "table2":
        return report.draw_best_of_n(curve_of(variants["rank"]), path)
    pyplot, figure = report.new_figure((10, 0.92 * len(variants) + 1.7))
    for axis, (metric, title) in zip(figure.subplots(2, 2, sharey=True).flat, SHOWN.items()):
        for place, own in enumerate(variants.values()):
            gain = own["gains"][ROW_OF[metric]][metric]
            if (mean := gain["mean"]) is None:
                continue
            ends = [[mean - gain["low"]], [gain["high"] - mean]]
            axis.errorbar([mean], [place], xerr=ends, fmt="s", capsize=4, color=blue)
            axis.annotate(f"{mean:+.1f}", (mean, place), (0, 6), textcoords="offset points", ha="center", fontsize=11)
            dots = [value for value in gain["seeds"] if value is not None]  # a dot for each run, below its mean
            axis.plot(dots, [place + 0.28] * len(dots), "o", color=blue, alpha=0.5, markersize=4)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(f"{title}, {ROW_OF[metric]}: gain in points", fontsize=13)
        axis.set_ylim(len(variants) - 0.4, -0.7)
        axis.set_yticks(range(len(variants)), [textwrap.fill(result["titles"][name], 22) for name in variants])
        axis.tick_params(labelsize=12)
        axis.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


# ---------------------------------------------------------------------------------------------------------- the files


def write_results(study: str, args) -> Path:
    """Writes NAME.json from the finished runs, then NAME.md and NAME.png; returns the path of the Markdown."""
    results = args.out / "results" if args.quick else args.results
    if args.render:
        return render(json.loads((results / f"{study}.json").read_text(encoding="utf-8")), results)
    runs, missing = {}, []
    for name in variants_of(study, args):
        folders = {seed: run_folder(args, name, seed) for seed in range(args.seeds)}
        there = {seed: load_run(folder) for seed, folder in folders.items() if is_finished(folder, args)}
        missing += [folder.name for seed, folder in folders.items() if seed not in there]
        runs |= {name: there} if there else {}
    if (first := STUDIES[study].variants[0]) not in runs:
        raise BadInput(f"no run of {first} in {args.out} is finished, and the study compares with it")
    one = next(iter(runs[first].values()))
    of_this_machine = ("model", "out", "resume", "workers", "device", "rows")
    settings = {"seeds": args.seeds, "quick": args.quick, "problems": len(one["problems"]),
                "args": {key: value for key, value in one["args"].items() if key not in of_this_machine}}
    result = {"study": study, "settings": settings, "missing": missing,
              "titles": {name: VARIANTS[name].title for name in runs}, **analyse(runs, whole=study == "table2")}
    if study == "transfer":
        result["skills"] = probe_all(args, tuple(runs))
    results.mkdir(parents=True, exist_ok=True)
    write_atomic(results / f"{study}.json", json.dumps(result, indent=1))
    return render(result, results)


def render(result: dict, results: Path) -> Path:
    """Writes the Markdown and, with matplotlib, the figure of a result."""
    path = results / f"{result['study']}.md"
    write_atomic(path, markdown(result))
    try:
        draw_study(result, path.with_suffix(".png"))
    except ImportError:
        print("study: no figure without matplotlib: pip install matplotlib")
    return path


def variants_of(study: str, args) -> list[str]:
    """The variants that a study runs."""
    return [name for name in STUDIES[study].variants if not (args.quick and name in NOT_QUICK)]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Command line -> settings. Raises BadInput for what cannot work."""
    parser = argparse.ArgumentParser(prog="study.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("studies", nargs="+", choices=list(STUDIES))
    parser.add_argument("--seeds", type=int, help="runs of each variant (default: 5, with --quick 2)")
    parser.add_argument("--quick", action="store_true", help="small runs; the results go to OUT/results")
    parser.add_argument("--parallel", type=int, default=os.cpu_count() or 1, help="runs side by side (default: cores)")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: runs/study, quick: runs/study-quick)")
    parser.add_argument("--plot-only", action="store_true", help="run nothing: results from the runs that are finished")
    parser.add_argument("--render", action="store_true", help="run nothing: .md and .png from NAME.json")
    args = parser.parse_args(argv)
    args.seeds = (2 if args.quick else 5) if args.seeds is None else args.seeds
    args.out = args.out or Path("runs/study-quick" if args.quick else "runs/study")
    for name in ("seeds", "parallel"):
        if getattr(args, name) < 1:
            raise BadInput(f"--{name} is {getattr(args, name)}; it has to be at least 1")
    return args


def main(argv: list[str] | None = None, dust: Path = HERE.parent / "dust.py",
         results: Path = HERE / "results") -> int:
    """Exit code 0; 2 if a run failed, or with one line for what the user can put right; 130 after Ctrl-C."""
    try:
        args = parse_args(argv)
        args.dust, args.results = dust, results
        variants = tuple(dict.fromkeys(name for study in args.studies for name in variants_of(study, args)))
        for name in variants:
            for seed in range(args.seeds):
                is_finished(run_folder(args, name, seed), args)  # before anything starts beside runs of another kind
        failures = 0 if args.plot_only or args.render else run_all(args, variants)
        for study in args.studies:
            path = write_results(study, args)
            print(f"\n{path.read_text(encoding='utf-8')}\n{path}")
        return 2 if failures else 0
    except KeyboardInterrupt:
        print("\nstudy: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (BadInput, OSError) as error:
        filed = isinstance(error, OSError) and error.strerror
        print(f"study: {f'{error.filename}: {error.strerror}' if filed else error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    for name in ("SIGTERM", "SIGHUP"):  # the runs are in sessions of their own and must not outlive this process
        signal.signal(getattr(signal, name), signal.default_int_handler)
    raise SystemExit(main())
