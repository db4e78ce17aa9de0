"""What can be told without importing transformers: whether it is there, and what it is never asked to do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator, Mapping
from typing import Final

from infinilm_hookspecs import BackendRequest, Config

OLDEST_VERSION: Final = 5
DTYPES: Final = ("float32", "bfloat16", "float16", "float64")


def why_not(request: BackendRequest | None = None) -> str | None:
    """Return the first reason why nothing can be run, or not this; `None` where there is none."""
    return next(_reasons(request), None)


def _reasons(request: BackendRequest | None) -> Iterator[str]:
    if importlib.util.find_spec("transformers") is None:
        yield "transformers is not installed; run 'pip install transformers'"
        return
    version = importlib.metadata.version("transformers")
    if int(version.partition(".")[0]) < OLDEST_VERSION:
        yield f"transformers {OLDEST_VERSION} or newer is wanted, and {version} is installed"
    if request is None:
        return
    if request.dtype not in DTYPES:
        yield f"the transformers backend computes in {', '.join(DTYPES)}, not in {request.dtype!r}"
    if request.world_size != 1:
        yield f"the transformers backend runs in one process, and world_size is {request.world_size}"
    if request.quantization is not None:
        yield f"the transformers backend does not quantize, and quantization={request.quantization!r} was asked for"


def unknown_quantization(config: Config, request: BackendRequest) -> str | None:
    """Return why weights quantized as `config` states cannot be run, or `None`: the plan dequantizes what it knows."""
    stated = config.get("quantization_config")
    if not stated or request.checkpoint.quantization is not None:
        return None
    method = stated.get("quant_method") if isinstance(stated, Mapping) else stated
    return (
        f"the transformers backend runs weights that were dequantized at load, and no plugin knows how to dequantize "
        f"this layout of {method!r}"
    )
