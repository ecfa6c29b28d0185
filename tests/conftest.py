"""A tiny model of another family than Qwen3, problems for it, and settings for a run of seconds."""
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that plain `pytest` finds the modules too

SMALL = ["--limit", "10", "--eval-limit", "6", "--candidates", "8", "--repeats", "1", "--steps", "2", "--batch", "3",
         "--mini-batch", "3", "--answers", "4", "--workers", "2"]


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> dict:
    """Make a random Llama and its problems. A token is a whole program or ranking, so random answers hold both."""
    from tokenizers import AddedToken, Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llama")
    tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    orders = ("1, 2, 3, 4", "4, 3, 2, 1", "2, 1, 4, 3", "3, 4, 1, 2", "4, 2, 3, 1", "1, 1, 2, 3")
    texts = [f"\n```python\nprint({n})\n```\n" for n in (1, 1.0, 2, 3)] + [f"\nRanking: {order}" for order in orders]
    texts += ["</think>", "Write", "Candidate"]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in texts])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>")  # no pad token
    torch.manual_seed(3)
    config = LlamaConfig(vocab_size=len(wrapped), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, intermediate_size=64, max_position_embeddings=512,
                         bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    wrapped.save_pretrained(folder / "model")
    tests = [{"input": "", "output": "1\n"}]
    problems = [{"id": f"p{i}", "question": f"Write a one, {i}.", "tests": tests} for i in range(8)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    arguments = ["--model", folder / "model", "--train", folder / "problems.jsonl", "--eval", folder / "problems.jsonl",
                 "--preset", "laptop", "--max-new-tokens", "12", "--lr", "0.003", *SMALL]
    return {"folder": folder, "arguments": [str(a) for a in arguments]}
