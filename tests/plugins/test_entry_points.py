"""What an entry point may be, loaded as often as needed, and what `load_plugin` keeps."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints_made import llama_tensors, write_folder
from distributions import GOOD, install

from infinilm import LLM
from infinilm.cli import main
from infinilm.plugins import (
    ModelSpec,
    adapt_config,
    create_plugin_manager,
    get_model_spec,
    load_plugin,
    load_plugins,
    register_model,
    registered_model_types,
    registry,
)
from infinilm.plugins.report import Origin, Status
from infinilm_hookspecs import PlanError, PluginError

SOURCES = {
    "hooks_module": GOOD.format(model_type="hooks"),
    "object_module": "from infinilm_hookspecs import hookimpl\nclass Plugin:\n    @hookimpl\n"
    "    def adapt_config(self, config):\n"
    "        if config['model_type'] == 'object': return {**config, 'model_type': 'llama'}\nplugin = Plugin()\n",
    "registering_module": "from infinilm.plugins import register_model\n"
    "register_model(model_type='registering', backend_model_type='llama')\n",
    "both_module": GOOD.format(model_type="both")
    + "from infinilm.plugins import register_model\n"
    + "register_model(model_type='both-too', backend_model_type='llama')\n",
    "spec_module": "from infinilm.plugins import ModelSpec\n"
    "spec = ModelSpec(model_type='spec', backend_model_type='llama')\n"
    "specs = [spec, ModelSpec(model_type='spec-2', backend_model_type='llama')]\n",
    "function_module": "from infinilm.plugins import register_model\ncalls = []\ndef register():\n"
    "    calls.append(1)\n"
    "    register_model(model_type='function', backend_model_type='llama', config_adapter=lambda config: config)\n",
}
ENTRY_POINTS = {
    "hooks": ("hooks_module", {"hooks"}),
    "object": ("object_module:plugin", {"object"}),
    "registering": ("registering_module", {"registering"}),
    "both": ("both_module", {"both", "both-too"}),
    "spec": ("spec_module:spec", {"spec"}),
    "specs": ("spec_module:specs", {"spec", "spec-2"}),
    "function": ("function_module:register", {"function"}),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the import path; what is imported from it, or registered, is forgotten afterwards."""
    for name, source in SOURCES.items():
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_registry", registry._Registry())
    yield tmp_path
    for name in SOURCES:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_entry_point_of_every_kind_loaded_three_times_changes_nothing(folder: Path, name: str) -> None:
    target, model_types = ENTRY_POINTS[name]
    install(folder, f"{name}-dist", f"{name} = {target}")
    fingerprints = []
    for _ in range(3):
        pm = create_plugin_manager(plugins=["no:minimal"])
        assert (pm.record(name).status, pm.record(name).origin) == (Status.ACTIVE, Origin.ENTRY_POINT)
        for model_type in model_types:
            answer = pm.ask_first("adapt_config", config={"model_type": model_type})
            assert answer is not None
            assert answer.plugin in (name, f"{name}:models")
            assert answer.value["model_type"] == "llama"
        fingerprints.append(pm.fingerprint())
    assert fingerprints[0] == fingerprints[1] == fingerprints[2]


def test_module_imported_before_by_somebody_else_still_brings_what_it_registered(folder: Path) -> None:
    import registering_module  # type: ignore[import-not-found]  # made by the fixture

    assert registering_module
    install(folder, "registering-dist", "registering = registering_module")
    answer = create_plugin_manager().ask_first("adapt_config", config={"model_type": "registering"})
    assert answer is not None
    assert answer.value == {"model_type": "llama"}


def test_function_that_registers_nothing_is_refused(folder: Path) -> None:
    (folder / "idle_module.py").write_text("def register(): ...")
    with pytest.raises(PluginError, match="is a function that registered no model; call register_model in it"):
        create_plugin_manager(plugins=["idle_module:register"], autoload=False)


def test_module_range_is_checked_before_its_import(folder: Path) -> None:
    (folder / "too_new_module.py").write_text("requires_infinilm = '>=99'\nraise SystemError('imported all the same')")
    with pytest.raises(PluginError, match=r"'too_new_module' is refused: it requires infinilm>=99, and this is"):
        create_plugin_manager(plugins=["too_new_module"], autoload=False)
    with pytest.raises(PluginError, match=r"it requires infinilm>=99"):
        create_plugin_manager(plugins=[str(folder / "too_new_module.py")], autoload=False)


def test_failed_registration_leaves_no_spec_behind(folder: Path) -> None:
    (folder / "half_module.py").write_text(SOURCES["registering_module"] + "1 / 0")
    with pytest.raises(PluginError, match="ZeroDivisionError"):
        create_plugin_manager(plugins=["half_module"], autoload=False)
    assert get_model_spec("registering") is None
    assert registered_model_types() == []


def test_load_plugin_returns_the_module_and_later_managers_have_it_after_entry_points(folder: Path) -> None:
    module = load_plugin("hooks_module")
    assert module is sys.modules["hooks_module"]
    (folder / "filed.py").write_text(GOOD.format(model_type="filed"))
    (filed,) = load_plugins(str(folder / "filed.py"))
    assert filed.model_types == ("filed",)
    pm = create_plugin_manager(plugins=["no:minimal"])
    assert [r.name for r in pm.records if r.origin is Origin.NAMED] == ["hooks_module", "filed.py"]
    assert adapt_config({"model_type": "filed", "x": 1}) == {"model_type": "llama", "x": 1}


