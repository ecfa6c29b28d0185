"""The command line: a dataclass of settings, what fills it, and the terminal. Nothing slow is imported here."""
import argparse
import math
import os
import sys
from dataclasses import field, fields
from importlib.util import find_spec

from plumbing.problems import BadInput

PURPOSES = {  # of the presets, for the first line of a run
    "laptop": "for the shipped model",
    "quick": "for another model on one GPU or a CPU (--preset paper: the paper's settings, for several GPUs)",
    "paper": "the paper's settings, for several GPUs (--preset quick: for one)",
    "release": "the settings of the authors' code, for several GPUs",
}


def prepare_terminal() -> None:
    """Let no character, closed stream or Ctrl-C end a program with a traceback. Call this first.

    A character that the terminal's encoding lacks is printed as \\uXXXX. The hook is for a Ctrl-C or a closed pipe that
    main() of the program does not catch, for example while torch is imported.
    """
    for name in ("stdin", "stdout", "stderr"):
        if not getattr(sys, name):  # closed: a file opened later would take its number, and get what libraries print
            setattr(sys, name, open(os.devnull, "r+"))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")

    def hook(kind: type, error: BaseException, trace) -> None:
        if kind in (KeyboardInterrupt, BrokenPipeError):
            print(f"{os.path.basename(sys.argv[0])}: stopped", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = hook


def arg(default, text: str, *, section: str = "", choices: list[str] | None = None, least=None, above=None):
    """Return a field for one setting. text: its line in --help. section: a heading of --help, also for what follows.

    least: the smallest value that is allowed. above: a bound that the value has to exceed.
    """
    return field(default=default, metadata=dict(help=text, section=section, choices=choices, least=least, above=above))


def option(name: str) -> str:
    """Return the option that sets a field: "top_p" -> "--top-p"."""
    return f"--{name.replace('_', '-')}"


def read_options(settings: type, argv: list[str] | None, description: str) -> dict:
    """Return what a command line sets of a dataclass, by name. argv: its words; None: those of this process."""
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", description=description,
                                     formatter_class=argparse.RawTextHelpFormatter)
    group = parser
    for f in fields(settings):
        section, text, choices = (f.metadata[name] for name in ("section", "help", "choices"))
        group = parser.add_argument_group(section) if section else group
        if f.default is False:
            group.add_argument(option(f.name), action="store_true", default=None, help=text)
        elif f.default is True:
            group.add_argument(option(f"no_{f.name}"), dest=f.name, action="store_false", default=None, help=text)
        else:
            text += f" (default: {f.default})" if f.default != "" else ""
            metavar = None if choices else f.name.upper()
            group.add_argument(option(f.name), type=type(f.default), choices=choices, metavar=metavar, help=text)
    return {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}


def check_settings(args) -> None:
    """Raise BadInput for the first setting that cannot work. args: dust.Args."""
    for f in fields(args):
        value, least, above = getattr(args, f.name), f.metadata["least"], f.metadata["above"]
        if least is not None and not least <= value < math.inf:
            raise BadInput(f"{option(f.name)} is {value}; it has to be at least {least}")
        if above is not None and not above < value < math.inf:
            raise BadInput(f"{option(f.name)} is {value}; it has to be above {above}")
    wrong = {
        f"--group-size {args.group_size} is larger than --candidates {args.candidates}; sample at least as many "
        "candidates as stand in a group": args.group_size > args.candidates,
        f"--timeout is {args.timeout}; it has to be below 1000000 seconds": args.timeout >= 1e6,
        f"--dual-clip is {args.dual_clip}; it has to be above 1, the ratio of an unchanged model, or 0":
            0 < args.dual_clip <= 1,
        "--init works only without --eval-only; to measure a run's model: --eval-only --model FOLDER":
            args.init and args.eval_only,
        "--teacher works only with --mode sft": args.teacher and args.mode != "sft",
        "--server-rollouts needs --server and --lora: the server loads the adapters of each step":
            args.server_rollouts and not (args.server and args.lora),
        "--server-rollouts does not work with --mode sft or --init, whose answers are not of --model with an adapter":
            args.server_rollouts and (args.mode == "sft" or args.init),
        "--programs works only with --mode rank or sft, which train on candidates that are drawn once":
            args.programs and (args.mode not in ("rank", "sft") or args.eval_only),
        f"--lora {args.lora} needs the package peft: pip install peft (--lora 0 trains all weights)":
            args.lora and not find_spec("peft"),
        "--shard spreads all weights over torchrun's processes: start it with torchrun, without --lora":
            args.shard and (args.lora or not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()),
    }
    for message, applies in wrong.items():
        if applies:
            raise BadInput(message)
