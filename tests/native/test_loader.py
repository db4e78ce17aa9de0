"""The loader of backend libraries: what it takes, once; what it refuses, at which stage, and in which words."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from native_fixtures import FIXTURE, compile_fixture, compile_library, copy_of, run_python, unique_name

from infinilm.native.libraries import Refusal, open_library, refused_libraries
from infinilm_hookspecs import PluginError


def refusal(path: Path | str) -> Refusal:
    """Return how the loader refuses `path`; the error has to say it all too."""
    with pytest.raises(PluginError) as caught:
        open_library(path)
    its = refused_libraries()[-1]
    for part in (its.path, its.stage, its.reason, its.abi_found or "not known", its.abi_wanted):
        assert part in str(caught.value)
    assert its.abi_wanted == "1.x"
    return its


# ---------------------------------------------------------------- taken


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return compile_fixture(tmp_path / "good.so")


def test_library_says_what_it_is(tmp_path: Path) -> None:
    path = compile_fixture(tmp_path / "acme.so", NAME="acme-1")
    library = open_library(path)
    assert (library.name, library.version, library.build, library.abi) == ("acme-1", "0.1", "fixture.c", "1.0")
    assert library.path == str(path)
    assert str(path) not in {its.path for its in refused_libraries()}


def test_one_file_is_one_library_whatever_its_path_is_written_like(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link.so").symlink_to(good)
    (tmp_path / "folder").mkdir()
    os.link(good, tmp_path / "folder" / "hard.so")
    monkeypatch.chdir(tmp_path)
    first = open_library(good)
    for path in ("good.so", "./good.so", "folder/../good.so", "link.so", "folder/hard.so", Path("good.so")):
        assert open_library(path) == first
    assert first.native.query("creates") == 1


def test_sixteen_threads_create_it_once(good: Path, tmp_path: Path) -> None:
    paths = [good]
    for number in range(15):
        paths.append(tmp_path / f"link-{number}.so")
        paths[-1].symlink_to(good)
    with ThreadPoolExecutor(16) as pool:
        libraries = list(pool.map(open_library, paths))
    assert len(set(libraries)) == 1
    assert libraries[0].native.query("probes") == libraries[0].native.query("creates") == 1


def test_two_libraries_with_equal_symbols_keep_to_themselves(tmp_path: Path) -> None:
    first, second = (open_library(compile_fixture(tmp_path / f"{name}.so")) for name in "ab")
    counts = [library.native.query("counter") for library in (first, first, second, first, second)]
    assert counts == [1, 2, 1, 3, 2]


@pytest.mark.parametrize("minor", [0, 1, 999])
def test_any_minor_version_of_the_same_major_is_taken(tmp_path: Path, minor: int) -> None:
    assert open_library(compile_fixture(tmp_path / "minor.so", MINOR=minor)).abi == f"1.{minor}"


@pytest.mark.parametrize("size", ["sizeof(infinilm_backend_table)+4096", "offsetof(infinilm_backend_table,cancel)"])
def test_longer_and_shorter_tables_are_taken(tmp_path: Path, size: str) -> None:
    path = compile_library(tmp_path / "size.so", FIXTURE, f'-DNAME="{unique_name()}"', f"-DTABLE_SIZE={size}")
    library = open_library(path)
    if "cancel" in size:
        with pytest.raises(RuntimeError, match="does not say what memory"):
            library.native.memory()
    else:
        assert library.native.memory()["parameters"] == 0


# ---------------------------------------------------------------- refused before it is opened


def test_missing_file_is_refused(tmp_path: Path) -> None:
    its = refusal(tmp_path / "nowhere.so")
    assert its.stage == "find"
    assert its.reason.startswith("No such file or directory")


def test_directory_is_refused(tmp_path: Path) -> None:
    assert (refusal(tmp_path).stage, refusal(tmp_path).reason[:17]) == ("find", "it is a directory")


def test_path_with_a_zero_byte_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="zero byte"):
        open_library(f"{tmp_path}/a\0b.so")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"GROUP ( libacme.so )\n", "it is no ELF file, it begins with 'GROUP ( '"),
        (b"\xff\xfe\x00\x01" * 8, "it is no ELF file"),
        (b"\x7fELF\x01\x01\x01" + b"\0" * 11 + b"\x03\x00", "it was built for another kind of machine: ELF class 1"),
        (b"\x7fELF\x02\x01\x01" + b"\0" * 11 + b"\xf3\x7e", "it was built for another kind of machine: ELF class 2"),
    ],
)
def test_file_that_is_no_library_of_this_machine_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "wrong.so"
    path.write_bytes(content)
    its = refusal(path)
    assert its.stage == "read"
    assert reason in its.reason


def test_library_cut_short_is_refused_in_the_linkers_words(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.so"
    path.write_bytes(good.read_bytes()[:100])
    its = refusal(path)
    assert its.stage == "open"
    assert "the dynamic linker says: " in its.reason
    assert "cut.so" in its.reason


def test_undefined_symbol_is_named(tmp_path: Path) -> None:
    its = refusal(compile_fixture(tmp_path / "undefined.so", UNDEFINED=True))
    assert its.stage == "open"
    assert "undefined symbol: nobody_has_this" in its.reason


def test_library_without_the_entry_is_refused(tmp_path: Path) -> None:
    its = refusal(compile_fixture(tmp_path / "other.so", ENTRY_NAME="another_entry"))
    assert its.stage == "entry"
    assert "does not export infinilm_backend_entry" in its.reason


def test_rebuilt_file_is_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "rebuilt.so"
    path.write_bytes(b"")
    assert refusal(path).reason.startswith("the file is empty")
    path.unlink()
    compile_fixture(path)
    assert open_library(path).path == str(path)
    assert str(path) not in {its.path for its in refused_libraries()}


# ---------------------------------------------------------------- refused for what it says


@pytest.mark.parametrize(
    ("macros", "reason", "found"),
    [
        ({"NO_TABLE": True}, "it has none for a host of ABI 1.0", ""),
        ({"MAGIC": 12345}, "its magic number is 0x0000000000003039, and not 0x4241434b494e464c", ""),
        ({"MAJOR": 2}, "it was built for ABI 2.0, and this infinilm 0.1.0 has ABI 1.0; take a newer infinilm", "2.0"),
        (
            {"MAJOR": 0, "MINOR": 7},
            "it was built for ABI 0.7, and this infinilm 0.1.0 has ABI 1.0; ask for a newer",
            "0.7",
        ),
        ({"TABLE_SIZE": 55}, "it says that it has 55 bytes, and its head alone has 56", "1.0"),
        ({"TABLE_SIZE": 56}, "the function probe is missing", "1.0"),
        ({"TABLE_SIZE": 199}, "the function forward is missing", "1.0"),
        ({"WITHOUT_FORWARD": True}, "the function forward is missing, and every backend needs it", "1.0"),
    ],
)
def test_wrong_table_is_refused(tmp_path: Path, macros: dict[str, object], reason: str, found: str) -> None:
    its = refusal(compile_fixture(tmp_path / "table.so", **macros))
    assert (its.stage, its.abi_found) == ("table", found)
    assert reason in its.reason


@pytest.mark.parametrize("name", ["", "two words", "a" * 65, "caf\u00e9"])
def test_name_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    its = refusal(compile_fixture(tmp_path / "name.so", NAME=name))
    assert its.stage == "name"
    assert "letters, digits" in its.reason


def test_second_library_of_a_name_is_refused_and_both_files_are_named(good: Path, tmp_path: Path) -> None:
    name = open_library(good).name
    second = compile_fixture(tmp_path / "second.so", NAME=name)
    its = refusal(second)
    assert its.stage == "name"
    assert its.reason.startswith(f"it is called '{name}', and so is '{good}', which is loaded")
    assert its.path == str(second)


def test_newer_file_in_the_place_of_a_loaded_one_needs_a_new_process(good: Path, tmp_path: Path) -> None:
    name = open_library(good).name
    copy_of(good, tmp_path / "copy.so").replace(good)
    its = refusal(good)
    assert "an older version of this file is loaded" in its.reason
    assert name in its.reason


def test_library_that_says_no_is_refused_in_its_own_words(tmp_path: Path) -> None:
    its = refusal(compile_fixture(tmp_path / "probe.so", PROBE_MESSAGE="there is no acme0 here"))
    assert (its.stage, its.reason, its.abi_found) == ("probe", "there is no acme0 here", "1.0")


def test_create_that_fails_is_refused_and_not_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", logger="infinilm.native")
    path = compile_fixture(tmp_path / "create.so", CREATE_MESSAGE="the device is busy")
    assert refusal(path) == refusal(path) == Refusal(str(path), "create", "the device is busy", "1.0", "1.x")
    assert [record.getMessage() for record in caplog.records] == ["probed"]
    loads = subprocess.run(["grep", "-c", "create.so", f"/proc/{os.getpid()}/maps"], capture_output=True, check=False)
    assert int(loads.stdout) > 0, "a library must stay mapped once its entry has run"


def test_message_of_any_length_and_encoding_is_shown(tmp_path: Path) -> None:
    assert refusal(compile_fixture(tmp_path / "long.so", CREATE_LONG_MESSAGE=True)).reason == "x" * 1024
    path = compile_library(
        tmp_path / "latin.so",
        FIXTURE,
        f'-DNAME="{unique_name()}"',
        r'-DCREATE_MESSAGE="caf\351 \355\240\200 \xe2\x82\xac"',
    )
    assert refusal(path).reason == "caf\ufffd \ufffd\ufffd\ufffd \u20ac"


def test_create_that_gives_nothing_is_refused(tmp_path: Path) -> None:
    its = refusal(compile_fixture(tmp_path / "none.so", CREATE_WITHOUT_BACKEND=True))
    assert its.reason == "create returned INFINILM_OK and no backend"


ENTRY_THROWS = """
#include <stdexcept>
#include "infinilm/backend.h"
const infinilm_backend_table *infinilm_backend_entry(uint32_t, uint32_t) { throw std::runtime_error("no"); }
"""


def test_entry_that_throws_is_refused(tmp_path: Path) -> None:
    its = refusal(compile_library(tmp_path / "throws.so", ENTRY_THROWS, language="c++"))
    assert its.stage == "entry"
    assert "let an exception through" in its.reason


STATIC_THROW = """
#include <stdexcept>
#include "infinilm/backend.h"
static int thrown = [] () -> int { throw std::runtime_error("too early"); }();
const infinilm_backend_table *infinilm_backend_entry(uint32_t, uint32_t) { return thrown ? nullptr : nullptr; }
"""


def test_static_constructor_that_throws_poisons_the_process_and_says_so(tmp_path: Path) -> None:
    bad = compile_library(tmp_path / "static.so", STATIC_THROW, language="c++")
    good = compile_fixture(tmp_path / "good.so")
    code = """
