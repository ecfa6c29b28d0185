"""The folder of a run: which one it is, what stands in it, and how a stopped run goes on. args is dust.Args."""
import errno
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from math import ceil
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from plumbing import engine, models, ranks
from plumbing.problems import BadInput, Problem, digest, first_line, write_atomic
from plumbing.report import CURVE, OF_THIS_MACHINE
from plumbing.sandbox_worker import SandboxError

NOT_OF_THE_RESULT = OF_THIS_MACHINE | {
    "rows", "micro_tokens", "save_every", "preset", "quick", "eval_every", "keep_every", "server", "server_requests",
    "server_adapters", "train", "eval",  # the digests of the problems say more than the names of their files
}

LONG = 1 / 6  # hours; for a stage that takes longer, a run says so

# ------------------------------------------------------------------------------------------------- work that goes on


def resumable(file: Path | None, work: dict, do: Callable[[list], list], size: int, requests: int = 0) -> dict:
    """Do the items of a stage in chunks, keep each result as a line of `file`, and skip what the file has.

    work: key -> item, in order. do: items -> their results, which have to be JSON values. size: items that one process
    does at a time. Several processes share each chunk. Without a file nothing is kept or shown. Returns key -> result
    of all the work. Chunks depend on `size`, not on what is done, so a resumed run repeats the same computations.
    requests: where a server does the work, the items that it gets at a time; each result is kept when it comes.
    """
    if requests:
        return ranks.on_first(lambda: as_they_come(file, work, do, requests))
    done, keys = ranks.on_first(lambda: read_lines(file) if file else {}), list(work)
    size = min(ranks.gather(size)) * ranks.world()  # the ranks may have unlike memory
    chunks = [keys[i : i + size] for i in range(0, len(keys), size)]
    chunks = [chunk for chunk in chunks if not done.keys() >= set(chunk)]
    found = len(keys) - sum(map(len, chunks))
    with StageBar(file and file.stem, len(keys), found, leave=not of_curve(file)) as bar:
        for chunk in chunks:
            results = ranks.spread(chunk, lambda mine: do([work[key] for key in mine]))
            new = {key: result for key, result in zip(chunk, results) if key not in done}
            if file:
                append_lines(file, list(new.items()))
            done |= new
            bar.update(len(chunk))
    return {key: done[key] for key in keys}


def as_they_come(file: Path, work: dict, do: Callable[[list], list], requests: int) -> dict:
    """resumable for the items that a server does. Threads wait for it; this one keeps the results."""
    done = read_lines(file)
    left = [key for key in work if key not in done]
    with StageBar(file.stem, len(work), len(work) - len(left), requests, not of_curve(file)) as bar:
        for place, result in engine.at_once(lambda key: do([work[key]])[0], left, requests):
            append_lines(file, [(left[place], result)])
            done[left[place]] = result
            bar.update()
    return {key: done[key] for key in work}


def of_curve(file: Path | None) -> bool:
    """Return whether a stage is a part of a point of the curve. Only the point's figures are printed."""
    return bool(file) and file.parent.name == CURVE


def say(file: Path, text: str) -> None:
    """Print what a stage found, unless it is a part of a point of the curve."""
    if not of_curve(file):
        tqdm.write(text)


def say_missing_modules(file: Path, candidates: list) -> None:
    """Print which modules programs could not import: these are wrong because a package is not installed here."""
    whys = [candidate.failure["why"] for candidate in candidates if candidate.failure]
    missing = Counter(found[1] for why in whys if (found := re.search(r"No module named '(\w+)", why)))
    if missing:
        most = ", ".join(f"{name} ({count})" for name, count in missing.most_common(5))
        say(file, f"  wrong because a module is not installed here: {most}")


class StageBar(tqdm):
    """The bar of a stage, for a `with`; hidden without a name. After a minute it says how long a long stage will take.

    done: items of an earlier process. requests: where a server does the work, the items that it gets at a time.
    """

    def __init__(self, name: str | None, total: int, done: int, requests: int = 0, leave: bool = True):
        self.requests, self.told, self.told_cut = requests, False, False
        super().__init__(total=total, initial=done, desc=f"{name or '':<18}", unit="", dynamic_ncols=True,
                         mininterval=0.5, disable=not name or ranks.rank() > 0, leave=leave)

    def update(self, n=1):
        super().update(n)
        if self.disable or self.told:
            return
        done, passed = self.n - self.initial, time.time() - self.start_t
        if passed >= 60 and done >= self.requests:  # the first answers of a server are the short ones
            hours, self.told = passed / done * (self.total - self.n) / 3600, True
            if hours > LONG:
                stage = self.desc.strip()
                tqdm.write(f"  {stage}: about {hours:.1f} hours more. {shorter(stage, self.requests)}")

    def show(self, metrics: dict) -> None:
        """Show a step of the training. Say once if most of its answers are cut off."""
        self.set_postfix_str(f"reward {metrics['reward']:.2f}, malformed {metrics['malformed']:.0%}, "
                             f"cut {metrics['truncated']:.0%}, KL {metrics['ref_kl']:.3f}")
        self.update()
        self.told_cut = self.told_cut or warn_if_cut(Path("train"), metrics["truncated"])


