"""Weights that really move, adapters, and the memory both take."""
import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

import dust
import grpo
from conftest import bytes_kept
from plumbing import memory, runs
from plumbing.problems import BadInput
from plumbing.models import (SmallStepAdam, lora_disabled, add_lora, checkpoint_layers, load_checkpoint, make_optimizer,
                        save_checkpoint, save_model)

torch.set_num_threads(1)


# ---------------------------------------------------------------------------------------------------- the optimiser


def weights(dtype=torch.bfloat16, n: int = 20_000) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(0)
    return torch.nn.Parameter((torch.randn(n, generator=generator) * 0.02).bfloat16().to(dtype))


def gradient(step: int, n: int = 20_000) -> torch.Tensor:
    """A direction that stays and noise that does not, in bf16 for all alike."""
    generator = torch.Generator().manual_seed(1)
    steady = torch.randn(n, generator=generator)
    generator.manual_seed(100 + step)
    return (steady + 0.5 * torch.randn(n, generator=generator)).bfloat16()


def value(optimizer, p) -> torch.Tensor:
    """What the optimiser holds a weight to be: its master, or the weight and what rounding took of it."""
    if not isinstance(optimizer, SmallStepAdam):
        return p.detach().double()
    kept = optimizer.state[p]["kept"].double()
    return kept if optimizer.keep == "masters" else kept + p.detach().double()


def after(steps: int, make, dtype=torch.bfloat16):
    p = weights(dtype)
    optimizer = make([p])
    for step in range(steps):
        p.grad = gradient(step).to(dtype)
        optimizer.step()
    return optimizer, p


@pytest.mark.parametrize("keep", ["masters", "kahan"])
def test_a_step_of_1e_6_moves_every_weight_and_in_plain_bf16_next_to_none(keep):
    """A bf16 weight of 0.02 has a last bit of 1.2e-4 / 2: at the paper's learning rate plain AdamW trains nothing."""
    start = weights().detach().double()
    optimizer, p = after(1, lambda ps: SmallStepAdam(ps, 1e-6, keep))
    moved = (value(optimizer, p) != start).double().mean()
    _, plain = after(1, lambda ps: torch.optim.AdamW(ps, lr=1e-6, weight_decay=0.0))
    moved_plainly = (plain.detach().double() != start).double().mean()
    assert moved > 0.99 and moved_plainly < 0.03


@pytest.mark.parametrize("keep, tolerance", [("masters", 1e-4), ("kahan", 0.02)])
def test_many_small_steps_go_where_fp32_adamw_goes(keep, tolerance):
    """300 steps of 1e-6; the tolerance is relative to how far fp32 goes. Plain bf16 misses by more than half of it."""
    start = weights().detach().double()
    _, exact = after(300, lambda ps: torch.optim.AdamW(ps, lr=1e-6, weight_decay=0.0), torch.float32)
    way = exact.detach().double() - start

    def miss(values) -> float:
        return float((values - exact.detach().double()).norm() / way.norm())

    assert miss(value(*after(300, lambda ps: SmallStepAdam(ps, 1e-6, keep)))) < tolerance
    _, plain = after(300, lambda ps: torch.optim.AdamW(ps, lr=1e-6, weight_decay=0.0))
    assert miss(plain.detach().double()) > 0.5


@pytest.mark.parametrize("keep", ["masters", "kahan"])
def test_the_model_holds_the_rounding_of_what_the_optimiser_holds(keep):
    optimizer, p = after(20, lambda ps: SmallStepAdam(ps, 1e-3, keep))
    held = value(optimizer, p)
    assert ((p.detach() - held).abs() <= held.abs() * 2**-8).all()  # at most half a last bit


@pytest.mark.parametrize("keep", ["masters", "kahan"])
def test_going_on_from_a_checkpoint_rounds_nothing(keep, tmp_path):
    """torch's load_state_dict casts all state to the weights' dtype: masters and moments would become bf16."""
    class Model(torch.nn.Module):
        device = torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.p = weights()

    def train(model, optimizer, steps):
        for step in steps:
            model.p.grad = gradient(step)
            optimizer.step()

    whole, half, fresh = Model(), Model(), Model()
    optimizers = [SmallStepAdam(m.parameters(), 1e-6, keep) for m in (whole, half, fresh)]
    train(whole, optimizers[0], range(6))
    train(half, optimizers[1], range(3))
    save_checkpoint(tmp_path / "c.pt", half, optimizers[1], 3)
    assert load_checkpoint(tmp_path / "c.pt", fresh, optimizers[2]) == 3
    train(fresh, optimizers[2], range(3, 6))
    assert torch.equal(fresh.p, whole.p)
    for name, tensor in optimizers[0].state[whole.p].items():
        assert name == "step" or torch.equal(tensor, optimizers[2].state[fresh.p][name]), name


