"""`infinilm plugins`: what is loaded, from where, and what failed; and whether a backend library is sound."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from infinilm.cli import library_check
from infinilm.native.libraries import BackendLibrary, Refusal, loaded_libraries, refused_libraries
from infinilm.plugins.loading import list_plugins
from infinilm.plugins.report import render_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="list every plugin", description="List every plugin, loaded or not.")
    listing.add_argument("--json", action="store_true", help="print a list of JSON objects")
    listing.set_defaults(run_action=_list)
    library_check.add_arguments(actions)


def run(arguments: Any) -> int:
    """Run the action that was asked for."""
    return int(arguments.run_action(arguments))


def _list(arguments: Any) -> int:
    """Print every plugin, and every backend library that was loaded or refused."""
    records = list_plugins(arguments.plugins)
    has_libraries = any(record.library is not None for record in records)
    loaded, refused = (loaded_libraries(), refused_libraries()) if has_libraries else ([], [])
    if arguments.json:
        described = [_loaded_json(library) for library in loaded] + [_refused_json(refusal) for refusal in refused]
        by_path = {os.path.realpath(row["path"]): row for row in described}
        rows = [record.to_json() for record in records]
        for record, row in zip(records, rows, strict=True):
            row["library"] = by_path.get(record.library or "")
        print(json.dumps(rows, indent=2))
        return 0
    print(render_table(records))
    for library in loaded:
        print(f"backend library {library.name} {library.version}: {library.path}, ABI {library.abi}, {library.build}")
    for refusal in refused:
        print(f"backend library {refusal.path}: refused at stage {refusal.stage!r}: {refusal.reason}")
    return 0


def _loaded_json(library: BackendLibrary) -> dict[str, str]:
    return {"path": library.path, "stage": "loaded", "build": library.build, "abi": library.abi}


def _refused_json(refusal: Refusal) -> dict[str, str]:
    return {"path": refusal.path, "stage": refusal.stage, "reason": refusal.reason, "abi": refusal.abi_found}
