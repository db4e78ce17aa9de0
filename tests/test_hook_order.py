"""The hook calls of a whole load, in order, and none after it."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from infinilm import LLM, SamplingParams
from infinilm.plugins import PluginManager
from infinilm.plugins.discovery import import_file
from infinilm_hookspecs import Config, DecoderConfig, Named, PlanError, hookimpl

MINIMAL = Path(__file__).parent.parent / "example_plugins" / "minimal"

EXPECTED = [
    "provide_platform",
    "open_checkpoint",
    "adapt_config",  # abacus -> llama
    "adapt_config",  # llama -> DecoderConfig
    "provide_backend",
    "remap_weight",  # abacus
    "remap_weight",  # llama
    "select_processor",
    "provide_logits_processors",
]


def test_modules_of_named_parts_are_asked_for_while_a_backend_is_chosen(pm: PluginManager) -> None:
    calls: list[str] = []

    class Squares:
        @hookimpl(wrapper=True)
        def adapt_config(self, config: Config) -> Generator[None, Any, Any]:
            adapted = yield
            if not isinstance(adapted, DecoderConfig):
                return adapted
            layers = tuple(replace(layer, mlp=Named("square")) for layer in adapted.layers)
            return replace(adapted, layers=layers)

        @hookimpl
        def provide_torch_module(self, part: Named, config: DecoderConfig) -> object:
            assert calls[-2:] == ["provide_backend", "provide_torch_module"]
            return torch.nn.Identity

    pm.register(import_file(MINIMAL / "infinilm_minimal.py"), "minimal")
    pm.register(Squares(), "squares")
    pm.add_hookcall_monitoring(lambda hook, impls, arguments: calls.append(hook), lambda *_: None)
    with pytest.raises(PlanError, match=r"mlp.gate_proj.weight .* is no parameter of this model"):
        LLM(MINIMAL / "model", plugin_manager=pm)
    expected = EXPECTED[: EXPECTED.index("select_processor")]  # what the plan stops
    at = expected.index("provide_backend") + 1
    assert calls == [*expected[:at], "provide_torch_module", *expected[at:]]  # once, for all layers have the same part


def test_hooks_of_a_load_and_of_a_generation(pm: PluginManager) -> None:
    calls: list[str] = []

    def before(hook: str, impls: object, arguments: dict[str, Any]) -> None:
        calls.append(hook)

    def after(outcome: object, hook: str, impls: object, arguments: dict[str, Any]) -> None: ...

    pm.register(import_file(MINIMAL / "infinilm_minimal.py"), "minimal")
    pm.add_hookcall_monitoring(before, after)
    with LLM(MINIMAL / "model", plugin_manager=pm) as llm:
        assert calls == EXPECTED
        assert len(llm.plan.parameters) > 20  # none of those calls was for one tensor
        llm.generate(["one plus one is", "two plus two is"], SamplingParams(temperature=0, max_tokens=12))
    assert calls == EXPECTED
