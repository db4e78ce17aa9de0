"""`infinilm COMMAND`: options that every command has, then the command's own.

`-p` and `--debug` may stand before or after the command, so they are taken out before the parser sees the rest.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from infinilm import __version__
from infinilm.cli import bench, chat, export, generate, inspect, plugins, serve
from infinilm.cli.errors import ExitCode, describe, is_users
from infinilm.plugins.checks import did_you_mean
from infinilm_hookspecs import PluginError

_COMMANDS = {
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "bench": bench,
    "inspect": inspect,
    "export": export,
    "plugins": plugins,
}

_OPTION = re.compile(r"--?[A-Za-z]")  # and no negative number


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    logging.basicConfig(format="infinilm: %(message)s", level=logging.WARNING, stream=sys.stderr)
    words, names, debug = take_common_options(sys.argv[1:] if argv is None else argv)
    try:
        arguments = parse(words)
        arguments.plugins = names
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has seen enough. What is left must not meet the same error when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OK
    except Exception as err:
        if debug:
            traceback.print_exc()
        print(f"infinilm: error: {describe(err)}", file=sys.stderr)
        return ExitCode.USAGE_ERROR if is_users(err) else ExitCode.INTERNAL_ERROR


def _run(arguments: Any) -> int:
    """Run a command. Raises `PluginError` where code that it loaded ends the process instead."""
    try:
        return int(arguments.run(arguments))
    except SystemExit as err:
        where = traceback.extract_tb(err.__traceback__)[-1]
        raise PluginError(
            f"{where.filename!r}, line {where.lineno}, ended the process with {err!r}: a plugin raises an error instead"
        ) from err


def take_common_options(argv: Sequence[str]) -> tuple[list[str], list[str], bool]:
    """Return (the other words, the values of every `-p`, whether `--debug` was given)."""
    words: list[str] = []
    names: list[str] = []
    debug = False
    rest = iter(argv)
    for word in rest:
        if word == "--":
            words += [word, *rest]
        elif word == "-p":
            names.append(next(rest, ""))
        elif word == "--debug":
            debug = True
        else:
            words.append(word)
    return words, names, debug


class _Parser(argparse.ArgumentParser):
    """argparse's parser, its errors on one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(ExitCode.USAGE_ERROR, f"{self.prog}: error: {message}; see {self.prog} --help\n")

    def options(self) -> list[str]:
        """Return every option this parser knows, those of its own subcommands too."""
        found = [option for action in self._actions for option in action.option_strings]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += [option for parser in action.choices.values() for option in parser.options()]
        return found


def parse(words: Sequence[str]) -> Any:
    """Return the arguments of a command, its function in `run`. Exits with a usage error where they do not parse."""
    parser = _Parser(
        prog="infinilm",
        description="Run language models through plugins.",
        epilog="every command: -p NAME loads a plugin (an entry point, module, module:attribute or .py file), "
        "-p no:NAME blocks one; --debug shows tracebacks. Exit codes: "
        + ", ".join(f"{code.value} {code.name.lower().replace('_', ' ')}" for code in ExitCode),
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"infinilm {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    parsers: dict[str, _Parser] = {}
    for name, module in _COMMANDS.items():
        first_line = (module.__doc__ or "").partition("\n")[0]
        summary = first_line.partition(": ")[2].rstrip(".")
        parsers[name] = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        parsers[name].set_defaults(command=name, run=module.run)
        module.add_arguments(parsers[name])
    _refuse_unknown_words(words, parser, parsers)
    return parser.parse_args(words)


def _refuse_unknown_words(words: Sequence[str], parser: _Parser, parsers: Mapping[str, _Parser]) -> None:
    """Name a misspelt command or option before argparse complains of what is now missing."""
    current = parser
    for word in words:
        option = word.partition("=")[0]
        if option == "--":
            return
        if _OPTION.match(option) and option not in current.options():
            current.error(f"unknown option {option!r}{did_you_mean(option, current.options())}")
        if current is parser and not word.startswith("-"):
            if word not in parsers:
                hint = did_you_mean(word, parsers)
                parser.error(f"unknown command {word!r}{hint}; commands: {', '.join(parsers)}")
            current = parsers[word]