@pytest.mark.parametrize("kind, kept", [("fp32", torch.optim.AdamW), ("masters", SmallStepAdam)])
def test_fp32_weights_keep_torchs_own_adamw(kind, kept):
    """The default run's results are those of torch.optim.AdamW."""
    model = torch.nn.Linear(3, 3).to(torch.float32 if kind == "fp32" else torch.bfloat16)
    optimizer = make_optimizer(model, kind, 1e-4)
    assert type(optimizer) is kept and optimizer.param_groups[0].get("weight_decay", 0) == 0


def test_a_run_with_bf16_weights_trains_and_says_so(llama, tmp_path, capsys):
    assert dust.main([*llama["arguments"], "--optimizer", "kahan", "--out", str(tmp_path / "run")]) == 0
    assert "(--optimizer kahan)" in capsys.readouterr().out
    saved = torch.load(tmp_path / "run" / "checkpoint.pt")
    assert {p.dtype for p in saved["model"].values()} == {torch.bfloat16}
    assert {tuple(sorted(state)) for state in saved["optimizer"]["state"].values()} == {("kept", "m", "step", "v")}


# ------------------------------------------------------------------------------------------------------------- LoRA


def tiny():
    torch.manual_seed(3)
    shape = dict(vocab_size=37, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=8, initializer_range=0.2)
    return Qwen3ForCausalLM(Qwen3Config(**shape)).eval()


def test_lora_without_its_package_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(runs, "find_spec", lambda name: None)
    assert dust.main(["--lora", "4"]) == 2
    assert capsys.readouterr().err == "dust: --lora needs the package peft: pip install peft\n"


class NoTokenizer:
    def save_pretrained(self, folder):
        pass


def test_adapters_can_be_switched_off_and_are_merged_in_what_is_saved(tmp_path):
    """Off, the model is its own reference; saved, it says the same as with them, and holds no trace of them."""
    pytest.importorskip("peft")
    base, ids = tiny(), torch.arange(12)[None]
    model = copy.deepcopy(base)
    add_lora(model, 4, seed=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32} and len(trained) == 2 * 2 * 7
    with torch.no_grad():
        for p in trained:
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    with torch.no_grad(), lora_disabled(model):
        torch.testing.assert_close(model(ids).logits, base(ids).logits)
    assert all(p.requires_grad for p in trained)
    adapted = model(ids).logits.detach()
    assert not torch.allclose(adapted, base(ids).logits, atol=1e-2)
    save_model(tmp_path, model, NoTokenizer())
    saved = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(saved(ids).logits, adapted, atol=1e-4, rtol=1e-4)
    assert set(saved.state_dict()) == set(base.state_dict())
    torch.testing.assert_close(model(ids).logits, adapted)  # which goes on with its adapters


def test_what_adapters_learned_in_small_steps_is_not_rounded_away_in_what_is_saved(tmp_path):
    """Merged into bf16 weights, a change of less than half a last bit is none: up to half of a run's learning."""
    pytest.importorskip("peft")
    model = tiny().bfloat16()
    add_lora(model, 4, seed=0)
    layer = model.model.layers[1].mlp.up_proj
    before = layer.get_base_layer().weight.detach().clone()
    with torch.no_grad():
        layer.lora_A["default"].weight.normal_(generator=torch.Generator().manual_seed(1)).mul_(1e-2)
        layer.lora_B["default"].weight.normal_(generator=torch.Generator().manual_seed(2)).mul_(1e-3)
    change = layer.get_delta_weight("default").detach()
    assert ((before + change.bfloat16()) == before).float().mean() > 0.5  # that is what would be lost
    save_model(tmp_path, model, NoTokenizer())
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).model.layers[1].mlp.up_proj.weight
    torch.testing.assert_close(saved - before.float(), change, atol=1e-7, rtol=1e-2)


def test_a_lora_run_saves_an_ordinary_model(llama, tmp_path):
    pytest.importorskip("peft")
    arguments = [*llama["arguments"], "--lora", "4", "--out", str(tmp_path / "run")]
    assert dust.main(arguments) == 0
    assert dust.main([*arguments, "--resume"]) == 0
    base = AutoModelForCausalLM.from_pretrained(llama["folder"] / "model")
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    changed = {n for (n, a), b in zip(trained.named_parameters(), base.parameters()) if not torch.equal(a, b)}
    assert changed and all("proj" in name for name in changed)
    assert (tmp_path / "run" / "checkpoint.pt").stat().st_size < 150_000  # adapters and their state


# ------------------------------------------------------------------------------------------------------- the memory

QWEN3_4B = memory.Shape(4_022_468_096, 36, 2560, 9728, 32, 8, 128, 151_936, 40_960)
ROWS = dict(rows=8, row_tokens=9_000, micro_tokens=8_192)


@pytest.mark.parametrize("kind, total", [("fp32", 64.4), ("masters", 64.4), ("kahan", 56.3)])
def test_the_memory_of_a_4_b_model(kind, total):
    """Weights, gradients and optimiser state in GB: 16, 16 and 14 bytes a weight."""
    need = memory.expected(QWEN3_4B, kind, **ROWS)
    assert sum(need[name] for name in ("weights", "gradients", "optimiser")) / 1e9 == pytest.approx(total, abs=0.06)
    assert need["reference"] == need["weights"]  # the frozen copy


