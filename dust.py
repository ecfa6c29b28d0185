"""DuST: train a model to judge its own programs, and see whether it writes better ones.

"Primal Generation, Dual Judgment: Self-Training from Test-Time Scaling" (arXiv 2605.11299), from top to bottom:

    problems -> sample -> label -> make_groups -> train (rollout -> score -> update) -> evaluate -> report

`main` at the end of this file is the method; each stage is a function from one list to the next. The model's side of
training is in grpo.py, the prompts and rewards are in rank_prompt.py, the programs run in sandbox.py.

    python dust.py                      # the whole method on the shipped model, about ten minutes on a laptop
    python dust.py --quick              # the same in about a minute
    python dust.py --model FOLDER --train train.jsonl --eval eval.jsonl --preset paper
"""
import argparse
import copy
import errno
import json
import math
import os
import random
import sys
import time
import zlib
from collections import defaultdict
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from tqdm import tqdm

import grpo
import rank_prompt
import sandbox
from data import BadInput, Problem, load_problems, memory, ranks, write_whole
from data.model import (add_lora, checkpoint_layers, eos_ids, gathered, load_checkpoint, load_config, load_model,
                        make_optimizer, merge_lora, save_checkpoint, save_model)
from data.progress import Clock, Journal
from data.report import EVAL_CANDIDATES, write_report

HERE = Path(__file__).resolve().parent

# ------------------------------------------------------------------------------------------------------ arguments


def arg(default, text: str, **extra):
    return field(default=default, metadata={"help": text, **extra})


@dataclass
class Args:
    """Every setting of a run. The defaults are the laptop's; the paper's value stands in brackets where it differs."""

    # what to run
    model: str = arg(str(HERE / "data" / "tiny"), "model folder, or a name on the Hub")
    train: str = arg("micro-train", "training problems: a JSONL file or a shipped set")
    eval: str = arg("micro-eval", "evaluation problems: a JSONL file or a shipped set")
    out: str = arg("", "folder of the run; without it a new one below runs/ (with --resume: the newest there)")
    preset: str = arg("", "laptop or paper; without it laptop for the shipped model, else paper",
                      choices=["laptop", "paper"])
    quick: bool = arg(False, "a run of about a minute: fewer problems, candidates and steps")
    eval_only: bool = arg(False, "measure the model as it is: no training")
    resume: bool = arg(False, "go on with the run in --out where it was stopped")
    seed: int = arg(0, "seed of everything random")
    device: str = arg("", "cpu, cuda, mps; without it cuda where there is one, else cpu")
    workers: int = arg(os.cpu_count() or 1, "sandbox processes")
    # candidates and groups (paper 2.2)
    limit: int = arg(0, "use only the first so many training problems; 0: all")
    eval_limit: int = arg(0, "use only so many evaluation problems, evenly spread over the file; 0: all")
    candidates: int = arg(16, "M, programs sampled for each training problem [64]")
    group_size: int = arg(4, "K, candidates in a ranking group")
    timeout: float = arg(10.0, "seconds a program may take for one test")
    memory_mb: int = arg(1024, "memory a program may take")
    # judging (paper 2.3)
    reward: str = arg("pairacc", "what a ranking is paid for", choices=list(rank_prompt.REWARDS))
    thinking: bool = arg(True, "let the chat template switch thinking on (enable_thinking)")
    # GRPO (paper 2.4, table 4)
    answers: int = arg(8, "G, rankings sampled for each prompt")
    batch: int = arg(16, "prompts a step [64]")
    mini_batch: int = arg(16, "prompts an optimiser step")
    ppo_epochs: int = arg(1, "passes over each batch [3]")
    steps: int = arg(60, "steps in all, over as many passes through the groups as they need")
    lr: float = arg(1e-4, "learning rate of AdamW, constant [1e-6; a model of 1 M parameters needs a larger one]")
    clip: float = arg(0.2, "clip range of the ratio, both ways")
    kl: float = arg(0.001, "weight of the KL term to the frozen base model; 0: none")
    temperature: float = arg(1.0, "temperature of candidates and training answers")
    max_new_tokens: int = arg(192, "longest answer, thinking included [32768]")
    micro_tokens: int = arg(16384, "tokens in one training forward, padding included: bounds the memory")
    optimizer: str = arg("", "how weights are kept: fp32; bf16 with fp32 masters; bf16 with kahan compensation, for\n"
                         "one 80 GB GPU; without it the first of these that fits the memory",
                         choices=list(memory.STORED))
    lora: int = arg(0, "train adapters of this rank instead of all weights (package peft); 0: all weights")
    shard: bool = arg(False, "spread weights, gradients and optimiser over torchrun's processes (FSDP2)")
    save_every: int = arg(1, "steps between checkpoints")
    rows: int = arg(256, "answers that are decoded at a time: bounds the memory")
    # evaluation (section 3.1): temperature 0.6, top-p 0.95, top-k 20
    repeats: int = arg(2, "R, evaluation groups drawn for each problem [10]")
    eval_temperature: float = arg(0.6, "temperature of the evaluation, for programs and rankings")
    top_p: float = arg(0.95, "nucleus of the evaluation")
    top_k: int = arg(20, "top-k of the evaluation")


