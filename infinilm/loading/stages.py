"""Running one stage's rule: all weights at once, then the parts of one name joined, whole or an error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from infinilm.loading.coverage import find_hole_or_overlap
from infinilm_hookspecs import DROP, Mapped, Weight, WeightError, WeightRule
from infinilm_hookspecs.rules import Drop, compile_rule
from infinilm_hookspecs.state_dicts import StateDictRule
from infinilm_hookspecs.strided import join
from infinilm_hookspecs.weight import SymbolicTensor


@dataclass(frozen=True, slots=True)
class Stage:
    """The rule of one stage of the lineage, and the plugin that gave it."""

    rule: WeightRule
    plugin: str


class RuleNote(str):
    """The note an exception gains when it leaves a weight rule."""

    __slots__ = ()


@dataclass(slots=True)
class Walk:
    """Weights on their way through the stages, and what became of the rest.

    `dropped` has the weights that were dropped whole, and `partly` the stored tensors whose rest was, with the plugin
    that said so. `reported` are the stored tensors that some error is already about. `packed` has the pieces of every
    dequantized weight as they begin, and what they are made of by role, under the identity of those pieces.
    """

    weights: dict[str, Weight]
    dropped: list[tuple[str, Weight]] = field(default_factory=list)
    partly: dict[str, str] = field(default_factory=dict)
    reported: set[str] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)
    packed: dict[int, tuple[object, Mapping[str, Weight]]] = field(default_factory=dict)

    def run(self, stage: Stage) -> None:
        """Run one stage. A `WeightError` of its rule is collected; another exception gains a note and propagates."""
        run = self._run_state_dict if isinstance(stage.rule, StateDictRule) else self._run_each
        made: dict[str, Weight] = {}
        parts_of: dict[str, list[Weight]] = {}  # of the names that are not one whole piece: few
        for weight in run(stage):
            first = made.setdefault(weight.name, weight)
            if first is not weight:
                parts_of.setdefault(weight.name, [first]).append(weight)
            elif len(weight.pieces) != 1 or weight.pieces[0].place is not None:
                parts_of[weight.name] = [weight]
        for name, parts in parts_of.items():
            made[name] = self._join(name, parts)
        self.weights = made

    def _run_each(self, stage: Stage) -> list[Weight]:
        rule = _compile(stage)
        made: list[Weight] = []
        for weight in self.weights.values():
            try:
                mapped = rule(weight)
                if type(mapped) is Weight:
                    if mapped is not weight:
                        mapped.trail = (*weight.trail, stage.plugin)
                    made.append(mapped)
                    continue
                mapped = _as_sequence(mapped)
            except WeightError as err:
                self._report(f"{weight.name} [plugin {stage.plugin}]: {err}", [weight])
                continue
            except Exception as err:
                err.add_note(RuleNote(f"in the weight rule of plugin {stage.plugin!r}, for {weight!r}"))
                raise
            if mapped is None:
                made.append(weight)
            elif all(one is DROP for one in mapped):
                self.dropped.append((stage.plugin, weight))
            else:
                made += self._take(mapped, weight, stage.plugin)
        return made

    def _take(self, mapped: Sequence[Weight | Drop], weight: Weight, plugin: str) -> list[Weight]:
        made: list[Weight] = []
        for one in mapped:
            if isinstance(one, Drop):
                self.partly |= dict.fromkeys(weight.stored_names(), plugin)
                continue
            if one is not weight:
                one.trail = (*weight.trail, plugin)
            made.append(one)
        return made

    def _run_state_dict(self, stage: Stage) -> list[Weight]:
        assert isinstance(stage.rule, StateDictRule)
        given = {
            name: SymbolicTensor(name, w.shape, w.dtype_name, w.pieces, w.trail) for name, w in self.weights.items()
        }
        try:
            returned = stage.rule.function(dict(given))
            items = _items(returned)
            made = [_named(name, value, given, stage.plugin) for name, value in items if not isinstance(value, Drop)]
        except WeightError as err:
            self._report(f"the remapper of plugin {stage.plugin}: {err}", self.weights.values())
            return []
        except Exception as err:
            err.add_note(RuleNote(f"in the state-dict remapper of plugin {stage.plugin!r}"))
            raise
        for weight in (self.weights[str(name)] for name, value in items if isinstance(value, Drop) and name in given):
            self.partly |= dict.fromkeys(weight.stored_names(), stage.plugin)
        used = {id(source) for weight in made for source in weight.stored_sources()}
        for weight in self.weights.values():
            if not any(id(source) in used for source in weight.stored_sources()):
                self.dropped.append((stage.plugin, weight))
        return made

    def _join(self, name: str, parts: list[Weight]) -> Weight:
        whole = parts[0]
        if len(parts) > 1:
            try:
                whole = join(parts)
            except WeightError as err:
                self._report(str(err), parts)
                return whole
        if len(whole.pieces) == 1 and whole.pieces[0].place is None:
            return whole
        problem = find_hole_or_overlap([piece.box(whole.shape) for piece in whole.pieces], whole.shape)
        if problem is not None:
            self._report(f"{name} {problem}" + (f", from {whole.origin()}" if whole.pieces else ""), [whole])
        return whole

    def _report(self, error: str, weights: Iterable[Weight]) -> None:
        self.errors.append(error)
        self.reported.update(name for weight in weights for name in weight.stored_names())


def _compile(stage: Stage) -> Callable[[Weight], Mapped]:
    try:
        return compile_rule(stage.rule)
    except WeightError as err:
        err.add_note(RuleNote(f"in the weight rule of plugin {stage.plugin!r}"))
        raise


def _as_sequence(mapped: Mapped) -> Sequence[Weight | Drop] | None:
    """Return what a rule answered as a sequence, `None` for unchanged."""
    if mapped is None:
        return None
    if isinstance(mapped, Weight | Drop):
        return [mapped]
    if isinstance(mapped, Sequence) and mapped and all(isinstance(one, Weight | Drop) for one in mapped):
        return mapped
    raise WeightError(f"the rule returned {mapped!r:.200}; return weights, DROP, or None for unchanged")


def _items(returned: object) -> list[tuple[object, object]]:
    if not isinstance(returned, Mapping):
        raise WeightError(f"it returned {returned!r:.80}, not the dict of weights that replaces the one it was given")
    return list(returned.items())


def _named(name: object, value: object, given: Mapping[str, SymbolicTensor], plugin: str) -> Weight:
    """Return a value of the dict that a remapper returned as the weight called `name`."""
    if not isinstance(name, str):
        raise WeightError(f"it returned the key {name!r}; keys are names")
    if not isinstance(value, SymbolicTensor):
        from infinilm_hookspecs.torch_functions import as_constant

        value = as_constant(name, value)
    weight: Weight = value
    trail = weight.trail if weight is given.get(name) else (*weight.trail, plugin)
    return Weight(name, weight.shape, weight.dtype_name, weight.pieces, trail)
