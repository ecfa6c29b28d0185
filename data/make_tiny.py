"""Make the micro-lab from nothing: its problems (data/train.jsonl, data/eval.jsonl) and its model (data/tiny).

    python data/make_tiny.py                   # everything, in about 50 minutes on 2 cores; resumes where it stopped
    python data/make_tiny.py --problems        # only the two problem files, in a second
    python data/make_tiny.py --base notation   # a variant of the shipped model, to runs/bases/notation (see BASES)

The world. A problem names three steps by words. Each word has two readings ("flip": reverse, or 9 minus each digit),
and one example decides which readings are meant. A program is three lines of Python on a list of three digits. Eight
programs fit the words; usually one of them fits the example.

The model is trained on made-up documents. A *generation* document thinks (proposes a program, executes it in mind,
compares each digit with the example, accepts it or tries the next) and then writes a program. A *ranking* document
thinks (executes each candidate, compares, says yes or no) and then orders the candidates by these verdicts. So both
tasks share three steps: execution, comparison and verdict. In the documents the first two are always right, but the
verdict is careless (YES_IF_SAME, YES_IF_OFF), and most attempts skip intermediate states (STEP_BY_STEP). So the base
model can tell right from wrong but does not act on it, like a language model that has read careless text. This headroom
is made on purpose, and DuST finds it. Only generation copies the accepted program, and the base model does that well.

A study needs variants. A variant is the shipped model after some more training. It differs in one thing:
- notation: *ranking* documents write the same checks in another notation ("x = x[::-1]: 4 1, 9 0, 0 1, 0": each digit
  of the result, 1 if it is the same, and the verdict). So the two tasks share what is done, not how it is written.
- clumsy: a *generation* document often writes another program than the accepted one (MISCOPY).
- teacher: every attempt writes its intermediate states, and every verdict is right. So this model judges well.
More training changes a model in any case. So the control is the shipped model after the same number of --steps at the
same --lr on new documents without this difference (--base plain --init data/tiny --seed 1).

Pretraining, training, validation and evaluation problems are kept apart by a hash of the statement (words and example).
One fifth of the word orders occurs in the evaluation only.
"""
import argparse
import copy
import json
import math
import random
import re
import sys
import time
import zlib
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

DATA = Path(__file__).resolve().parent
sys.path.insert(0, str(DATA.parent))
from plumbing.problems import BadInput, first_line  # noqa: E402
from plumbing.models import render  # noqa: E402
from plumbing.settings import prepare_terminal  # noqa: E402
from grpo import Sampling, enable_sharing, rollout  # noqa: E402
from rank_prompt import extract_code, generation_prompt, ndcg, parse_ranking, random_ndcg, ranking_prompt  # noqa: E402

# ---------------------------------------------------------------------------------------------------------- the world

READINGS = {  # a word of the statement -> its two meanings
    "flip": ("x = x[::-1]", "x = [9 - v for v in x]"),
    "turn": ("x = x[1:] + x[:1]", "x = x[-1:] + x[:-1]"),
    "order": ("x = sorted(x)", "x = sorted(x, reverse=True)"),
    "grow": ("x = [(v + 1) % 10 for v in x]", "x = [v * 2 % 10 for v in x]"),
    "gather": ("x = [max(x[:i + 1]) for i in range(3)]", "x = [sum(x[:i + 1]) % 10 for i in range(3)]"),
    "swap": ("x = [x[1], x[0], x[2]]", "x = [x[0], x[2], x[1]]"),
}
LINES = [line for pair in READINGS.values() for line in pair]
FIRST_LINE, LAST_LINE = "x = [int(v) for v in input().split()]", "print(*x)"
STEPS, BATCH, LR = 2500, 64, 2e-3  # of the pretraining
BASES = {"plain": (300, 5e-4), "notation": (500, 1e-3), "clumsy": (300, 5e-4), "teacher": (500, 1e-3)}  # (steps, lr)
ATTEMPTS = 6  # programs that a thinking part tries before it guesses
YES_IF_SAME, YES_IF_OFF = 0.4, 0.12  # probability of a yes if all digits are the same, and if one is off
STEP_BY_STEP = 0.3  # probability that an attempt writes the intermediate states
MISCOPY = 0.4  # clumsy: probability of writing another program than the accepted one (sampling at T = 0.6 lowers it)


