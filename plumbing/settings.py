"""A dataclass of settings, and the command line that fills it. Nothing slow is imported here."""
import argparse
import math
from dataclasses import field, fields

from plumbing.problems import BadInput


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


def check_bounds(settings) -> None:
    """Raise BadInput for the first number that is not finite or not within its bounds."""
    for f in fields(settings):
        value, least, above = getattr(settings, f.name), f.metadata["least"], f.metadata["above"]
        if least is not None and not least <= value < math.inf:
            raise BadInput(f"{option(f.name)} is {value}; it has to be at least {least}")
        if above is not None and not above < value < math.inf:
            raise BadInput(f"{option(f.name)} is {value}; it has to be above {above}")
