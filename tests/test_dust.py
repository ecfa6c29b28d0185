"""Test the whole run from sample to report on two kinds of model, killed and resumed runs, and bad input."""
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

import dust
from plumbing import runs
from plumbing.problems import Problem
from conftest import SMALL
from dust import Candidate, Group

torch.set_num_threads(1)  # tiny models need no more, and a forked child must not wait for threads of its parent
dust.tqdm.monitor_interval = 0
ROOT = Path(dust.__file__).resolve().parent


def run_dust(*arguments) -> int:
    return dust.main([str(a) for a in arguments])


def error_of(capsys, *arguments) -> str:
    """Assert that a run ends with exit code 2 and one line on stderr. Return that line."""
    assert run_dust(*arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dust: ")]
    assert len(lines) == 1, lines
    return lines[0]


# --------------------------------------------------------------------------------------------------------- end to end


def read_run(out: Path) -> dict:
    figures = json.loads((out / "report.json").read_text())
    candidates = [json.loads(line) for line in (out / "candidates.jsonl").read_text().splitlines()]
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {"report": figures, "candidates": candidates, "steps": steps}


def check_run(out: Path, problems: int, candidates: int, steps: int) -> None:
    run = read_run(out)
    assert len(run["candidates"]) == problems * candidates
    assert {c["correct"] for c in run["candidates"]} == {True, False}
    assert [s["step"] for s in run["steps"]] == list(range(1, steps + 1))
    logged = {"reward", "malformed", "truncated", "zero_variance", "clip_share", "ref_kl", "entropy", "grad_norm",
              "tokens_per_second"}
    assert all(logged <= set(s) for s in run["steps"])
    rows, gains = run["report"]["rows"], run["report"]["gains"]
    assert list(rows) == ["base", "trained_judge", "trained"] and list(gains) == ["judge", "both"]
    for row in (*rows.values(), *gains.values()):
        assert list(row) == ["pass1", "ndcg_all", "ndcg_mixed", "ndcg_random", "pair_accuracy", "best_of_2", "best_of_4",
                             "oracle"]
        assert all(set(figure) == {"mean", "low", "high"} for figure in row.values())
    assert rows["base"]["pass1"] == rows["trained_judge"]["pass1"]  # the same candidates
    assert rows["base"]["oracle"]["mean"] >= rows["base"]["pass1"]["mean"]
    assert "| base |" in (out / "report.md").read_text()
    assert "The judge's answer" in (out / "examples.md").read_text()


def test_the_shipped_model_goes_from_sample_to_report(tmp_path, capsys):
    out = tmp_path / "run"
    assert run_dust("--out", out, *SMALL) == 0
    check_run(out, 10, 8, 2)
    printed = capsys.readouterr().out
    assert "| trained generator and judge |" in printed
    for stage in ("memory", "sample", "train", "evaluate"):  # the plan
        assert f"  {stage} " in printed
    from transformers import AutoModelForCausalLM

    trained = AutoModelForCausalLM.from_pretrained(out / "model")
    base = AutoModelForCausalLM.from_pretrained(ROOT / "data" / "tiny")
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), base.parameters()))


def test_a_random_llama_goes_through_the_same_code(llama, tmp_path):
    """The code must not depend on the shipped model: this one has no chat template and no pad token."""
    assert run_dust(*llama["arguments"], "--out", tmp_path / "run") == 0
    check_run(tmp_path / "run", 8, 8, 2)


@pytest.mark.parametrize("temperature", [0, 0.6])
def test_eval_only_measures_and_trains_nothing(llama, tmp_path, temperature):
    """Temperature 0 must work too, as the first control: a gain that it also gives does not come from training."""
    assert run_dust(*llama["arguments"], "--eval-only", "--eval-temperature", temperature, "--out", tmp_path / "run") == 0
    figures = json.loads((tmp_path / "run" / "report.json").read_text())
    assert list(figures["rows"]) == ["base"] and figures["gains"] == {}
    assert not (tmp_path / "run" / "model").exists()


# ---------------------------------------------------------------------------------------------------- kill and resume

