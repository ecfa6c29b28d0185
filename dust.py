"""DuST: train a model to judge its own programs, and see whether it writes better ones.

"Primal Generation, Dual Judgment: Self-Training from Test-Time Scaling" (arXiv 2605.11299), from top to bottom:

    problems -> sample -> label -> make_groups -> train (rollout -> score -> update) -> draw -> judge -> write_report

`run` near the end of this file is the method; each stage is a function from one list to the next. The model's side of
training is in grpo.py, the prompts and rewards are in rank_prompt.py, the programs run in sandbox.py.

    python dust.py                      # the whole method on the shipped model, about six minutes on a laptop
    python dust.py --quick              # the same in about a minute
    python dust.py --model Qwen3-4B     # a real model on real problems, with the paper's settings
"""
import contextlib
import json
import os
import random
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm import tqdm

import grpo
import rank_prompt
import sandbox
from plumbing import memory, ranks
from plumbing.problems import BadInput, Problem, seed_for, write_atomic
from plumbing.chat import decode, encode, encode_answers, show_first, writes_one_form
from plumbing.models import (SHORT_NAMES, lora_disabled, add_lora, checkpoint_layers, eos_ids, frozen_copy,
                        fits_context, load_checkpoint, load_config, load_model, make_optimizer, save_checkpoint,
                        save_model, warm_up)
from plumbing.presets import DATA, PRESETS, arg, command_line
from plumbing.progress import Clock, Journal
from plumbing.report import EVAL_CANDIDATES, describe_rollouts, final_groups, mean, write_report
from plumbing.runs import (check_args, check_groups, find_run, fit, open_run, plan, problems_of, what_to_put_right,
                       without_long_ones)

HERE = Path(__file__).resolve().parent

# ------------------------------------------------------------------------------------------------------ arguments


