"""Settings: the command line, the presets, and what reaches the update."""
import json
import os
import signal
import subprocess
import sys

import pytest

import dust
from conftest import SMALL
from dust import Candidate, Group
from plumbing import runs, settings
from plumbing.problems import Problem, load_train_and_eval
from test_dust import ROOT, error_of, run_dust


def test_help_and_a_wrong_option_need_no_torch():
    """Importing torch and transformers takes five seconds, which a typing error should not cost."""
    code = ("import runpy, sys; sys.argv = ['dust.py', {!r}]\n"
            "try: runpy.run_path('dust.py', run_name='__main__')\n"
            "except SystemExit as end: print('torch' in sys.modules, end.code)")
    for option, status in (("--help", 0), ("--no-such-option", 2), ("--batch=0", 2)):
        done = subprocess.run([sys.executable, "-c", code.format(option)], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == f"False {status}", done.stderr


def test_there_are_not_more_options_than_a_reader_can_take_in():
    assert len(dust.Args.__dataclass_fields__) <= 63


def test_the_release_preset_is_the_papers_with_each_documented_difference():
    """Each is one field whose default is the paper's (tutorial.md, "Where the paper and its release disagree")."""
    paper, release = (dust.parse_args(["--model", "some/model", "--preset", name]) for name in ("paper", "release"))
    changed = {name: (getattr(paper, name), getattr(release, name)) for name in vars(paper)
               if getattr(paper, name) != getattr(release, name)}
    assert changed == {
        "preset": ("paper", "release"), "clip_high": (0.0, 0.28), "dual_clip": (0.0, 10.0),
        "loss": ("sequence", "token"), "kl": (0.001, 0.0), "weight_decay": (0.0, 0.1), "warmup": (0, 10),
        "shuffle": (True, False), "best_of": (4, 6), "eval_temperature": (0.6, 1.0), "top_p": (0.95, 1.0),
        "top_k": (20, 0),
    }


def test_presets_and_data_follow_the_model_and_what_is_given_wins(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    shipped, other = dust.parse_args([]), dust.parse_args(["--model", "some/model"])
    assert (shipped.preset, shipped.train, shipped.eval) == ("laptop", "micro-train", "micro-eval")
    assert (other.preset, other.train, other.eval) == ("paper", "rstar-coder", "livecodebench-v6")
    assert all(getattr(other, name) == value for name, value in dust.PAPER.items())
    mine = dust.parse_args("--model some/model --eval mine.jsonl --preset release --clip-high 0.5".split())
    assert (mine.train, mine.eval, mine.clip_high, mine.dual_clip) == ("rstar-coder", "mine.jsonl", 0.5, 10.0)
    assert dust.parse_args(["--model", "some/model", "--preset", "laptop"]).train == "micro-train"


@pytest.mark.parametrize("given, lr", [
    (["--preset", "quick"], 2e-5), (["--preset", "quick", "--lora", "8"], 2e-5),
    (["--preset", "quick", "--lora", "0"], 1e-6), (["--preset", "paper"], 1e-6),
    (["--preset", "paper", "--lora", "16"], 2e-5),
    (["--preset", "release", "--lora", "16", "--lr", "3e-6"], 3e-6), (["--preset", "paper", "--mode", "sft"], 1e-5),
    (["--preset", "laptop", "--lora", "16"], 1e-4),
])
def test_the_learning_rate_follows_whether_adapters_are_trained(given, lr, monkeypatch):
    """With the paper's rate for all weights, adapters learn nothing; with theirs, all weights are soon ruined."""
    monkeypatch.setattr(settings, "find_spec", lambda name: True)  # peft need not be there
    assert dust.parse_args(["--model", "some/model", *given]).lr == lr


@pytest.mark.parametrize("given, epochs, steps", [
    ([], 3, 180), (["--steps", "20"], 0, 20), (["--quick"], 0, 10), (["--steps", "20", "--epochs", "2"], 2, 20),
])
def test_steps_that_are_given_win_over_the_papers_epochs_of_sft(given, epochs, steps):
    args = dust.parse_args(["--model", "some/model", "--preset", "paper", "--mode", "sft", *given])
    assert (args.epochs, args.steps) == (epochs, steps)


def test_one_process_gets_settings_that_end_and_the_first_line_says_so(llama, tmp_path, monkeypatch, capsys):
    """The paper's settings take months on one GPU: nobody should get them without asking."""
    monkeypatch.setattr("plumbing.settings.find_spec", lambda name: True)  # peft, for the preset's adapters
    assert dust.parse_args(["--model", "some/model"]).preset == "quick"
    monkeypatch.setattr(dust, "load", None)  # the run ends here
    with pytest.raises(TypeError):
        dust.run(dust.parse_args([*llama["arguments"], "--preset", "quick", "--out", str(tmp_path / "run")]))
    assert capsys.readouterr().out.startswith("--preset quick: for another model on one GPU or a CPU (--preset paper: ")


@pytest.mark.parametrize("arguments, reason", [
    (["--dual-clip", "0.5"], "--dual-clip is 0.5; it has to be above 1"),
    (["--warmup", "-1"], "--warmup is -1"),
])
def test_new_settings_that_cannot_work_are_refused(capsys, arguments, reason):
    assert reason in error_of(capsys, *arguments)


@pytest.fixture
def updates(monkeypatch) -> list[dict]:
    """The settings of each update, with its learning rate and weight decay, and whether it has a reference."""
    calls, update = [], dust.grpo.update

    def spy(model, optimizer, rollouts, args, *, reference, generator):
        rates = {name: optimizer.param_groups[0][name] for name in ("lr", "weight_decay")}
        calls.append(vars(args) | rates | {"reference": reference is not None})
        return update(model, optimizer, rollouts, args, reference=reference, generator=generator)

    monkeypatch.setattr(dust.grpo, "update", spy)
    return calls


def test_the_releases_settings_reach_the_update(llama, tmp_path, updates):
    """And the learning rate grows over the first ten steps, as its warm-up says."""
    command = [*llama["arguments"], "--preset", "release", *SMALL, "--max-new-tokens", "12", "--lr", "0.003"]
    assert run_dust(*command, "--save-every", "1", "--out", tmp_path / "run") == 0
    first = updates[0]
    assert [first[name] for name in ("clip", "clip_high", "dual_clip", "loss")] == [0.2, 0.28, 10.0, "token"]
    assert (first["kl"], first["reference"], first["weight_decay"]) == (0.0, False, 0.1)
    assert [round(one["lr"], 9) for one in updates] == [0.0003, 0.0006]


def test_the_papers_settings_reach_the_update(tmp_path, llama, updates):
    assert run_dust(*llama["arguments"], "--out", tmp_path / "run") == 0
    first = updates[0]
    assert [first[name] for name in ("clip", "clip_high", "dual_clip", "loss")] == [0.2, 0.0, 0.0, "sequence"]
    assert (first["kl"], first["reference"], first["weight_decay"]) == (0.001, True, 0.0)
    assert [one["lr"] for one in updates] == [0.003, 0.003]


@pytest.mark.parametrize("warmup, rates", [(0, [2.0] * 6), (4, [0.5, 1.0, 1.5, 2.0, 2.0, 2.0])])
def test_the_learning_rate_grows_and_then_stays(llama, tmp_path, updates, warmup, rates):
    command = [*llama["arguments"], "--steps", 6, "--lr", 2, "--warmup", warmup, "--out", tmp_path / "run"]
    run_dust(*command)
    assert [one["lr"] for one in updates] == rates


def test_groups_are_shown_anew_in_each_step_unless_told_otherwise(monkeypatch):
    candidates = [Candidate("p", str(i), f"code {i}", i < 2) for i in range(4)]
    group = Group(Problem("p", "Q", []), candidates)
    shown = {True: set(), False: set()}
    monkeypatch.setattr(dust, "draw_for_training", lambda *a, **k: [])
    monkeypatch.setattr(dust, "score_rollouts", lambda *a: {})
    for shuffle, orders in shown.items():
        monkeypatch.setattr(dust, "ranking_ids", lambda t, g, a: orders.add(tuple(c.answer for c in g.candidates)))
        for step in range(6):
            dust.experience(None, None, [group], step, dust.Args(batch=1, shuffle=shuffle), None)
    assert shown[False] == {tuple("0123")} and len(shown[True]) > 2


def test_training_problems_of_the_evaluation_are_left_out_and_counted(tmp_path, llama, capsys):
    """By their statement, for ids differ between sets; --limit counts what is left."""
    problems = llama["folder"] / "problems.jsonl"
    lines = [json.loads(line) for line in problems.read_text().splitlines()]
    train = tmp_path / "train.jsonl"
    mine = [{"id": f"new{i}", "question": f"Another {i}", "tests": lines[0]["tests"]} for i in range(3)]
    renamed = [line | {"id": "x" + line["id"]} for line in lines[:2]]
    train.write_text("".join(json.dumps(line) + "\n" for line in [*renamed, *mine]))
    args = dust.parse_args(["--train", str(train), "--eval", str(problems), "--limit", "2", "--eval-limit", "4"])
    own, held_out = load_train_and_eval(args)
    assert "2 of 5 problems of --train left out" in capsys.readouterr().out
    assert [p.id for p in own] == ["new0", "new1"] and [p.id for p in held_out] == ["p0", "p2", "p4", "p6"]
    train.write_text("".join(json.dumps(line) + "\n" for line in renamed))
    assert "every problem of --train" in error_of(capsys, "--train", train, "--eval", problems)
    assert len(load_train_and_eval(dust.replace(args, train=str(problems), limit=0))[0]) == 8  # meant so, and said
    assert "are the same" in capsys.readouterr().out


def test_an_error_without_words_is_not_answered_with_another():
    assert runs.what_to_do(NotImplementedError()) == "" == runs.what_to_do(RuntimeError(""))
    assert runs.what_to_do(MemoryError("can't allocate memory: 9 bytes")).startswith("out of memory: lower --rows")
    assert "new run with a smaller --max-new-tokens" in runs.what_to_do(MemoryError("can't allocate memory: 9 bytes"))


@pytest.mark.parametrize("name, spelling", [("Qwen3-4B", "Qwen/Qwen3-4B"), ("qwen3-30b-thinking",
                         "Qwen/Qwen3-30B-A3B-Thinking-2507")])
def test_a_short_name_and_a_full_one_are_one_model(name, spelling):
    assert runs.comparable("model", name) == runs.comparable("model", spelling) == spelling
    assert runs.comparable("model", name) != runs.comparable("model", "Qwen/Qwen3-8B")
    assert runs.comparable("init", "") == "" != runs.comparable("init", ".")


def test_a_run_goes_on_with_another_spelling_of_the_same_files(llama, tmp_path, capsys, monkeypatch):
    """A relative path, a slash at the end or a link is still the same model, and the same problems."""
    command, folder = [*llama["arguments"], "--eval-only", "--out", tmp_path / "run"], llama["folder"]
    assert run_dust(*command) == 0
    monkeypatch.chdir(folder)
    (tmp_path / "link").symlink_to(folder)
    for prefix in ("", f"{tmp_path}/link/"):
        spelled = ["--model", f"{prefix}model/", "--eval", f"{prefix}problems.jsonl"]
        assert run_dust(*command, *spelled, "--resume") == 0
    assert "model was" in error_of(capsys, *command, "--model", ROOT / "data" / "tiny", "--resume")


# -------------------------------------------------------------------------------------------------------- the terminal

NARROW = [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]


def in_terminal(*command, extra: dict, **options) -> subprocess.CompletedProcess:
    """Run Python in the root folder, with an environment that names no encoding but the one of `extra`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=ROOT, env=kept | extra, capture_output=True, **options)


@pytest.mark.parametrize("encoding", NARROW)
def test_a_run_prints_and_writes_any_character_whatever_the_terminals_encoding(tmp_path, encoding):
    """The first prompt was printed as it is, and a Chinese statement ended the run with a UnicodeEncodeError."""
    problem = {"id": "题", "question": "读入三位数字 \U0001f600", "tests": [{"input": "1 2 3", "output": "2 4 6"}]}
    (tmp_path / "题.jsonl").write_text(json.dumps(problem))
    done = in_terminal("dust.py", "--eval-only", "--eval", tmp_path / "题.jsonl", "--repeats", "1", "--workers", "1",
                       "--max-new-tokens", "8", "--out", tmp_path / "运行", extra=encoding)
    assert done.returncode == 0, done.stderr.decode()
    files = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "运行").glob("*.[jmt]*")}
    assert "读入三位" in files["prompts.txt"] and "读入三位" in files["examples.md"] and len(files) > 5
    assert rb"\u8bfb\u5165" in done.stdout


@pytest.mark.parametrize("program", ["dust.py", "data/make_tiny.py", "data/study.py"])
def test_every_program_prints_any_character(program):
    code = ("import runpy, sys; sys.argv = [sys.argv[1], '--help']\n"
            "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "except SystemExit: print('\\u9898 \\ud83d')")
    for encoding in NARROW:
        done = in_terminal("-c", code, program, extra=encoding)
        assert done.stdout.splitlines()[-1] == rb"\u9898 \ud83d" and not done.stderr, done.stderr.decode()


def test_a_ctrl_c_while_torch_is_imported_is_one_line(tmp_path):
    # the handler, because a job in the background ignores Ctrl-C
    lines = ["import os, signal", "signal.signal(signal.SIGINT, signal.default_int_handler)",
             "os.kill(os.getpid(), signal.SIGINT)"]
    (tmp_path / "torch.py").write_text("\n".join(lines))
    done = in_terminal("dust.py", extra={"PYTHONPATH": str(tmp_path)})
    assert done.stderr.decode() == "dust.py: stopped\n" and done.returncode == -signal.SIGINT


def test_a_closed_stream_keeps_its_number():
    """Otherwise the next file that is opened gets it, and with it all that libraries print on stderr."""
    code = ("import sys; from plumbing.settings import prepare_terminal; prepare_terminal()\n"
            "print('lost'); print('\\u9898', file=sys.stderr); sys.exit(open('dust.py').fileno())")
    closed = lambda: [os.close(number) for number in range(3)]  # noqa: E731
    for encoding in NARROW:
        assert in_terminal("-c", code, extra=encoding, preexec_fn=closed).returncode == 3


def test_a_reader_that_ends_is_said_to_have_ended():
    assert runs.what_to_do(BrokenPipeError(32, "Broken pipe")) == "the program that read this output has ended"
