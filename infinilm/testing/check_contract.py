"""Checks of what a backend says before anything is loaded: who it is, what it needs, and what it does not run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from infinilm.testing.backend_case import ask
from infinilm.testing.decoders import UNKNOWN_KEY, UNKNOWN_NAME, with_unknown_keys, with_unknown_parts
from infinilm.testing.subject import Subject
from infinilm.testing.verdicts import ConformanceError, NotApplicable, require
from infinilm_hookspecs import Backend, DecoderConfig, ParameterSpec
from infinilm_hookspecs.dtypes import ITEM_SIZES

# What a backend may take to describe its parameters, as a share of the parameters themselves.
_SMALL: Final = 1 / 8
_LARGE_BYTES: Final = 2 << 30


def check_identity(subject: Subject) -> None:
    """A backend has every attribute and method of the protocol, a name, and one config of the lineage as its own.

    Weights walk the stages before `config`, so it has to be the very object that was passed in.
    """
    with subject.made() as backend:
        require(isinstance(backend, Backend), f"{backend!r} lacks {', '.join(_missing(backend))} of the protocol")
        require(isinstance(backend.name, str) and bool(backend.name), f"name is {backend.name!r}, and not a name")
        if subject.case.request is not None:
            lineage = subject.case.request.lineage
            require(
                any(backend.config is config for config in lineage),
                "config is none of the objects in request.lineage; keep the one you took, not a copy",
            )


def check_cache_spec(subject: Subject) -> None:
    """`cache_spec()` is the same every time, counts in whole tokens and bytes, and shares only what lies in blocks.

    The engine sizes the cache from it once, and shares prefixes block by block where `shareable`.
    """
    with subject.loaded() as backend:
        spec, again = backend.cache_spec(), backend.cache_spec()
    require(spec == again, f"cache_spec() said {spec}, and then {again}")
    for name, least in (("block_size", 1), ("bytes_per_block", 0), ("bytes_per_slot", 0)):
        value = getattr(spec, name)
        require(type(value) is int and value >= least, f"{name} is {value!r}, and not an int of at least {least}")
    require(
        spec.bytes_per_block > 0 or not spec.shareable,
        "bytes_per_block is 0 and shareable is True; what is not in blocks cannot be shared, say shareable=False",
    )


def check_parameters(subject: Subject) -> None:
    """`parameters()` says the same every time: shapes of whole parameters, dtypes of the contract, ties that lead home.

    The load plan is made of it before a byte is read, and an update makes another.
    """
    with subject.made() as backend:
        specs, again = backend.parameters(), backend.parameters()
        require(list(specs.items()) == list(again.items()), "parameters() says something else when asked again")
        require(bool(specs), "parameters() is empty")
        for name, spec in specs.items():
            where = f"parameter {name!r}"
            require(isinstance(spec, ParameterSpec), f"{where} is {spec!r}, and not a ParameterSpec")
            sizes = all(type(size) is int and size > 0 for size in spec.shape)
            require(isinstance(spec.shape, tuple) and sizes, f"{where} has shape {spec.shape!r}; positive ints, please")
            require(spec.dtype in ITEM_SIZES, f"{where} has dtype {spec.dtype!r}; known: {', '.join(ITEM_SIZES)}")
            if spec.tied_to is not None:
                target = specs.get(spec.tied_to)
                is_home = target is not None and target.tied_to is None and target.shape == spec.shape
                require(is_home, f"{where} is tied to {spec.tied_to!r}, no parameter of its shape with a buffer")


def check_parameters_allocate_nothing(subject: Subject) -> None:
    """Making a backend and asking for `parameters()` takes no memory for them: measured on a model of gigabytes.

    `infinilm inspect` does this on a laptop for models that would fill a cluster.
    """
    if subject.case.make_large is None:
        raise NotApplicable("the case has no make_large, a backend with gigabytes of parameters to measure")
    measure = partial(_measure, device_memory=subject.case.device_memory)
    measure(subject.case.make)  # whatever is imported with the first one is not what is asked about,
    _, usual = measure(subject.case.make)  # nor what any model takes: threads, for one
    specs, grown = measure(subject.case.make_large)
    num_bytes = sum(_num_bytes(spec) for spec in specs.values() if spec.tied_to is None)
    require(num_bytes >= _LARGE_BYTES, f"make_large makes parameters of {num_bytes} bytes; give it {_LARGE_BYTES}")
    for where, taken in grown.items():
        taken -= max(0, usual[where])
        require(
            taken <= num_bytes * _SMALL,
            f"{where} grew by {taken} bytes until parameters() had described {num_bytes} bytes of parameters; "
            "allocate a buffer when destination(name) is asked for it",
        )


def check_unknown_parts(subject: Subject) -> None:
    """`provide_backend` declines a mixer or an MLP that it does not know, by its name, and raises nothing.

    The next backend is asked then, and the user reads the reason.
    """
    for where, config in with_unknown_parts(_decoder_config(subject)):
        _require_decline(subject, config, where, UNKNOWN_NAME)


def check_unknown_keys(subject: Subject) -> None:
    """`provide_backend` declines a `DecoderConfig` with a key that it does not know, in any part, by the key's name.

    `to_json` leaves out what is at its default, so a key that is there changes the model. Contracts grow: a backend
    that overlooks what a newer one says runs another model than the user's, and nothing else would notice.
    """
    overlooked = []
    for where, config in with_unknown_keys(_decoder_config(subject)):
        try:
            _require_decline(subject, config, where, UNKNOWN_KEY)
        except ConformanceError as err:
            overlooked.append(str(err))
    require(not overlooked, "; ".join(overlooked))


def _decoder_config(subject: Subject) -> DecoderConfig:
    if subject.case.provide is None or subject.case.request is None:
        raise NotApplicable("the case has no `provide` and `request`, the plugin's hook and what to ask it")
    if not isinstance(subject.config, DecoderConfig):
        raise NotApplicable("the backend took a raw config and no DecoderConfig")
    return subject.config


def _require_decline(subject: Subject, config: DecoderConfig, where: str, unknown: str) -> None:
    case = subject.case
    assert case.provide is not None  # both were there for the config
    assert case.request is not None
    try:
        backend, reasons = ask(case.provide, replace(case.request, lineage=(config,)))
    except Exception as err:
        raise ConformanceError(
            f"{unknown!r} in {where}: provide_backend raised {type(err).__name__}: {err}; decline instead"
        ) from err
    if backend is not None:
        backend.close()
        raise ConformanceError(f"{unknown!r} in {where} was overlooked, and a backend made")
    require(
        any(unknown in reason for reason in reasons),
        f"{unknown!r} in {where} was declined with {'; '.join(reasons) or 'no reason'!r}, which does not name it",
    )


def _missing(backend: object) -> list[str]:
    names = {*vars(Backend), *Backend.__annotations__}
    return sorted(name for name in names if not name.startswith("_") and not hasattr(backend, name))


def _num_bytes(spec: ParameterSpec) -> int:
    size = ITEM_SIZES[spec.dtype]
    for length in spec.shape:
        size *= length
    return int(size)


def _measure(
    make: Callable[[], Backend], device_memory: Callable[[], int] | None
) -> tuple[Mapping[str, ParameterSpec], dict[str, int]]:
    """Return the parameters of a backend, and by how much memory grew until it had said them.

    That is what this process holds, what it touched at any time, and what a device holds.
    """
    _forget_peak()
    before = _memory(device_memory)
    backend = make()
    try:
        specs = backend.parameters()
        now = _memory(device_memory)
    finally:
        backend.close()
    return specs, {where: now[where] - before[where] for where in now}


def _memory(device_memory: Callable[[], int] | None) -> dict[str, int]:
    now = _process_memory()
    return now if device_memory is None else now | {"memory in use on the device": device_memory()}


def _forget_peak() -> None:
    """Let the peak of this process start at what it has now, where the system can (Linux, proc(5))."""
    with suppress(OSError):  # the peak then counts from the highest so far
        Path("/proc/self/clear_refs").write_text("5")


def _process_memory() -> dict[str, int]:
    status = Path("/proc/self/status")
    if not status.exists():
        return _peak_memory()
    lines: dict[str, Any] = dict(line.split(":", 1) for line in status.read_text().splitlines())
    fields = {"VmSize": "address space", "VmHWM": "peak of resident memory"}
    return {what: int(lines[key].split()[0]) * 1024 for key, what in fields.items()}


def _peak_memory() -> dict[str, int]:
    import resource

    unit = 1 if os.uname().sysname == "Darwin" else 1024
    return {"peak of resident memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