def shorter(stage: str, requests: int) -> str:
    """Return what makes a stage shorter: what --resume may add to this run, then what a new run may ask for less of."""
    row, kind = f"-{stage}".split("-")[-2:]
    less = "--limit or --candidates" if row in ("", "teacher") else "--eval-limit or --repeats"
    more, last = "more processes (torchrun)", "--max-new-tokens"
    if kind == "labels":
        more, last = "more --workers on more cores", "--timeout"
    elif kind == "train":
        less = "--steps or --answers"
    elif requests:
        more = "more --server-requests or a faster server"
    elif row in ("", "base"):
        more = "--server or more processes (torchrun)"
    return f"Faster: {more}, which --resume may add. Shorter, in a new run: smaller {less}, or {last}"


def describe(rollouts: list) -> dict[str, float]:
    """Return the number of rollouts, and means over all of their answers."""
    return {
        "prompts": len(rollouts),
        "reward": mean([reward for r in rollouts for reward in r.rewards.tolist()]),
        "truncated": mean([not ended for r in rollouts for ended in r.finished]),
        "answer_tokens": mean([len(answer) for r in rollouts for answer in r.answers]),
    }


def mean(values: list) -> float:
    """Return the mean; 0 for an empty list, because a step of --mode rank-onpolicy may find no mixed group."""
    return sum(values) / len(values) if values else 0.0


def warn_if_cut(file: Path, share: float) -> bool:
    """Say in one line what to try if more than half of a stage's answers are cut off. Return whether they are."""
    if share > 0.5:
        more = {"samples": "--candidate-tokens or ", "train": ""}.get(file.stem, "--eval-tokens or ")
        say(file, f"  {file.stem}: {share:.0%} of the answers are cut off; try a longer {more}--max-new-tokens, or "
                  "--thinking none, or, if answers go on after their end, a model whose template ends a turn with its "
                  "end token")
    return share > 0.5


def read_lines(file: Path) -> dict:
    """Return the lines [key, value] of a file as a dict, without an unfinished last line. Raises BadInput."""
    done = {}
    for number, line in enumerate(keep_lines(file), 1):
        try:
            key, done[key] = json.loads(line)
        except (ValueError, TypeError):
            message = f"{file} line {number} is damaged: delete that line, and the item will be computed again"
            raise BadInput(message) from None
    return done


def known_labels(file: Path) -> dict:
    """Return what the other stages of the evaluation found: of most problems, a model writes the same few programs."""
    folder = file.parent.parent if of_curve(file) else file.parent
    others = {folder / "base-labels.jsonl", *(folder / CURVE).glob("*-labels.jsonl")} - {file}
    return {key: found for other in sorted(others) if other.exists() for key, found in read_lines(other).items()}


def keep_lines(file: Path, count: int | None = None) -> list[bytes]:
    """Cut a file after its first `count` lines, or after its last whole line. Make a missing file. Return the lines."""
    file.touch()
    lines = file.read_bytes().split(b"\n")[:-1][:count]
    os.truncate(file, sum(len(line) + 1 for line in lines))
    return lines


def append_lines(file: Path, values: list) -> None:
    """Append each value as a line of JSON, all of them in one write."""
    if ranks.rank() == 0:
        with file.open("a", encoding="utf-8") as opened:
            opened.write("".join(json.dumps(value) + "\n" for value in values))


# --------------------------------------------------------------------------------------------------------- the folder