@dataclass
class Args:
    """Every setting of a run. The defaults are the laptop's; the paper's value stands in brackets where it differs.

    Where the paper and its authors' release disagree there is one field, with the paper's value as its default.
    """

    model: str = arg(str(HERE / "data" / "tiny"), "model folder, name on the Hub, or one of\n" + ", ".join(SHORT_NAMES),
                     section="what to run")
    train: str = arg("micro-train", f"training problems: a file or a known set [for any other model: {DATA['train']}]")
    eval: str = arg("micro-eval", f"evaluation problems: likewise [for any other model: {DATA['eval']}]")
    out: str = arg("", "folder of the run; without it a new one below runs/ (with --resume: the newest there)")
    preset: str = arg("", "laptop: for the micro-lab, default for the shipped model; paper: the paper's "
                      "settings,\ndefault for any other model; release: what its authors' code does instead; quick: a "
                      "real model on\none 24 GB GPU: 500 problems x 16 candidates, 60 steps, answers of 8192 tokens, "
                      "LoRA", choices=list(PRESETS))
    quick: bool = arg(False, "a run of about a minute: fewer problems, candidates and steps")
    eval_only: bool = arg(False, "measure the model as it is: no training")
    rank_with: str = arg("", "with --eval-only: another model orders the programs that --model writes")
    resume: bool = arg(False, "go on with the run in --out where it was stopped")
    seed: int = arg(0, "seed of everything random")
    device: str = arg("", "cpu, cuda, mps; without it cuda where there is one, else cpu")
    workers: int = arg(os.cpu_count() or 1, "sandbox processes; 0: none, for a debugger: all in this process and one "
                       "thread,\nthe shipped problems' programs included, which then run without isolation")

    mode: str = arg("rank", "rank: rankings of the base's candidates; rank-onpolicy: of candidates drawn anew for each "
                    "step;\ngenerate: programs, for pass or fail; iterative: blocks of steps of the last two in turn; "
                    "sft: no\nreward, the teacher's own rankings where each pair is right",
                    choices=["rank", "rank-onpolicy", "generate", "iterative", "sft"],
                    section="what is trained on (paper, table 3 and figure 3)")
    block: int = arg(50, "steps in a block of --mode iterative")
    teacher: str = arg("", "the model whose rankings --mode sft learns; without it the model itself, before training")
    init: str = arg("", "start training from the model of another run (its folder), or from another model folder")

    limit: int = arg(0, "use only the first so many training problems; 0: all",
                     section="problems, candidates and groups (paper 2.2)")
    eval_limit: int = arg(0, "use only so many evaluation problems, evenly spread over the file; 0: all")
    candidates: int = arg(16, "M, programs sampled for each training problem [64]")
    group_size: int = arg(4, "K, candidates in a ranking group")
    labels: str = arg("binary", "a program's label: 1 if all tests pass, else 0; or the share of them that pass;\n"
                      "the evaluation is always binary", choices=["binary", "fractional"])
    timeout: float = arg(10.0, "seconds a program may take for one test")
    memory_mb: int = arg(1024, "memory a program may take")

    reward: str = arg("pairacc", "what a ranking is paid for, in the modes that reward rankings",
                      choices=list(rank_prompt.REWARDS), section="judging (paper 2.3)")
    thinking: str = arg("both", "which answers have a thinking part (the chat template's enable_thinking)",
                        choices=["both", "programs", "rankings", "none"])
    reasoning_effort: str = arg("", "how long a model thinks whose template asks for it, as GPT-OSS's does",
                                choices=["low", "medium", "high"])
    question: str = arg("problem", "what a ranking prompt starts with: the problem, or all of the prompt for a program",
                        choices=["problem", "prompt"])
    shuffle: bool = arg(True, "show a group's candidates in a new order at each training step")
    parser: str = arg("strict", "how rankings are read; lenient takes the first numbers it finds",
                      choices=list(rank_prompt.READERS))

    answers: int = arg(8, "G, answers sampled for each prompt: rankings, or programs with --mode generate",
                       section="GRPO (paper 2.4, table 4)")
    batch: int = arg(16, "prompts a step [64]")
    mini_batch: int = arg(16, "prompts an optimiser step")
    ppo_epochs: int = arg(1, "passes over each batch [3]")
    steps: int = arg(60, "steps in all, over as many passes through the groups as they need [180]")
    lr: float = arg(1e-4, "learning rate of AdamW, constant [1e-6; a model of 1 M parameters needs a larger one]")
    weight_decay: float = arg(0.0, "weight decay of AdamW")
    warmup: int = arg(0, "steps in which the learning rate grows to --lr")
    loss: str = arg("sequence", "mean over each answer's tokens, then over answers; or over all tokens",
                    choices=["sequence", "token"])
    clip: float = arg(0.2, "clip range of the ratio, both ways")
    clip_high: float = arg(0.0, "clip range upwards; 0: the same as --clip")
    dual_clip: float = arg(0.0, "bound of the ratio where an answer did worse than its siblings; 0: none")
    kl: float = arg(0.001, "weight of the KL term to the frozen model that training starts from; 0: none")
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

    repeats: int = arg(2, "R, evaluation groups drawn for each problem [10]", section="evaluation (paper 3.1)")
    eval_temperature: float = arg(0.6, "temperature of the evaluation, for programs and rankings")
    top_p: float = arg(0.95, "nucleus of the evaluation")
    top_k: int = arg(20, "top-k of the evaluation")


def parse_args(argv: list[str] | None) -> Args:
    """Command line -> Args, checked. What is given wins over --quick, which wins over the preset."""
    return check_args(Args(**command_line(Args, argv, __doc__.split("\n\n")[0])))


# ---------------------------------------------------------------------------------------- what flows, and what stays


@dataclass
class Candidate:
    """One sampled answer. code is None where no program could be extracted; correct only once it has been run.

    share: of its tests that it passes, where labels are fractional.
    """

    problem_id: str
    answer: str
    code: str | None
    correct: bool = False
    share: float | None = None

    @property
    def label(self) -> float:
        """y (paper 2.2): 1 or 0; where labels are fractional the share of the tests that it passes."""
        return int(self.correct) if self.share is None else self.share


@dataclass
class Group:
    """K candidates for one problem, in the order in which a judge is shown them."""

    problem: Problem
    candidates: list[Candidate]

    @property
    def labels(self) -> list[float]:
        """y of each candidate, in the order shown."""
        return [c.label for c in self.candidates]

    @property
    def mixed(self) -> bool:
        """Whether there is a pair to put in order (paper 2.2)."""
        return len(set(self.labels)) > 1

    def shuffled(self, *seed) -> "Group":
        """The same group in another order, for a judge must not learn positions (it would: trap 3 in tutorial.md)."""
        return Group(self.problem, random.Random(seed_for(*seed)).sample(self.candidates, len(self.candidates)))


