"""Repeat the paper's tables and figures in small: run each variant of dust.py with several seeds, and compare.

    python data/study.py table2                     # the method: five runs, about half an hour on a laptop
    python data/study.py table3 figure3 --quick     # several studies, small runs, two seeds: to see how it works
    python data/study.py transfer --plot-only       # run nothing; write the results of the finished runs
    python data/study.py transfer --render          # run nothing; write .md and .png from the .json

Each run has its folder below runs/study. It is made once, even if several studies need it. The results are
data/results/NAME.md, .json and .png. Stop it at any moment: the same command continues.

The tables are generated. The prediction, the paper's figures and the reading around them are written by hand, in
data/readings.md. If a decimal number of a reading is not in the tables, the reading is left out.
"""
import argparse
import ast
import contextlib
import hashlib
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from plumbing import report  # noqa: E402
from plumbing.problems import BadInput, write_atomic  # noqa: E402
from plumbing.sandbox_worker import usable_cores  # noqa: E402
from plumbing.settings import prepare_terminal  # noqa: E402

# ------------------------------------------------------------------------------------------------------- the studies


@dataclass(frozen=True)
class Variant:
    """One way to run dust.py, the same for every seed."""

    title: str
    flags: tuple[str, ...] = ()
    thinking: str = "both"  # the tasks that are answered with thinking
    init: str = ""  # training continues from the trained model of this variant
    base: str = ""  # a base that make_tiny.py makes; "": the shipped model
    teacher: str = ""  # a base whose rankings --mode sft imitates; "": the model that is trained
    noise: str = ""  # the training labels: "first test", or the share of programs whose label is turned round
    like: str = "rank"  # an earlier variant whose base writes the same programs; "": there is none


POINTS = (500, 1000, 1500, 2000, 2500)  # steps of one pretraining, whose models the study "strength" trains

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
    "teacher": Variant("SFT on a teacher's rankings", ("--mode", "sft"), teacher="teacher"),
    "teacher-then-rank": Variant("GRPO after SFT on a teacher's rankings", init="teacher"),
    "first-test": Variant("labels from the first test only", noise="first test"),
    "flip-5": Variant("5 % of the labels turned round", noise="0.05"),
    "flip-10": Variant("10 % of the labels turned round", noise="0.1"),
    "flip-20": Variant("20 % of the labels turned round", noise="0.2"),
    **{f"step-{step}": Variant(f"a base of {step:,} steps", base=f"pretrained-{step}", like="") for step in POINTS},
    "strong": Variant("a base that judges well: the teacher", base="teacher", like=""),
}
NOT_QUICK = {  # --quick leaves out these long runs
    "iterative", "ndcg", "rankings", "none", "notation", "clumsy", "teacher", "teacher-then-rank", "flip-5",
    "flip-10",
}

STUDIES = {  # the variants of each study; they are compared with the first one
    "table2": ("rank",),
    "table3": ("rank", "rank-onpolicy", "generate", "iterative"),
    "figure3": ("rank", "sft", "sft-then-rank"),
    "figure4": ("rank", "ndcg", "selection"),
    "transfer": ("rank", "programs", "rankings", "none", "notation", "clumsy"),
    "teacher": ("rank", "sft", "teacher", "teacher-then-rank"),
    "strength": (*(f"step-{step}" for step in POINTS), "strong"),
    "noise": ("rank", "first-test", "flip-5", "flip-10", "flip-20"),
}
WITH_CURVE = ("table2", "figure4")  # the studies that show their variants step by step
WITH_SKILLS = ("transfer", "teacher", "strength")  # the studies that read the thinking parts of their models
SEEDS = {"strength": 3, "noise": 3}  # runs of each variant; 5 where nothing else is said


def written_by_hand(study: str) -> dict[str, str]:
    """Read the sections about one study in data/readings.md: title -> text."""
    text = (HERE / "readings.md").read_text(encoding="utf-8")
    own = re.search(rf"^# {study}\n(.*?)(?=^# |\Z)", text, flags=re.MULTILINE | re.DOTALL)[1]
    sections = (part.partition("\n") for part in own.split("\n## ")[1:])
    return {title: body.strip() for title, _, body in sections}


# --------------------------------------------------------------------------------------------------------- the runs

BY_GENERATOR = ("samples", "labels", "base-samples", "base-labels")  # these depend on how the base writes programs
BY_JUDGE = ("base-rankings", "base-finals")  # these also depend on how the base ranks programs


