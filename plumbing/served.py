"""A run whose answers a server draws: check it first, then give it the adapters that --lora trains. args: dust.Args."""
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from plumbing import models, ranks
from plumbing.engine import Server, base_url, start_command
from plumbing.problems import seed_for


def connect(model, tokenizer, prompt: torch.Tensor, args, eos_ids: list[int], logprobs: Callable) -> Server:
    """Return the server of --server. It stands where a model stands in all stages that only draw answers.

    prompt: token ids [L] of a question, which the server has to answer as this model does. eos_ids: the ids that end an
    answer. logprobs: grpo.answer_logprobs. Raises BadInput where the server is another one than the run needs.
    """
    here = model.device.type != "meta"  # otherwise only the server has weights
    dtype = "float32" if here and model.dtype == torch.float32 else "auto"
    context = context_of(model) or 2 * args.max_new_tokens
    command = start_command(models.find_model(args.model), context, dtype, args.lora * serves_trained(args))
    vocabulary = model.get_input_embeddings().num_embeddings
    unchecked = Server(base_url(args.server), command, eos_ids, vocabulary, args.server_requests, say=tqdm.write)
    # one process asks: where another one alone met an error, the first one could not say which
    server, answer = ranks.on_first(lambda: unchecked.check(prompt.tolist(), args.max_new_tokens, tokenizer.decode))
    found = f"{server.model} at {server.url}, context {server.context}"
    if here:
        with torch.no_grad(), ranks.unsharded(model):
            (logps,) = logprobs(model, prompt, [torch.tensor(answer.ids)])
        gap = server.check_weights(answer, logps.tolist())
        found += f"; its log-probs are off by {gap:.1g} nats a token from ours"
    print(f"  server   {found}")
    if not args.eval_only and not serves_trained(args):
        print("           the answers of the trained model are drawn in this process (with --lora: by the server)")
    return server


def context_of(model) -> int | None:
    """Return how many tokens a prompt and its answer may have with a model or a Server; None: the model names none."""
    if isinstance(model, Server):
        return model.context
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def requests_of(model) -> int:
    """Return how many requests a Server gets at a time; 0 for a model, which answers in this process."""
    return model.requests if isinstance(model, Server) else 0


def serves_trained(args) -> bool:
    """Return whether the server draws the trained model's answers too: only if that is --model with adapters."""
    return bool(args.server and args.lora and not args.init and not args.eval_only)


def with_adapter(server: Server, model, args, out: Path) -> Server:
    """Let the server load the model's adapters as they are now. Return the server that draws with them. Collective."""
    weights, folder = models.save_adapter(out / "served-adapter", model), args.server_adapters or out.resolve()
    names = f"dust-{seed_for(out.resolve())}-"  # of this run's adapters, also of those before it was stopped
    return ranks.on_first(lambda: server.with_adapter(f"{folder}/served-adapter", f"{names}{weights}", names))


def trained(server, model, args, out: Path):
    """Return what draws the trained model's answers: the server with the adapters as they are now, or the model."""
    return with_adapter(server, model, args, out) if serves_trained(args) else model


def try_adapter(server: Server, model, args, out: Path) -> None:
    """Let the server load adapters that change nothing: one that cannot do so should say it now, not after hours."""
    if serves_trained(args):
        with_adapter(server, models.blank_lora(model, args.lora), args, out)