PAPER = dict(
    candidates=64, batch=64, ppo_epochs=3, steps=180, lr=1e-6, max_new_tokens=32768, repeats=10, save_every=10
)
QUICK = dict(limit=60, eval_limit=60, candidates=8, steps=10, repeats=1)
NOT_OF_THE_RESULT = {"out", "resume", "workers", "device", "rows", "save_every", "preset", "quick"}


def parse_args(argv: list[str] | None) -> Args:
    """Command line -> Args. What is given wins over --quick, which wins over the preset."""
    parser = argparse.ArgumentParser(
        prog="dust.py", description=__doc__.split("\n\n")[0], formatter_class=argparse.RawTextHelpFormatter
    )
    for f in fields(Args):
        extra = {key: value for key, value in f.metadata.items() if key != "help"}
        if isinstance(f.default, bool):
            action = argparse.BooleanOptionalAction if f.default else "store_true"
            parser.add_argument(f"--{f.name.replace('_', '-')}", action=action, default=None, help=f.metadata["help"])
        else:
            default = "" if f.default in ("", MISSING) else f" (default: {f.default})"
            parser.add_argument(
                f"--{f.name.replace('_', '-')}", type=type(f.default), help=f.metadata["help"] + default,
                **({"metavar": f.name.upper()} | extra if "choices" not in extra else extra),
            )
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    shipped = Path(given.get("model", Args.model)).resolve() == Path(Args.model)
    preset = given.get("preset") or ("laptop" if shipped else "paper")
    settings = (PAPER if preset == "paper" else {}) | (QUICK if given.get("quick") else {}) | given
    return check_args(Args(**settings | {"preset": preset}))


def check_args(args: Args) -> Args:
    """Refuses what cannot work before anything starts."""
    counts = ("candidates", "batch", "mini_batch", "ppo_epochs", "max_new_tokens", "repeats", "save_every", "rows",
              "micro_tokens", "workers", "memory_mb")
    from_zero = ("limit", "eval_limit", "steps", "clip", "kl", "lora", "top_k", "eval_temperature")
    at_least = dict.fromkeys(counts, 1) | dict.fromkeys(from_zero, 0)
    above = dict.fromkeys(("timeout", "lr", "temperature", "top_p"), 0)
    for bounds, words in ((at_least, "at least"), (above, "above")):
        for name, bound in bounds.items():
            value = getattr(args, name)
            if not math.isfinite(value) or value < bound or (value == bound and bounds is above):
                raise BadInput(f"--{name.replace('_', '-')} is {value}; it has to be {words} {bound}")
    if args.group_size < 2:
        raise BadInput(f"--group-size is {args.group_size}; a ranking needs at least 2 candidates")
    if args.group_size > args.candidates:
        raise BadInput(
            f"--group-size {args.group_size} is larger than --candidates {args.candidates}; "
            "sample at least as many candidates as stand in a group"
        )
    if args.answers < 2:
        raise BadInput(f"--answers is {args.answers}; GRPO compares the answers to one prompt and needs at least 2")
    if args.lora and not find_spec("peft"):
        raise BadInput("--lora needs the package peft: pip install peft")
    if args.shard and (args.lora or not torch.distributed.is_initialized()):
        raise BadInput("--shard spreads all weights over torchrun's processes: start it with torchrun, without --lora")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = ranks.device(device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError, ValueError) as error:
        raise BadInput(f"--device {device} does not work here: {str(error).splitlines()[0]}") from None
    return replace(args, device=device)