def run_folder(args, name: str, seed: int) -> Path:
    """Return the folder of one run."""
    return args.out / f"{name}-s{seed}"


def seeds_of(args, studies: list[str]) -> range:
    """Return the seeds of these studies: as many as the one that asks for the most."""
    return range(args.seeds or (2 if args.quick else max(SEEDS.get(study, 5) for study in studies)))


def code_hash(folder: Path = HERE.parent) -> str:
    """Return a hash of what the method's four modules do. Comments, docstrings and layout do not count."""
    digest = hashlib.sha256()
    for name in ("rank_prompt", "dust", "grpo", "sandbox"):
        tree = ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
                node.body[0] = ast.Pass()
        digest.update(ast.unparse(tree).encode())
    return digest.hexdigest()[:12]


def is_finished(folder: Path, args) -> bool:
    """Return whether a run has ended. Raise BadInput if the run used --quick and this study does not, or vice versa."""
    if not all((folder / name).exists() for name in ("judged.jsonl", "report.json")):
        return False
    if bool(json.loads((folder / "report.json").read_text())["args"].get("quick")) != args.quick:
        raise BadInput(f"{folder} is a run {'without' if args.quick else 'with'} --quick: give another --out")
    return True


def dust_command(args, name: str, seed: int) -> list[str]:
    """Return the command line of one run, with --resume if the run was started before."""
    variant, folder = VARIANTS[name], run_folder(args, name, seed)
    flags = ["--seed", seed, "--out", folder, "--workers", 1, *variant.flags]
    flags += ["--thinking", variant.thinking] if variant.thinking != "both" else []
    flags += ["--init", run_folder(args, variant.init, seed)] if variant.init else []
    flags += ["--model", args.out / "bases" / variant.base, "--preset", "laptop"] if variant.base else []
    flags += ["--teacher", args.out / "bases" / variant.teacher] if variant.teacher else []
    flags += ["--train", args.out / "first-test.jsonl"] if variant.noise == "first test" else []
    flags += [] if any(name in STUDIES[study] for study in WITH_CURVE) else ["--eval-every", 0]
    flags += ["--quick", "--steps", 5] if args.quick else []
    flags += ["--resume"] if (folder / "args.json").exists() else []
    return [sys.executable, *map(str, [args.dust, *flags])]


def copy_base_files(args, name: str, seed: int) -> None:
    """Copy the files that the same base made in an earlier run of this seed, the labels with this variant's noise."""
    variant = VARIANTS[name]
    same_judge = variant.like and VARIANTS[variant.like].thinking == variant.thinking
    for file in BY_GENERATOR + (BY_JUDGE if same_judge else ()):
        source, target = (run_folder(args, run, seed) / f"{file}.jsonl" for run in (variant.like or name, name))
        if not variant.like or not source.exists() or target.exists():
            continue
        text = source.read_text(encoding="utf-8")
        if file == "labels" and variant.noise == "first test":  # to be made anew, with fewer tests
            continue
        if file == "labels" and variant.noise:
            text = turned_round(text, float(variant.noise), seed)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, text)


def turned_round(labels: str, share: float, seed: int) -> str:
    """Return the text of labels.jsonl with the other label for a random share of the programs."""
    lines = []
    for key, label in map(json.loads, labels.splitlines()):
        if random.Random(f"{seed}/{key}").random() < share:
            label = {"test": 1, "why": "the study turned this label round", "printed": ""} if label == 1 else 1
        lines.append(json.dumps([key, label]) + "\n")
    return "".join(lines)


