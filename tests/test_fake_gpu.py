"""Run everything that a GPU would run on the fake one of fake_gpu.py.

Most bugs on a GPU are of two kinds, and a CPU shows neither. A tensor stays on the CPU: the run ends with an error. Or
Python reads a number off the GPU in a loop: the run goes on, several times slower. So each check here does its work on
the CPU and on the fake GPU, and compares: the same tokens and labels, log-probs within 2e-6, no error about devices.
The decoding checks also count how often Python waits for the GPU in a step, and name the line that is too much.

torch takes a new device only before the first backward pass of a process, so the checks run in a process of their own:
this file as a script. `python tests/test_fake_gpu.py waits_qwen3` runs one of them, with its traceback.
"""
import contextlib
import copy
import json
import subprocess
import sys
import tempfile
import traceback
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]
import torch

import dust
import fake_gpu
import grpo
import test_grpo as models
from fake_gpu import FakeGPU, OnGPU
from plumbing.models import add_lora, checkpoint_layers, load_checkpoint, make_optimizer, save_checkpoint

STEPS = (4, 12)  # two lengths of a rollout; their difference has nothing of the prefill
ENDS = [5, 6, 7, 8]  # token ids that end an answer: some end early, some late
REWARDS = ((0.0, 1.0, 0.5), (2.0, -1.0, 0.0), (0.0, 0.0, 1.0))
SHORT = ["--limit", "6", "--eval-limit", "4", "--max-new-tokens", "6", "--steps", "1"]
EVALUATION, TOP_P = grpo.Sampling(0.6, 0.95, 20), grpo.Sampling(1.0, 0.9)


def grouped_experts(make, **changes):
    """Make a mixture of experts whose layers run as transformers runs them on a GPU, without a loop over experts."""
    model = make(**changes)
    model.set_experts_implementation("grouped_mm")
    return model


def plain(make):
    """Make a model that reads a prompt again for each answer."""
    return models.unshared(make())


def with_lora(make):
    model = make()
    add_lora(model, rank=4, seed=0)
    return model


def gpt_oss(num_hidden_layers):
    """Make a model with attention sinks, and in every second layer a window."""
    sizes = models.SIZE | models.EXPERTS | dict(num_local_experts=4, sliding_window=6)
    return models.build("GptOss", **sizes | dict(num_hidden_layers=num_hidden_layers))


# --------------------------------------------------------------------------------------- the same as on the CPU


def on(device):
    """The fake GPU, or nothing for the CPU."""
    return FakeGPU() if device == "gpu" else contextlib.nullcontext()


def draw(model, sampling):
    """Draw three answers to each of three prompts."""
    return models.draw(model, models.ids(4, 11, 9), max_new_tokens=8, eos_ids=ENDS, sampling=sampling)


def same_draws(make, sampling=grpo.Sampling()) -> None:
    """Fail where the fake GPU draws other tokens than the CPU, or gives them other log-probs."""
    found = {}
    for device in ("cpu", "gpu"):
        model = make()
        with on(device):
            found[device] = draw(model.to(device), sampling)
    compare(found, sampling.temperature)


def compare(found: dict, temperature: float) -> None:
    answers, logps = {}, {}
    for device, rollouts in found.items():
        answers[device] = [answer.tolist() for rollout in rollouts for answer in rollout.answers]
        logps[device] = torch.cat([logp for rollout in rollouts for logp in rollout.logps])
    assert answers["gpu"] == answers["cpu"]
    gap = (logps["gpu"] - logps["cpu"]).abs().max()
    assert gap < 2e-6 / temperature, f"log-probs differ by {gap:.1e}"


def same_step(make, layers_again=False) -> None:
    """same_draws, and the metrics of two updates with a reference. layers_again: with gradient checkpointing."""
    found, metrics = {}, {}
    for device in ("cpu", "gpu"):
        model = make()
        if layers_again:
            checkpoint_layers(model)
        has_lora = any("lora_" in name for name, _ in model.named_parameters())
        with on(device):
            model.to(device)
            found[device] = draw(model, grpo.Sampling())
            for rollout, values in zip(found[device], REWARDS):
                rollout.rewards = torch.tensor(values)
            reference = model if has_lora else copy.deepcopy(model).requires_grad_(False)
            metrics[device] = grpo.update(
                model, make_optimizer(model, "fp32", 1e-3), found[device], reference=reference,
                args=models.settings(kl=0.1, ppo_epochs=2, micro_tokens=60),
            )
    compare(found, 1.0)
    assert metrics["cpu"]["stepped"] == 2 and metrics["cpu"]["ref_kl"] > 0
    for name, value in metrics["cpu"].items():
        assert abs(metrics["gpu"][name] - value) < 1e-4, f"{name}: {metrics['gpu'][name]} is not {value}"


