"""`BackendLibrary`: a shared library that provides a backend, opened once a process and never closed.

A library is known by the file it is: links and other ways to write its path lead to the same one. What was refused is
remembered with the stage it came to, and is refused again without another try until the file is another.
"""

from __future__ import annotations

import atexit
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from infinilm_hookspecs import BackendRequest, DecoderConfig, PluginError, hookimpl

if TYPE_CHECKING:
    from infinilm import _native
    from infinilm.native.backend import NativeBackend

ENVIRONMENT: Final = "INFINILM_BACKEND_PLUGINS"

_EXIT_MS: Final = 2000  # how long the end of the process waits for a step that runs


@dataclass(frozen=True, slots=True)
class BackendLibrary:
    """A loaded library. It is a plugin: register it, or return it from a `provide_backend` of your own.

    `abi` is the version of the C ABI it was built for, `build` what it says of how it was built.
    """

    path: str
    name: str = field(compare=False)
    version: str = field(compare=False)
    build: str = field(compare=False)
    abi: str = field(compare=False)
    native: _native.Library = field(compare=False, repr=False)

    @property
    def plugin_name(self) -> str:
        """The name it is registered by."""
        return self.name

    @hookimpl
    def provide_backend(self, request: BackendRequest) -> NativeBackend | None:
        """Run the last config of the lineage, a `DecoderConfig`, where the library takes it."""
        from infinilm import _native

        config = request.lineage[-1]
        if not isinstance(config, DecoderConfig):
            model_type = config.get("model_type")
            request.decline(
                f"the {self.name} backend runs a DecoderConfig, and no plugin made one of model_type {model_type!r}"
            )
            return None
        if request.world_size != 1:
            request.decline(f"the {self.name} backend runs in one process, and world_size is {request.world_size}")
            return None
        asked = _as_asked(request, config)
        try:
            self.native.require_support(asked)
        except _native.CallError as err:
            message, code = err.args
            if code not in (_native.UNSUPPORTED, _native.UNAVAILABLE):
                raise PluginError(f"backend library {self.path!r} failed in supports_model: {message}") from err
            request.decline(message)
            return None

        from infinilm.native.backend import NativeBackend

        return NativeBackend(self.name, self.native, config, asked, memory=request.platform.memory)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a library is not used: the stage it came to, and the ABI versions where it came so far as to say one.

    Stages are "find", "read", "open", "entry", "table", "name", "probe" and "create".
    """

    path: str
    stage: str
    reason: str
    abi_found: str
    abi_wanted: str


def open_library(path: str | os.PathLike[str]) -> BackendLibrary:
    """Load the library at `path`, or return the one that this file is already.

    Raises `PluginError` with path, stage, versions, the linker's own words and what to do.
    """
    native = _native_module()
    try:
        return _described(native.load_library(os.fsencode(path)))
    except native.RefusedError as err:
        raise PluginError(err.args[0]) from err


def loaded_libraries() -> list[BackendLibrary]:
    """Return every library there is in this process, in the order they were loaded."""
    return [_described(library) for library in _native_module().loaded_libraries()]


def refused_libraries() -> list[Refusal]:
    """Return what was refused in this process, the latest word on each path."""
    return [Refusal(*refusal) for refusal in _native_module().refusals()]


def paths_in_environment() -> list[str]:
    """Return the paths in `INFINILM_BACKEND_PLUGINS`, which are separated by `os.pathsep`, or by commas."""
    paths: list[str] = []
    for item in os.environ.get(ENVIRONMENT, "").split(os.pathsep):
        paths += [item] if os.path.exists(item) else item.split(",")
    return [path.strip() for path in paths if path.strip()]


def is_library(name: str) -> bool:
    """Return whether a word that the user gave is the path of a library, by how it ends."""
    return name.endswith((".so", ".dylib")) or ".so." in os.path.basename(name)


def _described(native: _native.Library) -> BackendLibrary:
    return BackendLibrary(native.path, native.name, native.version, native.build, native.abi, native)


@cache
def _native_module() -> Any:
    """Import the extension, and see to it that libraries are told of the end of the process."""
    try:
        from infinilm import _native
    except ImportError as err:
        raise PluginError(
            f"this infinilm has no native part that works, so it loads no backend library: {err}; install it with "
            "'pip install .', which needs a C++ compiler"
        ) from err
    atexit.register(_native.shut_down, _EXIT_MS)
    return _native


def _as_asked(request: BackendRequest, config: DecoderConfig) -> _native.Request:
    from infinilm import _native

    return _native.Request(
        config=config.to_json(),
        dtype=request.dtype,
        device=request.device,
        quantization=request.quantization,
        stored_quantization=_stored_quantization(request),
        max_model_len=request.max_model_len,
        max_num_seqs=request.max_num_seqs,
    )


def _stored_quantization(request: BackendRequest) -> str | None:
    """Return how the checkpoint is quantized, as `infinilm_model_request.stored_quantization` has it."""
    stored, tensors = request.checkpoint.quantization, request.checkpoint.tensors
    if stored is None:
        return None

    def described(group: Mapping[str, str]) -> dict[str, object]:
        return {
            role: {"name": name, "shape": list(tensors[name].shape), "dtype": tensors[name].dtype}
            for role, name in group.items()
        }

    groups = {name: described(group) for name, group in request.stored_weights().items()}
    return json.dumps({"scheme": stored.scheme, "block_shape": list(stored.block_shape), "groups": groups})
