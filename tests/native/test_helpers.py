"""The header-only C++ helpers: the guard, structs of other sizes, and the strict reading of JSON."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_abi import INCLUDE, ROOT

from infinilm_hookspecs import DecoderConfig

UNSUPPORTED, INVALID = 3, 2


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("helpers") / "helpers"
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror", "-fsanitize=address,undefined"]
    source = ROOT / "csrc" / "tests" / "helpers.cpp"
    subprocess.run(["g++", *flags, f"-I{INCLUDE}", str(source), "-o", str(path)], check=True)
    return path


def run(program: Path, what: str, text: str | bytes = b"") -> tuple[int, str]:
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    done = subprocess.run([program, what], input=data, capture_output=True, check=False)
    out = done.stderr if done.returncode else done.stdout
    return done.returncode, out.decode("utf-8", "replace")


def test_guard_stops_everything_and_cuts_at_a_whole_character(program: Path) -> None:
    lines = run(program, "guard")[1].splitlines()
    assert lines[:8] == [
        "0 ",
        "3 no",
        "77 mine",
        "5 out of memory",
        "2 bad",
        "1 broken",
        "1 something that is no std::exception was thrown",
        "1 something that is no std::exception was thrown",
    ]
    assert lines[8:] == ["3 " + "x" * 1022, "3 " + "x" * 1022 + "y", "3 -" + "x" * 1021 + "y"]


def test_structs_are_written_as_far_as_the_caller_has_room(program: Path) -> None:
    assert run(program, "give")[1].splitlines() == [
        "16 -1 -1 -1 -1",
        "24 1 -1 -1 -1",
        "48 1 2 3 4",
        "4096 1 2 3 4",
    ]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=json_values, ascii=st.booleans())
def test_json_is_read_as_python_reads_it(program: Path, value: Any, ascii: bool) -> None:
    code, out = run(program, "json", json.dumps(value, ensure_ascii=ascii))
    assert code == 0, out
    assert json.loads(out, strict=False) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1,]",
        '{"a":1,}',
        '{"a" 1}',
        "{1:2}",
        '"abc',
        '"\\x"',
        '"\\u12"',
        '"\\ud800"',
        '"\\ud800\\u0041"',
        '"a\nb"',
        "tru",
        "+1",
        "1 2",
        "NaN",
        "Infinity",
        "1e999",
        "--1",
        "1.2.3",
        '{"a":1,"a":2}',
        "[" * 100,
        "\x00",
    ],
)
def test_text_that_is_no_json_is_an_error_with_its_place(program: Path, text: str) -> None:
    code, out = run(program, "json", text)
    assert code == INVALID, out
    assert "this is no JSON: " in out
    assert " at byte " in out


GOOD: dict[str, Any] = {"size": 1, "layers": [{"width": 2}, {"width": 3}]}


@pytest.mark.parametrize(
    ("changes", "total"),
    [
        ({}, 16),
        ({"more": 0}, 6),
        ({"more": None, "extra": None}, 16),
        ({"extra": {"n": 5}, "eps": 1, "bias": True}, 21),
    ],
)
def test_what_is_left_out_is_at_its_default(program: Path, changes: dict[str, Any], total: int) -> None:
    assert run(program, "strict", json.dumps({**GOOD, **changes})) == (0, f"{total}\n")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**GOOD, "new": 1}, "the config has 'new', which this backend does not know"),
        ({**GOOD, "new": None, "newer": 0}, "the config has 'new', 'newer', which this backend does not know"),
        ({"size": 1, "layers": [{"width": 2}, {"width": 3, "depth": 1}]}, "layers[1] has 'depth', which"),
        ({**GOOD, "extra": {"n": 1, "kind": "x"}}, "extra has 'kind', which"),
        ({"layers": []}, "size is missing"),
        ({**GOOD, "size": 1.5}, "size is not an integer"),
        ({**GOOD, "size": "1"}, "size is not an integer"),
        ({**GOOD, "size": 2**64}, "size is not an integer"),
        ({**GOOD, "eps": "x"}, "eps is not a number"),
        ({**GOOD, "bias": 1}, "bias is not true or false"),
        ({**GOOD, "kind": 1}, "kind is not a string"),
        ({**GOOD, "layers": {}}, "layers is not an array"),
        ({**GOOD, "layers": [3]}, "layers[0] is no object"),
        ([], "the config is no object"),
    ],
)
def test_what_a_backend_does_not_know_is_declined_by_name(program: Path, config: Any, message: str) -> None:
    code, out = run(program, "strict", json.dumps(config))
    assert code == UNSUPPORTED
    assert message in out


def test_every_config_of_the_house_is_read(program: Path) -> None:
    from native_fixtures import CONFIG

    config: DecoderConfig = CONFIG
    code, out = run(program, "json", config.to_json())
    assert code == 0
    assert json.loads(out) == json.loads(config.to_json())
