"""Test the page of a run: what is kept for it, what it shows, and that nothing in a model's text is ever run.

One test opens the page in a real browser (Debian's chromium); it is skipped where there is none.
"""
import copy
import html
import itertools
import json
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import dust
import grpo
import sandbox
from dust import METRICS, Candidate, Group, RankedGroup
from plumbing import page, report, steps
from plumbing.problems import Problem
from test_dust import run_dust

torch.set_num_threads(1)
ROOT = Path(dust.__file__).resolve().parent
HOSTILE = ("print(1)  # </script><img src='http://127.0.0.1:9/x' onerror='faults.push(1)'>"
           "<script>faults.push('ran')</script><!--")
SETTINGS = {"model": "tiny", "seed": 0, "mode": "rank", "lr": 0.1, "out": "there"}
LABELS = {  # a group -> the labels in the order of the base's judge, of the trained judge, of the trained generator
    "mended": ([0, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]), "broken": ([1, 0, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1]),
    "right": ([1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]), "wrong": ([0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]),
    "again": ([0, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]),
}


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Plots take seconds, and the page has none of them."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def ranked_group(problem: Problem, candidates: list[Candidate], labels: list[int], malformed: bool) -> RankedGroup:
    """Return a group whose order has these labels. Of wrong candidates the first is taken first."""
    left, ordered = list(candidates), []
    for label in labels:
        ordered.append(left.pop(next(i for i, c in enumerate(left) if c.correct == label)))
    shown = [c for c in candidates if c.code is not None]
    return RankedGroup(Group(problem, shown), ordered, f"words about {problem.id} {HOSTILE}", malformed)


def programs(problem: Problem, labels: list[int]) -> list[Candidate]:
    """Return candidates with these labels. A wrong one fails the first test. All right or all wrong ones are alike."""
    failure = {"test": 0, "why": f"line 1 should be '1', not {HOSTILE!r}", "printed": HOSTILE}
    drawn = [Candidate(problem.id, "", HOSTILE, bool(y), None if y else failure) for y in labels]
    if problem.id == "mended" and not labels[-1]:  # one without a program, which is the last in every order
        drawn[-1] = Candidate(problem.id, "", None)
    return drawn


