"""The hook calls of a whole load, in order, and none after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from infinilm import LLM, SamplingParams
from infinilm.plugins import PluginManager
from infinilm.plugins.discovery import import_file

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
]


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
