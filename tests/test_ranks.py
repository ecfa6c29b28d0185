"""Two processes that share a run, on the CPU: equal gradients, equal results, and a rank that dies."""
import copy
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemWriter
from transformers import AutoModelForCausalLM, Qwen3Config

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import dust
import grpo
from plumbing import ranks
from plumbing.problems import BadInput, Problem
from plumbing.models import load_checkpoint, load_model, make_optimizer, save_checkpoint, save_model
from plumbing.ranks import full_state, shard_model
from server import ModelServer
from test_grpo import distance, ids, phi3, qwen3, scored, settings, unshared
from test_models import QWEN, make_model, make_tokenizer, quantise

torch.set_num_threads(1)
ROOT = Path(dust.__file__).resolve().parent


def in_ranks(task, folder: Path, count: int = 2) -> list[int]:
    """task(rank) in forked processes that find each other as torchrun's do; returns their exit codes.

    What they print goes to folder/RANK.
    """
    children = []
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun keeps it too
    for rank in range(count):
        child = os.fork()
        if not child:
            signal.alarm(60)  # nothing here may hang the tests
            output = os.open(folder / str(rank), os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            os.dup2(output, 1), os.dup2(output, 2)
            sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1",
                              MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE="True")
            # before this process has threads: two of them at once would meet the parent's pool half replaced
            torch.set_num_threads(1)
            code = 1
            try:
                code = task(rank) or 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    del store
    return codes


def said(folder: Path) -> list[str]:
    """The lines of dust's own that the ranks printed on stderr."""
    return [line for path in sorted(folder.glob("[0-9]")) for line in path.read_text().splitlines()
            if line.startswith("dust: ")]


def results(folder: Path, task, count: int = 2) -> list:
    """What task(rank) returned on each rank."""
    def keep(rank):
        ranks.start()
        torch.save(task(rank), folder / f"result{rank}")

    outcome = in_ranks(keep, folder, count)
    assert outcome == [0] * count, [(folder / str(rank)).read_text() for rank in range(count)]
    return [torch.load(folder / f"result{rank}", weights_only=False) for rank in range(count)]


# -------------------------------------------------------------------------------------------------------- gradients


class Recorder(torch.optim.SGD):
    """Plain SGD that keeps the gradients of its last step, in full."""

    def step(self):
        self.seen = [full_state(p.grad).clone() for p in self.param_groups[0]["params"]]
        super().step()


def update(model, rollouts, reference=None, lr=0.0, generator=None, **changes):
    """The gradients and metrics of one update, and where its last step leads."""
    optimizer = Recorder(model.parameters(), lr=lr)
    args = settings(kl=0.1, **changes)
    metrics = grpo.update(model, optimizer, rollouts, args, reference=reference, generator=generator)
    return optimizer.seen, metrics, [full_state(p.detach()).clone() for p in model.parameters()]


UPDATES = {
    "unequal rows": (((0.0, 1.0, 0.5), (2.0, -1.0, 0.0)), {"micro_tokens": 25}),
    "one rank without work": (((0.3, 0.3, 0.3), (2.0, -1.0, 0.0)), {"micro_tokens": 25}),
    "several steps": (((0.0, 1.0, 0.5), (2.0, -1.0, 0.0)), {"mini_batch": 1, "ppo_epochs": 2, "lr": 0.05}),
}