def same_checkpoint():
    """A checkpoint of a GPU's bf16 weights and their optimiser comes back to a GPU as it was."""
    with tempfile.TemporaryDirectory() as folder, FakeGPU():
        model, other = (models.qwen3().bfloat16().to("gpu") for _ in range(2))
        optimizer, its = make_optimizer(model, "kahan", 1e-3), make_optimizer(other, "kahan", 1e-3)
        grpo.update(model, optimizer, models.scored(model), models.settings())
        save_checkpoint(Path(folder, "checkpoint.pt"), model, optimizer, 7)
        assert load_checkpoint(Path(folder, "checkpoint.pt"), other, its) == 7
        for p, q in zip(model.parameters(), other.parameters()):
            mine, back = ([x, *(o.state[x][name] for name in ("m", "v", "kept"))] for x, o in ((p, optimizer), (q, its)))
            assert {type(x) for x in mine + back} == {OnGPU}
            assert all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(mine, back))


def same_run(arguments: list[str]) -> None:
    """The whole of dust.py: the same answers, labels and rankings, and a model folder at the end."""
    with tempfile.TemporaryDirectory() as folder:
        for device in ("cpu", "gpu"):
            with on(device):
                assert dust.main([*arguments, *SHORT, "--device", device, "--out", f"{folder}/{device}"]) == 0
        for name in ("samples.jsonl", "labels.jsonl", "base-rankings.jsonl", "trained-labels.jsonl"):
            one, other = (Path(folder, device, name).read_text() for device in ("cpu", "gpu"))
            assert one == other, name
        assert list(Path(folder, "gpu", "model").glob("*.safetensors"))


# ------------------------------------------------------------------------------------------------------- the waits


def waits_a_step(make, most, sampling=grpo.Sampling()):
    """Fail where a step of decoding waits more than `most` times for the GPU, and name the lines that wait."""
    counted = []
    for steps in STEPS:
        model = make()
        with FakeGPU() as gpu:
            model.to("gpu")
            gpu.waits.clear()
            models.draw(model, models.ids(9, 4), answers=2, max_new_tokens=steps, eos_ids=[], sampling=sampling)
            counted.append(gpu.waits)
    more, steps = counted[1] - counted[0], STEPS[1] - STEPS[0]
    lines = "\n".join(f"{count / steps:.2f} a step: {what}, {line}" for (what, line), count in more.most_common())
    assert 0 < sum(more.values()) <= most * steps, f"a step may wait {most} times, and these lines wait:\n{lines}"


def waits_of_an_update(make):
    """Fail where an update of more layers waits more often for the GPU: then something waits in each layer."""
    counted = []
    for layers in (2, 4):
        model = make(num_hidden_layers=layers)
        with FakeGPU() as gpu:
            model.to("gpu")
            rollouts = models.scored(model)
            gpu.waits.clear()
            grpo.update(model, torch.optim.SGD(model.parameters(), lr=0.0), rollouts, models.settings())
            counted.append(gpu.waits)
    lines = "\n".join(f"{count} more: {what}, {line}" for (what, line), count in (counted[1] - counted[0]).items())
    assert not lines, f"with 4 layers instead of 2 these lines wait more often:\n{lines}"


# ------------------------------------------------------------------------------------------- the fake device itself


def refused():
    """What CUDA refuses is an error that names our line; what it allows is not."""
    with FakeGPU():
        there, here, numbers = torch.ones(3, device="gpu"), torch.arange(3), torch.Generator()
        for wrong in (
            lambda: there + here, lambda: torch.cat([there, here]), lambda: torch.where(there > 0, there, here),
            lambda: here[there.long()], lambda: there.index_copy(0, here, there), lambda: there.add_(here),
            lambda: there @ here.float(), lambda: torch.rand(3, generator=numbers, device="gpu"),
        ):
            with pytest.raises(RuntimeError, match=r"test_fake_gpu.py:\d+"):
                wrong()
        assert (there + here.sum()).device == there.device
        assert there[here].sum().item() == 3


