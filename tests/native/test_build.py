"""Building from source: where there is no compiler, and where somebody's CMake looks for the headers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from native_fixtures import ROOT

import infinilm
from infinilm.native import paths
from infinilm_hookspecs import PluginError


def cmake(*words: object, **env: str) -> subprocess.CompletedProcess[str]:
    tools = str(Path(sys.executable).parent)
    env = {"PATH": os.pathsep.join([tools, os.environ["PATH"]]), **env}
    return subprocess.run(["cmake", *map(str, words)], capture_output=True, text=True, check=False, env=env)


def test_machine_without_a_compiler_is_told_what_to_install(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("cmake", "ninja"):
        found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        assert found is not None, f"{name} is one of the extra dev"
        (tools / name).symlink_to(found)
    done = cmake("-G", "Ninja", "-S", ROOT, "-B", tmp_path / "build", PATH=str(tools))
    assert done.returncode != 0
    said = " ".join(done.stderr.split())
    assert "infinilm is built from source here and finds no C++ compiler. Install one (Debian and Ubuntu:" in said


PROJECT = """
cmake_minimum_required(VERSION 3.18)
project(acme LANGUAGES C)
find_package(infinilm {wanted} CONFIG REQUIRED)
infinilm_add_backend(acme fixture.c)
"""


@pytest.mark.parametrize("variable", ["infinilm_DIR", "CMAKE_PREFIX_PATH"])
def test_project_in_c_finds_the_package_and_exports_one_name(tmp_path: Path, variable: str) -> None:
    (tmp_path / "CMakeLists.txt").write_text(PROJECT.format(wanted="0.1"))
    shutil.copy(ROOT / "csrc" / "tests" / "fixture.c", tmp_path)
    for words in (
        ["-S", tmp_path, "-B", tmp_path / "b", f"-D{variable}={infinilm.get_cmake_dir()}"],
        ["--build", tmp_path / "b"],
    ):
        done = cmake(*words)
        assert done.returncode == 0, done.stdout + done.stderr
    names = subprocess.run(["nm", "-D", "--defined-only", tmp_path / "b" / "acme.so"], capture_output=True, text=True)
    assert [line.split()[-1] for line in names.stdout.splitlines()] == ["infinilm_backend_entry"]


def test_package_that_is_too_old_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "CMakeLists.txt").write_text(PROJECT.format(wanted="99.0"))
    done = cmake("-S", tmp_path, "-B", tmp_path / "b", f"-Dinfinilm_DIR={infinilm.get_cmake_dir()}")
    assert done.returncode != 0
    assert "version: 0.1.0" in done.stderr


def test_paths_exist() -> None:
    assert (Path(infinilm.get_include()) / "infinilm" / "backend.h").is_file()
    assert (Path(infinilm.get_cmake_dir()) / "infinilm-config.cmake").is_file()


def test_headers_that_are_installed_are_those_of_the_source() -> None:
    """An editable install copies them: after a change, `make` or pip has to run again."""
    for path in (ROOT / "csrc" / "include" / "infinilm").iterdir():
        assert (Path(infinilm.get_include()) / "infinilm" / path.name).read_bytes() == path.read_bytes(), path.name


def test_folder_that_was_never_built_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None)
    for ask in (infinilm.get_include, infinilm.get_cmake_dir):
        with pytest.raises(PluginError, match=r"this infinilm has no native part.*'pip install \.'"):
            ask()


def test_infinilm_without_its_native_part_works_but_for_libraries(tmp_path: Path) -> None:
    """A plugin, or a native part, that is broken never breaks `import infinilm` or anybody else's plugin."""
    code = """
import sys
sys.modules["infinilm._native"] = None  # as if importing it failed
from infinilm.plugins import create_plugin_manager, load_backend_plugin
assert "torch" in [record.name for record in create_plugin_manager().records]
try:
    load_backend_plugin("acme.so")
except ImportError as err:
    print(err)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "this infinilm has no native part that works, so it loads no backend library" in done.stdout