# ---------------------------------------------------------------------------------------- what flows, and what stays


@dataclass
class Candidate:
    """One sampled answer. code is None where no program could be extracted; correct only once it has been run."""

    problem_id: str
    answer: str
    code: str | None
    correct: bool = False


@dataclass
class Group:
    """K candidates for one problem, in the order in which a judge is shown them."""

    problem: Problem
    candidates: list[Candidate]

    @property
    def labels(self) -> list[int]:
        return [int(c.correct) for c in self.candidates]

    def shuffled(self, *seed) -> "Group":
        """The same group in another order: a judge must not be able to learn positions (it would: see paper.md)."""
        return Group(self.problem, random.Random(derive(*seed)).sample(self.candidates, len(self.candidates)))


@dataclass
class Judged:
    """One evaluation group as a judge ordered it: labels best-ranked first, and the words it was ordered with."""

    group: Group
    ranked: list[int]  # labels, best-ranked first
    answer: str
    malformed: bool


def parts(work, size: int) -> list:
    """A list or range cut into pieces of this size, the last one shorter."""
    return [work[start : start + size] for start in range(0, len(work), size)]


def derive(*parts) -> int:
    """A seed for one unit of work. Each unit has its own, so that a resumed run draws what the whole one would have."""
    return zlib.crc32("/".join(map(str, parts)).encode())


# ---------------------------------------------------------------------------------------------------------- the model


def encode(tokenizer, prompt: str, args: Args) -> torch.Tensor:
    """One user turn as token ids [L], through the model's own chat template."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True,
        enable_thinking=args.thinking,
    )
    return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)


def decode(tokenizer, prompt: torch.Tensor, answer: torch.Tensor) -> str:
    """An answer's text. Where the template itself opens the thinking part, that opening is put back in front."""
    opened = tokenizer.decode(prompt[-4:]).rstrip().endswith("<think>")
    return ("<think>\n" if opened else "") + tokenizer.decode(answer, skip_special_tokens=True)


def context_of(model) -> int:
    return getattr(model.config, "max_position_embeddings", None) or sys.maxsize


def check_context(model, prompts: list[torch.Tensor], names: list[str], args: Args) -> None:
    """Stops the run while nothing is lost yet, rather than in the middle with positions the model never saw."""
    context = context_of(model)
    for prompt, name in zip(prompts, names):
        if len(prompt) + args.max_new_tokens > context:
            raise BadInput(
                f"the prompt of problem {name} has {len(prompt)} tokens; with {args.max_new_tokens} for the answer "
                f"that is more than the model's context of {context}: lower --max-new-tokens or drop the problem"
            )


# -------------------------------------------------------------------------------------------------------- the stages


