"""A client of an inference server, vLLM's, which draws answers on one GPU, on eight, or on many machines.

Token ids go out and come back, so that the template, the tokens and the reading of answers stay ours. Each request
gives every sampling field: a server takes what is missing from the model's generation_config.json. The server's key, if
it asks for one, is read from the environment variable VLLM_API_KEY.
"""
import contextlib
import http.client
import json
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple
from urllib.parse import urlsplit

from plumbing.problems import BadInput, first_line

PAUSES = (1, 2, 4, 8, 16, *[30] * 19)  # seconds between the tries of one request, ten minutes in all
LONGEST = 24 * 3600  # seconds that one request may take: 40 answers of 32768 tokens may wait long for their turn
PROBE = 16  # tokens of the answers that check a server
FAR = 0.05  # nats a token between log-probs: more than rounding explains
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes
BROKEN = (OSError, http.client.HTTPException, ValueError)  # no connection, or a reply that ends in the middle


class Answer(NamedTuple):
    """One answer as the server drew it."""

    ids: list[int]  # R token ids, the end of text included
    logps: list[float]  # R log-probs, a token each
    ended: bool  # False: cut off at max_tokens


def base_url(given: str) -> str:
    """Return a server's address as requests begin with it. Given may be without http://, or end in /v1."""
    address = given if "://" in given else f"http://{given}"
    return address.rstrip("/").removesuffix("/v1")


def start_command(folder: str, context: int, dtype: str = "auto", lora: int = 0) -> str:
    """Return the command line that starts a server for a model folder. lora: the rank of the adapters; 0: none."""
    command = (f"vllm serve {folder} --max-model-len {context} --dtype {dtype} --generation-config vllm "
               "--logprobs-mode processed_logprobs")
    if not lora:
        return command
    allowed = min((rank for rank in LORA_RANKS if rank >= lora), default=lora)
    return f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True {command} --enable-lora --max-lora-rank {allowed}"


