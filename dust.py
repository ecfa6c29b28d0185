"""DuST: train a model to judge its own programs, and measure whether it then writes better ones.

"Primal Generation, Dual Judgment: Self-Training from Test-Time Scaling" (arXiv 2605.11299), in the paper's order:

    section 2.2   sample, label, make_groups        programs, their labels, mixed groups of K = 4
    section 2.3   score_rollouts                    the rewards of rankings (rank_prompt.py)
    section 2.4   train                             rollout -> reward -> advantage -> loss -> step (grpo.py)
    section 3.1   evaluation_groups, rank_candidates, METRICS        pass@1, NDCG, Best-of-4
    tables 2, 3   run, experience                   the rows of table 2; the five modes (table 3, figure 3)

Read `run` first, near the end of this file, then from `sample` on. Each stage takes what the one before made.

    python dust.py                      # the whole method on the shipped model, a few minutes on a laptop
    python dust.py --model Qwen3-4B     # a real model on real problems, on one GPU
"""
import copy
import os
import random
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from math import ceil, comb
from pathlib import Path

import rank_prompt
import sandbox
from plumbing.problems import BadInput, Problem, load_train_and_eval, read_programs, seed_for
from plumbing.settings import PURPOSES, arg, check_settings, prepare_terminal, read_options

CURVE_PROBLEMS = 100  # evaluation problems of each point of the curve (figure 4)

# ---------------------------------------------------------------------------------------------------------- settings


@dataclass
class Args:
    """Every setting of a run. The defaults suit the shipped model; the paper's value stands in brackets.

    Most differences between the paper and its authors' release are fields; tutorial.md lists all of them.
    A field that is True by default becomes --no-NAME, and its text says what that option does.
    """

    model: str = arg(str(Path(__file__).resolve().parent / "data" / "tiny"), section="what to run",
                     text="model folder, name on the Hub, or a short name such as Qwen3-4B")
    train: str = arg("micro-train", "training problems: a file or a known set [rstar-coder]")
    eval: str = arg("micro-eval", "evaluation problems, as --train, or several with commas between [livecodebench-v6]")
    out: str = arg("", "folder of the run; without it a new one in runs/ (with --resume: this model's newest there)")
    preset: str = arg("", "\n".join(f"{name}: {purpose}" for name, purpose in PURPOSES.items())
                      + "\nwithout it the one that fits", choices=list(PURPOSES))
    quick: bool = arg(False, "fewer problems, candidates and steps: with the shipped model about a minute")
    eval_only: bool = arg(False, "measure the model as it is, without training")
    resume: bool = arg(False, "go on with the run in --out where it was stopped")
    seed: int = arg(0, "seed of everything random")
    device: str = arg("", "cpu, cuda or mps; without it cuda if there is a GPU, else cpu")
    workers: int = arg(sandbox.usable_cores(), "sandbox processes", least=1)

    mode: str = arg("rank", "rank: rank the base model's candidates; rank-onpolicy: rank candidates drawn anew for\n"
                    "each step; generate: write programs that pass; iterative: --block steps of generate, then of\n"
                    "rank-onpolicy, in turn; sft: imitate rankings that order every pair right, without a reward",
                    choices=["rank", "rank-onpolicy", "generate", "iterative", "sft"],
                    section="what training learns from (paper, table 3 and figure 3)")
    block: int = arg(50, "steps in a block of --mode iterative", least=1)
    teacher: str = arg("", "model whose rankings --mode sft imitates; without it the model itself, before training")
    init: str = arg("", "start training from another run's model (its folder), or from another model folder")

    limit: int = arg(0, "number of training problems to use, from the first on; 0: all", least=0,
                     section="problems, candidates and groups (paper 2.2)")
    eval_limit: int = arg(0, "evaluation problems to use of each set, evenly spread over it; 0: all", least=0)
    candidates: int = arg(16, "M, programs sampled for each training problem [64]", least=1)
    group_size: int = arg(4, "K, candidates in a ranking group [4]", least=2)
    until_enough: bool = arg(False, "sample problems only until there are as many mixed groups as the steps use")
    timeout: float = arg(10.0, "longest time of a program for one test, in seconds", above=0)
    memory_mb: int = arg(1024, "most memory of a program, in megabytes (on Linux)", least=1)

    reward: str = arg("pairacc", "reward of a ranking", choices=list(rank_prompt.REWARDS),
                      section="judging (paper 2.3)")
    thinking: str = arg("both", "which answers have a thinking part (the chat template's enable_thinking)",
                        choices=["both", "programs", "rankings", "none"])
    reasoning_effort: str = arg("", "how long the model thinks, if its chat template has this setting (GPT-OSS)",
                                choices=["low", "medium", "high"])
    shuffle: bool = arg(True, "in training, show candidates in the order of sampling, not in a new order in each step")

    answers: int = arg(8, "G, answers sampled for each prompt [8]", least=2, section="GRPO (paper 2.4, table 4)")
    batch: int = arg(16, "prompts in a step [64]", least=1)
    mini_batch: int = arg(16, "prompts in an optimiser step [16]", least=1)
    ppo_epochs: int = arg(1, "passes over each batch [3]", least=1)
    epochs: int = arg(0, "--mode sft: passes over its rankings, in place of --steps; 0: as --steps says [3]", least=0)
    steps: int = arg(60, "training steps in all, in as many passes over the groups as they need [180]", least=0)
    lr: float = arg(1e-4, "learning rate of AdamW, constant [1e-6; tiny models and adapters need more]", above=0)
    weight_decay: float = arg(0.0, "weight decay of AdamW", least=0)
    warmup: int = arg(0, "first steps, in which the learning rate grows to --lr", least=0)
    loss: str = arg("sequence", "sequence: mean over an answer's tokens, then over answers; token: over all tokens",
                    choices=["sequence", "token"])
    clip: float = arg(0.2, "clip range of the ratio, in both directions [0.2]", least=0)
    clip_high: float = arg(0.0, "clip range of the ratio upwards; 0: the same as --clip", least=0)
    dual_clip: float = arg(0.0, "upper bound of the ratio for tokens with a negative advantage; 0: off", least=0)
    kl: float = arg(0.001, "weight of the KL term to the model that training starts from; 0: off [0.001]", least=0)
    temperature: float = arg(1.0, "temperature of candidates and training answers [1.0]", above=0)
    max_new_tokens: int = arg(192, "longest answer in tokens, or what a prompt leaves of the context [32768]", least=1)
    candidate_tokens: int = arg(0, "the same for the base's candidates; 0: --max-new-tokens [131072]", least=0)
    micro_tokens: int = arg(16384, "tokens in one training forward: changes memory and speed, not the result", least=1)
    optimizer: str = arg("", "weights in fp32, in bf16 with fp32 masters, or with kahan compensation; without it the\n"
                         "first that fits the memory, on a GPU never fp32", choices=["fp32", "masters", "kahan"])
    lora: int = arg(0, "train adapters of this rank instead of all weights (package peft); 0: all weights", least=0)
    shard: bool = arg(False, "spread weights, gradients and optimiser over torchrun's processes (FSDP2)")
    save_every: int = arg(1, "steps between checkpoints", least=1)
    keep_every: int = arg(0, "steps between models that are kept, in out/model-STEP; 0: only the last", least=0)
    rows: int = arg(0, "answers decoded at a time: changes memory and speed; 0: what fits a GPU, else 256", least=0)

    server: str = arg("", "address of a vLLM server, for example localhost:8000: it draws the base's answers, with\n"
                      "--lora also the trained model's; training stays here", section="answers from elsewhere")
    server_requests: int = arg(64, "requests to the server at a time", least=1)
    server_adapters: str = arg("", "the run's folder as the server's machine sees it; without it the same path as here")
    server_rollouts: bool = arg(False, "with --lora: the server draws the training answers too")
    is_clip: float = arg(2.0, "limit of the weights that correct for the server's other rounding in training", above=0)
    programs: str = arg("", "file of programs to use in place of sampling: another run's candidates.jsonl, or lines\n"
                       "with \"problem_id\" and \"code\"; right and wrong ones, K or more for a problem")

    eval_every: int = arg(10, "steps between points of the curve, each on 100 evaluation problems; 0: none [20]",
                          least=0, section="evaluation (paper 3.1)")
    repeats: int = arg(2, "R, evaluation groups drawn for each problem [10]", least=1)
    eval_tokens: int = arg(0, "the same as --max-new-tokens in the evaluation; 0: --max-new-tokens [65536]", least=0)
    best_of: int = arg(4, "N of Best-of-N, programs in an evaluation group [4]", least=2)
    eval_temperature: float = arg(0.6, "temperature of programs and rankings in the evaluation [0.6]", least=0)
    top_p: float = arg(0.95, "top-p of the evaluation [0.95]", above=0)
    top_k: int = arg(20, "top-k of the evaluation [20]", least=0)


