"""Other families than the shipped model's: their templates, their answers, their weights; and the paper's presets."""
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import (AutoModelForCausalLM, GptOssConfig, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config,
                          Qwen3MoeConfig)

import dust
import grpo
import rank_prompt
from conftest import SMALL, bytes_kept
from plumbing import chat, memory, progress, runs
from plumbing.problems import BadInput, Problem
from plumbing.models import SHORT_NAMES, SmallStepAdam, full_name, load_config, load_model, make_optimizer, warm_up
from plumbing.presets import PAPER
from dust import Candidate, Group
from test_dust import check_run, error_of, run_dust

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
    tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
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
    trained, save_model = [], dust.save_model
    ids = torch.arange(20)[None] + 3

    @torch.no_grad()
    def spy(folder, model, tokenizer):
        with grpo.plain_attention(model):
            trained.append(model(ids).logits)
        save_model(folder, model, tokenizer)

    monkeypatch.setattr(dust, "save_model", spy)
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
    text = chat.decode(tokenizer, chat.encode(tokenizer, "?", True), tokens(tokenizer, answer))
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
    chat.check_template(tokenizer, "it", "")
    text = chat.decode(tokenizer, chat.encode(tokenizer, "?", True), tokens(tokenizer, answer))
    assert rank_prompt.parse_ranking(text, 2) == ranking


def test_a_harmony_prompt_has_the_effort_asked_for_and_no_date_that_changes():
    """Resumed on another day, a run would go on with other prompts."""
    tokenizer = make_tokenizer(HARMONY)
    assert "Reasoning: high" in chat.render(tokenizer, "?", effort="high")
    assert "Reasoning: medium" in chat.render(tokenizer, "?")
    assert "Current date: 2026-01-01" in chat.render(tokenizer, "?")


def test_effort_is_refused_where_the_template_does_not_know_it(tmp_path, capsys, problems):
    model = make_model(tmp_path / "model", "qwen3")
    line = error_of(capsys, "--model", model, "--train", problems, "--eval", problems, "--reasoning-effort", "high")
    assert "--reasoning-effort high: the chat template of" in line and "does not use it" in line


@pytest.mark.parametrize("template, words", [(QWEN, ""), (THINKING, "no switch for thinking"), (HARMONY, "no switch"),
                                             (None, "no chat template")])
def test_what_a_template_takes_no_notice_of_is_said_in_one_line(template, words, capsys):
    chat.check_template(make_tokenizer(template), "some/model", "")
    said = capsys.readouterr().out.splitlines()
    assert len(said) == bool(words) and all(words in line for line in said)


def test_the_first_prompt_of_each_kind_is_printed_once_and_kept_in_full(tmp_path, capsys):
    tokenizer = make_tokenizer(QWEN)
    for kind, text in (("programs", "short"), ("rankings", "a" * 3000 + "b" * 3000), ("programs", "another")):
        chat.show_first(tmp_path, kind, tokenizer, chat.encode(tokenizer, text, False))
    said, kept = capsys.readouterr().out, (tmp_path / "prompts.txt").read_text()
    assert "another" not in said + kept and "short" in said and "short" in kept
    assert "a" * 3000 + "b" * 3000 in kept and "a" * 1001 not in said and "characters, all in" in said
    assert kept.count("<think>\n\n</think>") == 2  # as the model reads it


# ------------------------------------------------------------------------------------------------------ names, weights


def test_a_short_name_is_the_hubs_and_a_folder_of_that_name_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert full_name("qwen3-4b") == "Qwen/Qwen3-4B" and full_name("GPT-OSS-20B") == "openai/gpt-oss-20b"
    assert full_name("Qwen3-4B-Thinking") == full_name("Qwen3-4B-Thinking-2507") == "Qwen/Qwen3-4B-Thinking-2507"
    assert full_name("some/model") == "some/model" and full_name("") == ""
    args = dust.parse_args(["--model", "Qwen3-4B", "--mode", "sft", "--teacher", "Qwen3-30B-Instruct"])
    assert (args.model, args.teacher) == ("Qwen/Qwen3-4B", "Qwen/Qwen3-30B-A3B-Instruct-2507")
    (tmp_path / "Qwen3-4B").mkdir()
    assert dust.parse_args(["--model", "Qwen3-4B"]).model == "Qwen3-4B"