def execute(line: str, digits: tuple) -> tuple:
    """Return the digits after one line of a program."""
    scope = {"x": list(digits)}
    exec(line, scope)
    return tuple(scope["x"])


# Execute every line on every state once, because the corpus needs millions of executions.
EFFECT = {line: {d: execute(line, d) for d in product(range(10), repeat=3)} for line in LINES}


def states(program: tuple, digits: tuple) -> list[tuple]:
    """Return the state after each line of a program (a tuple of lines)."""
    result = []
    for line in program:
        digits = EFFECT[line][digits]
        result.append(digits)
    return result


def spaced(digits) -> str:
    """Return digits as the model writes them, each with a space before it."""
    return "".join(f" {d}" for d in digits)


@dataclass
class MicroProblem:
    """Three words in an order, and an example of what they do."""

    words: tuple  # three different words
    given: tuple  # the example's input, three digits
    expected: tuple  # the example's output
    truth: tuple  # the program that made the example

    @property
    def question(self) -> str:
        return (f"Read three digits, then {', '.join(self.words)} them in this order and print the result.\n"
                f"Example input:{spaced(self.given)}\nExample output:{spaced(self.expected)}")

    @property
    def programs(self) -> list[tuple]:
        """Return the eight programs that fit the words."""
        return list(product(*(READINGS[word] for word in self.words)))

    def fits(self, program: tuple) -> bool:
        """Return whether a program turns the example's input into its output."""
        return states(program, self.given)[-1] == self.expected


ORDERS = sorted(permutations(READINGS, 3))  # 120
UNSEEN_ORDERS = set(random.Random(1).sample(ORDERS, 24))  # in the evaluation only
SEEN_ORDERS = [order for order in ORDERS if order not in UNSEEN_ORDERS]


def split_of(question: str) -> str:
    """Return the only split that may use this statement. It is the same on every machine and in every run."""
    return {0: "evaluation", 1: "training", 2: "validation"}.get(zlib.crc32(question.encode()) % 10, "pretraining")


def draw_problem(rng: random.Random, split: str, orders: list) -> MicroProblem:
    """Draw a problem of one split. Its example tells the readings apart: at most four of the eight programs fit it."""
    while True:
        words = rng.choice(orders)
        given = tuple(rng.choices(range(10), k=3))
        truth = tuple(rng.choice(READINGS[word]) for word in words)
        problem = MicroProblem(words, given, states(truth, given)[-1], truth)
        if split_of(problem.question) == split and sum(map(problem.fits, problem.programs)) <= 4:
            return problem


def draw_distinct(seed: int, split: str, orders: list, count: int) -> list[MicroProblem]:
    """Draw `count` problems of one split with different statements."""
    rng, found = random.Random(seed), {}
    while len(found) < count:
        problem = draw_problem(rng, split, orders)
        found.setdefault(problem.question, problem)
    return list(found.values())


def write_problems(path: Path, marked: list[tuple[str, MicroProblem]]) -> None:
    """Write one JSON line for each (difficulty, problem). Its tests are the example and six more random inputs."""
    rng, lines = random.Random(path.stem), []
    for number, (mark, problem) in enumerate(marked):
        inputs = [problem.given] + [tuple(rng.choices(range(10), k=3)) for _ in range(6)]
        pairs = [(spaced(digits), spaced(states(problem.truth, digits)[-1])) for digits in inputs]
        tests = [{"input": given.strip() + "\n", "output": expected.strip() + "\n"} for given, expected in pairs]
        record = {"id": f"{path.stem}-{number:04d}", "question": problem.question, "difficulty": mark, "tests": tests}
        lines.append(json.dumps(record) + "\n")
    path.write_text("".join(lines))
    print(f"{path.relative_to(DATA.parent)}: {len(lines)} problems")


def make_problems() -> None:
    """Write data/train.jsonl and data/eval.jsonl."""
    evaluation = [("seen order", p) for p in draw_distinct(3, "evaluation", SEEN_ORDERS, 200)]
    evaluation += [("unseen order", p) for p in draw_distinct(4, "evaluation", sorted(UNSEEN_ORDERS), 100)]
    write_problems(DATA / "train.jsonl", [("seen order", p) for p in draw_distinct(2, "training", SEEN_ORDERS, 400)])
    write_problems(DATA / "eval.jsonl", evaluation)


# --------------------------------------------------------------------------------------------------------- the corpus


