"""Test what the paper and its release say in single settings: lengths, N of Best-of-N, sets, presets, prompts."""
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dust
import grpo
import rank_prompt
from plumbing import models, problems, runs
from plumbing.problems import Problem
from dust import Candidate, Group
from test_dust import ROOT, run_dust


def model_with(context: int | None):
    text = SimpleNamespace(max_position_embeddings=context)
    return SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))


@pytest.mark.parametrize("length, limit, allowed", [
    (1_000, 32_768, 32_768),  # as the setting says
    (10_000, 32_768, 30_960),  # what the prompt leaves of 40,960
    (1_000, 131_072, 39_960),  # the paper's candidates, which no context of this model holds
    (30_720, 32_768, 10_240),  # a quarter of the context is still left
    (30_721, 32_768, 0),
    (40_000, 192, 192),  # a short answer needs no quarter
    (40_800, 192, 0),
])
def test_an_answer_is_as_long_as_the_setting_or_as_what_the_prompt_leaves_of_the_context(length, limit, allowed):
    assert dust.longest_answer(model_with(40_960), torch.zeros(length), limit) == allowed
    assert dust.longest_answer(model_with(None), torch.zeros(length), limit) == limit


@pytest.mark.parametrize("shared", [True, False])
def test_answers_of_unlike_limits_are_drawn_together_and_are_the_same(llama, shared):
    """Each prompt leaves another part of the context. An answer that ends at its limit's last token is not cut."""
    model = AutoModelForCausalLM.from_pretrained(llama["folder"] / "model").eval()
    if shared:
        assert grpo.enable_sharing(model) == ""
    prompts = [torch.tensor([3, 4, 5, 6]), torch.tensor([7, 8]), torch.tensor([9, 10, 11])]
    seeds, limits, eos = [[1, 2, 3], [4, 5], [6, 7, 8, 9]], [2, 9, 5], [2, 12, 13, 14]
    together = grpo.rollout(model, prompts, seeds, max_new_tokens=limits, eos_ids=eos)
    for i, limit in enumerate(limits):
        [by_itself] = grpo.rollout(model, [prompts[i]], [seeds[i]], max_new_tokens=limit, eos_ids=eos)
        assert all(map(torch.equal, together[i].answers, by_itself.answers))
        assert together[i].finished == by_itself.finished
        assert [bool(torch.isin(a[-1], torch.tensor(eos))) for a in together[i].answers] == together[i].finished
        assert max(map(len, together[i].answers)) <= limit
    assert {ended for r in together for ended in r.finished} == {True, False}


def test_each_stage_has_its_longest_answer(llama, tmp_path, monkeypatch):
    """The paper has 128K for candidates, 32,768 for training answers and 65,536 in the evaluation."""
    asked, draw = [], dust.draw

    def spy(model, tokenizer, pairs, limit, *rest):
        asked.append(limit)
        return draw(model, tokenizer, pairs, limit, *rest)

    monkeypatch.setattr(dust, "draw", spy)
    command = [*llama["arguments"], "--candidate-tokens", "14", "--eval-tokens", "13", "--eval-every", "1"]
    assert run_dust(*command, "--out", tmp_path / "run") == 0  # 12 tokens in training
    order = [limit for i, limit in enumerate(asked) if i == 0 or limit != asked[i - 1]]
    assert order == [14, 13, 12, 13, 12, 13]  # candidates, base, a step, a point of the curve, a step, trained


def test_the_releases_evaluation_draws_six_and_joins_two_groups_in_a_final(llama, tmp_path):
    command = [*llama["arguments"], "--eval-only", "--best-of", "6", "--repeats", "2", "--out", tmp_path / "run"]
    assert run_dust(*command) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "judged.jsonl").read_text().splitlines()]
    assert {len(line["ranked"]) for line in lines if not line["final"]} == {6}
    assert {len(line["ranked"]) for line in lines if line["final"]} == {6}
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert "best_of_6" in report["rows"]["base"] and "best_of_4" not in report["rows"]["base"]
    assert list(report["best_of_n"]["base"]["oracle"]) == ["1", "2", "6", "12"]
    text = (tmp_path / "run" / "report.md").read_text()
    assert "| Best-of-6 | oracle of 6 |" in text and "N = 6 | N = 12 |" in text


