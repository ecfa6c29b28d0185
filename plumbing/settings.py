"""A dataclass of settings, and the command line that fills it. Nothing slow is imported here."""
import argparse
import math
from dataclasses import field, fields

from plumbing.problems import BadInput


def arg(default, text: str, *, section: str = "", choices: list[str] | None = None, least=None, above=None):
    """One setting: its default, its line in --help, and its bounds.

    section: a heading of --help; the settings that follow stand below it too. least: the smallest value that is
    allowed. above: a bound that the value has to exceed.
    """
    about = {"help": text, "section": section, "choices": choices, "least": least, "above": above}
    return field(default=default, metadata=about)


def option(name: str) -> str:
    """The option that sets a field: "top_p" -> "--top-p"."""
    return f"--{name.replace('_', '-')}"


def read_options(settings: type, argv: list[str] | None, description: str) -> dict:
    """The fields of a dataclass that a command line sets, by name. argv: its words; None takes the process's own.

    A field that is false by default becomes --name, one that is true becomes --no-name.
    """
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", description=description,
                                     formatter_class=argparse.RawTextHelpFormatter)
    group = parser
    for f in fields(settings):
        about = f.metadata
        group = parser.add_argument_group(about["section"]) if about["section"] else group
        if f.default is False:
            group.add_argument(option(f.name), action="store_true", default=None, help=about["help"])
        elif f.default is True:
            group.add_argument(option(f"no_{f.name}"), dest=f.name, action="store_false", default=None,
                               help=about["help"])
        else:
            text = about["help"] + (f" (default: {f.default})" if f.default != "" else "")
            metavar = None if about["choices"] else f.name.upper()
            group.add_argument(option(f.name), type=type(f.default), choices=about["choices"], metavar=metavar,
                               help=text)
    return {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}


def check_bounds(settings) -> None:
    """Raise BadInput for the first number that is not finite or not within its bounds."""
    for f in fields(settings):
        value, least, above = getattr(settings, f.name), f.metadata["least"], f.metadata["above"]
        if least is not None and not (math.isfinite(value) and value >= least):
            raise BadInput(f"{option(f.name)} is {value}; it has to be at least {least}")
        if above is not None and not (math.isfinite(value) and value > above):
            raise BadInput(f"{option(f.name)} is {value}; it has to be above {above}")
