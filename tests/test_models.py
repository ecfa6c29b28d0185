"""Other families than the shipped model's: their templates, their answers, their weights; weights that really move,
adapters and memory."""
import contextlib
import copy
import json
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import errors
from jinja2 import TemplateError
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import (AutoModelForCausalLM, GenerationConfig, GPT2Config, GptOssConfig, LlamaConfig, OPTConfig,
                          PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig)

import dust
import rank_prompt
from conftest import SMALL
from plumbing import models, settings
from plumbing.problems import BadInput
from plumbing.models import (SmallStepAdam, add_lora, answer_text, check_template, count_parameters,
                             choose_optimizer, encode, encode_answers, find_model, full_name, load_checkpoint,
                             load_model, lora_disabled, make_optimizer, render, save_checkpoint, save_model,
                             show_first)
from test_rows import SHAPES
from test_dust import check_run, error_of, run_dust

torch.set_num_threads(1)

QWEN = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}"
        "<think>\n\n</think>\n\n{% endif %}")
THINKING = QWEN.split("{% if")[0] + "<think>\n"  # of the models that always think: no switch, and it opens the part
HARMONY = ("<|start|>system<|message|>Current date: {{ strftime_now('%Y-%m-%d') }}\n"
           "Reasoning: {{ reasoning_effort or 'medium' }}<|end|>{% for m in messages %}<|start|>{{ m['role'] }}"
           "{{ '<|channel|>final' if m['role'] == 'assistant' }}<|message|>{{ m['content'] }}<|end|>{% endfor %}"
           "<|start|>assistant")
MARKS = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|constrain|>", "<|call|>", "[THINK]", "[/THINK]"]
ORDERS = ("1, 2, 3, 4", "4, 3, 2, 1", "2, 1, 4, 3", "3, 4, 1, 2", "1, 1, 2, 3")
ANSWERS = [f"\n```python\nprint({n})\n```\n" for n in (1, 1.0, 2, 2.0)] + [f"\nRanking: {order}" for order in ORDERS]
DIMENSIONS = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                  intermediate_size=32, max_position_embeddings=2048, bos_token_id=1, pad_token_id=None,
                  eos_token_id=[3, 5])  # a list, without the tokenizer's own
