"""The load plan: every parameter's weight, found and checked from headers before a byte of a tensor is read.

A plan is made by running each stage's rule over all weights at once, joining the parts of one name between stages, and
holding the result against the backend's parameters. All errors are collected. Knows no files and no torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from infinilm.loading.coverage import Run, Usage, find_hole_or_overlap
from infinilm.loading.messages import group_messages
from infinilm.loading.stages import Stage, Walk
from infinilm_hookspecs import ParameterSpec, PlanError, Weight
from infinilm_hookspecs.dtypes import ITEM_SIZES, is_lossless
from infinilm_hookspecs.strided import Piece, Source, StridedTensor
from infinilm_hookspecs.types import StoredTensor


@dataclass(frozen=True, slots=True)
class PlannedParameter:
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
    """What is read from where into which parameter. `dropped` maps stored names to the plugin that dropped them."""

    parameters: tuple[PlannedParameter, ...]
    dropped: Mapping[str, str]
    errors: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all parameters, in the dtypes the backend keeps them in."""
        return sum(p.weight.numel() * ITEM_SIZES[p.spec.dtype] for p in self.parameters)

    def check(self) -> None:
        """Raise `PlanError` with every error there is, alike ones folded into one line."""
        if not self.errors:
            return
        lines = group_messages(self.errors)
        raise PlanError(
            f"the checkpoint does not fit the model, {len(self.errors)} "
            f"{'problem' if len(self.errors) == 1 else 'problems'}:\n  " + "\n  ".join(lines)
        )


def plan_load(
    tensors: Mapping[str, StoredTensor], stages: Sequence[Stage], parameters: Mapping[str, ParameterSpec]
) -> LoadPlan:
    """Return the plan that fills `parameters` from `tensors` through the rules of `stages`, first to last.

    Never raises for a misfit between them: what is wrong is in `LoadPlan.errors`. An exception inside a rule that is
    not a `WeightError` propagates with a note naming the plugin and the weight.
    """
    walk = Walk({name: Weight.stored(name, stored.shape, stored.dtype) for name, stored in tensors.items()})
    for stage in stages:
        walk.run(stage)
    planned = _match(walk.weights, parameters, walk.errors)
    kept = [*walk.weights.values(), *(weight for _, weight in walk.dropped.values())]
    errors = (*walk.errors, *_find_unused(kept, walk.partly, _tied_names(parameters)))
    return LoadPlan(tuple(planned), {name: plugin for name, (plugin, _) in walk.dropped.items()}, errors)


def _match(
    weights: Mapping[str, Weight], parameters: Mapping[str, ParameterSpec], errors: list[str]
) -> list[PlannedParameter]:
    """Pair weights with parameters by name, and say of every one that has no match, or not the shape, what is wrong."""
    planned: list[PlannedParameter] = []
    for name, spec in parameters.items():
        if spec.tied_to is not None:
            continue
        copies = [weights[n] for n in (name, *_ties_of(name, parameters)) if n in weights]
        if not copies:
            continue
        weight, *twins = copies
        errors += _check_shape(name, spec, weight)
        planned.append(PlannedParameter(name, spec, weight, tuple(twins)))
    unexpected = [weight for name, weight in weights.items() if name not in parameters]
    found = {parameter.name for parameter in planned}
    missing = [name for name, spec in parameters.items() if spec.tied_to is None and name not in found]
    errors += _describe_missing(missing, [weight.name for weight in unexpected])
    errors += [
        f"{weight.name} {list(weight.shape)} is not a parameter of this model, from {weight.origin()}"
        for weight in unexpected
    ]
    return planned


def _ties_of(name: str, parameters: Mapping[str, ParameterSpec]) -> list[str]:
    return [other for other, spec in parameters.items() if spec.tied_to == name]


def _tied_names(parameters: Mapping[str, ParameterSpec]) -> set[str]:
    ties = {name: spec.tied_to for name, spec in parameters.items() if spec.tied_to is not None}
    return {*ties, *ties.values()}


def _check_shape(name: str, spec: ParameterSpec, weight: Weight) -> list[str]:
    if weight.shape != spec.shape:
        return [f"{name} is {list(weight.shape)} from {weight.origin()}, and the model needs {list(spec.shape)}"]
    if len(weight.pieces) == 1 and weight.pieces[0].place is not None:
        problem = find_hole_or_overlap([weight.pieces[0].place], spec.shape)
        return [f"{name} {problem}, from {weight.origin()}"]
    return []


def _describe_missing(missing: Iterable[str], unexpected: Sequence[str]) -> list[str]:
    messages = []
    for name in missing:
        close = difflib.get_close_matches(name, unexpected, n=1, cutoff=0.7) if len(unexpected) < 1000 else []
        hint = f"; did a rule mean it by {close[0]}?" if close else ""
        messages.append(f"{name} is missing{hint}")
    return messages


def _find_unused(weights: Iterable[Weight], partly: set[str], tied: set[str]) -> list[str]:
    """Say which stored tensors lose elements nobody dropped, or give them twice to parameters that are not tied."""
    runs: dict[int, list[Run]] = {}
    sources: dict[int, Source] = {}
    names: dict[int, dict[str, str]] = {}
    for weight, piece in _leaf_pieces(weights):
        key = id(piece.source)
        sources[key] = piece.source
        runs.setdefault(key, []).append((piece.offset, tuple(a for axis in piece.layout() for a in axis)))
        names.setdefault(key, {})[weight.name] = weight.origin()
    usage = Usage()
    messages = []
    for key, source in sources.items():
        if len(runs[key]) == 1 and len(runs[key][0][1]) == len(source.shape) and _is_whole(runs[key][0], source):
            continue
        targets = ", ".join(names[key])
        unused, repeated = usage.count(_volume(source), runs[key])
        if unused and source.name not in partly:
            messages.append(
                f"{unused} of {_volume(source)} elements of {source.name} go nowhere (used: {targets}); "
                "return DROP beside the weights if that is meant"
            )
        if repeated and not set(names[key]) <= tied:
            messages.append(f"{repeated} elements of {source.name} are used more than once, in {targets}")
    return messages


def _leaf_pieces(weights: Iterable[StridedTensor]) -> Iterable[tuple[StridedTensor, Piece]]:
    """Yield every piece of `weights` that comes from a stored tensor, those behind a deferred step once each."""
    seen: set[int] = set()
    for weight in weights:
        for piece in weight.pieces:
            deferred = piece.source.deferred
            if deferred is None:
                yield weight, piece
            elif id(deferred) not in seen:
                seen.add(id(deferred))
                for _, inner in _leaf_pieces(deferred.inputs):
                    yield weight, inner


def _is_whole(run: Run, source: Source) -> bool:
    return run[0] == 0 and tuple(size for size, _ in run[1]) == source.shape


def _volume(source: Source) -> int:
    return prod(source.shape)
