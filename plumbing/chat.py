"""How a model is spoken to, through its own chat template, and how what it answers is brought into one form.

Families mark the thinking part in their own ways: Qwen3 puts it between <think> and </think> (and its template may
write the first of them itself), Mistral has marks of its own, GPT-OSS sends whole messages through channels, of which
only the final one is the answer (OpenAI's "harmony" format). rank_prompt.py knows one form, Qwen3's; `decode` is the
one place where the others are turned into it.
"""
from pathlib import Path

import torch
from tqdm import tqdm

from plumbing import ranks
from plumbing.problems import BadInput, write_atomic

OPEN, CLOSE = "<think>", "</think>"
SAME = {"[THINK]": OPEN, "[/THINK]": CLOSE, "<seed:think>": OPEN, "</seed:think>": CLOSE}  # other names for the two
CHANNEL, MESSAGE, END = "<|channel|>", "<|message|>", "<|end|>"  # harmony's
MARKS = {OPEN, CLOSE, *SAME}
HARMONY = {CHANNEL, MESSAGE, END}  # only where the template has channels: elsewhere <|end|> is just an end of text
PLAIN = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n\n{% endfor %}"
# some templates ask for today's date: a run that is resumed tomorrow would ask something else than it did today
ALWAYS_TODAY = "{% macro strftime_now(format) %}2026-01-01{% endmacro %}"
LONGEST_SHOWN = 2000  # characters of a prompt that is printed; the file has all of it

# ------------------------------------------------------------------------------------------------------- the template


def render(tokenizer, prompt: str, thinking: bool = True, effort: str = "") -> str:
    """One user turn as the model reads it, up to where its answer begins."""
    extra = {"reasoning_effort": effort} if effort else {}
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], chat_template=ALWAYS_TODAY + tokenizer.get_chat_template(),
        tokenize=False, add_generation_prompt=True, enable_thinking=thinking, **extra,
    )


def encode(tokenizer, prompt: str, thinking: bool, effort: str = "") -> torch.Tensor:
    """One user turn as token ids [L], through the model's own chat template."""
    text = render(tokenizer, prompt, thinking, effort)
    return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)


def check_template(tokenizer, name: str, effort: str) -> None:
    """Gives a tokenizer without a template a plain one, and says in a line what a template takes no notice of.

    Raises BadInput where that is --reasoning-effort, which nobody gives without meaning it.
    """
    if not tokenizer.chat_template:
        tqdm.write(f"{name} has no chat template: the prompt is given as plain text")
        tokenizer.chat_template = PLAIN
    elif render(tokenizer, "?", True) == render(tokenizer, "?", False):
        tqdm.write(f"{name}: its chat template has no switch for thinking, so --thinking changes nothing")
    if effort and render(tokenizer, "?", effort="low") == render(tokenizer, "?", effort="high"):
        raise BadInput(f"--reasoning-effort {effort}: the chat template of {name} does not use it; leave it out")


# ----------------------------------------------------------------------------------------------------------- the answer


def decode(tokenizer, prompt: torch.Tensor, answer: torch.Tensor) -> str:
    """An answer's text in the form that rank_prompt.py reads: <think>, the thinking part, </think>, what counts.

    prompt, answer: token ids [L], [R]. Special tokens are left out, but for those that mark the thinking part. Where
    the template itself opens that part, the opening is put back in front.
    """
    channels = CHANNEL in str(tokenizer.chat_template)
    marks = HARMONY if channels else MARKS
    names = tokenizer.added_tokens_decoder
    dropped = {i for i, token in names.items() if token.special and token.content not in marks}
    text = one_name(tokenizer.decode([i for i in answer.tolist() if i not in dropped]))
    if channels:
        return final_channel(text)
    opened = one_name(tokenizer.decode(prompt[-4:])).rstrip().endswith(OPEN)
    return (OPEN + "\n" if opened else "") + text


def encode_answers(tokenizer, prompt: torch.Tensor, texts: list[str], end: int) -> list[torch.Tensor]:
    """What another model has answered, in this one's tokens, [R] each, with `end` behind it; without an opening that
    this one's template has written in the prompt [L] already."""
    opening = decode(tokenizer, prompt, prompt[:0])
    ids = [tokenizer(text.removeprefix(opening), add_special_tokens=False).input_ids for text in texts]
    return [torch.tensor([*own, end]) for own in ids]


def writes_one_form(tokenizer) -> bool:
    """Whether a model's own tokens mark the thinking part as rank_prompt.py reads it, or not at all."""
    template = str(tokenizer.chat_template)
    return CHANNEL not in template and not any(mark in template for mark in SAME)


def one_name(text: str) -> str:
    for other, mark in SAME.items():
        text = text.replace(other, mark)
    return text


def final_channel(text: str) -> str:
    """A harmony answer in the one form: all before its last message is thinking, and so is that one if it is not final.

    So an answer that was cut off before its final message, or that calls a tool instead, holds nothing that counts.
    """
    before, _, last = text.rpartition(CHANNEL)
    channel, began, content = last.partition(MESSAGE)
    if not began or channel.split()[:1] != ["final"]:
        return f"{OPEN}\n{text}"
    return f"{OPEN}\n{before}{CLOSE}{content.partition(END)[0]}"


# ----------------------------------------------------------------------------------------------------- what was asked


def show_first(out: Path, kind: str, tokenizer, prompt: torch.Tensor) -> None:
    """The first prompt of a kind, exactly as the model reads it: on the screen, and in full in out/prompts.txt.

    A wrong template or a missing thinking switch is seen here before a day is spent on it. Once in a run's life.
    """
    path, heading = out / "prompts.txt", f"----- the first prompt for {kind} -----\n"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if ranks.rank() or heading in text:
        return
    asked = tokenizer.decode(prompt)
    write_atomic(path, f"{text}{heading}{asked}\n\n")
    half, more = LONGEST_SHOWN // 2, len(asked) - LONGEST_SHOWN
    shown = f"{asked[:half]}\n[... {more} characters, all in {path} ...]\n{asked[-half:]}" if more > 0 else asked
    tqdm.write(heading + shown + "\n-----")