def make_run(out: Path, groups: dict = LABELS) -> Path:
    """Write the files of a small run by hand, and with write_report."""
    out.mkdir(exist_ok=True)
    rows = {"base": [], "trained_judge": [], "trained": []}
    for name, (base, judge, trained) in groups.items():
        problem = Problem(name, f"Print one. {HOSTILE}", [{"input": HOSTILE, "output": "1"}])
        drawn = programs(problem, sorted(base, reverse=True))
        rows["base"].append(ranked_group(problem, drawn, base, malformed=name == "broken"))
        rows["trained_judge"].append(ranked_group(problem, drawn, judge, malformed=False))
        own = programs(problem, sorted(trained, reverse=True))
        rows["trained"].append(ranked_group(problem, own, trained, malformed=False))
    for row, file in page.WORDS.items():
        lines = [json.dumps([str(i), [[one.answer, True]]]) for i, one in enumerate(rows[row])]
        (out / f"{file}.jsonl").write_text("".join(line + "\n" for line in lines))
    tokens = [["\nyes", -1.0, -0.5, 0.25], [HOSTILE, -0.125, None, 0.0]]
    kept = {"prompt": HOSTILE, "answers": [HOSTILE] * 2, "ended": [True, False], "rewards": [1.0, -1.0]}
    close, plain = kept | {"advantages": [0.5, -0.5], "tokens": [tokens] * 2}, kept | {"advantages": []}
    imitated = close | {"advantages": []}
    lines = [{"step": i + 1, "groups": groups} for i, groups in enumerate([[close, plain], [], [plain], [imitated]])]
    (out / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figure = {"mean": 40.0, "low": 30.0, "high": 50.0}
    lines = [{"step": step} | dict.fromkeys(("pass1", "ndcg_all", "best_of_4"), figure) for step in (0, 10)]
    (out / "curve.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report.write_report(rows, {}, METRICS, SETTINGS, out, SETTINGS | {"lr": 0.5, "out": ""})
    return out


def data_of(out: Path) -> dict:
    """Return what a browser would read in the page's data."""
    text = (out / "page.html").read_text()
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def lines_of(path: Path) -> list:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------- the page's data


def test_text_of_a_model_cannot_end_the_script_that_holds_it(tmp_path):
    text = (make_run(tmp_path) / "page.html").read_text()
    template = page.TEMPLATE.read_text()
    for mark in ("<script", "</script", "<!--", "<img"):
        assert text.count(mark) == template.count(mark), mark
    assert HOSTILE in data_of(tmp_path)["groups"][0]["candidates"][0]["code"]  # and it is there


def test_the_page_of_a_real_run_has_the_judges_words_and_its_best_of_n(llama, tmp_path):
    """The files that the tests above write by hand may have another form than those of a run."""
    out = tmp_path / "run"
    assert run_dust(*llama["arguments"], "--steps", "1", "--best-of", "3", "--out", out) == 0
    data, words = data_of(out), dict(lines_of(out / "judge-rankings.jsonl"))
    shown = {str(group["number"] - 1): group["judges"][1]["words"] for group in data["groups"]}
    assert words and all(shown[key] == page.cut(text) for key, ((text, _),) in words.items())
    assert "best_of_3" in data["rows"]["base"] and [point["step"] for point in data["curve"]] == [0, 1]


def test_every_number_of_the_page_stands_in_the_files_of_the_run(tmp_path):
    data, saved = data_of(make_run(tmp_path)), json.loads((tmp_path / "report.json").read_text())
    assert data["rows"] == saved["rows"] and data["gains"] == saved["gains"]
    assert data["changed"] == saved["changed"] == {"lr": 0.1}  # "out" differs too
    assert data["curve"] == lines_of(tmp_path / "curve.jsonl")
    kept = {line["step"]: line["groups"][0] for line in lines_of(tmp_path / "steps.jsonl") if line["step"] in (1, 4)}
    assert [one["number"] for one in data["steps"]] == list(kept)
    for shown, whole in zip(data["steps"], kept.values()):
        assert all(shown[name] == whole[name] for name in ("prompt", "rewards", "advantages", "ended", "tokens"))
    judged, written = lines_of(tmp_path / "judged.jsonl"), lines_of(tmp_path / "groups.jsonl")
    for i, judge in enumerate(page.WORDS):
        shown = [group["judges"][i] for group in data["groups"]]
        assert [one | {"words": ""} for one in shown] == [
            one | {"words": ""} for one in judged if one["row"] == judge and not one["final"]]
        assert all(one["words"].startswith(f"words about {name} ") for one, name in zip(shown, LABELS))
    assert [group["candidates"] for group in data["groups"]] == [
        group["candidates"] for group in written if group["row"] == "base"]
    assert data["left_out"] == []


def test_an_order_names_the_candidates_that_it_puts_first(tmp_path):
    """Candidates that are alike, and answers without a program, must not be taken for one another."""
    data = data_of(make_run(tmp_path))
    for group in data["groups"]:
        for judge in group["judges"]:
            assert sorted(judge["order"]) == [1, 2, 3, 4]
            assert [int(group["candidates"][number - 1]["correct"]) for number in judge["order"]] == judge["ranked"]
        assert all(one["failure"]["given"] == HOSTILE for one in group["candidates"] if one["failure"])


def test_a_large_run_stays_under_three_megabytes_and_says_what_is_left_out(tmp_path):
    """Chinese letters take six bytes each in the page, so a limit of characters is no limit of bytes."""
    make_run(tmp_path)
    lines = lines_of(tmp_path / "groups.jsonl")
    for line in lines:
        line["candidates"] = [one | {"code": f"{i}题" + "题" * 9000} for i, one in enumerate(line["candidates"])]
    judged = lines_of(tmp_path / "judged.jsonl")
    by_row = [[line for line in part if line["row"] == row] for part in (lines, judged)
              for row in ("base", "trained_judge", "trained")]
    many = [[line | {"n": i} for i, line in enumerate(part * 100)] for part in by_row]
    (tmp_path / "groups.jsonl").write_text("".join(json.dumps(line) + "\n" for part in many[:3] for line in part))
    (tmp_path / "judged.jsonl").write_text("".join(json.dumps(line) + "\n" for part in many[3:] for line in part))
    step = lines_of(tmp_path / "steps.jsonl")[0]
    long = step["groups"][0] | {"tokens": [[["题", -1.0, -1.0, 0.0]] * 600] * 8, "answers": ["题" * 5000] * 8}
    many = [{"step": i + 1, "groups": [long, step["groups"][1]]} for i in range(30)]
    (tmp_path / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in many))
    began = time.process_time()
    page.write_page(tmp_path)
    assert time.process_time() - began < 5
    assert 1_000_000 < (tmp_path / "page.html").stat().st_size < 3_000_000
    data = data_of(tmp_path)
    code = data["groups"][0]["candidates"][0]["code"]
    assert page.GAP in code and len(code) == page.TEXT + len(page.GAP)
    steps = [one["number"] for one in data["steps"]]
    assert 5 < len(steps) < 30 and steps == list(range(1, len(steps) + 1)) and 5 < len(data["groups"]) < 500
    assert data["left_out"] == [
        f"the last {500 - len(data['groups'])} of 500 groups: the page would be larger than 3 MB",
        f"the last {30 - len(steps)} of 30 steps: the page would be larger than 3 MB"]
    tokens = data["steps"][-1]["tokens"][0]
    assert len(tokens) == page.TOKENS + 1 and tokens[page.TOKENS // 2][0] == page.GAP


def test_groups_that_do_not_fit_are_counted(tmp_path, monkeypatch):
    make_run(tmp_path)
    monkeypatch.setattr(page, "LIMIT", (tmp_path / "page.html").stat().st_size - 1000)
    page.write_page(tmp_path)
    data = data_of(tmp_path)
    assert 0 < len(data["groups"]) < 5 and (tmp_path / "page.html").stat().st_size < page.LIMIT + 500  # what it says
    assert data["left_out"] == [f"the last {5 - len(data['groups'])} of 5 groups: the page would be larger than 3 MB"]



@pytest.mark.parametrize("name", page.FILES)
def test_a_run_that_lacks_a_file_shows_the_rest_and_says_so(name, tmp_path):
    (make_run(tmp_path) / f"{name}.jsonl").unlink()
    page.write_page(tmp_path)
    data = data_of(tmp_path)
    assert data["left_out"] == [f"{name}.jsonl: the run has no such file, or an empty one"]
    assert data["rows"] and bool(data["groups"]) == (name not in ("judged", "groups"))


def test_a_wrong_folder_and_a_damaged_file_are_one_clear_line(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    assert page.main([str(run)]) == 0 and capsys.readouterr().out == f"{run / 'page.html'}\n"
    damaged = {"report.json": ["{", "[1]", '{"rows": {}, "args": []}'],
               "steps.jsonl": ["{}\n", '{"step": 1, "groups": 3}\n', "{\n"],
               "judged.jsonl": ["5\n", '{"row": "base", "final": false}\n'], "groups.jsonl": ["nothing\n", "{}\n"]}
    cases = [(tmp_path / "nowhere", ""), (run / "report.json", ""), (tmp_path, "")]
    cases += [(run, (file, text)) for file, texts in damaged.items() for text in texts]
    for folder, change in cases:
        if change:
            whole = (run / change[0]).read_text()
            (run / change[0]).write_text(change[1])
        assert page.main([str(folder)]) == 2, (folder, change)
        error = capsys.readouterr().err
        assert error.startswith("page: ") and error.count("\n") == 1 and len(error) < 300, (change, error)
        if change:
            (run / change[0]).write_text(whole)


# ---------------------------------------------------------------------------------------------- what labelling keeps


@pytest.mark.parametrize("code, tests, why, printed", [
    ("print(3)", [{"input": "", "output": "3"}, {"input": "", "output": "4"}], "line 1 should be '4', not '3'", "3"),
    ("print('a\\n' * 99)\n1 / 0", [{"input": "", "output": "3"}] * 2, "error: ZeroDivisionError: division by zero",
     "a\na\na\na\na"),
    ("print('ab' * 999)", [{"input": "", "output": "3"}], "line 1 should be '3', not '" + "ab" * 30 + "'", "ab" * 100),
    ("def f(): print(5)", [{"fn_name": "f", "args": [], "expected": 1}],
     "returned null, not 1", "5"),
    ("def f(): return (1, 'a' * 3000)", [{"fn_name": "f", "args": [], "expected": "b"}],
     'returned {"tuple":[1,"' + "a" * 47 + ', not "b"', ""),
    ("import os\ndef f(): os._exit(0)", [{"fn_name": "f", "args": [], "expected": 1}], "returned nothing, not 1", ""),
    ("a\0", [{"input": "", "output": "3"}], "the source holds a NUL", ""),
])
def test_a_failed_label_keeps_the_first_failed_test_in_short(code, tests, why, printed):
    with sandbox.Pool(1) as pool:
        [failure] = pool.failures([(code, tests)])
    assert failure == {"test": len(tests) - 1 if code == "print(3)" else 0, "why": why, "printed": printed}


def test_modules_that_are_not_installed_here_are_named(tmp_path, capsys):
    """A right program that imports one gets the label 0. The authors' sandbox has more packages than this one."""
    problem = Problem("a", "Q", [{"input": "", "output": "1\n"}])
    codes = ["import nosuch\nprint(1)", "from nosuch.b import c\nprint(1)", "import nosuch2", "print(1)", "x", None]
    drawn = [Candidate("a", "", code) for code in codes]
    dust.label([problem], drawn, dust.Args(workers=1), tmp_path / "labels.jsonl")
    assert "wrong because a module is not installed here: nosuch (2), nosuch2 (1)\n" in capsys.readouterr().out
    dust.label([problem], drawn[3:], dust.Args(workers=1), tmp_path / "labels.jsonl")
    assert "not installed" not in capsys.readouterr().out


def test_labels_of_both_forms_are_read_and_mean_the_same(tmp_path):
    """Labels were only 1 or 0 once, and the studies copy files of labels from run to run."""
    problem = Problem("a", "Q", [{"input": "", "output": "1\n"}])
    drawn = [[Candidate("a", "", code) for code in ("print(1)", "print(2)", None)] for _ in range(3)]
    dust.label([problem], drawn[0], dust.Args(workers=1), tmp_path / "labels.jsonl")
    dust.label([problem], drawn[1], dust.Args(workers=1), tmp_path / "labels.jsonl")  # nothing runs again
    lines = [[key, int(label == 1)] for key, label in lines_of(tmp_path / "labels.jsonl")]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    dust.label([problem], drawn[2], dust.Args(workers=1), tmp_path / "labels.jsonl")
    assert [[c.correct for c in part] for part in drawn] == [[True, False, False]] * 3
    assert drawn[0] == drawn[1] and drawn[0][1].failure["printed"] == "2" and drawn[2][1].failure is None


# ----------------------------------------------------------------------------------------------- a step under the glass


@pytest.mark.parametrize("total, chosen", [(60, {0, 15, 30, 44, 59}), (1, {0}), (3, {0, 1, 2}), (10, {0, 2, 4, 7, 9})])
def test_the_first_the_last_and_three_steps_between_are_looked_at(total, chosen):
    assert steps.closely(total) == chosen


def test_a_run_that_looks_at_its_steps_trains_the_same_weights(llama, tmp_path, monkeypatch):
    """To the last bit, and with the same optimiser, although the model reads a group once more after some steps."""
    arguments = [*llama["arguments"], "--steps", "3", "--lr", "0.01"]
    assert dust.main([*arguments, "--out", str(tmp_path / "with")]) == 0
    monkeypatch.setattr(dust.steps, "keep_step", lambda *inputs: None)
    assert dust.main([*arguments, "--out", str(tmp_path / "without")]) == 0
    one, other = (torch.load(tmp_path / name / "checkpoint.pt") for name in ("with", "without"))
    assert all(torch.equal(p, other["model"][name]) for name, p in one["model"].items())
    for index, state in one["optimizer"]["state"].items():
        assert all(torch.equal(value, other["optimizer"]["state"][index][name]) for name, value in state.items())
    assert (tmp_path / "with" / "judged.jsonl").read_text() == (tmp_path / "without" / "judged.jsonl").read_text()
    kept = lines_of(tmp_path / "with" / "steps.jsonl")
    assert [line["step"] for line in kept] == [1, 2, 3] and not lines_of(tmp_path / "without" / "steps.jsonl")
    for line in kept:
        first = line["groups"][0]
        assert len(first["tokens"]) == len(first["answers"]) == len(first["advantages"]) == 4
        assert len(set(first["rewards"])) > 1 or set(first["advantages"]) == {0.0}
        assert all(len(token) == 4 for tokens in first["tokens"] for token in tokens)
    assert '"tokens":[[' in (tmp_path / "with" / "page.html").read_text()


@pytest.fixture(scope="module")
def tiny():
    return dust.load(str(ROOT / "data" / "tiny"), dust.Args(device="cpu", optimizer="fp32"))


def keep(folder: Path, rollouts: list, model, tokenizer, args) -> dict:
    """Keep the first step. Return the line of steps.jsonl."""
    steps.keep_step(folder / "steps.jsonl", 0, rollouts, model, tokenizer, args, grpo.logprobs, grpo.group_advantages)
    return lines_of(folder / "steps.jsonl")[-1]


def one_step(tiny, folder: Path, **settings) -> tuple:
    """Draw answers to a prompt and keep them. Return (the rollout, the line of steps.jsonl)."""
    model, tokenizer = tiny
    args = dust.Args(**dict(steps=1, max_new_tokens=24) | settings)
    prompt = dust.program_ids(tokenizer, Problem("a", "Read three digits, then grow them.", []), args)
    [rollout] = dust.draw(model, tokenizer, [(prompt, [1, 2, 3])], args.max_new_tokens, grpo.Sampling(1.0), 8)
    rollout.rewards = torch.tensor([1.0, 0.0, 1.0])
    return rollout, keep(folder, [rollout], model, tokenizer, args)


def test_a_step_that_moved_nothing_shows_no_move_and_uses_no_random_number(tiny, tmp_path):
    states = torch.get_rng_state(), random.getstate()
    rollout, line = one_step(tiny, tmp_path)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    [group] = line["groups"]
    for answer, logps, tokens in zip(rollout.answers, rollout.logps, group["tokens"]):
        assert len(tokens) == len(answer)
        assert [before for _, before, _, _ in tokens] == pytest.approx(logps.tolist(), abs=1e-4)
        assert [after for _, _, after, _ in tokens] == pytest.approx(logps.tolist(), abs=1e-3)
        assert all(entropy >= 0 for *_, entropy in tokens)
    assert group["advantages"] == pytest.approx(grpo.group_advantages(rollout.rewards).tolist(), abs=1e-4)
    text = "".join(piece for piece, *_ in group["tokens"][0])
    assert text.startswith(group["answers"][0][:20])


def test_a_token_goes_up_in_an_answer_that_did_better_than_its_siblings(tiny, tmp_path):
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    rollout, _ = one_step((model, tokenizer), tmp_path)
    args = dust.Args(steps=1, kl=0.0, batch=1, mini_batch=1)
    grpo.update(model, torch.optim.SGD(model.parameters(), lr=0.1), [rollout], args)
    [group] = keep(tmp_path, [rollout], model, tokenizer, args)["groups"]
    shift = [sum(after - was for _, was, after, _ in tokens) for tokens in group["tokens"]]
    assert shift[0] > 0 > shift[1], shift


def test_imitated_answers_have_no_advantages_and_no_log_probs_from_before(tiny, tmp_path):
    _, line = one_step(tiny, tmp_path, mode="sft")
    [group] = line["groups"]
    assert group["advantages"] == [] and all(was is None for tokens in group["tokens"] for _, was, _, _ in tokens)
    assert all(isinstance(after, float) for tokens in group["tokens"] for _, _, after, _ in tokens)


def test_a_step_without_answers_is_kept_as_an_empty_line(tiny, tmp_path):
    """--mode sft may find no perfect ranking, --mode rank-onpolicy no mixed group."""
    args = dust.Args(steps=1)
    empty = grpo.Rollout(torch.tensor([1]), [], [], [], torch.tensor([]))
    for rollouts in ([], [empty]):
        assert keep(tmp_path, rollouts, *tiny, args) == {"step": 1, "groups": []}


def test_a_group_that_teaches_is_kept_before_one_that_does_not_and_no_number_breaks_the_json(tiny, tmp_path):
    args, ones = dust.Args(steps=3), torch.ones(2)
    answers, logps = [torch.tensor([5, 6])] * 2, [torch.tensor([-0.5, float("-inf")])] * 2
    rollouts = [grpo.Rollout(torch.tensor([7, 8]), answers, logps, [True, True], rewards)
                for rewards in (ones, ones, torch.tensor([1.0, 0.5]))]
    keep(tmp_path, rollouts, *tiny, args)
    groups = json.loads((tmp_path / "steps.jsonl").read_text(), parse_constant=pytest.fail)["groups"]
    assert [group["rewards"] for group in groups] == [[1.0, 0.5], [1.0, 1.0]] and "tokens" not in groups[1]
    assert groups[0]["tokens"][0][1][1] is None


def test_a_piece_of_half_a_character_or_of_nothing_is_shown_by_its_name():
    class Tokenizer:
        pieces = {1: ("\ufffd", "ä½"), 2: ("word", "▁word"), 3: ("", "<unused>"), 4: ("", None), 5: (" a", "Ġa")}

        def decode(self, ids):
            return self.pieces[ids[0]][0]

        def convert_ids_to_tokens(self, token):
            return self.pieces[token][1]

    assert [steps.piece_of(Tokenizer(), token) for token in range(1, 6)] == ["ä½", " word", "<unused>", "<4>", " a"]


# ---------------------------------------------------------------------------------------------------------- a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WATCH = """<script>
const faults = [];
addEventListener("error", event => faults.push("error: " + (event.message || event.target.tagName)), true);
addEventListener("securitypolicyviolation", event => faults.push("request: " + event.blockedURI));
</script>"""
VISIT = """<script>
const pressKey = key => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
const pause = () => new Promise(done => setTimeout(done, 100));
const place = () => document.querySelector("#group h3")?.textContent.split(",")[0];
const walk = () => {  // the numbers of the groups of a filter, by the key for the next one
  const seen = [];
  while (place() && seen[seen.length - 1] !== place().split("group ")[1]) {
    seen.push(place().split("group ")[1]);
    pressKey("n");
  }
  return seen;
};
const found = {start: place(), filters: {}};
async function visit() {
  for (const button of document.getElementById("filters").children) {
    button.click();
    pressKey("p"); pressKey("p"); pressKey("p"); pressKey("p");
    found.filters[button.textContent] = walk();
  }
  document.getElementById("filters").children[0].click();
  location.hash = "#g4"; await pause();
  found.link = place();
  pressKey("p"); found.back = [place(), location.hash];
  const tokens = document.querySelectorAll("#step .tokens span"), inspector = document.getElementById("inspector");
  tokens[0]?.focus(); found.token = inspector.textContent;
  pressKey("ArrowRight"); found.next = inspector.textContent;
  pressKey("ArrowLeft"); found.again = inspector.textContent;
  pressKey("]"); pressKey("]"); found.step = [location.hash, document.querySelectorAll("#step .card").length];
  location.hash = "#s1"; await pause();
  found.back_step = document.querySelector("#step-list [aria-pressed=true]")?.textContent;
  found.bars = document.querySelectorAll("#rows .bar").length;
  found.lines = document.querySelectorAll("#rows polyline").length;
  found.shown = document.body.innerText.split("</" + "script><img src=").length - 1;
  found.images = document.images.length;
  found.scripts = document.scripts.length;
  found.requests = performance.getEntriesByType("resource").map(entry => entry.name);
  await pause();
}
visit().catch(error => faults.push(String(error))).finally(() => {
  const result = document.createElement("pre");
  result.id = "result";
  result.textContent = JSON.stringify({...found, faults});
  document.body.append(result);
});
</script>"""


def open_page(text: str, folder: Path, link: str) -> dict:
    """Open a page in the browser with the two scripts in it. Return what they found."""
    folder.mkdir()
    (folder / "page.html").write_text(text.replace("<head>", "<head>" + WATCH).replace("</body>", VISIT + "</body>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
               "--virtual-time-budget=5000", "--dump-dom", f"file://{folder / 'page.html'}{link}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL)
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.skipif(not BROWSER, reason="there is no chromium here (apt-get install chromium)")
def test_the_page_opens_in_a_browser_without_an_error_or_a_request(tmp_path):
    text = (make_run(tmp_path / "run") / "page.html").read_text()
    found = open_page(text, tmp_path / "plain", "#g2")
    assert found["faults"] == [] and found["requests"] == [] and found["images"] == 0
    assert found["scripts"] == 4 and found["shown"] == 9  # the page's two and the test's two; the hostile text is there
    assert found["start"] == "2 of 5: group 2" and found["link"] == "4 of 5: group 4"
    assert found["back"] == ["3 of 5: group 3", "#g3"]
    assert found["filters"] == {
        "all 5": ["1", "2", "3", "4", "5"], "mended by training 2": ["1", "5"], "broken by it 1": ["2"],
        "both right 1": ["3"], "both wrong 1": ["4"], "malformed 1": ["2"]}
    assert found["token"] == found["again"] == (
        '"\\nyes": log-prob before -1.0000, after -0.5000, ratio 1.6487, entropy 0.2500')
    assert found["next"].endswith("log-prob before -0.1250, after -, ratio -, entropy 0.0000")
    assert found["step"] == ["#s4", 2] and found["back_step"] == "1"
    assert found["bars"] == 12 and found["lines"] == 4

    # the control: a page that would take text for HTML is seen
    careful = "made.append(...children);"
    assert text.count(careful) == 1
    careless = text.replace(careful, "for (const child of children) if (typeof child === 'string') "
                                     "made.innerHTML += child; else made.append(child);")
    found = open_page(careless, tmp_path / "careless", "#g2")
    assert found["images"] > 0 and any(fault.startswith("request: http://127.0.0.1:9") for fault in found["faults"])


@pytest.mark.skipif(not BROWSER, reason="there is no chromium here (apt-get install chromium)")
def test_the_page_of_a_run_without_training_opens_too(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "steps.jsonl").unlink()
    (run / "curve.jsonl").unlink()
    for file in ("judged.jsonl", "groups.jsonl"):
        lines = [line for line in lines_of(run / file) if line["row"] == "base"]
        (run / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    saved = json.loads((run / "report.json").read_text())
    saved["rows"], saved["gains"] = {"base": saved["rows"]["base"]}, {}
    (run / "report.json").write_text(json.dumps(saved))
    text = page.write_page(run).read_text()
    found = open_page(text, tmp_path / "plain", "")
    assert found["faults"] == [] and list(found["filters"]) == ["all 5", "right 2", "wrong 3", "malformed 1"]


FOCUS = """(() => {
  const one = document.activeElement;
  const text = one === document.body ? "" : one.textContent.split(" </")[0];
  return [text, document.querySelector("#group h3").textContent.split(",")[0], location.hash];
})()"""
CODES = {"Tab": 9, "Enter": 13, "ArrowRight": 39, "ArrowLeft": 37}


def press_keys(path: Path, keys: list[str]) -> list[list[str]]:
    """Press keys in a browser as a user does. Return after each what has the focus, the group and the address.

    Only a key of the browser moves the focus or presses a button, not an event of a script. So the browser is told what
    to do through two pipes (the DevTools protocol), which it has as its files 3 and 4.
    """
    command = ["sh", "-c", 'exec "$@" 3<&0 4>&1 >/dev/null 2>&1', "sh", BROWSER, "--headless", "--no-sandbox",
               "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={path.parent / 'keys'}", "about:blank"]
    browser = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    session, numbers = {}, itertools.count(1)

    def ask(method: str, **params) -> dict:
        question = {"id": next(numbers), "method": method, "params": params} | session
        browser.stdin.write(json.dumps(question).encode() + b"\0")
        browser.stdin.flush()
        while True:
            text = b"".join(iter(lambda: browser.stdout.read(1), b"\0"))
            answer = json.loads(text)
            if answer.get("id") == question["id"]:
                return answer["result"]

    def value_of(expression: str):
        return ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    stop = threading.Timer(240, browser.kill)
    stop.start()
    try:
        [target] = [one for one in ask("Target.getTargets")["targetInfos"] if one["type"] == "page"]
        session["sessionId"] = ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        ask("Page.navigate", url=f"file://{path}")
        while value_of("location.protocol + document.readyState") != "file:complete":
            time.sleep(0.1)
        states = []
        for key in keys:
            text = {} if key in CODES and key != "Enter" else {"text": "\r" if key == "Enter" else key}
            code = CODES.get(key, ord(key[0]))
            ask("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text)
            ask("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)
            states.append(value_of(FOCUS))
        return states
    finally:
        stop.cancel()
        browser.kill()
        browser.communicate()


@pytest.mark.skipif(not BROWSER, reason="there is no chromium here (apt-get install chromium)")
def test_the_tab_key_reaches_every_control_in_order_and_enter_presses_it(tmp_path):
    path = make_run(tmp_path) / "page.html"
    token, hostile = "↵\nyes", "print(1)  #"
    walk = [("Tab", "Summary", 1), ("Tab", "Groups", 1), ("Tab", "Steps", 1), ("Tab", "all 5", 1),
            ("Tab", "mended by training 2", 1), ("Enter", "mended by training 2", 1), ("Tab", "broken by it 1", 1),
            ("Tab", "both right 1", 1), ("Tab", "both wrong 1", 1), ("Tab", "malformed 1", 1),
            ("Tab", "← previous", 1), ("Tab", "next →", 1), ("Enter", "next →", 5), ("p", "next →", 1),
            ("n", "next →", 5), ("Tab", "#g5", 5), ("Tab", "1", 5), ("Tab", "4", 5), ("Enter", "4", 5),
            ("Tab", "The prompt", 5), ("Tab", token, 5), ("ArrowRight", hostile, 5), ("ArrowLeft", token, 5),
            ("Tab", token, 5), ("Tab", "", 5)]
    states = press_keys(path, [key for key, _, _ in walk])
    places = {1: "1 of 5: group 1", 5: "2 of 2: group 5"}
    mended = walk.index(("Enter", "mended by training 2", 1))
    for i, ((key, focus, group), (seen, place, _)) in enumerate(zip(walk, states)):
        assert seen == focus, (i, key, states)
        assert place == ("1 of 2: group 1" if group == 1 and i >= mended else places[group]), (i, key, states)
    assert states[walk.index(("Enter", "4", 5))][2] == "#s4"
