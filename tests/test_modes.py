"""Test the training modes of the paper's table 3 and figure 3: what each learns from, and what it must not learn."""
import contextlib
import gc
import json
import shutil
import signal
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

import dust
import rank_prompt
from plumbing import models, ranks, report, runs
from plumbing.problems import Problem
from dust import Candidate, Group, RankedGroup
from test_dust import ROOT, error_of, run_and_die, run_dust

MANY = ["--answers", "64"]  # so that a random judge orders some group without a fault
MODES = ["rank", "rank-onpolicy", "generate", "iterative", "sft"]


def steps_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights_of(model) -> float:
    return float(sum(p.detach().double().sum() for p in model.parameters()))


@pytest.fixture
def seen(monkeypatch) -> dict:
    """Record the rollouts of each update, and the weights of the model that drew the answers."""
    calls = {"rollouts": [], "weights": []}
    update, draw_for_training = dust.grpo.update, dust.draw_for_training

    def spy_update(model, optimizer, rollouts, *arguments, **settings):
        calls["rollouts"].append(rollouts)
        return update(model, optimizer, rollouts, *arguments, **settings)

    def spy_draw(model, *arguments):
        calls["weights"].append(weights_of(model))
        return draw_for_training(model, *arguments)

    monkeypatch.setattr(dust.grpo, "update", spy_update)
    monkeypatch.setattr(dust, "draw_for_training", spy_draw)
    return calls


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_goes_from_problems_to_report_and_is_the_same_when_resumed(llama, tmp_path, mode):
    command = [*llama["arguments"], "--mode", mode, "--steps", "4", "--block", "1", *(MANY if mode == "sft" else [])]
    assert run_dust(*command, "--out", tmp_path / "whole") == 0
    assert list(json.loads((tmp_path / "whole" / "report.json").read_text())["gains"]) == ["judge", "both"]
    assert [step["step"] for step in steps_of(tmp_path / "whole")] == [1, 2, 3, 4]
    half = [*command, "--out", str(tmp_path / "half"), "--resume"]
    assert run_and_die("step", 2, half) == -signal.SIGKILL  # behind the third update; the checkpoint is of step 2
    assert run_dust(*half) == 0
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name / "model") for name in ("whole", "half")]
    assert all(map(torch.equal, *(model.parameters() for model in models)))


def test_generation_is_paid_for_passing_and_for_nothing_else(llama, tmp_path, seen):
    """This mode rewards programs, and never rankings. The verdict of the sandbox decides the reward."""
    assert run_dust(*llama["arguments"], "--mode", "generate", "--out", tmp_path / "run") == 0
    tokenizer = AutoTokenizer.from_pretrained(llama["folder"] / "model")
    paid = {True: set(), False: set()}
    for rollout in sum(seen["rollouts"], []):
        for answer, reward in zip(rollout.answers, rollout.rewards.tolist()):
            code = rank_prompt.extract_code(models.answer_text(tokenizer, rollout.prompt, answer))
            paid[code in ("print(1)", "print(1.0)")].add(reward)
    assert paid == {True: {1.0}, False: {0.0}}


def test_a_program_runs_on_the_tests_of_its_own_problem(monkeypatch):
    """The problems of conftest.py have one prompt and one test, so no run of them would show a mix-up."""
    problems = [Problem(name, name, [{"input": "", "output": name}]) for name in "abc"]

    def draw_for_training(model, tokenizer, prompts, count, *_):
        return [dust.grpo.Rollout(prompt, [prompt] * count, [torch.zeros(1)] * count, [True] * count)
                for prompt in prompts]

    monkeypatch.setattr(dust, "program_ids", lambda tokenizer, problem, args: torch.tensor([ord(problem.question)]))
    monkeypatch.setattr(dust, "draw_for_training", draw_for_training)
    monkeypatch.setattr(dust, "texts_of", lambda tokenizer, rollout: [
        f"```python\nprint({chr(int(answer))!r})\n```" for answer in rollout.answers])
    _, candidates = dust.draw_programs(None, None, problems, 2, dust.Args(workers=1), None)
    assert [(c.problem_id, c.correct) for own in candidates for c in own] == [(name, True) for name in "aabbcc"]


