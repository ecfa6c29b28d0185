"""Measure on a GPU what is only calculated elsewhere, in less than eight minutes on one H100.

    python tests/gpu_check.py                               # all parts; a line is printed as soon as it is known
    python tests/gpu_check.py --write data/results/gpu.md   # and keep the tables in this file, renewed after each part
    python tests/gpu_check.py --only step,update            # some parts
    python tests/gpu_check.py --device cpu --tiny           # the same code with small shapes: does it run at all?

    attention   which attention kernels torch chooses; what lengths cost that it has not met before
    step        a step of decoding at the shape of Qwen3-4B, beside transformers' generate
    update      one optimiser step at this shape: seconds, tokens a second, memory
    exact       the answers share their prompt: the same log-probs and gradients as with a row for each answer, in fp32
                and bf16; the rollout's log-probs beside the update's; a checkpoint that is saved and loaded
    variants    short runs of dust.py that take other ways: adapters, bf16 weights, torchrun with shards
    run         the default run of dust.py, killed in its training and resumed; its figures beside the CPU's

All weights but those of dust.py are random: speed, memory and exactness do not depend on them. Each part is a process
of its own with its own alarm. What fails, hangs or does not fit is a line too, and the next part goes on. The exit code
is 0 if no line is wrong.
"""
import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if "--part" in sys.argv:  # in the process of a part; the one that watches the parts needs nothing but Python
    import copy

    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    import dust
    import grpo
    from plumbing import models
    from plumbing.shared_prompt import SHARED_ATTENTION

# The parts in their order, and the most seconds that each may take. Those in one group run at the same time, because no
# speed is measured in them, and dust.py uses little of a GPU.
PLAN = ({"attention": 60}, {"step": 150}, {"update": 90}, {"exact": 90, "variants": 120, "run": 240})
SECONDS = 470  # for all of it
SLOW = 5  # times as many for a tiny check, which may have one busy core
KEPT_BACK = 6  # seconds before its alarm in which a part says how far dust.py has come
NO_DEVICE = 3  # exit code of a part

SMALL = dict(
    vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=8192, initializer_range=0.1, eos_token_id=None,
    bos_token_id=None, pad_token_id=None,
)
TINY = SMALL | dict(vocab_size=256, hidden_size=64, intermediate_size=128, num_attention_heads=4, head_dim=16)
QWEN3_4B = SMALL | dict(
    vocab_size=151_936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, initializer_range=0.02, tie_word_embeddings=True,
)
FAMILIES = {
    "qwen3": {},
    "qwen3_moe": dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128),
    "gpt_oss": dict(num_local_experts=8, num_experts_per_tok=2, sliding_window=64),
}
FIGURES = ("pass1", "ndcg_all", "ndcg_mixed", "best_of_4")  # of table 2
SHORT_RUN = ["--limit", "16", "--eval-limit", "6", "--candidates", "8", "--steps", "3", "--batch", "2",
             "--mini-batch", "2", "--answers", "4", "--repeats", "1", "--thinking", "none"]