def test_the_memory_of_a_small_shape_by_hand():
    shape = memory.Shape(1000, layers=2, hidden=8, inner=16, heads=4, kv_heads=2, head_dim=4, vocab=10, context=50)
    settings = dict(rows=3, row_tokens=60, micro_tokens=100)
    need = memory.expected(shape, "kahan", **settings)
    cache = 3 * 50 * (2 * 2 * 2 * 4) * 2  # rows x context x (keys and values, layers, heads, numbers) x bytes
    a_layer = 8 * 8 + 4 * 16 + 5 * 16 + 10 * 8
    kept = 100 * 2 * a_layer * 2 + 100 * 10 * 12
    assert need == {"weights": 2000, "gradients": 2000, "optimiser": 10_000, "reference": 2000, "KV cache": cache,
                    "gathered weights": 0, "activations": kept}
    assert memory.peak(need) == 14_000 + 2000 + kept
    again = memory.expected(shape, "kahan", checkpointing=True, **settings)
    assert again["activations"] == 100 * (2 * 8 + a_layer) * 2 + 100 * 10 * 12
    shards = memory.expected(shape, "masters", shards=4, **settings)  # fp32 shards are their own masters
    assert [shards[n] for n in ("weights", "gradients", "optimiser")] == [1000, 1000, 2000]
    assert shards["gathered weights"] == 2000 and shards["KV cache"] == cache
    lora = memory.expected(shape, "masters", lora=3, **settings)
    adapters = 3 * 2 * ((8 + 16) * 2 + (8 + 8) * 2 + (8 + 16) * 3)
    assert (lora["weights"], lora["gradients"]) == (2000 + 4 * adapters, 4 * adapters)
    assert lora["optimiser"] == 8 * adapters and lora["reference"] == 0
    only = memory.expected(shape, "fp32", train=False, **settings)
    assert {name for name, size in only.items() if size} == {"weights", "KV cache"}


def test_the_optimiser_is_the_first_that_fits():
    for there, kind in ((300, "fp32"), (79, "masters"), (69, "kahan"), (24, "kahan")):
        assert memory.choose(QWEN3_4B, there * 1e9, **ROWS)[0] == kind
    assert memory.choose(QWEN3_4B, 24e9, **ROWS, lora=16) == ("masters", True)
    assert memory.choose(QWEN3_4B, 1e12, **ROWS) == ("fp32", False)


def test_a_plan_that_does_not_fit_says_what_to_change():
    def advice(there, kind="masters", **changes):
        return memory.describe(QWEN3_4B, kind, there, checkpointing=True, **ROWS | changes)[-1]

    assert "that will not fit" not in advice(80e9)
    assert "--rows 11" in advice(80e9, rows=256)  # 64.4 GB are taken, a row takes 1.33
    assert advice(70e9).endswith("--optimizer kahan or --lora 16 or torchrun --nproc-per-node=8 with --shard")
    assert advice(24e9).endswith("fit: --lora 16 or torchrun --nproc-per-node=8 with --shard")  # kahan would not do
    assert advice(70e9, "kahan", rows=256, micro_tokens=65_536).endswith("--rows 10 and --micro-tokens 15343")
    assert advice(6e9).endswith("a smaller model, or --shard on more GPUs")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_arithmetic_of_activations_is_near_what_a_backward_pass_keeps(checkpointing):
    """The one part that is no plain count; within a third, without the layer that checkpointing computes again."""
    model = tiny()
    grpo.enable_sharing(model)
    if checkpointing:
        checkpoint_layers(model)
        model.train()
    group = torch.arange(300) % 37, [torch.arange(40) % 37] * 8
    kept = bytes_kept(model, lambda: grpo.logprobs(model, [group], 1.0))
    shape, tokens = memory.shape_of(model.config), 300 + 8 * 39
    guess = memory.activations(shape, tokens, 4, checkpointing)
    if checkpointing:
        a_layer = memory.activations(shape, tokens, 4, False) - tokens * shape.vocab * 12
        guess -= a_layer / shape.layers
    assert kept == pytest.approx(guess, rel=0.33)
    assert shape.parameters == sum(p.numel() for p in model.parameters())


def test_a_damaged_checkpoint_is_one_line(tmp_path):
    model = tiny()
    optimizer = make_optimizer(model, "fp32", 1e-4)
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, model, optimizer, 1)
    whole = path.read_bytes()
    other = tiny()
    del other.model.layers[1]
    for damage in (whole[: len(whole) // 2], b"", b"half a checkpoint"):
        path.write_bytes(damage)
        with pytest.raises(BadInput, match="cannot be read"):
            load_checkpoint(path, model, optimizer)
    save_checkpoint(path, other, make_optimizer(other, "fp32", 1e-4), 1)
    with pytest.raises(BadInput, match="cannot be read"):
        load_checkpoint(path, model, optimizer)
