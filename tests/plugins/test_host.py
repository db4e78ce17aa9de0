"""The plugin manager: what it refuses at registration, who answered, and how exclusive hooks are settled."""

from __future__ import annotations

import types
from collections.abc import Generator, Mapping
from typing import Any

import pluggy
import pytest

from infinilm.plugins import Answer, PluginManager
from infinilm.plugins.host import hook_note
from infinilm_hookspecs import PluginError, hookimpl

Config = Mapping[str, Any]


def adapter(model_type: str, becomes: str) -> object:
    class Adapter:
        @hookimpl
        def adapt_config(self, config: Config) -> Config | None:
            return {**config, "model_type": becomes} if config["model_type"] == model_type else None

    return Adapter()


# ---------------------------------------------------------------- registration


def test_misspelt_hook_is_refused_and_leaves_nothing_behind(pm: PluginManager) -> None:
    class Misspelt:
        @hookimpl
        def adapt_confg(self, config: Config) -> None: ...

    before = pm.list_name_plugin()
    with pytest.raises(PluginError, match=r"implements 'adapt_confg', which is no hook, did you mean 'adapt_config'\?"):
        pm.register(Misspelt(), "misspelt")
    assert pm.list_name_plugin() == before
    assert "misspelt" not in {record.name for record in pm.records}


def test_argument_a_hook_does_not_have_is_refused(pm: PluginManager) -> None:
    class Greedy:
        @hookimpl
        def open_checkpoint(self, source: str) -> None: ...

        @hookimpl
        def adapt_config(self, config: Config, tensors: object) -> None: ...

    before = {name: len(pm.hook.__dict__[name].get_hookimpls()) for name in ("open_checkpoint", "adapt_config")}
    with pytest.raises(PluginError, match=r"plugin 'greedy' is refused(.|\n)*tensors"):
        pm.register(Greedy(), "greedy")
    assert {name: len(pm.hook.__dict__[name].get_hookimpls()) for name in before} == before
    assert not pm.has_plugin("greedy")


def test_undecorated_function_is_refused(pm: PluginManager) -> None:
    plugin = types.ModuleType("forgetful")
    plugin.adapt_config = lambda config: None  # type: ignore[attr-defined]  # a module made by hand
    with pytest.raises(PluginError, match=r"'forgetful' has no hook; adapt_config lacks the @hookimpl"):
        pm.register(plugin)


def test_foreign_marker_is_refused(pm: PluginManager) -> None:
    class Foreign:
        @pluggy.HookimplMarker("pytest")
        def adapt_config(self, config: Config) -> None: ...

    with pytest.raises(PluginError, match=r"has no hook; adapt_config lacks the @hookimpl of infinilm_hookspecs"):
        pm.register(Foreign())


def test_class_instead_of_instance_is_refused(pm: PluginManager) -> None:
    with pytest.raises(PluginError, match="register an instance of it"):
        pm.register(type(adapter("a", "b")))


def test_name_taken_is_refused(pm: PluginManager) -> None:
    pm.register(adapter("a", "b"), "twice")
    with pytest.raises(PluginError, match="'twice' is refused"):
        pm.register(adapter("c", "d"), "twice")


def test_unnamed_instance_is_named_after_its_class(pm: PluginManager) -> None:
    assert pm.register(adapter("a", "b")) == f"{__name__}.adapter.<locals>.Adapter"


def test_property_of_a_plugin_is_not_run(pm: PluginManager) -> None:
    class Careful:
        @property
        def expensive(self) -> None:
            raise AssertionError("read at registration")

        @hookimpl
        def adapt_config(self, config: Config) -> None: ...

    pm.register(Careful())


# ---------------------------------------------------------------- who answered


def test_answer_names_the_plugin_asked_last_registered_first(pm: PluginManager) -> None:
    pm.register(adapter("acme", "first"), "first")
    pm.register(adapter("acme", "second"), "second")
    answer = pm.ask_first("adapt_config", config={"model_type": "acme"})
    assert answer == Answer({"model_type": "second"}, "second")
    answer = pm.ask_first("adapt_config", exclude={"second"}, config={"model_type": "acme"})
    assert answer == Answer({"model_type": "first"}, "first")
    assert pm.ask_first("adapt_config", config={"model_type": "nobody's"}) is None


