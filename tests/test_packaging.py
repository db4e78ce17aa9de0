"""The wheel: built, installed into an empty environment, and every module of it imported."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT)
    (found,) = folder.glob("infinilm-*.whl")
    return found


def test_wheel_holds_both_packages_typed_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    roots = {name.partition("/")[0] for name in names}
    assert roots == {"infinilm", "infinilm_hookspecs", next(r for r in roots if r.endswith(".dist-info"))}
    assert {"infinilm/py.typed", "infinilm_hookspecs/py.typed"} <= set(names)


def test_wheel_works_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel)
    code = """
import importlib, pkgutil, infinilm, infinilm_hookspecs
names = [m.name for p in (infinilm, infinilm_hookspecs) for m in pkgutil.walk_packages(p.__path__, p.__name__ + ".")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(len(names), infinilm.__file__)
"""
    count, _, location = run(python, "-c", code, cwd=tmp_path).strip().partition(" ")
    assert int(count) > 40
    assert location.startswith(str(tmp_path))
    assert "safetensors" in run(tmp_path / "env" / "bin" / "infinilm", "plugins", "list", cwd=tmp_path)