def at_once(do: Callable, items: list, count: int) -> Iterator[tuple[int, object]]:
    """Call do(item) in `count` threads. Yield (place of the item, result) as they come; raise the first error.

    The threads are daemons, so after an error or Ctrl-C the process ends without waiting for their requests.
    """
    places, results = iter(range(len(items))), queue.SimpleQueue()

    def work():
        for place in places:  # one iterator for all threads: each place is taken once
            try:
                results.put((place, do(items[place]), None))
            except BaseException as error:
                results.put((place, None, error))

    for _ in range(min(count, len(items))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in items:
            place, result, error = results.get()
            if error:
                raise error
            yield place, result
    finally:
        list(places)  # takes the places that are left, so that no thread begins another item


@dataclass(frozen=True)
class Server:
    """A server, and what a request needs to know. It stands where a model stands in stages that only draw answers."""

    url: str
    command: str  # that starts such a server, for error messages
    eos_ids: list[int]
    vocabulary: int  # token ids are below this
    requests: int = 64  # at a time
    model: str = ""  # the name in requests: the model's, or an adapter's
    context: int = 0  # most tokens of a prompt and its answer
    adapter: str = ""  # folder of the adapter, as the server sees it
    say: Callable[[str], None] = print
    pauses: tuple = PAUSES
    complaints: list = field(default_factory=lambda: [0.0])  # when the server was said to be away

    def draw(self, prompts: list[list[int]], seeds: list[list[int]], sampling: tuple, longest: int) -> list:
        """Return a list of Answers for each prompt, one for each of its seeds. All of this may run in a thread.

        sampling: temperature, top_p (1: all), top_k (0: all). longest: most tokens of an answer. A prompt is one
        request with the first of its seeds; the server numbers the others from there.
        """
        def ask(asked: tuple) -> list[Answer]:
            prompt, its_seeds = asked
            request = self.request(prompt, len(its_seeds), its_seeds[0], sampling, longest)
            return self.ask("/v1/completions", request, lambda reply: self.read(reply, prompt, len(its_seeds)))

        return [answers for _, answers in sorted(at_once(ask, list(zip(prompts, seeds)), self.requests))]

    def request(self, prompt: list[int], count: int, seed: int, sampling: tuple, longest: int) -> dict:
        """Return the body of a request: `count` answers to one prompt."""
        temperature, top_p, top_k = sampling
        longest = min(longest, self.context - len(prompt)) if self.context else longest
        return {
            "model": self.model, "prompt": prompt, "n": count, "seed": seed, "max_tokens": longest, "min_tokens": 0,
            "temperature": temperature, "top_p": top_p, "top_k": top_k or -1, "min_p": 0.0, "repetition_penalty": 1.0,
            "presence_penalty": 0.0, "frequency_penalty": 0.0, "stop_token_ids": self.eos_ids, "ignore_eos": False,
            "logprobs": 0, "return_token_ids": True, "skip_special_tokens": False, "stream": False,
        }

    def read(self, reply: dict, prompt: list[int], count: int) -> list[Answer]:
        """Return the Answers of a reply. Raises BadInput where they are not what was asked for.

        Raises ConnectionError for an answer that broke off, which is asked for again.
        """
        try:
            choices = sorted(reply["choices"], key=lambda choice: choice["index"])
            echoed = choices[0]["prompt_token_ids"]
            reasons = [choice["finish_reason"] for choice in choices]
            answers = [Answer(choice["token_ids"], choice["logprobs"]["token_logprobs"], reason == "stop")
                       for choice, reason in zip(choices, reasons)]
            sizes_match = all(len(answer.ids) == len(answer.logps) > 0 for answer in answers)
            known = all(0 <= token < self.vocabulary for answer in answers for token in answer.ids)
            ends = all(answer.ids[-1] in self.eos_ids for answer in answers if answer.ended)
        except (LookupError, TypeError):
            raise self.bad("answers without token ids and log-probs: a server of text only cannot be used") from None
        if not {"stop", "length"}.issuperset(reasons):
            raise ConnectionError(f"an answer broke off: {', '.join(map(str, reasons))}")
        for fault, found in {
            f"gives {len(choices)} answers where {count} were asked for": len(choices) != count,
            "read other token ids than were sent: it serves another model": echoed != prompt,
            "gives token ids that --model does not have: it serves another model": not known,
            "leaves the end of text out of its answers": not ends,
            "gives not as many log-probs as tokens": not sizes_match,
        }.items():
            if found:
                raise self.bad(fault)
        return answers

    def check(self, prompt: list[int], longest: int, text_of: Callable) -> tuple["Server", Answer]:
        """Return this server with its model's name and context, and its greedy answer to a prompt. Raises BadInput.

        text_of: token ids -> their text, by which another tokenizer is found out. longest: tokens of an answer at most.
        """
        once = replace(self, pauses=())
        try:
            served = next(entry for entry in once.ask("/v1/models")["data"] if not entry.get("parent"))
            once = replace(once, model=served["id"], context=served["max_model_len"])
        except (LookupError, TypeError, StopIteration):
            raise self.bad("is not vLLM's: it does not say which model it serves, with which context") from None
        if once.context < len(prompt) + max(longest, PROBE):
            raise self.bad(f"has a context of {once.context} tokens, too short for a prompt of {len(prompt)} tokens "
                           f"with an answer of {longest}: use a smaller --max-new-tokens, or a larger --max-model-len")
        greedy = once.request(prompt, 1, 0, (0.0, 1.0, 0), PROBE)
        reply, (answer,) = once.ask("/v1/completions", greedy, lambda reply: (reply, once.read(reply, prompt, 1)))
        once.draw([prompt], [[0, 0]], (1.0, 1.0, 0), PROBE)  # a server may ignore that two answers are asked for
        theirs = reply["choices"][0]["text"]
        ours = text_of(answer.ids[: len(answer.ids) - answer.ended])
        if "".join(ours.split()).strip("\ufffd") != "".join(theirs.split()).strip("\ufffd"):
            raise self.bad(f"reads its tokens as {theirs!r}, and --model as {ours!r}: it serves another model")
        return replace(once, pauses=self.pauses), answer

    def check_weights(self, answer: Answer, logps: list[float]) -> float:
        """Return how far an answer's log-probs are from our own [R], in nats a token. Raises BadInput if too far."""
        gap = sum(abs(ours - theirs) for ours, theirs in zip(logps, answer.logps)) / len(logps)
        if not gap < FAR:  # not a number is too far as well
            raise self.bad(f"gives log-probs that are off by {gap:.2g} nats a token: it serves other weights")
        return gap

    def with_adapter(self, folder: str, name: str, past: str) -> "Server":
        """Return the server with an adapter in PEFT's format, loaded under a name of its own. Raises BadInput.

        folder: as the server sees it. past: what the names of this run's adapters begin with; others are unloaded. The
        server keeps the keys of prompts by the adapter's name, so other weights need another name.
        """
        loaded = [entry["id"] for entry in self.ask("/v1/models")["data"]]
        for stale in loaded:
            if stale.startswith(past) and stale != name:
                self.ask("/v1/unload_lora_adapter", {"lora_name": stale})
        server = replace(self, model=name, adapter=folder)
        if name not in loaded:
            server.load_adapter()
        return server

    def load_adapter(self) -> None:
        """Let the server load this adapter. Another thread may have done so already."""
        try:
            body = {"lora_name": self.model, "lora_path": self.adapter}
            replace(self, adapter="").ask("/v1/load_lora_adapter", body)
        except BadInput as error:
            if "already" not in str(error):
                raise BadInput(f"{error}. The server has to see {self.adapter} (--server-adapters)") from None

    def ask(self, path: str, body: dict | None = None, read: Callable | None = None):
        """Return read(reply) of one request; try again after a pause while the server is away. Raises BadInput."""
        for tries, pause in enumerate((*self.pauses, None), 1):
            try:
                reply = self.call(path, body)
                return read(reply) if read else reply
            except BROKEN as error:
                reason = first_line(error)
            if pause is None:
                break
            if tries > 2 and time.time() - self.complaints[-1] > sum(self.pauses):  # once for all threads
                self.complaints.append(time.time())
                self.say(f"--server {self.url} does not answer ({reason}); trying again for some minutes")
            time.sleep(pause)
        go_on = "; then the same command with --resume goes on" if self.pauses else ""
        raise BadInput(f"--server {self.url} does not answer ({reason}). Start it like this: {self.command}{go_on}")

    def call(self, path: str, body: dict | None):
        """Send one request and return the reply. Raises one of BROKEN for what may pass, else BadInput."""
        address = urlsplit(self.url)
        kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
        connection = kind(address.hostname or "", address.port, timeout=30)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('VLLM_API_KEY', '')}"}
        with contextlib.closing(connection):
            connection.connect()
            connection.sock.settimeout(LONGEST)
            # a machine that has gone is noticed, and a firewall does not forget a connection that waits long
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if hasattr(socket, "TCP_KEEPIDLE"):
                connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
            connection.request("POST" if body else "GET", address.path + path, body and json.dumps(body), headers)
            reply = connection.getresponse()
            text = reply.read().decode()
        said = " ".join(text.split())[:300]
        if reply.status == 429 or reply.status >= 500:
            raise ConnectionError(f"{reply.status} {said}")
        if reply.status == 404 and self.adapter:  # a server that was started again has lost it
            self.load_adapter()
            raise ConnectionError("its adapter was lost")
        if reply.status == 401:
            raise BadInput(f"--server {self.url} asks for a key: set the environment variable VLLM_API_KEY")
        if reply.status != 200:
            raise self.bad(f"refuses {path}: {reply.status} {said}")
        return json.loads(text) if text.startswith("{") else text

    def bad(self, fault: str) -> BadInput:
        """Return the error that names a fault of the server and the remedy."""
        return BadInput(f"--server {self.url} {fault}. Start it like this: {self.command}")