def test_wrapper_answers_only_for_what_it_changed(pm: PluginManager) -> None:
    class Wrapper:
        @hookimpl(wrapper=True)
        def adapt_config(self, config: Config) -> Generator[None, Config | None, Config | None]:
            adapted = yield
            return {**adapted, "patched": True} if adapted and "patch" in config else adapted

    pm.register(adapter("acme", "llama"), "owner")
    pm.register(Wrapper(), "wrapper")
    untouched = pm.ask_first("adapt_config", config={"model_type": "acme"})
    assert untouched is not None
    assert untouched.plugin == "owner"
    patched = pm.ask_first("adapt_config", config={"model_type": "acme", "patch": 1})
    assert patched == Answer({"model_type": "llama", "patch": 1, "patched": True}, "wrapper")


def test_exception_keeps_its_type_and_names_plugin_and_hook(pm: PluginManager) -> None:
    class Broken:
        @hookimpl
        def adapt_config(self, config: Config) -> Config:
            return {"hidden_size": config["width"]}

    pm.register(Broken(), "broken")
    with pytest.raises(KeyError) as caught:
        pm.ask_first("adapt_config", config={"model_type": "acme"})
    assert hook_note(caught.value) == "in plugin 'broken', hook adapt_config"


def test_exception_through_a_wrapper_blames_the_plugin_that_raised(pm: PluginManager) -> None:
    class Broken:
        @hookimpl
        def adapt_config(self, config: Config) -> Config:
            raise ValueError("no")

    class Wrapper:
        @hookimpl(wrapper=True)
        def adapt_config(self, config: Config) -> Generator[None, Config, Config]:
            return (yield)

    pm.register(Broken(), "broken")
    pm.register(Wrapper(), "wrapper")
    with pytest.raises(ValueError, match="no") as caught:
        pm.ask_first("adapt_config", config={})
    assert caught.value.__notes__ == ["in plugin 'broken', hook adapt_config"]


# ---------------------------------------------------------------- exclusive hooks


def opener(claim: object, overrides: tuple[str, ...] = ()) -> object:
    class Opener:
        @hookimpl
        def open_checkpoint(self, source: str) -> object:
            return claim

    plugin = Opener()
    plugin.overrides = overrides  # type: ignore[attr-defined]  # an optional attribute of plugins
    return plugin


def discovered(pm: PluginManager, name: str, plugin: object) -> None:
    from infinilm.plugins.report import Origin, PluginRecord, Status

    pm.register(plugin, record=PluginRecord(name, Status.ACTIVE, Origin.ENTRY_POINT, name, "1.0"))


def test_one_claim_is_taken(pm: PluginManager) -> None:
    discovered(pm, "zip", opener("zipped"))
    assert pm.ask_one("open_checkpoint", source="/m") == Answer("zipped", "zip")


def test_two_claims_are_an_error_that_names_both_and_the_way_out(pm: PluginManager) -> None:
    discovered(pm, "zip", opener("zipped"))
    discovered(pm, "tar", opener("tarred"))
    with pytest.raises(PluginError) as caught:
        pm.ask_one("open_checkpoint", source="/m")
    assert str(caught.value) == (
        "open_checkpoint('/m') is claimed by plugins 'tar' (tar 1.0) and 'zip' (zip 1.0); "
        "settle it with -p no:tar or -p no:zip"
    )


def test_claim_the_user_named_beats_discovered_ones(pm: PluginManager) -> None:
    pm.register(opener("mine"), "mine")
    discovered(pm, "zip", opener("zipped"))
    assert pm.ask_one("open_checkpoint", source="/m") == Answer("mine", "mine")


def test_discovered_claim_beats_another_it_overrides(pm: PluginManager) -> None:
    discovered(pm, "zip", opener("zipped"))
    discovered(pm, "better_zip", opener("better", overrides=("zip",)))
    assert pm.ask_one("open_checkpoint", source="/m") == Answer("better", "better_zip")


def test_claim_the_user_named_beats_one_that_would_override_it(pm: PluginManager) -> None:
    pm.register(opener("mine"), "mine")
    discovered(pm, "better", opener("better", overrides=("mine",)))
    assert pm.ask_one("open_checkpoint", source="/m") == Answer("mine", "mine")


def test_cpu_is_the_platform_when_no_other_claims(pm: PluginManager) -> None:
    class Acme:
        @hookimpl
        def provide_platform(self) -> str:
            return "acme:Platform"

    found = pm.ask_one("provide_platform", exclude={"cuda"})
    assert found is not None
    assert found.plugin == "cpu"
    discovered(pm, "acme", Acme())
    assert pm.ask_one("provide_platform", exclude={"cuda"}) == Answer("acme:Platform", "acme")
    by_name = pm.ask_one("provide_platform", exclude=pm.others("cpu"))
    assert by_name is not None
    assert by_name.plugin == "cpu"
