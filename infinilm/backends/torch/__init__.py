"""The torch backend: runs a `DecoderConfig` over ragged batches on a paged cache, on any device torch knows.

This module is the plugin, and where the authors of others find `Attention` and `ModuleBackend`, with which anybody's
torch module is a model. It imports torch only once there is a model to run.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from infinilm.backends.torch.support import named_parts, why_not
from infinilm_hookspecs import BackendRequest, DecoderConfig, Named, hookimpl

if TYPE_CHECKING:
    from torch.nn import Module

    from infinilm.backends.torch.attention_layer import Attention
    from infinilm.backends.torch.backend import TorchBackend
    from infinilm.backends.torch.module_backend import ModuleBackend

__all__ = ["Attention", "ModuleBackend", "provide_backend"]

_HOMES = {"Attention": "attention_layer", "ModuleBackend": "module_backend"}


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


@hookimpl
def provide_backend(request: BackendRequest) -> TorchBackend | None:
    """Run the last config of the lineage, where it is a `DecoderConfig` made of parts this backend knows."""
    config = request.lineage[-1]
    if not isinstance(config, DecoderConfig):
        model_type = config.get("model_type")
        request.decline(f"the torch backend runs a DecoderConfig, and no plugin made one of model_type {model_type!r}")
        return None
    factories = _find_factories(request, config)
    reason = why_not(request, config, factories)
    if reason is not None:
        request.decline(reason)
        return None

    from infinilm.backends.torch.backend import TorchBackend

    return TorchBackend(
        config, dtype=request.dtype, device=request.device, memory=request.platform.memory, factories=factories
    )


def _find_factories(request: BackendRequest, config: DecoderConfig) -> dict[str, Callable[[], Module]]:
    """Return what makes the module of each `Named` part, by path. Plugins are asked once for parts that are equal."""
    asked: list[tuple[Named, Callable[[], Module] | None]] = []
    found: dict[str, Callable[[], Module]] = {}
    for path, part in named_parts(config):
        if part not in (other for other, _ in asked):
            asked.append((part, request.torch_module(part, config)))
        factory = next(factory for other, factory in asked if other == part)
        if factory is not None:
            found[path] = factory
    return found