def counted():
    """Each wait is counted once, with its line; work on the GPU alone is not a wait."""
    with FakeGPU() as gpu:
        x = torch.tensor([3.0, 1.0, 2.0]).to("gpu")
        gpu.waits.clear()
        x = (x * 2 - 1)[torch.arange(3, device="gpu")].sort().values
        assert x.device.type == "gpu" and not gpu.waits and gpu.kernels["mul"] == 1
        for ask in (lambda: x.sum().item(), lambda: x.tolist(), lambda: x.cpu(), lambda: bool(x.any()),
                    lambda: x.nonzero(), lambda: x[x > 1], lambda: x[torch.arange(2)], lambda: torch.equal(x, x),
                    lambda: torch.arange(3).to("gpu"), lambda: float(x[0])):
            gpu.waits.clear()
            ask()
            (_, line), count = gpu.waits.popitem()
            assert count == 1 and "test_fake_gpu.py" in line and not gpu.waits
        assert x.tolist() == [1.0, 3.0, 5.0]


CHECKS = {
    "refused": refused,
    "counted": counted,
    "draws_top_k": partial(same_draws, models.qwen3, EVALUATION),
    "draws_plain_top_p": partial(same_draws, partial(plain, models.qwen3), TOP_P),
    "draws_plain_window": partial(same_draws, partial(plain, models.mistral)),
    "step_qwen3": partial(same_step, models.qwen3),
    "step_layers_again": partial(same_step, models.qwen3, layers_again=True),
    "step_plain": partial(same_step, partial(plain, models.qwen3)),
    "step_window": partial(same_step, models.mistral),
    "step_gpt_oss": partial(same_step, partial(grouped_experts, models.gpt_oss)),
    "step_without_cache": partial(same_step, models.dynamic),
    "step_lora": partial(same_step, partial(with_lora, models.qwen3)),
    "checkpoint": same_checkpoint,
    "waits_qwen3": partial(waits_a_step, models.qwen3, 1),
    "waits_top_k": partial(waits_a_step, models.qwen3, 1, EVALUATION),
    "waits_experts": partial(waits_a_step, partial(grouped_experts, models.qwen3_moe), 1),
    "waits_window": partial(waits_a_step, models.mistral, 2),
    "waits_gpt_oss": partial(waits_a_step, partial(grouped_experts, models.gpt_oss), 2),
    # transformers' mask asks in each step whether all is seen; top-p asks whether it has looked far enough
    "waits_plain": partial(waits_a_step, partial(plain, models.qwen3), 2),
    "waits_top_p": partial(waits_a_step, models.qwen3, 2, TOP_P),
    "waits_update": partial(waits_of_an_update, models.qwen3),
    "waits_update_sinks": partial(waits_of_an_update, partial(grouped_experts, gpt_oss)),
    "run": same_run,
}


def run_checks(names: list[str], arguments: list[str]) -> dict[str, str]:
    """Return what went wrong in each check, "" where nothing did. arguments: of dust.py, for the check "run"."""
    errors = {}
    for name in names:
        try:
            CHECKS[name](*[arguments] * (name == "run"))
            errors[name] = ""
        except Exception:
            errors[name] = traceback.format_exc()
    return errors


@pytest.fixture(scope="module")
def errors(llama) -> dict[str, str]:
    """The result of each check, in a process of their own."""
    names = [name for name in CHECKS if "lora" not in name or find_spec("peft")]
    done = subprocess.run([sys.executable, __file__, *names, *llama["arguments"]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(bool(fake_gpu.missing()), reason=f"{fake_gpu.missing()}, which the fake GPU is made of")
@pytest.mark.parametrize("name", CHECKS)
def test_on_a_gpu(name, errors):
    if "lora" in name:
        pytest.importorskip("peft")
    assert not errors[name], errors[name]


if __name__ == "__main__":
    torch.set_num_threads(1)
    fake_gpu.install()
    names = [name for name in sys.argv[1:] if name in CHECKS]
    found = run_checks(names, sys.argv[1 + len(names) :])
    print(*found.values(), sep="\n", file=sys.stderr)
    print("\n" + json.dumps(found))
