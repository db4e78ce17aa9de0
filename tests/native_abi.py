"""The layout of `infinilm/backend.h`, as a compiler has it, and the golden table of it.

    python tests/native_abi.py > csrc/tests/abi_1_0.json

freezes a version; a frozen file is never changed afterwards, a new minor version has one of its own.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
INCLUDE = ROOT / "csrc" / "include"
HEADER = INCLUDE / "infinilm" / "backend.h"
GOLDEN = sorted((ROOT / "csrc" / "tests").glob("abi_*.json"))

Layout = dict[str, dict[str, list[int]]]
"""By struct and field: offset and size."""


def fields_of_header() -> dict[str, list[str]]:
    """Return the fields of every struct of the header, in order."""
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    found = re.findall(r"(?:typedef )?struct (infinilm_\w+) \{(.*?)\n\}", text, flags=re.DOTALL)
    return {name: [_name_of(field) for field in _declarations(body)] for name, body in found}


def _declarations(body: str) -> list[str]:
    return [" ".join(part.split()) for part in body.split(";") if part.strip()]


def _name_of(declaration: str) -> str:
    function = re.search(r"\(\*(\w+)\)", declaration)
    if function:
        return function[1]
    match = re.search(r"(\w+)(?:\[\w+\])?$", declaration)
    assert match is not None, declaration
    return match[1]


def measure() -> Layout:
    """Return what the C compiler of this machine makes of the header."""
    rows = [
        f'printf("{struct} {field} %zu %zu\\n", offsetof({struct}, {field}), sizeof((({struct} *)0)->{field}));'
        for struct, fields in fields_of_header().items()
        for field in fields
    ]
    ends = [f'printf("{struct} sizeof %zu 0\\n", sizeof({struct}));' for struct in fields_of_header()]
    code = '#include <stdio.h>\n#include "infinilm/backend.h"\nint main(void) {\n' + "\n".join(rows + ends) + "\n}\n"
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "layout"
        command = ["gcc", "-std=c99", f"-I{INCLUDE}", "-x", "c", "-", "-o", str(program)]
        subprocess.run(command, input=code, text=True, check=True)
        lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    layout: Layout = {}
    for struct, field, offset, size in (line.split() for line in lines):
        layout.setdefault(struct, {})[field] = [int(offset), int(size)]
    return layout


if __name__ == "__main__":
    rows = [
        f'  "{struct}": {{\n' + ",\n".join(f'    "{name}": {json.dumps(at)}' for name, at in fields.items()) + "\n  }"
        for struct, fields in measure().items()
    ]
    sys.stdout.write("{\n" + ",\n".join(rows) + "\n}\n")