def run_and_die(where: str, count: int, arguments: list[str]) -> int:
    """Run dust in a child process that kills itself with SIGKILL at one place. Return the child's exit code.

    where: "save" (half of a checkpoint is written), "step" (after the update that follows `count` complete steps),
    "backward" (some gradients of that update are computed), or the file of a stage: after `count` chunks, the next one
    is cut off in the middle of a line.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    signal.alarm(120)  # nothing here may hang the tests
    torn = lambda text: text[: len(text) // 2]  # noqa: E731

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    if where == "save":
        torch.save = lambda state, path: (path.write_bytes(b"half a checkpoint"), die())
    elif where == "step":
        real_update, made = dust.grpo.update, Counter()

        def update(*a, **k):
            metrics = real_update(*a, **k)
            made["steps"] += 1
            return die() if made["steps"] > count else metrics

        dust.grpo.update = update
    elif where == "backward":
        real_loss, made = dust.grpo.policy_loss, Counter()

        def policy_loss(*a, **k):
            made["steps"] += 1
            return die() if made["steps"] > count else real_loss(*a, **k)

        dust.grpo.policy_loss = policy_loss
    else:
        real_append, calls = runs.append_lines, Counter()

        def append_lines(file, values):
            calls[file.stem] += 1
            if file.stem == where and calls[where] > count:
                lines = "".join(json.dumps(value) + "\n" for value in values)
                with file.open("a") as opened:
                    opened.write(torn(lines))
                die()
            real_append(file, values)

        runs.append_lines = append_lines
    code = 1
    try:
        code = dust.main(arguments)
    finally:
        os._exit(code)


KILLS = [("samples", 1), ("labels", 0), ("base-samples", 0), ("base-labels", 0), ("base-rankings", 0), ("step", 0),
         ("save", 0), ("step", 1), ("backward", 1), ("judge-rankings", 0), ("trained-samples", 1), ("trained-labels", 0), ("trained-rankings", 0)]


def test_a_run_that_is_killed_in_every_stage_ends_as_one_that_was_not(llama, tmp_path):
    """The run gets SIGKILL in each stage, with half a line or half a checkpoint on the disk, and is resumed each time.

    The result must be the same to the last bit, and no item of work may be kept twice.
    """
    arguments = [*llama["arguments"], "--rows", "16", "--steps", "4"]
    assert run_dust(*arguments, "--out", tmp_path / "whole") == 0
    killed = [*arguments, "--out", str(tmp_path / "killed"), "--resume"]
    for where, count in KILLS:
        assert run_and_die(where, count, killed) == -signal.SIGKILL, where
    assert run_dust(*killed) == 0
    one, other = read_run(tmp_path / "whole"), read_run(tmp_path / "killed")
    assert one["candidates"] == other["candidates"]
    assert one["report"]["rows"] == other["report"]["rows"] and one["report"]["gains"] == other["report"]["gains"]
    timed = ("seconds", "tokens_per_second")
    strip = lambda steps: [{k: v for k, v in s.items() if k not in timed} for s in steps]  # noqa: E731
    assert strip(one["steps"]) == strip(other["steps"]) and len(one["steps"]) == 4
    for name in ("steps.jsonl", "groups.jsonl", "judged.jsonl"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "killed" / name).read_text(), name
    whole, again = (torch.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "killed"))
    assert all(torch.equal(p, again["model"][name]) for name, p in whole["model"].items())  # to the last bit
    for index, state in whole["optimizer"]["state"].items():
        assert all(torch.equal(value, again["optimizer"]["state"][index][name]) for name, value in state.items())
    kept = [path for path in (tmp_path / "killed").glob("*.jsonl") if path.stem.endswith("s") and path.stem not in (
        "metrics", "candidates", "steps", "groups")]
    assert len(kept) == 9
    for path in kept:
        keys = [json.loads(line)[0] for line in path.read_text().splitlines()]
        assert len(keys) == len(set(keys)), path.name


def test_training_goes_on_from_the_checkpoint_and_not_from_the_start(llama, tmp_path, monkeypatch):
    """Training from the start gives the same result, because all is seeded. Only the number of updates is different."""
    arguments = [*llama["arguments"], "--out", str(tmp_path / "run"), "--resume", "--steps", "3"]
    assert run_and_die("step", 2, arguments) == -signal.SIGKILL
    real, made = dust.grpo.update, Counter()
    monkeypatch.setattr(dust.grpo, "update", lambda *a, **k: (made.update(steps=1), real(*a, **k))[1])
    assert run_dust(*arguments) == 0
    assert made["steps"] == 1


def test_finished_work_is_not_repeated(llama, tmp_path, monkeypatch):
    arguments = [*llama["arguments"], "--out", tmp_path / "run"]
    assert run_dust(*arguments) == 0
    before = read_run(tmp_path / "run")
    for module, name in ((dust.grpo, "rollout"), (dust.grpo, "update"), (dust.sandbox.Pool, "failures")):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("done a second time"))
    assert run_dust(*arguments, "--resume") == 0
    after = read_run(tmp_path / "run")
    assert before["report"]["rows"] == after["report"]["rows"] and before["steps"] == after["steps"]


def test_ctrl_c_says_how_to_go_on(llama, tmp_path, monkeypatch, capsys):
    def interrupt(*a, **k):
        raise KeyboardInterrupt

    monkeypatch.setattr(dust, "train", interrupt)
    assert run_dust(*llama["arguments"], "--out", tmp_path / "run") == 130
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("dust: stopped") and "--resume" in message


def test_a_run_is_never_overwritten_and_never_resumed_with_other_settings(llama, tmp_path, capsys):
    arguments = [*llama["arguments"], "--out", str(tmp_path / "run"), "--eval-only"]
    assert run_dust(*arguments) == 0
    assert "already holds a run" in error_of(capsys, *arguments)
    assert "seed was 0" in error_of(capsys, *arguments, "--resume", "--seed", "1")
    memory = ("--rows", "3", "--micro-tokens", "4096")  # what a run that was out of memory asks for
    assert run_dust(*arguments, "--resume", *memory) == 0
    saved = json.loads((tmp_path / "run" / "args.json").read_text())
    (tmp_path / "run" / "args.json").write_text(json.dumps(saved | {"parser": "lenient"}))  # as older code had it
    assert "is of another version of the code (parser)" in error_of(capsys, *arguments, "--resume")


def test_a_damaged_file_of_the_run_is_one_line(llama, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = [*llama["arguments"], "--out", str(out), "--resume"]
    assert run_dust(*arguments) == 0
    for name, damage, line in (
        ("checkpoint.pt", b"PK half", "checkpoint.pt cannot be read"),
        ("labels.jsonl", b'["a", 1]\n{"b": \n["c", 1]\n', "labels.jsonl line 2 is damaged: delete that line"),
        ("samples.jsonl", b"5\n", "samples.jsonl line 1 is damaged"),
        ("args.json", b'{"seed": ', "args.json is damaged"),
        ("args.json", b"7", "args.json is damaged"),
    ):
        (out / name).write_bytes(damage)
        assert line in error_of(capsys, *arguments)


def test_a_problem_file_that_was_edited_is_not_gone_on_with(llama, tmp_path, capsys):
    """The files of the run hold answers to the old questions, and labels from the old tests."""
    problems = tmp_path / "problems.jsonl"
    shutil.copy(llama["folder"] / "problems.jsonl", problems)
    arguments = [*llama["arguments"], "--train", problems, "--eval-only", "--eval", problems, "--out", tmp_path / "run"]
    assert run_dust(*arguments) == 0
    problems.write_text(problems.read_text().replace('"1\\n"', '"2\\n"'))
    assert "--eval" in (line := error_of(capsys, *arguments, "--resume")) and "other problems of" in line


def bar_of(monkeypatch, name: str, total: int, done: int, requests=0):
    """Return the bar of a stage, and a function that lets seconds pass until some items are done."""
    now = [1000.0]
    monkeypatch.setattr(runs.time, "time", lambda: now[0])
    bar = runs.StageBar(name, total, done, requests)
    bar.start_t = now[0]

    def work(seconds, items):
        now[0] += seconds
        bar.update(items)

    return bar, work


@pytest.mark.parametrize("total, line", [(600, "samples: about 8.3 hours more"), (115, "samples: about 0.2 hours more"),
                                         (105, "")])
def test_a_long_stage_says_so_once_and_does_not_count_what_another_process_did(total, line, monkeypatch, capsys):
    """99 answers are from an earlier process. One more takes a minute, so 500 more take 8 hours, not five minutes."""
    bar, work = bar_of(monkeypatch, "samples", total, 99)
    with bar:
        work(60, 1)
        work(60, 1)
    said = capsys.readouterr().out
    assert line in said and said.count("\n") == bool(line)


def test_the_length_of_a_stage_is_told_after_a_minute_not_after_its_first_items(monkeypatch, capsys):
    """The first batch is slow, because it also warms up."""
    bar, work = bar_of(monkeypatch, "base-samples", 10000, 0)
    with bar:
        work(30, 1)
        assert not capsys.readouterr().out
        work(30, 99)
        assert "about 1.6 hours more" in capsys.readouterr().out


def test_the_first_answers_of_a_server_say_nothing_about_its_speed(monkeypatch, capsys):
    """64 answers are drawn at a time. The shortest come first: 10 in the first two minutes, then all of them."""
    bar, work = bar_of(monkeypatch, "samples", 6400, 0, requests=64)
    with bar:
        work(120, 10)
        assert not capsys.readouterr().out
        work(120, 54)
        assert "samples: about 6.6 hours more. Faster: more --server-requests" in capsys.readouterr().out


@pytest.mark.parametrize("stage, requests, words", [
    ("samples", 0, ["--server", "torchrun", "--limit or --candidates", "--max-new-tokens"]),
    ("base-rankings", 0, ["--server", "--eval-limit or --repeats"]), ("trained-samples", 0, ["torchrun", "--repeats"]),
    ("base-labels", 0, ["more --workers", "--eval-limit", "--timeout"]), ("train", 0, ["torchrun", "--steps"]),
    ("trained-finals", 64, ["--server-requests", "--eval-limit"]), ("teacher-rankings", 0, ["--limit or --candidates"]),
])
def test_what_makes_a_stage_shorter_are_options_of_that_stage(stage, requests, words):
    """In this process the server cannot draw the trained model's answers, so there --server would not help."""
    advice = runs.shorter(stage, requests)
    assert all(word in advice for word in words)
    assert "--server " not in advice or "--server" in words