CONFIGS = {  # family: (configuration, chat template, what stands before an answer that counts)
    "qwen3": (Qwen3Config(**DIMENSIONS), QWEN, ""),
    "qwen3-moe": (Qwen3MoeConfig(**DIMENSIONS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
                  THINKING, "</think>"),
    "gpt-oss": (GptOssConfig(**DIMENSIONS, num_local_experts=4, num_experts_per_tok=2, sliding_window=16),
                HARMONY, "<|channel|>final<|message|>"),
    "llama": (LlamaConfig(**DIMENSIONS), None, ""),
}


def make_tokenizer(template: str | None, words=tuple(map(chr, range(10, 127)))) -> PreTrainedTokenizerFast:
    """The marks of all families, and words: characters, or whole answers, so that noise makes them."""
    tokenizer = Tokenizer(tokenizer_models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<s>", "</s>", "<|return|>", "<|im_start|>", "<|im_end|>", *MARKS])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("<think>", "</think>", *words)])
    own = dict(bos_token="<s>", eos_token="</s>", chat_template=template)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **own)


def make_model(folder, family: str):
    config, template, before = CONFIGS[family]
    tokenizer = make_tokenizer(template, [before + text for text in ANSWERS])
    config.vocab_size = len(tokenizer)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    tests = [{"input": "", "output": "1\n"}, {"input": "", "output": "2\n"}]
    lines = [{"id": f"p{i}", "question": f"Write {i % 2 + 1}, please: {i}.", "tests": [tests[i % 2]]} for i in range(8)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_goes_from_sample_to_report_and_is_saved_as_trained(family, tmp_path, problems, monkeypatch):
    """MoE, sinks and sliding windows, harmony, no template at all: one path; and model/ is what transformers reads."""
    trained, save_model = [], models.save_model
    ids = torch.arange(20)[None] + 3

    @torch.no_grad()
    def spy(folder, model, tokenizer):
        with dust.grpo.plain_attention(model):
            trained.append(model(ids).logits)
        save_model(folder, model, tokenizer)

    monkeypatch.setattr(models, "save_model", spy)
    model = make_model(tmp_path / "model", family)
    out = tmp_path / "run"
    assert run_dust("--model", model, "--train", problems, "--eval", problems, "--out", out, "--preset", "laptop",
                    *SMALL, "--max-new-tokens", "12", "--lr", "0.003") == 0
    check_run(out, 8, 8, 2)
    report = json.loads((out / "report.json").read_text())
    assert report["counts"]["base"]["malformed rankings"] < report["counts"]["base"]["groups"]
    with torch.no_grad():
        base, again = (AutoModelForCausalLM.from_pretrained(f)(ids).logits for f in (model, out / "model"))
    assert torch.equal(trained[0], again) and not torch.equal(base, again)


# ----------------------------------------------------------------------------------------------- answers in one form


def tokens(tokenizer, text: str) -> torch.Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)


CODE = "```python\nprint(1)\n```"
FINAL = "<|start|>assistant<|channel|>final<|message|>"


@pytest.mark.parametrize(
    "answer, ranking, code",
    [
        (f"<|channel|>analysis<|message|>Ranking: 2, 1<|end|>{FINAL}Ranking: 1, 2<|return|>", [1, 2], None),
        (f"<|channel|>analysis<|message|>{CODE}<|end|>{FINAL}Here:\n{CODE}<|return|>", None, "print(1)"),
        ("<|channel|>final<|message|>Ranking: 2, 1<|return|>", [2, 1], None),
        ("<|channel|>final <|constrain|>json<|message|>Ranking: 2, 1<|return|>", [2, 1], None),
        ("<|channel|>final<|message|>Ranking: 2, 1<|end|>", [2, 1], None),
        # cut off before the final channel, a tool call, or none of the form that the family speaks
        ("<|channel|>analysis<|message|>Ranking: 2, 1", None, None),
        (f"<|channel|>analysis<|message|>{CODE}<|end|><|start|>assistant<|channel|>final", None, None),
        ("<|channel|>commentary to=python <|constrain|>json<|message|>Ranking: 2, 1<|call|>", None, None),
        ("Ranking: 2, 1", None, None),
        # a final message that is taken back
        (f"{FINAL}Ranking: 2, 1<|end|><|start|>assistant<|channel|>analysis<|message|>no, Ranking: 1, 2", None, None),
    ],
)
def test_of_a_harmony_answer_only_the_final_channel_is_read(answer, ranking, code):
    """Its marks are special tokens, which decoding leaves out: the analysis would run into the answer unseen."""
    tokenizer = make_tokenizer(HARMONY)
    text = answer_text(tokenizer, encode(tokenizer, "?", True), tokens(tokenizer, answer))
    assert rank_prompt.parse_ranking(text, 2) == ranking and rank_prompt.extract_code(text) == code
    assert "<|" not in text.rpartition("</think>")[2] or ranking is code is None


@pytest.mark.parametrize("template, answer, ranking", [
    (QWEN, "<think>Ranking: 2, 1</think>Ranking: 1, 2</s>", [1, 2]),
    (QWEN, "Ranking: 1, 2<|im_end|>", [1, 2]),
    (QWEN, "Ranking: 1, 2<|end|>", [1, 2]),  # Phi's end of a turn, which harmony uses as a mark
    (THINKING, "Ranking: 2, 1</think>Ranking: 1, 2<|im_end|>", [1, 2]),
    (THINKING, "Ranking: 2, 1", None),  # cut off in a thinking part that the template has opened
    (None, "[THINK]Ranking: 2, 1[/THINK]Ranking: 1, 2</s>", [1, 2]),
    (None, "[THINK]Ranking: 2, 1", None),
])
def test_the_thinking_part_is_found_whatever_its_marks(template, answer, ranking):
    """Mistral's marks are special tokens: left out, a ranking that was only thought of would be paid for."""
    tokenizer = make_tokenizer(template)
    check_template(tokenizer, "it", "")
    text = answer_text(tokenizer, encode(tokenizer, "?", True), tokens(tokenizer, answer))
    assert rank_prompt.parse_ranking(text, 2) == ranking


def test_a_harmony_prompt_has_the_effort_asked_for_and_no_date_that_changes():
    """Resumed on another day, a run would go on with other prompts."""
    tokenizer = make_tokenizer(HARMONY)
    assert "Reasoning: high" in render(tokenizer, "?", effort="high")
    assert "Reasoning: medium" in render(tokenizer, "?")
    assert "Current date: 2026-01-01" in render(tokenizer, "?")


def test_effort_is_refused_where_the_template_does_not_know_it(tmp_path, capsys, problems):
    model = make_model(tmp_path / "model", "qwen3")
    arguments = ["--model", model, "--preset", "laptop", "--train", problems, "--eval", problems]
    line = error_of(capsys, *arguments, "--reasoning-effort", "high")
    assert "--reasoning-effort high: the chat template of" in line and "does not use it" in line


@pytest.mark.parametrize("template, words", [(QWEN, ""), (THINKING, "no switch for thinking"), (HARMONY, "no switch"),
                                             (None, "no chat template")])
def test_what_a_template_takes_no_notice_of_is_said_in_one_line(template, words, capsys):
    check_template(make_tokenizer(template), "some/model", "")
    said = capsys.readouterr().out.splitlines()
    assert len(said) == bool(words) and all(words in line for line in said)


def test_the_first_prompt_of_each_kind_is_printed_once_and_kept_in_full(tmp_path, capsys):
    tokenizer = make_tokenizer(QWEN)
    for kind, text in (("programs", "short"), ("rankings", "a" * 3000 + "b" * 3000), ("programs", "another")):
        show_first(tmp_path, kind, tokenizer, encode(tokenizer, text, False))
    said, kept = capsys.readouterr().out, (tmp_path / "prompts.txt").read_text()
    assert "another" not in said + kept and "short" in said and "short" in kept
    assert "a" * 3000 + "b" * 3000 in kept and "a" * 1001 not in said and "characters, all in" in said
    assert kept.count("<think>\n\n</think>") == 2  # as the model reads it


# ----------------------------------------------------------------------------------- what a template writes, and where


def one_turn(before: str, after: str, ask: str = "") -> str:
    """A template with these texts around each message, and this one where an answer begins."""
    return ("{% for m in messages %}" + before + "{{ m['content'] }}" + after + "{% endfor %}"
            "{% if add_generation_prompt %}" + ask + "{% endif %}")


ROLE, ASK = "<|im_start|>{{ m['role'] }}\n", "<|im_start|>assistant\n"
QWEN3 = one_turn(ROLE, "<|im_end|>\n", ASK)  # with the switch, as the real one: it asks only where it is told to
ENDS = {  # layout: (template, the tokenizer's end, the generation config's, what closes a turn)
    "qwen3": (QWEN3, "<|im_end|>", ["</s>", "<|im_end|>"], "<|im_end|>"),
    "the tokenizer has another end than the template": (QWEN3, "</s>", ["</s>"], "<|im_end|>"),  # Qwen3-4B-Base
    "llama 3": (one_turn("<|start|>{{ m['role'] }}<|message|>\n\n", "<|end|>", "<|start|>assistant<|message|>\n\n"),
                "<|end|>", ["</s>", "<|return|>", "<|end|>"], "<|end|>"),
    "gemma": (one_turn("<s><|start|>{{ m['role'] }}\n", "<|call|>\n", "<|start|>model\n"), "</s>",
              ["</s>", "<|call|>"], "<|call|>"),
    "mistral": ("<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST]{{ m['content'] }}[/INST]{% else %}"
                "{{ m['content'] }}<|call|>{% endif %}{% endfor %}", "</s>", ["</s>"], "<|call|>"),
    "it always asks": (QWEN, "</s>", ["</s>"], "<|im_end|>"),
    "an end of text behind the conversation": (QWEN3 + "{% if not add_generation_prompt %}</s>{% endif %}", "</s>",
                                               ["</s>"], "<|im_end|>"),
    "only the tokenizer says": (one_turn("User: ", "\n\n"), "<|call|>", ["</s>", "<|call|>"], "<|call|>"),
    "only the configuration says": (one_turn("User: ", "\n\n"), None, ["<|call|>", "</s>"], "<|call|>"),
    "a line break": (one_turn("{{ m['role'] }}: ", "\n"), "</s>", ["</s>"], "</s>"),
    "words": (one_turn("{{ m['role'] }}: ", " (over)\n"), "</s>", ["</s>"], "</s>"),
    "only before another message": (  # Qwen1.5's, Hermes'
        one_turn(ROLE, "{% if not loop.last or add_generation_prompt %}<|im_end|>\n{% endif %}", ASK), "</s>", ["</s>"],
        "<|im_end|>"),
    "the next user's mark": (  # GLM-4.5's: nothing else ends a message
        "<|call|>" + one_turn("<|start|>{{ m['role'] }}\n", "", ASK), "</s>", ["</s>", "<|start|>"], "<|start|>"),
    "nothing": (one_turn(ROLE, "", ASK), "</s>", ["</s>"], "</s>"),
    "nothing, and it always asks": (one_turn(ROLE, "") + ASK, "</s>", ["</s>"], "</s>"),
    "no assistant's message": ("{{ messages[0]['content'] }}{% if messages[1] %}{{ raise_exception('no') }}{% endif %}",
                               "</s>", ["</s>"], "</s>"),
    "harmony": (HARMONY, "<|return|>", ["<|return|>", "</s>", "<|call|>"], "<|return|>"),
}


@pytest.mark.parametrize("layout", ENDS)
def test_the_end_of_a_turn_is_the_one_that_the_template_writes(layout):
    """The smallest of several ids was taught. And a base model whose tokenizer has another end never stopped."""
    template, eos, configured, closes = ENDS[layout]
    tokenizer = make_tokenizer(template)
    tokenizer.eos_token = eos
    ids = tokenizer.convert_tokens_to_ids(configured)
    for value in (ids, ids[0]) if len(ids) == 1 else (ids,):
        ends = dust.end_ids(SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=value)), tokenizer)
        assert tokenizer.convert_ids_to_tokens(ends)[0] == closes
        assert set(tokenizer.convert_ids_to_tokens(ends)) == {closes, *configured, eos} - {None}