def write_first_tests(path: Path) -> None:
    """Write the shipped training problems with only the first of their tests: the example that the prompt shows."""
    problems = [json.loads(line) for line in (HERE / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(json.dumps(one | {"tests": one["tests"][:1]}) + "\n" for one in problems))


def base_commands(args, variants: tuple[str, ...]) -> dict[Path, list[str]]:
    """Return the commands that make the bases and teachers that are missing. One pretraining makes several bases."""
    commands = {}
    for base in filter(None, [base for name in variants for base in (VARIANTS[name].base, VARIANTS[name].teacher)]):
        if (args.out / "bases" / base / "tokenizer_config.json").exists():
            continue
        made = base.partition("-")[0]
        how = ["--keep", *map(str, POINTS)] if made == "pretrained" else ["--base", made]
        folder = args.out / "bases" / made
        make_tiny = [sys.executable, str(HERE / "make_tiny.py")]
        commands[folder] = [*make_tiny, *how, "--out", str(folder), "--work", f"{folder}-work"]
    return commands


def run_all(args, variants: tuple[str, ...]) -> int:
    """Make the bases and the runs that are missing. Return how many failed.

    The order: variants that copy nothing, then variants that copy from these, then variants that start from a run.
    """
    failures = run_side_by_side(base_commands(args, variants), args.parallel)
    if any(VARIANTS[name].noise == "first test" for name in variants):
        write_first_tests(args.out / "first-test.jsonl")
    first = [name for name in variants if not VARIANTS[name].like]
    last = [name for name in variants if VARIANTS[name].init]
    for wave in (first, [name for name in variants if name not in first + last], last):
        commands = {}
        for name in wave:
            needs = VARIANTS[name].init or (VARIANTS[name].like if VARIANTS[name].noise else "")
            for seed in seeds_of(args, [study for study in args.studies if name in STUDIES[study]]):
                folder = run_folder(args, name, seed)
                if is_finished(folder, args):
                    continue
                if needs and not is_finished(run_folder(args, needs, seed), args):
                    print(f"{folder.name}: not run, because it needs {needs}-s{seed}, which failed", flush=True)
                    failures += 1
                    continue
                copy_base_files(args, name, seed)
                note_code(folder)
                commands[folder] = dust_command(args, name, seed)
        failures += run_side_by_side(commands, args.parallel)
    return failures


def note_code(folder: Path) -> None:
    """Add the hash of the code to code.txt of a run that starts or goes on. A run can be made by two codes."""
    folder.mkdir(parents=True, exist_ok=True)
    known = (folder / "code.txt").read_text().split() if (folder / "code.txt").exists() else []
    write_atomic(folder / "code.txt", "\n".join(dict.fromkeys([*known, code_hash()])) + "\n")


def run_side_by_side(commands: dict[Path, list[str]], parallel: int) -> int:
    """Run commands, `parallel` at a time. Each writes to a log beside its folder. Return how many failed."""
    waiting, going, failures = list(commands), {}, 0
    try:
        while waiting or going:
            while waiting and len(going) < parallel:
                folder = waiting.pop(0)
                folder.parent.mkdir(parents=True, exist_ok=True)
                print(f"{folder.name}: started; {len(waiting)} waiting", flush=True)
                with Path(f"{folder}.log").open("ab") as log:
                    process = subprocess.Popen(commands[folder], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                               env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)
                going[folder] = time.time(), process
            for folder, (began, process) in [item for item in going.items() if item[1][1].poll() is not None]:
                del going[folder]
                if process.returncode == 0:
                    print(f"{folder.name}: done in {(time.time() - began) / 60:.1f} min", flush=True)
                    continue
                failures += 1
                log = Path(f"{folder}.log")
                said = (log.read_text(errors="replace").strip() or "no output").split("\n")[-1].strip()
                print(f"{folder.name}: failed, exit code {process.returncode}: {said} ({log})", flush=True)
            time.sleep(0.1)
    finally:  # after Ctrl-C runs are left; otherwise none
        stop([process for _, process in going.values()])
    return failures


def stop(processes: list[subprocess.Popen]) -> None:
    """End runs as Ctrl-C would, and kill those that are still there after ten seconds.

    Each run is in a separate session, so a Ctrl-C at the terminal does not reach it. Only this function sends it.
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
GAINS = {"judge": "trained_judge", "both": "trained"}  # gain -> the row that is compared with the base
# The gain that is shown for each metric. NDCG mixed compares judges, so it needs the same groups before and after.
GAIN_OF = {"pass1": "both", "ndcg_all": "both", "ndcg_mixed": "judge", "best_of_4": "both"}


def load_run(folder: Path) -> dict:
    """Read a finished run: tables[row][metric] as report.per_problem returns them, counts and settings."""
    from dust import METRICS  # not at the top, because it imports torch, which takes seconds

    rows, finals = report.read_judged(folder / "judged.jsonl")
    tables = {}
    for row, judged in rows.items():
        tables[row] = {name: report.per_problem(judged, metric) for name, metric in METRICS.items()}
        curve = report.best_of_n(judged, finals.get(row, []), METRICS)
        tables[row] |= {f"best_of_{n}": table for n, table in curve.items()}
        tables[row] |= {f"oracle_of_{n}": table for n, table in report.oracle_of_n(judged).items()}
    return {
        "tables": tables,
        "curve": {int(file.stem): report.point_tables(file, METRICS) for file in report.curve_files(folder)},
        "problems": list(dict.fromkeys(one.group.problem.id for one in rows["base"])),
        "malformed": {row: sum(one.malformed for one in judged) for row, judged in rows.items()},
        "groups": {row: len(judged) for row, judged in rows.items()},
        "code": (folder / "code.txt").read_text().split() if (folder / "code.txt").exists() else ["unknown"],
        "mixed": len(read_groups(file)[1]) if (file := folder / "candidates.jsonl").exists() else None,
        "args": json.loads((folder / "report.json").read_text())["args"],
    }


def read_groups(file: Path) -> tuple[list, list]:
    """Return (all candidates that a run sampled for training, its mixed groups of them)."""
    import dust

    lines = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    candidates = [dust.Candidate(**line) for line in lines]
    problems = [SimpleNamespace(id=problem) for problem in dict.fromkeys(one.problem_id for one in candidates)]
    return candidates, dust.make_groups(problems, candidates, 4)


def wrong_labels(folder: Path, true: Path) -> list[float]:
    """Compare the labels in a run's training groups with those of the run `true`, which has the same candidates.

    Return three shares: of the labels those that are other ones there, of the labels 1 those that are 0 there, and of
    the groups those that are not mixed there.
    """
    (mine, groups), (theirs, _) = (read_groups(run / "candidates.jsonl") for run in (folder, true))
    truth = {id(one): other.correct for one, other in zip(mine, theirs, strict=True)}
    labels = [(one.correct, truth[id(one)]) for group in groups for one in group.candidates]
    unmixed = [len({truth[id(one)] for one in group.candidates}) == 1 for group in groups]
    return [mean_of([label != true for label, true in labels]), mean_of([not true for label, true in labels if label]),
            mean_of(unmixed)]


@lru_cache
def draw(seeds: int, problems: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the random draws of every interval: seeds [D, S], and how often each problem is drawn [D, P]."""
    rng = np.random.default_rng(0)
    counts = rng.multinomial(problems, [1 / problems] * problems, size=draws).astype(float)
    chosen = rng.integers(seeds, size=(draws, seeds))
    chosen.flags.writeable = counts.flags.writeable = False  # the cache returns the same arrays to every caller
    return chosen, counts


def two_level(terms: list[tuple[int, np.ndarray]], draws: int = 4000) -> dict:
    """Return a mean over seeds with its 95 % interval over seeds and problems, and each seed's value, in per cent.

    terms: (sign, table [S, P, 2]); the figure is their signed sum: one term for a value, two for a gain, four for a
    difference of gains. A draw takes the same seeds and problems from all terms, so differences are paired. It takes
    the same problems for all seeds, because all were measured on the same problems. A few seeds say little about all
    seeds: with two, half of the draws hold one seed twice.
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
    """Return the tables of a metric for all seeds, [S, P, 2]."""
    return np.stack([runs[seed]["tables"][row][metric] for seed in seeds])


def gain_terms(runs: dict[int, dict], seeds: list[int], row: str, metric: str, sign: int = 1) -> list:
    """Return the terms of a row's gain over the base, for two_level."""
    return [(sign, stack(runs, seeds, row, metric)), (-sign, stack(runs, seeds, "base", metric))]


def analyse(runs: dict[str, dict[int, dict]], whole: bool = False) -> dict:
    """Return "variants" and "differences" of NAME.json. runs: variant -> seed -> load_run. whole: with every metric.

    There is one difference of each variant's gain from the first variant's, and one ("A - B") from that of the variant
    that it starts from, over the seeds that both have. If both have one base, it is also that of their values.
    """
    if len({tuple(run["problems"]) for own in runs.values() for run in own.values()}) != 1:
        raise BadInput("the runs were evaluated on different problems: give another --out")
    variants, differences, first = {}, {}, next(iter(runs))
    for name, own in runs.items():
        seeds = sorted(own)
        rows = own[seeds[0]]["tables"]
        metrics = rows["base"] if whole else SHOWN
        variants[name] = {
            "seeds": seeds,
            "rows": {row: {m: two_level([(1, stack(own, seeds, row, m))]) for m in metrics} for row in rows},
            "gains": {g: {m: two_level(gain_terms(own, seeds, row, m)) for m in metrics} for g, row in GAINS.items()},
            "seeds with a gain": {f"{gain}/{m}": sum(is_gain(own[seed], GAINS[gain], m) for seed in seeds)
                                  for m, gain in GAIN_OF.items()},
            "curve": curve_over_seeds(own),
            **{key: [own[seed][key] for seed in seeds] for key in ("malformed", "groups", "mixed")},
        }
        if name != first:
            differences[name] = difference(own, runs[first])
        if (start := VARIANTS[name].init) in runs:
            differences[f"{name} - {start}"] = difference(own, runs[start])
    return {"variants": variants, "differences": {name: figures for name, figures in differences.items() if figures}}


def difference(own: dict[int, dict], other: dict[int, dict]) -> dict:
    """Return gain -> metric -> the difference of two variants; {} if they share no seed. Noise: the interval has 0."""
    both, figures = sorted(own.keys() & other.keys()), {}
    for gain, row in GAINS.items() if both else ():
        of_gain = {m: two_level(gain_terms(own, both, row, m) + gain_terms(other, both, row, m, -1)) for m in SHOWN}
        figures[gain] = {m: figure | {"noise": is_noise(figure)} for m, figure in of_gain.items()}
    return figures


def curve_over_seeds(runs: dict[int, dict]) -> list[dict]:
    """Return the points of a variant's curve, means over its seeds, in the form of report.read_point."""
    seeds = sorted(runs)
    steps = [step for step in runs[seeds[0]]["curve"] if all(step in runs[seed]["curve"] for seed in seeds)]
    return [{"step": step} | {m: two_level([(1, np.stack([runs[seed]["curve"][step][m] for seed in seeds]))])
                              for m in SHOWN} for step in steps]


def is_gain(run: dict, row: str, metric: str) -> bool:
    """Return whether the gain of one run has an interval (over problems, as in its report) above zero."""
    low = report.interval([run["tables"]["base"][metric], run["tables"][row][metric]])["low"]
    return low is not None and low > 0


def is_noise(figure: dict) -> bool:
    """Return whether an interval contains zero, or does not exist."""
    return figure["low"] is None or figure["low"] <= 0 <= figure["high"]


def probe_model(folder: Path, problems: int, file: Path) -> None:
    """Measure the skills of a model as make_tiny.py defines them, and write them to a file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from data import make_tiny

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    write_atomic(file, json.dumps(make_tiny.probe(model, AutoTokenizer.from_pretrained(folder), problems=problems)))


def probe_all(args, study: str, variants: tuple[str, ...]) -> dict:
    """Return variant -> skill -> [before, after training]: means over the finished seeds, or None if all are nan."""
    def probe_of(model: Path, file: Path) -> dict | None:
        if not file.exists() and not args.plot_only:
            print(f"probing {model}", flush=True)
            probe_model(model, 50 if args.quick else 200, file)
        return json.loads(file.read_text()) if file.exists() else None

    def of_base(base: str) -> dict | None:
        folder = args.out / "bases" / base if base else HERE / "tiny"
        return probe_of(folder, args.out / f"probe-{base or 'shipped'}.json")

    def means(probes: list) -> dict:
        return {skill: mean_of([one[skill] for one in probes]) for skill in probes[0]}

    skills = {}
    for name in variants:
        folders = [run_folder(args, name, seed) for seed in seeds_of(args, [study])]
        trained = [probe_of(folder / "model", folder / "probe.json") for folder in folders if is_finished(folder, args)]
        before, trained = of_base(VARIANTS[name].base), list(filter(None, trained))
        if before and trained:
            skills[name] = {skill: [means([before])[skill], after] for skill, after in means(trained).items()}
        if VARIANTS[name].teacher and (teacher := of_base(VARIANTS[name].teacher)):
            skills["the teacher"] = {skill: [value, None] for skill, value in means([teacher]).items()}
    return skills


def mean_of(values: list[float]) -> float | None:
    """Return the mean of the values that are not nan, or None if there is none."""
    counted = [value for value in values if not math.isnan(value)]
    return round(sum(counted) / len(counted), 4) if counted else None


# -------------------------------------------------------------------------------------------------------- the tables

# Figures of make_tiny.probe, in the order of a thinking part.
SKILLS = ("step", "jump", "careful", "yes_same", "yes_off", "copy", "pass1", "ndcg_mixed")


def gain_table(titles: dict[str, str], gains: dict[str, dict], marked: bool = False) -> str:
    """Return a table with a line of gains for each variant. marked: write "noise" if the interval contains zero."""

    def cell(figure: dict) -> str:
        return report.cell(figure, "+") + (" noise" if marked and is_noise(figure) else "")

    lines = [[titles[name], *(cell(own[GAIN_OF[m]][m]) for m in SHOWN)] for name, own in gains.items()]
    return report.markdown_table(["", *(f"{title}, {GAIN_OF[m]}" for m, title in SHOWN.items())], lines)


def value_table(result: dict) -> str:
    """Return a table of the rows of each variant, with each seed's malformed rankings. Show a shared base only once."""
    lines, seen = [], []
    for name, own in result["variants"].items():
        for row, figures in own["rows"].items():
            if row == "base" and figures in seen:
                continue
            seen.append(figures)
            title, malformed = f"{result['titles'][name]}: {report.TITLES[row]}", [run[row] for run in own["malformed"]]
            lines.append([title, *(report.cell(figures[m]) for m in SHOWN), ", ".join(map(str, malformed))])
    groups = next(iter(result["variants"].values()))["groups"][0]["base"]
    return report.markdown_table(["", *SHOWN.values(), f"malformed of {groups}, each seed"], lines)


def has_curve(result: dict) -> bool:
    """Return whether a study shows its variants step by step, and its runs were measured so (--eval-every)."""
    return result["study"] in WITH_CURVE and all(own.get("curve") for own in result["variants"].values())


def curve_over_steps(result: dict) -> str:
    """Return a table of the curve of each variant. NDCG mixed is on the base's candidates."""
    lines = [[result["titles"][name], str(point["step"]), *(report.cell(point[m]) for m in SHOWN)]
             for name, own in result["variants"].items() for point in own["curve"]]
    return report.markdown_table(["", "step", *SHOWN.values()], lines)


def skill_table(titles: dict[str, str], skills: dict) -> str:
    """Return a table of the skills of each variant, before -> after training. skills: as probe_all returns them."""

    def change(pair: list[float | None]) -> str:
        return " -> ".join("-" if value is None else f"{value:.3f}" for value in pair)

    there = next(iter(skills.values()))
    keys = [key for name in SKILLS for key in (f"gen/{name}", f"rank/{name}", name) if key in there]
    lines = [[f"`{key}`", *(change(own[key]) for own in skills.values())] for key in keys]
    return report.markdown_table(["", *(titles.get(name, name) for name in skills)], lines)


def checked_reading(reading: str, tables: str) -> str:
    """Return the reading if all of its decimal numbers are in the tables, else a line with those that are not."""
    there = set(re.findall(r"\d+\.\d+", tables))
    other = [number for number in dict.fromkeys(re.findall(r"\d+\.\d+", reading)) if number not in there]
    if not other:
        return reading
    return f"To be written: the reading in data/readings.md has numbers that are not above ({', '.join(other)})."


def markdown(result: dict) -> str:
    """Return the Markdown of a study. A prediction, if there is one, comes before all results."""
    name, settings, titles = result["study"], result["settings"], result["titles"]
    first = next(iter(result["variants"].values()))
    command = f"python data/study.py {name}{' --quick' if settings['quick'] else ''}"
    by_hand = written_by_hand(name)
    parts = [f"# {by_hand['Title']}"]
    if "The prediction" in by_hand:
        parts += ["## The prediction", by_hand["The prediction"]]
    parts.append(
        f"`{command}`: seeds 0 to {settings['seeds'] - 1}, {settings['problems']} evaluation problems, "
        f"{settings['args']['steps']} steps. Per cent; 95 % bootstrap intervals over seeds and problems (rather too "
        "narrow, because few seeds say little about all seeds). NDCG mixed compares judges on the base's candidates. "
        f"{by_hand.get('Note', '')}".strip()
    )
    parts += [f"State of the code: {', '.join(result['code'])}."] if "code" in result else []
    parts += [f"Missing, because they are not finished: {', '.join(result['missing'])}."] if result["missing"] else []
    parts += ["## Gains over the base", gain_table(titles, {n: own["gains"] for n, own in result["variants"].items()})]
    if name == "table2":
        counted = ", ".join(f"{SHOWN[m]} {first['seeds with a gain'][f'{gain}/{m}']}" for m, gain in GAIN_OF.items())
        parts.append(f"Seeds, of {len(first['seeds'])}, with a gain above zero (interval over problems): {counted}.")
    if result["differences"]:
        pairs = {f"{a} - {b}": f"{titles[a]}, minus {titles[b]}" for a in titles for b in titles}
        parts += ["## Differences (from the first variant, if no other is named)",
                  gain_table(titles | pairs, result["differences"], marked=True)]
    parts += ["## Values", value_table(result)]
    if name == "strength":
        lines = [[titles[n], ", ".join(map(str, own["mixed"]))] for n, own in result["variants"].items()]
        parts += ["## Mixed groups for training", report.markdown_table(["", "mixed groups, each seed"], lines)]
    if name == "noise":
        lines = [[titles[n], *(f"{share:.1%}" for share in shares)] for n, shares in result["labels"].items()]
        titles_of = ["", "of all labels", "of the labels 1", "groups that are mixed only by them"]
        parts += ["## Wrong labels in the training groups", report.markdown_table(titles_of, lines)]
    if has_curve(result):
        parts += ["## The curve", curve_over_steps(result)]
    if name == "table2":
        parts += ["## Best-of-N", report.best_of_table(best_of_rows(first)), report.BEST_OF_NOTE]
    if result.get("skills"):
        chance = next(iter(result["skills"].values()))["ndcg_random"][0]
        parts += ["## Skills", by_hand["Skills"].format(random=chance), skill_table(titles, result["skills"])]
    if "In the paper" in by_hand:
        parts += ["## In the paper", by_hand["In the paper"]]
    return "\n\n".join([*parts, "## Reading", checked_reading(by_hand["Reading"], "\n".join(parts))]) + "\n"


# -------------------------------------------------------------------------------------------------------- the figure


SIZES = (1, 2, 4, 8)  # the numbers of programs for which Best-of-N is measured


def best_of_rows(own: dict) -> dict:
    """Return the rows of a variant in the form of report.best_of_rows."""
    curves = {}
    for row, figures in own["rows"].items():
        chosen = {str(n): figures[f"best_of_{n}"] for n in SIZES if f"best_of_{n}" in figures}
        oracle = {str(n): figures[f"oracle_of_{n}"] for n in SIZES if f"oracle_of_{n}" in figures}
        curves[row] = chosen | {"oracle": oracle, "random": figures["pass1"]}
    return curves


def draw_curves(result: dict, path: Path) -> None:
    """Draw the curves of the variants over the steps, a panel for each metric (figure 4). Needs matplotlib."""
    figure = report.new_figure((10, 6.4))
    for axis, metric in zip(figure.subplots(2, 2).flat, SHOWN):
        for (name, own), colour in zip(result["variants"].items(), ("#1f5fbf", "#d1700f", "#2c8a4b", "#8a2c6f")):
            report.draw_band(axis, own["curve"], metric, colour, result["titles"][name])
        of_base = "; on the base's programs" if metric == "ndcg_mixed" else ""
        axis.set_title(f"{SHOWN[metric]}, %{of_base}", fontsize=13)
        axis.tick_params(labelsize=12)
    axis.legend(fontsize=11, loc="lower right")
    figure.savefig(path, dpi=120)


def draw_study(result: dict, path: Path) -> None:
    """Draw the gains of each variant, a panel for each metric. For table2, draw Best-of-N. Needs matplotlib."""
    variants, blue = result["variants"], report.COLOURS["trained"]
    if has_curve(result):
        draw_curves(result, path.with_name(f"{result['study']}-curve.png"))
    if result["study"] == "table2":
        return report.draw_best_of_n(best_of_rows(variants["rank"]), path)
    figure = report.new_figure((10, 0.92 * len(variants) + 1.7))
    for axis, (metric, title) in zip(figure.subplots(2, 2, sharey=True).flat, SHOWN.items()):
        for place, own in enumerate(variants.values()):
            gain = own["gains"][GAIN_OF[metric]][metric]
            if (mean := gain["mean"]) is None:
                continue
            ends = [[mean - gain["low"]], [gain["high"] - mean]]
            axis.errorbar([mean], [place], xerr=ends, fmt="s", capsize=4, color=blue)
            axis.annotate(f"{mean:+.1f}", (mean, place), (0, 6), textcoords="offset points", ha="center", fontsize=11)
            dots = [value for value in gain["seeds"] if value is not None]  # a dot for each run, below its mean
            axis.plot(dots, [place + 0.28] * len(dots), "o", color=blue, alpha=0.5, markersize=4)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(f"{title}, {GAIN_OF[metric]}: gain in points", fontsize=13)
        axis.set_ylim(len(variants) - 0.4, -0.7)
        axis.set_yticks(range(len(variants)), [textwrap.fill(result["titles"][name], 22) for name in variants])
        axis.tick_params(labelsize=12)
        axis.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=120)


