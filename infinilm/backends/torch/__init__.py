"""The torch backend: runs a `DecoderConfig` over ragged batches on a paged cache, on any device torch knows.

This module is the plugin. It imports torch only once there is a model to run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from infinilm.backends.torch.support import why_not
from infinilm_hookspecs import BackendRequest, DecoderConfig, hookimpl

if TYPE_CHECKING:
    from infinilm.backends.torch.backend import TorchBackend


@hookimpl
def provide_backend(request: BackendRequest) -> TorchBackend | None:
    """Run the last config of the lineage, where it is a `DecoderConfig` made of parts this backend knows."""
    config = request.lineage[-1]
    if not isinstance(config, DecoderConfig):
        model_type = config.get("model_type")
        request.decline(f"the torch backend runs a DecoderConfig, and no plugin made one of model_type {model_type!r}")
        return None
    reason = why_not(request, config)
    if reason is not None:
        request.decline(reason)
        return None

    from infinilm.backends.torch.backend import TorchBackend

    return TorchBackend(config, dtype=request.dtype, device=request.device, memory=request.platform.memory)
