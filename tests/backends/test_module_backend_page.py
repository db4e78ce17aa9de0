"""The code of `docs/torch_models.md` runs: what it calls a file is one, the rest is run from top to bottom."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PAGE = (Path(__file__).parent.parent.parent / "docs" / "torch_models.md").read_text()


def test_python_of_the_page_runs_from_top_to_bottom(tmp_path: Path) -> None:
    nano, run_nano, squares, run_squares = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "nano.py").write_text(nano)
    (tmp_path / "squares.py").write_text(squares)
    done = subprocess.run(
        [sys.executable, "-c", run_nano + run_squares], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    planned = subprocess.run(
        [sys.executable, "-m", "infinilm", "-p", "./nano.py", "inspect", "model", "--tensor-parallel-size", "2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert planned.returncode == 0, planned.stderr
    assert "rank 1 keeps" in planned.stdout
