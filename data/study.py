"""The paper's tables and figures in small: many runs of dust.py, each variant under several seeds, and what they say.

    python data/study.py table2              # base, trained judge, trained generator and judge; five seeds
    python data/study.py table3 --quick      # training modes, two seeds, small runs; for a look at how it works
    python data/study.py transfer --plot-only    # the files anew from the runs that are there

Studies: table2, table3 (training modes), figure3 (SFT against GRPO), figure4 (rewards), transfer (which steps the two
tasks share). Every run has its folder below runs/study, whatever study wants it, and is made once; variants of a seed
copy what the base did from the first of them. Results: data/results/NAME.md, .json and .png. Stop it at any moment:
the same command goes on. One study at a time: two would both make the runs that they share.
"""
import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from data import findings  # noqa: E402
from plumbing.problems import BadInput, write_atomic  # noqa: E402

# ------------------------------------------------------------------------------------------------------- what is run


@dataclass(frozen=True)
class Variant:
    """One way to run dust.py, the same for every seed."""

    title: str
    flags: tuple[str, ...] = ()
    thinking: str = "both"  # which of the two tasks is answered with thinking
    init: str = ""  # the variant from whose trained model it goes on
    base: str = ""  # a base of make_tiny.py; "": the shipped model

    @property
    def generator(self) -> tuple:
        """What the base's programs depend on, besides the seed."""
        return self.base, self.thinking in ("both", "programs")

    @property
    def judge(self) -> tuple:
        """What the base's rankings of them depend on."""
        return *self.generator, self.thinking in ("both", "rankings")


VARIANTS = {
    "rank": Variant("off-policy ranking, PairAcc (the method)"),
    "rank-onpolicy": Variant("on-policy ranking", ("--mode", "rank-onpolicy")),
    "generate": Variant("on-policy generation only", ("--mode", "generate")),
    "iterative": Variant("15 steps of one, 15 of the other", ("--mode", "iterative", "--block", "15")),
    "sft": Variant("SFT on rankings", ("--mode", "sft")),
    "sft-then-rank": Variant("GRPO after SFT", init="sft"),
    "ndcg": Variant("reward NDCG", ("--reward", "ndcg")),
    "selection": Variant("reward Selection", ("--reward", "selection")),
    "programs": Variant("thinking generator, direct judge", thinking="programs"),
    "rankings": Variant("direct generator, thinking judge", thinking="rankings"),
    "none": Variant("direct generator, direct judge", thinking="none"),
    "notation": Variant("the judge's thinking in another notation", base="notation"),
    "clumsy": Variant("a base that copies its accepted program badly", base="clumsy"),
}
STUDIES = {  # what it is, its variants, each compared with the first, and what has to be said about it
    "table2": ("Table 2: the method", ("rank",), ""),
    "table3": ("Table 3: training modes", ("rank", "rank-onpolicy", "generate", "iterative"),
               "Iterative training changes over every 15 steps, not every 50, for 60 steps stand for the paper's run."),
    "figure3": ("Figure 3: SFT against GRPO", ("rank", "sft", "sft-then-rank"),
                "SFT learns from the base's own rankings where each pair is right, as many steps as GRPO at its "
                "learning rate; the paper's come from a larger teacher. GRPO after SFT has the steps of both."),
    "figure4": ("Figure 4: rewards", ("rank", "ndcg", "selection"),
                "The paper plots pass@1 and Best-of-4 over the steps; here they stand after the last one."),
    "transfer": ("Transfer: which trained steps reach the generator",
                 ("rank", "programs", "rankings", "none", "notation", "clumsy"),
                 "The figure has gains over the variant's own base, for the bases differ."),
}
NOT_QUICK = {"iterative", "ndcg", "notation", "clumsy"}  # too long, or nothing to see in ten steps
BY_GENERATOR = ("samples", "labels", "base-samples", "base-labels")  # journals that its base's programs decide
BY_BOTH = ("base-rankings", "base-finals")


def donors(variants: tuple[str, ...], name: str) -> dict[str, str]:
    """journal -> the first variant that writes the very same one, where that is another variant."""
    own, found = VARIANTS[name], {}
    for journals, of in ((BY_GENERATOR, lambda v: v.generator), (BY_BOTH, lambda v: v.judge)):
        first = next(other for other in variants if of(VARIANTS[other]) == of(own))
        found |= dict.fromkeys(journals, first) if first != name else {}
    return found