# ---------------------------------------------------------------------------------------------------------- the files


def write_results(study: str, args) -> Path:
    """Write NAME.json from the finished runs, then NAME.md and NAME.png. Return the path of the Markdown."""
    results = args.out / "results" if args.quick else args.results
    if args.render:
        return render(json.loads((results / f"{study}.json").read_text(encoding="utf-8")), results)
    runs, missing = {}, []
    for name in variants_of(study, args):
        folders = {seed: run_folder(args, name, seed) for seed in seeds_of(args, [study])}
        there = {seed: load_run(folder) for seed, folder in folders.items() if is_finished(folder, args)}
        missing += [folder.name for seed, folder in folders.items() if seed not in there]
        runs |= {name: there} if there else {}
    if (first := STUDIES[study][0]) not in runs:
        raise BadInput(f"no run of {first} in {args.out} is finished, and the study compares with it")
    one = next(iter(runs[first].values()))
    not_said = report.OF_THIS_MACHINE | {"model", "rows"}
    settings = {"seeds": len(seeds_of(args, [study])), "quick": args.quick, "problems": len(one["problems"]),
                "args": {key: value for key, value in one["args"].items() if key not in not_said}}
    result = {"study": study, "settings": settings, "missing": missing,
              "titles": {name: VARIANTS[name].title for name in runs}, **analyse(runs, whole=study == "table2"),
              "code": sorted({code for own in runs.values() for run in own.values() for code in run["code"]})}
    if study == "noise":
        result["labels"] = {name: np.mean([wrong_labels(run_folder(args, name, seed), run_folder(args, first, seed))
                                           for seed in runs[name]], 0).tolist() for name in runs}
    if study in WITH_SKILLS:
        result["skills"] = probe_all(args, study, tuple(runs))
    results.mkdir(parents=True, exist_ok=True)
    write_atomic(results / f"{study}.json", json.dumps(result, indent=1))
    return render(result, results)


