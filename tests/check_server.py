"""Check an inference server before a long run, on prompts of both kinds:

    python tests/check_server.py localhost:8000 --model Qwen3-0.6B --prompts 8 --max-new-tokens 200 --lora 16

Loads the model here too, compares the server's answers with its own, and says how fast both are. With --lora the server
has to load adapters; their folder is in --out (as --server-adapters sees it). Ends with 0 if all is well, otherwise 1.
vLLM on a CPU needs --no-enable-chunked-prefill: without it version 0.32 ends at the first prompt that it reads in two
parts for a request with a seed ("CPU Generator does not use offset").

A GPU and another GPU, or bf16, round differently: there greedy answers may part after some tokens, and only log-probs
that are far apart are a fault.
"""
import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dust  # noqa: E402
import grpo  # noqa: E402
import rank_prompt  # noqa: E402
from dust import Candidate, Group  # noqa: E402
from grpo import Sampling  # noqa: E402
from plumbing import models, runs, served  # noqa: E402
from plumbing.engine import FAR  # noqa: E402
from plumbing.problems import BadInput, load_problems  # noqa: E402


def read_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check an inference server before a long run.")
    parser.add_argument("url")
    parser.add_argument("--model", default=dust.Args.model, help="the model that the server was started with")
    parser.add_argument("--problems", default="micro-eval", help="file or known set, as --eval of dust.py")
    parser.add_argument("--prompts", type=int, default=100, help="of each kind, programs and rankings")
    parser.add_argument("--max-new-tokens", type=int, default=192)
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters that the server should load")
    parser.add_argument("--out", default="runs/check-server", help="folder for the adapters")
    parser.add_argument("--server-adapters", default="", help="that folder as the server's machine sees it")
    return parser.parse_args(argv)


def draw(model, tokenizer, prompts: list, seeds: list, args, sampling) -> list:
    """Draw an answer to each prompt [L] for each of its seeds, by the server or by the model here."""
    return dust.draw(model, tokenizer, list(zip(prompts, seeds)), args.max_new_tokens, sampling, rows=64)


def timed(do, *arguments) -> tuple:
    """Return (what a function returns, the seconds it took)."""
    began = time.time()
    return do(*arguments), time.time() - began


def gap(model, rollouts, temperature=1.0) -> float:
    """Return the mean distance of rollouts' log-probs to those of a model, in nats a token."""
    distances = []
    for rollout in rollouts:
        with torch.no_grad():
            ours = grpo.answer_logprobs(model, rollout.prompt, rollout.answers, temperature=temperature)
        distances += [(a.cpu() - b).abs() for a, b in zip(ours, rollout.logps)]
    return float(torch.cat(distances).mean())


def compare(kind: str, model, server, tokenizer, prompts: list, args) -> bool:
    """Compare greedy answers to some prompts [L], and the log-probs of sampled ones. Print one line; True: all well."""
    seeds = [[0] for _ in prompts]
    theirs, seconds = timed(draw, server, tokenizer, prompts, seeds, args, Sampling(0.0))
    ours, our_seconds = timed(draw, model, tokenizer, prompts, seeds, args, Sampling(0.0))
    same = sum(torch.equal(a.answers[0], b.answers[0]) for a, b in zip(theirs, ours))
    sampled = draw(server, tokenizer, prompts[:16], [[7, 8]] * len(prompts[:16]), args, Sampling(1.0))
    far, free = gap(model, theirs), gap(model, sampled)
    speed, our_speed = len(prompts) / seconds, len(prompts) / our_seconds
    print(f"{kind}: {same} of {len(prompts)} greedy answers are those of the model here; log-probs differ by {far:.1g} "
          f"nats a token, of sampled answers by {free:.1g}; {speed:.1f} answers a second by the server, "
          f"{our_speed:.1f} here", flush=True)
    return max(far, free) < FAR


def ranking_prompts(server, tokenizer, problems: list, args) -> list:
    """Return ranking prompts [L] of programs that the server writes now."""
    prompts = [dust.program_ids(tokenizer, problem, args) for problem in problems]
    drawn = draw(server, tokenizer, prompts, [[i] * 4 for i in range(len(prompts))], args, Sampling(1.0))
    rankings = []
    for problem, rollout in zip(problems, drawn):
        codes = [rank_prompt.extract_code(text) or "pass" for text in dust.texts_of(tokenizer, rollout)]
        group = Group(problem, [Candidate(problem.id, "", code) for code in codes])
        rankings.append(dust.ranking_ids(tokenizer, group, args))
    return [prompt for prompt in rankings if dust.longest_answer(server, prompt, args.max_new_tokens)]


def repeats(server, tokenizer, prompts: list, args) -> None:
    """Print how many answers come again with the same seed. Where other answers run beside them, few may differ."""
    first, second = (draw(server, tokenizer, prompts, [[5, 6]] * len(prompts), args, Sampling(0.6, 0.95, 20))
                     for _ in range(2))
    pairs = [torch.equal(a, b) for one, two in zip(first, second) for a, b in zip(one.answers, two.answers)]
    distinct = sum(not torch.equal(*rollout.answers) for rollout in first)
    print(f"seeds: {sum(pairs)} of {len(pairs)} answers came again with their seed; in {distinct} of {len(first)} "
          "requests the two answers differ")


def check_adapter(model, server, tokenizer, prompts: list, args) -> bool:
    """Let the server load random adapters, and compare the log-probs of its answers with the model's with them."""
    models.add_lora(model, args.lora, 0)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight.normal_(std=0.02)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    adapted = served.with_adapter(server, model, args, Path(args.out))
    rollouts = draw(adapted, tokenizer, prompts[:16], [[7, 8]] * len(prompts[:16]), args, Sampling(1.0))
    with_it, (without, _) = gap(model, rollouts), timed(without_adapter, model, rollouts)
    print(f"adapter: log-probs differ by {with_it:.1g} nats a token; without the adapter it would be {without:.1g}")
    return with_it < min(FAR, without)


def without_adapter(model, rollouts) -> float:
    with models.lora_disabled(model):
        return gap(model, rollouts)


def main(argv: list[str] | None = None) -> int:
    given = read_args(argv)
    args = dust.Args(model=given.model, server=given.url, max_new_tokens=given.max_new_tokens, lora=given.lora,
                     out=given.out, server_adapters=given.server_adapters, device=runs.choose_device(""))
    args = replace(args, optimizer="fp32" if models.count_parameters(args.model) < models.LARGE else "kahan")
    model, tokenizer = dust.load(args.model, args)
    problems = load_problems(given.problems, limit=given.prompts)
    prompts = [dust.program_ids(tokenizer, problem, args) for problem in problems]
    ends = dust.end_ids(model, tokenizer)
    server = served.connect(model, tokenizer, prompts[0], args, ends, grpo.answer_logprobs)
    good = compare("programs", model, server, tokenizer, prompts, args)
    good &= compare("rankings", model, server, tokenizer, ranking_prompts(server, tokenizer, problems, args), args)
    repeats(server, tokenizer, prompts[:16], args)
    if args.lora:
        good &= check_adapter(model, server, tokenizer, prompts, args)
    print("all is well" if good else f"log-probs that are {FAR} nats apart are not of the same weights")
    return 0 if good else 1


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except BadInput as error:
        print(f"check_server: {error}", file=sys.stderr)
        raise SystemExit(2) from None