def test_an_end_that_is_not_flagged_special_is_still_the_end_of_a_turn():
    tokenizer = Tokenizer(tokenizer_models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.add_tokens(["<user>", "<stop>", "\n"])
    for after, expected in (("<stop>\n", 2), ("\n", None), ("<stop><user>", None)):
        own = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=one_turn("<user>", after))
        assert models.turn_end(own) == expected


OPENINGS = {  # what a template writes behind the user's turn: whether it leaves the thinking part open
    "<think>\n": True, "<think>": True, "<think>   \n\n \n": True, "[THINK]\n": True,
    "<think>\nOkay, let me think about this step by step.\n": True, "<think>Let's go.</think>\n<think>": True,
    "": False, "<think>\n\n</think>\n\n": False, "<think>\nI need not think.\n</think>\n\n": False,
    "[THINK]\n[/THINK]": False,
}


@pytest.mark.parametrize("where", ["where it is asked", "always", "switched on", "switched off"])
@pytest.mark.parametrize("spelled", [False, True])
def test_a_thinking_part_that_the_template_opens_is_found_wherever_it_stands(where, spelled):
    """Blanks or words may follow the mark, and a tokenizer without a token for it spells it in letters.

    Only what the template writes behind the user's turn counts, and not what the user writes.
    """
    tokenizer, asked = (letters if spelled else make_tokenizer)(None), "Is <think> opened? <think>"

    def malformed(thinking: bool) -> bool:
        text = answer_text(tokenizer, encode(tokenizer, asked, thinking), tokens(tokenizer, "Ranking: 2, 1"))
        return rank_prompt.parse_ranking(text, 2) is None

    for begins, opened in OPENINGS.items():
        switch = "{% if enable_thinking is " + "not " * (where == "switched on") + f"false %}}{begins}{{% endif %}}"
        tokenizer.chat_template = one_turn(ROLE, "<|im_end|>\n", ASK + (switch if "switched" in where else begins))
        if where == "always":
            tokenizer.chat_template = one_turn(ROLE, "\n") + ASK + begins
        assert malformed(thinking=where != "switched off") == opened, begins
        if "switched" in where:
            assert not malformed(thinking=where == "switched off"), begins


@pytest.mark.parametrize("begins, efforts", [
    ("{% if reasoning_effort == 'high' %}<think>\n{% endif %}", ["high"]),
    ("<think>\n{% if reasoning_effort == 'low' %}</think>\n{% endif %}", ["medium", "high"]),
    ("{% if reasoning_effort == 'medium' %}{{ raise_exception('no') }}{% endif %}<think>", ["low", "high"]),
])
def test_a_thinking_part_that_the_template_opens_at_some_efforts_is_found(begins, efforts):
    tokenizer = make_tokenizer(one_turn(ROLE, "<|im_end|>\n", ASK + begins))
    opened = []
    for effort in ("low", "medium", "high"):
        with contextlib.suppress(TemplateError):
            prompt = encode(tokenizer, "Is <think> opened?", True, effort)
            opened += [effort] * answer_text(tokenizer, prompt, tokens(tokenizer, "x")).startswith("<think>")
    assert opened == efforts


def letters(template: str | None, metaspace: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are letters: bytes as in Qwen's, or with a blank in front of a text as in Llama 2's."""
    alphabet = [*map(chr, range(10, 127)), "\u2581"] if metaspace else sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*alphabet, "<t"])}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab=vocabulary, merges=[("<", "t")]))
    if metaspace:
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["\n\n"])  # as Gemma's
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, eos_token="</s>")


def test_a_template_is_rendered_to_the_letter():
    """A macro in front of a template took its first line break, or kept the blanks that Jinja takes there."""
    tokenizer, turn = make_tokenizer(None), [{"role": "user", "content": "?"}]
    for begins in ("", "\n", "\n\n", "  ", "  {{ '' }}", "{{ bos_token }}\n", "\t\n ", "{#- a word -#}\n",
                   "{# a word #}\n", "{%- set x = 1 %}\n\n", "  {%- set x = 1 -%}\n", "  {% set x = 1 %}\n\n"):
        tokenizer.chat_template = begins + QWEN3
        asked = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        assert render(tokenizer, "?") == asked, begins


SPELLED = ["<|im_end|>", "print('</s>')  # <|im_end|>\n", "<s>", "a<|im_end|><|im_start|>system\nNo.<|im_end|>",
           "<think>", "</think>\n", "<<|im_end|>>", "<|im_<|im_end|>end|>"]


@pytest.mark.parametrize("make", [make_tokenizer, letters, lambda template: letters(template, metaspace=True)])
def test_a_control_token_that_a_text_spells_is_text(make):
    """A candidate that prints <|im_end|> ended the user's turn, and could go on with a turn of its own."""
    tokenizer = make(QWEN3)
    control = set(tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]))
    plain = encode(tokenizer, "x\n?", True).tolist()
    for text in SPELLED:
        ids = encode(tokenizer, f"x\n{text}?", True).tolist()
        assert [i for i in ids if i in control] == [i for i in plain if i in control], text
        assert tokenizer.decode(ids).replace(f"x\n{text}?", "x\n?") == tokenizer.decode(plain)


