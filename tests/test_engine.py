"""The client of an inference server: what it sends and takes, what it does when a server fails, and runs through it."""
import contextlib
import copy
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import check_server
import dust
import grpo
from grpo import Sampling, importance_weights
from plumbing import engine, models
from plumbing.engine import Server, start_command
from plumbing.problems import BadInput, load_problems
from plumbing.runs import answers_of
from test_dust import error_of, run_dust
from server import TINY, ModelServer, load

torch.set_num_threads(1)
ENDS = [258]  # the shipped model's end of text
GREEDY, FREE = Sampling(0.0), Sampling(1.0)


@pytest.fixture(scope="module")
def tiny():
    model, tokenizer = load(TINY)
    problems = load_problems("micro-eval", limit=3)
    prompts = [dust.program_ids(tokenizer, problem, dust.Args()).tolist() for problem in problems]
    return model, tokenizer, prompts


def client(server: ModelServer, **changes) -> Server:
    """Return a client whose waiting is short."""
    fields = dict(url=server.url, command="COMMAND", eos_ids=ENDS, vocabulary=311, model="base", context=1024,
                  pauses=(0.05,) * 8)
    return Server(**fields | changes)


def connected(server: ModelServer, tiny, **changes) -> tuple:
    """Check a server as a run does, but for its weights; return the client and the server's answer."""
    _, tokenizer, prompts = tiny
    return client(server, **changes).check(prompts[0], 100, tokenizer.decode)


def check_weights(checked: Server, answer, tiny) -> float:
    """Compare the log-probs of a server's answer with those of the shipped model."""
    model, _, prompts = tiny
    (logps,) = grpo.answer_logprobs(model, torch.tensor(prompts[0]), [torch.tensor(answer.ids)])
    return checked.check_weights(answer, logps.tolist())


# ------------------------------------------------------------------------------------------------------ ids in and out


def test_answers_are_those_of_the_model_with_ids_log_probs_and_whether_they_ended(tiny):
    model, _, prompts = tiny
    seeds = [[11, 12], [21, 22], [31, 32]]
    ours = grpo.rollout(model, [torch.tensor(p) for p in prompts], seeds, max_new_tokens=60, eos_ids=ENDS)
    with ModelServer() as server:
        theirs = client(server).draw(prompts, seeds, FREE, 60)
    assert {answer.ended for answers in theirs for answer in answers} == {True, False}  # some were cut off
    for rollout, answers in zip(ours, theirs):
        assert [a.ids for a in answers] == [ids.tolist() for ids in rollout.answers]
        assert [a.ended for a in answers] == rollout.finished
        for answer, logps in zip(answers, rollout.logps):
            assert answer.logps == pytest.approx(logps.tolist(), abs=1e-4)


def test_each_field_of_sampling_is_given(tiny):
    """A server takes a field that is missing from the model's generation_config.json, for example a penalty."""
    with ModelServer() as server:
        client(server).draw([tiny[2][0]], [[5, 6, 7]], Sampling(0.6, 0.95, 20), 9)
        client(server).draw([tiny[2][0]], [[5]], FREE, 9)
    first, second = server.log
    assert first == dict(
        model="base", prompt=tiny[2][0], n=3, seed=5, max_tokens=9, min_tokens=0, temperature=0.6, top_p=0.95, top_k=20,
        min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, stop_token_ids=ENDS,
        ignore_eos=False, logprobs=0, return_token_ids=True, skip_special_tokens=False, stream=False)
    assert second == first | dict(n=1, temperature=1.0, top_p=1.0, top_k=-1)


def test_many_requests_at_a_time_but_no_more_than_asked_for(tiny):
    with ModelServer(slow=0.2) as server:
        answers = client(server, requests=6).draw([tiny[2][0]] * 12, [[i] for i in range(12)], FREE, 3)
        in_turn = client(server, requests=1).draw([tiny[2][0]] * 12, [[i] for i in range(12)], FREE, 3)
    assert 2 < server.most <= 6
    ids = [[a.ids for a in drawn] for drawn in answers]
    assert ids == [[a.ids for a in drawn] for drawn in in_turn]  # in the order of the prompts, each with its seed