PAPER = dict(  # section 3.1, appendix B, table 4; the paper's other values are the defaults of Args
    candidates=64, batch=64, ppo_epochs=3, steps=180, lr=1e-6, max_new_tokens=32768, repeats=10, save_every=10,
    until_enough=True, eval_every=20, candidate_tokens=131072, eval_tokens=65536,
)
PAPER_GPT_OSS = dict(lr=5e-7, batch=32)  # appendix B: with --preset paper and this model
PAPER_SFT = dict(lr=1e-5, epochs=3, ppo_epochs=1)  # figure 3: with --preset paper and --mode sft
RELEASE = PAPER | dict(  # where the authors' code differs from the paper
    clip_high=0.28, dual_clip=10.0, loss="token", kl=0.0, weight_decay=0.1, warmup=10, shuffle=False, best_of=6,
    eval_temperature=1.0, top_p=1.0, top_k=0,
)
QUICK_REAL = dict(  # a real model on one GPU of 24 GB: adapters, which need a larger learning rate
    limit=500, candidates=16, batch=16, steps=60, lr=2e-5, lora=16, max_new_tokens=8192, repeats=2, save_every=5,
    eval_every=20, until_enough=True,
)
PRESETS = {"laptop": {}, "paper": PAPER, "release": RELEASE, "quick": QUICK_REAL}
REAL_PROBLEMS = dict(train="rstar-coder", eval="livecodebench-v6")  # the paper's, for every model but the shipped one
QUICK = dict(limit=60, eval_limit=60, candidates=8, steps=10, eval_every=5, repeats=1)  # --quick, on top of any preset


def parse_args(argv: list[str] | None = None) -> Args:
    """Return the settings of a command line; options win over --quick, --quick over the preset. Raises BadInput."""
    given = read_options(Args, argv, __doc__.split("\n\n")[0])
    shipped = Path(given.get("model", Args.model)).resolve() == Path(Args.model).resolve()
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1  # processes of torchrun, each with a GPU
    preset = given.get("preset") or ("laptop" if shipped else "paper" if several else "quick")
    problems = {} if shipped or preset == "laptop" else REAL_PROBLEMS
    quick = QUICK if given.get("quick") else {}
    special = {}
    if preset == "paper" and "gpt-oss" in given.get("model", "").lower():
        special |= PAPER_GPT_OSS
    if preset == "paper" and given.get("mode") == "sft":
        special |= PAPER_SFT | ({"epochs": 0} if "steps" in given or quick else {})
    adapters = PRESETS[preset].get("lora", 0)
    if preset != "laptop" and bool(given.get("lora", adapters)) != bool(adapters):
        special |= dict(lr=PAPER["lr"] if adapters else QUICK_REAL["lr"])  # adapters need larger steps
    if "max_new_tokens" in given:  # it holds for all answers, also where the preset has three limits
        special |= dict(candidate_tokens=0, eval_tokens=0)
    args = Args(**problems | PRESETS[preset] | special | quick | given | {"preset": preset})
    check_settings(args)
    return args


