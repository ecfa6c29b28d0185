"""Before a run computes anything: its settings, its folder, whether it is the run that --resume means, its memory and
its plan; later, whether there is something to learn from; and what a user is told when it breaks off.

args is dust.Args throughout.
"""
import errno
import json
import math
from collections import Counter
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from tqdm import tqdm

from plumbing import ranks
from plumbing.problems import NAMES, BadInput, Problem, seed_for, first_line, load_problems, without_overlap, write_atomic
from plumbing.models import check_model, choose_optimizer, fits_context, memory_line, room
from plumbing.progress import Clock
from plumbing.report import EVAL_CANDIDATES

NOT_OF_THE_RESULT = {"out", "resume", "workers", "device", "rows", "save_every", "preset", "quick"}


def check_args(args):
    """The same settings, with the device chosen. Raises BadInput for what cannot work, before anything starts."""
    counts = ("candidates", "batch", "mini_batch", "ppo_epochs", "max_new_tokens", "repeats", "save_every", "rows",
              "micro_tokens", "memory_mb", "block")
    from_zero = ("limit", "eval_limit", "steps", "clip", "clip_high", "dual_clip", "kl", "weight_decay", "warmup",
                 "lora", "top_k", "eval_temperature", "workers")
    at_least = dict.fromkeys(counts, 1) | dict.fromkeys(from_zero, 0)
    above = dict.fromkeys(("timeout", "lr", "temperature", "top_p"), 0)
    for bounds, words in ((at_least, "at least"), (above, "above")):
        for name, bound in bounds.items():
            value = getattr(args, name)
            if not math.isfinite(value) or value < bound or (value == bound and bounds is above):
                raise BadInput(f"--{name.replace('_', '-')} is {value}; it has to be {words} {bound}")
    if args.timeout >= 1e6:
        raise BadInput(f"--timeout is {args.timeout}; it has to be below 1000000 seconds")
    if args.group_size < 2:
        raise BadInput(f"--group-size is {args.group_size}; a ranking needs at least 2 candidates")
    if args.group_size > args.candidates:
        raise BadInput(
            f"--group-size {args.group_size} is larger than --candidates {args.candidates}; "
            "sample at least as many candidates as stand in a group"
        )
    if args.answers < 2:
        raise BadInput(f"--answers is {args.answers}; GRPO compares the answers to one prompt and needs at least 2")
    if 0 < args.dual_clip <= 1:
        raise BadInput(f"--dual-clip is {args.dual_clip}; it has to be above 1, the ratio of an unchanged model, or 0")
    if args.rank_with and not args.eval_only:
        raise BadInput("--rank-with only measures another judge: add --eval-only, or learn from one with --mode sft "
                       "--teacher")
    for option, use, given in (("--init", "without --eval-only", args.init and args.eval_only),
                               ("--teacher", "with --mode sft", args.teacher and args.mode != "sft")):
        if given:
            raise BadInput(f"{option} works only {use}; to measure a run's model: --eval-only --model FOLDER")
    if args.workers == 0 and not {args.train, args.eval} <= NAMES.keys():
        raise BadInput("--workers 0 runs programs without isolation, and only those of the shipped problems: it goes "
                       "with --train micro-train --eval micro-eval")
    if args.lora and not find_spec("peft"):
        raise BadInput("--lora needs the package peft: pip install peft")
    if args.shard and (args.lora or not torch.distributed.is_initialized()):
        raise BadInput("--shard spreads all weights over torchrun's processes: start it with torchrun, without --lora")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = ranks.device(device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError, ValueError) as error:
        raise BadInput(f"--device {device} does not work here: {first_line(error)}") from None
    return replace(args, device=device)


