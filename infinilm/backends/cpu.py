"""The CPU backend: infinilm's own kernels, in a library that comes through the same door as anybody's.

This module is one half of the plugin `cpu`, the other is the platform. Nothing is loaded before there is a model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from infinilm.native.libraries import open_library
from infinilm.native.paths import library_path
from infinilm_hookspecs import BackendRequest, PluginError, hookimpl

if TYPE_CHECKING:
    from infinilm.native.backend import NativeBackend


@hookimpl
def provide_backend(request: BackendRequest) -> NativeBackend | None:
    """Run the last config of the lineage on the CPU, where it is a `DecoderConfig` made of parts the library knows."""
    if request.device != "cpu":
        request.decline(f"the cpu backend runs on the CPU, and the device is {request.device!r}")
        return None
    try:
        library = open_library(library_path("infinilm_cpu"))
    except PluginError as err:
        request.decline(str(err))  # a processor that is too old, or no compiler when infinilm was installed
        return None
    if not request.is_named and library.native.query("cpu.level") == 0:
        request.decline("this processor lacks AVX2, and without it torch is faster; --backend cpu runs it all the same")
        return None
    return library.provide_backend(request)
