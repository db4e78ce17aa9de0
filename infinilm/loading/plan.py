"""The load plan: every parameter's weight, found and checked from headers before a byte of a tensor is read.

A plan is made by running each stage's rule over all weights at once, joining the parts of one name between stages, and
holding the result against the backend's parameters. All errors are collected. Knows no files and no torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from infinilm.loading.collector import collector_paused
from infinilm.loading.coverage import Run, Usage
from infinilm.loading.dequantize import start_walk, unpack
from infinilm.loading.messages import group_messages
from infinilm.loading.stages import Stage, Walk
from infinilm_hookspecs import ParameterSpec, PlanError, Quantization, Weight
from infinilm_hookspecs.dtypes import ITEM_SIZES, is_lossless
from infinilm_hookspecs.strided import Piece, Source
from infinilm_hookspecs.types import StoredTensor

_NUMBER = re.compile(r"([0-9]+)")


class PlannedParameter(NamedTuple):
    """One parameter and the weight that fills it. `twins` are other stored copies that must be equal to it."""

    name: str
    spec: ParameterSpec
    weight: Weight
    twins: tuple[Weight, ...] = ()

    def losses(self) -> tuple[str, ...]:
        """Return what is lost on the way from the stored values, in words."""
        losses = self.weight.losses()
        if not is_lossless(self.weight.dtype_name, self.spec.dtype):
            losses = (*losses, f"{self.weight.dtype_name} to {self.spec.dtype}")
        return losses


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What is read from where into which parameter.

    `dropped` maps the stored tensors that are not loaded, or only in part, to the plugin that dropped the rest.
    """

    parameters: tuple[PlannedParameter, ...]
    dropped: Mapping[str, str]
    errors: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all parameters, in the dtypes the backend keeps them in."""
        return sum(p.weight.numel() * ITEM_SIZES[p.spec.dtype] for p in self.parameters)

    def check(self, hint: str = "") -> None:
        """Raise `PlanError` with every error there is, alike ones folded into one line, and `hint` at the end."""
        if not self.errors:
            return
        lines = group_messages(self.errors) + ([hint.strip()] if hint else [])
        raise PlanError(
            f"the checkpoint does not fit the model, {len(self.errors)} "
            f"{'problem' if len(self.errors) == 1 else 'problems'}:\n  " + "\n  ".join(lines)
        )


@collector_paused()
def plan_load(
    tensors: Mapping[str, StoredTensor],
    stages: Sequence[Stage],
    parameters: Mapping[str, ParameterSpec],
    quantization: Quantization | None = None,
) -> LoadPlan:
    """Return the plan that fills `parameters` from `tensors` through the rules of `stages`, first to last.

    Tensors that `quantization` says belong together are one weight to the rules, dequantized at load, unless the
    parameters have its parts as they are stored: `X:weight`, `X:scale` and so on, by role, for an `X`. Never raises for
    a misfit between them: what is wrong is in `LoadPlan.errors`. An exception inside a rule that is not a `WeightError`
    propagates with a note naming the plugin and the weight.
    """
    walk = start_walk(tensors, quantization)
    for stage in stages:
        walk.run(stage)
    unpack(walk, parameters)
    ties = _ties(parameters)
    planned = _match(walk.weights, parameters, ties, walk.errors)
    tied = {name for kept, others in ties.items() for name in (kept, *others)}
    errors = dict.fromkeys([*walk.errors, *_find_unused(tensors, walk, tied)])
    dropped = {name: plugin for plugin, weight in walk.dropped for name in weight.stored_names()}
    return LoadPlan(tuple(planned), dropped | walk.partly, tuple(errors))


def _match(
    weights: Mapping[str, Weight],
    parameters: Mapping[str, ParameterSpec],
    ties: Mapping[str, Sequence[str]],
    errors: list[str],
) -> list[PlannedParameter]:
    """Pair weights with parameters by name, and say of every one that has no match, or not the shape, what is wrong."""
    planned: list[PlannedParameter] = []
    missing: list[str] = []
    for name, spec in parameters.items():
        if spec.tied_to is not None:
            continue
        weight = weights.get(name)
        if weight is not None and weight.shape == spec.shape and name not in ties:
            planned.append(PlannedParameter(name, spec, weight))
            continue
        copies = [weights[n] for n in (name, *ties.get(name, ())) if n in weights]
        if not copies:
            missing.append(name)
            continue
        errors += [
            f"{copy.name} is {list(copy.shape)} from {copy.origin()}, and the model needs {list(spec.shape)}"
            for copy in copies
            if copy.shape != spec.shape
        ]
        weight = copies[0]
        twins = tuple(copy for copy in copies[1:] if copy.pieces is not weight.pieces)
        planned.append(PlannedParameter(name, spec, weight, twins))
    unknown = weights.keys() - parameters.keys()
    unexpected = [weight for name, weight in weights.items() if name in unknown] if unknown else []
    errors += _describe_missing(missing, [weight.name for weight in unexpected])
    errors += [_describe_unexpected(weight) for weight in unexpected]
    return planned


def _ties(parameters: Mapping[str, ParameterSpec]) -> dict[str, list[str]]:
    """Return the parameters that others are tied to, with those others."""
    ties: dict[str, list[str]] = {}
    for name, spec in parameters.items():
        if spec.tied_to is not None:
            ties.setdefault(spec.tied_to, []).append(name)
    return ties


def _describe_unexpected(weight: Weight) -> str:
    origin = weight.origin()
    where = "" if origin == weight.name else f" from {origin}"
    return (
        f"{weight.name} {list(weight.shape)}{where} is no parameter of this model; "
        "rename it in a weight rule, or return DROP for it"
    )


def _describe_missing(missing: Iterable[str], unexpected: Iterable[str]) -> list[str]:
    """Say what is missing, and which unexpected name of the same layer is spelt like it."""
    spelt = {_without_numbers(name): name for name in unexpected}
    kinds = list(dict.fromkeys(kind for kind, _ in spelt))
    nearest: dict[str, str | None] = {}
    messages = []
    for name in missing:
        kind, numbers = _without_numbers(name)
        if kind not in nearest:
            close = difflib.get_close_matches(kind, kinds, n=1, cutoff=0.7) if len(kinds) < 1000 else []
            nearest[kind] = close[0] if close else None
        meant = spelt.get((nearest[kind] or "", numbers))
        messages.append(f"{name} is missing" + (f"; did a rule mean it by {meant}?" if meant else ""))
    return messages


def _without_numbers(name: str) -> tuple[str, tuple[str, ...]]:
    pieces = _NUMBER.split(name)
    return "#".join(pieces[::2]), tuple(pieces[1::2])


def _find_unused(tensors: Mapping[str, StoredTensor], walk: Walk, tied: set[str]) -> list[str]:
    """Say which tensors lose elements that nobody dropped, or give them twice to parameters that are not tied."""
    uses, found = _collect_uses([*walk.weights.values(), *(weight for _, weight in walk.dropped)])
    excused = {*walk.partly, *walk.reported}
    usage = Usage()
    messages = []
    for use in uses:
        if use.is_plain:
            continue
        runs, runs_of_steps = list(map(_run_of, use.pieces)), list(map(_run_of, use.pieces_of_steps))
        unused, repeated = usage.count(use.volume, [*runs, *runs_of_steps])
        if unused and use.is_accountable and excused.isdisjoint(use.stored_names):
            messages.append(
                f"{unused} of {use.volume} elements of {use.what} go nowhere (used: {', '.join(use.targets)}); "
                "return DROP beside the weights if that is meant"
            )
        if repeated and runs_of_steps:  # computing with an element as often as one likes is no mistake
            _, repeated = usage.count(use.volume, runs)
        if repeated and not use.targets.keys() <= tied:
            messages.append(f"{repeated} elements of {use.what} are used more than once, in {', '.join(use.targets)}")
    found.update(name for use in uses for name in use.stored_names)
    forgotten = tensors.keys() - found - excused
    messages += [
        f"{volume} of {volume} elements of {name} go nowhere; return DROP for it if that is meant"
        for name, stored in (tensors.items() if forgotten else ())
        if name in forgotten and (volume := prod(stored.shape))
    ]
    return messages


class _Use:
    """What is taken from one source: by weights, and by the deferred steps behind them."""

    __slots__ = ("pieces", "pieces_of_steps", "source", "targets")

    def __init__(self, source: Source) -> None:
        self.source = source
        self.pieces: list[Piece] = []
        self.pieces_of_steps: list[Piece] = []
        self.targets: dict[str, None] = {}  # names of the weights, in order

    @property
    def volume(self) -> int:
        return prod(self.source.shape)

    @property
    def is_plain(self) -> bool:
        """Whether one weight, or one deferred step, takes everything as it is: true of most."""
        pieces = self.pieces or self.pieces_of_steps
        return len(self.pieces) + len(self.pieces_of_steps) == 1 and pieces[0].axes is None

    @property
    def is_accountable(self) -> bool:
        """Whether an element that is not used is one that was stored."""
        deferred = self.source.deferred
        return deferred is None or deferred.inverse is not None or deferred.parts is not None

    @property
    def stored_names(self) -> tuple[str, ...]:
        deferred = self.source.deferred
        if deferred is None:
            return (self.source.name,)
        return tuple(dict.fromkeys(name for tensor in deferred.inputs for name in tensor.stored_names()))

    @property
    def what(self) -> str:
        deferred = self.source.deferred
        names = ", ".join(self.stored_names[:3]) + (", ..." if len(self.stored_names) > 3 else "")
        return names if deferred is None else f"what {deferred.label} makes of {names}"


def _collect_uses(weights: Iterable[Weight]) -> tuple[list[_Use], set[str]]:
    """Return what is taken from every source that `weights` come from, each deferred step's inputs counted once.

    A stored tensor that one weight takes whole, as most are taken, is only named, in the set.
    """
    uses: dict[int, _Use] = {}
    whole: dict[int, Weight] = {}  # by their sources, as `uses`
    for weight in weights:
        pieces = weight.pieces
        if len(pieces) == 1 and pieces[0].axes is None and pieces[0].source.deferred is None:
            source = id(pieces[0].source)
            if source not in uses and whole.setdefault(source, weight) is weight:
                continue
        for piece in pieces:
            _use_of(piece, weight.name, uses, whole).pieces.append(piece)
    return list(uses.values()), {weight.pieces[0].source.name for weight in whole.values()}


def _use_of(piece: Piece, target: str, uses: dict[int, _Use], whole: dict[int, Weight]) -> _Use:
    """Return the use of the source of `piece`; where it is a deferred step met first, take note of its inputs."""
    use = uses.get(id(piece.source))
    if use is None:
        use = uses[id(piece.source)] = _Use(piece.source)
        first = whole.pop(id(piece.source), None)
        if first is not None:
            use.pieces.append(first.pieces[0])
            use.targets[first.name] = None
        for tensor in piece.source.deferred.inputs if piece.source.deferred else ():
            for inner in tensor.pieces:
                _use_of(inner, target, uses, whole).pieces_of_steps.append(inner)
    use.targets[target] = None
    return use


def _run_of(piece: Piece) -> Run:
    return piece.offset, tuple(atom for axis in piece.layout() for atom in axis)