def test_after_an_error_no_thread_begins_another_request():
    begun = []

    def do(item):
        begun.append(item)
        time.sleep(0.05)
        if item == 0:
            raise BadInput("the first one fails")

    with pytest.raises(BadInput):
        list(engine.at_once(do, list(range(100)), 4))
    time.sleep(0.5)
    assert len(begun) < 20


# ------------------------------------------------------------------------------------------------- servers that fail


@pytest.mark.parametrize("status", [500, 503, 429, "break"])
def test_a_request_that_fails_is_sent_again(status, tiny):
    with ModelServer() as server:
        expected = client(server).draw(tiny[2], [[1], [2], [3]], FREE, 8)
    with ModelServer(fault=lambda number, body, reply: status if number < 4 and not reply else None) as server:
        assert client(server).draw(tiny[2], [[1], [2], [3]], FREE, 8) == expected
    assert len(server.log) == 7


def test_an_answer_that_the_server_broke_off_is_drawn_again(tiny):
    def fault(number, body, reply):
        if reply and number == 0:
            reply["choices"][0]["finish_reason"] = "abort"

    with ModelServer(fault=fault) as server:
        client(server).draw([tiny[2][0]], [[1]], FREE, 8)
    assert len(server.log) == 2


def test_a_server_that_breaks_off_the_answer_of_its_check_is_one_line(tiny):
    def fault(number, body, reply):
        if reply and "choices" in reply:
            reply["choices"][0]["finish_reason"] = None

    with ModelServer(fault=fault) as server, pytest.raises(BadInput, match="an answer broke off: None"):
        connected(server, tiny)


def test_a_server_that_dies_and_comes_back_costs_only_time(tiny):
    said = []
    server = ModelServer(slow=0.05)
    with server:
        expected = client(server).draw(tiny[2] * 4, [[i] for i in range(12)], FREE, 8)
        waiting = client(server, requests=2, pauses=(0.1,) * 60, say=said.append)
        results = []
        thread = threading.Thread(target=lambda: results.extend(waiting.draw(tiny[2] * 4, [[i] for i in range(12)],
                                                                             FREE, 8)))
        thread.start()
        time.sleep(0.15)
    time.sleep(0.6)
    with server:
        thread.join(60)
    assert results == expected
    assert len(said) == 1 and "trying again" in said[0]


def test_a_server_that_stays_away_ends_in_one_line_with_the_remedy(tiny):
    with ModelServer() as server:
        pass
    with pytest.raises(BadInput) as caught:
        client(server, command="vllm serve X").draw(tiny[2], [[1]] * 3, FREE, 8)
    text = str(caught.value)
    assert text.startswith(f"--server {server.url} does not answer (") and "\n" not in text
    assert "vllm serve X" in text and "--resume" in text


def test_a_request_that_is_refused_is_not_sent_again_and_its_reason_is_shown(tiny):
    with ModelServer(fault=lambda number, body, reply: 400) as server:
        with pytest.raises(BadInput, match="refuses /v1/completions: 400 .*a fault of the test"):
            client(server).draw([tiny[2][0]], [[1]], FREE, 8)
    assert len(server.log) == 1