@dataclass
class RankedGroup:
    """One evaluation group as a judge ordered it, and the words that it was ordered with."""

    group: Group  # as it was shown: shuffled, without the answers that hold no program
    ordered: list[Candidate]  # best-ranked first; those answers come last
    answer: str
    malformed: bool

    @property
    def ranked(self) -> list[int]:
        """1 for a correct program, 0 for a wrong one, the best-ranked first."""
        return [int(c.correct) for c in self.ordered]


def parts(work, size: int) -> list:
    """A list or range cut into pieces of this size, the last one shorter."""
    return [work[start : start + size] for start in range(0, len(work), size)]


# ---------------------------------------------------------------------------------------------------------- the model


def program_ids(tokenizer, problem: Problem, args: Args) -> torch.Tensor:
    """The prompt that asks for a program, as token ids [L]."""
    prompt = rank_prompt.generation_prompt(problem.question, problem.starter_code)
    return encode(tokenizer, prompt, args.thinking in ("both", "programs"), args.reasoning_effort)


def ranking_ids(tokenizer, group: Group, args: Args) -> torch.Tensor:
    """The prompt that asks for a ranking (paper 2.3), as token ids [L]."""
    question, starter_code = group.problem.question, group.problem.starter_code
    if args.question == "prompt":
        question = rank_prompt.generation_prompt(question, starter_code)
    prompt = rank_prompt.ranking_prompt(question, [c.code for c in group.candidates])
    return encode(tokenizer, prompt, args.thinking in ("both", "rankings"), args.reasoning_effort)


# -------------------------------------------------------------------------------------------------------- the stages


