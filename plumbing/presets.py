"""Settings that go together, by name, and the command line: what --preset, --quick and options make of dust.Args."""
import argparse
from dataclasses import field, fields
from pathlib import Path

from plumbing.models import full_name, model_folder

PAPER = dict(  # section 3.1, appendix B, table 4
    candidates=64, batch=64, ppo_epochs=3, steps=180, lr=1e-6, max_new_tokens=32768, repeats=10, save_every=10
)

RELEASE = PAPER | dict(  # what the authors' code does where the paper says something else
    clip_high=0.28, dual_clip=10.0, loss="token", kl=0.0, weight_decay=0.1, warmup=10,
    labels="fractional", shuffle=False, question="prompt", repeats=6, eval_temperature=1.0,
)

QUICK_REAL = dict(  # a real model on one GPU of 24 GB: adapters, which want a larger learning rate
    limit=500, candidates=16, batch=16, steps=60, lr=2e-5, lora=16, max_new_tokens=8192, repeats=2, save_every=5,
    rows=8, optimizer="kahan",
)

PRESETS = {"laptop": {}, "quick": QUICK_REAL, "paper": PAPER, "release": RELEASE}
DATA = dict(train="rstar-coder", eval="livecodebench-v6")  # the paper's problems: for any model but the shipped one
QUICK = dict(limit=60, eval_limit=60, candidates=8, steps=10, repeats=1)  # the flag, over any preset


def arg(default, text: str, *, section: str = "", choices: list[str] | None = None):
    """One field of Args: what --help says of it, and the heading that it stands below with those that follow."""
    return field(default=default, metadata={"help": text, "section": section, "choices": choices})


def command_line(Args, argv: list[str] | None, description: str) -> dict:
    """Options -> the values of Args that they set. What is given wins over --quick, which wins over the preset.

    Args: a dataclass whose fields are made by `arg`.
    """
    parser = argparse.ArgumentParser(
        prog="dust.py", usage="%(prog)s [options]", description=description,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    section = parser
    for f in fields(Args):
        name, text, choices = f"--{f.name.replace('_', '-')}", f.metadata["help"], f.metadata["choices"]
        section = parser.add_argument_group(f.metadata["section"]) if f.metadata["section"] else section
        if isinstance(f.default, bool):
            action = argparse.BooleanOptionalAction if f.default else "store_true"
            section.add_argument(name, action=action, default=None, help=text)
        else:
            text += "" if f.default == "" else f" (default: {f.default})"
            metavar = None if choices else f.name.upper()
            section.add_argument(name, type=type(f.default), choices=choices, metavar=metavar, help=text)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    shipped = Path(given.get("model", Args.model)).resolve() == Path(Args.model).resolve()
    preset = given.get("preset") or ("laptop" if shipped else "paper")
    settings = ({} if shipped or preset == "laptop" else DATA) | PRESETS[preset]
    settings |= (QUICK if given.get("quick") else {}) | given | {"preset": preset}
    names = {option: settings.get(option, "") for option in ("model", "init", "teacher", "rank_with")}
    return settings | {option: model_folder(full_name(name)) for option, name in names.items() if name}