@pytest.mark.parametrize("shard", [False, True])
def test_two_ranks_have_the_gradients_of_one(tmp_path, shard):
    """Each rank's own denominator, a mean over ranks, or a rank without work that waits or is forgotten: all wrong.

    With --shard whoever makes one forward more than the others also waits for ever.
    """
    model = qwen3(tie_word_embeddings=not shard)
    rollouts = {name: scored(model, rewards) for name, (rewards, _) in UPDATES.items()}
    with torch.no_grad():  # a reference that differs
        reference = copy.deepcopy(model)
        reference.model.norm.weight.mul_(1.1)

    def all_updates(rank=0):
        found = {}
        for name, (_, changes) in UPDATES.items():
            own, frozen = copy.deepcopy(model), copy.deepcopy(reference)
            if shard and ranks.world() > 1:
                for one in (own, frozen):
                    shard_model(one, torch.float32, "cpu")
                    assert grpo.enable_sharing(one) == ""
            seed = torch.Generator().manual_seed(5)
            found[name] = update(own, rollouts[name], frozen, generator=seed, **changes)
        return found

    expected = all_updates()
    for found in results(tmp_path, all_updates):
        for name, (gradients, metrics, weights) in found.items():
            assert distance(gradients, expected[name][0]) < 1e-6, name
            assert distance(weights, expected[name][2]) < 1e-6, name
            for key, value in expected[name][1].items():
                assert metrics[key] == pytest.approx(value, rel=1e-4, abs=1e-6), (name, key)


def test_a_rank_that_has_drawn_no_answers_takes_part_in_the_update(tmp_path):
    """FSDP notes each forward of a layer, and gathers ahead by these notes in the next backward: both ranks hung. They
    also took memory for each token that was decoded."""
    model, reference = qwen3(tie_word_embeddings=False), qwen3(tie_word_embeddings=False)
    rollouts = scored(model)
    expected, _, _ = update(copy.deepcopy(model), rollouts, copy.deepcopy(reference))

    def task(rank):
        for each in (model, reference):
            shard_model(each, torch.float32, "cpu")
            assert grpo.enable_sharing(each) == ""
        prompts = ranks.share(ids(11))  # one, for the first rank
        grpo.rollout(model, prompts, [[1, 2]] * len(prompts), max_new_tokens=4, eos_ids=[])
        noted = len(model._get_fsdp_state()._comm_ctx.post_forward_order)
        return len(prompts), noted, distance(update(model, rollouts, reference)[0], expected)

    (first, *_), (second, *_) = found = results(tmp_path, task)
    assert (first, second) == (1, 0)
    assert all(noted == 0 and far < 1e-4 for _, noted, far in found)


@pytest.mark.parametrize("make", [lambda: unshared(qwen3(tie_word_embeddings=False)), phi3])
def test_ranks_with_unequal_work_make_equally_many_forwards_where_prompts_are_not_shared(tmp_path, make):
    """Each group, and with Phi-3 each answer, is a forward pass. The rank with fewer of them left the other waiting."""
    model, reference = make(), make()
    rollouts = [*scored(model), scored(model)[0]]  # two for the first rank, one for the second
    rollouts[2].rewards = torch.tensor([1.0, 0.0, 0.0])
    expected, _, _ = update(copy.deepcopy(model), rollouts, copy.deepcopy(reference))

    def task(rank):
        for each in (model, reference):
            shard_model(each, torch.float32, "cpu")
        return distance(update(model, rollouts, reference)[0], expected)

    assert max(results(tmp_path, task)) < 1e-4


@pytest.mark.parametrize("kind", ["fp32", "masters", "kahan"])
def test_a_sharded_checkpoint_goes_on_in_any_number_of_ranks(tmp_path, kind):
    """Saved by two ranks, read by one: the same weights, and optimiser state in full."""
    dtype = torch.bfloat16 if kind == "kahan" else torch.float32
    rollouts = scored(qwen3())

    def train(steps, load=None, save=None):
        model = qwen3().to(dtype)
        shard_model(model, torch.float32 if kind == "fp32" else torch.bfloat16, "cpu")
        optimizer = make_optimizer(model, kind, 1e-3)
        assert grpo.enable_sharing(model) == ""
        if load:
            load_checkpoint(load, model, optimizer)
        for _ in range(steps):
            grpo.update(model, optimizer, rollouts, settings())
        if save:
            save_checkpoint(save, model, optimizer, steps)
        state = {index: {name: full_state(value) for name, value in values.items()}
                 for index, values in optimizer.state_dict()["state"].items()}
        return [full_state(p.detach()) for p in model.parameters()], state

    saved = tmp_path / "checkpoint.pt"
    tasks = [dict(steps=2), dict(steps=1, save=saved), dict(steps=1, load=saved)]
    (two, _) = results(tmp_path, lambda rank: [train(**task) for task in tasks])
    (straight, _), (halfway, state), (resumed, _) = two
    (((alone, state_alone),),) = results(tmp_path, lambda rank: [train(0, load=saved)], count=1)
    assert all(torch.equal(a, b) for a, b in zip(halfway, alone))
    assert all(torch.equal(state[i][n], state_alone[i][n]) for i in state for n in state[i] if n != "step")
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed))


