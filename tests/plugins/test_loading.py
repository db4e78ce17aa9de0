"""Where plugins come from: names of every kind, blocking, and what a failure does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from infinilm.plugins import create_plugin_manager
from infinilm.plugins.report import Origin, Status
from infinilm_hookspecs import PluginError

PLUGIN = """
from infinilm_hookspecs import hookimpl

class Adapter:
    @hookimpl
    def adapt_config(self, config):
        return {"model_type": "llama"} if config["model_type"] == "acme" else None

instance = Adapter()

@hookimpl
def adapt_config(config):
    return {"model_type": "llama"} if config["model_type"] == "acme" else None
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the import path, with a plugin in it as a module and as a file."""
    (tmp_path / "acme_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return tmp_path


def install(folder: Path, name: str, entry_points: str, version: str = "1.0") -> None:
    """Put a distribution's metadata on disk, where importlib.metadata finds it."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[infinilm]\n{entry_points}\n")


@pytest.mark.parametrize("name", ["acme_plugin", "acme_plugin:instance"])
def test_module_and_attribute_by_name(folder: Path, name: str) -> None:
    pm = create_plugin_manager(plugins=[name], autoload=False)
    answer = pm.ask_first("adapt_config", config={"model_type": "acme"})
    assert answer is not None
    assert answer.plugin == name
    assert pm.record(name).origin is Origin.NAMED


def test_file_by_path(folder: Path) -> None:
    pm = create_plugin_manager(plugins=[str(folder / "acme_plugin.py")], autoload=False)
    answer = pm.ask_first("adapt_config", config={"model_type": "acme"})
    assert answer is not None
    assert answer.plugin == "acme_plugin.py"


def test_entry_point_is_discovered_and_knows_its_distribution(folder: Path) -> None:
    install(folder, "acme-dist", "acme = acme_plugin")
    record = create_plugin_manager().record("acme")
    assert (record.status, record.origin) == (Status.ACTIVE, Origin.ENTRY_POINT)
    assert (record.distribution, record.version, record.hooks) == ("acme-dist", "1.0", ("adapt_config",))


def test_autoload_off_discovers_nothing_and_a_name_still_loads(folder: Path) -> None:
    install(folder, "acme-dist", "acme = acme_plugin")
    assert "acme" not in {record.name for record in create_plugin_manager(autoload=False).records}
    record = create_plugin_manager(plugins=["acme"], autoload=False).record("acme")
    assert (record.origin, record.distribution) == (Origin.NAMED, "acme-dist")


def test_order_is_in_tree_then_entry_points_by_name_then_named_then_registered(folder: Path) -> None:
    install(folder, "acme-dist", "zebra = acme_plugin:instance\napple = acme_plugin")
    named = str(folder / "acme_plugin.py")
    pm = create_plugin_manager(plugins=[named])
    names = [record.name for record in pm.records]
    in_tree = [record.name for record in pm.records if record.origin is Origin.IN_TREE]
    assert names[: len(in_tree)] == in_tree
    assert names.index("apple") < names.index("zebra") < names.index("acme_plugin.py")
    asked = [impl.plugin_name for impl in reversed(pm.hook.adapt_config.get_hookimpls())]
    assert asked.index("acme_plugin.py") < asked.index("zebra") < asked.index("apple") < asked.index("llama")


def test_blocked_plugins_are_listed_and_not_asked() -> None:
    pm = create_plugin_manager(plugins=["no:llama"], autoload=False)
    assert pm.record("llama").status is Status.BLOCKED
    assert not pm.has_plugin("llama")


@pytest.mark.parametrize(
    ("words", "active"), [(["no:llama", "llama"], True), (["llama", "no:llama"], False), (["llama", "llama"], True)]
)
def test_last_word_on_a_name_wins(words: list[str], active: bool) -> None:
    assert create_plugin_manager(plugins=words, autoload=False).has_plugin("llama") is active


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lama", r"there is no plugin 'lama': no entry point of group 'infinilm'.*did you mean 'llama'\?"),
        ("no:lama", r"-p no:lama blocks no plugin, did you mean 'llama'\?"),
        ("Hello, world", r"-p 'Hello, world' names no plugin:.*the prompt of a generation is --prompt"),
        ("", r"-p '' names no plugin"),
        ("/no/such/file.py", r"plugin file '/no/such/file.py' does not exist"),
        ("acme_plugin:nothing", r"plugin 'acme_plugin:nothing' cannot be loaded: AttributeError"),
    ],
)
def test_name_that_cannot_be_loaded_is_an_error(folder: Path, name: str, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        create_plugin_manager(plugins=[name], autoload=False)


def test_named_plugin_that_fails_to_import_is_fatal_with_its_cause(folder: Path) -> None:
    (folder / "broken_plugin.py").write_text("import a_module_that_is_not_there")
    with pytest.raises(PluginError, match=r"'broken_plugin' cannot be loaded: ModuleNotFoundError") as caught:
        create_plugin_manager(plugins=["broken_plugin"], autoload=False)
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_discovered_plugin_that_fails_is_isolated_listed_and_named_again(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "broken_plugin.py").write_text("import a_module_that_is_not_there")
    install(folder, "broken-dist", "broken = broken_plugin")
    install(folder, "acme-dist", "acme = acme_plugin")
    pm = create_plugin_manager()
    assert pm.record("acme").status is Status.ACTIVE
    assert pm.record("broken").status is Status.FAILED
    assert "a_module_that_is_not_there" in (pm.record("broken").error or "")
    assert caplog.messages == [
        "plugin 'broken' (broken-dist 1.0) failed to load: "
        "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"
    ]
    assert "1 discovered plugin failed to load: 'broken' (broken-dist 1.0)" in pm.failures()