if __name__ == "__main__":  # here, because --help and a wrong option need not wait for torch, which is imported below
    prepare_terminal()
    try:
        parse_args()
    except BadInput as error:
        print(f"dust: {error}", file=sys.stderr)
        raise SystemExit(2) from None

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # before torch; else memory fragments
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import grpo  # noqa: E402
from grpo import Rollout, Sampling  # noqa: E402
from plumbing import fast_decode, models, ranks, report, runs, served, steps  # noqa: E402
from plumbing.engine import Server  # noqa: E402

# ------------------------------------------------------------------------------------------------ what flows through


@dataclass
class Candidate:
    """One sampled answer to a problem."""

    problem_id: str
    answer: str
    code: str | None  # the program in the answer; None if there is none
    correct: bool = False  # y (paper 2.2): the program passes every test; set by label()
    failure: dict | None = None  # sandbox.Verdict.failure, for a reader; set by label()


@dataclass
class Group:
    """K candidates for one problem, in the order in which the ranking prompt shows them."""

    problem: Problem
    candidates: list[Candidate]

    @property
    def labels(self) -> list[int]:
        """y of each candidate, 1 or 0, in the order shown."""
        return [int(candidate.correct) for candidate in self.candidates]

    def shuffled(self, *seed) -> "Group":
        """Return the group in a random order, so that a judge cannot learn positions (trap 3 in tutorial.md)."""
        return Group(self.problem, random.Random(seed_for(*seed)).sample(self.candidates, len(self.candidates)))


@dataclass
class RankedGroup:
    """An evaluation group in the order that a judge gave it."""

    group: Group  # as the prompt showed it: shuffled, without the answers that hold no program
    ordered: list[Candidate]  # best first; answers without a program come last
    answer: str  # the judge's answer, as text
    malformed: bool  # the answer holds no valid ranking, so the order is the shuffled one

    @property
    def ranked(self) -> list[int]:
        """y of each candidate, 1 or 0, in the judge's order."""
        return [int(candidate.correct) for candidate in self.ordered]


# ------------------------------------------------------------------------------------------------- model and prompts


def load(name: str, args: Args, option: str = "--model"):
    """Return (model, tokenizer) of a name or folder, ready for rollouts and updates. option: names it in errors."""
    model, tokenizer = models.load_model(name, optimizer=args.optimizer, shard=args.shard, device=args.device,
                                         effort=args.reasoning_effort if option == "--model" else "", option=option,
                                         weights=not (args.server and args.eval_only))
    if not end_ids(model, tokenizer):
        raise BadInput(f"{option} {name}: no end-of-text token; set eos_token_id in its generation_config.json")
    if model.device.type != "meta" and (reason := grpo.enable_sharing(model)):
        tqdm.write(f"{option} {name} reads a prompt again for each of its answers, which is slower: {reason}")
    return model, tokenizer


def end_ids(model, tokenizer) -> list[int]:
    """Return the ids that end an answer: the chat template's end of a turn first, the tokenizer's, the config's."""
    stops = model.generation_config.eos_token_id
    ends = [models.turn_end(tokenizer), tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])]
    return [end for end in dict.fromkeys(ends) if end is not None]


def program_ids(tokenizer, problem: Problem, args: Args) -> torch.Tensor:
    """The prompt that asks for a program, as token ids [L]."""
    prompt = rank_prompt.generation_prompt(problem.question, problem.starter_code, problem.tests)
    return models.encode(tokenizer, prompt, args.thinking in ("both", "programs"), args.reasoning_effort)


def ranking_ids(tokenizer, group: Group, args: Args) -> torch.Tensor:
    """The prompt that asks for a ranking (paper 2.3), as token ids [L]."""
    codes, brief = [c.code for c in group.candidates], not models.can_think(tokenizer)
    prompt = rank_prompt.ranking_prompt(group.problem.question, codes, brief)
    return models.encode(tokenizer, prompt, args.thinking in ("both", "rankings"), args.reasoning_effort)


