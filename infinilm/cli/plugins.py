"""`infinilm plugins`: what is loaded, from where, and what failed."""

from __future__ import annotations

import argparse
import json
from typing import Any

from infinilm.plugins import create_plugin_manager
from infinilm.plugins.report import render_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="list every plugin", description="List every plugin, loaded or not.")
    listing.add_argument("--json", action="store_true", help="print a list of JSON objects")


def run(arguments: Any) -> int:
    """Print every plugin."""
    records = create_plugin_manager(plugins=arguments.plugins).records
    if arguments.json:
        print(json.dumps([record.to_json() for record in records], indent=2))
    else:
        print(render_table(records))
    return 0