def test_help_lists_the_short_names(capsys):
    with pytest.raises(SystemExit):
        dust.parse_args(["--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in SHORT_NAMES)


@pytest.mark.parametrize("where", ["question", "download"])
def test_a_gated_model_says_what_to_do(where, monkeypatch):
    """GatedRepoError is a RepositoryNotFoundError: as that it would read "no such model"."""
    import huggingface_hub
    import transformers

    gated = huggingface_hub.errors.GatedRepoError("no", response=SimpleNamespace(headers={}, request=None))

    def load(name, local_files_only):
        if local_files_only:
            raise OSError("not here")
        raise OSError("You are trying to access a gated repo.\nMake sure to ...") from gated

    def ask(*a, **k):
        if where == "question":
            raise gated

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", load)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", ask)
    with pytest.raises(BadInput, match="--model some/model is gated: accept its licence .* `hf auth login`"):
        load_config("some/model")


@pytest.mark.parametrize("family", ["qwen3-moe", "gpt-oss"])
def test_the_arithmetic_of_experts_is_near_what_a_backward_pass_keeps(family):
    """As dense layers of one expert's width the plan would promise 30B models room that they do not have."""
    config = type(CONFIGS[family][0])(**CONFIGS[family][0].to_dict() | {
        "vocab_size": 37, "num_experts_per_tok": 4, "hidden_size": 64, "eos_token_id": 2, "layer_types": None})
    model = AutoModelForCausalLM.from_config(config)
    grpo.enable_sharing(model)
    group = torch.arange(100) % 37, [torch.arange(40) % 37] * 8
    kept = bytes_kept(model, lambda: grpo.logprobs(model, [group], 1.0))
    shape = memory.shape_of(config)
    assert kept == pytest.approx(memory.activations(shape, 100 + 8 * 39, 4, False), rel=0.25)
    pytest.importorskip("peft")
    dust.add_lora(model, 3, 0)
    assert 3 * shape.adapted == sum(p.numel() for p in model.parameters() if p.requires_grad)


FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def test_mxfp4_weights_become_ordinary_ones_and_are_saved_as_such(tmp_path):
    """GPT-OSS ships its experts in 4 bits, two to a byte and a scale for 32; the configuration goes on saying so."""
    folder = make_model(tmp_path / "model", "gpt-oss")
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
    assert memory.shape_of(load_config(str(folder))[0]).parameters > 0
    model, tokenizer = load_model(str(folder), optimizer="fp32", shard=False, device="cpu")
    state = model.state_dict()
    assert wanted and all(torch.equal(state[name], value) for name, value in wanted.items())
    assert {value.dtype for value in state.values()} == {torch.float32}, "masters in bf16 do not move"
    dust.save_model(tmp_path / "saved", model, tokenizer)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert state.keys() == again.keys() and all(torch.equal(state[name], again[name]) for name in state)


def test_weights_of_another_quantisation_are_refused_in_one_line(tmp_path):
    folder = make_model(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(BadInput, match=r"quantised \(fp8\) and cannot be trained"):
        load_model(str(folder), optimizer="fp32", shard=False, device="cpu")


@pytest.mark.parametrize("option", ["--model", "--teacher", "--init", "--rank-with"])
def test_a_model_that_does_not_load_is_called_by_its_own_option(option, tmp_path):
    """A broken folder given as --teacher was said to be --model's, which the user had not even given."""
    folder = make_model(tmp_path / "model", "llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadInput, match=f"^{option} {folder} does not load"):
        load_model(str(folder), optimizer="fp32", shard=False, device="cpu", option=option)


def test_a_download_that_was_stopped_goes_on(monkeypatch):
    """Its configuration is here, its weights are not: as "local" the model would never load again."""
    from plumbing.models import from_hub

    asked = []

    def load(name, local_files_only=False):
        asked.append(local_files_only)
        if local_files_only:
            raise OSError("no weights")
        return "model"

    assert from_hub(SimpleNamespace(from_pretrained=load), "some/model", True) == "model" and asked == [True, False]


# ------------------------------------------------------------------------------------------------------------- presets


def test_the_release_preset_is_the_papers_with_each_documented_difference():
    """Each is one field whose default is the paper's (tutorial.md, "Where the paper and its release disagree")."""
    paper, release = (dust.parse_args(["--model", "some/model", "--preset", name]) for name in ("paper", "release"))
    changed = {name: (getattr(paper, name), getattr(release, name)) for name in vars(paper)
               if getattr(paper, name) != getattr(release, name)}
    assert changed == {
        "preset": ("paper", "release"), "clip_high": (0.0, 0.28), "dual_clip": (0.0, 10.0),
        "loss": ("sequence", "token"), "kl": (0.001, 0.0), "weight_decay": (0.0, 0.1), "warmup": (0, 10),
        "labels": ("binary", "fractional"), "parser": ("strict", "lenient"), "shuffle": (True, False),
        "question": ("problem", "prompt"), "repeats": (10, 6), "eval_temperature": (0.6, 1.0),
    }


def test_presets_and_data_follow_the_model_and_what_is_given_wins():
    shipped, other = dust.parse_args([]), dust.parse_args(["--model", "some/model"])
    assert (shipped.preset, shipped.train, shipped.eval) == ("laptop", "micro-train", "micro-eval")
    assert (other.preset, other.train, other.eval) == ("paper", "rstar-coder", "livecodebench-v6")
    assert all(getattr(other, name) == value for name, value in PAPER.items())
    mine = dust.parse_args("--model some/model --eval mine.jsonl --preset release --clip-high 0.5".split())
    assert (mine.train, mine.eval, mine.clip_high, mine.dual_clip) == ("rstar-coder", "mine.jsonl", 0.5, 10.0)
    assert dust.parse_args(["--model", "some/model", "--preset", "laptop"]).train == "micro-train"


@pytest.mark.parametrize("arguments, reason", [
    (["--dual-clip", "0.5"], "--dual-clip is 0.5; it has to be above 1"),
    (["--rank-with", "nowhere"], "--rank-with only measures"),
    (["--warmup", "-1"], "--warmup is -1"),
])
def test_new_settings_that_cannot_work_are_refused(capsys, arguments, reason):
    assert reason in error_of(capsys, *arguments)


@pytest.fixture
def updates(monkeypatch) -> list[dict]:
    """The settings of each update, with its learning rate and weight decay."""
    calls, update = [], dust.grpo.update

    def spy(model, optimizer, rollouts, args, **settings):
        own = {name: optimizer.param_groups[0][name] for name in ("lr", "weight_decay")}
        calls.append(vars(args) | settings | own | {"rewards": [r for one in rollouts for r in one.rewards.tolist()]})
        return update(model, optimizer, rollouts, args, **settings)

    monkeypatch.setattr(dust.grpo, "update", spy)
    return calls


def test_the_releases_settings_reach_the_update(tmp_path, problems, updates, monkeypatch):
    asked, ranking_prompt = [], rank_prompt.ranking_prompt
    monkeypatch.setattr(rank_prompt, "ranking_prompt", lambda *a: (asked.append(a[0]), ranking_prompt(*a))[1])
    monkeypatch.setitem(rank_prompt.READERS, "strict", lambda *a: pytest.fail("neither for rewards nor in the report"))
    monkeypatch.setattr(rank_prompt, "parse_ranking", rank_prompt.READERS["strict"])
    out = tmp_path / "run"
    tests = [{"input": "", "output": "1\n"}, {"input": "", "output": "1.0\n"}, {"input": "", "output": "3\n"}]
    lines = [json.loads(line) | {"tests": tests} for line in problems.read_text().splitlines()]
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps(line | {"question": "Now " + line["question"]}) + "\n" for line in lines))
    model = make_model(tmp_path / "model", "qwen3")
    assert run_dust("--model", model, "--train", train, "--eval", problems, "--out", out, "--preset", "release",
                    *SMALL, "--max-new-tokens", "12", "--lr", "0.003", "--save-every", "1") == 0
    first, clips = updates[0], ("clip", "clip_high", "dual_clip", "loss")
    assert [first[name] for name in clips] == [0.2, 0.28, 10.0, "token"]
    assert (first["kl"], first["reference"], first["weight_decay"]) == (0.0, None, 0.1)
    assert [round(one["lr"], 9) for one in updates] == [0.0003, 0.0006]
    labels = {json.loads(line)["share"] for line in (out / "candidates.jsonl").read_text().splitlines()}
    assert labels == {0.0, 2 / 3}  # so no program is right, and yet there are pairs
    assert {json.loads(line)["correct"] for line in (out / "candidates.jsonl").read_text().splitlines()} == {False}
    assert any(reward > 0 for one in updates for reward in one["rewards"])
    assert asked and all("reads from standard input" in question for question in asked)  # all of the other prompt


def test_the_papers_settings_reach_the_update(tmp_path, llama, updates):
    assert run_dust(*llama["arguments"], "--out", tmp_path / "run") == 0
    first, clips = updates[0], ("clip", "clip_high", "dual_clip", "loss")
    assert [first[name] for name in clips] == [0.2, 0.0, 0.0, "sequence"]
    assert (first["kl"], first["weight_decay"], [one["lr"] for one in updates]) == (0.001, 0.0, [0.003, 0.003])


def test_groups_are_shown_anew_in_each_step_unless_told_otherwise(monkeypatch):
    candidates = [Candidate("p", str(i), f"code {i}", i < 2) for i in range(4)]
    group = Group(Problem("p", "Q", []), candidates)
    shown = {True: set(), False: set()}
    monkeypatch.setattr(dust, "draw_answers", lambda *a, **k: [])
    monkeypatch.setattr(dust, "score_rollouts", lambda *a: {})
    for shuffle, orders in shown.items():
        monkeypatch.setattr(dust, "ranking_ids", lambda t, g, a: orders.add(tuple(c.answer for c in g.candidates)))
        for step in range(6):
            dust.experience(None, None, [], [group], step, dust.Args(batch=1, shuffle=shuffle), None, None, None)
    assert shown[False] == {tuple("0123")} and len(shown[True]) > 2


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


def test_the_learning_rate_grows_and_then_stays():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    rates = []
    for step in range(6):
        warm_up(optimizer, 2.0, step, 4)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    warm_up(optimizer, 2.0, 0, 0)
    assert optimizer.param_groups[0]["lr"] == 2.0


# ---------------------------------------------------------------------- the judge, the data, and a run that is long


def test_another_model_can_judge_and_the_programs_stay_those_of_the_first(tmp_path, problems, monkeypatch):
    efforts, render = {}, chat.render
    spy = lambda own, *a, **k: (efforts.update({own.chat_template: a[2:]}), render(own, *a, **k))[1]  # noqa: E731
    monkeypatch.setattr(chat, "render", spy)
    model, other = make_model(tmp_path / "model", "qwen3"), make_model(tmp_path / "judge", "gpt-oss")
    command = ["--model", model, "--eval", problems, "--eval-only", "--preset", "laptop", *SMALL,
               "--max-new-tokens", "12", "--eval-temperature", "1"]
    assert run_dust(*command, "--out", tmp_path / "own") == 0
    assert run_dust(*command, "--rank-with", other, "--reasoning-effort", "low", "--out", tmp_path / "other") == 0
    own, others = tmp_path / "own" / "journal", tmp_path / "other" / "journal"
    assert (own / "base-samples.jsonl").read_text() == (others / "base-samples.jsonl").read_text()
    assert (own / "base-rankings.jsonl").read_text() != (others / "base-rankings.jsonl").read_text()
    assert efforts[HARMONY] == ("low",)
    rows = [json.loads((tmp_path / name / "report.json").read_text())["rows"] for name in ("own", "other")]
    assert list(rows[1]) == ["base"] and rows[0]["base"]["pass1"] == rows[1]["base"]["pass1"]


def test_training_problems_of_the_evaluation_are_left_out_and_counted(tmp_path, problems, capsys):
    """By their statement, for ids differ between sets; --limit counts what is left."""
    lines = [json.loads(line) for line in problems.read_text().splitlines()]
    train = tmp_path / "train.jsonl"
    mine = [{"id": f"new{i}", "question": f"Another {i}", "tests": lines[0]["tests"]} for i in range(3)]
    renamed = [line | {"id": "x" + line["id"]} for line in lines[:2]]
    train.write_text("".join(json.dumps(line) + "\n" for line in [*renamed, *mine]))
    args = dust.parse_args(["--train", str(train), "--eval", str(problems), "--limit", "2", "--eval-limit", "4"])
    own, held_out = dust.problems_of(args)
    assert "2 of 5 problems of --train left out" in capsys.readouterr().out
    assert [p.id for p in own] == ["new0", "new1"] and [p.id for p in held_out] == ["p0", "p2", "p4", "p6"]
    train.write_text("".join(json.dumps(line) + "\n" for line in renamed))
    assert "every problem of --train" in error_of(capsys, "--train", train, "--eval", problems)
    assert len(dust.problems_of(dust.replace(args, train=str(problems), limit=0))[0]) == 8  # meant so, and said
    assert "are the same" in capsys.readouterr().out


def test_a_run_of_days_says_after_its_first_batch_how_to_become_shorter(monkeypatch, capsys):
    """After the last one it would be too late. 100 s for 1 of 2000 units, and as much work again: 4.6 days."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "time", lambda: now[0])
    clock = dust.Clock({"sample": 2000, "train": 2000}, {"sample": {"--limit": 500, "--candidates": 16}})
    with clock.stage("sample", 500) as bar:
        for _ in range(2):
            now[0] += 100
            bar.update(0.25)
            clock.propose("sample", bar)
    said = capsys.readouterr().out
    assert said.count("days to go") == 1 and "about 4.6 days" in said and "--limit 108 or --candidates 3" in said
    clock = dust.Clock({"sample": 2000}, {"sample": {"--limit": 500}})
    with clock.stage("sample", 500) as bar:
        now[0] += 10
        bar.update(0.25)
        clock.propose("sample", bar)
    assert "days" not in capsys.readouterr().out


@pytest.mark.parametrize("repeats, finals", [(1, 0), (2, 3), (3, 3), (4, 6)])
def test_the_plan_counts_a_final_for_each_two_groups_of_a_problem(repeats, finals, monkeypatch, tmp_path):
    """With --repeats 1 it planned half as many rankings again as there would be, and the time with them."""
    monkeypatch.setattr(runs, "Clock", lambda work, smaller: work)
    held_out = [Problem(f"p{i}", "?", []) for i in range(3)]
    work = runs.plan(held_out, held_out, dust.Args(repeats=repeats), tmp_path, [])
    assert work["base: rankings"] == work["trained: rankings"] == 3 * repeats + finals


def test_the_plan_counts_the_frozen_teacher_that_has_no_kl_to_need_it(tmp_path):
    problems = [Problem("p", "?", [])]
    needs = [" ".join(runs.fit(dust.Args(mode=mode, kl=0.0, device="cpu"), {}, problems)[2]) for mode in ("sft", "rank")]
    assert "reference" in needs[0] and "reference" not in needs[1]


@pytest.mark.parametrize("lora", [0, 4])
def test_the_plan_counts_a_teacher_of_another_size(tmp_path, lora):
    """It was counted as a copy of --model, and with adapters not at all: a small model with a large teacher did not fit
    though the plan said so."""
    config = load_config(dust.Args.model)[0]
    config.num_hidden_layers, config.num_key_value_heads, config.layer_types = 9, config.num_attention_heads, None
    config.save_pretrained(tmp_path)
    small, large = (memory.shape_of(load_config(name)[0]) for name in (dust.Args.model, str(tmp_path)))
    settings = dict(lora=lora, rows=8, row_tokens=100, micro_tokens=100)
    need = memory.expected(small, "masters", **settings, teacher=large)
    assert need["reference"] == 2 * large.parameters > 2 * small.parameters and need["weights"] < need["reference"]
    cache = memory.expected(large, "masters", **settings)["KV cache"]
    assert need["KV cache"] == cache > memory.expected(small, "masters", **settings)["KV cache"]
    sharded = memory.expected(small, "masters", **settings, teacher=large, shards=8)
    assert sharded["gathered weights"] == 2 * large.parameters
    args = dust.Args(mode="sft", teacher=str(tmp_path), device="cpu", optimizer="masters")
    assert f"reference {memory.size(2 * large.parameters)}" in " ".join(runs.fit(args, {}, [Problem("p", "?", [])])[2])


def test_an_error_without_words_is_not_answered_with_another():
    assert runs.what_to_put_right(NotImplementedError()) == "" == runs.what_to_put_right(RuntimeError(""))
    assert runs.what_to_put_right(MemoryError("can't allocate memory: 9 bytes")).startswith("out of memory: lower --rows")


# -------------------------------------------------------------------------------------------------- fractional labels


def test_a_share_of_the_tests_is_a_label_and_only_all_of_them_make_a_program_correct():
    """A pool stops a job where a test fails: each test has to be a job of its own, of the right program."""
    class Pool:
        def label(self, jobs):
            return [all(test["output"] in code for test in tests) for code, tests in jobs]

    tests = {"p": [{"output": "a"}, {"output": "b"}], "q": [{"output": "a"}, {"output": "c"}, {"output": "d"}]}
    programs = [("p", "ab"), ("p", "a"), ("q", "acb"), ("q", "x")]
    assert dust.run_tests(Pool(), programs, tests, dust.Args()) == [1, 0, 0, 0]
    shares = dust.run_tests(Pool(), programs, tests, dust.Args(labels="fractional"))
    assert shares == pytest.approx([1, 1 / 2, 2 / 3, 0])
    candidates = [Candidate(name, "", code) for name, code in programs] + [Candidate("p", "", None)]
    dust.set_labels(candidates, dict(zip(programs, shares)), dust.Args(labels="fractional"))
    assert [c.correct for c in candidates] == [True, False, False, False, False]
    assert [c.label for c in candidates] == [*shares, 0]
    problem = Problem("q", "", [])
    assert [g.labels for g in dust.make_groups([problem], candidates, 2)] == [[shares[2], 0]]
    dust.set_labels(candidates, dict(zip(programs, [1, 0, 0, 0])), dust.Args())
    assert [c.label for c in candidates] == [1, 0, 0, 0, 0] and dust.make_groups([problem], candidates, 2) == []