def longest_answer(model, prompt: torch.Tensor, limit: int) -> int:
    """Return how many tokens an answer to a prompt [L] may have: limit, or what is left of the model's context.

    Returns 0 if the prompt is too long: neither limit nor a quarter of the context is left.
    """
    context = served.context_of(model)
    left = context - len(prompt) if context else limit
    return min(limit, left) if left >= min(limit, (context or 0) // 4) else 0


def draw(model, tokenizer, asked: list[tuple], limit: int, sampling: Sampling, rows: int) -> list[Rollout]:
    """Draw an answer for each seed of the pairs `asked`, (prompt [L], seeds). Returns a Rollout for each pair.

    All answers of a run are drawn here. limit: the longest answer, in tokens (see longest_answer).
    """
    prompts, seeds = [prompt for prompt, _ in asked], [its_seeds for _, its_seeds in asked]
    if isinstance(model, Server):
        drawn = model.draw([prompt.tolist() for prompt in prompts], seeds, sampling, limit)
        return [Rollout(prompt, [torch.tensor(a.ids) for a in answers], [torch.tensor(a.logps) for a in answers],
                        [a.ended for a in answers]) for prompt, answers in zip(prompts, drawn)]
    limits = [max(1, longest_answer(model, prompt, limit)) for prompt in prompts]
    return grpo.rollout(model, prompts, seeds, sampling=sampling, max_new_tokens=limits,
                        eos_ids=end_ids(model, tokenizer), max_rows=rows)


def draw_texts(model, tokenizer, asked: dict, limit: int, args: Args, sampling: Sampling, file: Path) -> dict:
    """Draw the answers of a stage. asked: key -> (prompt [L], seeds). file: keeps the answers, for --resume.

    Returns key -> [[text, whether the answer ended by itself], ...], an answer for each seed.
    """
    rows = fast_decode.rows_at_a_time(model, [prompt for prompt, _ in asked.values()], limit, args)
    most = max((len(seeds) for _, seeds in asked.values()), default=1)

    def answer(chunk: list[tuple]) -> list[list]:
        rollouts = draw(model, tokenizer, chunk, limit, sampling, rows)
        return [[[text, ended] for text, ended in zip(texts_of(tokenizer, r), r.finished)] for r in rollouts]

    return runs.resumable(file, asked, answer, max(1, rows // most), served.requests_of(model))


# -------------------------------------------------------------------------------- section 2.2: sample, label, group


def sample(model, tokenizer, problems: list[Problem], args: Args, file: Path, evaluation=False) -> list[Candidate]:
    """Draw M answers to each problem and read the program in each (paper 2.2); with evaluation, R times N (paper 3.1).

    file: keeps the answers, for --resume. Each answer has its own seed, so it does not depend on the batch.
    """
    count, seed, sampling = args.candidates, seed_for(args.seed, "sample"), Sampling(args.temperature)
    limit = (args.eval_tokens if evaluation else args.candidate_tokens) or args.max_new_tokens
    if evaluation:
        count, seed = args.best_of * args.repeats, seed_for(args.seed, "evaluate")
        sampling = Sampling(args.eval_temperature, args.top_p, args.top_k)
    copies = count if sampling.temperature == 0 else 1  # at temperature 0 all answers to a problem are the same
    _, prompts = fitting_problems(model, tokenizer, problems, limit, args)
    asked = {key: (prompts[key], [seed_for(seed, key, i) for i in range(count // copies)]) for key in prompts}
    answers = draw_texts(model, tokenizer, asked, limit, args, sampling, file)
    candidates = [Candidate(problem_id, text, rank_prompt.extract_code(text))
                  for problem_id, drawn in answers.items() for text, _ in drawn * copies]
    without = sum(candidate.code is None for candidate in candidates)
    cut = sum(not ended for drawn in answers.values() for _, ended in drawn * copies)
    runs.say(file, f"  {len(candidates)} answers, {without} without a program, {cut} cut off")
    runs.warn_if_cut(file, cut / max(len(candidates), 1))
    return candidates


def fitting_problems(model, tokenizer, problems: list[Problem], limit: int, args: Args):
    """Return (the problems whose prompt fits the context, {id: its prompt [L]}). Raises BadInput if no prompt fits."""
    prompts = {problem.id: program_ids(tokenizer, problem, args) for problem in problems}
    kept = [problem for problem in problems if longest_answer(model, prompts[problem.id], limit)]
    if not kept:
        raise BadInput(f"no prompt leaves room in the context for an answer of {limit} tokens: lower --max-new-tokens")
    if len(kept) < len(problems):
        tqdm.write(f"  {len(problems) - len(kept)} of {len(problems)} problems get no answer: behind their prompts too "
                   "little is left of the model's context")
    return kept, {problem.id: prompts[problem.id] for problem in kept}


def texts_of(tokenizer, rollout: Rollout) -> list[str]:
    """Return the G answers as text, in the form that rank_prompt.py reads, without the token that ended each."""
    bare = [answer[: len(answer) - ended] for answer, ended in zip(rollout.answers, rollout.finished)]
    texts = [models.answer_text(tokenizer, rollout.prompt, answer) for answer in bare]
    return [text.encode("utf-8", "replace").decode() for text in texts]  # no file or prompt can hold half a character


def label(problems: list[Problem], candidates: list[Candidate], args: Args, file: Path | None = None,
          known: dict | None = None) -> None:
    """Run every program and set `correct` (paper 2.2): y = 1 only if every test passes.

    file: keeps the labels, for --resume. known: labels of these problems from earlier stages. The same program for the
    same problem runs once. An answer without a program is wrong. Raises SandboxError if the sandbox itself fails.
    """
    tests = {problem.id: problem.tests for problem in problems}
    programs = dict.fromkeys((c.problem_id, c.code) for c in candidates if c.code is not None)
    keys, known = [f"{problem_id}/{seed_for(code)}/{len(code)}" for problem_id, code in programs], known or {}
    work = {key: program for key, program in zip(keys, programs) if key not in known}
    workers = max(1, args.workers // ranks.local_world())  # the ranks on one machine share its cores
    with sandbox.Pool(workers=workers, timeout=args.timeout, memory_mb=args.memory_mb) as pool:

        def run_programs(chunk: list[tuple[str, str]]) -> list:  # 1, or the first failed test
            return [failure or 1 for failure in pool.failures([(code, tests[id]) for id, code in chunk])]

        # the same size on every rank; a kill loses at most one chunk of labels
        size = 32 * min(ranks.gather(workers)) if file else max(len(work), 1)
        labels = known | runs.resumable(file, work, run_programs, size)
    labels = {program: labels[key] for key, program in zip(keys, programs)}  # 1, or the first failed test
    for candidate in candidates:
        verdict = labels.get((candidate.problem_id, candidate.code))
        candidate.correct, candidate.failure = verdict == 1, verdict if isinstance(verdict, dict) else None
    if file:
        share = sum(candidate.correct for candidate in candidates) / max(len(candidates), 1)
        runs.say(file, f"  {len(programs)} different programs; {share:.1%} of the answers are correct")
        runs.say_missing_modules(file, candidates)


def make_groups(problems: list[Problem], candidates: list[Candidate], k: int) -> list[Group]:
    """Cut each problem's candidates into groups of k and keep the mixed ones, 0 < sum(y) < k (paper 2.2).

    Answers without a program are dropped first. The last candidates of a problem are dropped if fewer than k are left.
    """
    by_problem = defaultdict(list)
    for candidate in candidates:
        if candidate.code is not None:
            by_problem[candidate.problem_id].append(candidate)
    groups = []
    for problem in problems:
        drawn = by_problem[problem.id]
        groups += [Group(problem, drawn[i : i + k]) for i in range(0, len(drawn) - k + 1, k)]
    return [group for group in groups if is_mixed(group.labels)]


def training_groups(model, tokenizer, problems: list[Problem], args: Args, out: Path) -> list[Group]:
    """Sample, label and group (paper 2.2). Returns the mixed groups that fit the context; BadInput if there is none.

    With --until-enough it begins with as many problems as would do if all of their groups were mixed, and takes more
    until the steps have a group for each place of their batches.
    """
    enough, count = args.steps * args.batch, len(problems)
    if args.until_enough:
        count = min(count, max(1, ceil(enough / (args.candidates // args.group_size))))
    while True:
        if args.programs:
            candidates = [Candidate(problem_id, answer, rank_prompt.extract_code(answer) if answer else code)
                          for problem_id, answer, code in read_programs(args.programs, problems)]
            count = len(problems)
        else:
            candidates = sample(model, tokenizer, problems[:count], args, out / "samples.jsonl")
        label(problems, candidates, args, out / "labels.jsonl")
        mixed = make_groups(problems, candidates, args.group_size)
        groups = fitting_groups(model, tokenizer, mixed, args)
        if len(groups) >= enough or count == len(problems):
            break
        missing = ceil(count * enough / max(len(groups), 1)) - count  # if the others have as many mixed groups
        count = min(len(problems), count + max(1, min(missing, count)))
    ranks.on_first(lambda: runs.keep_lines(out / "candidates.jsonl", 0))
    runs.append_lines(out / "candidates.jsonl", [asdict(candidate) for candidate in candidates])
    runs.check_groups(candidates, mixed, groups, args.group_size)
    return groups


def fitting_groups(model, tokenizer, groups: list[Group], args: Args) -> list[Group]:
    """Return the groups whose ranking prompt leaves enough of the context for an answer in training."""
    return [group for group in groups
            if longest_answer(model, ranking_ids(tokenizer, group, args), args.max_new_tokens)]


# --------------------------------------------------------------------------------- sections 2.3 and 2.4: the training


def train(model, tokenizer, problems: list[Problem], groups: list[Group], base: list[Group], args: Args, out: Path,
          server=None) -> int:
    """Train the model to rank (paper 2.4), or as --mode says, and save it in out/model. Returns the number of steps.

    A step's random numbers depend only on --seed and its number, so a resumed run makes the same steps. groups: for
    the modes rank and sft; the other modes sample new candidates for problems. base: the base's evaluation groups, on
    which --eval-every measures. server: draws the answers of --server-rollouts, and the points of the curve.
    """
    supervised = args.mode == "sft"
    items = groups if args.mode == "rank" else problems
    if supervised:  # drawn before any training, because the model itself may be the teacher
        items = perfect_rankings(model, tokenizer, groups, args, out / "teacher-rankings.jsonl")
        args = replace(args, steps=ceil(args.epochs * len(items) / args.batch) or args.steps)
    if args.lora:
        models.add_lora(model, args.lora, seed_for(args.seed, "lora"))
    reference = frozen_copy(model, args) if args.kl and not supervised else None
    optimizer = models.make_optimizer(model, args.optimizer, args.lr, args.weight_decay)
    first = models.load_checkpoint(out / "checkpoint.pt", model, optimizer)
    ranks.on_first(lambda: [runs.keep_lines(out / name, first) for name in ("metrics.jsonl", "steps.jsonl")])
    with runs.StageBar("train", args.steps, first) as bar:
        for step in range(first, args.steps):
            if step and args.eval_every and step % args.eval_every == 0:
                measure(served.trained(server, model, args, out), tokenizer, base, step, args, out)
            if step and args.keep_every and step % args.keep_every == 0:
                models.save_model(out / f"model-{step}", model, tokenizer)
            began, generator = time.time(), torch.Generator().manual_seed(seed_for(args.seed, "train", step))
            batch = batch_at(items, step, args)
            policy = served.with_adapter(server, model, args, out) if args.server_rollouts else model
            rollouts, metrics = experience(policy, tokenizer, batch, step, args, generator)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1.0, (step + 1) / max(args.warmup, 1))
            metrics |= grpo.update(model, optimizer, rollouts, args, reference=reference, generator=generator)
            steps.keep_step(out / "steps.jsonl", step, rollouts, model, tokenizer, args, grpo.logprobs,
                            grpo.group_advantages)
            metrics |= {"step": step + 1, "seconds": time.time() - began}
            trained = sum(len(answer) for rollout in rollouts for answer in rollout.answers)
            metrics["tokens_per_second"] = trained / metrics["seconds"]  # the candidates of rank-onpolicy not counted
            runs.append_lines(out / "metrics.jsonl", [metrics])
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                models.save_checkpoint(out / "checkpoint.pt", model, optimizer, step + 1)
            bar.show(metrics)
    models.save_model(out / "model", model, tokenizer)
    if args.lora:
        models.save_adapter(out / "adapter", model)
    return args.steps


def experience(model, tokenizer, batch: list, step: int, args: Args, generator) -> tuple[list[Rollout], dict]:
    """Return the scored rollouts that one step learns from, and metrics to log. The modes (table 3, figure 3):

    rank           rankings of groups built once from the base's candidates (paper 2.2); batch: groups
    rank-onpolicy  rankings of candidates that the current policy has just drawn; batch: problems
    generate       programs, rewarded if they pass their tests: the reward that DuST itself never uses; batch: problems
    iterative      --block steps of generate, then as many of rank-onpolicy, and so on; batch: problems
    sft            rankings to imitate, which perfect_rankings has drawn; batch: rollouts
    """
    mode = args.mode
    if mode == "iterative":
        mode = "generate" if step // args.block % 2 == 0 else "rank-onpolicy"
    if mode == "generate":
        rollouts, candidates = draw_programs(model, tokenizer, batch, args.answers, args, generator)
        for rollout, drawn in zip(rollouts, candidates):
            rollout.rewards = torch.tensor([float(candidate.correct) for candidate in drawn])
        without_program = [candidate.code is None for drawn in candidates for candidate in drawn]
        return rollouts, runs.describe(rollouts) | {"malformed": runs.mean(without_program)}
    if mode == "sft":
        return batch, runs.describe(batch) | {"malformed": 0.0}
    if mode == "rank-onpolicy":
        batch = fresh_groups(model, tokenizer, batch, args, generator)
    if args.shuffle:
        batch = [group.shuffled(args.seed, "train", step, i) for i, group in enumerate(batch)]
    prompts = [ranking_ids(tokenizer, group, args) for group in batch]
    rollouts = draw_for_training(model, tokenizer, prompts, args.answers, args, generator)
    return rollouts, score_rollouts(tokenizer, batch, rollouts, args.reward)


def score_rollouts(tokenizer, groups: list[Group], rollouts: list[Rollout], reward: str) -> dict[str, float]:
    """Set the rewards [G] of each rollout (paper 2.3). Return the metrics to log: means over answers or groups.

    "constant" is the reward of the answer 1, 2, ..., K: a judge that has learned nothing can earn as much.
    Malformed and truncated answers are counted separately, because the remedies differ.
    """
    malformed, constant = [], []
    for group, rollout in zip(groups, rollouts):
        rewards = [rank_prompt.score(text, group.labels, reward) for text in texts_of(tokenizer, rollout)]
        rollout.rewards = torch.tensor(rewards)
        malformed += [r == rank_prompt.FORMAT_PENALTY for r in rewards]
        constant.append(rank_prompt.REWARDS[reward](list(range(1, len(group.candidates) + 1)), group.labels))
    return runs.describe(rollouts) | {"malformed": runs.mean(malformed), "constant": runs.mean(constant)}


def batch_at(items: list, step: int, args: Args) -> list:
    """Return the items of one step. Each pass over all of them has a new order, cut into batches."""
    first, last = step * args.batch, (step + 1) * args.batch
    passes = range(first // len(items), (last - 1) // len(items) + 1)
    orders = [random.Random(seed_for(args.seed, "order", number)).sample(items, len(items)) for number in passes]
    start = first - passes.start * len(items)
    return sum(orders, [])[start : start + args.batch]


def draw_for_training(model, tokenizer, prompts: list, count: int, args: Args, generator) -> list[Rollout]:
    """Draw `count` answers to each prompt [L] at --temperature, without top-p and top-k (paper 2.4)."""
    seeds = torch.randint(2**62, (len(prompts), count), generator=generator).tolist()
    rows = fast_decode.rows_at_a_time(model, prompts, args.max_new_tokens, args)

    def answer(chunk: list[tuple]) -> list[Rollout]:
        return draw(model, tokenizer, chunk, args.max_new_tokens, Sampling(args.temperature), rows)

    work = list(zip(prompts, seeds))
    if served.requests_of(model):  # one process asks for all, so that --server-requests bounds them
        return ranks.on_first(lambda: answer(work))
    return ranks.spread(work, answer)


def draw_programs(model, tokenizer, problems: list[Problem], count: int, args: Args, generator):
    """Draw and label `count` candidates for each problem. Returns for each problem its Rollout and its list of them."""
    prompts = [program_ids(tokenizer, problem, args) for problem in problems]
    rollouts = draw_for_training(model, tokenizer, prompts, count, args, generator)
    candidates = [[Candidate(problem.id, text, rank_prompt.extract_code(text)) for text in texts_of(tokenizer, rollout)]
                  for problem, rollout in zip(problems, rollouts)]
    label(problems, sum(candidates, []), args)
    return rollouts, candidates


def fresh_groups(model, tokenizer, problems: list[Problem], args: Args, generator) -> list[Group]:
    """Return at most --batch mixed groups of candidates that the model draws now: two groups for each problem."""
    _, candidates = draw_programs(model, tokenizer, problems, 2 * args.group_size, args, generator)
    of_each = [make_groups([problem], drawn, args.group_size) for problem, drawn in zip(problems, candidates)]
    return fitting_groups(model, tokenizer, sum(of_each, []), args)[: args.batch]


def frozen_copy(model, args: Args):
    """Return a copy of the model, frozen, for the KL term (paper 2.4). With LoRA: the model itself, adapters off."""
    if args.lora:
        return model
    if args.shard:  # a sharded model cannot be copied, so it is loaded again
        return load(args.init or args.model, args)[0].requires_grad_(False)
    return copy.deepcopy(model).requires_grad_(False)


def perfect_rankings(model, tokenizer, groups: list[Group], args: Args, file: Path) -> list[Rollout]:
    """Return the fixed set that --mode sft imitates (figure 3): the teacher's rankings with every pair in order.

    The teacher gives G answers to each group, once. A --teacher is asked through its chat template; its answers are
    then written in the student's tokens. Groups without a perfect answer are left out. file: keeps the answers.
    """
    teacher, its_tokenizer = load(args.teacher, args, "--teacher") if args.teacher else (model, tokenizer)
    groups = fitting_groups(teacher, its_tokenizer, groups, args)  # the student's context can be longer
    if args.shuffle:
        groups = [group.shuffled(args.seed, "sft", i) for i, group in enumerate(groups)]
    asked = [ranking_ids(its_tokenizer, group, args) for group in groups]
    prompts = [ranking_ids(tokenizer, group, args) for group in groups]
    end = end_ids(model, tokenizer)[0]

    def perfect(i: int, drawn: Rollout) -> list[list[int]]:  # the student's token ids of the answers without a fault
        texts, answers = texts_of(its_tokenizer, drawn), drawn.answers
        if its_tokenizer is not tokenizer:
            answers = models.encode_answers(tokenizer, prompts[i], texts, end)
        right = [rank_prompt.score(text, groups[i].labels) == 1.0 for text in texts]
        return [ids.tolist() for ids, *good in zip(answers, right, drawn.finished) if all(good)]

    def answer(chunk: list[int]) -> list[list[list[int]]]:
        work = [(asked[i], [seed_for(args.seed, "sft", i, j) for j in range(args.answers)]) for i in chunk]
        drawn = draw(teacher, its_tokenizer, work, args.max_new_tokens, Sampling(args.temperature), rows)
        return list(map(perfect, chunk, drawn))

    rows = fast_decode.rows_at_a_time(teacher, asked, args.max_new_tokens, args)
    drawn = runs.resumable(file, {str(i): i for i in range(len(groups))}, answer, max(1, rows // args.answers))
    right = [(prompt, list(map(torch.tensor, answers))) for prompt, answers in zip(prompts, drawn.values()) if answers]
    rollouts = [Rollout(prompt, answers, [torch.zeros(len(ids)) for ids in answers],  # --mode sft reads no log-probs
                        [True] * len(answers), torch.ones(len(answers))) for prompt, answers in right]
    count = sum(len(rollout.answers) for rollout in rollouts)
    tqdm.write(f"  {count} rankings of the teacher without a fault, for {len(rollouts)} of {len(groups)} groups")
    if not rollouts:
        raise BadInput("the teacher ranks no group without a fault: give another --teacher, more --answers, or a "
                       "longer --max-new-tokens")
    return rollouts


# ----------------------------------------------------------------------------------------- section 3.1: the evaluation


def evaluation_groups(model, tokenizer, problems: list[Problem], args: Args, stem: Path) -> list[Group]:
    """Draw R groups of N = 4 labelled candidates for each problem, at the evaluation's temperature (paper 3.1).

    Every model uses the same seeds. stem: path of the files that keep answers and labels, without "-samples.jsonl".
    """
    candidates = sample(model, tokenizer, problems, args, Path(f"{stem}-samples.jsonl"), evaluation=True)
    file = Path(f"{stem}-labels.jsonl")
    label(problems, candidates, args, file, ranks.on_first(lambda: runs.known_labels(file)))
    by_problem = defaultdict(list)
    for candidate in candidates:
        by_problem[candidate.problem_id].append(candidate)
    unsolved = [Candidate("", "", None)] * args.best_of * args.repeats  # a problem without answers counts as not solved
    return [Group(problem, (by_problem[problem.id] or unsolved)[i : i + args.best_of])
            for problem in problems for i in range(0, args.best_of * args.repeats, args.best_of)]


def rank_candidates(model, tokenizer, groups: list[Group], args: Args, file: Path,
                    places: list[int] | None = None) -> list[RankedGroup]:
    """Ask the model to order each evaluation group (paper 2.1). file: keeps the model's answers, for --resume.

    places: the number of each group among all evaluation groups, which decides its seeds; None: 0, 1, 2 and so on.
    Every model is shown the same shuffle of a group. Answers without a program are not shown and come last. If the
    ranking is malformed or the prompt does not fit the context, the group keeps the shuffled, that is, a random order;
    both count as malformed.
    """
    shown, prompts = [], {}
    places = list(range(len(groups))) if places is None else places
    limit = args.eval_tokens or args.max_new_tokens
    for place, group in zip(places, groups):
        shuffled = group.shuffled(args.seed, "judge", place)
        shown.append(Group(group.problem, [c for c in shuffled.candidates if c.code is not None]))
        prompt = ranking_ids(tokenizer, shown[-1], args)
        if len(shown[-1].candidates) > 1 and longest_answer(model, prompt, limit):
            prompts[str(place)] = prompt
    if prompts and not runs.of_curve(file):
        models.show_first(file.parent, "rankings", tokenizer, next(iter(prompts.values())))

    sampling = Sampling(args.eval_temperature, args.top_p, args.top_k)
    asked = {key: (prompt, [seed_for(args.seed, "judge", key)]) for key, prompt in prompts.items()}
    answers = draw_texts(model, tokenizer, asked, limit, args, sampling, file)
    runs.warn_if_cut(file, runs.mean([not ended for drawn in answers.values() for _, ended in drawn]))
    ranked = []
    for place, group, seen in zip(places, groups, shown):
        ((words, _),), k = answers.get(str(place), [["", True]]), len(seen.candidates)
        ranking = rank_prompt.parse_ranking(words, k)
        ordered = [seen.candidates[index - 1] for index in ranking or range(1, k + 1)]
        ordered += [c for c in group.candidates if c.code is None]
        ranked.append(RankedGroup(seen, ordered, words, malformed=ranking is None and k > 1))
    return ranked


def final_groups(ranked: list[RankedGroup], repeats: int) -> list[Group]:
    """Return the finals of Best-of-2N: the better halves of two groups of a problem form one group, to rank once more.

    So a ranking never has more than N candidates. ranked: R groups a problem; if R is odd, the last one is left out.
    """
    finals = []
    for start in range(0, len(ranked), repeats):
        for first in range(start, start + repeats - 1, 2):
            best = [c for one in ranked[first : first + 2] for c in one.ordered[: len(one.ordered) // 2]]
            finals.append(Group(ranked[first].group.problem, best))
    return finals


def rank_all(model, tokenizer, groups: list[Group], args: Args, stem: Path) -> tuple[list, list]:
    """Rank every evaluation group, then the finals. Returns both lists of RankedGroup: one row of the report."""
    ranked = rank_candidates(model, tokenizer, groups, args, Path(f"{stem}-rankings.jsonl"))
    finals = final_groups(ranked, args.repeats)
    return ranked, rank_candidates(model, tokenizer, finals, args, Path(f"{stem}-finals.jsonl")) if finals else []


def curve_places(base: list[Group], args: Args) -> list[int]:
    """Return the places in base of the curve's groups: the first group of each of 100 problems, evenly spread."""
    problems = len(base) // args.repeats
    count = min(CURVE_PROBLEMS, problems)
    return [i * problems // count * args.repeats for i in range(count)]


def measure(model, tokenizer, base: list[Group], step: int, args: Args, out: Path) -> None:
    """Measure a point of the curve (figure 4) between two steps: the model's programs, and its order of the base's.

    Every point has the seeds of the evaluation. The random numbers of training stay as they are.
    """
    file, places = out / report.CURVE / f"{step}.jsonl", curve_places(base, args)
    if ranks.on_first(file.exists):  # measured before the run was stopped
        return
    ranks.on_first(lambda: file.parent.mkdir(exist_ok=True))
    of_base, one_group = [base[place] for place in places], replace(args, repeats=1)
    problems = [group.problem for group in of_base]
    groups = evaluation_groups(model, tokenizer, problems, one_group, file.with_suffix(""))
    own = rank_mixed(model, tokenizer, groups, args, file.with_name(f"{step}-rankings.jsonl"), places)
    judge = rank_mixed(model, tokenizer, of_base, args, file.with_name(f"{step}-judge.jsonl"), places)
    tqdm.write(ranks.on_first(lambda: report.keep_point(file, own, judge, metrics_of(args.best_of))))


def rank_mixed(model, tokenizer, groups: list[Group], args: Args, file: Path, places: list[int]) -> list[RankedGroup]:
    """Rank the mixed groups, as rank_candidates does. The order of the others changes no figure of a point."""
    def as_drawn(group: Group) -> RankedGroup:
        shown = [c for c in group.candidates if c.code is not None]
        rest = [c for c in group.candidates if c.code is None]
        return RankedGroup(Group(group.problem, shown), shown + rest, "", malformed=False)

    mixed = [(place, group) for place, group in zip(places, groups) if is_mixed(group.labels)]
    asked, of_mixed = [group for _, group in mixed], [place for place, _ in mixed]
    ranked = dict(zip(of_mixed, rank_candidates(model, tokenizer, asked, args, file, of_mixed)))
    return [ranked.get(place) or as_drawn(group) for place, group in zip(places, groups)]


def best_of(n: int, ranked: list[int]) -> float:
    """Return Best-of-n from one ranking of K >= n candidates: the mean over all subsets of n of them.

    ranked: K labels, best-ranked first. The first of a subset in this order is submitted. The candidate at
    position i (from 0) is the first of C(K - 1 - i, n - 1) of the C(K, n) subsets.
    """
    k = len(ranked)
    return sum(label * comb(k - 1 - i, n - 1) for i, label in enumerate(ranked)) / comb(k, n)


def as_ranked(measure, ranked: list[int]) -> float:
    """Apply a measure of rank_prompt.py to labels that already stand in the judge's order."""
    return measure(list(range(1, len(ranked) + 1)), ranked)


def is_mixed(labels: list[int]) -> bool:
    """Return whether there are correct and wrong programs. Only then can an order be right or wrong."""
    return 0 < sum(labels) < len(labels)


def metrics_of(n: int) -> dict:
    """Return functions of the labels of a group of n, best-ranked first. A group with the result None does not count.

    "ndcg_random" also reads the second: how many of the answers hold a program. The others come last in every order.
    """
    return {
        "pass1": lambda ranked, *_: sum(ranked) / len(ranked),
        "ndcg_all": lambda ranked, *_: as_ranked(rank_prompt.ndcg, ranked),  # without a correct one 0, as in the paper
        "ndcg_mixed": lambda ranked, *_: as_ranked(rank_prompt.ndcg, ranked) if is_mixed(ranked) else None,
        "ndcg_random": lambda ranked, shown: rank_prompt.random_ndcg(ranked[:shown]) if is_mixed(ranked) else None,
        "pair_accuracy": lambda ranked, *_: as_ranked(rank_prompt.pair_accuracy, ranked) if is_mixed(ranked) else None,
        "best_of_2": lambda ranked, *_: best_of(2, ranked),
        f"best_of_{n}": lambda ranked, *_: float(ranked[0]),
        "oracle": lambda ranked, *_: float(any(ranked)),
    }


METRICS = metrics_of(4)  # of the paper's evaluation, and of every run with the default --best-of

# ------------------------------------------------------------------------------------------------------------ the run


def run(args: Args) -> None:
    """Run the method, stage by stage. Each stage writes its results to out/, so --resume goes on where it stopped."""
    print(f"--preset {args.preset}: {PURPOSES[args.preset]}", flush=True)
    args = replace(args, device=runs.choose_device(args.device))
    out, before = ranks.on_first(lambda: runs.find_run(args))
    optimizer, memory = models.choose_optimizer(args, args.optimizer or before.get("optimizer", ""))
    args = replace(args, optimizer=optimizer)
    problems, held_out = load_train_and_eval(args)
    model, tokenizer = load(args.model, args)
    first_prompt = program_ids(tokenizer, (problems or held_out)[0], args)
    source = model  # of the answers before training
    if args.server:
        source = served.connect(model, tokenizer, first_prompt, args, end_ids(model, tokenizer), grpo.answer_logprobs)
    models.check_others(tokenizer, args)
    runs.open_run(out, before, args, problems, held_out)
    print(f"DuST -> {out}")
    runs.show_plan(args, problems, held_out, CURVE_PROBLEMS, memory)
    models.show_first(out, "programs", tokenizer, first_prompt)
    served.try_adapter(source, model, args, out)

    groups = []
    if args.mode in ("rank", "sft") and not args.eval_only:  # the other modes draw their candidates step by step
        groups = training_groups(source, tokenizer, problems, args, out)
    elif not args.eval_only:
        problems, _ = fitting_problems(source, tokenizer, problems, args.max_new_tokens, args)

    base = evaluation_groups(source, tokenizer, held_out, args, out / "base")
    rows = {"base": rank_all(source, tokenizer, base, args, out / "base")}
    if not args.eval_only:
        if args.init:
            source = model = None  # two models may not fit the memory
            model, _ = load(args.init, args, "--init")
        last_step = train(model, tokenizer, problems, groups, base, args, out, source)
        trained = served.trained(source, model, args, out)
        rows["trained_judge"] = rank_all(trained, tokenizer, base, args, out / "judge")
        drawn = evaluation_groups(trained, tokenizer, held_out, args, out / "trained")
        rows["trained"] = rank_all(trained, tokenizer, drawn, args, out / "trained")
    ranked, finals = ({name: row[part] for name, row in rows.items()} for part in (0, 1))
    metrics = metrics_of(args.best_of)
    if args.eval_every and not args.eval_only:
        ranks.on_first(lambda: report.keep_ends(ranked, curve_places(base, args), last_step, metrics, out))
    text = ranks.on_first(lambda: report.write_report(ranked, finals, metrics, asdict(args), out, asdict(Args())))
    tqdm.write(f"\n{text}\nall of it: {out}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, 2 after an error that the user can correct, 130 after Ctrl-C."""
    return runs.exit_code(lambda: parse_args(argv), run)


if __name__ == "__main__":
    raise SystemExit(main())
