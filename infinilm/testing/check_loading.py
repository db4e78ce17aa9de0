"""Checks of a load: where parameters go, in which order, again with other values, and how it all ends."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from infinilm.testing.subject import Subject, load
from infinilm.testing.verdicts import ConformanceError, NotApplicable, require
from infinilm_hookspecs import Backend, ParameterSpec, PlanError

_NO_PARAMETER = "no.such.parameter"


def check_destinations(subject: Subject) -> None:
    """`destination(name)` is a buffer of the parameter's shape and dtype, the same until it is loaded, and no other's.

    Loading opens several and fills them from several threads, in pieces.
    """
    with subject.made() as backend:
        values = subject.values(backend.parameters())
        for name, value in values.items():
            buffer = backend.destination(name)
            is_fit = buffer.shape == value.shape and buffer.dtype == value.dtype
            have, want = (f"{str(it.dtype).removeprefix('torch.')}{tuple(it.shape)}" for it in (buffer, value))
            require(is_fit, f"destination({name!r}) is {have}, and its spec says {want}")
            buffer.detach().copy_(value)
        for name, value in values.items():
            held = backend.destination(name).detach().cpu()
            require(
                _is_same(held, value),
                f"destination({name!r}) no longer holds what was written to it before loaded({name!r}): a fresh buffer "
                "when asked again, or one that overlaps another parameter's",
            )


def check_unknown_parameter(subject: Subject) -> None:
    """`destination` of a name that is no parameter raises `KeyError`: a typo must not become a buffer nobody reads."""
    with subject.made() as backend:
        backend.parameters()
        try:
            buffer = backend.destination(_NO_PARAMETER)
        except KeyError:
            return
        raise ConformanceError(f"destination({_NO_PARAMETER!r}) returned {type(buffer).__name__}; raise KeyError")


def check_load_order(subject: Subject) -> None:
    """Parameters may come in any order, one after the other or all open at once.

    A checkpoint's files decide the order, and a byte budget how many are open.
    """
    tokens = subject.prompt(subject.length)
    for order in ("backwards", "shuffled", "all open at once"):
        with subject.made() as backend:
            values = list(subject.values(backend.parameters()).items())
            values.reverse()
            if order != "backwards":
                random.Random(0).shuffle(values)
            if order == "all open at once":
                _load_all_open(backend, dict(values))
            else:
                load(backend, dict(values))
            bench = subject.allocated(backend)
            logits = bench.step([(bench.start(tokens), len(tokens))])
        subject.require_equal(logits, subject.expected(tokens), f"parameters loaded {order}")


def check_missing_parameter(subject: Subject) -> None:
    """`finish_loading` raises `PlanError` naming a parameter that was never `loaded`.

    Memory that nobody filled must not answer a user.
    """
    with subject.made() as backend:
        names = list(subject.values(backend.parameters()))
    for missing in dict.fromkeys((names[0], names[len(names) // 2], names[-1])):
        with subject.made() as backend:
            values = subject.values(backend.parameters())
            del values[missing]
            try:
                load(backend, values)
            except PlanError as err:
                require(missing in str(err), f"finish_loading() did not name {missing!r}, which is missing: {err}")
                continue
        raise ConformanceError(f"finish_loading() did not raise PlanError, and {missing!r} was never loaded")


def check_second_load(subject: Subject) -> None:
    """A second load goes the same way as the first and replaces it, on the cache there is.

    That is an update of weights while the engine serves. What was derived from the first ones has to be derived again.
    """
    tokens = subject.prompt(subject.length)
    expected = subject.expected(tokens, seed=1)
    with subject.bench() as bench:
        before = bench.start(tokens)
        first = bench.step([(before, len(tokens))])
        bench.stop(before)
        load(bench.backend, subject.values(bench.backend.parameters(), seed=1))
        context = bench.start(tokens)
        subject.require_equal(bench.step([(context, len(tokens))]), expected, "after a second load of other values")
    is_other = float((first - expected).abs().max()) > 10 * subject.allowed(expected)
    require(is_other, "another set of parameters gives nearly the same logits; give the case `values` that differ more")


def check_kept_parameters(subject: Subject) -> None:
    """A backend that says `keeps_parameters = True` has every value in `destination(name)` after a load and a step.

    `LLM.export` writes from there, and an update writes to it: the address is the same after a second load.
    """
    with subject.bench() as bench:
        backend = bench.backend
        if not getattr(backend, "keeps_parameters", False):
            raise NotApplicable("the backend does not say keeps_parameters = True: it may pack and free its buffers")
        bench.step([(bench.start(subject.prompt(3)), 3)])
        specs = backend.parameters()
        addresses = _require_kept(backend, subject.values(specs))
        load(backend, subject.values(specs, seed=1))
        require(
            _require_kept(backend, subject.values(specs, seed=1)) == addresses,
            "keeps_parameters is True, and a second load has moved a destination",
        )


def check_close(subject: Subject) -> None:
    """`close()` is safe at any time and twice: before anything is loaded, half way through, and after a step.

    It is called where a load fails, and once more when the user lets go of the model.
    """
    for stage in ("a fresh backend", "a backend with one buffer open", "a loaded backend", "a backend that ran a step"):
        backend = subject.case.make()
        _bring_to(subject, backend, stage)
        for time in ("once", "twice"):
            try:
                backend.close()
            except Exception as err:
                raise ConformanceError(f"close() of {stage}, {time}: {type(err).__name__}: {err}") from err


def check_independence(subject: Subject) -> None:
    """Two backends in one process know nothing of each other: not their parameters, not their caches, not `close`."""
    tokens = subject.prompt(subject.length)
    half = len(tokens) // 2
    with subject.bench(seed=1) as one:
        context = one.start(tokens)
        first = one.step([(context, half)])
        with subject.bench() as other:
            logits = other.compute(other.start(tokens), [half, len(tokens) - half])
        logits_of_one = torch.cat([first, one.step([(context, len(tokens) - half)])])
    subject.require_equal(logits, subject.expected(tokens), "a second backend beside one with other parameters")
    subject.require_equal(logits_of_one, subject.expected(tokens, seed=1), "after another backend was run and closed")


def _load_all_open(backend: Backend, values: Mapping[str, Tensor]) -> None:
    buffers = {name: backend.destination(name) for name in values}
    for name, buffer in reversed(buffers.items()):
        buffer.detach().copy_(values[name])
    for name in values:
        backend.loaded(name)
    backend.finish_loading()


def _require_kept(backend: Backend, values: Mapping[str, Tensor]) -> Sequence[int]:
    """Return where the parameters lie, after making sure that they hold `values`."""
    buffers = {name: backend.destination(name).detach() for name in values}
    for name, buffer in buffers.items():
        require(
            _is_same(buffer.cpu(), values[name]),
            f"keeps_parameters is True, and destination({name!r}) holds other values than were loaded",
        )
    return [buffer.data_ptr() for buffer in buffers.values()]


def _bring_to(subject: Subject, backend: Backend, stage: str) -> None:
    if stage == "a fresh backend":
        return
    specs: Mapping[str, ParameterSpec] = backend.parameters()
    values = subject.values(specs)
    if stage == "a backend with one buffer open":
        backend.destination(next(iter(values)))
        return
    load(backend, values)
    if stage == "a backend that ran a step":
        bench = subject.allocated(backend)
        bench.step([(bench.start(subject.prompt(3)), 3)])


def _is_same(buffer: Tensor, value: Tensor) -> bool:
    """Compare bit for bit."""
    return torch.equal(*(it.reshape(-1).view(torch.uint8) for it in (buffer, value)))
