"""Probe the rule of results/transfer.md on a real model: does SmolLM2-135M-Instruct learn to rank easy programs?

    python data/smollm2.py                   # under 40 minutes on one free thread; the same command continues
    python data/smollm2.py --model FOLDER    # without the Hub: python tests/test_real.py FOLDER makes the folder

The model writes no well-formed ranking, so GRPO has nothing to compare. A warm-up teaches the form first, with rankings
in random order, which teach no judgment. Options are those of dust.py.
"""
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dust  # noqa: E402
import grpo  # noqa: E402
from plumbing import models, report  # noqa: E402
from plumbing.problems import BadInput, load_problems, seed_for, write_atomic  # noqa: E402
from plumbing.settings import prepare_terminal  # noqa: E402

SETTINGS = ("--model HuggingFaceTB/SmolLM2-135M-Instruct --train easy-train --eval easy-eval --preset laptop "
            "--device cpu --optimizer fp32 --max-new-tokens 96 --candidates 8 --steps 24 --batch 8 --mini-batch 8 "
            "--lr 2e-5 --kl 0 --save-every 4 --out runs/smollm2").split()
WARM_UP = dict(mode="sft", steps=16, batch=4, mini_batch=4, lr=5e-5, temperature=1.0)


def warm_up(args, out: Path) -> None:
    """Sample candidates, then imitate random orders of them. Write out/candidates.jsonl and out/model."""
    model, tokenizer = dust.load(args.model, args)
    out.mkdir(parents=True, exist_ok=True)
    groups = dust.training_groups(model, tokenizer, load_problems(args.train, args.limit), args, out)
    args = replace(args, **WARM_UP)
    optimizer = models.make_optimizer(model, args.optimizer, args.lr)
    for step in range(models.load_checkpoint(out / "checkpoint.pt", model, optimizer), args.steps):
        draw, rollouts = random.Random(seed_for(args.seed, "orders", step)), []
        for group in dust.batch_at(groups, step, args):
            prompt = dust.ranking_ids(tokenizer, group, args)
            texts = [f"Ranking: {', '.join(draw.sample('1234', 4))}" for _ in range(args.answers)]
            answers = models.encode_answers(tokenizer, prompt, texts, dust.end_ids(model, tokenizer)[0])
            rollouts.append(grpo.Rollout(prompt, answers, [], []))
        metrics = grpo.update(model, optimizer, rollouts, args)
        models.save_checkpoint(out / "checkpoint.pt", model, optimizer, step + 1)
        print(f"warm-up: step {step + 1} of {args.steps}, loss {metrics['loss']:.2f}", flush=True)
    models.save_model(out / "model", model, tokenizer)


def run_dust(out: Path, *options) -> dict:
    """Run dust.py, or go on with it, unless it has ended. Return its report.json. Raise BadInput if it failed."""
    resume = ["--resume"] if (out / "args.json").exists() else []
    argv = [*SETTINGS, *sys.argv[1:], *map(str, options), "--out", str(out), *resume]
    if not (out / "report.json").exists() and dust.main(argv):
        raise BadInput(f"the run in {out} has stopped, see above")
    return json.loads((out / "report.json").read_text())


def findings(before: dict, after: dict) -> str:
    """Return the tables and the verdicts. before, after: report.json of the model as it is, and of the whole run."""
    counts = [before["counts"]["base"], after["counts"]["base"], after["counts"]["trained_judge"]]
    malformed = [one["malformed rankings"] / one["groups"] for one in counts]
    gains, pairs = after["gains"], after["rows"]["base"]["pair_accuracy"]
    judge, both = gains["judge"]["pair_accuracy"], gains["both"]["pass1"]
    if None in (pairs["low"], judge["low"]):  # no group of the evaluation is mixed
        return f"Nothing can be said: no evaluation group has right and wrong programs.\n\n{report.table(after)}\n"
    form = malformed[0] > 0.9 and malformed[1] < 0.1 and pairs["low"] <= 50 <= pairs["high"]
    return "\n\n".join([
        "## What came out", "The model as it is:", report.table(before), "After the warm-up, and after GRPO:",
        report.table(after), report.NOTE,
        f"1. The form: {'confirmed' if form else 'refuted'}. Pair accuracy after the warm-up is {report.cell(pairs)}. "
        "Malformed rankings as it is, after the warm-up, after GRPO: " + ", ".join(f"{m:.1%}" for m in malformed) + ".",
        f"2. The ranking: {'a gain' if judge['low'] > 0 else 'no gain to be seen'}, {report.cell(judge, '+')} in pair "
        "accuracy.",
        f"3. pass@1: {'confirmed' if both['low'] <= 0 <= both['high'] else 'refuted'}, {report.cell(both, '+')}.",
    ]) + "\n"


def main() -> None:
    """Make what is missing: the report of the model as it is, the warm-up, the run. Then write the result."""
    # at temperature 1 hardly any of the candidates is right
    args = dust.parse_args([*SETTINGS, "--temperature", "0.6", *sys.argv[1:]])
    out, result = Path(args.out), Path(__file__).resolve().parent / "results" / "smollm2.md"
    before = run_dust(out / "before", "--eval-only")
    if not (out / "warm-up" / "model" / "tokenizer_config.json").exists():
        warm_up(args, out / "warm-up")
    after = run_dust(out / "run", "--model", out / "warm-up/model", "--programs", out / "warm-up/candidates.jsonl")
    text = result.read_text(encoding="utf-8").partition("## What came out")[0].rstrip()
    text = f"{text}\n\n{findings(before, after)}"  # the reading below is written by hand, about one result
    write_atomic(result if args.out == "runs/smollm2" else out / "smollm2.md", text)


if __name__ == "__main__":
    prepare_terminal()
    try:
        main()
    except (BadInput, OSError) as error:
        raise SystemExit(f"smollm2: {error}")
