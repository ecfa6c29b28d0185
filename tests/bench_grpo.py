"""Measure how much faster it is to compute a prompt once for G answers than once for each answer. Both take turns.

    python tests/bench_grpo.py [--rounds 5] [--vocabulary 4096] [--against repeated|trl|sampling] 2>/dev/null

One prompt, G = 8 answers of a fixed length, one thread, fp32, a random model of Qwen3's shape: hidden 256, 6 layers,
8 heads, 4 KV heads. `repeated` is the best repeated form that we can write: transformers' generate with
num_return_sequences, then one batch of 8 rows through fused attention, the head on answer positions only, one backward
pass and one optimiser step. Our rollout is shown with both decoders, the plain and the fast one; "both" is the fast
rollout and the update. `trl` is TRL's GRPOTrainer (pip install trl), which is timed step by step.

`sampling` compares with transformers' generate: 16 tokens after a prompt of 64, a real vocabulary, 8 and 64 rows. The
filters are none, the evaluation's top-k 20 and top-p 0.95, and top-p 0.95 only. The head is about as sharp as that of a
trained model. The table shows how much of a step is spent on drawing, and how much on the model.

Seconds are theirs/ours, medians. A ratio is theirs divided by ours, the median over the rounds. Memory is the peak of
the tensors that were made during the measurement, theirs/ours.
"""
import argparse
import contextlib
import io
import os
import random
import statistics
import sys
import tempfile
import time
from itertools import accumulate

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import torch  # noqa: E402
from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: E402

import grpo  # noqa: E402

ROWS = ((512, 16), (2048, 16), (512, 128))  # prompt and answer tokens
G = 8
ARGS = argparse.Namespace(mode="rank", mini_batch=16, ppo_epochs=1, temperature=1.0, loss="sequence", clip=0.2,
                          clip_high=0.0, dual_clip=0.0, kl=0.0, micro_tokens=16384, server_rollouts=False)
REAL_VOCABULARY = 151_936
SAMPLINGS = {
    "no filter": grpo.Sampling(), "top-k 20, top-p 0.95": grpo.Sampling(0.6, 0.95, 20),
    "top-p 0.95": grpo.Sampling(1.0, 0.95),
}


def make_model(vocabulary: int):
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=4096, eos_token_id=None, bos_token_id=None,
    )).eval()


class Ours:
    name = "fast"

    def __init__(self, model):
        self.model, self.optimizer = model, torch.optim.SGD(model.parameters(), lr=0.0)
        assert grpo.enable_sharing(model) == ""

    def rollout(self, prompt, tokens):
        self.rollouts = grpo.rollout(self.model, [prompt], [list(range(G))], max_new_tokens=tokens, eos_ids=[])

    def update(self):
        for r in self.rollouts:
            r.rewards = torch.arange(G).float()
        grpo.update(self.model, self.optimizer, self.rollouts, ARGS)


class OursPlain(Ours):
    """The plain decoder, which serves models that cannot share prompts."""

    name = "plain"

    def __init__(self, model):
        self.model = model

    def update(self):
        pass


class Repeated:
    name = "repeated"

    def __init__(self, model):
        self.model, self.optimizer = model, torch.optim.SGD(model.parameters(), lr=0.0)

    def rollout(self, prompt, tokens):
        with torch.no_grad(), grpo.plain_attention(self.model):
            self.rows = self.model.generate(
                prompt[None], attention_mask=torch.ones_like(prompt[None]), num_return_sequences=G, do_sample=True,
                top_k=0, max_new_tokens=tokens, pad_token_id=0,
            )  # [G, L + R]
        self.start = len(prompt) - 1

    def update(self):
        with grpo.plain_attention(self.model):
            hidden = self.model.base_model(self.rows[:, :-1], use_cache=False)[0][:, self.start :]  # [G, R, H]
        logits, targets = self.model.lm_head(hidden), self.rows[:, self.start + 1 :]  # [G, R, V], [G, R]
        logps = logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)  # [G, R]
        advantages = grpo.group_advantages(torch.arange(G).float())[:, None].expand_as(logps)
        loss, _ = grpo.policy_loss(logps, logps.detach(), advantages)
        self.optimizer.zero_grad(set_to_none=True)
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def peak_mb(work) -> float:
    """Return the peak, in MB, of the tensors that `work` makes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    steps = (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(accumulate(steps, initial=0)) / 2**20


def measure(side, prompt, tokens) -> tuple[float, float]:
    """Return the seconds of a rollout and of its update."""
    began = time.perf_counter()
    side.rollout(prompt, tokens)
    between = time.perf_counter()
    side.update()
    return between - began, time.perf_counter() - between


def against_repeated(args) -> None:
    model = make_model(args.vocabulary)
    sides = {side.name: side for side in (Repeated(model), OursPlain(make_model(args.vocabulary)), Ours(model))}
    print(f"{'tokens':<9}{'rollout, plain':>19}{'rollout, fast':>19}{'update':>19}{'both':>8}"
          f"{'memory: rollout':>22}{'update':>14}")
    for length, tokens in ROWS:
        prompt = torch.randint(args.vocabulary, (length,))
        memory = {}  # measured first, which is also the warm-up
        for name, side in sides.items():
            memory[name] = [peak_mb(lambda: side.rollout(prompt, tokens)), peak_mb(side.update)]
        rounds = []
        for i in range(args.rounds):
            order = sorted(sides, reverse=bool(i % 2))  # each goes first as often as the other
            rounds.append({name: measure(sides[name], prompt, tokens) for name in order})
        theirs, update = (statistics.median(seen["repeated"][i] for seen in rounds) for i in (0, 1))
        cells = [cell(rounds, theirs, name, 0) for name in ("plain", "fast")] + [cell(rounds, update, "fast", 1)]
        both = statistics.median(sum(seen["repeated"]) / sum(seen["fast"]) for seen in rounds)
        peaks = [f"{memory['repeated'][i]:9.0f}/{memory['fast'][i]:.0f} MB" for i in (0, 1)]
        print(f"{f'{length}/{tokens}':<9}" + "".join(cells) + f"{both:7.1f}x  " + "".join(peaks), flush=True)


def cell(rounds: list[dict], theirs: float, name: str, part: int) -> str:
    """Return the text of one cell: the seconds of the repeated form and of one of ours, and their ratio."""
    own = statistics.median(seen[name][part] for seen in rounds)
    ratio = statistics.median(seen["repeated"][part] / seen[name][part] for seen in rounds)
    return f"{theirs:7.2f}/{own:.2f} s {ratio:4.1f}x"


def decode_both(model, prompt, rows: int, sampling: grpo.Sampling, tokens: int) -> tuple[float, float, float]:
    """Return the seconds of transformers' generate, of our decoder, and of the draws in our decoder."""
    choice = dict(do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k)
    began = time.perf_counter()
    with torch.no_grad(), grpo.plain_attention(model):
        model.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), num_return_sequences=rows,
                       max_new_tokens=tokens, pad_token_id=0, **choice)
    theirs, draw_token, drawing = time.perf_counter() - began, grpo.draw_token, 0.0

    def timed(*arguments):
        nonlocal drawing
        began, grpo.draw_token = time.perf_counter(), draw_token  # it may call itself for parts of the rows
        found = draw_token(*arguments)
        drawing, grpo.draw_token = drawing + time.perf_counter() - began, timed
        return found

    grpo.draw_token = timed
    began = time.perf_counter()
    grpo.rollout(model, [prompt], [list(range(rows))], sampling=sampling, max_new_tokens=tokens, eos_ids=[])
    ours, grpo.draw_token = time.perf_counter() - began, draw_token
    return theirs, ours, drawing