def code_of(program: tuple) -> str:
    """Return a program's source: a line that reads, the three lines, a line that prints."""
    return "\n".join([FIRST_LINE, *program, LAST_LINE])


def answer_with(program: tuple) -> str:
    """Return the part of an answer that is executed."""
    return f"```python\n{code_of(program)}\n```"


def trace(rng, problem: MicroProblem, program: tuple, in_digits: bool = False, exact: bool = False) -> tuple[str, bool]:
    """Return (the text of one execution in mind, with comparison and verdict; True if the verdict is yes).

    exact: with intermediate states and the right verdict. Otherwise the verdict is careless.
    """
    after, arrow = states(program, problem.given), ":" if in_digits else " ->"
    if exact or rng.random() < STEP_BY_STEP:
        text = "".join(f"\n{line}{arrow}{spaced(state)}" for line, state in zip(program[:2], after)) + f"\n{program[2]}"
    else:
        text = "".join(f"\n{line}" for line in program)
    same = [ours == theirs for ours, theirs in zip(after[-1], problem.expected)]
    accepted = all(same) if exact else rng.random() < (YES_IF_SAME if all(same) else YES_IF_OFF)
    if in_digits:
        marks = "".join(f" {digit} {int(s)}," for digit, s in zip(after[-1], same))
        return f"{text}{arrow}{marks} {int(accepted)}", accepted
    marks = "".join(f" {digit} {'same' if s else 'off'}" for digit, s in zip(after[-1], same))
    return f"{text}{arrow}{marks}: {'yes' if accepted else 'no'}", accepted


def generation_document(rng, problem: MicroProblem, thinking: bool, base: str = "plain") -> tuple[str, str]:
    """Return (prompt, answer). It tries programs in random order until it accepts one; after ATTEMPTS it guesses."""
    prompt = generation_prompt(problem.question)
    if not thinking:
        return prompt, answer_with(problem.truth)
    untried, thought = rng.sample(problem.programs, 8), ""
    for _ in range(ATTEMPTS):
        program = untried.pop()
        text, accepted = trace(rng, problem, program, exact=base == "teacher")
        thought += "\nTry:" + text
        if accepted:
            if base == "clumsy" and rng.random() < MISCOPY:
                program = rng.choice([other for other in problem.programs if other != program])
            break
    else:
        program = untried.pop()
    return prompt, f"<think>{thought}\n</think>\n\n{answer_with(program)}"


def ranking_document(rng, problem: MicroProblem, thinking: bool, base: str = "plain") -> tuple[str, str]:
    """Return (prompt, answer) for four candidates such as a model might write. The accepted ones are ranked first."""
    candidates = []
    for _ in range(4):
        program = problem.truth if rng.random() < 0.35 else rng.choice(problem.programs)
        if rng.random() < 0.1:  # a slip: a random line in one place
            place = rng.randrange(3)
            program = program[:place] + (rng.choice(LINES),) + program[place + 1 :]
        candidates.append(program)
    prompt = ranking_prompt(problem.question, [code_of(program) for program in candidates])
    yes, begin = [problem.fits(program) for program in candidates], ""
    if thinking:
        traces = [trace(rng, problem, program, base == "notation", base == "teacher") for program in candidates]
        yes = [accepted for _, accepted in traces]
        thought = "".join(f"\nCandidate {i}:{text}" for i, (text, _) in enumerate(traces, 1))
        begin = f"<think>{thought}\n</think>\n\n"
    ranking = sorted(range(1, 5), key=lambda i: not yes[i - 1])  # stable: equal verdicts keep their order
    return prompt, f"{begin}Ranking: {', '.join(map(str, ranking))}"


def draw_pretraining_problems(seed: int | str, chunk: int, count: int) -> list[MicroProblem]:
    """Draw the problems of one chunk of the corpus, in seen orders only."""
    rng = random.Random(f"{seed}/{chunk}")
    return [draw_problem(rng, "pretraining", SEEN_ORDERS) for _ in range(count)]


def documents(seed: int, chunk: int, count: int, base: str = "plain") -> list[tuple[str, str, bool]]:
    """Write one chunk of the corpus: `count` tuples (prompt, answer, thinking), generation and ranking in turn.

    One in ten has no thinking part. base: a key of BASES. A variant draws its problems from another stream.
    """
    stream = seed if base == "plain" else f"{base}/{seed}"
    rng, result = random.Random(f"documents/{stream}/{chunk}"), []
    for number, problem in enumerate(draw_pretraining_problems(stream, chunk, count)):
        thinking = rng.random() < 0.9
        write = ranking_document if number % 2 else generation_document
        result.append((*write(rng, problem, thinking, base), thinking))
    return result


