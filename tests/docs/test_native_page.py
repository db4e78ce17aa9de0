"""The page for authors of backend libraries: it shows files as they are, and names every function and stage."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from native_abi import fields_of_header

import infinilm

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "native.md").read_text()
EXAMPLE = ROOT / "example_plugins" / "cpp_backend"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_code_is_that_of_the_example() -> None:
    (cmake,) = blocks("cmake")
    assert cmake in (EXAMPLE / "CMakeLists.txt").read_text()
    assert blocks("python")[0] in (EXAMPLE / "infinilm_cpp_backend" / "__init__.py").read_text()


def test_every_function_of_the_table_is_named() -> None:
    functions = fields_of_header()["infinilm_backend_table"][8:]
    assert len(functions) == 20
    missing = [name for name in functions if f"`{name}`" not in PAGE]
    assert not missing


def test_every_stage_is_named() -> None:
    source = (ROOT / "csrc" / "src" / "library.cpp").read_text()
    stages = set(re.findall(r'refuse\([^;]*?, "(\w+)",', source))
    assert stages == {"find", "read", "open", "entry", "table", "name", "probe", "create"}
    assert all(f"| `{stage}` |" in PAGE for stage in stages)


def test_every_header_is_named() -> None:
    headers = {path.name for path in Path(infinilm.get_include(), "infinilm").iterdir()}
    assert headers == set(re.findall(r"^\| `infinilm/([\w.]+)` \|", PAGE, re.MULTILINE))


def test_check_prints_what_the_page_shows(tmp_path: Path) -> None:
    library = tmp_path / "acme.so"
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", f"-I{infinilm.get_include()}"]
    exports = f"-Wl,--version-script={infinilm.get_cmake_dir()}/infinilm-backend.map"
    sources = map(str, (EXAMPLE / "src").glob("*.cpp"))
    subprocess.run(["g++", *flags, exports, *sources, "-o", str(library)], check=True)
    command = [sys.executable, "-m", "infinilm", "plugins", "check", str(library)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    shown = next(block for block in blocks("console") if "plugins check" in block).split("\n", 1)[1]
    found, wanted = ([line.split()[:2] for line in text.splitlines()] for text in (printed, shown))
    assert found == wanted


@pytest.mark.parametrize("option", ["-std=c99", "-std=c11"])
def test_command_that_compiles_a_library_works(tmp_path: Path, option: str) -> None:
    (command,) = [line[2:] for block in blocks("console") for line in block.splitlines() if line.startswith("$ cc")]
    assert "-std=c99" in command
    (tmp_path / "acme.c").write_text((ROOT / "csrc" / "tests" / "fixture.c").read_text())
    command = command.replace("-std=c99", option).replace("$(python ", f"$({sys.executable} ")
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert (tmp_path / "acme.so").exists()
