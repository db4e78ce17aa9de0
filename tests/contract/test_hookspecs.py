"""The hooks of this version as golden data, and the template their documentation follows."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from infinilm_hookspecs import hookspecs
from infinilm_hookspecs.markers import PROJECT_NAME

# Changing a line here breaks plugins that are published: add an argument or a hook, never take one away.
GOLDEN = {
    "provide_platform": ("() -> 'type[Platform] | str | None'", False),
    "open_checkpoint": ("(source: 'str') -> 'Checkpoint | None'", False),
    "adapt_config": ("(config: 'Config') -> 'Config | DecoderConfig | None'", True),
    "provide_backend": ("(request: 'BackendRequest') -> 'Backend | None'", True),
    "provide_torch_module": ("(part: 'Named', config: 'DecoderConfig') -> 'Callable[[], Module] | None'", True),
    "remap_weight": ("(config: 'Config') -> 'WeightRule | None'", True),
    "select_processor": (
        "(lineage: 'Sequence[Config | DecoderConfig]', checkpoint: 'Checkpoint') -> 'Processor | None'",
        True,
    ),
    "provide_logits_processors": (
        "(processor: 'Processor | None') -> 'Mapping[str, LogitsProcessorFactory] | None'",
        False,
    ),
}

HOOKS: dict[str, Any] = {n: f for n, f in vars(hookspecs).items() if hasattr(f, f"{PROJECT_NAME}_spec")}


def test_hooks_are_those_of_this_version_in_order() -> None:
    found = {n: (str(inspect.signature(f)), bool(f.infinilm_spec["firstresult"])) for n, f in HOOKS.items()}
    assert found == GOLDEN
    assert list(found) == list(GOLDEN)


@pytest.mark.parametrize("name", GOLDEN)
def test_documentation_follows_the_template(name: str) -> None:
    doc = inspect.getdoc(HOOKS[name]) or ""
    labels = ["Called when:", "Return:", "`None` means:", "Dispatch:", "Args:", "Raises:", "Example:"]
    if not inspect.signature(HOOKS[name]).parameters:
        labels.remove("Args:")
    at = [doc.find(label) for label in labels]
    assert -1 not in at, f"{name} lacks {labels[at.index(-1)]}"
    assert at == sorted(at)
    for argument in inspect.signature(HOOKS[name]).parameters:
        assert f"\n    {argument}: " in doc
    assert (HOOKS[name].infinilm_spec["firstresult"] is True) == ("Dispatch: firstresult" in doc)