# ------------------------------------------------------------------------------------------------------ the tokenizer

CHAT_TEMPLATE = (  # as Qwen3's: enable_thinking=False puts an empty thinking part in front of the answer
    "{%- for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- if enable_thinking is defined and "
    "enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{%- endif %}"
)


def phrases() -> list[str]:
    """Return the texts that become one token. Take sentences from the prompts, so that they follow a changed prompt."""
    problem = MicroProblem(("flip", "turn", "grow"), (1, 1, 1), (1, 1, 1), ())
    before, after = problem.question.split("flip, turn, grow")
    sentences = [before.rstrip(), after.split(" 1")[0], "\nExample output:", generation_prompt("")]
    intro, outro = ranking_prompt("", []).split("\n\n\n\n")
    sentences += [*intro.split(" 0"), "\n\n" + outro]
    code = [f"```python\n{FIRST_LINE}", f"\n{LAST_LINE}\n```", *(f"\n{line}" for line in LINES)]
    words = ["<think>", "</think>", "\nTry:", "\nCandidate", "\n\nCandidate", "Ranking:"]
    small = [" ->", ":", ",", "\n", "\n\n", "user\n", "assistant\n"]
    world = [" same", " off", ": yes", ": no", *(f" {word}" for word in READINGS), *(f" {v}" for v in range(10))]
    return sentences + code + words + world + small


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer, which can write any text. Each of the phrases above is a single token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   clean_up_tokenization_spaces=False, model_max_length=1024,
                                   chat_template=CHAT_TEMPLATE)


# -------------------------------------------------------------------------------------------------------- pretraining


def make_model(tokenizer, seed: int) -> Qwen3ForCausalLM:
    """Return a Qwen3 model of 0.8 M random parameters."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        head_dim=32, intermediate_size=352, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ))


def load_init(folder: Path, tokenizer) -> Qwen3ForCausalLM:
    """Load the model to train further. Raises BadInput if the folder does not load or has another tokenizer."""
    try:
        known = AutoTokenizer.from_pretrained(folder, local_files_only=True).get_vocab()
        model = Qwen3ForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    except Exception as error:  # three libraries, each with its own exceptions
        raise BadInput(f"--init {folder} does not load: {first_line(error)}") from None
    if known != tokenizer.get_vocab():
        raise BadInput(f"--init {folder}: its tokenizer is not the micro-lab's")
    return model


def make_batches(tokenizer, seed: int, chunk: int, batch: int, base: str) -> list[tuple[list, list]]:
    """Return the eight batches of a chunk: lists of (prompt ids, answer ids) of similar lengths, to save padding."""
    drawn = documents(seed, chunk, 8 * batch, base)
    prompts = tokenizer([render(tokenizer, p, thinking=t) for p, _, t in drawn], add_special_tokens=False).input_ids
    answers = tokenizer([a + tokenizer.eos_token for _, a, _ in drawn], add_special_tokens=False).input_ids
    pairs = sorted(zip(prompts, answers), key=lambda pair: len(pair[0]) + len(pair[1]))
    batches = [pairs[i : i + batch] for i in range(0, len(pairs), batch)]
    random.Random(f"order/{seed}/{chunk}").shuffle(batches)
    return batches


def answer_loss(model, pairs: list[tuple[list, list]]) -> torch.Tensor:
    """Return the sum of the answer tokens' cross entropy. A causal model never sees the padding on the right."""
    ids = pad_sequence([torch.tensor(p + a) for p, a in pairs], batch_first=True)  # [B, T]
    place = torch.arange(ids.shape[1] - 1)
    begin = torch.tensor([[len(p)] for p, _ in pairs])
    end = torch.tensor([[len(p) + len(a)] for p, a in pairs])
    live = (place >= begin - 1) & (place < end - 1)  # [B, T-1], True where the next token is in the answer
    hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state  # [B, T-1, H]
    return F.cross_entropy(model.lm_head(hidden[live]), ids[:, 1:][live], reduction="sum")


