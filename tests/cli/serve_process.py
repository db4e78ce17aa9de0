"""`infinilm serve` in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ServeProcess:
    """A server that is ready: where it is, what it said, and where its log goes (a pipe would fill)."""

    process: subprocess.Popen[str]
    url: str
    lines: list[str]
    log: Path

    def end(self, sent: int | None = signal.SIGTERM) -> str:
        """Send a signal, hold the exit code to 0, and return the log."""
        if sent is not None:
            self.process.send_signal(sent)
        assert self.process.wait(60) == 0
        return self.log.read_text()

    def resident_bytes(self) -> int:
        """Return how much memory it has in use."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def serve(model: Path, *words: str, **environment: str) -> Iterator[ServeProcess]:
    """Run the command until the block ends."""
    command = [sys.executable, "-m", "infinilm", "serve", str(model), "--port", "0", "--kv-cache-memory", "16M", *words]
    with tempfile.TemporaryDirectory() as name:
        log = Path(name) / "log"
        with log.open("w") as stderr:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, text=True, env={**os.environ, **environment}
            )
        assert process.stdout is not None
        try:
            lines = [process.stdout.readline().rstrip("\n") for _ in range(7)]
            found = re.search(r"http://\S+:\d+", lines[1])
            assert found, log.read_text()
            yield ServeProcess(process, found[0], lines, log)
        finally:
            process.kill()
            process.communicate()
