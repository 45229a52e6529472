"""The command line: `peftops finetune` and `peftops demo`, also as `python -m peftops`."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from .errors import DivergedError, InputError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def main(argv: list[str] | None = None) -> int:
    """Run a command and return the exit code: 0 done, 2 bad input (one line on stderr), 1 diverged, 130 interrupted."""
    from . import demo, finetune

    parser = _Parser(prog="peftops", description="Parameter-efficient fine-tuning from the command line.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (finetune, demo):
        name = command.__name__.rpartition(".")[2]
        help_line = command.__doc__.partition(": ")[2].splitlines()[0]
        sub = commands.add_parser(name, help=help_line, description=command.DESCRIPTION)
        sub.set_defaults(run=command.main)
        command.add_arguments(sub)
    try:
        arguments = parser.parse_args(argv)
        return arguments.run(arguments)
    except (InputError, DivergedError) as error:
        print(f"peftops: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        print("peftops: interrupted", file=sys.stderr)
        return 130