def test_a_sharded_model_may_be_called_inside_a_forward_and_is_saved_in_full(tmp_path):
    """A model that cannot share prompts is called itself in there: the gradients are those of a model in one piece.

    Saved twice under tied names, or as shards, it would not load.
    """
    model, ids = qwen3(tie_word_embeddings=True), torch.arange(12)[None] % 30
    model.set_attn_implementation("sdpa")  # a model that cannot share prompts attends in transformers' own way

    def loss(model, ids):
        return model(ids).logits.log_softmax(-1).square().mean()

    loss(model, ids).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    def task(rank):
        one = copy.deepcopy(model)
        shard_model(one, torch.float32, "cpu")
        for _ in range(2):
            one.zero_grad()
            (ranks.run_forward(one, loss, ids) / ranks.world()).backward()
        save_model(tmp_path / "saved", one, SimpleNamespace(save_pretrained=lambda folder: None))
        return [full_state(p.grad) for p in one.parameters()], "forward" in vars(one)

    for gradients, written in results(tmp_path, task):
        assert distance(gradients, expected) < 1e-6 and not written
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family, optimizer", [("qwen3", "kahan"), ("gpt-oss", "fp32"), ("llama", "masters")])
def test_a_model_that_only_rank_0_reads_is_the_same_on_every_rank(family, optimizer, tmp_path):
    """Weights in 4 bits, tied ones, and such as the configuration calls tied, but they are not (Llama).

    And what no state dict holds: rotary frequencies, and the ids of the end.
    """
    folder = make_model(tmp_path / "model", family)
    if family == "gpt-oss":
        quantise(folder)
    else:
        config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
        (folder / "config.json").write_text(json.dumps(config))
    if family == "qwen3":
        weights = load_file(folder / "model.safetensors")
        del weights["lm_head.weight"]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 5, 7], "do_sample": true, "top_k": 9}')
    ids, read = torch.arange(40)[None] % 20, AutoModelForCausalLM.from_pretrained

    def task(rank):
        def counted(*arguments, **named):
            assert rank == 0, "every rank reads the weights"
            return read(*arguments, **named)

        AutoModelForCausalLM.from_pretrained = counted
        model, _ = load_model(str(folder), optimizer=optimizer, shard=True, device="cpu")
        logits = ranks.run_forward(model, lambda model, ids: model(ids).logits, ids).detach()
        state = {name: full_state(value) for name, value in model.state_dict().items()}
        parameters = len(list(model.parameters()))
        return state, dict(model.named_buffers()), logits, model.generation_config.to_dict(), parameters

    alike = "fp32" if optimizer == "masters" else optimizer  # a shard is its own fp32 master
    whole, _ = load_model(str(folder), optimizer=alike, shard=False, device="cpu")
    for state, buffers, logits, generation, parameters in results(tmp_path, task):
        for mine, expected in ((state, whole.state_dict()), (buffers, dict(whole.named_buffers()))):
            assert mine.keys() == expected.keys()
            assert all(torch.equal(mine[name], expected[name]) for name in mine)
            assert all(mine[name].dtype == expected[name].dtype for name in mine)
        near = 1e-5 if optimizer == "fp32" else 0.02
        assert torch.allclose(logits.float(), whole(ids).logits.float(), atol=near)
        assert generation == whole.generation_config.to_dict() and parameters == len(list(whole.parameters()))