@dataclass
class Job:
    """A process to be run until its files are there."""

    name: str
    folder: Path
    command: Callable[[], list[str]]  # asked when it starts: what is half done then is gone on with
    files: tuple[str, ...]  # there when it is finished
    needs: set[str] = field(default_factory=set)  # jobs without whose result it cannot run
    journals: dict[str, Path] = field(default_factory=dict)  # its own name -> another run's file to start from
    after: set[str] = field(default_factory=set)  # jobs to wait for, needed or not

    @property
    def finished(self) -> bool:
        return all((self.folder / name).exists() for name in self.files)


def run_folder(args, name: str, seed: int) -> Path:
    """Where a variant's run of a seed stands."""
    return args.out / f"{name}-s{seed}"


def dust_command(args, name: str, seed: int) -> list[str]:
    """The command line of one run; with --resume where it was begun before."""
    variant, folder = VARIANTS[name], run_folder(args, name, seed)
    flags = ["--seed", seed, "--out", folder, "--workers", 1, *variant.flags]
    flags += ["--thinking", variant.thinking] if variant.thinking != "both" else []
    flags += ["--init", run_folder(args, variant.init, seed)] if variant.init else []
    flags += ["--model", args.out / "bases" / variant.base, "--preset", "laptop"] if variant.base else []
    flags += ["--quick"] if args.quick else []
    flags += ["--resume"] if (folder / "args.json").exists() else []
    return [sys.executable, *map(str, [args.dust, *flags])]


def make_jobs(args, variants: tuple[str, ...]) -> dict[str, Job]:
    """name -> Job: the bases that are not shipped, then for each variant one run a seed, the first variant first."""
    jobs = {}
    for base in filter(None, dict.fromkeys(VARIANTS[name].base for name in variants)):
        folder = args.out / "bases" / base
        command = [sys.executable, str(HERE / "make_tiny.py"), "--base", base, "--out", str(folder), "--work",
                   f"{folder}-work"]
        jobs[f"base-{base}"] = Job(f"base-{base}", folder, lambda command=command: command, ("tokenizer_config.json",))
    for name in variants:
        for seed in range(args.seeds):
            shared, variant = donors(variants, name), VARIANTS[name]
            job = Job(f"{name}-s{seed}", run_folder(args, name, seed),
                      lambda name=name, seed=seed: dust_command(args, name, seed), ("judged.jsonl", "report.json"))
            job.needs = {f"{variant.init}-s{seed}"} if variant.init else set()
            job.needs |= {f"base-{variant.base}"} if variant.base else set()
            job.journals = {j: run_folder(args, of, seed) / "journal" / f"{j}.jsonl" for j, of in shared.items()}
            job.after = job.needs | {f"{of}-s{seed}" for of in shared.values()}
            jobs[job.name] = job
    return jobs


PREDICTION = """\
Written before any of these runs. Training rewards rankings only; what can reach the generator are steps that both
tasks take in the same words: executing a program in mind, comparing digits, saying yes or no.

- Thinking generator, thinking judge: pass@1 rises with the judge.
- The three other cells: no transfer. Where one of the two answers without thinking, no trained step is shared.
- Another notation for the judge's thinking: the judge rises, the generator little or not at all.
- A base that copies badly: the judge rises, pass@1 less than with the shipped base, for copying is a step that only
  the generator takes and nothing trains it."""
PREDICTED = {  # of pass@1
    "rank": "a gain", "programs": "none", "rankings": "none", "none": "none", "notation": "less than the first",
    "clumsy": "less than the first",
}


# ----------------------------------------------------------------------------------------------------- running them


def start(job: Job) -> subprocess.Popen:
    """Begins a job with copies of the journals it shares; what it writes goes to a log beside its folder."""
    for name, donor in job.journals.items():
        own = job.folder / "journal" / f"{name}.jsonl"
        if donor.exists() and not own.exists():
            own.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(donor, own.with_suffix(".new"))
            own.with_suffix(".new").replace(own)
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    with log_of(job).open("ab") as log:  # a session of its own: Ctrl-C reaches it through `stop` alone, once
        return subprocess.Popen(job.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)


def log_of(job: Job) -> Path:
    """Where its output goes."""
    return job.folder.with_name(job.folder.name + ".log")