def problems_of(args) -> tuple[list[Problem], list[Problem]]:
    """The problems of --train, none with --eval-only, and those of --eval.

    A training problem that also stands in --eval is left out, and counted: a gain on what was trained on is none. Only
    where both options name the same file nothing is, for whoever does that wants to see it learn by heart.
    """
    held_out = load_problems(args.eval)
    if args.eval_only:
        problems = []
    elif args.train == args.eval:
        problems = load_problems(args.train, args.limit)
        tqdm.write(f"--train and --eval are the same, {args.train}: what is measured was trained on")
    else:
        enough = args.limit and args.limit + len(held_out)  # a public set can be long, and few of it are wanted
        problems, removed = without_overlap(load_problems(args.train, enough), held_out)
        if removed:
            tqdm.write(f"{removed} of {removed + len(problems)} problems of --train left out: they stand in --eval too")
        if not problems:
            raise BadInput(f"every problem of --train {args.train} stands in --eval {args.eval} too: use others")
    count = min(args.eval_limit or len(held_out), len(held_out))
    spread = [held_out[i * len(held_out) // count] for i in range(count)]
    return problems[: args.limit or None], spread


def find_run(args) -> tuple[Path, dict]:
    """The folder of the run and its args.json; empty for a new run.

    Raises BadInput where the folder holds a run and --resume was not given, or args.json is damaged.
    """
    runs = Path("runs")
    if args.out:
        out = Path(args.out)
    else:
        stem = Path(args.model).resolve().name + ("-quick" if args.quick else "")
        numbers = [path.name.removeprefix(f"{stem}-") for path in runs.glob(f"{stem}-*")]
        number = max((int(n) for n in numbers if n.isdecimal()), default=0)
        out = runs / f"{stem}-{number if args.resume and number else number + 1}"
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


def fit(args, before: dict, problems: list[Problem]) -> tuple[str, bool, list[str]]:
    """The optimiser, whether to checkpoint layers, and what the plan says about memory: of --model, and of its frozen
    copy or --teacher.

    before: args.json of the run that is resumed; the optimiser stays the one of its start.
    """
    parameters, there = check_model(args.model), min(ranks.gather(room(args.device)))
    if args.teacher and not args.eval_only:
        reference = check_model(args.teacher, "--teacher")
    else:
        reference = parameters if (args.kl > 0 or args.mode == "sft") and not args.lora else 0
    settings = dict(train=not args.eval_only, lora=args.lora > 0, reference=reference,
                    shards=ranks.world() if args.shard else 1)
    kind, checkpointing = choose_optimizer(parameters, there, args.optimizer or before.get("optimizer", ""), **settings)
    return kind, checkpointing, [memory_line(parameters, there, kind, **settings)]


def open_run(out: Path, before: dict, args, problems: list[Problem], held_out: list[Problem]) -> None:
    """Makes the folder of the run, with args.json.

    Raises BadInput where --resume would go on with other settings or problems than the run was started with.
    """
    settings = {name: value for name, value in asdict(args).items() if name not in NOT_OF_THE_RESULT}
    before = before and asdict(type(args)()) | before  # a run of an older version lacks settings that are newer
    changed = [name for name, value in settings.items() if before and before[name] != value]
    if changed:
        values = ", ".join(f"{name} was {before[name]!r}" for name in changed)
        raise BadInput(f"--resume goes on with the settings the run was started with; in {out} {values}")
    digests = {"train": seed_for(*problems), "eval": seed_for(*held_out)}
    for name in digests:
        if before and before["digests"].get(name) != digests[name]:
            raise BadInput(f"the problems of --{name} {getattr(args, name)} are not those that {out} was started with")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {out}: cannot make this folder: {error.strerror}") from None
    if ranks.rank() == 0:
        write_atomic(out / "args.json", json.dumps(asdict(args) | {"digests": digests}, indent=1))


def plan(problems: list[Problem], held_out: list[Problem], args, out: Path, needs: list[str]) -> Clock:
    """Says what the run will do, and sets up the estimate of the time left."""
    drawn = len(held_out) * args.repeats
    judged = drawn + len(held_out) * (args.repeats // 2)  # with the finals of Best-of-8, one for each two groups
    work = {"base: programs": drawn * EVAL_CANDIDATES, "base: rankings": judged}
    print(f"DuST -> {out}")
    print("\n".join(f"  memory   {line}" for line in needs))
    if not args.eval_only:
        sampled, answers = len(problems) * args.candidates, args.steps * args.batch * args.answers
        fresh = {"rank-onpolicy": 1.0, "iterative": 0.5}.get(args.mode, 0.0)  # steps that draw candidates anew
        work |= {"train": 3 * answers + fresh * args.steps * args.batch * 2 * args.group_size}  # update: two rollouts
        work |= {"judge: rankings": judged, "trained: programs": drawn * EVAL_CANDIDATES, "trained: rankings": judged}
        if args.mode in ("rank", "sft"):
            work |= {"sample": sampled}
            groups = len(problems) * (args.candidates // args.group_size)
            print(f"  sample   {len(problems)} problems x {args.candidates} candidates = {sampled} answers")
            print(f"  label    up to {sampled} programs on all their tests, {max(args.workers, 1)} at a time")
            print(f"  group    up to {groups} groups of {args.group_size}, mixed ones kept")
        prompts = "problems" if args.mode == "generate" else "groups"
        print(f"  train    {args.mode}: {args.steps} steps x {args.batch} {prompts} x {args.answers} = {answers} "
              "answers")
    times = "once" if args.eval_only else "before and after"
    if ranks.world() > 1:
        print(f"  ranks    {ranks.world()}, each with its share of every stage")
    print(f"  evaluate {len(held_out)} problems x {args.repeats} x {EVAL_CANDIDATES} candidates, {times}", flush=True)
    longest = {"--max-new-tokens": args.max_new_tokens}
    evaluation = {"--eval-limit": len(held_out), "--repeats": args.repeats} | longest
    smaller = {"sample": {"--limit": len(problems), "--candidates": args.candidates} | longest,
               "train": {"--steps": args.steps, "--batch": args.batch} | longest}
    return Clock(work, {name: smaller.get(name, evaluation) for name in work})


def without_long_ones(model, problems: list[Problem], prompts: dict[str, torch.Tensor], answer_tokens: int) -> list:
    """The problems whose prompt [L], found by their id, leaves room for an answer. Raises BadInput where none does."""
    kept = [p for p in problems if fits_context(model, prompts[p.id], answer_tokens)]
    if not kept:
        raise BadInput(f"no problem's prompt fits the model's context with --max-new-tokens {answer_tokens}")
    if len(kept) < len(problems):
        tqdm.write(f"  {len(problems) - len(kept)} of {len(problems)} problems get no answer: their prompts with "
                   f"{answer_tokens} tokens for the answer are longer than the model's context")
    return kept


def check_groups(candidates: list, mixed: list, groups: list, k: int) -> None:
    """Says how many groups there are to learn from. Raises BadInput where there is none.

    candidates: all that were labelled; mixed: the mixed groups of them; groups: those that fit the model's context.
    """
    if not mixed:
        right = any(c.correct for c in candidates)
        reason = "every group is all right or all wrong" if right else "no program is correct"
        raise BadInput(
            f"no mixed group of {k}: {reason}, so there is nothing to rank; "
            "use more --candidates, problems nearer to what the model can do, or a longer --max-new-tokens"
        )
    right = Counter(sum(c.correct for c in group.candidates) for group in mixed)
    counts = ", ".join(f"{right[n] / len(mixed):.0%} with {n}" for n in sorted(right))
    tqdm.write(f"  {len(mixed)} mixed groups; correct candidates in them: {counts}")
    if len(groups) < len(mixed):
        tqdm.write(f"  {len(mixed) - len(groups)} groups left out: longer than the model's context with the answer")
    if not groups:
        raise BadInput("no group's ranking prompt fits the model's context: use a smaller --max-new-tokens")


def what_to_put_right(error: Exception) -> str:
    """In a few words what a user can do about an error from below Python; empty where it is none of theirs."""
    text = first_line(error)
    full = ("No space left", "StreamWriter failed", "inline_container")  # the system, safetensors, torch
    if getattr(error, "errno", None) == errno.ENOSPC or any(words in text for words in full):
        return "the disk is full: make room"
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        return "out of memory: lower --rows (sampling) or --micro-tokens (training)"
    if ranks.is_lost(error):
        return "another process of this run has ended"
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {error.strerror or text}: put that right"
    return ""