def test_onpolicy_candidates_come_from_the_weights_of_the_step(llama, tmp_path, seen):
    """With candidates of the base this would be the mode `rank`, only slower. The judge gets only mixed groups."""
    assert run_dust(*llama["arguments"], "--mode", "rank-onpolicy", "--steps", "3", "--out", tmp_path / "run") == 0
    programs, rankings = seen["weights"][::2], seen["weights"][1::2]
    assert programs == rankings and len(set(programs)) == 3
    assert all(step["prompts"] > 0 and "constant" in step for step in steps_of(tmp_path / "run"))


def test_a_problem_that_stands_twice_in_a_batch_has_other_groups_at_each_place(monkeypatch):
    """With three problems and --batch 6 each group came twice, as an exact copy, and the last problem had none."""
    problems = [Problem(name, "Q", []) for name in "abacba"]
    drawn = [[Candidate(p.id, f"{place}{i}", "x", i % 2 == 0) for i in range(8)] for place, p in enumerate(problems)]
    monkeypatch.setattr(dust, "draw_programs", lambda *_: ([], drawn))
    monkeypatch.setattr(dust, "ranking_ids", lambda *_: torch.zeros(1))
    monkeypatch.setattr(dust, "fitting_groups", lambda model, tokenizer, groups, args: groups)
    groups = dust.fresh_groups(None, None, problems, dust.Args(batch=12), None)
    assert [c.answer for group in groups for c in group.candidates] == [c.answer for own in drawn for c in own]
    assert [group.problem.id for group in groups] == list("aabbaaccbbaa")


def test_a_stage_whose_answers_are_cut_off_says_so_once_and_again_when_resumed(llama, tmp_path, capsys):
    """A model that never ends an answer had a report of zeros, and no word about the reason."""
    command = [*llama["arguments"], "--max-new-tokens", "1", "--out", tmp_path / "run"]
    drawn = ["samples", "base-samples", "base-rankings", "judge-rankings", "trained-samples", "trained-rankings"]
    for arguments, stages in (([], [*drawn, "train"]), (["--resume"], drawn)):  # training is over: no answers are drawn
        assert run_dust(*command, *arguments) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if "of the answers are cut off" in line]
        assert sorted(line.split(":")[0].strip() for line in lines) == sorted(stages)
        assert all("--max-new-tokens" in line and "end token" in line for line in lines)
    assert not runs.warn_if_cut(tmp_path / "samples.jsonl", 0.5) and not capsys.readouterr().out
    assert runs.warn_if_cut(tmp_path / report.CURVE / "10-rankings.jsonl", 0.6) and not capsys.readouterr().out


def test_a_part_of_a_stage_that_takes_long_has_a_bar(llama, tmp_path, capsys, monkeypatch):
    """On a real model a chunk of answers, or one step's update, takes minutes, and the stage's bar stood still."""
    for seconds, shown in ((0, True), (1000, False)):
        monkeypatch.setattr(ranks, "LONG_PART", seconds)
        assert run_dust(*llama["arguments"], "--steps", "1", "--out", tmp_path / str(shown)) == 0
        printed = capsys.readouterr().err
        assert [name in printed for name in ("\r  tokens  ", "\r  micro-batches  ")] == [shown, shown]


def test_half_a_character_in_an_answer_ends_no_run(monkeypatch):
    """A tokenizer in Python can decode to half of a surrogate pair, which no file, seed or prompt can hold."""
    monkeypatch.setattr(models, "answer_text", lambda *_: "print('\ud83d 题')")
    rollout = dust.grpo.Rollout(torch.zeros(1), [torch.zeros(2)], [torch.zeros(2)], [True])
    [text] = dust.texts_of(None, rollout)
    assert text.encode() == "print('? 题')".encode()