def test_a_preset_has_the_papers_values_for_its_model_and_its_mode():
    release = dust.parse_args(["--preset", "release"])
    assert (release.best_of, release.repeats, release.eval_temperature) == (6, 10, 1.0)
    assert (release.top_p, release.top_k) == (1.0, 0)
    paper = dust.parse_args(["--preset", "paper", "--model", "Qwen3-4B"])
    assert (paper.lr, paper.batch, paper.best_of, paper.repeats) == (1e-6, 64, 4, 10)
    assert (paper.candidate_tokens, paper.max_new_tokens, paper.eval_tokens) == (131072, 32768, 65536)
    short = dust.parse_args(["--preset", "paper", "--model", "Qwen3-4B", "--max-new-tokens", "512"])
    assert (short.candidate_tokens, short.max_new_tokens, short.eval_tokens) == (0, 512, 0)  # 512 for all answers
    both = dust.parse_args("--preset paper --model Qwen3-4B --max-new-tokens 512 --eval-tokens 64".split())
    assert (both.candidate_tokens, both.eval_tokens) == (0, 64)
    for name in ("gpt-oss-20b", "openai/GPT-OSS-20B"):
        args = dust.parse_args(["--preset", "paper", "--model", name])
        assert (args.lr, args.batch, args.mini_batch) == (5e-7, 32, 16)
    assert dust.parse_args(["--preset", "paper", "--model", "gpt-oss-20b", "--lr", "1e-5"]).lr == 1e-5
    sft = dust.parse_args(["--preset", "paper", "--model", "Qwen3-4B", "--mode", "sft"])
    assert (sft.lr, sft.epochs, sft.ppo_epochs) == (1e-5, 3, 1)
    assert dust.parse_args(["--mode", "sft"]).epochs == 0  # the laptop's: as many steps as the method


def write_set(path, names: str) -> None:
    tests = [{"input": "", "output": "1\n"}]
    path.write_text("".join(json.dumps({"id": n, "question": f"Write {path.name} {n}.", "tests": tests}) + "\n"
                            for n in names))


def test_each_of_two_sets_has_its_table_in_one_report(llama, tmp_path):
    write_set(tmp_path / "five.jsonl", "abcd")
    write_set(tmp_path / "six.jsonl", "cdefgh")  # two of its ids are also in the other set
    names = f"{tmp_path / 'five.jsonl'},{tmp_path / 'six.jsonl'}"
    everything, chosen = problems.load_evaluation(names, 3)
    assert len(everything) == 10 and len({problem.id for problem in everything}) == 10
    assert [problem.id[-1] for problem in chosen] == ["a", "b", "c", "c", "e", "g"]
    command = [*llama["arguments"], "--eval", names, "--eval-only", "--eval-limit", "3", "--out", tmp_path / "run"]
    assert run_dust(*command) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert list(report["slices"]) == names.split(",")
    assert [part["counts"]["base"]["groups"] for part in report["slices"].values()] == [3, 3]
    text = (tmp_path / "run" / "report.md").read_text()
    assert all(f"## Only: {name}\n" in text for name in names.split(","))
    single = tmp_path / "one, two.jsonl"  # a file may have a comma in its name
    write_set(single, "ab")
    assert [problem.id for problem in problems.load_evaluation(str(single), 0)[1]] == ["a", "b"]


def test_a_model_without_a_thinking_part_is_asked_for_the_ranking_and_nothing_else():
    """Appendix C: instruct models are told so. The shipped model has a switch, and does not know these words."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny")
    group, args = Group(Problem("p", "Read.", []), [Candidate("p", "", "print(1)")] * 4), dust.Args()
    usual = "End with a line of this form:\nRanking: <best>, ..., <worst>"
    assert rank_prompt.ranking_prompt("Q", ["a"]).endswith(usual)
    assert rank_prompt.ranking_prompt("Q", ["a"], brief=True).endswith(usual.replace("End with", "Answer only with"))
    switch, effort = "{% if enable_thinking %}<t>{% endif %}", "{{ reasoning_effort }}"
    turn = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    for template, thinks in ((tokenizer.chat_template, True), (turn + switch, True), (turn + "<think>\n", True),
                             (turn + effort, True), (turn + "<|im_start|>assistant\n", False), (turn, False)):
        tokenizer.chat_template = template
        assert models.can_think(tokenizer) is thinks, template
    asked, encode = [], models.encode
    models_encode = lambda tokenizer, prompt, *rest: asked.append(prompt) or encode(tokenizer, prompt, *rest)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "encode", models_encode)
        dust.ranking_ids(tokenizer, group, args)
        tokenizer.chat_template = turn + switch
        dust.ranking_ids(tokenizer, group, args)
    assert "Answer only with a line" in asked[0] and "End with a line" in asked[1]


def test_the_problems_with_a_mixed_group_are_counted(capsys):
    """The paper gives both numbers: 37K groups of 6.9K of its 10K problems."""
    tests = [{"input": "", "output": ""}]
    made = {name: Problem(name, "Q", tests) for name in "abc"}
    candidates = [Candidate(name, "", f"{name}{i}", i % 2 == 0 and name != "c") for name in made for i in range(8)]
    mixed = dust.make_groups(list(made.values()), candidates, 4)
    runs.check_groups(candidates, mixed, mixed, 4)
    assert "4 mixed groups of 2 of 3 problems; correct candidates in them: 100% with 2" in capsys.readouterr().out