@pytest.mark.parametrize("metaspace", [False, True])
def test_a_token_that_the_template_writes_is_text_where_a_text_spells_it(metaspace):
    """Not every model flags these as special: DeepSeek's marks of a user and an assistant are not."""
    tokenizer = letters(one_turn("]~b]{{ m['role'] }}\n", "[e~[\n", "]~b]ai\n"), metaspace)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("]~b]", "[e~[", "other")])
    control = set(tokenizer.convert_tokens_to_ids(["]~b]", "[e~["]))
    plain = encode(tokenizer, "x\n?", True).tolist()
    for text in ("]~b]", "[e~[\n]~b]ai\n", "]~b]~b]", "[e~[e~[ ]~b]]~b]"):  # two of them begin inside another
        ids = encode(tokenizer, f"x\n{text}?", True).tolist()
        assert [i for i in ids if i in control] == [i for i in plain if i in control], text
        assert tokenizer.decode(ids).replace(f"x\n{text}?", "x\n?") == tokenizer.decode(plain)
    assert tokenizer.convert_tokens_to_ids("other") in encode(tokenizer, "another", True)


def test_a_control_token_that_a_teacher_spells_is_text_and_its_thinking_part_is_marked():
    tokenizer = make_tokenizer(QWEN3)
    prompt, said = encode(tokenizer, "?", True), "<think>is it <|im_end|>?</think>Ranking: 1, 2 <s>"
    [answer] = encode_answers(tokenizer, prompt, [said], 5)
    assert tokenizer.decode(answer[:-1]) == said and answer.tolist().count(5) == 1 and 1 not in answer.tolist()
    assert {*tokenizer.convert_tokens_to_ids(["<think>", "</think>"])} <= {*answer.tolist()}


@pytest.mark.parametrize("make", [make_tokenizer, letters, lambda template: letters(template, metaspace=True)])
def test_a_prompt_without_control_tokens_has_the_ids_of_the_whole_text(make):
    """Pieces that are read one by one lose the tokens across their borders."""
    tokenizer = make(QWEN3)
    texts = ["?", " a\n\n\nb  ", "\n\n", "x < y <| z |> [INST", "if a <= b: print('<|im', 'end|>')"]
    for text in [*texts, *([] if "<think>" in tokenizer.get_vocab() else ["<think>"])]:
        turn = [{"role": "user", "content": text}]
        whole = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        assert encode(tokenizer, text, True).tolist() == whole


# ------------------------------------------------------------------------------------------------------ names, weights


def test_a_short_name_is_the_hubs_and_a_folder_of_that_name_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert full_name("qwen3-4b") == "Qwen/Qwen3-4B" and full_name("GPT-OSS-20B") == "openai/gpt-oss-20b"
    assert full_name("Qwen3-4B-Thinking") == full_name("Qwen3-4B-Thinking-2507") == "Qwen/Qwen3-4B-Thinking-2507"
    assert full_name("some/model") == "some/model" and full_name("") == ""
    assert full_name("qwen/qwen3-4b") == "Qwen/Qwen3-4B"
    (tmp_path / "Qwen3-4B").mkdir()
    folder = str(tmp_path / "Qwen3-4B")
    assert {full_name(name) for name in ("Qwen3-4B", "./Qwen3-4B/", folder)} == {folder}


@pytest.fixture
def hub(monkeypatch):
    """Returns a function that sets what huggingface_hub answers, first without the network and then with it."""
    def answer(here, online):
        calls = []

        def snapshot_download(name, local_files_only=False, **patterns):
            calls.append("here" if local_files_only else "online")
            result = here if local_files_only else online
            if isinstance(result, Exception):
                raise result
            return str(result)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        return calls

    return answer


@pytest.mark.parametrize("where", ["question", "download"])
def test_a_gated_model_says_what_to_do(where, monkeypatch, hub):
    """GatedRepoError is a RepositoryNotFoundError: as that it would read "no such model"."""
    gated = errors.GatedRepoError("no", response=SimpleNamespace(headers={}, request=None, status_code=403))
    if where == "question":
        monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *a, **k: (_ for _ in ()).throw(gated))
    else:
        hub(errors.LocalEntryNotFoundError("not here"), gated)
    with pytest.raises(BadInput, match="--model some/model is gated: accept its licence .* `hf auth login`"):
        count_parameters("some/model")


def test_a_name_that_the_hub_does_not_know_and_a_download_that_breaks_are_one_line_each(hub):
    response = SimpleNamespace(headers={}, request=None, status_code=404)
    for error, words in ((errors.RepositoryNotFoundError("404\nmore", response=response), "no such model on the Hub"),
                         (OSError("disk full\nmore"), "it cannot be downloaded: disk full")):
        hub(errors.LocalEntryNotFoundError("not here"), error)
        with pytest.raises(BadInput, match=f"^--teacher some/model: no such folder, and {words}$"):
            find_model("some/model", "--teacher")


def test_what_is_on_this_machine_is_not_asked_for_again(tmp_path, hub):
    """A run on a machine without network goes on; and a new version on the Hub does not change a resumed run."""
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).touch()
    calls = hub(tmp_path, OSError("no network"))
    assert find_model("some/model") == str(tmp_path) and calls == ["here"]


def test_a_run_is_loaded_as_its_model_and_a_short_name_as_the_hubs(tmp_path, hub):
    (tmp_path / "run" / "model").mkdir(parents=True)
    assert find_model(str(tmp_path / "run")) == str(tmp_path / "run")
    (tmp_path / "run" / "args.json").touch()
    assert find_model(str(tmp_path / "run")) == str(tmp_path / "run" / "model")
    hub(errors.LocalEntryNotFoundError("not here"), errors.HFValidationError("no"))
    with pytest.raises(BadInput, match="--model Qwen/Qwen3-4B: no such folder"):
        load_model("qwen3-4b", optimizer="fp32", shard=False, device="cpu")


FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def quantise(folder) -> dict[str, torch.Tensor]:
    """Give a GPT-OSS random experts in 4 bits, two to a byte and a scale for 32; return what they stand for."""
    weights, wanted = load_file(folder / "model.safetensors"), {}
    torch.manual_seed(0)
    for name in [n for n in weights if n.endswith("_proj") and "experts" in n]:
        experts, inner, outer = weights.pop(name).shape
        blocks = torch.randint(256, (experts, outer, inner // 32, 16), dtype=torch.uint8)
        scales = torch.randint(120, 124, (experts, outer, inner // 32), dtype=torch.uint8)
        values = FP4[torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).long()]  # [experts, outer, inner / 32, 32]
        values = values * 2.0 ** (scales.int() - 127)[..., None]
        wanted[name] = values.flatten(-2).transpose(1, 2)
        weights |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    return wanted


def test_mxfp4_weights_become_ordinary_ones_and_are_saved_as_such(tmp_path):
    """GPT-OSS ships its experts so, and the configuration goes on saying it."""
    folder = make_model(tmp_path / "model", "gpt-oss")
    wanted = quantise(folder)
    assert count_parameters(str(folder)) > 0
    model, tokenizer = load_model(str(folder), optimizer="fp32", shard=False, device="cpu")
    state = model.state_dict()
    assert wanted and all(torch.equal(state[name], value) for name, value in wanted.items())
    assert {value.dtype for value in state.values()} == {torch.float32}, "masters in bf16 do not move"
    save_model(tmp_path / "saved", model, tokenizer)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert state.keys() == again.keys() and all(torch.equal(state[name], again[name]) for name in state)


def test_weights_of_another_quantisation_are_refused_in_one_line(tmp_path):
    folder = make_model(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(BadInput, match=r"quantised \(fp8\) and cannot be trained"):
        load_model(str(folder), optimizer="fp32", shard=False, device="cpu")


@pytest.mark.parametrize("option", ["--model", "--teacher", "--init"])
def test_a_model_that_does_not_load_is_called_by_its_own_option(option, tmp_path):
    """A broken folder given as --teacher was said to be --model's, which the user had not even given."""
    folder = make_model(tmp_path / "model", "llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadInput, match=f"^{option} {folder} does not load"):
        load_model(str(folder), optimizer="fp32", shard=False, device="cpu", option=option)


def test_a_download_that_was_stopped_goes_on(tmp_path, hub):
    """Its configuration is here, its weights are not: as "here" the model would never load again."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    stopped.mkdir()
    (stopped / "config.json").touch()
    calls = hub(stopped, whole)
    assert find_model("some/model") == str(whole) and calls == ["here", "online"]
    shards = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (stopped / "model.safetensors.index.json").write_text(json.dumps(shards))
    for name, expected in (("model-2.safetensors", whole), ("tokenizer.json", whole), ("model-1.safetensors", stopped)):
        (stopped / name).touch()  # the last shard can be here first, and the tokenizer last
        hub(stopped, whole)
        assert find_model("some/model") == str(expected)
    calls = hub(errors.LocalEntryNotFoundError("half of it"), whole)
    assert find_model("some/model") == str(whole) and calls == ["here", "online"]


@pytest.fixture
def strict(monkeypatch):
    """Save generation configs as transformers 5.17 to 5.22 do: refuse what they warned about when they loaded it."""
    save = GenerationConfig.save_pretrained

    def validated(config, *arguments, **settings):
        config.validate(strict=True)
        save(config, *arguments, **settings)

    monkeypatch.setattr(GenerationConfig, "save_pretrained", validated)


@pytest.mark.parametrize("settings, saved", [
    ({"temperature": 0.7}, {"temperature": 0.7, "do_sample": True}),
    ({"top_p": 0.8, "top_k": 5}, {"top_p": 0.8, "top_k": 5, "do_sample": True}),
    ({"temperature": 0.7, "do_sample": True}, {"temperature": 0.7, "do_sample": True}),
    ({"early_stopping": True, "temperature": 0.7}, {}), ({"pad_token_id": -1}, {}),
])
def test_a_generation_config_that_loads_is_saved_too(settings, saved, tmp_path, strict):
    """It was refused after the whole training, and again after --resume. What can be kept of it is kept."""
    folder = make_model(tmp_path / "model", "llama")
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    model, tokenizer = load_model(str(folder), optimizer="fp32", shard=False, device="cpu")
    save_model(tmp_path / "saved", model, tokenizer)
    again = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert again.items() >= saved.items() and again["eos_token_id"] == [3, 5]
    assert not model.generation_config.do_sample or "do_sample" in settings  # the model itself does not change


@pytest.mark.parametrize("stops, saved", [([3, 2], [3, 2, 5]), (3, [3, 5]), (None, [5]), ([5, 3], [5, 3]), (5, 5)])
def test_what_is_saved_names_the_end_of_a_turn(stops, saved, tmp_path):
    """Another program stops only where the saved config says so: a base model that was taught to rank never would."""
    model, tokenizer = tiny(), make_tokenizer(QWEN)
    model.generation_config.eos_token_id = stops
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 5
    save_model(tmp_path, model, tokenizer)
    again = json.loads((tmp_path / "generation_config.json").read_text())
    assert again["eos_token_id"] == saved and model.generation_config.eos_token_id == stops


@pytest.mark.parametrize("part", [Qwen3Config, PreTrainedTokenizerFast])
def test_what_cannot_be_saved_is_refused_before_the_run(part, tmp_path, monkeypatch):
    folder = make_model(tmp_path / "model", "qwen3")

    def save(*_, **__):
        raise ValueError("this has no file\nmore")

    monkeypatch.setattr(part, "save_pretrained", save)
    with pytest.raises(BadInput, match=f"^--init {folder} cannot be saved: this has no file$"):
        load_model(str(folder), optimizer="fp32", shard=False, device="cpu", option="--init")


@pytest.mark.parametrize("option", ["--model", "--teacher", "--init"])
def test_a_configuration_that_is_no_language_models_is_found_before_anything_runs(option, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(BadInput, match=f"^{option} {tmp_path} does not load: [^\n]*$"):
        count_parameters(str(tmp_path), option)


def test_parameters_are_counted_without_loading_them(llama):
    folder = str(llama["folder"] / "model")
    assert count_parameters(folder) == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())


def test_no_model_has_dropout_in_training_mode(tmp_path):
    """OPT calls F.dropout and skips whole layers itself, so there is no nn.Dropout to switch off.

    In training mode the update would see another model than the rollout, and the ratio of their probabilities would be
    noise.
    """
    tokenizer = make_tokenizer(QWEN)
    config = OPTConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=4, ffn_dim=32,
                       num_attention_heads=4, word_embed_proj_dim=32, dropout=0.5, attention_dropout=0.5, layerdrop=0.5)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), optimizer="fp32", shard=False, device="cpu")
    ids = torch.arange(20)[None] + 3
    with torch.no_grad():
        expected, trained = model(ids).logits, model.train()(ids).logits
        assert torch.equal(expected, trained)
        with_dropout = AutoModelForCausalLM.from_pretrained(tmp_path).train()
        assert not torch.allclose(expected, with_dropout(ids).logits)


# ---------------------------------------------------------------------------------------------------- the optimiser


def weights(dtype=torch.bfloat16, n: int = 20_000) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(0)
    return torch.nn.Parameter((torch.randn(n, generator=generator) * 0.02).bfloat16().to(dtype))


def gradient(step: int, n: int = 20_000) -> torch.Tensor:
    """A direction that stays and noise that does not, in bf16 for all alike."""
    generator = torch.Generator().manual_seed(1)
    steady = torch.randn(n, generator=generator)
    generator.manual_seed(100 + step)
    return (steady + 0.5 * torch.randn(n, generator=generator)).bfloat16()


def value(optimizer, p) -> torch.Tensor:
    """What the optimiser holds a weight to be: its master, or the weight and what rounding took of it."""
    if not isinstance(optimizer, SmallStepAdam):
        return p.detach().double()
    kept = optimizer.state[p]["kept"].double()
    return kept if optimizer.keep == "masters" else kept + p.detach().double()


def after(steps: int, make, dtype=torch.bfloat16):
    p = weights(dtype)
    optimizer = make([p])
    for step in range(steps):
        p.grad = gradient(step).to(dtype)
        optimizer.step()
    return optimizer, p


@pytest.mark.parametrize("keep", ["masters", "kahan"])
def test_a_step_of_1e_6_moves_every_weight_and_in_plain_bf16_next_to_none(keep):
    """A bf16 weight of 0.02 has a last bit of 1.2e-4 / 2: at the paper's learning rate plain AdamW trains nothing."""
    start = weights().detach().double()
    optimizer, p = after(1, lambda ps: SmallStepAdam(ps, 1e-6, keep))
    moved = (value(optimizer, p) != start).double().mean()
    _, plain = after(1, lambda ps: torch.optim.AdamW(ps, lr=1e-6, weight_decay=0.0))
    moved_plainly = (plain.detach().double() != start).double().mean()
    assert moved > 0.99 and moved_plainly < 0.03


@pytest.mark.parametrize("keep, tolerance", [("masters", 1e-4), ("kahan", 0.02)])
def test_many_small_steps_go_where_fp32_adamw_goes(keep, tolerance):
    """300 steps of 1e-6; the tolerance is relative to how far fp32 goes. Plain bf16 misses by more than half of it."""
    start = weights().detach().double()
    _, exact = after(300, lambda ps: torch.optim.AdamW(ps, lr=1e-6, weight_decay=0.0), torch.float32)
    way = exact.detach().double() - start

    def miss(values) -> float:
        return float((values - exact.detach().double()).norm() / way.norm())

    assert miss(value(*after(300, lambda ps: SmallStepAdam(ps, 1e-6, keep)))) < tolerance
    _, plain = after(300, lambda ps: torch.optim.AdamW(ps, lr=1e-6, weight_decay=0.0))
    assert miss(plain.detach().double()) > 0.5


@pytest.mark.parametrize("keep", ["masters", "kahan"])
def test_the_model_holds_the_rounding_of_what_the_optimiser_holds(keep):
    optimizer, p = after(20, lambda ps: SmallStepAdam(ps, 1e-3, keep))
    held = value(optimizer, p)
    assert ((p.detach() - held).abs() <= held.abs() * 2**-8).all()  # at most half a last bit


@pytest.mark.parametrize("keep", ["masters", "kahan"])
def test_going_on_from_a_checkpoint_rounds_nothing(keep, tmp_path):
    """torch's load_state_dict casts all state to the weights' dtype: masters and moments would become bf16."""
    class Model(torch.nn.Module):
        device = torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.p = weights()

    def train(model, optimizer, steps):
        for step in steps:
            model.p.grad = gradient(step)
            optimizer.step()

    whole, half, fresh = Model(), Model(), Model()
    optimizers = [SmallStepAdam(m.parameters(), 1e-6, keep) for m in (whole, half, fresh)]
    train(whole, optimizers[0], range(6))
    train(half, optimizers[1], range(3))
    save_checkpoint(tmp_path / "c.pt", half, optimizers[1], 3)
    assert load_checkpoint(tmp_path / "c.pt", fresh, optimizers[2]) == 3
    train(fresh, optimizers[2], range(3, 6))
    assert torch.equal(fresh.p, whole.p)
    for name, tensor in optimizers[0].state[whole.p].items():
        assert name == "step" or torch.equal(tensor, optimizers[2].state[fresh.p][name]), name


@pytest.mark.parametrize("kind, kept", [("fp32", torch.optim.AdamW), ("masters", SmallStepAdam)])
def test_fp32_weights_keep_torchs_own_adamw(kind, kept):
    """The default run's results are those of torch.optim.AdamW."""
    model = torch.nn.Linear(3, 3).to(torch.float32 if kind == "fp32" else torch.bfloat16)
    optimizer = make_optimizer(model, kind, 1e-4)
    assert type(optimizer) is kept and optimizer.param_groups[0].get("weight_decay", 0) == 0


def test_a_run_with_bf16_weights_trains_and_says_so(llama, tmp_path, capsys):
    assert dust.main([*llama["arguments"], "--optimizer", "kahan", "--out", str(tmp_path / "run")]) == 0
    assert "(--optimizer kahan)" in capsys.readouterr().out
    saved = torch.load(tmp_path / "run" / "checkpoint.pt")
    assert {p.dtype for p in saved["model"].values()} == {torch.bfloat16}
    base = AutoModelForCausalLM.from_pretrained(llama["folder"] / "model", dtype=torch.bfloat16)
    assert any(not torch.equal(p, saved["model"][name]) for name, p in base.named_parameters())
    assert {tuple(sorted(state)) for state in saved["optimizer"]["state"].values()} == {("kept", "m", "step", "v")}


# ------------------------------------------------------------------------------------------------------------- LoRA


def tiny():
    torch.manual_seed(3)
    shape = dict(vocab_size=37, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=8, initializer_range=0.2)
    return Qwen3ForCausalLM(Qwen3Config(**shape)).eval()


def test_lora_without_its_package_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    assert dust.main(["--lora", "4"]) == 2
    expected = "dust: --lora 4 needs the package peft: pip install peft (--lora 0 trains all weights)\n"
    assert capsys.readouterr().err == expected


class NoTokenizer:
    def save_pretrained(self, folder):
        pass


def test_adapters_can_be_switched_off_and_are_merged_in_what_is_saved(tmp_path):
    """Off, the model is its own reference; saved, it says the same as with them, and holds no trace of them."""
    pytest.importorskip("peft")
    base, ids = tiny(), torch.arange(12)[None]
    model = copy.deepcopy(base)
    add_lora(model, 4, seed=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32} and len(trained) == 2 * 2 * 7
    with torch.no_grad():
        for p in trained:
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    with torch.no_grad(), lora_disabled(model):
        torch.testing.assert_close(model(ids).logits, base(ids).logits)
    assert all(p.requires_grad for p in trained)
    adapted = model(ids).logits.detach()
    assert not torch.allclose(adapted, base(ids).logits, atol=1e-2)
    save_model(tmp_path, model, NoTokenizer())
    saved = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(saved(ids).logits, adapted, atol=1e-4, rtol=1e-4)
    assert set(saved.state_dict()) == set(base.state_dict())
    torch.testing.assert_close(model(ids).logits, adapted)  # which goes on with its adapters


def test_what_adapters_learned_in_small_steps_is_not_rounded_away_in_what_is_saved(tmp_path):
    """Merged into bf16 weights, a change of less than half a last bit is none: up to half of a run's learning."""
    pytest.importorskip("peft")
    model = tiny().bfloat16()
    add_lora(model, 4, seed=0)
    layer = model.model.layers[1].mlp.up_proj
    before = layer.get_base_layer().weight.detach().clone()
    with torch.no_grad():
        layer.lora_A["default"].weight.normal_(generator=torch.Generator().manual_seed(1)).mul_(1e-2)
        layer.lora_B["default"].weight.normal_(generator=torch.Generator().manual_seed(2)).mul_(1e-3)
    change = layer.get_delta_weight("default").detach()
    assert ((before + change.bfloat16()) == before).float().mean() > 0.5  # that is what would be lost
    save_model(tmp_path, model, NoTokenizer())
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).model.layers[1].mlp.up_proj.weight
    torch.testing.assert_close(saved - before.float(), change, atol=1e-7, rtol=1e-2)


def test_adapters_are_merged_on_the_cpu(tmp_path, monkeypatch):
    """On a GPU of 24 GB the merged weights of a 4 B model, in fp32, were beside the model: out of memory at the end.

    Here the meta device is the GPU.
    """
    pytest.importorskip("peft")
    model, saved = tiny().bfloat16(), {}
    add_lora(model, 4, seed=0)
    model.to("meta")
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: torch.zeros_like(tensor, device="cpu"))
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device=None, *rest, **named: tensor.cpu()
                        if device in ("cpu", torch.device("cpu")) else to(tensor, device, *rest, **named))
    monkeypatch.setattr(Qwen3ForCausalLM, "save_pretrained", lambda plain, folder, state_dict: saved.update(state_dict))
    save_model(tmp_path, model, NoTokenizer())
    merged = [weight for weight in saved.values() if weight.dtype == torch.float32]
    assert len(merged) == 2 * 7 and {weight.device.type for weight in saved.values()} == {"cpu"}


def test_adapters_are_on_gpt2s_own_linear_layers_and_leave_experts_alone():
    """GPT-2 has no torch.nn.Linear: its adapters were refused. Adapters of experts would copy them in each forward."""
    pytest.importorskip("peft")
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=37))
    mixture = AutoModelForCausalLM.from_config(CONFIGS["qwen3-moe"][0])
    for model, layers, ids in ((gpt2, 2 * 4, torch.arange(9)[None]), (mixture, 2 * 4, torch.arange(9)[None])):
        add_lora(model, 2, seed=0)
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        assert len(names) == 2 * layers and not any("expert" in name for name in names)
        with torch.no_grad(), lora_disabled(model):
            assert torch.isfinite(model(ids).logits).all()