def test_load_plugin_that_fails_is_not_remembered(folder: Path) -> None:
    with pytest.raises(PluginError, match="there is no plugin 'hooks_modul'"):
        load_plugin("hooks_modul")
    assert registry.remembered() == []


def test_user_may_take_a_model_type_over_and_a_discovered_plugin_may_not(folder: Path) -> None:
    (folder / "rival_module.py").write_text(GOOD.format(model_type="hooks"))
    install(folder, "hooks-dist", "hooks = hooks_module")
    install(folder, "rival-dist", "rival = rival_module")
    pm = create_plugin_manager()
    assert pm.record("rival").status is Status.FAILED
    assert "model_type 'hooks' belongs to plugin 'hooks' (hooks-dist 1.0)" in (pm.record("rival").error or "")
    pm = create_plugin_manager(plugins=["rival"])
    answer = pm.ask_first("adapt_config", config={"model_type": "hooks"})
    assert answer is not None
    assert answer.plugin == "rival"


def test_two_words_of_the_user_for_one_model_type_are_an_error(folder: Path) -> None:
    mine = ModelSpec(model_type="mine", backend_model_type="llama")
    other = ModelSpec(model_type="mine", backend_model_type="mistral")
    with pytest.raises(PluginError, match="model_type 'mine' belongs to plugin"):
        create_plugin_manager(plugins=[mine, other], autoload=False)


def test_nothing_registered_changes_nothing(folder: Path) -> None:
    config = {"model_type": "nobody", "x": [1, {"y": 2}]}
    assert adapt_config(config) == config
    register_model(model_type="somebody", backend_model_type="llama")
    assert adapt_config(config) == config


TRAPS = {
    "a_class": (
        "class Plugin:\n    @hookimpl\n    def adapt_config(self, config): ...",
        "a_class_module:Plugin",
        "is the class Plugin; register an instance of it",
    ),
    "unhashable": (
        "class Plugin:\n    __hash__ = None\n    @hookimpl\n    def adapt_config(self, config): ...\nplugin = Plugin()",
        "unhashable_module:plugin",
        "is unhashable, and plugins are kept in sets; give its class a __hash__",
    ),
    "extra_argument": (
        "@hookimpl\ndef adapt_config(config, tensors): ...",
        "extra_argument_module",
        "Argument(s) {'tensors'} are declared in the hookimpl but can not be found in the hookspec",
    ),
}


@pytest.mark.parametrize("name", TRAPS)
def test_trap_of_pluggy_is_an_error_of_the_distribution(folder: Path, name: str) -> None:
    source, target, message = TRAPS[name]
    modules = {f"{name}_module": f"from infinilm_hookspecs import hookimpl\n{source}\n"}
    install(folder, f"{name}-dist", f"{name} = {target}", modules=modules)
    record = create_plugin_manager().record(name)
    assert record.status is Status.FAILED
    assert message in (record.error or "")


def test_exception_of_an_installed_plugin_names_its_distribution(folder: Path) -> None:
    source = "from infinilm_hookspecs import hookimpl\n@hookimpl\ndef adapt_config(config): return config['width']\n"
    install(folder, "careless-dist", "careless = careless_module", modules={"careless_module": source})
    with pytest.raises(KeyError) as caught:
        create_plugin_manager().ask_first("adapt_config", config={"model_type": "any"})
    assert caught.value.__notes__ == ["in plugin 'careless' (careless-dist 1.0), hook adapt_config"]


def test_entry_point_called_as_an_in_tree_plugin_is_listed_as_failed(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    install(folder, "rival-dist", "llama = hooks_module")
    pm = create_plugin_manager()
    assert pm.record("llama").origin is Origin.IN_TREE
    record = pm.record("rival-dist:llama")
    assert record.status is Status.FAILED
    assert record.error == "an in-tree plugin is called 'llama'; rename the entry point"
    assert sum("rival-dist 1.0" in message for message in caplog.messages) == 1


def test_failed_plugins_are_named_where_weights_do_not_fit(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plugin that would have renamed the weights, and failed, is not far from the tensors that nobody knows."""
    install(folder, "broken-dist", "broken = broken_module", modules={"broken_module": "1 / 0"})
    model = write_folder(tmp_path / "model", {f"foreign.{name}": t for name, t in llama_tensors().items()})
    with pytest.raises(PlanError, match=r"1 discovered plugin failed to load: 'broken' \(broken-dist 1.0\)"):
        LLM(model)
    assert main(["inspect", str(model), "--json"]) == 2
    assert "'broken' (broken-dist 1.0)" in json.loads(capsys.readouterr().out)["errors"][-1]


def test_trace_is_kept_by_a_manager_loaded_like_another(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFINILM_TRACE_PLUGINS", "1")
    fingerprint = create_plugin_manager().fingerprint()
    assert create_plugin_manager(like=fingerprint).is_tracing