def find_run(args) -> tuple[Path, dict]:
    """Return the run's folder and its args.json ({}: a new run). Raises BadInput if it is damaged or lacks --resume."""
    stem = Path(models.full_name(args.model)).resolve().name + ("-quick" if args.quick else "")
    numbers = [path.name.removeprefix(f"{stem}-") for path in Path("runs").glob(f"{stem}-*")]
    newest = max((int(number) for number in numbers if number.isdecimal()), default=0)
    out = Path(args.out or f"runs/{stem}-{newest if args.resume and newest else newest + 1}")
    saved = out / "args.json"
    if not saved.exists():
        return out, {}
    if not args.resume:
        raise BadInput(f"{out} already holds a run: add --resume to go on with it, or choose another --out")
    try:
        before = dict(json.loads(saved.read_text()))
    except (ValueError, TypeError):
        before = {}
    if not {"digests", "optimizer"} <= before.keys():
        raise BadInput(f"{saved} is damaged: start again with another --out")
    return out, before


def comparable(name: str, value):
    """Return a setting; for all spellings of one model (short, full, a relative path, a link, a run) the same text."""
    if name not in ("model", "init", "teacher") or not value:
        return value
    full = models.full_name(value)
    return str(Path(models.find_model(full)).resolve()) if Path(full).is_dir() else full


def open_run(out: Path, before: dict, args, problems: list[Problem], held_out: list[Problem]) -> None:
    """Make the run's folder and its args.json. Raises BadInput where `before`, the one there, has other settings."""
    digests = {"train": digest(problems), "eval": digest(held_out)}
    settings = asdict(args) | {"digests": digests}
    if before and (names := before.keys() ^ settings.keys()):
        raise BadInput(f"{out} is of another version of the code ({', '.join(sorted(names))}): choose another --out")
    changed = [f"{name} was {before[name]!r}" for name, value in asdict(args).items() if before
               and name not in NOT_OF_THE_RESULT and comparable(name, before[name]) != comparable(name, value)]
    if changed:
        raise BadInput(f"{out} was started with other settings ({', '.join(changed)}): give those, or another --out")
    edited = [f"--{name}" for name in digests if before and before["digests"].get(name) != digests[name]]
    if edited:
        raise BadInput(f"{out} was started with other problems of {' and '.join(edited)}: give those, or another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {out}: cannot make this folder: {error.strerror}") from None
    if ranks.rank() == 0:
        write_atomic(out / "args.json", json.dumps(settings, indent=1))


def choose_device(name: str) -> str:
    """Return this rank's device: what --device names, or a GPU where there is one. Raises BadInput if it fails."""
    name = device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if name == "cuda" and ranks.world() > 1:  # each rank has the GPU of its number on its machine
            number, count = int(os.environ.get("LOCAL_RANK", ranks.rank())), torch.cuda.device_count()
            if number >= count:
                raise ValueError(f"this machine has {count} GPUs, and torchrun started more processes")
            torch.cuda.set_device(number)
            device = f"cuda:{number}"
        torch.zeros(1, device=device).item()
        failed = ""
    except (RuntimeError, AssertionError, ImportError, ValueError) as error:
        failed = first_line(error)
    if failed := next(filter(None, ranks.gather(failed)), ""):  # of any rank: all of them have to end
        raise BadInput(f"--device {name} does not work here: {failed}")
    return device