def sample(model, tokenizer, problems: list[Problem], args: Args, *, name: str, count: int, seed: int,
           journal: Journal, clock: Clock, **sampling) -> list[Candidate]:
    """`count` answers to each problem (paper 2.2), their programs extracted; ordered by problem.

    sampling: temperature, top_p, top_k of grpo.rollout. About args.rows answers at a time, each batch with a seed of
    its own.
    """
    prompts = [encode(tokenizer, rank_prompt.generation_prompt(p.question, p.starter_code), args) for p in problems]
    check_context(model, prompts, [p.id for p in problems], args)
    copies = count if sampling["temperature"] == 0 else 1  # then all answers to a problem are one

    def draw_batch(chosen: range) -> dict[str, list]:  # problem -> [[answer, whether it ended], ...]
        generator = torch.Generator().manual_seed(derive(seed, chosen.start))
        rollouts = roll_out(model, tokenizer, [prompts[i] for i in chosen], args, generator=generator,
                            answers=count // copies, **sampling)
        units = {}
        for i, r in zip(chosen, rollouts):
            bare = [answer[: len(answer) - ended] for answer, ended in zip(r.answers, r.finished)]  # no EOS
            texts = [decode(tokenizer, r.prompt, answer) for answer in bare]
            units[problems[i].id] = list(zip(texts, r.finished)) * copies
        return units

    batches = parts(range(len(problems)), max(1, args.rows // count))
    waiting = [chosen for chosen in batches if not all(problems[i].id in journal.done for i in chosen)]
    found = len(problems) - sum(map(len, waiting))
    with clock.stage(name, len(problems), found) as progress, gathered(model):
        for units in ranks.in_rounds(waiting, draw_batch):
            journal.add(units)
            progress.update(len(units))
    answers = [(p.id, text, ended) for p in problems for text, ended in journal.done[p.id]]
    candidates = [Candidate(problem_id, text, rank_prompt.extract_code(text)) for problem_id, text, _ in answers]
    without, cut = sum(c.code is None for c in candidates), sum(not ended for *_, ended in answers)
    limit = args.max_new_tokens
    tqdm.write(f"  {len(candidates)} answers, {without} without a program, {cut} cut off at {limit} tokens")
    return candidates


def label(problems: list[Problem], candidates: list[Candidate], args: Args, *, name: str, journal: Journal,
          clock: Clock) -> None:
    """Runs every program on every test and sets `correct` (paper 2.2): y = 1 only when every test passes.

    The same program for the same problem runs once. Programs run in sandbox.py, never in this process.
    """
    tests = {p.id: p.tests for p in problems}
    programs = list(dict.fromkeys((c.problem_id, c.code) for c in candidates if c.code is not None))
    keys = {program: f"{program[0]}/{derive(program[1])}/{len(program[1])}" for program in programs}
    waiting = [program for program in programs if keys[program] not in journal.done]
    workers = max(1, args.workers // ranks.on_this_machine())
    with clock.stage(name, len(programs), len(programs) - len(waiting)) as progress:
        with sandbox.Pool(workers=workers, timeout=args.timeout, memory_mb=args.memory_mb) as pool:

            def run_chunk(chunk: list[tuple[str, str]]) -> dict[str, int]:
                labels = pool.label([(code, tests[problem_id]) for problem_id, code in chunk])
                return {keys[program]: int(correct) for program, correct in zip(chunk, labels)}

            for units in ranks.in_rounds(parts(waiting, 32 * workers), run_chunk):
                journal.add(units)
                progress.update(len(units))
    for c in candidates:
        c.correct = c.code is not None and bool(journal.done[keys[c.problem_id, c.code]])
    share = sum(c.correct for c in candidates) / max(len(candidates), 1)
    tqdm.write(f"  {len(programs)} different programs; {share:.1%} of the answers are correct")


def make_groups(problems: list[Problem], candidates: list[Candidate], k: int) -> list[Group]:
    """Cuts each problem's candidates into groups of k and keeps the mixed ones, 0 < sum(y) < k (paper 2.2).

    Answers without a program are dropped first; fewer than k left over at the end are dropped too. Built once, from
    the base model, and used throughout ("off-policy ranking", the paper's default).
    """
    by_problem = defaultdict(list)
    for candidate in candidates:
        if candidate.code is not None:
            by_problem[candidate.problem_id].append(candidate)
    groups = []
    for problem in problems:
        own = by_problem[problem.id]
        groups += [Group(problem, own[i : i + k]) for i in range(0, len(own) - k + 1, k)]
    mixed = [group for group in groups if 0 < sum(group.labels) < k]
    if not mixed:
        right = sum(sum(group.labels) for group in groups)
        reason = "no program is correct" if not right else "every group is all right or all wrong"
        raise BadInput(
            f"no mixed group among {len(groups)}: {reason}, so there is nothing to rank; "
            "use more --candidates, problems nearer to what the model can do, or a longer --max-new-tokens"
        )
    shares = [sum(sum(g.labels) == n for g in mixed) / len(mixed) for n in range(1, k)]
    counts = ", ".join(f"{share:.0%} with {n}" for n, share in enumerate(shares, 1))
    tqdm.write(f"  {len(mixed)} mixed groups of {len(groups)}; correct candidates in them: {counts}")
    return mixed


def frozen_copy(model, args: Args):
    """The model before training, for the KL term; with LoRA that is the model itself with its adapters off."""
    if args.lora:
        return model
    if args.shard:  # what is sharded cannot be copied, but it can be read again
        model, _ = load_model(args.model, optimizer=args.optimizer, shard=True, device=args.device)
        with gathered(model):
            grpo.shares_prompts(model)
    return (model if args.shard else copy.deepcopy(model)).requires_grad_(False)


def train(model, tokenizer, groups: list[Group], args: Args, clock: Clock, out: Path) -> None:
    """GRPO on rankings (paper 2.4): only the judge is rewarded, and the updated weights are the ones that generate.

    One step: args.batch groups, each shuffled anew; args.answers rankings of each from the current policy; a reward
    for each; one update. Everything random in a step is seeded by its number, so a run that was killed and resumed
    makes the same steps as one that was not.
    """
    if args.lora:
        add_lora(model, args.lora, derive(args.seed, "lora"))
    reference = frozen_copy(model, args) if args.kl else None
    optimizer = make_optimizer(model, args.optimizer, args.lr)
    checkpoint, metrics_file = out / "checkpoint.pt", out / "metrics.jsonl"
    first = load_checkpoint(checkpoint, model, optimizer)
    if ranks.rank() == 0:
        lines = metrics_file.read_text().splitlines()[:first] if metrics_file.exists() else []
        write_whole(metrics_file, "".join(line + "\n" for line in lines))
    with clock.stage("train", args.steps, first) as progress:
        for step in range(first, args.steps):
            began = time.time()
            generator = torch.Generator().manual_seed(derive(args.seed, "train", step))
            batch = [group.shuffled(args.seed, "train", step, i) for i, group in enumerate(pick(groups, step, args))]
            rollouts = training_rollouts(model, tokenizer, batch, args, generator)
            metrics = score_rollouts(tokenizer, batch, rollouts, args.reward)
            metrics |= grpo.update(
                model, optimizer, rollouts, mini_batch=args.mini_batch, epochs=args.ppo_epochs,
                temperature=args.temperature, clip_low=args.clip, clip_high=args.clip, kl=args.kl,
                ref_model=reference, micro_tokens=args.micro_tokens, generator=generator,
            )
            sampled = sum(len(answer) for r in rollouts for answer in r.answers)
            seconds = time.time() - began
            metrics |= {"step": step + 1, "tokens_per_second": sampled / seconds, "seconds": seconds}
            if ranks.rank() == 0:
                with metrics_file.open("a") as file:
                    file.write(json.dumps(metrics) + "\n")
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                save_checkpoint(checkpoint, model, optimizer, step + 1)
            progress.set_postfix_str(
                f"reward {metrics['reward']:.2f}, malformed {metrics['malformed']:.0%}, "
                f"cut {metrics['truncated']:.0%}, KL {metrics['ref_kl']:.3f}"
            )
            progress.update()
    merge_lora(model)
    save_model(out / "model", model, tokenizer)


def training_rollouts(model, tokenizer, batch: list[Group], args: Args, generator) -> list[grpo.Rollout]:
    """Rankings of a step's groups by the current policy, one Rollout a group; each rank draws its share of them."""
    seeds = torch.randint(2**62, (len(batch), args.answers), generator=generator).tolist()

    def draw(own: list[int]) -> list[grpo.Rollout]:
        return rank(model, tokenizer, [batch[i] for i in own], args, answers=args.answers, top_p=1.0, top_k=0,
                    temperature=args.temperature, seeds=[seeds[i] for i in own])

    with gathered(model):
        return ranks.spread(list(range(len(batch))), draw)


def pick(groups: list[Group], step: int, args: Args) -> list[Group]:
    """The groups of one step: the groups in a new random order for each pass, cut into batches."""
    first, last = step * args.batch, (step + 1) * args.batch
    passes = range(first // len(groups), (last - 1) // len(groups) + 1)
    orders = [random.Random(derive(args.seed, "order", number)).sample(groups, len(groups)) for number in passes]
    start = first - passes.start * len(groups)
    return sum(orders, [])[start : start + args.batch]


def ranking_ids(tokenizer, group: Group, args: Args) -> torch.Tensor:
    prompt = rank_prompt.ranking_prompt(group.problem.question, [c.code for c in group.candidates])
    return encode(tokenizer, prompt, args)


def fits_context(model, tokenizer, group: Group, args: Args) -> bool:
    """Whether a group's ranking prompt leaves room for the answer; with long programs some may not."""
    return len(ranking_ids(tokenizer, group, args)) + args.max_new_tokens <= context_of(model)


def roll_out(model, tokenizer, prompts: list[torch.Tensor], args: Args, **sampling) -> list[grpo.Rollout]:
    return grpo.rollout(model, prompts, max_new_tokens=args.max_new_tokens, eos_ids=eos_ids(model, tokenizer),
                        max_rows=args.rows, **sampling)


def rank(model, tokenizer, groups: list[Group], args: Args, **sampling) -> list[grpo.Rollout]:
    """Rankings of groups by the model, as they are ordered: one Rollout a group."""
    return roll_out(model, tokenizer, [ranking_ids(tokenizer, group, args) for group in groups], args, **sampling)


def score_rollouts(tokenizer, groups: list[Group], rollouts: list[grpo.Rollout], reward: str) -> dict[str, float]:
    """Sets the rewards of each rollout (paper 2.3); returns what to log about them.

    "constant" is what the answer 1, 2, ..., K would have earned, for comparison: a judge that always gives it has
    learned nothing. Malformed and truncated answers are counted apart, for the remedies differ.
    """
    k = len(groups[0].candidates)
    for group, rollout in zip(groups, rollouts):
        texts = [decode(tokenizer, rollout.prompt, answer) for answer in rollout.answers]
        rollout.rewards = torch.tensor([rank_prompt.score(text, group.labels, reward) for text in texts])
    rewards = torch.stack([r.rewards for r in rollouts])  # [B, G]
    constant = [rank_prompt.REWARDS[reward](list(range(1, k + 1)), group.labels) for group in groups]
    return {
        "reward": float(rewards.mean()),
        "malformed": float((rewards == rank_prompt.FORMAT_PENALTY).float().mean()),
        "truncated": float(np.mean([not ended for r in rollouts for ended in r.finished])),
        "constant": float(np.mean(constant)),
        "answer_tokens": float(np.mean([len(answer) for r in rollouts for answer in r.answers])),
    }


# ---------------------------------------------------------------------------------------------------- the evaluation


def draw(model, tokenizer, problems: list[Problem], args: Args, clock: Clock, *, name: str, out: Path) -> list[Group]:
    """Evaluation groups (section 3.1): R times N = 4 labelled candidates a problem, at the evaluation's temperature.

    Every model draws them from the same seeds.
    """
    journals = out / "journal"
    candidates = sample(
        model, tokenizer, problems, args, name=f"{name}: programs", count=EVAL_CANDIDATES * args.repeats,
        seed=derive(args.seed, "evaluate"), journal=Journal(journals / f"{name}-samples.jsonl"), clock=clock,
        temperature=args.eval_temperature, top_p=args.top_p, top_k=args.top_k,
    )
    label(problems, candidates, args, name=f"{name}: label", journal=Journal(journals / f"{name}-labels.jsonl"),
          clock=clock)
    cut = [candidates[i : i + EVAL_CANDIDATES] for i in range(0, len(candidates), EVAL_CANDIDATES)]
    owners = [problem for problem in problems for _ in range(args.repeats)]
    return [Group(problem, own) for problem, own in zip(owners, cut)]


def judge(model, tokenizer, groups: list[Group], args: Args, clock: Clock, *, name: str, out: Path) -> list[Judged]:
    """Each evaluation group in the model's order (paper 2.1). Every model is shown the same shuffle of a group.

    Answers without a program are not shown and come last. A malformed ranking, or a prompt that does not fit, leaves
    the shown, shuffled order, which is what a system would have to fall back on: it costs what knowing nothing costs,
    and it is counted.
    """
    journal = Journal(out / "journal" / f"{name}-rankings.jsonl")
    shown = []
    for i, group in enumerate(groups):
        shuffled = group.shuffled(args.seed, "judge", i)
        shown.append(Group(group.problem, [c for c in shuffled.candidates if c.code is not None]))
    fits = [len(s.candidates) > 1 and fits_context(model, tokenizer, s, args) for s in shown]

    def judge_chunk(chunk: range) -> dict[str, str]:
        fitting = [i for i in chunk if fits[i]]
        rollouts = rank(model, tokenizer, [shown[i] for i in fitting], args, answers=1, top_p=args.top_p,
                        top_k=args.top_k, temperature=args.eval_temperature,
                        generator=torch.Generator().manual_seed(derive(args.seed, "judge", chunk.start)))
        return {str(i): decode(tokenizer, r.prompt, r.answers[0]) for i, r in zip(fitting, rollouts)}

    waiting = [chunk for chunk in parts(range(len(groups)), args.rows)
               if not all(str(i) in journal.done for i in chunk if fits[i])]
    found = len(groups) - sum(map(len, waiting))
    with clock.stage(f"{name}: rankings", len(groups), found) as progress, gathered(model):
        for units in ranks.in_rounds(waiting, judge_chunk):
            journal.add(units)
            progress.update(len(units))
    judged = []
    for i, (group, seen) in enumerate(zip(groups, shown)):
        answer, k = journal.done.get(str(i), ""), len(seen.candidates)
        ranking = rank_prompt.parse_ranking(answer, k)
        labels = [seen.labels[index - 1] for index in ranking or range(1, k + 1)]
        labels += [0] * (len(group.candidates) - k)
        judged.append(Judged(seen, labels, answer, malformed=ranking is None and k > 1))
    return judged


# --------------------------------------------------------------------------------------------------------------- main


def find_run(args: Args) -> tuple[Path, dict]:
    """The folder of the run and its args.json; on --resume after checking that it is the same run."""
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
        return out, dict(json.loads(saved.read_text()))
    except (ValueError, TypeError):
        raise BadInput(f"{saved} is damaged: start again with another --out") from None


def fit(args: Args, before: dict, problems: list[Problem]) -> tuple[str, bool, list[str]]:
    """The optimiser, whether to checkpoint layers, and what the plan says about memory.

    before: args.json of the run that is resumed; the optimiser stays the one of its start.
    """
    longest = max(len(p.question) for p in problems) // 3 + args.group_size * memory.PROGRAM_TOKENS
    shape, there = memory.shape_of(load_config(args.model)[0]), min(ranks.every(memory.room(args.device)))
    settings = dict(
        train=not args.eval_only, kl=args.kl > 0, lora=args.lora, rows=args.rows, micro_tokens=args.micro_tokens,
        row_tokens=longest + args.max_new_tokens, shards=ranks.world() if args.shard else 1,
    )
    given = args.optimizer or before.get("optimizer")
    kind, settings["checkpointing"] = memory.choose(shape, there, (given,) if given else memory.STORED, **settings)
    return kind, settings["checkpointing"], memory.describe(shape, kind, there, **settings)


def open_run(out: Path, before: dict, args: Args, problems: list[Problem], held_out: list[Problem]) -> None:
    """Makes the folder of the run, with args.json.

    Raises BadInput where --resume would go on with other settings or problems than the run was started with.
    """
    settings = {name: value for name, value in asdict(args).items() if name not in NOT_OF_THE_RESULT}
    changed = [name for name, value in settings.items() if before and before.get(name) != value]
    if changed:
        values = ", ".join(f"{name} was {before.get(name)!r}" for name in changed)
        raise BadInput(f"--resume goes on with the settings the run was started with; in {out} {values}")
    digests = {"train": derive(*problems), "eval": derive(*held_out)}
    for name in digests:
        if before and before.get("digests", digests)[name] != digests[name]:
            raise BadInput(f"the problems of --{name} {getattr(args, name)} are not those that {out} was started with")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {out}: cannot make this folder: {error.strerror}") from None
    if ranks.rank() == 0:
        write_whole(out / "args.json", json.dumps(asdict(args) | {"digests": digests}, indent=1))


def plan(problems: list[Problem], held_out: list[Problem], args: Args, out: Path, needs: list[str]) -> Clock:
    """Says what the run will do, and sets up the estimate of the time left."""
    drawn = len(held_out) * args.repeats
    work = {"base: programs": drawn * EVAL_CANDIDATES, "base: rankings": drawn}
    print(f"DuST -> {out}")
    print("\n".join(f"  memory   {line}" for line in needs))
    if not args.eval_only:
        sampled, answers = len(problems) * args.candidates, args.steps * args.batch * args.answers
        work |= {"sample": sampled, "train": 3 * answers}  # an update costs about two rollouts
        work |= {"judge: rankings": drawn, "trained: programs": drawn * EVAL_CANDIDATES, "trained: rankings": drawn}
        print(f"  sample   {len(problems)} problems x {args.candidates} candidates = {sampled} answers")
        print(f"  label    up to {sampled} programs on all their tests, {args.workers} at a time")
        groups = len(problems) * (args.candidates // args.group_size)
        print(f"  group    up to {groups} groups of {args.group_size}, mixed ones kept")
        print(f"  train    {args.steps} steps x {args.batch} groups x {args.answers} rankings = {answers} answers")
    times = "once" if args.eval_only else "before and after"
    if ranks.world() > 1:
        print(f"  ranks    {ranks.world()}, each with its share of every stage")
    print(f"  evaluate {len(held_out)} problems x {args.repeats} x {EVAL_CANDIDATES} candidates, {times}", flush=True)
    return Clock(work)


def run(args: Args) -> None:
    """The method, stage by stage. Each stage keeps a journal below out/, so each goes on where it was stopped."""
    problems = [] if args.eval_only else load_problems(args.train)[: args.limit or None]
    held_out = load_problems(args.eval)
    if args.eval_limit:
        count = min(args.eval_limit, len(held_out))
        held_out = [held_out[i * len(held_out) // count] for i in range(count)]
    out, before = ranks.on_first(lambda: find_run(args))
    optimizer, checkpointing, needs = fit(args, before, problems + held_out)
    args = replace(args, optimizer=optimizer)
    model, tokenizer = load_model(args.model, optimizer=optimizer, shard=args.shard, device=args.device)
    if checkpointing:
        checkpoint_layers(model)
    open_run(out, before, args, problems, held_out)
    clock = plan(problems, held_out, args, out, needs)
    if not args.eval_only:
        candidates = sample(
            model, tokenizer, problems, args, name="sample", count=args.candidates, seed=derive(args.seed, "sample"),
            journal=Journal(out / "journal" / "samples.jsonl"), clock=clock, temperature=args.temperature, top_p=1.0,
            top_k=0,
        )
        label(problems, candidates, args, name="label", journal=Journal(out / "journal" / "labels.jsonl"), clock=clock)
        if ranks.rank() == 0:
            write_whole(out / "candidates.jsonl", "".join(json.dumps(asdict(c)) + "\n" for c in candidates))
        mixed = make_groups(problems, candidates, args.group_size)
        groups = [group for group in mixed if fits_context(model, tokenizer, group, args)]
        if len(groups) < len(mixed):
            tqdm.write(f"  {len(mixed) - len(groups)} groups left out: longer than the model's context with the answer")
        if not groups:
            raise BadInput("no group's ranking prompt fits the model's context: use a smaller --max-new-tokens")
    drawn = draw(model, tokenizer, held_out, args, clock, name="base", out=out)
    rows = {"base": judge(model, tokenizer, drawn, args, clock, name="base", out=out)}
    if not args.eval_only:
        train(model, tokenizer, groups, args, clock, out)
        rows["trained_judge"] = judge(model, tokenizer, drawn, args, clock, name="judge", out=out)
        drawn = draw(model, tokenizer, held_out, args, clock, name="trained", out=out)
        rows["trained"] = judge(model, tokenizer, drawn, args, clock, name="trained", out=out)
    if ranks.rank() == 0:
        tqdm.write("\n" + write_report(rows, asdict(args), clock.seconds, out) + f"\nall of it: {out}")


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 2 with one line for what the user can put right; 130 after Ctrl-C."""
    try:
        ranks.start()
        run(parse_args(argv))
        ranks.stop()
        return 0
    except KeyboardInterrupt:
        ranks.say_once("\ndust: stopped; the same command with --resume goes on from here")
        return 130
    except (BadInput, sandbox.SandboxError) as error:
        ranks.say_once(f"dust: {error}")
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have exceptions of their own
        text = str(error).splitlines()[0]
        full = ("No space left", "StreamWriter failed", "inline_container")  # the two words torch has for it
        if getattr(error, "errno", None) == errno.ENOSPC or any(words in text for words in full):
            text = "the disk is full: make room"
        elif isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
            text = "out of memory: lower --rows (sampling) or --micro-tokens (training)"
        elif ranks.is_lost(error):
            text = "another process of this run has ended"
        elif isinstance(error, OSError):
            text = f"{error.filename or 'a file'}: {error.strerror or text}: put that right"
        else:
            raise
        ranks.say_once(f"dust: {text}; then the same command with --resume goes on")
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
