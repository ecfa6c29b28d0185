"""A small server with a model behind it that answers as vLLM's does, and faults that a test can choose.

vLLM's replies, as seen with version 0.32: answers come with their token ids and log-probs; answer i of a request has
the seed + i; a reply to a request about adapters is plain text.
"""
import functools
import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import grpo
from grpo import Sampling

TINY = Path(grpo.__file__).resolve().parent / "data" / "tiny"


@functools.cache
def load(folder) -> tuple:
    """Return (model, tokenizer) of a folder, loaded once for all tests."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    grpo.enable_sharing(model)
    return model, AutoTokenizer.from_pretrained(folder)


class ModelServer:
    """A server on a free port of this machine, for a `with`.

    fault: called with (number of the request to /v1/completions, from 0; its body; the reply or None). Before the model
    answers, the reply is None, and the fault may return a status such as 500, or "break" (the connection closes in the
    middle of the reply). After it, the fault may change the reply. slow: seconds that every answer takes at least.
    log: the bodies of all completions. keys: what the requests name as the server's key. most: the largest number of requests that it had at a time.
    """

    def __init__(self, folder=TINY, fault: Callable | None = None, context=1024, adapters=True, slow=0.0):
        self.model, self.tokenizer = load(folder)
        self.folder, self.fault, self.context, self.adapters, self.slow = folder, fault, context, adapters, slow
        self.log, self.keys, self.models, self.port, self.now, self.most = [], set(), {}, 0, 0, 0
        self.lock, self.closing = threading.Lock(), threading.Event()

    def __enter__(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.reply(self, *outer.list_models())

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.keys.add(self.headers["Authorization"])
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                answer = outer.answer(self.path, body)
                with outer.lock:
                    outer.now -= 1
                outer.reply(self, *answer)

            def log_message(self, *_):
                pass

        class Listener(ThreadingHTTPServer):
            request_queue_size = 128
            daemon_threads = False  # __exit__ waits for them: a thread inside torch may not outlive the process
            handle_error = lambda *_: None  # noqa: E731  a client that has gone is no error here

        self.closing.clear()
        self.listener = Listener(("127.0.0.1", self.port), Handler)
        self.port = self.listener.server_port  # the same one when it is started again
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.listener.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.listener.shutdown()
        self.listener.server_close()

    def reply(self, handler, status, body) -> None:
        text = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        broken = status == "break"
        handler.send_response(200 if broken else status)
        handler.send_header("Content-Length", str(len(text)))
        handler.end_headers()
        handler.wfile.write(text[: len(text) // 2] if broken else text)
        if broken:
            handler.wfile.flush()
            handler.connection.shutdown(socket.SHUT_RDWR)

    def list_models(self) -> tuple:
        base = {"id": "base", "max_model_len": self.context, "parent": None}
        return 200, {"data": [base] + [{"id": name, "parent": "base"} for name in self.models]}

    def answer(self, path: str, body: dict) -> tuple:
        """Return (status, reply) to a request."""
        if path == "/v1/completions":
            return self.complete(body)
        with self.lock:  # loading a model changes torch for all threads
            return self.change_adapters(path, body)

    def change_adapters(self, path: str, body: dict) -> tuple:
        if not self.adapters or path not in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            return 404, {"detail": "Not Found"}
        name = body["lora_name"]
        if path == "/v1/unload_lora_adapter":
            del self.models[name]
        elif name in self.models:
            return 400, {"error": {"message": f"The lora adapter '{name}' has already been loaded."}}
        else:
            from peft import PeftModel

            base = AutoModelForCausalLM.from_pretrained(self.folder)
            merged = PeftModel.from_pretrained(base, body["lora_path"]).merge_and_unload()
            grpo.enable_sharing(merged)
            self.models[name] = merged
        return 200, "Success"

    def complete(self, body: dict) -> tuple:
        with self.lock:
            number = len(self.log)
            self.log.append(body)
        status = self.fault(number, body, None) if self.fault else None
        if self.closing.wait(self.slow):
            return 503, {"error": {"message": "shutting down"}}
        if status and status != "break":
            return status, {"error": {"message": "a fault of the test"}}
        if body["model"] not in ("base", *self.models):
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        sampling = Sampling(body["temperature"], body["top_p"], max(body["top_k"], 0))
        prompt, seeds = torch.tensor(body["prompt"]), [body["seed"] + i for i in range(body["n"])]
        with self.lock:
            (drawn,) = grpo.rollout(self.models.get(body["model"], self.model), [prompt], [seeds], sampling=sampling,
                                    max_new_tokens=body["max_tokens"], eos_ids=body["stop_token_ids"])
        reply = {"choices": [self.choice(body, i, *one) for i, one in
                             enumerate(zip(drawn.answers, drawn.logps, drawn.finished))]}
        if self.fault and not status:
            self.fault(number, body, reply)
        return status or 200, reply

    def choice(self, body: dict, index: int, answer, logps, ended: bool) -> dict:
        ids = answer.tolist()
        return {"index": index, "text": self.tokenizer.decode(ids[: len(ids) - ended]), "token_ids": ids,
                "prompt_token_ids": body["prompt"], "finish_reason": "stop" if ended else "length",
                "logprobs": {"token_logprobs": logps.tolist()}}

