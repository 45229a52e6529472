"""The command line: `peftops finetune`, `merge`, `inspect` and `demo`, also as `python -m peftops`."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from .errors import DivergedError, InputError


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def _parse(argv: list[str]) -> argparse.Namespace:
    from . import config_file, demo, finetune, inspect, merge

    parser = _Parser(prog="peftops", description="Parameter-efficient fine-tuning from the command line.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    parsers = {}
    for command in (finetune, merge, inspect, demo):
        name = command.__name__.rpartition(".")[2]
        help_line = command.__doc__.partition(": ")[2].splitlines()[0]
        sub = parsers[name] = commands.add_parser(name, help=help_line, description=command.DESCRIPTION)
        sub.set_defaults(run=command.main, several=command is finetune)
        command.add_arguments(sub)
    if argv[:1] == ["finetune"]:
        # Before everything else, because the file's values become the defaults.
        first = _Parser(prog=parsers["finetune"].prog, add_help=False)
        first.add_argument("--config", type=config_file.Path)
        path = first.parse_known_args(argv[1:])[0].config
        if path is not None:
            config_file.apply(parsers["finetune"], path)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run a command and return the exit code: 0 done, 2 bad input (one line on stderr), 1 diverged, 130 interrupted."""
    from . import processes

    try:
        processes.begin()
        arguments = _parse(sys.argv[1:] if argv is None else argv)
        if processes.count() > 1 and not arguments.several:
            raise InputError("only finetune runs in several processes")
        return arguments.run(arguments)
    except (InputError, DivergedError) as error:
        processes.say_once(f"peftops: error: {error}")
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        processes.say_once("peftops: interrupted")
        return 130