def test_a_server_that_asks_for_a_key_gets_it_and_without_it_the_variable_is_named(tiny, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    with ModelServer() as server:
        client(server).draw([tiny[2][0]], [[1]], FREE, 8)
    assert server.keys == {"Bearer secret"}
    with ModelServer(fault=lambda number, body, reply: 401) as server:
        with pytest.raises(BadInput, match="set the environment variable VLLM_API_KEY"):
            client(server).draw([tiny[2][0]], [[1]], FREE, 8)


def drop(*path):
    """Return a change of a choice that takes one of its fields away."""
    def change(choice):
        for name in path[:-1]:
            choice = choice[name]
        del choice[path[-1]]
    return change


def without_end(choice):
    if choice["finish_reason"] == "stop":
        choice["token_ids"].pop()
        choice["logprobs"]["token_logprobs"].pop()


CHANGES = {  # what a server may do to a choice -> what the error says
    "no ids": (drop("token_ids"), "without token ids and log-probs"),
    "no log-probs": (drop("logprobs"), "without token ids and log-probs"),
    "no echo": (drop("prompt_token_ids"), "without token ids and log-probs"),
    "another prompt": (lambda choice: choice["prompt_token_ids"].append(5), "it serves another model"),
    "unknown ids": (lambda choice: choice["token_ids"].__setitem__(0, 5000), "it serves another model"),
    "no end": (without_end, "leaves the end of text out"),
    "one log-prob too few": (lambda choice: choice["logprobs"]["token_logprobs"].pop(), "not as many log-probs"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_answers_of_another_form_end_the_run_with_one_line(kind, tiny):
    change, message = CHANGES[kind]
    with ModelServer(fault=lambda number, body, reply: reply and [change(c) for c in reply["choices"]][:0]) as server:
        with pytest.raises(BadInput, match=message) as caught:
            client(server).draw([tiny[2][1]], [[0, 1, 2, 3]], FREE, 100)
    assert "Start it like this: COMMAND" in str(caught.value) and len(server.log) == 1


def test_a_server_that_ignores_n_is_found_out(tiny):
    def fault(number, body, reply):
        if reply:
            del reply["choices"][1:]

    with ModelServer(fault=fault) as server:
        with pytest.raises(BadInput, match="gives 1 answers where 4 were asked for"):
            client(server).draw([tiny[2][0]], [[0, 1, 2, 3]], FREE, 8)


def test_a_place_that_is_no_such_server_is_one_line(tiny):
    """Another program may listen there, or the address may be wrong."""
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=answer_with_a_page, args=(listener,), daemon=True).start()
    page = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with ModelServer() as server:
        for place in (page, "http://no-such-host.invalid:80", "http://a:b", "http://"):
            with pytest.raises(BadInput, match="Start it like this: COMMAND"):
                connected(server, tiny, url=place)


def answer_with_a_page(listener):
    connection, _ = listener.accept()
    connection.recv(10000)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n<html>Hi</html>")


# ---------------------------------------------------------------------------------------- checks before work starts


def test_a_good_server_passes(tiny):
    with ModelServer() as server:
        checked, answer = connected(server, tiny)
    assert (checked.model, checked.context, len(checked.pauses)) == ("base", 1024, 8)
    assert check_weights(checked, answer, tiny) < 1e-4


def test_a_server_with_other_weights_is_refused(tiny, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(TINY)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight *= 0.5
    model.save_pretrained(tmp_path)
    tiny[1].save_pretrained(tmp_path)
    refused = pytest.raises(BadInput, match="it serves other weights. Start it like this: COMMAND")
    with ModelServer(tmp_path) as server, refused:
        check_weights(*connected(server, tiny), tiny)


def test_a_server_with_another_tokenizer_is_refused(tiny):
    def fault(number, body, reply):
        if reply:
            reply["choices"][0]["text"] = "words of another tokenizer"

    refused = pytest.raises(BadInput, match="another model. Start it like this: COMMAND")
    with ModelServer(fault=fault) as server, refused:
        connected(server, tiny)


def test_a_context_that_is_too_short_is_named_before_work_starts(tiny):
    with ModelServer(context=64) as server, pytest.raises(BadInput, match="context of 64 tokens, too short"):
        connected(server, tiny)


def test_the_check_does_not_wait_for_a_server_that_is_not_there(tiny):
    with ModelServer() as server:
        pass
    began = time.time()
    with pytest.raises(BadInput, match="does not answer") as caught:
        connected(server, tiny, pauses=(30,) * 5)
    assert time.time() - began < 5 and "--resume" not in str(caught.value)


@pytest.mark.parametrize("lora", [0, 4])
def test_the_script_that_checks_a_server_finds_that_all_is_well(lora, tmp_path, capsys):
    """No run calls it, so a change of dust.draw once broke it without a sign."""
    pytest.importorskip("peft") if lora else None
    with ModelServer() as server:
        options = [server.url, "--prompts", "4", "--max-new-tokens", "60", "--lora", str(lora), "--out", str(tmp_path)]
        assert check_server.main(options) == 0
    printed = capsys.readouterr().out
    assert printed.count("4 of 4 greedy answers are those of the model here") == 2
    assert "8 of 8 answers came again" in printed and ("adapter: " in printed) == bool(lora)


@pytest.mark.parametrize("given", ["host:8000", "http://host:8000", "http://host:8000/", "http://host:8000/v1/"])
def test_an_address_may_be_written_in_each_usual_form(given):
    assert engine.base_url(given) == "http://host:8000"
    assert engine.base_url("https://a.b/c/v1") == "https://a.b/c"


def test_the_command_names_what_the_run_needs():
    plain, lora = start_command("runs/a/model", 4096, "float32"), start_command("a/b", 9, lora=12)
    assert plain.startswith("vllm serve runs/a/model --max-model-len 4096 --dtype float32") and "lora" not in plain
    assert lora.startswith("VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve a/b")
    assert lora.endswith("--enable-lora --max-lora-rank 16")


# ------------------------------------------------------------------------------------------------------------- Ctrl-C


def allow_ctrl_c() -> None:
    """A job in the background starts without it, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_ends_at_once_while_answers_are_being_drawn(tiny):
    """A pool of threads waits at the end of the process for its requests, here for a minute."""
    with ModelServer(slow=60) as server:
        code = ("from plumbing.engine import Server\n"
                f"server = Server({server.url!r}, '', [258], 311, model='base')\n"
                "print('go', flush=True)\n"
                "server.draw([[1, 2]] * 8, [[1]] * 8, (1.0, 1.0, 0), 4)")
        child = subprocess.Popen([sys.executable, "-c", code], cwd=TINY.parent.parent, stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE, preexec_fn=allow_ctrl_c)
        child.stdout.readline()
        time.sleep(0.5)
        began = time.time()
        os.kill(child.pid, signal.SIGINT)
        _, errors = child.communicate(timeout=30)
    assert time.time() - began < 3 and b"KeyboardInterrupt" in errors


# ----------------------------------------------------------------------------------------------------- a whole run


def eval_texts(out, name="base-samples.jsonl"):
    return sorted((out / name).read_text().splitlines())


SMALL_RUN = ["--eval-limit", "6", "--repeats", "1", "--workers", "2", "--max-new-tokens", "60"]
SMALL_TRAINING = [*SMALL_RUN, "--limit", "8", "--candidates", "8", "--steps", "2", "--batch", "2", "--answers", "3",
                  "--mini-batch", "2", "--max-new-tokens", "110"]


def test_eval_only_through_a_server_needs_no_weights_here(tmp_path, monkeypatch, capsys):
    """A laptop can drive a server. The greedy answers are those of a run without one."""
    options = [*SMALL_RUN, "--eval-only", "--eval-temperature", "0", "--max-new-tokens", "110"]
    assert run_dust(*options, "--out", tmp_path / "here") == 0
    with ModelServer() as server:
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
        assert run_dust(*options, "--server", server.url, "--out", tmp_path / "there") == 0
    assert eval_texts(tmp_path / "here") == eval_texts(tmp_path / "there")
    assert eval_texts(tmp_path / "here", "base-rankings.jsonl") == eval_texts(tmp_path / "there", "base-rankings.jsonl")
    assert f"  server   base at {server.url}, context 1024\n" in capsys.readouterr().out


def test_a_run_through_a_server_trains_here_and_says_where_the_trained_model_answers(tmp_path, capsys):
    with ModelServer() as server:
        assert run_dust(*SMALL_TRAINING, "--server", server.url, "--out", tmp_path / "run") == 0
    printed = capsys.readouterr().out
    assert "of the trained model are drawn in this process" in printed.split("sample ")[0]
    assert {body["model"] for body in server.log} == {"base"}
    counts = Counter(body["n"] for body in server.log)
    assert counts[8] == 8 and counts[4] == 6  # candidates, and programs of the base's evaluation
    assert len((tmp_path / "run" / "samples.jsonl").read_text().splitlines()) == 8


def test_with_lora_the_server_draws_for_the_trained_model_too_and_for_training(tmp_path):
    """Each step's adapter has a name of its own: the server keeps a prompt's keys by the adapter's name."""
    pytest.importorskip("peft")
    out = tmp_path / "run"
    with ModelServer() as server:
        assert run_dust(*SMALL_TRAINING, "--lora", "4", "--lr", "1e-3", "--server-rollouts", "--server", server.url,
                        "--out", out) == 0
    names = list(dict.fromkeys(body["model"] for body in server.log))
    assert names[0] == "base" and len(names) > 2  # a step of equal rewards changes nothing, nor the name
    assert list(server.models) == names[-1:]  # those of the past are unloaded
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert any(step["tokens"] for step in steps)
    for step in steps:  # the server's weights are this step's: rounding is all that is between the two
        assert step["rollout_gap"] < 1e-4 and step["is_cut"] == 0
        assert step["is_weight"] == pytest.approx(1, abs=1e-4) or not step["tokens"]
    assert (out / "adapter" / "adapter_config.json").exists() and (out / "model" / "config.json").exists()


def test_a_saved_adapter_is_the_trained_model(tmp_path):
    """peft reads the adapter, on the model that training started from, as the merged model that is saved beside it.

    The names of the weights are those that peft itself writes: peft takes others too, vLLM does not.
    """
    peft = pytest.importorskip("peft")
    out = tmp_path / "run"
    assert run_dust(*SMALL_TRAINING, "--lora", "4", "--lr", "1e-2", "--out", out) == 0
    ids = torch.arange(20)[None]
    merged = AutoModelForCausalLM.from_pretrained(out / "model")
    base = AutoModelForCausalLM.from_pretrained(TINY)
    before = base(ids).logits
    adapted = peft.PeftModel.from_pretrained(base, out / "adapter")
    assert torch.allclose(adapted(ids).logits, merged(ids).logits, atol=1e-4)
    assert not torch.allclose(before, merged(ids).logits, atol=1e-2)
    adapted.save_pretrained(tmp_path / "peft")
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (out / "adapter", tmp_path / "peft"))
    assert ours.keys() == theirs.keys()


def test_a_server_that_was_started_again_gets_its_adapter_again(tiny, tmp_path):
    pytest.importorskip("peft")
    model, _ = models.load_model(str(TINY), optimizer="fp32", shard=False, device="cpu")
    models.add_lora(model, 4, 0)
    number = models.save_adapter(tmp_path, model)
    server = ModelServer()
    with server:
        adapted = client(server).with_adapter(str(tmp_path), f"dust-1-{number}", "dust-1-")
        first = adapted.draw(tiny[2], [[1]] * 3, FREE, 8)
    server.models.clear()
    with server:
        assert adapted.draw(tiny[2], [[1]] * 3, FREE, 8) == first


def test_a_server_without_adapters_is_named_before_hours_of_training(tmp_path, capsys):
    pytest.importorskip("peft")
    with ModelServer(adapters=False) as server:
        error = error_of(capsys, *SMALL_TRAINING, "--lora", "4", "--server", server.url, "--out", tmp_path / "run")
    assert "--enable-lora --max-lora-rank 8" in error and "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True" in error
    assert not (tmp_path / "run" / "samples.jsonl").exists()


def test_a_killed_run_keeps_each_answer_that_came_and_resume_asks_for_the_others_only(tmp_path):
    options = [*SMALL_RUN, "--eval-only", "--server-requests", "2", "--out", str(tmp_path / "run")]
    with ModelServer(slow=0.3) as server:
        command = [sys.executable, "dust.py", *options, "--server", server.url]
        child = subprocess.Popen(command, cwd=TINY.parent.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        file = tmp_path / "run" / "base-samples.jsonl"
        while child.poll() is None and (not file.exists() or file.read_text().count("\n") < 2):
            time.sleep(0.02)
        child.kill()
        child.wait()
        kept = file.read_text().splitlines() if file.exists() else []
        assert 2 <= len(kept) < 6
    with ModelServer() as other:  # the address may change
        assert run_dust(*options, "--server", other.url, "--resume") == 0
    assert file.read_text().splitlines()[: len(kept)] == kept
    asked = Counter(body["n"] for body in other.log)[4]
    assert asked == 6 - len(kept)


def test_ctrl_c_ends_a_run_at_once_with_its_exit_code(tmp_path):
    def wait(number, body, reply):
        if number > 1 and reply is None:  # the first two are the check's
            server.closing.wait(60)

    with ModelServer(fault=wait) as server:
        options = [*SMALL_RUN, "--eval-only", "--server", server.url, "--out", str(tmp_path / "run")]
        command = [sys.executable, "dust.py", *options]
        child = subprocess.Popen(command, cwd=TINY.parent.parent, stdout=subprocess.DEVNULL,
                                 stderr=subprocess.PIPE, text=True, preexec_fn=allow_ctrl_c)
        while child.poll() is None and len(server.log) < 3:
            time.sleep(0.02)
        time.sleep(0.5)
        began = time.time()
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
    assert child.returncode == 130 and "--resume" in errors and "Traceback" not in errors
    assert time.time() - began < 8


def test_a_server_that_stays_away_ends_a_run_in_one_line(tmp_path, capsys):
    error = error_of(capsys, *SMALL_RUN, "--eval-only", "--server", "localhost:9", "--out", tmp_path / "run")
    assert error.startswith("dust: --server http://localhost:9 does not answer") and "vllm serve" in error
    assert not (tmp_path / "run").exists()


def test_a_server_that_goes_away_ends_a_run_in_one_line_and_resume_goes_on(tmp_path, capsys, monkeypatch):
    """After ten minutes of tries. The answers that came are kept, and the server gets only the other questions again."""
    monkeypatch.setattr(engine, "time", SimpleNamespace(time=time.time, sleep=lambda seconds: time.sleep(0.01)))
    options = [*SMALL_RUN, "--eval-only", "--server-requests", "2", "--out", tmp_path / "run"]
    with ModelServer(fault=lambda number, body, reply: 503 if number > 5 else None) as server:
        error = error_of(capsys, *options, "--server", server.url)
    assert error.startswith(f"dust: --server {server.url} does not answer (503") and "--resume goes on" in error
    kept = eval_texts(tmp_path / "run")
    assert len(kept) == 4  # the first two requests are the check's
    with ModelServer() as server:
        assert run_dust(*options, "--server", server.url, "--resume") == 0
    assert Counter(body["n"] for body in server.log)[4] == 2
    assert set(kept) < set(eval_texts(tmp_path / "run"))


@pytest.mark.parametrize("options, message", [
    (["--server-rollouts", "--server", "a:1"], "--server-rollouts needs --server and --lora"),
    (["--server-rollouts", "--lora", "4"], "--server-rollouts needs --server and --lora"),
    (["--server-rollouts", "--lora", "4", "--server", "a:1", "--mode", "sft"], "does not work with --mode sft"),
    (["--programs", "x.jsonl", "--mode", "generate"], "--programs works only with --mode rank or sft"),
    (["--programs", "x.jsonl", "--eval-only"], "--programs works only with --mode rank or sft"),
])
def test_options_that_do_not_go_together_are_named(options, message, capsys):
    assert message in error_of(capsys, *options)


# ---------------------------------------------------------------------------------------- how long will it take

HERE, SERVED = 506, 7224  # tokens a second, as the tutorial says whose they are


def hours(answers: dict, by_server: tuple, length: int) -> str:
    """Return the hours in which the answers of a run are drawn. by_server: the stages that a server draws."""
    seconds = sum(count * length / (SERVED if stage in by_server else HERE) for stage, count in answers.items())
    return f"{seconds / 3600:,.0f} h"


@pytest.mark.parametrize("preset, by_server", [("quick", ("candidates", "base", "curve", "trained")),
                                               ("paper", ("candidates", "base"))])
def test_the_table_of_hours_is_what_the_presets_ask_for(preset, by_server):
    """by_server: the stages that a server draws without --server-rollouts; quick has --lora."""
    args = dust.Args(**dust.PRESETS[preset])
    answers = answers_of(args, args.limit or 10_000, 131, dust.CURVE_PROBLEMS, mixed=37 / 160)
    length = args.max_new_tokens // 2
    cells = [f"`{preset}`", f"{answers['candidates']:,}", f"{answers['training']:,}",
             f"{answers['base'] + answers['curve'] + answers['trained']:,}", f"{sum(answers.values()) * length / 1e6:,.0f} million",
             *[hours(answers, stages, length) for stages in ((), by_server, tuple(answers))]]
    tutorial = (TINY.parent.parent / "tutorial.md").read_text(encoding="utf-8")
    assert f"| {' | '.join(cells)} |" in tutorial
    assert f"{HERE} tokens a second" in tutorial and f"{SERVED:,}" in tutorial and f"{length:,}" in tutorial


def write_programs_in_turn(number, body, reply) -> None:
    """Make every answer a program: a right one, a wrong one, and so on."""
    right, wrong = 3, 5  # print(1) and print(2) of the model in conftest.py, whose end of text is 2
    for choice in reply["choices"] if reply and number > 1 else ():
        choice["token_ids"], choice["finish_reason"] = [wrong if choice["index"] % 2 else right, 2], "stop"
        choice["logprobs"] = {"token_logprobs": [-1.0, -1.0]}


def test_the_answers_that_a_run_draws_are_as_many_as_were_counted(llama, tmp_path, capsys):
    """Here each answer holds a program, so all groups are ranked. The server draws for all stages, and counts too."""
    pytest.importorskip("peft")
    options = [*llama["arguments"], "--repeats", "2", "--lora", "4", "--server-rollouts", "--eval-every", "1", "--out", tmp_path / "run"]
    with ModelServer(llama["folder"] / "model", context=512, fault=write_programs_in_turn) as server:
        with pytest.warns():  # the log-probs that the fault gives are far from ours
            assert run_dust(*options, "--server", server.url) == 0
    args = dust.parse_args([str(option) for option in [*options, "--server", server.url]])
    counted = answers_of(args, 8, 6, dust.CURVE_PROBLEMS)
    assert sum(body["n"] for body in server.log[2:]) == sum(counted.values())  # the first two are the check's
    total = counted["base"] + counted["curve"] + counted["trained"]
    assert f"with rankings and curve {total} answers" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ importance weights


def test_importance_weights_give_the_gradient_of_our_own_distribution():
    """The mean over what another program draws, each draw with its weight, is the mean over what we draw."""
    torch.manual_seed(0)
    ours, theirs = torch.randn(50, requires_grad=True), torch.randn(50)
    logp, sampled_logp, values = ours.log_softmax(-1), theirs.log_softmax(-1), torch.randn(50)
    weights, cut = importance_weights(logp, sampled_logp, 1e9)
    assert not weights.requires_grad and not cut.any()
    corrected = (sampled_logp.exp() * weights * values).sum()
    assert torch.allclose(corrected, (logp.exp() * values).sum(), atol=1e-5)
    assert not torch.allclose((sampled_logp.exp() * values).sum(), corrected, atol=1e-2)


def test_importance_weights_are_cut_upwards_only_and_the_cut_ones_are_marked():
    weights, cut = importance_weights(torch.tensor([0.0, -1.0, -1.0, 0.0]), torch.tensor([0.0, -3.0, -1.5, -9.0]), 2.0)
    assert weights.tolist() == pytest.approx([1.0, 2.0, math.exp(0.5), 2.0]) and cut.tolist() == [0, 1, 0, 1]
    assert importance_weights(torch.tensor([-5.0]), torch.tensor([0.0]), 2.0)[0].item() == pytest.approx(math.exp(-5))


@pytest.mark.parametrize("limit, factor, cut", [(4.0, 2.0, 0.0), (1.5, 1.5, 1.0)])
def test_the_update_weighs_each_token_and_says_how_much(limit, factor, cut, tiny):
    """A server whose log-probs are all lower by log 2 gets weights of 2: the gradient doubles."""
    model, _, prompts = tiny
    torch.manual_seed(0)
    rollouts = grpo.rollout(model, [torch.tensor(prompts[0])], [[1, 2, 3]], max_new_tokens=9, eos_ids=ENDS)
    rollouts[0].rewards = torch.tensor([1.0, 0.0, 0.5])
    settings = dict(mini_batch=1, kl=0.0, is_clip=limit)
    plain = one_update(model, rollouts, **settings, server_rollouts=False)
    rollouts[0].logps = [logps - math.log(2) for logps in rollouts[0].logps]
    weighted = one_update(model, rollouts, **settings, server_rollouts=True)
    assert weighted["grad_norm"] == pytest.approx(factor * plain["grad_norm"], rel=1e-3)
    assert (weighted["is_weight"], weighted["is_cut"]) == pytest.approx((factor, cut), abs=1e-4)
    assert "is_weight" not in plain


def test_the_weight_of_each_token_is_its_own(tiny):
    """One weight for all tokens, their mean, would also double the gradient of the test above."""
    model, _, prompts = tiny
    torch.manual_seed(0)
    [rollout] = grpo.rollout(model, [torch.tensor(prompts[0])], [[1, 2, 3]], max_new_tokens=9, eos_ids=ENDS)
    rollout.rewards = torch.tensor([1.0, 0.0, 0.5])
    factors, by_hand = [0.5 + torch.rand(len(logps)) for logps in rollout.logps], copy.deepcopy(model)
    logps = grpo.answer_logprobs(by_hand, rollout.prompt, rollout.answers)
    terms = zip(grpo.group_advantages(rollout.rewards), factors, logps)
    (-sum((advantage * factor * logp).mean() for advantage, factor, logp in terms) / 3).backward()
    norm = torch.cat([p.grad.flatten() for p in by_hand.parameters()]).norm()
    rollout.logps = [logps - factor.log() for logps, factor in zip(rollout.logps, factors)]
    weighted = one_update(model, [rollout], mini_batch=1, kl=0.0, is_clip=4.0, server_rollouts=True)
    assert weighted["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)


def one_update(model, rollouts, **settings) -> dict:
    changed = copy.deepcopy(model)
    with pytest.warns() if settings["server_rollouts"] else contextlib.nullcontext():  # the distance is large
        return grpo.update(changed, torch.optim.SGD(changed.parameters(), lr=0.0), rollouts, dust.Args(**settings))


# ------------------------------------------------------------------------------------------ candidates from elsewhere


def test_the_candidates_of_a_run_serve_another_one(llama, tmp_path):
    """The same groups, and so the same training, without sampling."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert run_dust(*llama["arguments"], "--out", first) == 0
    assert run_dust(*llama["arguments"], "--out", second, "--programs", first / "candidates.jsonl") == 0
    assert not (second / "samples.jsonl").exists()
    assert (first / "candidates.jsonl").read_text() == (second / "candidates.jsonl").read_text()
    one, other = (json.loads((out / "report.json").read_text()) for out in (first, second))
    assert one["rows"] == other["rows"]


def write_programs(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_candidates_for_unknown_problems_and_problems_without_candidates_are_counted(llama, tmp_path, capsys):
    codes = ["print(1)", "print(2)", "print(1)", "print(3)"] * 2
    records = [{"problem_id": "p1", "code": code} for code in codes] + [{"problem_id": "elsewhere", "code": "1"}] * 3
    records += [{"problem_id": "p2", "answer": f"```python\n{code}\n```"} for code in codes]
    file = write_programs(tmp_path / "programs.jsonl", records)
    assert run_dust(*llama["arguments"], "--steps", 1, "--out", tmp_path / "run", "--programs", file) == 0
    assert "16 programs for 2 of 8 problems; 3 more are for problems that are not trained on" in capsys.readouterr().out
    kept = [json.loads(line) for line in (tmp_path / "run" / "candidates.jsonl").read_text().splitlines()]
    assert [c["code"].strip() for c in kept] == codes * 2
    assert Counter(c["correct"] for c in kept) == {True: 8, False: 8}


@pytest.mark.parametrize("records, message", [
    ([], "0 programs for 0 of 8 problems"),
    ([{"problem_id": "elsewhere", "code": "1"}], "0 programs for 0 of 8 problems; 1 more are for problems that"),
    ([{"problem_id": "p1", "code": "1"}, {"problem_id": 1.5, "code": "1"}], 'line 2: a record needs "problem_id"'),
    ([{"problem_id": "p1", "code": ["1"]}], 'line 1: a record needs "problem_id"'),
    (["p1"], 'line 1: a record needs "problem_id"'),
    ([{"problem_id": "p1", "code": "1"}, {"problem_id": "p1"}], 'line 2: a record needs "problem_id"'),
    ([{"problem_id": "p1", "answer": "", "code": None}] * 2, "no program is correct (2 of 2 answers hold no program)"),
])
def test_a_file_of_programs_that_cannot_be_used_is_one_line(records, message, llama, tmp_path, capsys):
    file = write_programs(tmp_path / "programs.jsonl", records)
    assert message in error_of(capsys, *llama["arguments"], "--out", tmp_path / "run", "--programs", file)
