"""Problems are read exactly or refused with file, line and reason; and the micro-lab keeps its evaluation apart."""
import json
import random
import sys
from pathlib import Path

import pytest

from plumbing.problems import BadInput, load_problems

DATA = Path(__file__).resolve().parent.parent / "data"
sys.path.insert(0, str(DATA))
import make_tiny  # noqa: E402

GOOD = {"id": "a", "question": "Q", "tests": [{"input": "1\n", "output": "2\n"}]}


def write(folder: Path, *lines) -> Path:
    path = folder / "problems.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_problems_are_read_in_order_with_their_optional_fields(tmp_path):
    function = {"id": 7, "question": "Q2", "starter_code": "class Solution:", "difficulty": "hard",
                "tests": [{"fn_name": "f", "args": [1], "expected": None}]}
    first, second = load_problems(write(tmp_path, GOOD, "", function))
    assert (first.id, first.question, first.tests, first.starter_code) == ("a", "Q", GOOD["tests"], "")
    assert (second.id, second.starter_code, second.difficulty) == ("7", "class Solution:", "hard")


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"id": "b", ', "broken JSON"),
        ("[1, 2]", "not a JSON object"),
        (GOOD | {"id": "b", "tests": []}, '"tests" is missing or empty; every problem needs at least one test'),
        ({"id": "b", "question": "Q"}, '"tests" is missing'),
        ({"question": "Q", "tests": GOOD["tests"]}, '"id" is missing'),
        (GOOD | {"id": "b", "question": "\ud800"}, "surrogates not allowed"),
        (GOOD | {"id": "b", "question": " "}, '"question" is missing or empty'),
        (GOOD | {"id": "b", "tests": [{"input": "1"}]}, 'tests[0] needs "input" and "output"'),
        (GOOD | {"id": "b", "tests": [{"input": 1, "output": "2"}]}, 'tests[0] needs "input" and "output"'),
        (GOOD | {"id": "b", "tests": [GOOD["tests"][0], {"fn_name": "f", "args": 1, "expected": 2}]}, "tests[1] needs"),
        (GOOD | {"id": "b", "starter_code": 3}, '"starter_code" is not a string'),
        (GOOD, 'id "a" stands in line 1 already'),
        ("[" * 100000, "line 3"),
    ],
)
def test_a_bad_line_is_reported_with_file_line_and_reason(tmp_path, line, reason):
    path = write(tmp_path, GOOD, "", line)
    with pytest.raises(BadInput) as error:
        load_problems(path)
    assert str(error.value).startswith(f"{path} line 3: ") and reason in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_empty_or_binary_file_is_one_line(tmp_path):
    for content, reason in ((None, "No such file"), (b"", "holds no problems"), (b"\xff\xfe\x00", "not UTF-8")):
        path = tmp_path / "x.jsonl"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(BadInput, match=reason):
            load_problems(path)


# ----------------------------------------------------------------------------------------------------- the micro-lab


def test_the_shipped_problem_files_are_what_make_tiny_writes(tmp_path, monkeypatch):
    shipped = {name: (DATA / name).read_text() for name in ("train.jsonl", "eval.jsonl")}
    monkeypatch.setattr(make_tiny, "DATA", tmp_path / "data")
    (tmp_path / "data").mkdir()
    make_tiny.make_problems()
    for name, text in shipped.items():
        assert (tmp_path / "data" / name).read_text() == text


def test_no_evaluation_statement_is_trained_on():
    """Words and example of every evaluation problem occur neither in training nor anywhere in pretraining.

    The whole stream of pretraining problems is drawn again, so this holds for what the shipped model was made from.
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
    """The world's table of effects was made by executing the lines; here whole programs run as a candidate would."""
    rng = random.Random(3)
    for problem in make_tiny.draw_distinct(9, "validation", make_tiny.SEEN_ORDERS, 20):
        digits = tuple(rng.choices(range(10), k=3))
        printed = []
        scope = {"input": lambda: make_tiny.write(digits), "print": lambda *values: printed.append(values)}
        exec(make_tiny.code_of(problem.truth), scope)
        assert printed == [make_tiny.states(problem.truth, digits)[-1]]


def test_documents_are_read_back_by_the_probe_as_they_were_written():
    """A probe that misreads the traces would measure skills that nobody has."""
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
        text = make_tiny.render(tokenizer, prompt, thinking) + answer
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