def render(result: dict, results: Path) -> Path:
    """Write the Markdown and, with matplotlib, the figure of a result."""
    path = results / f"{result['study']}.md"
    write_atomic(path, markdown(result))
    try:
        draw_study(result, path.with_suffix(".png"))
    except ImportError:
        print("study: no figure without matplotlib: pip install matplotlib")
    return path


def variants_of(study: str, args) -> list[str]:
    """Return the variants of a study, fewer with --quick."""
    return [name for name in STUDIES[study] if not (args.quick and name in NOT_QUICK)]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line. Raise BadInput for a number that cannot work."""
    parser = argparse.ArgumentParser(prog="study.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("studies", nargs="+", choices=list(STUDIES))
    parser.add_argument("--seeds", type=int, help="runs of each variant (default: 5; strength and noise 3; --quick 2)")
    parser.add_argument("--quick", action="store_true", help="small runs; the results go to OUT/results")
    parser.add_argument("--parallel", type=int, default=usable_cores(), help="runs at a time (default: one a core)")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: runs/study, quick: runs/study-quick)")
    parser.add_argument("--plot-only", action="store_true", help="run nothing; write the results of the finished runs")
    parser.add_argument("--render", action="store_true", help="run nothing; write .md and .png from NAME.json")
    args = parser.parse_args(argv)
    if args.quick and "strength" in args.studies:
        raise BadInput("strength has no --quick: its bases come from a whole pretraining")
    args.out = args.out or Path("runs/study-quick" if args.quick else "runs/study")
    for name in ("seeds", "parallel"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise BadInput(f"--{name} is {getattr(args, name)}; it has to be at least 1")
    return args


def main(argv: list[str] | None = None, dust: Path = HERE.parent / "dust.py", results: Path = HERE / "results") -> int:
    """Run the studies. Return 0, 2 if a run failed or the user made a mistake (with one line), 130 after Ctrl-C."""
    try:
        args = parse_args(argv)
        args.dust, args.results = dust, results
        variants = tuple(dict.fromkeys(name for study in args.studies for name in variants_of(study, args)))
        for name in variants:
            for seed in seeds_of(args, args.studies):
                is_finished(run_folder(args, name, seed), args)  # raises before anything starts if --quick differs
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
    prepare_terminal()
    for name in ("SIGTERM", "SIGHUP"):  # the runs are in other sessions and must not outlive this process
        signal.signal(getattr(signal, name), signal.default_int_handler)
    raise SystemExit(main())