# ----------------------------------------------------------------------------------------------------------- bad input


def test_a_missing_file_or_a_bad_line_is_one_line(tmp_path, capsys):
    assert "nowhere.jsonl: No such file" in error_of(capsys, "--train", "nowhere.jsonl")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"id": "a", "question": "Q", "tests": [{"input": "", "output": ""}]}\n{"id": ')
    assert f"{broken} line 2: broken JSON" in error_of(capsys, "--eval", broken)
    broken.write_text('{"id": "a", "question": "Q", "tests": []}\n')
    assert f'{broken} line 1: "tests" is missing or empty' in error_of(capsys, "--train", broken)


@pytest.mark.parametrize("name", ["no-such-folder/model", "nosuchmodel", "./nowhere"])
def test_an_unknown_model_is_one_line_and_leaves_no_folder(tmp_path, capsys, name, monkeypatch):
    import huggingface_hub

    def offline(*a, **k):
        raise ConnectionError("no network in this test")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", offline)
    arguments = ["--model", name, "--preset", "paper", "--out", tmp_path / "run"]
    assert f"--model {name}: no such folder" in error_of(capsys, *arguments)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_model_is_one_line(tmp_path, capsys):
    command = ["--model", tmp_path, "--preset", "laptop", "--out", tmp_path / "run"]
    assert "does not load" in error_of(capsys, *command)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert "does not load" in error_of(capsys, *command)


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--group-size", "9", "--candidates", "8"], "--group-size 9 is larger than --candidates 8"),
        (["--group-size", "1"], "at least 2"),
        (["--batch", "0"], "--batch is 0"),
        (["--answers", "1"], "--answers is 1"),
        (["--temperature", "0"], "--temperature is 0.0; it has to be above 0"),
        (["--lr", "-1"], "--lr is -1.0"),
        (["--lr", "nan"], "--lr is nan"),
        (["--limit", "-1"], "--limit is -1"),
        (["--timeout", "0"], "--timeout is 0.0"),
        (["--device", "abacus"], "--device abacus does not work here"),
        (["--out", __file__, "--quick"], "cannot make this folder"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_starts(capsys, arguments, reason):
    assert reason in error_of(capsys, *arguments)


def test_no_mixed_group_says_why_and_what_to_change(llama, tmp_path, capsys):
    hopeless = tmp_path / "hopeless.jsonl"
    hopeless.write_text('{"id": "a", "question": "Q", "tests": [{"input": "", "output": "never"}]}\n')
    message = error_of(capsys, *llama["arguments"], "--train", hopeless, "--out", tmp_path / "run")
    assert "no mixed group" in message and "no program is correct" in message and "--candidates" in message


def test_problems_too_long_for_the_context_are_counted_and_not_solved(llama, tmp_path, capsys):
    """One long statement must not end a run. In the evaluation it counts as wrong; else the average would rise."""
    tests = [{"input": "", "output": "1\n"}]
    problems = [{"id": f"p{i}", "question": "Write " * length, "tests": tests} for i, length in enumerate((3, 600, 5))]
    mixed, long = tmp_path / "mixed.jsonl", tmp_path / "long.jsonl"
    mixed.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    long.write_text(json.dumps(problems[1]))
    assert run_dust(*llama["arguments"], "--train", mixed, "--eval", mixed, "--out", tmp_path / "run") == 0
    assert capsys.readouterr().out.count("1 of 3 problems get no answer") == 3  # candidates, and two evaluations
    counts = json.loads((tmp_path / "run" / "report.json").read_text())["counts"]["base"]
    assert counts["groups"] == 3 and counts["answers without a program"] >= 4
    message = error_of(capsys, *llama["arguments"], "--train", long, "--out", tmp_path / "other")
    assert "no prompt leaves room in the context" in message


def test_a_group_too_long_to_rank_is_left_out_and_counted(llama, tmp_path, capsys, monkeypatch):
    """If it were found only in training, it would end the run, and --resume may not change the settings that help."""
    real, seen = dust.ranking_ids, []
    long = torch.zeros(1000, dtype=torch.long)  # the prompts of the first two groups, longer than any context
    monkeypatch.setattr(dust, "ranking_ids", lambda *a: (seen.append(a), long if len(seen) < 3 else real(*a))[1])
    assert run_dust(*llama["arguments"], "--out", tmp_path / "run") == 0
    assert "2 groups left out" in capsys.readouterr().out


def test_a_full_disk_is_one_line_and_loses_nothing(llama, tmp_path, capsys, monkeypatch):
    real, calls = runs.append_lines, [0]

    def append_lines(file, values):
        calls[0] += 1
        if calls[0] == 3:
            raise OSError(28, "No space left on device")
        real(file, values)

    arguments = [*llama["arguments"], "--rows", "16", "--out", tmp_path / "run"]  # the third chunk of two problems
    monkeypatch.setattr(runs, "append_lines", append_lines)
    assert "the disk is full" in error_of(capsys, *arguments)
    samples = tmp_path / "run" / "samples.jsonl"
    kept = samples.read_text()
    monkeypatch.undo()
    assert run_dust(*arguments, "--resume") == 0
    assert kept.count("\n") == 4 and samples.read_text().startswith(kept)


def test_help_names_the_options(capsys):
    with pytest.raises(SystemExit) as stop:
        dust.parse_args(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for option in ("--model", "--train", "--eval", "--out", "--seed", "--candidates", "--group-size", "--answers", "--batch",
                   "--steps", "--lr", "--clip", "--kl", "--reward", "--max-new-tokens", "--workers", "--device", "--quick",
                   "--eval-only", "--resume"):
        assert option in text


def test_the_paper_preset_is_the_papers_table_4_and_what_is_given_wins():
    paper = dust.parse_args(["--model", "some/model", "--preset", "paper"])
    assert (paper.candidates, paper.batch, paper.ppo_epochs, paper.lr, paper.kl) == (64, 64, 3, 1e-6, 0.001)
    assert (paper.group_size, paper.answers, paper.mini_batch, paper.clip) == (4, 8, 16, 0.2)
    assert dust.parse_args([]).lr == dust.Args.lr
    assert dust.parse_args(["--model", "some/model", "--preset", "paper", "--lr", "1"]).lr == 1
    assert dust.parse_args(["--quick", "--steps", "7"]).steps == 7 and dust.parse_args(["--quick"]).steps < dust.Args.steps


# ------------------------------------------------------------------------------------------------ the stages' own rules


def problem(name: str) -> Problem:
    return Problem(name, f"question of {name}", [{"input": "", "output": ""}])


def candidates(name: str, pattern: str) -> list[Candidate]:
    """Return a candidate for each letter: r is right, w is wrong, - has no program."""
    return [Candidate(name, f"{name}{i}", None if c == "-" else f"code {name}{i}", c == "r") for i, c in enumerate(pattern)]


def test_groups_are_mixed_of_one_problem_and_without_failed_extractions():
    problems = [problem("a"), problem("b"), problem("c")]
    drawn = candidates("a", "rw-wwrrrrww") + candidates("b", "wwwwr") + candidates("c", "r-wrr-wr")
    random.Random(0).shuffle(drawn)  # the order between problems does not matter
    groups = dust.make_groups(problems, drawn, 4)
    for group in groups:
        assert {c.problem_id for c in group.candidates} == {group.problem.id}
        assert len(group.candidates) == 4 and 0 < sum(group.labels) < 4 and all(c.code for c in group.candidates)
    used = Counter(c.answer for group in groups for c in group.candidates)
    assert max(used.values()) == 1
    ordered = dust.make_groups(problems, candidates("a", "rw-wwrrrrww") + candidates("b", "wwwwr"), 4)
    assert [g.labels for g in ordered] == [[1, 0, 0, 0]]  # a: rwww | rrrr | ww dropped; b: wwww, r dropped


@pytest.fixture
def without_model(monkeypatch) -> None:
    """training_groups without a model: every prompt fits, and the candidates that a test makes have their labels."""
    monkeypatch.setattr(dust, "ranking_ids", lambda *_: [])
    monkeypatch.setattr(dust, "longest_answer", lambda *_: 1)
    monkeypatch.setattr(dust, "label", lambda *_: None)


@pytest.mark.parametrize("problems_there, mixed_share, sampled", [
    (200, 1.0, [20]),  # every group is mixed: the fewest problems will do
    (200, 0.5, [20, 40]),
    (200, 0.25, [20, 40, 80]),  # never more than twice as many: the first few may be unlike the rest
    (200, 0.0, [20, 40, 80, 160, 200]),
    (30, 0.25, [20, 30]),  # there are no more
])
def test_sampling_goes_on_until_the_steps_have_enough_mixed_groups(
        tmp_path, monkeypatch, without_model, problems_there, mixed_share, sampled):
    """Half a year of a GPU would go into candidates that no step uses."""
    counts = []

    def sample(model, tokenizer, problems, args, file):
        counts.append(len(problems))
        mixed = [mixed_share and i % round(1 / mixed_share) == 0 for i in range(len(problems))]
        patterns = ["rrrw" * 4 if one else "wwww" * 4 for one in mixed]
        return [c for p, pattern in zip(problems, patterns) for c in candidates(p.id, pattern)]

    monkeypatch.setattr(dust, "sample", sample)
    args = dust.Args(until_enough=True, steps=8, batch=10, candidates=16, group_size=4)  # 80 groups, 4 a problem
    problems = [problem(f"p{i}") for i in range(problems_there)]
    if mixed_share:
        groups = dust.training_groups(None, None, problems, args, tmp_path)
        assert len(groups) >= 80 or counts[-1] == problems_there
    else:
        with pytest.raises(dust.BadInput):
            dust.training_groups(None, None, problems, args, tmp_path)
    assert counts == sampled
    counts.clear()
    if mixed_share:
        dust.training_groups(None, None, problems, dust.replace(args, until_enough=False), tmp_path)
        assert counts == [problems_there]


def test_sampling_ends_also_where_one_group_is_enough_and_none_comes(tmp_path, monkeypatch, without_model):
    """A first trial with one step of one prompt, on a model that solves nothing, sampled the first problem for ever."""
    counts = []

    def sample(model, tokenizer, problems, args, file):
        counts.append(len(problems))
        assert len(counts) < 9, "it goes on for ever"
        return [c for p in problems for c in candidates(p.id, "wwww")]

    monkeypatch.setattr(dust, "sample", sample)
    args = dust.Args(until_enough=True, steps=1, batch=1, candidates=4, group_size=4)
    with pytest.raises(dust.BadInput, match="0 of 12 answers hold no program"):
        dust.training_groups(None, None, [problem(f"p{i}") for i in range(3)], args, tmp_path)
    assert counts == [1, 2, 3]


def test_a_shuffle_keeps_labels_with_their_candidates_and_depends_on_the_seed():
    group = Group(problem("a"), candidates("a", "rwwr"))
    orders = set()
    for step in range(30):
        shown = group.shuffled(0, "train", step)
        assert shown.labels == [int(c.answer in ("a0", "a3")) for c in shown.candidates]
        assert sorted(c.answer for c in shown.candidates) == sorted(c.answer for c in group.candidates)
        assert [c.answer for c in shown.candidates] == [c.answer for c in group.shuffled(0, "train", step).candidates]
        orders.add(tuple(c.answer for c in shown.candidates))
    assert len(orders) > 10
    assert len({tuple(c.answer for c in group.shuffled(seed, "train", 0).candidates) for seed in range(9)}) > 3


def test_every_group_comes_once_in_each_pass():
    groups = [Group(problem(str(i)), []) for i in range(10)]
    args = dust.Args(batch=4)
    picked = [g.problem.id for step in range(5) for g in dust.batch_at(groups, step, args)]
    assert sorted(picked[:10]) == sorted(picked[10:]) == [str(i) for i in range(10)] and picked[:10] != picked[10:]
    large = dust.batch_at(groups, 0, dust.Args(batch=25))  # more than two passes in one step
    assert [g.problem.id for g in large[:20]] == picked


def test_the_groups_of_a_step_are_found_as_fast_for_a_large_run():
    """Once all groups were shuffled again for each prompt. With the paper's 37,000 groups a step lost a second."""
    groups, began = [Group(problem("a"), [])] * 37_000, time.process_time()
    dust.batch_at(groups, 300, dust.Args(batch=64))
    assert time.process_time() - began < 0.5


def test_the_same_program_runs_once_and_only_for_its_own_problem(tmp_path, monkeypatch):
    ran = []

    class Pool:
        workers = 1

        def __init__(self, **settings): ...
        def __enter__(self): return self
        def __exit__(self, *error): ...
        def failures(self, work):
            ran.extend((code, tests[0]["output"]) for code, tests in work)
            return [None if tests[0]["output"] == "yes" else {"test": 0, "why": ""} for _, tests in work]

    monkeypatch.setattr(dust.sandbox, "Pool", Pool)
    problems = [Problem("a", "Q", [{"input": "", "output": "yes"}]), Problem("b", "Q", [{"input": "", "output": "no"}])]
    drawn = [Candidate(p, "", code) for p in "ab" for code in ("x = 1", "x = 2", None, "x = 1")]
    dust.label(problems, drawn, dust.Args(), tmp_path / "labels.jsonl")
    assert Counter(ran) == Counter((code, out) for code in ("x = 1", "x = 2") for out in ("yes", "no"))
    assert [c.correct for c in drawn] == [True, True, False, True, False, False, False, False]