def last_line(path: Path) -> str:
    """What a job said last."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")  # a progress bar's \r ends a line here too
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def stop(going: list[subprocess.Popen]) -> None:
    """Ends the children as Ctrl-C would, and whoever has not ended after ten seconds for good."""
    for process in going:
        with contextlib.suppress(OSError):  # it has just ended
            os.killpg(process.pid, signal.SIGINT)
    until = time.time() + 10
    for process in going:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            process.wait(max(until - time.time(), 0.1))
            continue
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_jobs(jobs: dict[str, Job], parallel: int) -> int:
    """Runs what is not finished, `parallel` side by side, each when those it comes after have ended; counts failures.

    A job that fails stops no other, but those that need its result.
    """
    waiting = {name: job for name, job in jobs.items() if not job.finished}
    going, failed, spent, there = {}, set(), [], len(jobs) - len(waiting)
    print(f"{len(jobs)} runs, {there} of them there already, {parallel} side by side", flush=True)
    try:
        while waiting or going:
            for job in list(waiting.values()):
                if len(going) == parallel or job.after & (waiting.keys() | going.keys()):
                    continue
                del waiting[job.name]
                if lost := job.needs & failed:
                    failed.add(job.name)
                    print(f"{job.name}: not run, for it needs {', '.join(lost)}, which failed", flush=True)
                else:
                    going[job.name] = start(job), time.time()
                    print(f"{job.name}: started", flush=True)
            for name, (process, began) in list(going.items()):
                if process.poll() is None:
                    continue
                del going[name]
                if jobs[name].finished:
                    spent.append(time.time() - began)
                    since = [time.time() - began for _, began in going.values()]
                    rest = time_left(spent, len(waiting), since, parallel)
                    print(f"{name}: done in {spent[-1] / 60:.1f} min; {len(waiting) + len(going)} to go, "
                          f"about {rest / 60:.0f} min", flush=True)
                else:
                    failed.add(name)
                    log = log_of(jobs[name])
                    print(f"{name}: failed, exit code {process.returncode}: {last_line(log)} ({log})", flush=True)
            time.sleep(0.1)
    finally:  # empty, unless something ended the loop
        stop([process for process, _ in going.values()])
    return len(failed)


def time_left(spent: list[float], waiting: int, going: list[float], parallel: int) -> float:
    """Seconds, if what is left takes as long as what has been done. going: for how long each has been running."""
    mean = sum(spent) / len(spent)
    return (mean * waiting + sum(max(mean - since, 0) for since in going)) / parallel


def probe_model(folder: Path, file: Path) -> None:
    """Writes the sub-skills of a model as make_tiny.py measures them, once."""
    if file.exists():
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from data import make_tiny

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    write_atomic(file, json.dumps(make_tiny.probe(model, AutoTokenizer.from_pretrained(folder))))


def probe_all(args, variants: tuple[str, ...]) -> dict:
    """variant -> skill -> [before, after], means over the finished seeds; None where nothing could be counted."""
    work, files = {}, {}
    for name in variants:
        base = VARIANTS[name].base
        before = args.out / f"probe-{base or 'shipped'}.json"
        folders = [folder for seed in range(args.seeds) if is_there(folder := run_folder(args, name, seed), args)]
        work |= {before: args.out / "bases" / base if base else HERE / "tiny"} if folders else {}
        work |= {folder / "probe.json": folder / "model" for folder in folders}
        files[name] = before, [folder / "probe.json" for folder in folders]
    if not args.plot_only and (left := [file for file in work if not file.exists()]):
        print(f"probing {len(left)} models", flush=True)
        with ProcessPoolExecutor(args.parallel, mp_context=get_context("spawn")) as pool:
            list(pool.map(probe_model, [work[file] for file in left], left))
    skills = {}
    for name, (before, after) in files.items():
        pair = [[json.loads(f.read_text()) for f in side if f.exists()] for side in ([before], after)]
        if all(pair):
            skills[name] = {skill: [mean_of([one[skill] for one in side]) for side in pair] for skill in pair[0][0]}
    return skills


def mean_of(values: list[float]) -> float | None:
    """The mean of those that are there; None where none is."""
    counted = [value for value in values if not math.isnan(value)]
    return round(sum(counted) / len(counted), 4) if counted else None


def is_there(folder: Path, args) -> bool:
    """Whether a run is finished. Raises BadInput where it was made with --quick and this study is not quick, or so."""
    if not all((folder / name).exists() for name in ("judged.jsonl", "report.json")):
        return False
    if bool(json.loads((folder / "report.json").read_text())["args"].get("quick")) != args.quick:
        raise BadInput(f"{folder} is a run {'without' if args.quick else 'with'} --quick: give another --out")
    return True


def write_results(name: str, args, variants: tuple[str, ...]) -> Path:
    """NAME.md, .json and, with matplotlib, .png, from the runs that are finished; returns the Markdown's path."""
    runs, missing = {}, []
    for variant in variants:
        folders = {seed: run_folder(args, variant, seed) for seed in range(args.seeds)}
        there = {seed: findings.load_run(folder) for seed, folder in folders.items() if is_there(folder, args)}
        missing += [folder.name for seed, folder in folders.items() if seed not in there]
        runs |= {variant: there} if there else {}
    if variants[0] not in runs:
        raise BadInput(f"no run of {variants[0]} in {args.out} is finished, and the study compares with it")
    one, (title, _, note) = next(iter(runs[variants[0]].values())), STUDIES[name]
    of_this_machine = ("model", "out", "resume", "workers", "device", "rows")
    settings = {"seeds": args.seeds, "quick": args.quick, "problems": len(one["problems"]),
                "variants": {variant: asdict(VARIANTS[variant]) for variant in variants},
                "args": {key: value for key, value in one["args"].items() if key not in of_this_machine}}
    result = {"study": name, "title": title, "note": note, "settings": settings, "missing": missing,
              "titles": {variant: VARIANTS[variant].title for variant in variants},
              **findings.analyse(runs, whole=name == "table2")}
    if name == "transfer":
        result |= {"prediction": PREDICTED, "skills": probe_all(args, tuple(runs))}
    results = args.out / "results" if args.quick else args.results
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{name}.md"
    write_atomic(results / f"{name}.json", json.dumps(result, indent=1))
    write_atomic(path, findings.markdown(result, PREDICTION if name == "transfer" else ""))
    try:
        findings.draw_study(result, results / f"{name}.png")
    except ImportError:
        print("study: no figure without matplotlib: pip install matplotlib")
    return path


