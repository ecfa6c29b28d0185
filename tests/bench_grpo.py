"""How much faster one prompt for G answers is: ours against repeating the prompt, in one run, taking turns.

    python tests/bench_grpo.py [--rounds 5] [--vocabulary 4096] [--against plain|trl] 2>/dev/null

One prompt, G = 8 answers of a fixed length, one thread, fp32, a random model of Qwen3's shape: hidden 256, 6 layers,
8 heads, 4 KV heads. `plain` is the repeated form written the best way we can: transformers' generate with
num_return_sequences, then one batch of 8 rows through fused attention, the head on answer positions only, one backward
pass and one optimiser step. `trl` is TRL's GRPOTrainer (pip install trl), which is timed step by step.

Seconds are theirs/ours, medians; a ratio is theirs by ours, the median over rounds in which both took their turn.
Memory is what the tensors that were made meanwhile held at their peak, theirs/ours.
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
import prefix  # noqa: E402

ROWS = ((512, 16), (2048, 16), (512, 128))  # prompt and answer tokens
G = 8


def make_model(vocabulary: int):
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=4096, eos_token_id=None, bos_token_id=None,
    )).eval()


class Ours:
    name = "ours"

    def __init__(self, model):
        self.model, self.optimizer = model, torch.optim.SGD(model.parameters(), lr=0.0)
        prefix.shares_prompts(model)

    def rollout(self, prompt, tokens):
        self.rollouts = grpo.rollout(self.model, [prompt], answers=G, max_new_tokens=tokens, eos_ids=[])

    def update(self):
        for r in self.rollouts:
            r.rewards = torch.arange(G).float()
        grpo.update(self.model, self.optimizer, self.rollouts)


class Plain:
    name = "plain"

    def __init__(self, model):
        self.model, self.optimizer = model, torch.optim.SGD(model.parameters(), lr=0.0)

    def rollout(self, prompt, tokens):
        with torch.no_grad():
            self.rows = self.model.generate(
                prompt[None], attention_mask=torch.ones_like(prompt[None]), num_return_sequences=G, do_sample=True,
                top_k=0, max_new_tokens=tokens, pad_token_id=0,
            )  # [G, L + R]
        self.start = len(prompt) - 1

    def update(self):
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
    """The most MB of tensors that were alive at a time, of those made meanwhile."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    steps = (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(accumulate(steps, initial=0)) / 2**20


def measure(side, prompt, tokens) -> tuple[float, float]:
    """Seconds of a rollout and of its update."""
    began = time.perf_counter()
    side.rollout(prompt, tokens)
    between = time.perf_counter()
    side.update()
    return between - began, time.perf_counter() - between


def against_plain(args) -> None:
    model = make_model(args.vocabulary)
    sides = {"plain": Plain(model), "ours": Ours(model)}
    print(f"{'tokens':<9}{'rollout':>16}{'update':>20}{'both':>8}{'memory: rollout':>20}{'update':>14}")
    for length, tokens in ROWS:
        prompt = torch.randint(args.vocabulary, (length,))
        memory = {}  # measured first, which warms up too
        for name, side in sides.items():
            memory[name] = [peak_mb(lambda: side.rollout(prompt, tokens)), peak_mb(side.update)]
        rounds = []
        for i in range(args.rounds):
            order = sorted(sides, reverse=bool(i % 2))  # each goes first as often as the other
            seen = {name: measure(sides[name], prompt, tokens) for name in order}
            rounds.append([*seen["plain"], sum(seen["plain"]), *seen["ours"], sum(seen["ours"])])
        times = [statistics.median(column) for column in zip(*rounds)]
        ratio = [statistics.median(row[i] / row[i + 3] for row in rounds) for i in range(3)]
        print(
            f"{f'{length}/{tokens}':<9}{times[0]:6.2f}/{times[3]:.2f} s {ratio[0]:3.1f}x"
            f"{times[1]:8.2f}/{times[4]:.2f} s {ratio[1]:4.1f}x{ratio[2]:6.1f}x"
            + "".join(f"{p:9.0f}/{o:.0f} MB" for p, o in zip(memory["plain"], memory["ours"])), flush=True,
        )


def beside_trl(model, ours, length: int, tokens: int, args) -> list[tuple[float, float]]:
    """Seconds of each training step of TRL's GRPOTrainer, its rollouts included, and of ours, taken right after it."""
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
    parser.add_argument("--against", choices=["plain", "trl"], default="plain")
    args = parser.parse_args()
    torch.set_num_threads(1)
    where = f"1 thread of {os.cpu_count()} cores, fp32"
    print(f"G = {G}, vocabulary {args.vocabulary}, {where}, torch {torch.__version__}")
    {"plain": against_plain, "trl": against_trl}[args.against](args)


if __name__ == "__main__":
    main()