def test_a_lora_run_saves_an_ordinary_model(llama, tmp_path):
    pytest.importorskip("peft")
    arguments = [*llama["arguments"], "--lora", "4", "--out", str(tmp_path / "run")]
    assert dust.main(arguments) == 0
    assert dust.main([*arguments, "--resume"]) == 0
    base = AutoModelForCausalLM.from_pretrained(llama["folder"] / "model")
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    changed = {n for (n, a), b in zip(trained.named_parameters(), base.parameters()) if not torch.equal(a, b)}
    assert changed and all("proj" in name for name in changed)
    assert (tmp_path / "run" / "checkpoint.pt").stat().st_size < 150_000  # adapters and their state


# ------------------------------------------------------------------------------------------------------- the memory

QWEN3_4B, GB = 4_022_468_096, 1e9


def choice(monkeypatch, parameters: int, there: float, given: str = "", **settings) -> tuple[str, str]:
    """The optimiser and the plan's line for a model of so many parameters and so much memory."""
    monkeypatch.setattr(models, "count_parameters", lambda *_: parameters)
    monkeypatch.setattr(models, "room", lambda device: there)
    return choose_optimizer(dust.Args(**settings), given)


def test_the_bytes_of_a_weight_are_those_of_the_optimisers():
    """Weight, gradient and optimiser state of a 4 B model in GB: 64.4, 64.4 and 56.3."""
    for kind in ("masters", "kahan"):
        p = torch.nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
        optimizer = SmallStepAdam([p], 1e-3, kind)
        p.grad = torch.ones_like(p)
        optimizer.step()
        kept = sum(x.numel() * x.element_size() for x in optimizer.state[p].values() if isinstance(x, torch.Tensor))
        assert (kept + 2 * 100 * 2) / 100 == models.BYTES[kind]
    assert [round(QWEN3_4B * size / GB, 1) for size in models.BYTES.values()] == [64.4, 64.4, 56.3]