import sys, os
from infinilm.native.libraries import open_library
for path in sys.argv[1:]:
    try:
        open_library(path)
    except ImportError as err:
        print(err, flush=True)
os._exit(0)
"""
    done = run_python(code, bad, good)
    first, second = done.stdout.splitlines()
    assert "stage 'open': a static constructor threw an exception" in first
    assert re.search(r"good.so' is refused .* a static constructor of '.*static.so' threw an exception before", second)


def test_nothing_is_loaded_at_import(good: Path) -> None:
    code = "import infinilm, infinilm.plugins, sys; print('infinilm._native' in sys.modules)"
    env = {**os.environ, "INFINILM_BACKEND_PLUGINS": str(good)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == "False"


LOADS_IN_A_THREAD = """
import sys, threading
from infinilm.native.libraries import loaded_libraries, open_library, refused_libraries
threads = [threading.Thread(target=open_library, args=(sys.argv[1],))]
threads += [threading.Thread(target=ask) for ask in (loaded_libraries, refused_libraries)]
for thread in threads:  # those that ask wait for the first, which will want to log
    thread.start()
with open(sys.argv[2], "w") as pipe:  # opens once the library waits at the other end, if Python runs on meanwhile
    pipe.write("x")
for thread in threads:
    thread.join()
print("loaded")
"""


@pytest.mark.parametrize("stage", ["OPEN_WAITS", "PROBE_WAITS", "CREATE_WAITS"])
def test_python_runs_on_while_a_library_is_loaded(tmp_path: Path, stage: str) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    path = compile_fixture(tmp_path / "waits.so", **{stage: str(pipe)})
    assert run_python(LOADS_IN_A_THREAD, path, pipe, timeout=30).stdout == "loaded\n"