def sample(model, tokenizer, problems: list[Problem], args: Args, *, name: str, count: int, seed: int,
           journal: Journal, clock: Clock, **sampling) -> list[Candidate]:
    """`count` answers to each problem (paper 2.2), their programs extracted; ordered by problem.

    sampling: temperature, top_p, top_k of grpo.rollout. About args.rows answers at a time; each draws from a seed of
    its own, so that the batches change nothing. A problem whose prompt leaves no room gets none (they are counted).
    """
    prompts = {p.id: program_ids(tokenizer, p, args) for p in problems}
    problems = without_long_ones(model, problems, prompts, args.max_new_tokens)
    copies = count if sampling["temperature"] == 0 else 1  # then all answers to a problem are one

    def draw_batch(chosen: range) -> dict[str, list]:  # problem -> [[answer, whether it ended], ...]
        seeds = [[seed_for(seed, problems[i].id, number) for number in range(count // copies)] for i in chosen]
        asked = [prompts[problems[i].id] for i in chosen]
        rollouts = roll_out(model, tokenizer, asked, args, seeds, **sampling)
        units = {}
        for i, r in zip(chosen, rollouts):
            bare = [answer[: len(answer) - ended] for answer, ended in zip(r.answers, r.finished)]  # no EOS
            texts = [decode(tokenizer, r.prompt, answer) for answer in bare]
            units[problems[i].id] = list(zip(texts, r.finished)) * copies
        return units

    batches = parts(range(len(problems)), max(1, args.rows // count))
    waiting = [chosen for chosen in batches if not all(problems[i].id in journal.done for i in chosen)]
    found = len(problems) - sum(map(len, waiting))
    with clock.stage(name, len(problems), found) as progress:
        for units in draw_in_rounds(model, tokenizer, waiting, draw_batch, args):
            journal.add(units)
            progress.update(len(units))
            clock.propose(name, progress)
    answers = [(p.id, text, ended) for p in problems for text, ended in journal.done[p.id]]
    candidates = [Candidate(problem_id, text, rank_prompt.extract_code(text)) for problem_id, text, _ in answers]
    without, cut = sum(c.code is None for c in candidates), sum(not ended for *_, ended in answers)
    limit = args.max_new_tokens
    tqdm.write(f"  {len(candidates)} answers, {without} without a program, {cut} cut off at {limit} tokens")
    return candidates


def label(problems: list[Problem], candidates: list[Candidate], args: Args, *, name: str, journal: Journal,
          clock: Clock) -> None:
    """Runs every program and sets `correct` (paper 2.2): y = 1 only when every test passes; and `share` where labels
    are fractional.

    The same program for the same problem runs once. Programs run in sandbox.py; in this process with --workers 0 alone.
    Raises SandboxError where the sandbox itself fails.
    """
    tests = {p.id: p.tests for p in problems}
    programs = list(dict.fromkeys((c.problem_id, c.code) for c in candidates if c.code is not None))
    keys = {program: f"{program[0]}/{seed_for(program[1])}/{len(program[1])}" for program in programs}
    waiting = [program for program in programs if keys[program] not in journal.done]
    with clock.stage(name, len(programs), len(programs) - len(waiting)) as progress:
        with open_sandbox(args) as pool:
            size = 32 * min(ranks.every(pool.workers))  # the same on each rank, whose machines may differ

            def run_chunk(chunk: list[tuple[str, str]]) -> dict[str, float]:
                return dict(zip(map(keys.get, chunk), run_tests(pool, chunk, tests, args)))

            for units in ranks.in_rounds(parts(waiting, size), run_chunk):
                journal.add(units)
                progress.update(len(units))
    set_labels(candidates, {program: journal.done[key] for program, key in keys.items()}, args)
    share = sum(c.correct for c in candidates) / max(len(candidates), 1)
    tqdm.write(f"  {len(programs)} different programs; {share:.1%} of the answers are correct")


def open_sandbox(args: Args) -> sandbox.Pool:
    """A pool for a `with`: this process's share of --workers; with 0 of them, one that a debugger can step into."""
    workers = max(1, args.workers // ranks.on_this_machine())
    limits = dict(timeout=args.timeout, memory_mb=args.memory_mb)
    return sandbox.Pool(workers=workers, **limits) if args.workers else sandbox.InThisProcess()


def run_tests(pool, programs: list[tuple[str, str]], tests: dict[str, list], args: Args) -> list[float]:
    """The label of each (problem id, code): 1 where every test passes, else 0.

    With fractional labels the share of the tests that pass: each is a job of its own, for a job ends where one fails.
    """
    if args.labels == "binary":
        return [int(passed) for passed in pool.label([(code, tests[name]) for name, code in programs])]
    passed = iter(pool.label([(code, [test]) for name, code in programs for test in tests[name]]))
    return [mean([next(passed) for _ in tests[name]]) for name, _ in programs]


def set_labels(candidates: list[Candidate], labels: dict[tuple, float], args: Args) -> None:
    """labels: (problem id, code) -> what run_tests said. An answer without a program is wrong."""
    for c in candidates:
        value = labels.get((c.problem_id, c.code), 0)
        c.correct, c.share = value == 1, value if args.labels == "fractional" else None


def make_groups(problems: list[Problem], candidates: list[Candidate], k: int) -> list[Group]:
    """Cuts each problem's candidates into groups of k and keeps the mixed ones, 0 < sum(y) < k (paper 2.2).

    With fractional labels: those where not all are equal. Answers without a program are dropped first; fewer than k
    left over at the end are dropped too.
    """
    by_problem = defaultdict(list)
    for candidate in candidates:
        if candidate.code is not None:
            by_problem[candidate.problem_id].append(candidate)
    groups = []
    for problem in problems:
        own = by_problem[problem.id]
        groups += [Group(problem, own[i : i + k]) for i in range(0, len(own) - k + 1, k)]
    return [group for group in groups if group.mixed]


def base_groups(model, tokenizer, problems: list[Problem], args: Args, clock: Clock, out: Path) -> list[Group]:
    """Groups for the whole training, built once from the base model: the paper's "off-policy ranking".

    Raises BadInput where there is nothing to rank.
    """
    candidates = sample(
        model, tokenizer, problems, args, name="sample", count=args.candidates, seed=seed_for(args.seed, "sample"),
        journal=Journal(out / "journal" / "samples.jsonl"), clock=clock, temperature=args.temperature, top_p=1.0,
        top_k=0,
    )
    label(problems, candidates, args, name="label", journal=Journal(out / "journal" / "labels.jsonl"), clock=clock)
    if ranks.rank() == 0:
        write_atomic(out / "candidates.jsonl", "".join(json.dumps(asdict(c)) + "\n" for c in candidates))
    mixed = make_groups(problems, candidates, args.group_size)
    groups = [g for g in mixed if fits_context(model, ranking_ids(tokenizer, g, args), args.max_new_tokens)]
    check_groups(candidates, mixed, groups, args.group_size)
    return groups


# ------------------------------------------------------------------------------------------------------ the training


def train(model, tokenizer, problems: list[Problem], groups: list[Group], args: Args, clock: Clock, out: Path) -> None:
    """Trains the model (paper 2.4) by what experience() gives it in each step; saves it as an ordinary model folder.

    Everything random in a step is seeded by its number, so a run that was killed and resumed makes the same steps as
    one that was not.
    """
    supervised = args.mode == "sft"
    teacher = frozen_teacher(model, tokenizer, args) if supervised else None
    if args.lora:
        add_lora(model, args.lora, seed_for(args.seed, "lora"))
    reference = frozen_copy(model, args) if args.kl and not supervised else None
    optimizer = make_optimizer(model, args.optimizer, args.lr, args.weight_decay)
    checkpoint, metrics_file = out / "checkpoint.pt", out / "metrics.jsonl"
    first = load_checkpoint(checkpoint, model, optimizer)
    if ranks.rank() == 0:
        lines = metrics_file.read_text(errors="replace").splitlines()[:first] if metrics_file.exists() else []
        write_atomic(metrics_file, "".join(line + "\n" for line in lines))
    fresh = args.mode not in ("rank", "sft")  # candidates are drawn and labelled in each step
    running = open_sandbox(args) if fresh else contextlib.nullcontext()
    with clock.stage("train", args.steps, first) as progress, running as pool:
        for step in range(first, args.steps):
            began = time.time()
            generator = torch.Generator().manual_seed(seed_for(args.seed, "train", step))
            rollouts, metrics = experience(model, tokenizer, problems, groups, step, args, generator, pool, teacher)
            warm_up(optimizer, args.lr, step, args.warmup)
            metrics |= grpo.update(model, optimizer, rollouts, args, reference=reference, generator=generator)
            metrics |= {"step": step + 1, "seconds": time.time() - began}
            trained = metrics["prompts"] * args.answers * metrics["answer_tokens"]
            metrics["tokens_per_second"] = trained / metrics["seconds"]  # of training answers, without fresh candidates
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
            clock.propose("train", progress)
    save_model(out / "model", model, tokenizer)


def experience(model, tokenizer, problems, groups, step: int, args: Args, generator, pool, teacher):
    """What one step learns from: (scored rollouts, metrics). All differences between the modes are here.

    rank           rankings of groups that were built once from the base's candidates (paper 2.2)
    rank-onpolicy  rankings of groups of candidates that the current policy has just drawn
    generate       programs, paid for passing their tests: the way that the paper does without
    iterative      args.block steps of rank-onpolicy, as many of generate, and so on
    sft            the teacher's rankings, those with every pair in order; see grpo.update for supervised
    """
    turn = ("rank-onpolicy", "generate")[step // args.block % 2]
    mode = turn if args.mode == "iterative" else args.mode
    if mode == "generate":
        chosen = pick(problems, step, args)
        rollouts, candidates = draw_programs(model, tokenizer, chosen, args.answers, args, generator, pool)
        for rollout, own in zip(rollouts, candidates):
            rollout.rewards = torch.tensor([float(c.label) for c in own])
        without = [c.code is None for own in candidates for c in own]
        return rollouts, describe_rollouts(rollouts) | {"malformed": mean(without)}
    if mode == "rank-onpolicy":
        chosen = pick(problems, step, args)
        _, candidates = draw_programs(model, tokenizer, chosen, 2 * args.group_size, args, generator, pool)
        batch = make_groups(chosen, sum(candidates, []), args.group_size)
        batch = [g for g in batch if fits_context(model, ranking_ids(tokenizer, g, args), args.max_new_tokens)]
        batch = batch[: args.batch]
    else:
        batch = pick(groups, step, args)
    if args.shuffle:
        batch = [group.shuffled(args.seed, "train", step, i) for i, group in enumerate(batch)]
    prompts = [ranking_ids(tokenizer, group, args) for group in batch]
    if mode == "sft":
        rollouts = teacher(batch, prompts, generator)
        metrics = score_rollouts(tokenizer, batch, rollouts, "pairacc", args.parser)
        return [only_perfect(r) for r in rollouts], metrics
    rollouts = draw_answers(model, tokenizer, prompts, args.answers, args, generator)
    return rollouts, score_rollouts(tokenizer, batch, rollouts, args.reward, args.parser)


def draw_answers(model, tokenizer, prompts: list[torch.Tensor], count: int, args: Args, generator):
    """`count` answers to each prompt as training needs them, one Rollout a prompt; each rank draws its share."""
    seeds = torch.randint(2**62, (len(prompts), count), generator=generator).tolist()

    def draw(own: list[int]) -> list[grpo.Rollout]:
        return roll_out(model, tokenizer, [prompts[i] for i in own], args, [seeds[i] for i in own],
                        temperature=args.temperature)

    return ranks.spread(list(range(len(prompts))), draw)


def draw_programs(model, tokenizer, problems: list[Problem], count: int, args: Args, generator, pool):
    """`count` fresh candidates for each problem, labelled: (one Rollout a problem, [candidates of each problem])."""
    prompts = [program_ids(tokenizer, problem, args) for problem in problems]
    rollouts = draw_answers(model, tokenizer, prompts, count, args, generator)
    texts = [[decode(tokenizer, r.prompt, answer) for answer in r.answers] for r in rollouts]
    candidates = [[Candidate(p.id, text, rank_prompt.extract_code(text)) for text in own]
                  for p, own in zip(problems, texts)]
    tests = {problem.id: problem.tests for problem in problems}
    programs = list(dict.fromkeys((c.problem_id, c.code) for own in candidates for c in own if c.code is not None))
    labels = ranks.spread(programs, lambda own: run_tests(pool, own, tests, args))
    set_labels(sum(candidates, []), dict(zip(programs, labels)), args)
    return rollouts, candidates


def frozen_teacher(model, tokenizer, args: Args):
    """Whose rankings --mode sft learns: a function (groups, the model's own prompts, generator) -> rollouts.

    Another model is asked through its own chat template, and what it says is written in the model's own tokens. Raises
    BadInput where those mark the thinking part in another way than rank_prompt.py reads it.
    """
    if not args.teacher:
        frozen = frozen_copy(model, args)

        def repeat(groups, prompts, generator):
            with lora_disabled(frozen):  # with LoRA it is the model itself
                return draw_answers(frozen, tokenizer, prompts, args.answers, args, generator)

        return repeat
    if not writes_one_form(tokenizer):
        raise BadInput(f"--teacher: {args.model} marks its thinking part in a way of its own; leave --teacher out")
    frozen, own = load_model(args.teacher, optimizer=args.optimizer, shard=args.shard, device=args.device,
                             option="--teacher")

    def teach(groups, prompts, generator):
        asked = [ranking_ids(own, group, args) for group in groups]
        rollouts = draw_answers(frozen, own, asked, args.answers, args, generator)
        end = eos_ids(model, tokenizer)[0]
        for rollout, prompt in zip(rollouts, prompts):
            texts = [decode(own, rollout.prompt, answer) for answer in rollout.answers]
            rollout.answers, rollout.prompt = encode_answers(tokenizer, prompt, texts, end), prompt
            rollout.logps = [torch.zeros(len(answer)) for answer in rollout.answers]
        return rollouts

    return teach


def only_perfect(rollout: grpo.Rollout) -> grpo.Rollout:
    """The answers of a reward of 1."""
    kept = [i for i, reward in enumerate(rollout.rewards.tolist()) if reward == 1.0 and rollout.finished[i]]
    answers, logps = [rollout.answers[i] for i in kept], [rollout.logps[i] for i in kept]
    return grpo.Rollout(rollout.prompt, answers, logps, [True] * len(kept), rollout.rewards[kept])


def pick(units: list, step: int, args: Args) -> list:
    """The groups (or problems) of one step: all of them in a new random order for each pass, cut into batches."""
    first, last = step * args.batch, (step + 1) * args.batch
    passes = range(first // len(units), (last - 1) // len(units) + 1)
    orders = [random.Random(seed_for(args.seed, "order", number)).sample(units, len(units)) for number in passes]
    start = first - passes.start * len(units)
    return sum(orders, [])[start : start + args.batch]


def roll_out(model, tokenizer, prompts: list[torch.Tensor], args: Args, seeds, **sampling) -> list[grpo.Rollout]:
    """grpo.rollout with the run's own limits: the longest answer, what ends one, rows at a time."""
    return grpo.rollout(model, prompts, seeds, sampling=grpo.Sampling(**sampling), max_new_tokens=args.max_new_tokens,
                        eos_ids=eos_ids(model, tokenizer), max_rows=args.rows)


def draw_in_rounds(model, tokenizer, work: list, do, args: Args):
    """ranks.in_rounds, in which a rank without work joins the others' rollout: it gathers a sharded model."""
    for start in range(0, len(work), ranks.world()):
        yield from ranks.spread(work[start : start + ranks.world()], lambda own: [do(item) for item in own]
                                or roll_out(model, tokenizer, [], args, []))


def share_prompts(model) -> None:
    """grpo.enable_sharing, with a line for a model that cannot."""
    if reason := grpo.enable_sharing(model):
        print(f"dust: {type(model).__name__} reads the prompt again for each answer, which is slower: {reason}")


def score_rollouts(tokenizer, groups: list[Group], rollouts: list[grpo.Rollout], reward: str,
                   parser: str = "strict") -> dict[str, float]:
    """Sets the rewards of each rollout (paper 2.3); returns what to log about them.

    "constant" is what the answer 1, 2, ..., K would have earned, for comparison: a judge that always gives it has
    learned nothing. Malformed and truncated answers are counted apart, for the remedies differ.
    """
    for group, rollout in zip(groups, rollouts):
        texts = [decode(tokenizer, rollout.prompt, answer) for answer in rollout.answers]
        rollout.rewards = torch.tensor([rank_prompt.score(text, group.labels, reward, parser) for text in texts])
    orders = [list(range(1, len(group.candidates) + 1)) for group in groups]
    constant = [rank_prompt.REWARDS[reward](order, group.labels) for order, group in zip(orders, groups)]
    malformed = [reward == rank_prompt.FORMAT_PENALTY for r in rollouts for reward in r.rewards.tolist()]
    return describe_rollouts(rollouts) | {"malformed": mean(malformed), "constant": mean(constant)}


# ---------------------------------------------------------------------------------------------------- the evaluation


def draw(model, tokenizer, problems: list[Problem], args: Args, clock: Clock, *, name: str, out: Path) -> list[Group]:
    """Evaluation groups (section 3.1): R times N = 4 labelled candidates a problem, at the evaluation's temperature.

    Every model draws them from the same seeds.
    """
    journals = out / "journal"
    candidates = sample(
        model, tokenizer, problems, args, name=f"{name}: programs", count=EVAL_CANDIDATES * args.repeats,
        seed=seed_for(args.seed, "evaluate"), journal=Journal(journals / f"{name}-samples.jsonl"), clock=clock,
        temperature=args.eval_temperature, top_p=args.top_p, top_k=args.top_k,
    )
    label(problems, candidates, replace(args, labels="binary"), name=f"{name}: label",
          journal=Journal(journals / f"{name}-labels.jsonl"), clock=clock)
    by_problem = defaultdict(list)
    for candidate in candidates:
        by_problem[candidate.problem_id].append(candidate)
    none = [Candidate("", "", None)] * EVAL_CANDIDATES * args.repeats  # a problem without answers is not solved
    return [Group(p, own) for p in problems for own in parts(by_problem[p.id] or none, EVAL_CANDIDATES)]


def judge(model, tokenizer, groups: list[Group], args: Args, clock: Clock, *, name: str, out: Path) -> list[RankedGroup]:
    """Each evaluation group in the model's order (paper 2.1). Every model is shown the same shuffle of a group.

    Answers without a program are not shown and come last. A malformed ranking, or a prompt that does not fit, leaves
    the shown, shuffled order, which is what a system would have to fall back on: it costs what knowing nothing costs,
    and it is counted. name: of the stage and its journal, as in "base: rankings".
    """
    journal = Journal(out / "journal" / f"{name.replace(': ', '-')}.jsonl")
    shown = []
    for i, group in enumerate(groups):
        shuffled = group.shuffled(args.seed, "judge", i)
        shown.append(Group(group.problem, [c for c in shuffled.candidates if c.code is not None]))
    fits = [len(s.candidates) > 1 and fits_context(model, ranking_ids(tokenizer, s, args), args.max_new_tokens)
            for s in shown]
    if any(fits):
        show_first(out, "rankings", tokenizer, ranking_ids(tokenizer, shown[fits.index(True)], args))

    def judge_chunk(chunk: range) -> dict[str, str]:
        fitting = [i for i in chunk if fits[i]]
        prompts = [ranking_ids(tokenizer, shown[i], args) for i in fitting]
        rollouts = roll_out(model, tokenizer, prompts, args, [[seed_for(args.seed, "judge", i)] for i in fitting],
                            temperature=args.eval_temperature, top_p=args.top_p, top_k=args.top_k)
        return {str(i): decode(tokenizer, r.prompt, r.answers[0]) for i, r in zip(fitting, rollouts)}

    waiting = [chunk for chunk in parts(range(len(groups)), args.rows)
               if not all(str(i) in journal.done for i in chunk if fits[i])]
    found = len(groups) - sum(map(len, waiting))
    with clock.stage(name, len(groups), found) as progress:
        for units in draw_in_rounds(model, tokenizer, waiting, judge_chunk, args):
            journal.add(units)
            progress.update(len(units))
    judged = []
    for i, (group, seen) in enumerate(zip(groups, shown)):
        answer, k = journal.done.get(str(i), ""), len(seen.candidates)
        ranking = rank_prompt.READERS[args.parser](answer, k)
        ordered = [seen.candidates[index - 1] for index in ranking or range(1, k + 1)]
        ordered += [c for c in group.candidates if c.code is None]
        judged.append(RankedGroup(seen, ordered, answer, malformed=ranking is None and k > 1))
    return judged


def judge_all(model, tokenizer, groups: list[Group], args: Args, clock: Clock, *, name: str, out: Path):
    """(every evaluation group in the model's order, the finals likewise, if any): a row of the report."""
    judged = judge(model, tokenizer, groups, args, clock, name=f"{name}: rankings", out=out)
    finals = final_groups(judged, args.repeats)
    return judged, judge(model, tokenizer, finals, args, clock, name=f"{name}: finals", out=out) if finals else []


# --------------------------------------------------------------------------------------------------------------- main


def run(args: Args) -> None:
    """The method, stage by stage. Each stage keeps a journal below out/, so each goes on where it was stopped."""
    if args.workers == 0:
        torch.set_num_threads(1)
    for option in ("model", "init", "teacher", "rank_with"):
        if getattr(args, option):
            load_config(getattr(args, option), f"--{option.replace('_', '-')}")
    problems, held_out = problems_of(args)
    out, before = ranks.on_first(lambda: find_run(args))
    optimizer, checkpointing, needs = fit(args, before, problems + held_out)
    args = replace(args, optimizer=optimizer)
    loading = dict(optimizer=optimizer, shard=args.shard, device=args.device)
    model, tokenizer = load_model(args.model, **loading, effort="" if args.rank_with else args.reasoning_effort)
    share_prompts(model)
    if checkpointing:
        checkpoint_layers(model)
    open_run(out, before, args, problems, held_out)
    clock = plan(problems, held_out, args, out, needs)
    show_first(out, "programs", tokenizer, program_ids(tokenizer, (problems or held_out)[0], args))
    ranking = args.mode in ("rank", "sft") and not args.eval_only
    groups = base_groups(model, tokenizer, problems, args, clock, out) if ranking else []
    if not ranking and not args.eval_only:
        prompts = {p.id: program_ids(tokenizer, p, args) for p in problems}
        problems = without_long_ones(model, problems, prompts, args.max_new_tokens)
    drawn = draw(model, tokenizer, held_out, args, clock, name="base", out=out)
    if args.rank_with:
        del model  # two do not always fit
        model, tokenizer = load_model(args.rank_with, **loading, effort=args.reasoning_effort, option="--rank-with")
        share_prompts(model)
    rows, finals = {}, {}
    rows["base"], finals["base"] = judge_all(model, tokenizer, drawn, args, clock, name="base", out=out)
    if not args.eval_only:
        if args.init:
            del model  # two do not always fit
            model, own = load_model(args.init, **loading, option="--init")
            share_prompts(model)
            if own.get_vocab() != tokenizer.get_vocab():
                raise BadInput(f"--init {args.init} has other tokens than --model: training goes on within a family")
            if checkpointing:
                checkpoint_layers(model)
        train(model, tokenizer, problems, groups, args, clock, out)
        rows["trained_judge"], finals["trained_judge"] = judge_all(
            model, tokenizer, drawn, args, clock, name="judge", out=out
        )
        drawn = draw(model, tokenizer, held_out, args, clock, name="trained", out=out)
        rows["trained"], finals["trained"] = judge_all(model, tokenizer, drawn, args, clock, name="trained", out=out)
    if ranks.rank() == 0:
        tqdm.write("\n" + write_report(rows, finals, asdict(args), clock.seconds, out) + f"\nall of it: {out}")


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
        if not (text := what_to_put_right(error)):
            raise
        ranks.say_once(f"dust: {text}; then the same command with --resume goes on")
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
