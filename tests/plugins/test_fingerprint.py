"""Fingerprints: the same plugins in another process, or a text that says what differs."""

from __future__ import annotations

import multiprocessing
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from distributions import install_good

from infinilm.plugins import Fingerprint, ModelSpec, create_plugin_manager
from infinilm_hookspecs import PluginError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    install_good(tmp_path, "apple", "apple")
    (tmp_path / "by_file.py").write_text((tmp_path / "apple_module.py").read_text().replace("apple", "file"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "apple_module", raising=False)
    return tmp_path


def load_again(path: str, text: str) -> str:
    """Run in a spawned child: load the same plugins, and return their fingerprint."""
    sys.path.insert(0, path)
    return create_plugin_manager(like=Fingerprint.from_json(text)).fingerprint().to_json()


def test_spawned_child_arrives_at_the_same_fingerprint(folder: Path) -> None:
    fingerprint = create_plugin_manager(plugins=[str(folder / "by_file.py"), "no:cuda"]).fingerprint()
    names = [entry.name for entry in fingerprint.entries]
    assert "apple" in names
    assert names[-1] == "by_file.py"
    assert "cuda" not in names
    assert all(entry.files for entry in fingerprint.entries)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(load_again, (str(folder), fingerprint.to_json())) == fingerprint.to_json()


def test_fingerprint_pickles_and_travels_as_json(folder: Path) -> None:
    fingerprint = create_plugin_manager().fingerprint()
    assert pickle.loads(pickle.dumps(fingerprint)) == fingerprint
    assert Fingerprint.from_json(fingerprint.to_json()) == fingerprint
    assert create_plugin_manager().explain_difference(fingerprint) == []


def test_a_spec_is_known_by_the_files_of_its_package(folder: Path) -> None:
    (folder / "spec_module.py").write_text(
        "from infinilm.plugins import ModelSpec\nspec = ModelSpec(model_type='acme', backend_model_type='llama')\n"
    )
    fingerprint = create_plugin_manager(plugins=["spec_module:spec"]).fingerprint()
    entry = fingerprint.entries[-1]
    assert (entry.name, list(entry.files)) == ("spec_module:spec", ["spec_module.py"])


def test_difference_is_named_line_by_line(folder: Path) -> None:
    pm = create_plugin_manager()
    before = pm.fingerprint()
    apple = next(entry for entry in before.entries if entry.name == "apple")
    others = [entry for entry in before.entries if entry.name != "apple"]
    other = Fingerprint((replace(apple, version="0.9", files={**apple.files, "apple_module.py": "0"}), *others[1:]))
    assert pm.explain_difference(other) == [
        f"plugin {others[0].name!r} is there in addition",
        "plugin 'apple' has the version 1.0, and had 0.9",
        "plugin 'apple' differs in apple_module.py",
    ]
    reordered = Fingerprint((*others, apple))
    if [e.name for e in reordered.entries] != [e.name for e in before.entries]:
        (line,) = pm.explain_difference(reordered)
        assert line.startswith("the order is ")


def test_changed_file_is_refused_with_that_text(folder: Path) -> None:
    fingerprint = create_plugin_manager().fingerprint()
    path = folder / "apple_module.py"
    path.write_text(path.read_text() + "# changed\n")
    with pytest.raises(PluginError, match=r"not those of the other process:\n  plugin 'apple' differs in apple_mod"):
        create_plugin_manager(like=fingerprint)


def test_plugin_that_is_gone_is_refused(folder: Path) -> None:
    fingerprint = create_plugin_manager(plugins=[str(folder / "by_file.py")]).fingerprint()
    (folder / "by_file.py").unlink()
    with pytest.raises(PluginError, match=r"plugin file '.*by_file.py' does not exist"):
        create_plugin_manager(like=fingerprint)


def test_object_that_cannot_be_loaded_again_says_so(folder: Path) -> None:
    spec = ModelSpec(model_type="acme", backend_model_type="llama")
    fingerprint = create_plugin_manager(plugins=[spec]).fingerprint()
    with pytest.raises(PluginError, match=r"'model_spec:acme' is an object of the process that registered it"):
        create_plugin_manager(like=fingerprint)