def test_a_model_that_rank_0_cannot_read_is_one_error_on_every_rank(tmp_path):
    """The other ranks would wait for its weights."""
    folder = make_model(tmp_path / "model", "llama")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])

    def task(rank):
        with pytest.raises(BadInput) as error:
            load_model(str(folder), optimizer="fp32", shard=True, device="cpu")
        return str(error.value)

    one, other = results(tmp_path, task)
    assert one == other and one.startswith(f"--model {folder} does not load: ") and "\n" not in one


def in_memory() -> float:
    """MB of this process that are no file's."""
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024


def peak(do) -> float:
    """By how many MB this process grew, at most, while do() ran."""
    seen, ended = [in_memory()], threading.Event()

    def watch():
        while not ended.wait(0.002):
            seen.append(in_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    do()
    ended.set()
    watcher.join()
    return max(seen) - seen[0]


def test_no_rank_but_the_first_ever_holds_a_sharded_model_in_full(tmp_path):
    """Eight copies of 61 GB do not fit a machine, nor do eight of weights and optimiser at each checkpoint.

    The model has 96 MB, and its largest weight 8. Before, each rank grew by 96 MB when it was loaded, by 296 when a
    checkpoint was saved (rank 0 also when it was read), and by 104 when the model was saved.
    """
    config = Qwen3Config(vocab_size=4096, hidden_size=512, intermediate_size=2048, num_hidden_layers=5, head_dim=64,
                         num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config)
    size = sum(p.nbytes for p in model.parameters()) / 2**20
    model.bfloat16().save_pretrained(tmp_path / "model")  # read as fp32: so it is not just mapped from the disk
    make_tokenizer(QWEN).save_pretrained(tmp_path / "model")
    del model

    def task(rank):
        ctypes.CDLL(None).mallopt(-3, 2**16)  # what is freed goes back to the system (M_MMAP_THRESHOLD)
        loaded, grown, file = [], {}, tmp_path / "checkpoint.pt"
        grown["load"] = peak(lambda: loaded.extend(
            load_model(str(tmp_path / "model"), optimizer="fp32", shard=True, device="cpu")))
        model, tokenizer = loaded
        optimizer = make_optimizer(model, "fp32", 1e-3)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()
        grown["save"] = peak(lambda: save_checkpoint(file, model, optimizer, 1))
        grown["resume"] = peak(lambda: load_checkpoint(file, model, optimizer))
        grown["save the model"] = peak(lambda: save_model(tmp_path / "saved", model, tokenizer))
        return grown

    first, second = results(tmp_path, task)
    print(f"{size:.0f} MB:", first, second)
    # on the CPU, beside half of the model as shards, and what is on its way: more on a machine with other work
    assert first["load"] < 2.1 * size and second["load"] < 0.9 * size
    for grown in (first, second):
        assert grown["save"] < 0.3 * size and grown["resume"] < 0.3 * size
    assert first["save the model"] < 1.4 * size and second["save the model"] < 0.4 * size


def sharded_run():
    """A sharded model, and its optimiser after a step."""
    model = qwen3()
    shard_model(model, torch.float32, "cpu")
    optimizer = make_optimizer(model, "fp32", 1e-3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("killed, when", [(0, "write_data"), (1, "write_data"), (0, "finish")])
def test_a_rank_killed_while_shards_are_written_leaves_the_checkpoint_before(killed, when, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    results(tmp_path, lambda rank: save_checkpoint(path, *sharded_run(), 1))

    def die(rank):
        def kill(*_, **__):
            time.sleep(0.5)  # the other has written its shards by then
            os.kill(os.getpid(), signal.SIGKILL)

        ranks.start()
        if rank == killed:
            monkeypatch.setattr(FileSystemWriter, when, kill)
        save_checkpoint(path, *sharded_run(), 2)

    def go_on(rank):
        model, optimizer = sharded_run()
        step = load_checkpoint(path, model, optimizer)
        save_checkpoint(path, model, optimizer, step + 1)
        return step, load_checkpoint(path, model, optimizer), [p.name for p in (tmp_path / "checkpoint").iterdir()]

    codes = in_ranks(die, tmp_path)
    assert codes[killed] == -signal.SIGKILL and 0 not in codes
    for first, second, kept in results(tmp_path, go_on):
        assert (first, second, kept) == (1, 2, ["2"])


@pytest.mark.parametrize("file", ["1/.metadata", "1/__0_0.distcp", "1/__1_0.distcp"])
def test_damaged_shards_are_one_line_on_every_rank(file, tmp_path):
    path = tmp_path / "checkpoint.pt"
    results(tmp_path, lambda rank: save_checkpoint(path, *sharded_run(), 1))
    shard = tmp_path / "checkpoint" / file
    shard.write_bytes(shard.read_bytes()[:100])

    def task(rank):
        with pytest.raises(BadInput) as error:
            load_checkpoint(path, *sharded_run())
        return str(error.value)

    for line in results(tmp_path, task):
        assert line.startswith(f"{tmp_path / 'checkpoint'} cannot be read (") and "\n" not in line


def test_a_disk_that_is_full_at_one_rank_is_its_own_error_on_every_rank(tmp_path, monkeypatch):
    """torch raises a BaseException there, which no `except Exception` sees."""
    def full(*_):
        raise OSError(28, "No space left on device")

    def task(rank):
        if rank == 1:
            monkeypatch.setattr(FileSystemWriter, "write_data", full)
        with pytest.raises(OSError) as error:
            save_checkpoint(tmp_path / "checkpoint.pt", *sharded_run(), 1)
        return dust.runs.what_to_do(error.value)

    assert results(tmp_path, task) == ["the disk is full: make room"] * 2


def test_the_store_waits_as_long_as_the_ranks_do(tmp_path):
    """NCCL's ranks meet in the store at their first collective: after five minutes of waiting the run ended."""
    found = results(tmp_path, lambda rank: torch.distributed.distributed_c10d._get_default_store().timeout)
    assert found == [timedelta(days=7)] * 2


def test_a_weight_that_one_rank_did_not_use_is_summed_all_the_same(tmp_path):
    """An expert of a mixture that saw no token there: a rank that does not join in leaves all others waiting."""
    def task(rank):
        a, b, frozen = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
        frozen.requires_grad_(False)
        (a * (rank + 1) + (b if rank else 0)).sum().backward()
        ranks.sum_gradients([a, b, frozen])
        return a.grad, b.grad, frozen.grad

    for a, b, frozen in results(tmp_path, task):
        assert a.tolist() == [3, 3] and b.tolist() == [1, 1] and frozen is None


def test_work_is_spread_and_comes_back_in_order(tmp_path):
    def task(rank):
        calls = []
        found = ranks.spread(list(range(5)), lambda own: (calls.append(own), [10 * i for i in own])[1])
        nothing = ranks.spread([], lambda own: own)
        return calls, found, nothing, ranks.on_first(lambda: f"from {rank}")

    for rank, (calls, found, nothing, first) in enumerate(results(tmp_path, task)):
        assert calls == [[0, 2, 4], [1, 3]][rank : rank + 1] and found == [0, 10, 20, 30, 40]
        assert nothing == [] and first == "from 0"


def test_ranks_on_unlike_machines_cut_the_labels_alike(tmp_path, monkeypatch):
    """Chunks that depend on a machine's number of workers would differ between ranks, which then wait for ever."""
    sizes = []

    def resumable(file, work, do, size):
        sizes.append(size)
        return dict.fromkeys(work, 1)

    monkeypatch.setattr(dust.runs, "resumable", resumable)
    monkeypatch.setattr(ranks, "gather", lambda workers: [workers, 1])  # the other rank has one
    candidates = [dust.Candidate("p", "", f"print({i})") for i in range(100)]
    for workers in (1, 7):
        problems = [Problem("p", "?", [{"input": "", "output": "1"}])]
        dust.label(problems, candidates, dust.Args(workers=workers), tmp_path / "labels.jsonl")
    assert sizes == [32, 32]


# ---------------------------------------------------------------------------------------------------- the whole run


def run_ranks(arguments, folder: Path, before=lambda rank: None, count: int = 2) -> list[int]:
    folder.mkdir(exist_ok=True)
    return in_ranks(lambda rank: (before(rank), dust.main([str(a) for a in arguments]))[1], folder, count)


def read_run(out: Path):
    candidates = (out / "candidates.jsonl").read_text()
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return candidates, steps, json.loads((out / "report.json").read_text())


def test_two_ranks_do_what_one_does_also_sharded(llama, tmp_path):
    """Every draw has a seed of its own, so one run and two shared ones differ in the last bits at most."""
    arguments = [*llama["arguments"], "--rows", "16", "--steps", "3"]
    assert dust.main([*arguments, "--out", str(tmp_path / "one")]) == 0
    for name, more in (("two", []), ("sharded", ["--shard"])):
        assert run_ranks([*arguments, *more, "--out", tmp_path / name], tmp_path / f"{name}-said") == [0, 0]
        (candidates, steps, report), one = read_run(tmp_path / name), read_run(tmp_path / "one")
        assert candidates == one[0] and len(steps) == 3
        for mine, theirs in zip(steps, one[1]):
            for key in ("reward", "loss", "grad_norm", "ref_kl", "zero_variance", "answer_tokens"):
                assert mine[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), key
        assert report["rows"] == one[2]["rows"]
        models = [AutoModelForCausalLM.from_pretrained(tmp_path / n / "model") for n in (name, "one")]
        assert distance(*[[p.detach() for p in m.parameters()] for m in models]) < 1e-5
        assert (tmp_path / f"{name}-said" / "1").read_text() == ""  # rank 0 alone shows anything


def asked_of(server: ModelServer) -> list[str]:
    """Return the requests for answers that a server got, in any order. An adapter's name follows its last bits."""
    return sorted(json.dumps(body | {"model": ""}) for body in server.log)


@pytest.mark.parametrize("more", [[], ["--lora", "4", "--server-rollouts"]])
def test_two_ranks_ask_a_server_for_what_one_asks_for(more, llama, tmp_path):
    """No answer is drawn twice, and the results are those of one rank."""
    if more:
        pytest.importorskip("peft")
    runs, asked = {}, {}
    for name in ("one", "two"):
        with ModelServer(llama["folder"] / "model", context=512) as server:
            arguments = [*llama["arguments"], *more, "--rows", "16", "--server", server.url, "--out", tmp_path / name]
            count = 1 + (name == "two")
            assert run_ranks(arguments, tmp_path / f"{name}-said", count=count) == [0] * count
            runs[name], asked[name] = read_run(tmp_path / name), asked_of(server)
    assert asked["one"] == asked["two"]
    (candidates, steps, report), other = runs["one"], runs["two"]
    assert other[0] == candidates and other[2]["rows"] == report["rows"]
    for mine, theirs in zip(steps, other[1], strict=True):
        for key in ("reward", "grad_norm", "answer_tokens"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), key


@pytest.mark.parametrize("when", ["at the start", "in training"])
def test_an_error_of_a_server_is_said_once_whichever_rank_would_meet_it(when, llama, tmp_path):
    """Where another rank than the first one met it, it was never said: there was only "another process has ended"."""
    pytest.importorskip("peft")
    told = []

    def refuse_one(number, body, reply):
        training = body["n"] == 4 and body["temperature"] == 1
        if reply is None and not told and (training if when == "in training" else number == 2):
            told.append(number)
            return 400

    with ModelServer(llama["folder"] / "model", context=512, fault=refuse_one) as server:
        arguments = [*llama["arguments"], "--lora", "4", "--server-rollouts", "--server", server.url]
        assert run_ranks([*arguments, "--out", tmp_path / "run"], tmp_path / "said") == [2, 2]
    (line,) = said(tmp_path / "said")
    assert "refuses /v1/completions: 400" in line


def test_every_sharded_model_shares_prompts_from_its_loading_on(llama, tmp_path, monkeypatch):
    """Asked for the first time inside a forward of FSDP, the student was taken for a model that cannot share them."""
    def checked(do):
        def checking(model, *arguments, **settings):
            assert grpo.shares_prompts(model) and isinstance(model, ranks.FSDPModule)
            return do(model, *arguments, **settings)

        return checking

    monkeypatch.setattr(grpo, "update", checked(grpo.update))
    monkeypatch.setattr(grpo, "rollout", checked(grpo.rollout))
    folder = llama["folder"] / "model"
    arguments = [*llama["arguments"], "--rows", "16", "--steps", "1", "--out", tmp_path / "run"]
    arguments += ["--shard", "--mode", "sft", "--init", folder, "--teacher", folder]
    arguments += ["--answers", "64"]  # so that a random judge orders some group without a fault
    assert run_ranks(arguments, tmp_path / "said") == [0, 0]
    assert not any("reads a prompt again" in path.read_text() for path in (tmp_path / "said").iterdir())


@pytest.mark.parametrize("wrong, line", [
    (["--model", "./nowhere"], "--model ./nowhere"), (["--repeats", "0"], "--repeats is 0"),
    (["--device", "abacus"], "--device abacus does not work"), (["--out", "DONE"], "already holds a run"),
])
def test_bad_input_is_said_once(llama, tmp_path, wrong, line):
    """Also where only rank 0 meets it, as with a folder that holds a run: the other rank then blamed its neighbour."""
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "args.json").write_text("{}")
    wrong = [str(tmp_path / "done") if word == "DONE" else word for word in wrong]
    arguments = [*llama["arguments"], "--out", tmp_path / "run", *wrong]
    assert run_ranks(arguments, tmp_path / "said") == [2, 2]
    assert len(said(tmp_path / "said")) == 1 and line in said(tmp_path / "said")[0]


@pytest.mark.parametrize("then, more", [(1, ["--shard"]), (1, []), (2, [])])
def test_a_killed_rank_ends_the_run_with_one_line_and_resume_goes_on(llama, tmp_path, then, more):
    """The other rank must not wait for ever. Afterwards as many ranks go on as there are."""
    arguments = [*llama["arguments"], *more, "--rows", "16", "--steps", "3", "--out", tmp_path / "run"]

    def die_in_the_second_step(rank):
        real, made = grpo.backward, []

        def backward(*a, **k):
            made.append(1)
            if rank == 1 and len(made) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*a, **k)

        grpo.backward = backward

    assert run_ranks(arguments, tmp_path / "said", die_in_the_second_step) == [2, -signal.SIGKILL]
    (line,) = said(tmp_path / "said")
    assert "another process of this run has ended" in line and "--resume goes on" in line
    if more:
        assert [path.parent.name for path in (tmp_path / "run" / "checkpoint").glob("*/.metadata")] == ["1"]
    else:
        assert torch.load(tmp_path / "run" / "checkpoint.pt")["step"] == 1
    assert run_ranks([*arguments, "--resume"], tmp_path / "again", count=then) == [0] * then
    assert [step["step"] for step in read_run(tmp_path / "run")[1]] == [1, 2, 3]


def test_torchrun_itself_and_a_rank_that_hangs_when_another_is_killed(llama, tmp_path):
    """The real command. Rank 1 sits in the sandbox or in a collective when torchrun ends it."""
    arguments = [*llama["arguments"], "--rows", "16", "--steps", "3000", "--out", str(tmp_path / "run")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.Popen([*command, ROOT / "dust.py", *arguments], stderr=subprocess.PIPE, text=True, env=environment)
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        for _ in range(600):
            if run.poll() is not None or (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
                break
            time.sleep(0.1)
        assert run.poll() is None and metrics.exists()
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        rank0 = next(pid for pid in children if b"RANK=0" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
        os.kill(int(rank0), signal.SIGKILL)
        _, errors = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode != 0 and "SIGKILL" in errors, errors  # torchrun says which rank ended, and how