def test_iterative_changes_its_task_after_each_block(llama, tmp_path):
    command = [*llama["arguments"], "--mode", "iterative", "--steps", "5", "--block", "2", "--out", tmp_path / "run"]
    assert run_dust(*command) == 0
    assert ["constant" in step for step in steps_of(tmp_path / "run")] == [False, False, True, True, False]


def test_sft_learns_a_fixed_set_of_perfect_rankings_that_is_drawn_before_training(llama, tmp_path, seen, monkeypatch):
    """SFT must learn only perfect rankings of a teacher that stands still. With the student's it would be GRPO."""
    teachers, groups, perfect_rankings = [], [], dust.perfect_rankings

    def spy(model, *arguments):
        teachers.append(weights_of(model))
        groups.extend(group.shuffled(0, "sft", i) for i, group in enumerate(arguments[1]))
        return perfect_rankings(model, *arguments)

    monkeypatch.setattr(dust, "perfect_rankings", spy)
    assert run_dust(*llama["arguments"], "--mode", "sft", *MANY, "--epochs", "2", "--out", tmp_path / "run") == 0
    assert teachers == [weights_of(AutoModelForCausalLM.from_pretrained(llama["folder"] / "model"))]
    lines = [json.loads(line) for line in (tmp_path / "run" / "teacher-rankings.jsonl").read_text().splitlines()]
    fixed = [answers for _, answers in lines if answers]
    learned = [[answer.tolist() for answer in r.answers] for r in sum(seen["rollouts"], [])]
    assert len(learned) >= 2 * len(fixed) and all(answers in fixed for answers in learned)
    assert all(learned.count(answers) >= 2 for answers in fixed)  # two passes, the last batch filled from a third
    assert len(seen["rollouts"]) == -(-2 * len(fixed) // 3)
    tokenizer = AutoTokenizer.from_pretrained(llama["folder"] / "model")
    for place, answers in lines:
        labels = groups[int(place)].labels
        assert all(rank_prompt.score(tokenizer.decode(ids[:-1]), labels) == 1.0 for ids in answers)
    assert all(step["reward"] == 1.0 for step in steps_of(tmp_path / "run"))
    for step, rollouts in zip(steps_of(tmp_path / "run"), seen["rollouts"]):  # a group can have fewer than G of them
        learned = sum(len(answer) for rollout in rollouts for answer in rollout.answers)
        assert step["tokens_per_second"] * step["seconds"] == pytest.approx(learned)


def test_a_teacher_without_a_perfect_ranking_is_one_line(llama, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dust.rank_prompt, "score", lambda *_: 0.5)
    said = error_of(capsys, *llama["arguments"], "--mode", "sft", "--out", tmp_path / "run")
    assert "ranks no group without a fault" in said and "--teacher" in said


def test_a_teacher_with_other_tokens_is_learned_in_the_students_own(llama, tmp_path, seen):
    """A teacher of another family has other ids for the same words. Unconverted, they would be noise to the student."""
    teacher = tmp_path / "teacher"
    shutil.copytree(llama["folder"] / "model", teacher)
    tokenizer = json.loads((teacher / "tokenizer.json").read_text())
    added = [t for t in tokenizer["added_tokens"] if not t["special"]]
    ids = [t["id"] for t in added]
    for token, number in zip(added, ids[3:] + ids[:3]):  # the same words, other ids
        token["id"] = number
    tokenizer["added_tokens"].sort(key=lambda token: token["id"])
    (teacher / "tokenizer.json").write_text(json.dumps(tokenizer))
    command = [*llama["arguments"], "--mode", "sft", *MANY, "--teacher", teacher, "--out", tmp_path / "run"]
    assert run_dust(*command) == 0
    own = AutoTokenizer.from_pretrained(llama["folder"] / "model")
    answers = [own.decode(answer) for r in sum(seen["rollouts"], []) for answer in r.answers]
    assert answers and all(rank_prompt.parse_ranking(text.removesuffix("</s>"), 4) for text in answers)


def test_init_starts_from_the_other_runs_model_and_measures_the_base(llama, tmp_path):
    """GRPO after SFT: the report's first row is still the base, and training starts from the other run's model."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert run_dust(*llama["arguments"], "--mode", "sft", *MANY, "--lr", "0.01", "--out", first) == 0
    assert run_dust(*llama["arguments"], "--init", first, "--steps", "0", "--out", second) == 0
    models = [AutoModelForCausalLM.from_pretrained(run / "model") for run in (first, second)]
    assert weights_of(models[0]) == weights_of(models[1])
    rows = [json.loads((run / "report.json").read_text())["rows"] for run in (first, second)]
    assert rows[0]["base"] == rows[1]["base"] and rows[0]["trained"] == rows[1]["trained"]


def test_the_base_is_gone_before_the_model_of_init_is_loaded(llama, tmp_path, monkeypatch):
    """Two models may not fit a GPU's memory."""
    loaded, load = [], dust.load

    def spy(*arguments):
        gc.collect()
        assert not any(old() for old in loaded)
        model, tokenizer = load(*arguments)
        loaded.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(dust, "load", spy)
    init = llama["folder"] / "model"
    assert run_dust(*llama["arguments"], "--init", init, "--kl", "0", "--steps", "1", "--out", tmp_path / "run") == 0
    assert len(loaded) == 2


def test_a_missing_init_is_one_line(llama, capsys):
    assert "no such folder" in error_of(capsys, *llama["arguments"], "--init", "nowhere", "--out", "unused")


@pytest.mark.parametrize("thinking, programs, rankings",
                         [("both", True, True), ("programs", True, False), ("rankings", False, True),
                          ("none", False, False)])
def test_thinking_is_chosen_for_each_task_apart(thinking, programs, rankings):
    """Qwen3's template switches thinking off by an empty thinking part. The transfer study needs all four cases."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny")
    args = dust.parse_args(["--thinking", thinking])
    problem = Problem("p", "Read three digits.", [])
    group = Group(problem, [Candidate("p", "", "print(1)")] * 4)
    for prompt, thinks in ((dust.program_ids(tokenizer, problem, args), programs),
                           (dust.ranking_ids(tokenizer, group, args), rankings)):
        assert tokenizer.decode(prompt).endswith("</think>\n\n") is not thinks


def test_how_many_answers_decode_at_a_time_changes_none_of_them(llama, tmp_path):
    """--rows limits memory and may change on --resume, so it must not influence what is drawn."""
    for rows in ("3", "256"):
        assert run_dust(*llama["arguments"], "--eval-only", "--repeats", "2", "--rows", rows, "--out", tmp_path / rows) == 0
    for name in ("base-samples.jsonl", "base-rankings.jsonl", "base-finals.jsonl"):
        few, many = (dict(map(json.loads, (tmp_path / rows / name).read_text().splitlines()))
                     for rows in ("3", "256"))
        assert few == many and few


def test_the_final_of_eight_holds_the_better_half_of_each_group():
    """A final of Best-of-8 has the two best of each of two groups, because training ranks four. Ignore an odd group."""
    problems = [Problem(name, "", []) for name in "ab"]
    judged = []
    for problem in problems:
        for repeat in range(3):
            own = [Candidate(problem.id, f"{repeat}{place}", "x") for place in range(4)]
            judged.append(RankedGroup(Group(problem, own[::-1]), own, "", False))
    finals = dust.final_groups(judged, 3)
    assert [final.problem.id for final in finals] == ["a", "b"]
    assert [c.answer for c in finals[1].candidates] == ["00", "01", "10", "11"]


def test_a_teacher_under_adapters_is_the_base(llama, tmp_path, monkeypatch):
    """With LoRA the teacher is the model before it has adapters. With trained ones, the student would teach itself."""
    pytest.importorskip("peft")
    adapters, perfect_rankings = [], dust.perfect_rankings

    def spy(model, *arguments):
        adapters.append([layer for layer in model.modules() if hasattr(layer, "lora_A")])
        return perfect_rankings(model, *arguments)

    monkeypatch.setattr(dust, "perfect_rankings", spy)
    command = [*llama["arguments"], "--mode", "sft", *MANY, "--lora", "2", "--out", tmp_path / "run"]
    assert run_dust(*command) == 0
    assert adapters == [[]]


def test_a_thinking_part_that_both_templates_open_is_opened_once(tmp_path, monkeypatch):
    """Qwen3-4B-Thinking, with Qwen3-30B-Thinking as its teacher, learned to begin with a second <think>."""
    student, teacher = (AutoTokenizer.from_pretrained(ROOT / "data" / "tiny") for _ in range(2))
    student.chat_template = teacher.chat_template = teacher.chat_template + "{{ '<think>\n' }}"
    said = "\nTry:\n</think>\n\nRanking: 1, 2, 3, 4"

    def draw(model, tokenizer, asked, *_):
        ids = torch.tensor([*tokenizer(said, add_special_tokens=False).input_ids, end])
        return [dust.grpo.Rollout(prompt, [ids], [torch.zeros(len(ids))], [True]) for prompt, _ in asked]

    end = student.eos_token_id
    student.eos_token = None  # some models name their end token only in the generation config
    monkeypatch.setattr(dust, "load", lambda *_, **__: (SimpleNamespace(config=Qwen3Config()), teacher))
    monkeypatch.setattr(dust, "draw", draw)
    args = dust.parse_args(["--mode", "sft", "--teacher", "other", "--rows", "8", "--no-shuffle"])
    group = Group(Problem("p", "Read.", []), [Candidate("p", "", "print(1)", i < 2) for i in range(4)])
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[end]))
    [rollout] = dust.perfect_rankings(model, student, [group], args, tmp_path / "teacher-rankings.jsonl")
    whole = student.decode(torch.cat([rollout.prompt, rollout.answers[0]]))
    assert whole.count("<think>") == 1 and whole.endswith("Ranking: 1, 2, 3, 4<|im_end|>")
    student.chat_template = "<|channel|>"
    with pytest.raises(dust.BadInput, match="in a way of its own"):
        models.check_others(student, args)


def test_a_teacher_is_not_asked_what_does_not_fit_its_context(llama, tmp_path):
    """A student with a longer context than its teacher's has groups that the teacher cannot read."""
    args = dust.parse_args(["--mode", "sft", "--device", "cpu", "--max-new-tokens", "40"])
    model, tokenizer = dust.load(str(llama["folder"] / "model"), args)
    model.config.max_position_embeddings = 140
    groups = [Group(Problem("p", "Write " * words, []), [Candidate("p", "", "print(1)", i < 2) for i in range(4)])
              for words in (1, 200)]
    with contextlib.suppress(dust.BadInput):  # a random teacher ranks nothing without a fault
        dust.perfect_rankings(model, tokenizer, groups, args, tmp_path / "teacher-rankings.jsonl")
    assert len((tmp_path / "teacher-rankings.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("arguments, reason", [
    (["--eval-only", "--init", "x"], "--init works only without --eval-only"),
    (["--teacher", "x"], "--teacher works only with --mode sft"),
    (["--init", ROOT / "data" / "tiny"], "has other tokens than --model"),
])
def test_an_option_that_would_do_nothing_or_nonsense_is_refused(llama, tmp_path, capsys, arguments, reason):
    assert reason in error_of(capsys, *llama["arguments"], *arguments, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()  # told before anything is sampled
