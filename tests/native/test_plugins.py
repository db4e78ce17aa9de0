"""Backend libraries as plugins: in which ways one comes to a manager, who speaks for it, and what a list shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoint
from native_fixtures import CONFIG, FIXTURE, compile_fixture, request, run_python, unique_name

from infinilm import LLM
from infinilm.native.backend import NativeBackend
from infinilm.plugins import (
    ModelSpec,
    PluginManager,
    create_plugin_manager,
    load_backend_plugin,
    load_backend_plugins,
    load_backend_plugins_from_env,
    loaded_backend_plugins,
    registry,
)
from infinilm.plugins.loading import list_plugins
from infinilm.plugins.report import Status
from infinilm_hookspecs import BackendRequest, PluginError, UnavailableError, hookimpl


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have what is loaded for the process forgotten afterwards."""
    monkeypatch.setattr(registry, "_registry", registry._Registry())


@pytest.fixture
def acme(tmp_path: Path) -> Path:
    return compile_fixture(tmp_path / "acme.so")


def named(pm: PluginManager, path: Path) -> list[str]:
    return [record.name for record in pm.records if record.library == str(path)]


# ---------------------------------------------------------------- ways in


def test_library_that_is_loaded_is_a_plugin_of_every_later_manager(acme: Path) -> None:
    assert not named(create_plugin_manager(), acme)
    library = load_backend_plugin(acme)
    assert library in loaded_backend_plugins()
    for _ in range(2):
        pm = create_plugin_manager()
        assert named(pm, acme) == [library.name]
        assert pm.record(library.name).hooks == ("provide_backend",)
    pm = create_plugin_manager(plugins=[f"no:{library.name}"])
    assert pm.record(library.name).status is Status.BLOCKED
    assert pm.get_plugin(library.name) is None


def test_several_are_loaded_in_order(tmp_path: Path) -> None:
    paths = [compile_fixture(tmp_path / f"{letter}.so") for letter in "ab"]
    libraries = load_backend_plugins(*paths)
    assert [library.path for library in libraries] == [str(path) for path in paths]
    assert loaded_backend_plugins()[-2:] == libraries


@pytest.mark.parametrize("separator", [os.pathsep, ",", f"{os.pathsep},", " , "])
def test_libraries_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separator: str) -> None:
    paths = [compile_fixture(tmp_path / f"{letter}.so") for letter in "ab"]
    monkeypatch.setenv("INFINILM_BACKEND_PLUGINS", separator.join(map(str, paths)))
    pm = create_plugin_manager()
    assert [named(pm, path) for path in paths] == [[lib.name] for lib in load_backend_plugins_from_env()]
    assert not any(named(create_plugin_manager(autoload=False), path) for path in paths) or registry.remembered()


def test_path_with_a_comma_is_one_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a,b").mkdir()
    path = compile_fixture(tmp_path / "a,b" / "c.so")
    monkeypatch.setenv("INFINILM_BACKEND_PLUGINS", str(path))
    assert [library.path for library in load_backend_plugins_from_env()] == [str(path)]


def test_environment_without_the_variable_loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INFINILM_BACKEND_PLUGINS", raising=False)
    assert load_backend_plugins_from_env() == []


def test_library_of_the_environment_that_is_refused_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFINILM_BACKEND_PLUGINS", str(tmp_path / "typo.so"))
    for ask in (create_plugin_manager, load_backend_plugins_from_env):
        with pytest.raises(PluginError, match=r"typo.so' is refused at stage 'find'"):
            ask()
    (failed,) = [record for record in list_plugins() if record.status is Status.FAILED]
    assert "is refused at stage 'find'" in str(failed.error)