def answers_of(args, problems: int, held_out: int, curve: int, mixed: float = 0.0) -> dict[str, int]:
    """Return how many answers a run draws at most, by what they are for.

    problems, held_out, curve: numbers of problems, the last one those of each point of the curve. mixed: the share of
    groups that are mixed, by which --until-enough ends sampling; 0: not known, so all problems are sampled. The
    programs that --mode rank-onpolicy and iterative draw in each step, and the teacher's rankings, are not counted.
    """
    rankings = held_out * args.repeats + held_out * (args.repeats // 2)  # with the finals
    programs, training = held_out * args.repeats * args.best_of, args.steps * args.batch * args.answers
    if args.eval_only:
        return {"base": programs + rankings}
    if args.mode not in ("rank", "sft") or args.programs:
        problems = 0
    elif args.until_enough and mixed:
        groups = args.candidates // args.group_size * mixed  # that a problem gives
        problems = min(problems, ceil(args.steps * args.batch / groups))
    points = (args.steps - 1) // args.eval_every if args.eval_every and args.steps else 0
    return {"curve": points * min(curve, held_out) * (args.best_of + 2),
            "candidates": problems * args.candidates, "base": programs + rankings, "training": training,
            "trained": rankings + programs + rankings}  # the trained judge ranks the base's programs too


def show_plan(args, problems: list[Problem], held_out: list[Problem], curve: int, memory: str) -> None:
    """Print what the run will do. curve: problems of each point of the curve. memory: the line about memory."""
    print(f"  memory   {memory}")
    answers = answers_of(args, len(problems), len(held_out), curve)
    if not args.eval_only:
        if args.mode in ("rank", "sft"):
            until = f", or until there are {args.steps * args.batch} mixed groups" * args.until_enough
            sampled = args.programs or f"{args.candidates} candidates = {answers['candidates']} answers{until}"
            limit = f", of at most {args.candidate_tokens or args.max_new_tokens} tokens" * (not args.programs)
            print(f"  sample   {len(problems)} problems x {sampled}{limit}")
        kind = "problems" if args.mode == "generate" else "groups"
        work = (f"{args.steps} steps x {args.batch} {kind} x {args.answers} = {answers['training']} answers, of at "
                f"most {args.max_new_tokens} tokens")
        if args.mode == "sft":
            work = f"{args.epochs or args.steps} {'passes' if args.epochs else 'steps'} of a teacher's perfect rankings"
        print(f"  train    {args.mode}: {work}")
    times = "once" if args.eval_only else "before and after"
    total = sum(answers.get(kind, 0) for kind in ("base", "curve", "trained"))
    print(f"  evaluate {len(held_out)} problems x {args.repeats} x {args.best_of} candidates, {times}; "
          f"with rankings and curve {total} answers, of at most {args.eval_tokens or args.max_new_tokens} tokens",
          flush=True)
    if ranks.world() > 1:
        print(f"  ranks    {ranks.world()}, each with its share of every stage", flush=True)


def check_groups(candidates: list, mixed: list, groups: list, k: int) -> None:
    """Say how many of the mixed groups of k fit the context (groups). Raises BadInput where none is left."""
    if not mixed:
        right = any(candidate.correct for candidate in candidates)
        without = sum(candidate.code is None for candidate in candidates)
        reason = "every group is all right or all wrong" if right else "no program is correct"
        raise BadInput(f"no mixed group of {k}: {reason} ({without} of {len(candidates)} answers hold no program), so "
                       "there is nothing to rank; start a new run (--out) with more --candidates, a longer "
                       "--max-new-tokens, or easier problems, such as --train easy-train --eval easy-eval")
    correct = Counter(sum(group.labels) for group in mixed)
    counts = ", ".join(f"{correct[n] / len(mixed):.0%} with {n}" for n in sorted(correct))
    of = f"of {len({group.problem.id for group in mixed})} of {len({c.problem_id for c in candidates})} problems"
    tqdm.write(f"  {len(mixed)} mixed groups {of}; correct candidates in them: {counts}")
    if len(groups) < len(mixed):
        tqdm.write(f"  {len(mixed) - len(groups)} groups left out: longer than the model's context with the answer")
    if not groups:
        raise BadInput("no group's ranking prompt fits the model's context: use a smaller --max-new-tokens")


def exit_code(parse: Callable, run: Callable) -> int:
    """Call run(parse()) on every rank. Returns 0, or after one line about an error 2, or after Ctrl-C 130."""
    try:
        args = parse()
        ranks.start()
        run(args)
        ranks.stop()
        return 0
    except KeyboardInterrupt:
        ranks.print_once("\ndust: stopped; the same command with --resume goes on from here")
        return 130
    except BadInput as error:  # every rank raises it
        ranks.print_once(f"dust: {error}")
    except SandboxError as error:
        print(f"dust: {error}", file=sys.stderr)
    except (OSError, RuntimeError, SafetensorError) as error:  # of the system, torch and safetensors
        if not (advice := what_to_do(error)):
            raise
        print(f"dust: {advice}; then the same command with --resume goes on", file=sys.stderr)
    return 2


def what_to_do(error: Exception) -> str:
    """Return what a user can do about an error of the machine, in a few words; "" for any other error."""
    text = first_line(error)
    full = ("No space left", "StreamWriter failed", "inline_container")  # the system, safetensors, torch
    if getattr(error, "errno", None) == errno.ENOSPC or any(words in text for words in full):
        return "the disk is full: make room"
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        return ("out of memory: lower --rows (sampling) or --micro-tokens (training; if one prompt with its answer is "
                "too long even alone, only a new run with a smaller --max-new-tokens helps)")
    if isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower():  # gloo has no exception class
        return "another process of this run has ended, see what it said"
    if isinstance(error, BrokenPipeError):
        return "the program that read this output has ended"
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {error.strerror or text}: put that right"
    return ""