def against_sampling(args) -> None:
    model, tokens = make_model(REAL_VOCABULARY), 16
    model.lm_head.weight.data *= 20
    assert grpo.enable_sharing(model) == ""
    prompt = torch.randint(REAL_VOCABULARY, (64,))
    print(f"{'rows':<6}{'sampling':<24}{'decoding':>22}{'a step: drawing':>20}{'the model':>12}")
    for rows in (8, 64):
        for name, sampling in SAMPLINGS.items():
            decode_both(model, prompt, rows, sampling, 2)
            seen = [decode_both(model, prompt, rows, sampling, tokens) for _ in range(args.rounds)]
            theirs, ours, drawing = (statistics.median(column) for column in zip(*seen))
            ratio = statistics.median(row[0] / row[1] for row in seen)
            step, model_part = 1e3 * drawing / tokens, 1e3 * (ours - drawing) / tokens
            print(f"{rows:<6}{name:<24}{theirs:8.2f}/{ours:.2f} s {ratio:4.1f}x{step:16.1f} ms{model_part:9.1f} ms",
                  flush=True)


def beside_trl(model, ours, length: int, tokens: int, args) -> list[tuple[float, float]]:
    """Return (seconds of TRL's GRPOTrainer with its rollout, our seconds) for each step. Ours runs right after it."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    names = [f"w{i}" for i in range(args.vocabulary - 2)]
    words = {word: i for i, word in enumerate([*names, "[pad]", "[end]"])}
    core = Tokenizer(models.WordLevel(words, unk_token="[pad]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[pad]", eos_token="[end]")
    draw = random.Random(0)
    prompts = [" ".join(draw.choices(names, k=length)) for _ in range(64)]
    prompt, seconds = torch.randint(args.vocabulary, (length,)), []

    class Watch(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds.append((time.perf_counter() - self.began, sum(measure(ours, prompt, tokens))))

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config = GRPOConfig(
            output_dir=folder, max_steps=args.rounds + 1, num_generations=G, per_device_train_batch_size=G,
            max_completion_length=tokens, learning_rate=1e-9, use_cpu=True, bf16=False, report_to=[],
            save_strategy="no", logging_strategy="no", beta=0.0, temperature=1.0, top_k=0,
            gradient_checkpointing=False, disable_tqdm=True, generation_kwargs={"min_new_tokens": tokens},
        )
        GRPOTrainer(
            model=model, args=config, processing_class=tokenizer, callbacks=[Watch()],
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            reward_funcs=lambda completions, **_: [draw.random() for _ in completions],
        ).train()
    return seconds[1:]


def against_trl(args) -> None:
    try:
        import datasets  # noqa: F401
        import trl
    except ImportError as error:
        raise SystemExit(f"bench_grpo: --against trl needs the package {error.name}: pip install trl") from None
    print(f"TRL {trl.__version__}: a whole step, rollout and update, with its optimiser")
    for length, tokens in ROWS:
        ours = Ours(make_model(args.vocabulary))
        pairs = beside_trl(make_model(args.vocabulary), ours, length, tokens, args)
        theirs, own = (statistics.median(column) for column in zip(*pairs))
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"{f'{length}/{tokens}':<9}{theirs:6.2f}/{own:.2f} s {ratio:4.1f}x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--against", choices=["repeated", "trl", "sampling"], default="repeated")
    args = parser.parse_args()
    torch.set_num_threads(1)
    where = f"1 thread of {os.cpu_count()} cores, fp32"
    vocabulary = REAL_VOCABULARY if args.against == "sampling" else args.vocabulary
    print(f"G = {G}, vocabulary {vocabulary}, {where}, torch {torch.__version__}")
    {"repeated": against_repeated, "trl": against_trl, "sampling": against_sampling}[args.against](args)


if __name__ == "__main__":
    main()
