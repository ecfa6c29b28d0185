"""data/cuda_graph.py without a GPU: what a recording may hold, and that replaying it is decoding.

Not covered: torch.cuda.graph itself, for which Emulated stands in.
"""
import pytest
import test_grpo as models
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import grpo
from data import BadInput, cuda_graph
from prefix import Decoding, shares_prompts

FROM_THE_GPU = {"_local_scalar_dense", "nonzero", "bincount", "_unique2", "unique_dim", "lift_fresh", "is_nonzero"}


class Emulated(TorchDispatchMode):
    """A CUDA graph on the CPU: notes each operation with the very tensors it met; replay() does them again on the same
    memory, blind to what Python would have done. Refuses the commonest of what a graph cannot hold."""

    def __init__(self, work):
        super().__init__()
        self.steps = []
        with self:
            work()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.overloadpacket.__name__ in FROM_THE_GPU:
            raise RuntimeError(f"operation not permitted when stream is capturing: {op}")
        out = op(*args, **(kwargs or {}))
        self.steps.append((op, args, kwargs or {}, out))
        return out

    def replay(self):
        for op, args, kwargs, out in self.steps:
            for old, new in zip(tree_leaves(out), tree_leaves(op(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def recorded(monkeypatch):
    """The recordings made meanwhile, each by the emulator."""
    made = []
    monkeypatch.setattr(cuda_graph, "record", lambda work, device: made.append(Emulated(work)) or made[-1])
    monkeypatch.setattr(cuda_graph, "ROOM", 12)
    monkeypatch.setattr(cuda_graph, "SETTLED", 2)
    return made


def logits_of(layout, model, tokens, leaving):
    """The logits of each step, two prompts of 9 and 4 tokens with 3 and 2 answers; some rows leave on the way."""
    prompts = [torch.arange(7, 16), torch.tensor([20, 3, 9, 31])]
    with torch.inference_mode():
        state, live, seen = layout(model, prompts, [3, 2]), torch.arange(5), []
        for t in range(tokens.shape[1]):
            if t in leaving:
                rows = torch.tensor(leaving[t])
                state.keep(rows)
                live = live[rows]
            state.step(model, tokens[live, t])
            seen.append(state.logits.clone())
    return seen


@pytest.mark.parametrize("make", [models.qwen3, models.llama, models.mistral, models.deepseek])
def test_what_is_replayed_is_what_would_have_been_done(make, recorded):
    """Past the first buffers, past the window, and with rows that leave: a whole group is gone in the end."""
    model, tokens = make().double(), torch.randint(37, (5, 40), generator=torch.Generator().manual_seed(1))
    leaving = {7: [0, 2, 3, 4], 30: [0, 1]}
    wanted = logits_of(Decoding, model, tokens, leaving)
    got = logits_of(cuda_graph.Replayed, model, tokens, leaving)
    assert len(recorded) == 6, "for 2 changes of rows and 3 of buffers, and at first"
    assert sum(len(graph.steps) > 0 for graph in recorded) == 6
    for a, b in zip(wanted, got, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_sinks_and_windows_of_a_mixture_of_experts(recorded):
    """GPT-OSS with its experts in one product, as transformers runs them by itself; a loop over them asks the GPU."""
    model, tokens = models.gpt_oss(), torch.randint(37, (5, 20), generator=torch.Generator().manual_seed(1))
    model.set_experts_implementation("batched_mm")
    both = [logits_of(layout, model, tokens, {7: [1, 4]}) for layout in (Decoding, cuda_graph.Replayed)]
    assert len(recorded) == 3
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_a_step_that_cannot_be_recorded_is_named(recorded):
    model = models.qwen3_moe()
    with pytest.raises(BadInput, match="--cuda-graphs: a decode step of this model cannot be recorded .*leave"):
        logits_of(cuda_graph.Replayed, model, torch.zeros(5, 9, dtype=torch.long), {})


def test_what_the_end_of_a_failed_recording_raises_does_not_hide_the_reason(monkeypatch):
    """Out of memory, of which the user is told what to lower, came out as a model that cannot be recorded."""
    def record(work, device):
        try:
            raise reason
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(cuda_graph, "record", record)
    for reason, kind, words in ((torch.OutOfMemoryError("no room"), torch.OutOfMemoryError, "no room"),
                                (RuntimeError("no such kernel"), BadInput, "no such kernel")):
        with pytest.raises(kind, match=words):
            logits_of(cuda_graph.Replayed, models.qwen3(), torch.zeros(5, 9, dtype=torch.long), {})


def test_a_rollout_is_the_same(recorded):
    """The same tokens from the same seeds, however many rows are left."""
    model = models.qwen3()
    assert shares_prompts(model)
    prompts = [torch.arange(7, 16), torch.tensor([20, 3, 9, 31])]
    settings = dict(answers=6, max_new_tokens=40, eos_ids=[models.EOS, 6])
    plain, replayed = (
        grpo.rollout(model, prompts, **settings, generator=torch.Generator().manual_seed(5), cuda_graphs=graphs)
        for graphs in (False, True)
    )
    assert len(recorded) > 2
    for a, b in zip(plain, replayed, strict=True):
        assert len({len(answer) for answer in a.answers}) > 2
        assert [answer.tolist() for answer in a.answers] == [answer.tolist() for answer in b.answers]
        torch.testing.assert_close(torch.cat(a.logps), torch.cat(b.logps))