def test_the_optimiser_is_the_first_that_leaves_half_of_the_memory(monkeypatch):
    for there, kind in ((300, "fp32"), (150, "masters"), (130, "kahan"), (24, "kahan")):
        assert choice(monkeypatch, QWEN3_4B, there * GB)[0] == kind
    assert choice(monkeypatch, QWEN3_4B, 24 * GB, lora=16)[0] == "masters"
    assert choice(monkeypatch, QWEN3_4B, 300 * GB, "kahan")[0] == "kahan"  # what is given stays
    assert choice(monkeypatch, 844_032, 4 * GB)[0] == "fp32"  # the shipped model on a laptop


@pytest.mark.parametrize("name, there, expected, needed, settings", [
    # by hand, for 4.02 and 30.5 billion weights: 16 or 14 bytes each, and 2 of the reference; adapters: 2
    ("Qwen3-4B", 24, "kahan", 64.4, {}), ("Qwen3-4B", 80, "kahan", 64.4, {}), ("Qwen3-4B", 141, "kahan", 64.4, {}),
    ("Qwen3-4B", 160, "masters", 72.4, {}), ("Qwen3-4B", 24, "masters", 8.0, {"lora": 16}),
    ("Qwen3-4B", 80, "masters", 8.0, {"lora": 16}), ("Qwen3-4B", 141, "masters", 8.0, {"eval_only": True}),
    ("Qwen3-30B", 24, "kahan", 488.5, {}), ("Qwen3-30B", 80, "kahan", 61.1, {"lora": 16}),
    ("Qwen3-30B", 141, "masters", 61.1, {"lora": 16}),
    # spread over eight: 16 bytes each and 4 of the reference, or 14 and 2
    ("Qwen3-30B", 80, "kahan", 61.1, {"shard": True}), ("Qwen3-30B", 141, "kahan", 61.1, {"shard": True}),
    ("Qwen3-30B", 160, "masters", 76.3, {"shard": True}),
])
def test_a_gpu_gets_bf16_weights_that_train(name, there, expected, needed, settings, monkeypatch):
    """fp32 was tried first: with adapters on 80 GB a run computed in fp32, many times slower than in bf16."""
    monkeypatch.setattr(models, "load_config", lambda *_: ("", SHAPES[name]))
    monkeypatch.setattr(models, "room", lambda device: there * GB)
    monkeypatch.setattr(models.ranks, "gather", lambda value: [value])
    monkeypatch.setattr(models.ranks, "world", lambda: 8)
    args = dust.Args(device="cuda:0", **settings)
    kind, line = choose_optimizer(args, "")
    assert kind == expected and line.startswith(f"{needed} GB of {there:.1f} GB")
    assert ("will not fit" in line) == (needed > there)
    assert choose_optimizer(args, "fp32")[0] == "fp32"  # the user's choice


