"""Wrappers: a plugin that changes what the owner of a model answered, and how two of them nest."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from infinilm import LLM, SamplingParams
from infinilm.plugins import PluginManager, trace_lineage
from infinilm.plugins.discovery import import_file
from infinilm_hookspecs import DecoderConfig, Weight, WeightRule, hookimpl
from infinilm_hookspecs.rules import compile_rule

MINIMAL = Path(__file__).parent.parent.parent / "example_plugins" / "minimal"
Config = Mapping[str, Any]


class Patch:
    """Writes its name behind that of whoever patched before, where the owner of `acme` answered."""

    def __init__(self, name: str) -> None:
        self.name = name

    @hookimpl(wrapper=True)
    def adapt_config(self, config: Config) -> Generator[None, Config | DecoderConfig, Config | DecoderConfig]:
        adapted = yield
        if config["model_type"] != "acme" or isinstance(adapted, DecoderConfig) or adapted is None:
            return adapted
        return {**adapted, "patches": [*adapted.get("patches", []), self.name]}


class Acme:
    @hookimpl
    def adapt_config(self, config: Config) -> Config | None:
        return {**config, "model_type": "house"} if config["model_type"] == "acme" else None


def test_wrapper_registered_last_is_outermost_and_sees_what_the_others_made(pm: PluginManager) -> None:
    for plugin, name in ((Patch("first"), "first"), (Acme(), "acme"), (Patch("second"), "second")):
        pm.register(plugin, name)
    lineage = trace_lineage(pm, {"model_type": "acme"})
    assert lineage.configs[1] == {"model_type": "house", "patches": ("first", "second")}
    assert lineage.plugins == ("second",)


class WiderEps:
    """Changes one key of the config that the demo's plugin made, and one of its weights."""

    @hookimpl(wrapper=True)
    def adapt_config(self, config: Config) -> Generator[None, Any, Any]:
        adapted = yield
        return {**adapted, "rms_norm_eps": 0.5} if config["model_type"] == "abacus" else adapted

    @hookimpl(wrapper=True)
    def remap_weight(self, config: Config) -> Generator[None, WeightRule | None, WeightRule | None]:
        owners = yield
        if config["model_type"] != "abacus" or owners is None:
            return owners
        rule = compile_rule(owners)

        def halved(weight: Weight) -> Any:
            mapped = rule(weight)
            return mapped * 0.5 if isinstance(mapped, Weight) and "norm" in mapped.name else mapped

        return halved


def test_wrapper_changes_an_owners_config_and_rule(pm: PluginManager) -> None:
    pm.register(import_file(MINIMAL / "infinilm_minimal.py"), "minimal")
    pm.register(WiderEps(), "wider")
    with LLM(MINIMAL / "model", plugin_manager=pm) as llm:
        decoder = llm.lineage.configs[-1]
        assert isinstance(decoder, DecoderConfig)
        assert decoder.final_norm.eps == 0.5
        assert llm.lineage.plugins == ("wider", "llama")
        by_name = {parameter.name: parameter for parameter in llm.plan.parameters}
        assert by_name["model.norm.weight"].losses() == ("mul 0.5",)
        assert by_name["model.norm.weight"].weight.trail == ("wider",)
        (result,) = llm.generate("seven plus eight is", SamplingParams(temperature=0))
        assert result.outputs[0].text != " fifteen"