@dataclass
class Check:
    """What one part has to know, and where it says what it found."""

    part: str
    device: str  # cpu or cuda
    tiny: bool
    folder: str  # of the check: its lines, its runs
    began: float  # when the whole check began, as time.monotonic() has it, which is one clock for all processes
    until: float = 0.0  # when the alarm of this part comes

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    def say(self, what: str, result: str, good: bool = True) -> None:
        """Print a line, and keep it for the tables. good: False makes the whole check fail."""
        result = result if good else f"WRONG: {result}"
        print(f"{time.monotonic() - self.began:5.0f} s  {self.part:<10} {what:<52} {result}", flush=True)
        line = {"part": self.part, "what": what, "result": result, "good": good}
        with open(Path(self.folder, "lines.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def measure(self, what: str, do) -> None:
        """Say what do() returns: a text, or (a text, whether it is good). An error is said too, and goes no further."""
        try:
            result = do()
            text, good = result if isinstance(result, tuple) else (result, True)
        except Exception as error:
            text, good = first_line(error), False
        self.say(what, text, good)
        clean(self)


def first_line(error: Exception) -> str:
    """Return an error in one line of at most 200 characters."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]


# ------------------------------------------------------------------------------------------------- models and texts


def build(check: Check, family: str, dtype, **sizes):
    """Return a model of random weights on the device. Its answers share prompts, whatever enable_sharing thinks."""
    torch.manual_seed(3)
    config = AutoConfig.for_model(family, **(TINY if check.tiny else SMALL) | FAMILIES[family] | sizes)
    with torch.device(check.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.config._attn_implementation = SHARED_ATTENTION
    return model


def big(check: Check, **changes):
    """Return a model of Qwen3-4B's shape in bf16. A tiny check has a small one."""
    return build(check, "qwen3", torch.bfloat16, **({} if check.tiny else QWEN3_4B) | changes)


def in_bf16(model):
    """Return a copy with bf16 weights. Rotary frequencies stay fp32, as in a model that is loaded."""
    half = copy.deepcopy(model)
    for p in half.parameters():
        p.data = p.data.bfloat16()
    return half


def ids(length: int):
    """Return random token ids [length]."""
    return torch.randint(TINY["vocab_size"], (length,), generator=torch.Generator().manual_seed(length))


def scored(prompt: int, count: int, longest: int) -> list:
    """Return `count` rollouts of 8 answers of unequal length, with rewards. prompt: tokens of the first prompt."""
    rollouts = []
    for i in range(count):
        answers = [ids(longest * (j + 3) // 10 + i) for j in range(8)]
        logps = [torch.zeros(len(answer)) for answer in answers]
        rollouts.append(grpo.Rollout(ids(prompt + i), answers, logps, [True] * 8, torch.arange(8.0)))
    return rollouts


def gradients(model, groups: list):
    """Return the log-probs [N] of all answers and the gradients of all weights as one vector."""
    model.zero_grad(set_to_none=True)
    logps = grpo.logprobs(model, groups, 1.0)[0].float()
    (logps * torch.sin(torch.arange(len(logps), device=logps.device))).sum().backward()
    grads = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    return logps.detach(), torch.cat(grads)


def with_rows(model, groups: list):
    """gradients by definition: a row for each answer, through transformers' own attention."""
    with grpo.plain_attention(model):
        return gradients(model, groups)


# ------------------------------------------------------------------------------------------------- time and memory


def timed(check: Check, do) -> float:
    """Return the seconds that do() takes, work that it left to the GPU included."""
    if check.on_gpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    do()
    if check.on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def clean(check: Check) -> None:
    """Free what is not used, and watch the peak of memory from here on."""
    gc.collect()
    if check.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak(check: Check) -> str:
    if not check.on_gpu:
        return "peak not measured"
    used, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return f"peak {used / 1e9:.1f} GB ({reserved / 1e9:.1f} reserved)"


def about(check: Check) -> None:
    """Say what this is measured on, once. Raises RuntimeError where the device does not work."""
    file = Path(check.folder, "about.json")
    torch.zeros(1, device=check.device).item()
    if file.exists():
        return
    card = torch.cuda.get_device_name() if check.on_gpu else "a CPU"
    memory = f", {torch.cuda.get_device_properties(0).total_memory / 1e9:.0f} GB" if check.on_gpu else ""
    software = f"torch {torch.__version__}, transformers {transformers.__version__}"
    if check.on_gpu:
        software += f", CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    file.write_text(json.dumps({"card": card + memory, "software": f"{software}, {os.cpu_count()} CPU cores"}))
    print(f"{card}{memory}: {software}", flush=True)


# ------------------------------------------------------------------------------------------------------- the parts


def attention(check: Check) -> None:
    """Find out which attention kernels are used, and what it costs that every prompt and answer has its own length."""
    model = big(check, num_hidden_layers=2, vocab_size=1024)
    for allowed in (False, True):
        torch.backends.cuda.enable_cudnn_sdp(allowed)
        state = f"cuDNN's attention {'allowed' if allowed else 'off'}"
        for family in FAMILIES:
            check.measure(f"{state}: kernels of {family}", lambda: chosen_kernels(check, family))
        check.measure(f"{state}: update of two layers", lambda: new_lengths(check, model, first=400 + allowed))


def chosen_kernels(check: Check, family: str) -> str:
    """Return how often each kernel is called for a prompt, short answers in one call, and a long answer, in bf16."""
    long = 150 if check.tiny else 500
    model, groups = build(check, family, torch.bfloat16), [(ids(long + 1), [ids(50), ids(60), ids(long - 1)])]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        gradients(model, groups)
    start = "aten::_scaled_dot_product_"
    found = {event.key.removeprefix(start): event.count for event in profile.key_averages()
             if event.key.startswith(start) and "backward" not in event.key}
    return ", ".join(f"{name} {count}" for name, count in found.items())


def new_lengths(check: Check, model, first: int) -> str:
    """Time a forward and a backward pass for lengths that no call has had, then for the same again. first: a length."""
    gradients(model, [(ids(first - 20), [ids(first - 30), ids(30)])])  # the very first call loads kernels
    count, batches = 1 if check.tiny else 6, []
    for more in range(0, 2 * count, 2):  # every other length, because both states come here
        batches.append([(ids(first + more), [ids(first - 150 + more), ids(60 + more)])])
    new, known = [[timed(check, lambda: gradients(model, batch)) for batch in batches] for _ in range(2)]
    new, known = (1e3 * sum(seconds) / count for seconds in (new, known))
    return f"{new:.0f} ms with lengths never met, {known:.0f} ms with the same again"


def step(check: Check) -> None:
    """Time decoding, by the difference of two lengths, so that reading the prompts does not count in a step."""
    model = big(check)
    weights = sum(p.numel() for p in model.parameters())
    check.measure(f"enable_sharing, {weights / 1e9:.2f} B weights in bf16", lambda: shares(model))
    few, many, prompt = (2, 6, 60) if check.tiny else (16, 128, 1500)

    def ours(rows: int, tokens: int) -> None:
        prompts = [ids(prompt - i % 50) for i in range(rows // 8)]
        seeds = [list(range(8)) for _ in prompts]
        grpo.rollout(model, prompts, seeds, max_new_tokens=tokens, eos_ids=[], max_rows=rows)

    def plain(rows: int, tokens: int) -> None:
        with grpo.plain_attention(model):
            ours(rows, tokens)

    def generate(rows: int, tokens: int) -> None:
        texts = torch.stack([ids(prompt)] * (rows // 8)).to(check.device)
        with torch.no_grad(), grpo.plain_attention(model):
            model.generate(texts, attention_mask=torch.ones_like(texts), num_return_sequences=8, do_sample=True,
                           top_k=0, max_new_tokens=tokens, pad_token_id=0)

    def speed(decode, rows: int) -> str:
        decode(rows, few)
        short, long = (timed(check, lambda: decode(rows, tokens)) for tokens in (few, many))
        milliseconds, rate = 1e3 * (long - short) / (many - few), rows * many / long
        return f"{milliseconds:.1f} ms a step, {rate:.0f} tokens/s for {many} tokens with their prompts, {peak(check)}"

    for rows in (8, 16) if check.tiny else (8, 64, 256):
        check.measure(f"{rows} rows, prompts of {prompt} tokens", lambda: speed(ours, rows))
        if rows == 8:
            check.measure("8 rows: kernels of a step", lambda: launches(check, lambda tokens: ours(8, tokens)))
        check.measure(f"{rows} rows, plain decoder", lambda: speed(plain, rows))
        check.measure(f"{rows} rows, transformers' generate", lambda: speed(generate, rows))


def shares(model) -> str:
    """Return what enable_sharing says. The model shares prompts afterwards in any case."""
    model.config._attn_implementation = "sdpa" if model._supports_sdpa else "eager"
    try:
        return grpo.enable_sharing(model) or "shares prompts"
    finally:
        model.config._attn_implementation = SHARED_ATTENTION


def launches(check: Check, decode) -> str:
    """Count the kernels of one step, and the time that the GPU is busy with them."""
    kind, seen = "CUDA" if check.on_gpu else "CPU", []
    for tokens in (2, 6):
        with torch.profiler.profile(activities=[getattr(torch.profiler.ProfilerActivity, kind)]) as profile:
            timed(check, lambda: decode(tokens))
        events = [event for event in profile.key_averages() if event.device_type.name == kind]
        busy = sum(event.self_device_time_total if check.on_gpu else event.self_cpu_time_total for event in events)
        seen.append((sum(event.count for event in events), busy))
    count, busy = ((after - before) / 4 for before, after in zip(*seen))
    return f"{count:.0f}, busy for {busy / 1e3:.1f} ms"


def update(check: Check) -> None:
    """Time optimiser steps; the first one also makes the optimiser's state."""
    model = big(check)
    models.checkpoint_layers(model)
    optimizer = models.make_optimizer(model, "kahan", 1e-6)
    rollouts = scored(60, 2, 40) if check.tiny else scored(1500, 4, 600)
    tokens = sum(len(answer) for rollout in rollouts for answer in rollout.answers)
    expected = models.BYTES["kahan"] * sum(p.numel() for p in model.parameters()) / 1e9
    check.say("weights, gradients and optimiser, calculated", f"{expected:.1f} GB")

    def one_step(micro_tokens: int) -> str:
        args = dust.Args(mini_batch=len(rollouts), kl=0.0, micro_tokens=micro_tokens)
        seconds = timed(check, lambda: grpo.update(model, optimizer, rollouts, args))
        return f"{seconds:.1f} s, {tokens / seconds:.0f} tokens/s, {peak(check)}"

    for micro_tokens in (4096, 16384):
        for which in ("first", "second"):
            what = f"{tokens} answer tokens, --micro-tokens {micro_tokens}, {which}"
            check.measure(what, lambda: one_step(micro_tokens))


def exact(check: Check) -> None:
    """Compare numbers that have to be the same but for rounding."""
    prompts, answers = ([150, 70], [110, 60, 20, 5]) if check.tiny else ([1500, 700], [1100, 300, 40, 5])
    groups = [(ids(prompt), [ids(length) for length in answers]) for prompt in prompts]
    for family in FAMILIES:
        compare_forms(check, family, groups)
    check.measure("gradient of an expert without a token", lambda: unused_expert(check))
    check.measure("checkpoint of bf16 weights, with kahan", lambda: read_back(check))


def compare_forms(check: Check, family: str, groups: list) -> None:
    """Compare the shared form with the form that has a row for each answer, and rollout with update.

    The truth is the row form in fp32, with weights that bf16 can hold. In bf16 neither form is exact; the shared one
    must not be much farther off.
    """
    model = build(check, family, torch.float32)
    for p in model.parameters():
        p.data = p.data.bfloat16().float()
    half, known = in_bf16(model), {}
    if "num_experts_per_tok" in FAMILIES[family]:
        model.set_experts_implementation("eager")  # the kernel of the other one is for bf16

    def shared_in_fp32():
        known["truth"] = with_rows(model, groups)
        return told(distance(gradients(model, groups), known["truth"]), 1e-3)

    def rows_in_bf16():
        known["rows"] = distance(with_rows(half, groups), known["truth"])
        return told(known["rows"], 0.5)

    def shared_in_bf16():
        return told(distance(gradients(half, groups), known["truth"]), 2 * max(known["rows"]))

    check.measure(f"{family}, fp32: shared against rows", shared_in_fp32)
    check.measure(f"{family}, bf16: rows against fp32", rows_in_bf16)
    check.measure(f"{family}, bf16: shared against fp32", shared_in_bf16)
    check.measure(f"{family}, fp32: update against rollout", lambda: rollout_gap(model, 1e-3))
    check.measure(f"{family}, bf16: update against rollout", lambda: rollout_gap(half, 0.1))
    check.measure(f"{family}, bf16: enable_sharing", lambda: shares(half))


def distance(found: tuple, truth: tuple) -> tuple[float, float]:
    """Return the mean distance of the log-probs, and the relative distance of the gradients."""
    (logps, grads), (true_logps, true_grads) = found, truth
    return float((logps - true_logps).abs().mean()), float((grads - true_grads).norm() / true_grads.norm())


def told(distances: tuple[float, float], bound: float) -> tuple[str, bool]:
    """Return two distances in words, and whether they are within a bound."""
    return "log-probs {:.1e} nats a token, gradients {:.1e}".format(*distances), max(distances) < bound


def rollout_gap(model, bound: float) -> tuple[str, bool]:
    """Return the mean distance between the log-probs of a rollout and those that the update computes again."""
    rollouts = grpo.rollout(model, [ids(300), ids(200)], [[1, 2, 3, 4]] * 2, max_new_tokens=30, eos_ids=[])
    with torch.no_grad():
        again = grpo.logprobs(model, [(rollout.prompt, rollout.answers) for rollout in rollouts], 1.0)[0].cpu()
    gap = float((again - torch.cat([logp for rollout in rollouts for logp in rollout.logps])).abs().mean())
    return f"{gap:.1e} nats a token", gap < bound


def unused_expert(check: Check) -> tuple[str, bool]:
    """Multiply tokens with grouped weights as a mixture does. A group without tokens must get the gradient 0.

    On some cards torch leaves what was in the memory there (pytorch issue 172439).
    """
    tokens = torch.randn(32, 64, dtype=torch.bfloat16, device=check.device)
    experts = torch.randn(3, 64, 64, dtype=torch.bfloat16, device=check.device, requires_grad=True)
    ends = torch.tensor([16, 16, 32], dtype=torch.int32, device=check.device)
    [torch.full_like(experts, torch.nan) for _ in range(64)]  # their memory is free again, and holds nan
    (torch.nn.functional.grouped_mm(tokens, experts, offs=ends) ** 2).sum().backward()
    largest = float(experts.grad[1].abs().max())
    return f"at most {largest}", largest == 0 and bool(experts.grad[2].abs().sum() > 0)


def read_back(check: Check) -> tuple[str, bool]:
    """Save a model after a step, load it into another, and make the next step with both."""
    pair = [build(check, "qwen3", torch.bfloat16) for _ in range(2)]
    optimizers = [models.make_optimizer(model, "kahan", 1e-4) for model in pair]
    rollouts, args, file = scored(60, 2, 40), dust.Args(kl=0.0), Path(check.folder, "checkpoint.pt")
    grpo.update(pair[0], optimizers[0], rollouts, args)
    models.save_checkpoint(file, pair[0], optimizers[0], 1)
    models.load_checkpoint(file, pair[1], optimizers[1])

    def tensors(model, optimizer) -> list:
        return [x for p in model.parameters() for x in (p, *(optimizer.state[p][name] for name in ("m", "v", "kept")))]

    equal = all(map(torch.equal, *map(tensors, pair, optimizers)))
    for model, optimizer in zip(pair, optimizers):
        grpo.update(model, optimizer, rollouts, args)
    far = max(float((p - q).abs().max()) for p, q in zip(pair[0].parameters(), pair[1].parameters()))
    return f"{'equal' if equal else 'not equal'} when loaded; the next step is off by {far:.1e}", equal and far < 1e-3


# -------------------------------------------------------------------------------------------------- runs of dust.py


def variants(check: Check) -> None:
    """Run dust.py for one training step in ways that the default run does not take."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1")
    ways = {
        "adapters on bf16 weights (--lora 4)": ((), ["--lora", "4", "--optimizer", "kahan"]),
        "one rank of torchrun, --shard": (torchrun, ["--shard", "--optimizer", "masters"]),
    }
    for what, (before, options) in ways.items():
        if "--lora" in options and not find_spec("peft"):
            check.say(what, "left out, because the package peft is missing")
            continue
        out = Path(check.folder, options[0].strip("-"))
        process = start(check, out, *SHORT_RUN, "--steps", "1", *options, before=before)
        check.measure(what, lambda: finished(check, process, out))


def run(check: Check) -> None:
    """Run dust.py as a user does, kill it in its training, resume it, and look at its report."""
    out, options = Path(check.folder, "run"), SHORT_RUN if check.tiny else []
    process, steps = start(check, out, *options), out / "metrics.jsonl"
    while process.poll() is None and count_lines(steps) < 2 and time.monotonic() < check.until - KEPT_BACK:
        time.sleep(0.1)
    process.kill()
    made = count_lines(steps)
    check.say(f"killed after {made} training steps", "as it should be" if made else last_words(out), made > 0)
    check.measure("resumed, up to its end", lambda: finished(check, start(check, out, *options, "--resume"), out))
    check.measure("seconds from file to file, restart included", lambda: stages(out))
    check.measure("training", lambda: training(out))
    if check.tiny:  # it has too few problems for the intervals of the full run
        known = Path(check.folder, "whole")
        process = start(check, known, *options, device="cpu")
        check.measure("the same on the CPU, without a kill", lambda: finished(check, process, known))
        known = json.loads((known / "report.json").read_text())["rows"]
    else:
        known = json.loads((ROOT / "data/results/table2.json").read_text())["variants"]["rank"]["rows"]
    rows = json.loads((out / "report.json").read_text())["rows"]
    for name in known:
        check.measure(f"{name}, and the intervals on the CPU", lambda: within(rows[name], known[name]))


def start(check: Check, out: Path, *options: str, before=(), device: str = "") -> subprocess.Popen:
    """Start dust.py. What it prints goes to OUT.txt."""
    command = [sys.executable, *before, "dust.py", "--device", device or check.device, "--out", str(out), *options]
    with open(f"{out}.txt", "a") as printed:
        return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=printed, stderr=subprocess.STDOUT)


def finished(check: Check, process: subprocess.Popen, out: Path) -> tuple[str, bool]:
    """Wait for a run, at most until just before the alarm of this part. Return its seconds, or what went wrong."""
    began = time.monotonic()
    try:
        code = process.wait(timeout=max(1, check.until - KEPT_BACK - began))
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun passes it on to its ranks
        code = "none yet"
    seconds = f"{time.monotonic() - began:.0f} s"
    return (seconds, True) if code == 0 else (f"exit code {code} after {seconds}: {last_words(out)}", False)


def last_words(out: Path) -> str:
    """Return the end of what a run has printed."""
    printed = Path(f"{out}.txt").read_text(errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip() for line in reversed(printed) if line.strip()), "it said nothing")[-200:]


def count_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def stages(out: Path) -> str:
    """Return how many seconds after the file before it each file of results was finished, where it is one or more."""
    files = sorted(out.glob("*.jsonl"), key=lambda file: file.stat().st_mtime)
    times = [file.stat().st_mtime for file in files]
    took = [(file.stem, round(after - before)) for file, before, after in zip(files[1:], times, times[1:])]
    return ", ".join(f"{name} {seconds}" for name, seconds in took if seconds)


def training(out: Path) -> tuple[str, bool]:
    """Return the mean reward of the first and the last steps, and whether update and rollout agree."""
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    first, last = (sum(step["reward"] for step in part) / len(part) for part in (steps[:10], steps[-10:]))
    gap = max(step["rollout_gap"] for step in steps)
    return f"{len(steps)} steps, reward {first:.2f} to {last:.2f}, rollout_gap at most {gap:.1e}", gap < 0.05


def within(row: dict, known: dict) -> tuple[str, bool]:
    """Compare the figures of one row of a report with intervals, in per cent."""
    texts, good = [], True
    for name in FIGURES:
        value, low, high = row[name]["mean"], known[name]["low"], known[name]["high"]
        if value is None or low is None:
            continue
        inside = low - 0.05 <= value <= high + 0.05  # as they are printed
        good = good and inside
        texts.append(f"{name} {value:.1f} {'in' if inside else 'NOT in'} [{low:.1f}, {high:.1f}]")
    return ", ".join(texts), good


# ------------------------------------------------------------------------------------- the processes of the parts


def be_part(check: Check) -> int:
    """Run one part, after a line on standard input that says until when. Return the exit code of its process."""
    warnings.simplefilter("ignore")  # rollouts that nobody has sampled
    transformers.logging.set_verbosity_error()
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each length; the part "attention" measures both
    check.until = float(sys.stdin.readline())
    try:
        about(check)
    except Exception as error:
        check.say(f"--device {check.device} does not work here", first_line(error), good=False)
        return NO_DEVICE
    part = dict(attention=attention, step=step, update=update, exact=exact, variants=variants, run=run)[check.part]
    try:
        part(check)
    except Exception as error:
        check.say("ended early", first_line(error), good=False)
    return 0


def open_part(check: Check) -> subprocess.Popen:
    """Start the process of a part. It imports torch, then waits until `watch` lets it begin."""
    command = [sys.executable, __file__, "--part", json.dumps(asdict(check))]
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} | os.environ
    environment["KINETO_LOG_LEVEL"] = "99"  # or the profiler prints between our lines
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, text=True, start_new_session=True)


def begin(process: subprocess.Popen, until: float) -> None:
    """Let a part begin, whose alarm comes at this time of time.monotonic()."""
    try:
        process.stdin.write(f"{until}\n")
        process.stdin.close()
    except BrokenPipeError:  # it has ended already; `watch` says so
        pass


def watch(process: subprocess.Popen, until: float) -> str:
    """Wait for a part until its alarm, then kill what is left of it. Return what went wrong, or ""."""
    try:
        code = process.wait(timeout=max(0, until - time.monotonic()))
        return "" if code in (0, NO_DEVICE) else f"its process ended with exit code {code}"
    except subprocess.TimeoutExpired:
        return "cut by its alarm: it hangs, or it takes longer here"
    finally:
        end(process)


def end(process: subprocess.Popen) -> None:
    """Kill a part and what it has started, as far as that still runs."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def run_plan(groups: list[dict], last: float, make, keep) -> None:
    """Run parts, group after group. groups: {part: the seconds from its beginning to its alarm}.

    last: when all of them have to be over, as time.monotonic() has it. make: part -> Check. keep() is called whenever a
    part has ended. The processes of a group start while the group before it runs, so nothing waits for their imports.
    """
    opened = {}
    try:
        for group, following in zip(groups, [*groups[1:], {}]):
            opened |= {part: open_part(make(part)) for part in {**group, **following} if part not in opened}
            alarms = {part: min(time.monotonic() + seconds, last) for part, seconds in group.items()}
            for part, alarm in alarms.items():
                begin(opened[part], alarm)
            for part, alarm in alarms.items():
                if wrong := watch(opened[part], alarm):
                    make(part).say("ended early", wrong, good=False)
                keep()
                if opened[part].returncode == NO_DEVICE:
                    return
    finally:
        for process in opened.values():
            end(process)


def read_lines(folder: str) -> list[dict]:
    """Return all lines that parts have said."""
    file = Path(folder, "lines.jsonl")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def tables(folder: str) -> str:
    """Return what is known up to now as Markdown, with the card's name on top."""
    file, by_part = Path(folder, "about.json"), defaultdict(list)
    known = json.loads(file.read_text()) if file.exists() else {"card": "no device", "software": "nothing"}
    for line in read_lines(folder):
        by_part[line["part"]].append(f"| {line['what']} | {line['result'].replace('|', '/')} |")
    text = f"# Measured on a GPU: {known['card']}\n\n`python tests/gpu_check.py` with {known['software']}.\n"
    for part, rows in by_part.items():
        text += "\n".join([f"\n## {part}\n", "| what | result |", "| --- | --- |", *rows, ""])
    return text


def read_options() -> argparse.Namespace:
    parts = [part for group in PLAN for part in group]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ... or cpu (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="small shapes: a minute or two on a CPU")
    parser.add_argument("--only", default=",".join(parts), help="parts, with commas between (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all of it (default: %(default)s)")
    parser.add_argument("--write", default="", metavar="FILE", help="keep the tables in this file, too")
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)  # the Check of a part's process, as JSON
    options = parser.parse_args()
    options.only = options.only.split(",")
    if unknown := set(options.only) - set(parts):
        parser.error(f"--only {', '.join(sorted(unknown))}: the parts are {', '.join(parts)}")
    return options


def gpu_is_there() -> bool:
    """Ask torch in a process of its own, because the parts must find the GPU untouched."""
    ask = "import torch; raise SystemExit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", ask]).returncode == 0


def main() -> int:
    options = read_options()
    if options.part:
        return be_part(Check(**json.loads(options.part)))
    if options.device.startswith("cuda") and not gpu_is_there():
        print("no GPU that torch can use is here; to try the script without one: --device cpu --tiny", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the tables are written then, too
    slow, began = SLOW if options.tiny else 1, time.monotonic()
    groups = [{part: slow * seconds for part, seconds in group.items() if part in options.only} for group in PLAN]
    groups, last = [group for group in groups if group], began + slow * options.seconds
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:

        def keep() -> None:
            if options.write:
                Path(options.write).write_text(tables(folder), encoding="utf-8")

        try:
            run_plan(groups, last, lambda part: Check(part, options.device, options.tiny, folder, began), keep)
        finally:
            keep()
            print(f"\n{tables(folder)}", flush=True)
        wrong = [line for line in read_lines(folder) if not line["good"]]
    print(f"{time.monotonic() - began:.0f} s, {len(wrong)} lines are wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
