"""What plugins cost: the time of `infinilm inspect` with 40 registered plugins against 4, in alternation.

python benchmarks/plugins.py [--runs N] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODEL = Path(__file__).parent.parent / "example_plugins" / "minimal" / "model"
PLUGIN = """
from infinilm_hookspecs import hookimpl

@hookimpl
def open_checkpoint(source): ...

@hookimpl
def adapt_config(config): ...

@hookimpl
def provide_backend(request):
    return request.decline("it is here to be asked")

@hookimpl
def remap_weight(config): ...

@hookimpl
def select_processor(lineage, checkpoint): ...
"""


def seconds_of_inspect(folder: Path, num_plugins: int) -> float:
    """Return how long one `infinilm inspect` takes with `num_plugins` plugins that answer nothing."""
    words = [word for index in range(num_plugins) for word in ("-p", str(folder / f"plugin_{index}.py"))]
    command = [sys.executable, "-m", "infinilm", *words, "inspect", str(MODEL)]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    """Measure, print a table, and write rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for index in range(40):
            (folder / f"plugin_{index}.py").write_text(PLUGIN)
        seconds_of_inspect(folder, 40)  # compiled, and in the page cache
        pairs = [(seconds_of_inspect(folder, 4), seconds_of_inspect(folder, 40)) for _ in range(arguments.runs)]
    few, many = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    for what, seconds in (("4 plugins", few), ("40 plugins", many)):
        print(f"inspect with {what:<10} {seconds:.3f} s, median of {arguments.runs}")
    print(f"ratio, median of pairs  {ratio:.3f}")
    rows = [
        {
            "name": "time of inspect, 40 registered plugins over 4",
            "value": ratio,
            "unit": "ratio",
            "better": "lower",
            "target": 1.05,
            "peer": "4 plugins",
            "peer_value": 1.0,
        }
    ]
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
