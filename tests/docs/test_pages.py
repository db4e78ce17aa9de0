"""The README's commands and code run as printed, and the architecture page names every module there is."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def console_commands() -> list[tuple[str, list[str]]]:
    """Return every command of the README with the lines that it is said to print."""
    found: list[tuple[str, list[str]]] = []
    for block in blocks("console"):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line)
    return found


@pytest.mark.parametrize(("command", "printed"), console_commands(), ids=lambda value: str(value)[:40])
def test_command_prints_what_the_readme_says(command: str, printed: list[str]) -> None:
    words = shlex.split(command.replace(".venv/bin/infinilm", f"{sys.executable} -m infinilm"))
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for line in printed:
        assert line in done.stdout.splitlines()


def test_first_screen_shows_the_smallest_plugin_whole() -> None:
    assert blocks("python")[0] == (ROOT / "example_plugins/minimal/infinilm_minimal.py").read_text()
    assert len([line for line in blocks("python")[0].splitlines() if line.strip()]) <= 25


def test_python_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    exec(compile(blocks("python")[1], "README.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == ["ninety plus nine is ninety-nine", "one minus ten is minus nine"]


def test_python_of_the_plugins_page_runs_from_top_to_bottom(tmp_path: Path) -> None:
    code = "\n".join(blocks("python", (ROOT / "docs" / "plugins.md").read_text()))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_architecture_names_every_module_and_no_other() -> None:
    named = set(re.findall(r"^- `(infinilm\S*\.py)`: ", ARCHITECTURE, re.MULTILINE))
    found = {
        str(path.relative_to(ROOT))
        for package in ("infinilm", "infinilm_hookspecs")
        for path in (ROOT / package).rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py") or len(path.read_text().splitlines()) > 12
    }
    assert named == found