def test_library_is_named_by_its_path(acme: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(acme.parent)
    (name,) = named(create_plugin_manager(plugins=["./acme.so"]), acme)
    assert name == load_backend_plugin(acme).name


def test_library_may_be_given_as_an_object(acme: Path) -> None:
    library = load_backend_plugin(acme)
    registry._registry.named.clear()
    assert named(create_plugin_manager(plugins=[library]), acme) == [library.name]


def test_name_of_another_plugin_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "torch.so"
    subprocess.run(
        [
            "gcc",
            "-shared",
            "-fPIC",
            f"-I{FIXTURE.parent.parent / 'include'}",
            str(FIXTURE),
            "-o",
            str(path),
            '-DNAME="torch"',
        ],
        check=True,
    )
    load_backend_plugin(path)
    with pytest.raises(PluginError, match="plugin 'torch' is refused: another plugin has this name"):
        create_plugin_manager()


# ---------------------------------------------------------------- who speaks for it


def ask(pm: PluginManager, **changes: Any) -> NativeBackend | None:
    answer = pm.ask_first("provide_backend", request=request(**changes)[0])
    return None if answer is None else answer.value


class PythonHalf:
    """A plugin that loads its library once there is a model."""

    def __init__(self, path: Path, *, returns_library: bool) -> None:
        self.path = path
        self.returns_library = returns_library

    @hookimpl
    def provide_backend(self, request: BackendRequest) -> Any:
        library = load_backend_plugin(self.path)
        return library if self.returns_library else library.provide_backend(request)


@pytest.mark.parametrize("returns_library", [True, False])
def test_hook_may_answer_with_a_library_and_speaks_for_it(acme: Path, returns_library: bool) -> None:
    pm = PluginManager()
    pm.register(PythonHalf(acme, returns_library=returns_library), "half")
    answer = pm.ask_first("provide_backend", request=request()[0])
    assert answer is not None
    assert answer.plugin == "half"
    assert isinstance(answer.value, NativeBackend)
    answer.value.close()
    asked, reasons = request(dtype="bfloat16")
    assert pm.ask_first("provide_backend", request=asked) is None
    assert reasons[0].endswith("float32 is all there is")
    assert not named(create_plugin_manager(), acme), "a plugin speaks for the library that it loads"


def test_model_spec_names_the_library_of_its_models(acme: Path, tmp_path: Path) -> None:
    raw = {"model_type": "acme"}
    pm = PluginManager()
    pm.register(ModelSpec(model_type="acme", backend_plugin=acme))
    assert ask(pm, lineage=({"model_type": "other"}, CONFIG)) is None
    backend = ask(pm, lineage=(raw, CONFIG))
    assert isinstance(backend, NativeBackend)
    backend.close()


def test_model_spec_asks_several_libraries_in_order(tmp_path: Path) -> None:
    paths = [compile_fixture(tmp_path / f"{letter}.so") for letter in "ab"]
    spec = ModelSpec(model_type="acme", backend_plugins=paths, backend_plugin=paths[1])
    assert spec.backend_plugins == (paths[1], paths[0])
    pm = PluginManager()
    pm.register(spec)
    backend = ask(pm, lineage=({"model_type": "acme"}, CONFIG))
    assert backend is not None
    assert backend.name == load_backend_plugin(paths[1]).name
    backend.close()


def test_model_spec_whose_library_is_refused_is_an_error(tmp_path: Path) -> None:
    pm = PluginManager()
    pm.register(ModelSpec(model_type="acme", backend_plugin=tmp_path / "gone.so"))
    assert ask(pm) is None
    with pytest.raises(PluginError, match="refused at stage 'find'"):
        ask(pm, lineage=({"model_type": "acme"}, CONFIG))


# ---------------------------------------------------------------- what the user asks for reaches it


def test_quantization_is_asked_of_backends_and_those_that_cannot_say_so(tmp_path: Path) -> None:
    folder = tiny_checkpoint.write_model(tmp_path / "model")
    with pytest.raises(UnavailableError) as caught:
        LLM(folder, quantization="int9", dtype="float32")
    assert "the torch backend does not quantize, and quantization='int9' was asked for" in str(caught.value)
    assert "cpu: the cpu backend quantizes to int8" in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cpu_backend_is_taken_where_weights_are_to_be_quantized(tmp_path: Path, dtype: str) -> None:
    folder = tiny_checkpoint.write_model(tmp_path / "model")
    command = [
        sys.executable,
        "-m",
        "infinilm",
        "inspect",
        folder,
        "--quantization",
        "int8",
        "--dtype",
        dtype,
        "--json",
    ]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert report["backend"]["name"] == "cpu"
    assert not report["errors"]


# ---------------------------------------------------------------- other processes, and lists


def test_another_process_loads_the_same_library_or_says_what_differs(acme: Path) -> None:
    load_backend_plugin(acme)
    fingerprint = create_plugin_manager().fingerprint()
    code = """
import sys
from infinilm.plugins import Fingerprint, create_plugin_manager
pm = create_plugin_manager(like=Fingerprint.from_json(sys.argv[1]))
print(any(record.library for record in pm.records))
"""
    assert run_python(code, fingerprint.to_json()).stdout.strip() == "True"
    name = load_backend_plugin(acme).name
    acme.unlink()
    compile_fixture(acme, NAME=name, TELL_END=True)
    assert f"plugin '{name}' differs in acme.so" in run_python(code, fingerprint.to_json()).stderr


def test_list_shows_libraries_loaded_and_refused(acme: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.so"
    bad.write_text("nothing")
    env = {**os.environ, "INFINILM_BACKEND_PLUGINS": f"{acme}{os.pathsep}{bad}"}
    command = [sys.executable, "-m", "infinilm", "plugins", "list"]
    text = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    assert f": {acme}, ABI 1.0, fixture.c" in text
    assert f"backend library {bad}: refused at stage 'read': it is no ELF file" in text
    rows = json.loads(subprocess.run([*command, "--json"], env=env, capture_output=True, text=True, check=True).stdout)
    libraries = {row["library"]["path"]: row for row in rows if row["library"]}
    assert libraries[str(acme)]["status"] == "active"
    assert libraries[str(acme)]["library"]["stage"] == "loaded"
    assert libraries[str(bad)]["status"] == "failed"
    assert libraries[str(bad)]["library"]["stage"] == "read"


def test_unique_names_are_unique() -> None:
    assert unique_name() != unique_name()
