"""The C ABI: it compiles everywhere it promises to, never moves what was published, and says what its header says."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from pathlib import Path

import pytest
from native_abi import GOLDEN, HEADER, INCLUDE, ROOT, Layout, fields_of_header, measure
from native_fixtures import batch, request

from infinilm import _native
from infinilm.native.libraries import open_library

FROZEN_BINARY = ROOT / "csrc" / "tests" / "abi_1_0_x86_64.so"


@pytest.fixture(scope="module")
def layout() -> Layout:
    return measure()


def version() -> tuple[int, int]:
    found = re.findall(r"#define INFINILM_ABI_(?:MAJOR|MINOR) (\d+)", HEADER.read_text())
    return int(found[0]), int(found[1])


@pytest.mark.parametrize(
    ("compiler", "standard"),
    [
        *(("gcc", standard) for standard in ("c99", "c11", "c17")),
        *(("g++", standard) for standard in ("c++11", "c++14", "c++17", "c++20")),
    ],
)
def test_header_compiles_without_a_warning(compiler: str, standard: str) -> None:
    language = "c" if compiler == "gcc" else "c++"
    flags = ["-Wall", "-Wextra", "-Wpedantic", "-Wpadded", "-Wconversion", "-Werror", f"-I{INCLUDE}", "-fsyntax-only"]
    command = [compiler, f"-std={standard}", *flags, "-x", language, "-"]
    subprocess.run(command, input='#include "infinilm/backend.h"\n', text=True, check=True)


def test_header_goes_with_somebody_elses_dlpack() -> None:
    torch_include = Path(pytest.importorskip("torch").__file__).parent / "include"
    code = '#include <ATen/dlpack.h>\n#include "infinilm/backend.h"\n' + "\n".join(
        f'static_assert(sizeof({name}) == {size}, "");'
        for name, size in (("DLTensor", 48), ("DLManagedTensorVersioned", 80), ("DLDataType", 4), ("DLDevice", 8))
    )
    command = ["g++", "-std=c++17", "-fsyntax-only", f"-I{INCLUDE}", f"-I{torch_include}", "-x", "c++", "-"]
    subprocess.run(command, input=code, text=True, check=True)
    own = code.replace("#include <ATen/dlpack.h>\n", "")
    subprocess.run(command, input=own, text=True, check=True)


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.stem)
def test_nothing_that_was_published_has_moved(golden: Path, layout: Layout) -> None:
    for struct, fields in json.loads(golden.read_text()).items():
        for field, place in fields.items():
            if field == "sizeof":
                assert layout[struct][field][0] >= place[0], f"{struct} has shrunk"
            else:
                assert layout[struct].get(field) == place, f"{struct}.{field} moved; a new field goes to the end"


def test_newest_golden_table_is_that_of_this_version(layout: Layout) -> None:
    newest = GOLDEN[-1]
    assert newest.stem == "abi_{}_{}".format(*version()), "freeze this version: tests/native_abi.py says how"
    assert json.loads(newest.read_text()) == layout, (
        "the header has fields that no version has: raise INFINILM_ABI_MINOR, and freeze it: tests/native_abi.py"
    )


def test_structs_have_no_padding_and_begin_alike(layout: Layout) -> None:
    for struct, fields in layout.items():
        places = [place for field, place in fields.items() if field != "sizeof"]
        ends = [offset + size for offset, size in places]
        assert [offset for offset, _ in places] == [0, *ends[:-1]], f"{struct} has a hole"
        assert fields["sizeof"][0] == ends[-1], f"{struct} ends in padding, which a new field would be taken for"
        names = list(fields)
        if struct == "infinilm_backend_table":
            assert names[:7] == ["magic", "abi_major", "abi_minor", "struct_size", "extension", "name", "version"]
            assert fields["build"] == [48, 8], "the head of the table is frozen for ever"
        else:
            assert fields["struct_size"] == [0, 8]
            assert names[1] in ("extension", "next")


def test_layouts_have_no_type_whose_size_is_anybodys_choice() -> None:
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    bodies = re.findall(r"struct infinilm_\w+ \{(.*?)\n\}", text, flags=re.DOTALL)
    assert len(bodies) == len(fields_of_header())
    for body in bodies:
        assert not re.search(r"\b(bool|_Bool|enum|long|short|unsigned|int|size_t|wchar_t)\b|:\s*\d", body)


def test_host_has_the_version_of_the_header() -> None:
    assert version() == _native.ABI_VERSION


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the frozen binary is for x86_64")
def test_binary_built_against_the_oldest_header_still_runs(tmp_path: Path) -> None:
    """Built once from `csrc/tests/fixture.c` at ABI 1.0, and never again: see `csrc/tests/freeze`."""
    library = open_library(FROZEN_BINARY)
    assert (library.name, library.abi) == ("frozen-1.0", "1.0")
    backend = library.provide_backend(request()[0])
    assert backend is not None
    backend.destination("table").fill_(2.0)
    backend.loaded("table")
    backend.finish_loading()
    backend.allocate_cache(2, 1)
    assert backend.forward(batch([5], [0])).tolist() == [[7.0] * 7]
    backend.copy_blocks([(0, 1)])
    backend.release([0])
    backend.cancel()
    backend.close()
    assert library.native.memory()["caches"] == 0
    assert library.native.query("deleters") == 1