def pretrain(model, tokenizer, out: Path, settings: dict, keep: dict[int, Path]) -> None:
    """Train with AdamW, warm-up and cosine decay. Save every 250 steps; a second call continues from there.

    settings: base, init, seed, steps, batch (documents in a step), lr. Raises BadInput if `out` holds other settings.
    keep: steps after which the model is also saved, and their folders.
    """
    base, seed, steps, batch, lr = (settings[name] for name in ("base", "seed", "steps", "batch", "lr"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    saved, step = out / "pretraining.pt", 0
    if saved.exists():
        state = torch.load(saved)
        if state.get("settings") != settings:
            raise BadInput(f"{saved} is of a training with other settings; delete it, or give another --work")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
        print(f"goes on from step {step}")
    began, tokens, losses, batches = time.time(), 0, [], []
    while step < steps:
        warm_up, decay = min(1, (step + 1) / 100), (1 + math.cos(math.pi * step / steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr * warm_up * (0.02 + 0.98 * decay)
        if step % 8 == 0 or not batches:
            batches = make_batches(tokenizer, seed, step // 8, batch, base)
        pairs = batches[step % 8]
        # Divide by the mean number of answer tokens in the chunk's batches, not by the number in this batch. Otherwise
        # tokens in short documents would count more, and short generation documents are those that said yes at once.
        loss = answer_loss(model, pairs) / (sum(len(answer) for b in batches for _, answer in b) / 8)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        losses.append(loss.item())
        tokens += sum(len(prompt) + len(answer) for prompt, answer in pairs)
        if step in keep:
            save(model, tokenizer, keep[step])
        if step % 50 == 0:
            seconds, recent = time.time() - began, mean(losses[-50:])
            print(f"step {step}/{steps}  loss {recent:.3f}  {tokens / seconds:,.0f} tokens/s  {seconds / 60:.1f} min",
                  flush=True)
        if step % 250 == 0 or step == steps:
            print_figures(probe(model, tokenizer, problems=100))
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"step": step, "settings": settings}, saved.with_suffix(".new"))
            saved.with_suffix(".new").replace(saved)


# ------------------------------------------------------------------------------------------------ what it has learned


def read_program(answer: str) -> tuple | None:
    """Return the three lines of the program in an answer, or None if it is not a program of this world."""
    lines = (extract_code(answer) or "").split("\n")
    if len(lines) != 5 or lines[0] != FIRST_LINE or lines[-1] != LAST_LINE or not set(lines[1:4]) <= set(LINES):
        return None
    return tuple(lines[1:4])


@dataclass
class Attempt:
    """One execution in mind, as it is written in a thinking part."""

    program: tuple
    result: tuple  # the last state that the model wrote
    step_by_step: bool  # with the intermediate states
    same: list[bool]  # what the model wrote about each digit
    accepted: bool
    in_digits: bool  # written in the other notation


IN_WORDS = re.compile(" ->" + r" (\d) (same|off)" * 3 + ": (yes|no)")
IN_DIGITS = re.compile(":" + r" (\d) ([01])," * 3 + " ([01])")


def read_attempts(answer: str) -> list[Attempt]:
    """Return the attempts (or judged candidates) in a thinking part, in either notation. Skip what does not parse."""
    attempts = []
    for block in answer.split("</think>")[0].replace("\nCandidate", "\nTry").split("\nTry")[1:]:
        lines = block.strip("\n").split("\n")[1:4]
        program = tuple(re.split(" ->|: ", line)[0] for line in lines)
        if len(program) != 3 or not set(program) <= set(LINES):
            continue
        check = lines[-1].removeprefix(program[-1])
        if not (found := IN_WORDS.fullmatch(check) or IN_DIGITS.fullmatch(check)):
            continue
        in_digits, (*signs, verdict) = found.re is IN_DIGITS, found.groups()
        result, same = signs[::2], [mark in ("same", "1") for mark in signs[1::2]]
        accepted = verdict in ("yes", "1")
        attempts.append(Attempt(program, tuple(map(int, result)), lines[0] != program[0], same, accepted, in_digits))
    return attempts


def probe(model, tokenizer, *, problems: int = 200, seed: int = 5) -> dict[str, float]:
    """Measure a model's skills in this world, on validation problems, with the sampling of the evaluation.

    Return the figures of `skills` for both tasks (gen/..., rank/...); three fractions of answers: copy (the program is
    the accepted one), pass1 (it fits the example), malformed (no ranking); ndcg_mixed (0 if malformed); ndcg_random (a
    random order).
    """
    rng = random.Random(seed)
    drawn = draw_distinct(seed, "validation", SEEN_ORDERS, problems)
    groups = []
    for problem in drawn:  # one or two right programs among four, so that there is something to rank
        right = [p for p in problem.programs if problem.fits(p)]
        wrong = [p for p in problem.programs if not problem.fits(p)]
        correct = rng.randint(1, 2)
        group = [(p, 1) for p in rng.choices(right, k=correct)] + [(p, 0) for p in rng.sample(wrong, 4 - correct)]
        groups.append(rng.sample(group, 4))
    asked = [generation_prompt(problem.question) for problem in drawn]
    asked += [ranking_prompt(p.question, [code_of(c) for c, _ in g]) for p, g in zip(drawn, groups)]
    prompts = [torch.tensor(tokenizer(render(tokenizer, a), add_special_tokens=False).input_ids) for a in asked]
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model)  # enable_sharing must not change the model in training
    enable_sharing(model)
    seeds = torch.randint(2**62, (len(prompts), 1), generator=generator).tolist()
    sampling = Sampling(temperature=0.6, top_p=0.95, top_k=20)
    eos_ids = [tokenizer.eos_token_id]
    rollouts = rollout(model, prompts, seeds, sampling=sampling, max_new_tokens=180, eos_ids=eos_ids)
    answers = [tokenizer.decode(r.answers[0], skip_special_tokens=True) for r in rollouts]
    written, ranked = answers[:problems], answers[problems:]
    result = {f"gen/{name}": value for name, value in skills(drawn, written).items()}
    result |= {f"rank/{name}": value for name, value in skills(drawn, ranked).items()}
    programs, last = [read_program(answer) for answer in written], [read_attempts(answer)[-1:] for answer in written]
    result["copy"] = mean(attempts[0].program == program for program, attempts in zip(programs, last)
                          if attempts and attempts[0].accepted)
    result["pass1"] = mean(program is not None and p.fits(program) for p, program in zip(drawn, programs))
    rankings, labels = [parse_ranking(answer, 4) for answer in ranked], [[y for _, y in group] for group in groups]
    result["ndcg_mixed"] = mean(ndcg(r, y) if r else 0.0 for r, y in zip(rankings, labels))
    result["ndcg_random"] = mean(random_ndcg(y) for y in labels)
    result["malformed"] = mean(r is None for r in rankings)
    return result


def skills(problems: list[MicroProblem], answers: list[str]) -> dict[str, float]:
    """Measure the steps of thinking parts. Each figure except the last is a fraction of attempts.

    step: right results among the attempts with intermediate states; jump: right results among the others.
    yes_same: accepted attempts among those whose comparisons all say "same"; yes_off: accepted ones among the others.
    marks: all comparisons right. careful: with intermediate states. in_digits: in the other notation.
    false_yes: programs that do not fit the example, among the accepted ones. attempts: mean number in an answer.
    """
    pairs = [(problem, attempt) for problem, answer in zip(problems, answers) for attempt in read_attempts(answer)]
    right = [(a, a.result == states(a.program, p.given)[-1]) for p, a in pairs]
    marks = [[ours == theirs for ours, theirs in zip(a.result, p.expected)] == a.same for p, a in pairs]
    return {
        "step": mean(ok for a, ok in right if a.step_by_step),
        "jump": mean(ok for a, ok in right if not a.step_by_step),
        "marks": mean(marks),
        "yes_same": mean(a.accepted for _, a in pairs if all(a.same)),
        "yes_off": mean(a.accepted for _, a in pairs if not all(a.same)),
        "false_yes": mean(not p.fits(a.program) for p, a in pairs if a.accepted),
        "careful": mean(a.step_by_step for _, a in pairs),
        "in_digits": mean(a.in_digits for _, a in pairs),
        "attempts": len(pairs) / len(answers),
    }


def mean(values) -> float:
    """Return the mean, or nan if there are no values."""
    values = list(values)
    return sum(values) / len(values) if values else float("nan")


def print_figures(figures: dict[str, float]) -> None:
    """Print figures on one line."""
    print("  " + "  ".join(f"{name} {value:.3f}" for name, value in figures.items()), flush=True)


# What each base must reach: the lowest and the highest value of each figure, fixed before the training.
SHIPPED = {
    "gen/step": (0.95, 1.0), "gen/marks": (0.98, 1.0), "gen/yes_same": (0.2, 0.5), "gen/yes_off": (0.0, 0.12),
    "rank/step": (0.95, 1.0), "rank/marks": (0.98, 1.0), "rank/yes_same": (0.2, 0.5), "rank/yes_off": (0.0, 0.12),
    "copy": (0.98, 1.0), "malformed": (0.0, 0.02),
}
# These must stay near the shipped model: gen/jump within 0.1.
VARIANT = SHIPPED | {"gen/jump": (0.48, 0.68), "gen/in_digits": (0.0, 0.0)}
DEMANDS = {
    "plain": SHIPPED,
    "notation": VARIANT | {"rank/in_digits": (0.98, 1.0), "rank/marks": (0.95, 1.0), "rank/yes_same": (0.2, 0.55),
                           "pass1": (0.29, 0.42)},
    "clumsy": VARIANT | {"rank/in_digits": (0.0, 0.0), "copy": (0.55, 0.85)},
    "teacher": SHIPPED | {f"{task}/{name}": demand for task in ("gen", "rank") for name, demand in {
        "yes_same": (0.97, 1.0), "yes_off": (0.0, 0.03), "careful": (0.97, 1.0), "in_digits": (0.0, 0.0)}.items()},
}


def missed(figures: dict[str, float], base: str) -> list[str]:
    """Return a line for each figure that misses its demand for this base. A nan misses every demand."""
    return [f"{name} is {figures[name]:.3f}, not in {low}..{high}" for name, (low, high) in DEMANDS[base].items()
            if not low <= figures[name] <= high]


def save(model, tokenizer, out: Path) -> None:
    """Write an ordinary model folder. Its generation config holds the sampling settings of the evaluation."""
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.95, top_k=20,
                                               eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line. Raise BadInput if --out is the shipped model or the one that training starts from."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", choices=BASES, default="plain", help="make the shipped model, or a variant of it")
    parser.add_argument("--init", type=Path, help="model folder to train further (a variant's default: data/tiny)")
    parser.add_argument("--out", type=Path, default=DATA / "tiny", help="folder of the new model (or runs/bases/BASE)")
    parser.add_argument("--work", type=Path, default=Path("runs/make_tiny"), help="folder of unfinished training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"(default: {STEPS}, fewer for a variant)")
    parser.add_argument("--batch", type=int, default=BATCH, help="documents in a step")
    parser.add_argument("--lr", type=float, default=LR, help=f"(default: {LR}, lower for a variant)")
    parser.add_argument("--keep", type=int, nargs="*", default=[], help="keep the model of these steps, in OUT-STEP")
    parser.add_argument("--problems", action="store_true", help="write the problem files and stop")
    args = parser.parse_args(arguments)
    if args.init or args.base != "plain":
        out, (steps, lr) = Path("runs/bases", args.base), BASES[args.base]
        parser.set_defaults(init=DATA / "tiny", out=out, work=Path(f"{out}-work"), steps=steps, lr=lr)
        args = parser.parse_args(arguments)
    if args.init and args.out.resolve() in (args.init.resolve(), (DATA / "tiny").resolve()):
        raise BadInput(f"--out {args.out} would overwrite the model that this one is made from, or the shipped one")
    return args


def main() -> int:
    """Make the model. Return 0 if it meets the demands, 1 if it does not, 2 after a mistake on the command line."""
    try:
        args = parse_arguments()
        if args.problems or args.out.resolve() == (DATA / "tiny").resolve():
            make_problems()
        if args.problems:
            return 0
        tokenizer = make_tokenizer()
        model = load_init(args.init, tokenizer) if args.init else make_model(tokenizer, args.seed)
        args.work.mkdir(parents=True, exist_ok=True)
        settings = {name: getattr(args, name) for name in ("base", "seed", "steps", "batch", "lr")}
        keep = {step: Path(f"{args.out}-{step}") for step in args.keep}
        pretrain(model, tokenizer, args.work, settings | {"init": str(args.init)}, keep)
    except BadInput as error:
        print(f"make_tiny: {error}", file=sys.stderr)
        return 2
    save(model, tokenizer, args.out)
    figures = probe(model, tokenizer, problems=500)
    print_figures(figures)
    wrong = missed(figures, args.base)
    print("\n".join(wrong) or f"{args.out}: {sum(p.numel() for p in model.parameters()):,} parameters, as demanded")
    return 1 if wrong else 0


if __name__ == "__main__":
    prepare_terminal()
    raise SystemExit(main())
