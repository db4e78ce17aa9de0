"""A live server of the demo model under load: errors, memory, blocks of the cache, and how long answers take.

    python benchmarks/serving.py [--seconds S] [--clients N] [--request-rate R] [--plot PNG] [--json PATH]

Runs `infinilm serve` and `infinilm bench serve`, each in a process of its own. There is no peer: the targets are the
project's own.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

DEMO = Path(__file__).parent.parent / "example_plugins" / "minimal"
PLUGIN = ["-p", "no:minimal", "-p", str(DEMO / "infinilm_minimal.py")]
PROMPTS = ["seven plus eight is", "ninety-nine plus ninety-nine is", "three minus nine is", "one plus one is"]


def resident_bytes(process: subprocess.Popen[str]) -> int:
    """Return how much memory a process has in use."""
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[tuple[float, int]], dict[str, float]]:
    """Return the client's report, the server's memory as (share of the run, bytes), and its gauges at the end."""
    command = [sys.executable, "-m", "infinilm", *PLUGIN, "serve", str(DEMO / "model"), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout is not None
    try:
        started = "".join(server.stdout.readline() for _ in range(2))
        found = re.search(r"http://\S+:\d+", started)
        assert found, f"the server did not start: {started}"
        with tempfile.TemporaryDirectory() as name:
            report, memory = drive(found[0], server, Path(name) / "report.json", arguments)
        time.sleep(0.5)
        lines = urllib.request.urlopen(f"{found[0]}/metrics").read().decode().splitlines()
        gauges = {line.split()[0]: float(line.split()[1]) for line in lines if not line.startswith("#")}
    finally:
        server.terminate()
        server.wait()
    return report, memory, gauges


def drive(
    url: str, server: subprocess.Popen[str], path: Path, arguments: argparse.Namespace
) -> tuple[dict[str, Any], list[tuple[float, int]]]:
    """Run the client, and look at the server's memory every second."""
    command = [sys.executable, "-m", "infinilm", "bench", "serve", "--base-url", url, "--json", str(path)]
    command += ["--num-clients", str(arguments.clients), "--duration", str(arguments.seconds)]
    command += ["--output-len", str(arguments.output_len), "--ignore-eos"]
    command += [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    command += ["--request-rate", str(arguments.request_rate)] if arguments.request_rate else []
    command += ["--plot", str(arguments.plot)] if arguments.plot else []
    client = subprocess.Popen(command)
    memory: list[tuple[float, int]] = []
    started = time.perf_counter()
    while client.poll() is None:
        memory.append(((time.perf_counter() - started) / arguments.seconds, resident_bytes(server)))
        time.sleep(1)
    assert client.returncode == 0, "the client failed"
    return json.loads(path.read_text()), memory


def rows(report: dict[str, Any], memory: list[tuple[float, int]], gauges: dict[str, float]) -> list[dict[str, Any]]:
    """Return the judged figures."""
    middle = next(size for share, size in memory if share >= 0.5)
    leaked = gauges["infinilm_cache_blocks"] - gauges["infinilm_cache_blocks_free"]
    judged = {
        "errors under load": (report["figures"]["errors"], "errors", 0.0),
        "growth over the second half": ((memory[-1][1] - middle) / 1e6, "MB", 8.0),
        "cache blocks left behind": (leaked, "blocks", 0.0),
    }
    return [
        {
            "name": name,
            "value": value,
            "unit": unit,
            "better": "lower",
            "target": target,
            "peer": "none",
            "peer_value": 0.0,
        }
        for name, (value, unit, target) in judged.items()
    ]


def main() -> None:
    """Measure, print a table, and write rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--request-rate", type=float)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report, memory, gauges = measure(arguments)
    figures = rows(report, memory, gauges)
    print()
    for figure in figures:
        print(f"{figure['name']:<30}{figure['value']:>8.2f} {figure['unit']:<8} target {figure['target']:g}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
