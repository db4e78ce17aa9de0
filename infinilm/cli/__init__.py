"""The command line: one module per command, errors of one line, documented exit codes."""

from infinilm.cli.errors import ExitCode
from infinilm.cli.main import main

__all__ = ["ExitCode", "main"]
