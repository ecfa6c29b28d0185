"""The micro-lab never trains on its evaluation, and still makes the shipped files. A variant differs in one thing."""
import hashlib
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch

from plumbing.problems import load_problems

DATA = Path(__file__).resolve().parent.parent / "data"
sys.path.insert(0, str(DATA))
import make_tiny  # noqa: E402
from make_tiny import Attempt, read_attempts  # noqa: E402

VARIANTS = ("notation", "clumsy", "teacher")

# -------------------------------------------------------------------------------------- the world and the shipped model


def test_the_shipped_problem_files_are_what_make_tiny_writes(tmp_path, monkeypatch):
    shipped = {name: (DATA / name).read_text() for name in ("train.jsonl", "eval.jsonl")}
    monkeypatch.setattr(make_tiny, "DATA", tmp_path / "data")
    (tmp_path / "data").mkdir()
    make_tiny.make_problems()
    for name, text in shipped.items():
        assert (tmp_path / "data" / name).read_text() == text


def test_no_evaluation_statement_is_trained_on():
    """The statement of an evaluation problem must occur neither in training nor in pretraining.

    The test draws all pretraining problems again, so it checks the problems that the shipped model was made from.
    """
    evaluation = {p.question for p in load_problems("micro-eval")}
    training = {p.question for p in load_problems("micro-train")}
    assert len(evaluation) == 300 and len(training) == 400 and not evaluation & training
    seen = set()
    for chunk in range(-(-make_tiny.STEPS // 8)):
        seen.update(p.question for p in make_tiny.draw_pretraining_problems(0, chunk, 8 * make_tiny.BATCH))
    assert len(seen) > 10000
    assert not seen & evaluation and not seen & training


def test_a_marked_slice_of_the_evaluation_uses_word_orders_that_occur_nowhere_else():
    def order(question):
        return question.removeprefix("Read three digits, then ").split(" them in this order")[0]

    train, evaluation = load_problems("micro-train"), load_problems("micro-eval")
    marked = {order(p.question) for p in evaluation if p.difficulty == "unseen order"}
    others = {order(p.question) for p in evaluation if p.difficulty == "seen order"}
    assert sum(p.difficulty == "unseen order" for p in evaluation) == 100
    assert not marked & (others | {order(p.question) for p in train})
    assert marked <= {", ".join(words) for words in make_tiny.UNSEEN_ORDERS}
    assert not set(make_tiny.SEEN_ORDERS) & make_tiny.UNSEEN_ORDERS  # pretraining draws from the seen ones only
    drawn = {", ".join(p.words) for p in make_tiny.draw_pretraining_problems(0, 0, 512)}
    assert not drawn & marked


def test_the_tests_of_the_shipped_problems_are_passed_by_real_python():
    """The table EFFECT was made by executing single lines. Here whole programs run, as candidates do."""
    drawn = [*make_tiny.draw_distinct(2, "training", make_tiny.SEEN_ORDERS, 400),
             *make_tiny.draw_distinct(3, "evaluation", make_tiny.SEEN_ORDERS, 200),
             *make_tiny.draw_distinct(4, "evaluation", sorted(make_tiny.UNSEEN_ORDERS), 100)]
    for problem, made in zip([*load_problems("micro-train"), *load_problems("micro-eval")], drawn, strict=True):
        assert problem.question == made.question
        for test in problem.tests:
            printed = []
            scope = {"input": lambda: test["input"], "print": lambda *values: printed.append(" ".join(map(str, values)))}
            exec(make_tiny.code_of(made.truth), scope)
            assert printed == [test["output"].strip()], problem.id


def test_documents_are_read_back_by_the_probe_as_they_were_written():
    """A probe that misreads thinking parts would measure skills that the model does not have."""
    problems = make_tiny.draw_pretraining_problems(0, 0, 64)
    for number, (problem, (prompt, answer, thinking)) in enumerate(zip(problems, make_tiny.documents(0, 0, 64))):
        attempts = make_tiny.read_attempts(answer)
        assert len(attempts) == (answer.count(": yes") + answer.count(": no") if thinking else 0)
        for attempt in attempts:
            after = make_tiny.states(attempt.program, problem.given)
            assert attempt.result == after[-1]
            assert attempt.same == [a == b for a, b in zip(after[-1], problem.expected)]
        if number % 2 == 0:
            assert make_tiny.read_program(answer) in problem.programs


def test_every_phrase_of_a_document_is_one_token_and_nothing_is_lost():
    tokenizer = make_tiny.make_tokenizer()
    bytes_allowed = {tokenizer.convert_tokens_to_ids(symbol) for symbol in ",:"}
    for prompt, answer, thinking in make_tiny.documents(0, 1, 64):
        text = make_tiny.render(tokenizer, prompt, thinking=thinking) + answer
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text
        assert all(i >= 256 or i in bytes_allowed for i in ids)
    for text in ("anything: é, 漢字, \t\x00", "x = x[::-1] and then 42"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_the_shipped_model_is_a_small_ordinary_folder():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = DATA / "tiny"
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 4_000_000
    for name in ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "README.md"):
        assert (folder / name).is_file()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == "qwen3" and 5e5 < sum(p.numel() for p in model.parameters()) < 2e6
    turn = [{"role": "user", "content": "Q"}]
    thinking, direct = (
        tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, enable_thinking=switch)
        for switch in (True, False)
    )
    assert direct == thinking + "<think>\n\n</think>\n\n"


# ---------------------------------------------------------------------------------------------------------- the corpus


def test_the_plain_corpus_is_still_the_one_that_the_shipped_model_was_made_from():
    """If a variant took one more random draw from the same stream, data/tiny could not be made again."""
    digest = hashlib.sha256(repr(make_tiny.documents(0, 0, 64)).encode()).hexdigest()
    assert digest == "bdad816a3fa48f094a9c08708e7bb2c5921b71e7102f600cfb84ec2205af4463"


def test_both_notations_are_read_back_as_the_same_attempts():
    """If the probe misread a mark or a verdict in one notation, it would misjudge the skills of that base."""
    problems = make_tiny.draw_distinct(7, "pretraining", make_tiny.SEEN_ORDERS, 300)
    kinds = set()
    for seed, problem in enumerate(problems):
        program = random.Random(seed).choice(problem.programs)
        result = make_tiny.states(program, problem.given)[-1]
        same = [ours == theirs for ours, theirs in zip(result, problem.expected)]
        careful = random.Random(seed).random() < make_tiny.STEP_BY_STEP  # the first draw of a trace
        for in_digits in (False, True):
            text, accepted = make_tiny.trace(random.Random(seed), problem, program, in_digits)
            written = Attempt(program, result, careful, same, accepted, in_digits)
            assert read_attempts(f"<think>\nTry:{text}\nCandidate 2:{text}\n</think>") == [written, written]
            kinds.add((careful, all(same), accepted, in_digits))
    assert len(kinds) == 16


def test_only_the_rankings_of_the_notation_base_are_in_digits():
    for base in make_tiny.BASES:
        for number, (prompt, answer, thinking) in enumerate(make_tiny.documents(0, 0, 200, base)):
            attempts = read_attempts(answer)
            assert len(attempts) == answer.count("\nTry:") + answer.count("\nCandidate")
            assert bool(attempts) == thinking
            assert all(a.in_digits == (base == "notation" and number % 2 == 1) for a in attempts)
            if number % 2 and thinking:  # the ranking follows from the verdicts in every notation
                yes = [a.accepted for a in attempts]
                order = sorted(range(4), key=lambda i: not yes[i])
                assert answer.endswith(f"\n\nRanking: {', '.join(str(i + 1) for i in order)}")


def test_the_other_notation_needs_no_token_that_the_shipped_tokenizer_lacks():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DATA / "tiny")
    bytes_allowed = {tokenizer.convert_tokens_to_ids(symbol) for symbol in ",:"}
    for _, answer, _ in make_tiny.documents(0, 0, 100, "notation"):
        ids = tokenizer(answer, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == answer
        assert all(i >= 256 or i in bytes_allowed for i in ids)


def test_only_the_clumsy_base_miscopies_and_only_what_was_accepted():
    copied = {base: [] for base in make_tiny.BASES}
    for base in make_tiny.BASES:
        stream = 0 if base == "plain" else f"{base}/0"
        problems = make_tiny.draw_pretraining_problems(stream, 0, 2000)
        for problem, (_, answer, thinking) in list(zip(problems, make_tiny.documents(0, 0, 2000, base)))[::2]:
            program, attempts = make_tiny.read_program(answer), read_attempts(answer)
            assert program in problem.programs
            if attempts and attempts[-1].accepted:
                copied[base].append(program == attempts[-1].program)
            elif thinking:  # a guess, not tried yet
                assert program not in [a.program for a in attempts]
            else:
                assert program == problem.truth
    assert all(copied["plain"]) and all(copied["notation"]) and len(copied["clumsy"]) > 400
    assert make_tiny.mean(copied["clumsy"]) == pytest.approx(1 - make_tiny.MISCOPY, abs=0.05)


def test_only_the_teacher_is_shown_right_verdicts_on_intermediate_states():
    for base in make_tiny.BASES:
        documents = make_tiny.documents(0, 0, 400, base)
        attempts = [attempt for _, answer, _ in documents for attempt in read_attempts(answer)]
        right = [a.accepted == all(a.same) for a in attempts]
        careful = [a.step_by_step for a in attempts]
        if base == "teacher":
            assert all(right) and all(careful)
        else:
            assert 0.6 < make_tiny.mean(right) < 0.9 and 0.2 < make_tiny.mean(careful) < 0.4


@pytest.mark.parametrize("base", VARIANTS)
def test_no_evaluation_statement_is_trained_on_by_a_variant_either(base, monkeypatch):
    """Check in the first chunk that the variant's documents draw from their own stream, then check the whole stream."""
    drawn, draw = [], make_tiny.draw_problem
    monkeypatch.setattr(make_tiny, "draw_problem", lambda *how: drawn.append(draw(*how)) or drawn[-1])
    make_tiny.documents(0, 0, 512, base)
    first = list(drawn)
    assert first != make_tiny.draw_pretraining_problems(0, 0, 512)
    assert first == make_tiny.draw_pretraining_problems(f"{base}/0", 0, 512)
    for chunk in range(1, -(-make_tiny.BASES[base][0] // 8)):
        first += make_tiny.draw_pretraining_problems(f"{base}/0", chunk, 8 * make_tiny.BATCH)
    seen = {problem.question for problem in first}
    assert len(seen) > 5000
    for name in ("micro-train", "micro-eval"):
        assert not seen & {problem.question for problem in load_problems(name)}


# ------------------------------------------------------------------------------------------------ making one of them


def make(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["make_tiny.py", *map(str, arguments)])
    return make_tiny.main()


@pytest.fixture
def lab(tmp_path, monkeypatch) -> Path:
    """Make a data/ folder that holds only the shipped model. Its probe always meets the demands."""
    shutil.copytree(DATA / "tiny", tmp_path / "data" / "tiny")
    monkeypatch.setattr(make_tiny, "DATA", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(make_tiny, "probe", lambda *_, **__: {"copy": 0.7})
    monkeypatch.setattr(make_tiny, "DEMANDS", {base: {"copy": (0.6, 0.8)} for base in make_tiny.BASES})
    return tmp_path


def contents(folder: Path) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("base", VARIANTS)
def test_a_variant_is_a_model_of_its_own_and_nothing_shipped_is_written(lab, monkeypatch, base):
    """Without --out, a variant would once have replaced data/tiny, and every variant rewrote the problem files."""
    before, asked, documents = contents(lab / "data"), set(), make_tiny.documents
    monkeypatch.setattr(make_tiny, "documents", lambda *how: asked.add(how[3:]) or documents(*how))
    assert make(monkeypatch, "--base", base, "--steps", 1, "--batch", 2) == 0
    assert asked == {(base,)}  # all documents are of this base
    assert contents(lab / "data") == before
    made = make_tiny.load_init(lab / "runs" / "bases" / base, make_tiny.make_tokenizer()).state_dict()
    shipped = make_tiny.load_init(lab / "data" / "tiny", make_tiny.make_tokenizer()).state_dict()
    change = max((made[name] - shipped[name]).abs().max().item() for name in made)
    assert 0 < change < 1e-4  # the training started from the shipped model and made one step of the warm-up


def test_the_models_of_some_steps_are_kept_and_the_problem_files_are_not_written(lab, monkeypatch):
    before = contents(lab / "data")
    folder = lab / "bases" / "pretrained"
    assert make(monkeypatch, "--steps", 3, "--batch", 2, "--keep", 1, 3, "--out", folder) == 0
    assert contents(lab / "data") == before
    assert sorted(path.name for path in folder.parent.iterdir()) == ["pretrained", "pretrained-1", "pretrained-3"]
    first, third, last = (make_tiny.load_init(folder.with_name(name), make_tiny.make_tokenizer()).state_dict()
                          for name in ("pretrained-1", "pretrained-3", "pretrained"))
    assert all(torch.equal(third[name], last[name]) for name in last)
    assert not all(torch.equal(first[name], last[name]) for name in last)


def test_what_would_spoil_a_model_is_refused_in_one_line(lab, monkeypatch, capsys):
    """A finished training of another base in --work was once saved as this base, at once and without a message."""
    short = ("--steps", 1, "--batch", 2)
    assert make(monkeypatch, "--base", "clumsy", *short, "--work", "work", "--out", "out") == 0
    other = make_tiny.make_tokenizer()
    other.add_tokens(["more"])
    shutil.copytree("out", "longer")
    other.save_pretrained("longer")
    refused = {
        "other settings": ("--base", "notation", *short, "--work", "work"),
        "settings; delete it": ("--base", "clumsy", "--init", "out", *short, "--work", "work"),
        "would overwrite": ("--base", "clumsy", *short, "--out", lab / "data" / "tiny"),
        "made from": ("--init", "out", *short, "--out", "./out"),
        "or the shipped one": ("--init", "out", *short, "--out", lab / "data" / "tiny"),
        "--init nowhere does not load": ("--init", "nowhere", *short),
        "not the micro-lab's": ("--init", "longer", *short),
    }
    before = contents(lab / "data" / "tiny") | contents(Path("out"))
    capsys.readouterr()
    for reason, arguments in refused.items():
        assert make(monkeypatch, *arguments) == 2
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("make_tiny: ")]
        assert len(error) == 1 and reason in error[0]
    assert contents(lab / "data" / "tiny") | contents(Path("out")) == before


def test_false_yes_counts_the_accepted_programs_that_do_not_fit():
    """The model may say yes because it computed a wrong result. What counts is whether the program fits."""
    problem = make_tiny.MicroProblem(("flip", "turn", "grow"), (1, 2, 3), (2, 4, 3), ())
    fits = "\nx = x[::-1]\nx = x[-1:] + x[:-1]\nx = [(v + 1) % 10 for v in x]"
    fails = fits.replace("x[-1:] + x[:-1]", "x[1:] + x[:1]")
    believed = " -> 2 same 4 same 3 same: "
    tries = f"\nTry:{fails}{believed}yes\nTry:{fits}{believed}no\nTry:{fails}: 2 1, 4 1, 3 1, 1\nTry:{fits}{believed}yes"
    figures = make_tiny.skills([problem], [f"<think>{tries}\n</think>"])
    assert figures["attempts"] == 4 and figures["in_digits"] == 1 / 4 and figures["yes_same"] == 3 / 4
    assert figures["false_yes"] == 2 / 3


def test_a_demand_is_missed_by_what_is_not_there():
    figures = {name: low for name, (low, _) in make_tiny.DEMANDS["clumsy"].items()}
    assert make_tiny.missed(figures, "clumsy") == []
    assert [line.split()[0] for line in make_tiny.missed(figures | {"copy": float("nan")}, "clumsy")] == ["copy"]
    assert [line.split()[0] for line in make_tiny.missed(figures | {"copy": 1.0}, "clumsy")] == ["copy"]