def test_fp32_weights_on_a_gpu_are_multiplied_in_tf32(tmp_path, monkeypatch):
    """Only there, only if they were chosen, and not where transformers would multiply positions so: TF32 rounds those
    above 2,048. (Nothing is loaded here: there is no GPU.)"""
    matmul, folder = torch.backends.cuda.matmul, make_model(tmp_path / "model", "qwen3")

    def unreadable(*_, **__):
        raise ValueError("no GPU")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", unreadable)
    choices = [("fp32", "cpu", "5.24.0", False), ("kahan", "cuda:0", "5.24.0", False),
               ("fp32", "cuda:0", "5.17.1", False), ("fp32", "cuda:0", "5.24.0", True)]
    try:
        for optimizer, device, version, expected in choices:
            monkeypatch.setattr(models, "transformers", SimpleNamespace(__version__=version))
            with pytest.raises(BadInput, match="no GPU"):
                load_model(str(folder), optimizer=optimizer, shard=False, device=device)
            assert matmul.allow_tf32 == expected
    finally:
        matmul.allow_tf32 = False


def test_the_plan_says_what_is_needed_and_what_to_do_where_it_does_not_fit(monkeypatch):
    kind, line = choice(monkeypatch, QWEN3_4B, 80 * GB, "kahan")
    assert line == "64.4 GB of 80.0 GB for weights, gradients, optimiser and reference (--optimizer kahan)"
    assert choice(monkeypatch, QWEN3_4B, 60 * GB, "kahan")[1].endswith("a smaller model, --lora 16 or --shard")
    assert choice(monkeypatch, QWEN3_4B, 80 * GB, "kahan", kl=0.0)[1].startswith("56.3 GB")  # no reference
    assert choice(monkeypatch, QWEN3_4B, 80 * GB, "kahan", mode="sft")[1].startswith("56.3 GB")  # it teaches itself, before training
    assert choice(monkeypatch, QWEN3_4B, 80 * GB, "kahan", eval_only=True)[1].startswith("8.0 GB")


def test_a_damaged_checkpoint_is_one_line(tmp_path):
    model = tiny()
    optimizer = make_optimizer(model, "fp32", 1e-4)
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, model, optimizer, 1)
    whole = path.read_bytes()
    other = tiny()
    del other.model.layers[1]
    for damage in (whole[: len(whole) // 2], b"", b"half a checkpoint"):
        path.write_bytes(damage)
        with pytest.raises(BadInput, match="cannot be read"):
            load_checkpoint(path, model, optimizer)
    save_checkpoint(path, other, make_optimizer(other, "fp32", 1e-4), 1)
    with pytest.raises(BadInput, match="cannot be read"):
        load_checkpoint(path, model, optimizer)


@pytest.mark.parametrize("keep", ["masters", "kahan"])
def test_weight_decay_is_adamws(keep):
    torch.manual_seed(0)
    start, gradients = torch.randn(50), torch.randn(20, 50)
    plain = torch.nn.Parameter(start.clone())
    own = torch.nn.Parameter(start.bfloat16())
    plain.data = own.data.float()
    reference = torch.optim.AdamW([plain], lr=0.01, weight_decay=0.5)
    optimizer = make_optimizer(torch.nn.ParameterList([own]), keep, 0.01, 0.5)
    assert isinstance(optimizer, SmallStepAdam)
    for gradient in gradients:
        plain.grad, own.grad = gradient.bfloat16().float(), gradient.bfloat16()
        reference.step(), optimizer.step()
    exact = optimizer.state[own]["kept"] if keep == "masters" else own.float() + optimizer.state[own]["kept"].float()
    assert torch.allclose(exact, plain, atol=1e-3)


def test_a_checkpoint_that_does_not_fit_the_memory_is_not_called_damaged(monkeypatch, tmp_path):
    """The user would be told to delete it."""
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(models, "load_file", full)
    with pytest.raises(torch.OutOfMemoryError):
        models.load_checkpoint(tmp_path / "checkpoint.pt", torch.nn.Linear(2, 2), None)