# ---------------------------------------------------------------------------------------------------------------- main


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Command line -> settings. Raises BadInput for what cannot work."""
    parser = argparse.ArgumentParser(prog="study.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("--seeds", type=int, help="runs of each variant (default: 5, with --quick 2)")
    parser.add_argument("--quick", action="store_true", help="small runs; the results go to OUT/results")
    parser.add_argument("--parallel", type=int, default=os.cpu_count() or 1, help="runs side by side (default: cores)")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: runs/study, quick: runs/study-quick)")
    parser.add_argument("--plot-only", action="store_true", help="run nothing: results from the runs that are there")
    args = parser.parse_args(argv)
    args.seeds = (2 if args.quick else 5) if args.seeds is None else args.seeds
    args.out = args.out or Path("runs/study-quick" if args.quick else "runs/study")
    for name in ("seeds", "parallel"):
        if getattr(args, name) < 1:
            raise BadInput(f"--{name} is {getattr(args, name)}; it has to be at least 1")
    return args


def main(argv: list[str] | None = None, dust: Path = HERE.parent / "dust.py",
         results: Path = HERE / "results") -> int:
    """Exit code 0; 2 where a run failed, or with one line for what the user can put right; 130 after Ctrl-C."""
    try:
        args = parse_args(argv)
        args.dust, args.results = dust, results
        variants = tuple(v for v in STUDIES[args.study][1] if not (args.quick and v in NOT_QUICK))
        for name in variants:
            for seed in range(args.seeds):
                is_there(run_folder(args, name, seed), args)  # nothing is started beside runs of another kind
        failures = 0 if args.plot_only else run_jobs(make_jobs(args, variants), args.parallel)
        path = write_results(args.study, args, variants)
        print(f"\n{path.read_text()}\n{path}")
        return 2 if failures else 0
    except KeyboardInterrupt:
        print("\nstudy: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (BadInput, OSError) as error:
        filed = isinstance(error, OSError) and error.strerror
        print(f"study: {f'{error.filename}: {error.strerror}' if filed else error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    for name in ("SIGTERM", "SIGHUP"):  # the runs have sessions of their own: they must not outlive this one
        signal.signal(getattr(signal, name), signal.default_int_handler)
    raise SystemExit(main())
