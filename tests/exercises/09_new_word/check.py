import random
from itertools import product

from data import make_tiny


def test_the_word_has_its_two_readings():
    assert len(make_tiny.READINGS) == 7 and len(make_tiny.LINES) == 14
    taken, halved = make_tiny.READINGS["shrink"]
    assert make_tiny.execute(taken, (0, 1, 9)) == (9, 0, 8)
    assert make_tiny.execute(halved, (0, 1, 9)) == (0, 0, 4)


def test_no_line_does_what_another_does():
    states = list(product(range(10), repeat=3))
    effects = [tuple(make_tiny.EFFECT[line][state] for state in states) for line in make_tiny.LINES]
    assert len(set(effects)) == 14
    assert all(0 <= digit <= 9 for effect in effects for state in effect for digit in state)


def test_a_fifth_of_the_orders_is_kept_for_the_evaluation():
    assert len(make_tiny.ORDERS) == 7 * 6 * 5 and len(make_tiny.UNSEEN_ORDERS) == 42
    assert len(make_tiny.SEEN_ORDERS) == 168


def test_the_documents_speak_of_it_and_its_lines_are_single_tokens():
    tokenizer = make_tiny.make_tokenizer()
    for text in (" shrink", *(f"\n{line}" for line in make_tiny.READINGS["shrink"])):
        assert len(tokenizer(text, add_special_tokens=False).input_ids) == 1, text
    documents = make_tiny.documents(0, 0, 200)
    with_it = [f"{prompt}{answer}" for prompt, answer, _ in documents if "shrink" in prompt]
    assert len(with_it) > 40
    for text in random.Random(0).sample(with_it, 10):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
