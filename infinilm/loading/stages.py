"""Running one stage's rule: all weights at once, then the parts of one name joined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


@dataclass(slots=True)
class Walk:
    """Weights on their way through the stages, and what became of the rest.

    `dropped` has the plugin that dropped a weight whole, `partly` the stored tensors whose rest was dropped.
    """

    weights: dict[str, Weight]
    dropped: dict[str, tuple[str, Weight]] = field(default_factory=dict)
    partly: set[str] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)

    def run(self, stage: Stage) -> None:
        """Run one stage. A `WeightError` of its rule is collected; another exception gains a note and propagates."""
        run = self._run_state_dict if isinstance(stage.rule, StateDictRule) else self._run_each
        made: dict[str, list[Weight]] = {}
        for weight in run(stage):
            made.setdefault(weight.name, []).append(weight)
        self.weights = {name: self._join(name, parts) for name, parts in made.items()}

    def _run_each(self, stage: Stage) -> list[Weight]:
        rule = compile_rule(stage.rule)
        made: list[Weight] = []
        for weight in self.weights.values():
            try:
                mapped = _as_sequence(rule(weight))
            except WeightError as err:
                self.errors.append(f"{weight.name} [plugin {stage.plugin}]: {err}")
                continue
            except Exception as err:
                err.add_note(f"in the weight rule of plugin {stage.plugin!r}, for {weight!r}")
                raise
            if mapped is None:
                made.append(weight)
            elif mapped == [DROP]:
                self.dropped[weight.name] = stage.plugin, weight
            else:
                made += self._take(mapped, weight, stage.plugin)
        return made

    def _take(self, mapped: Sequence[Weight | Drop], weight: Weight, plugin: str) -> list[Weight]:
        made: list[Weight] = []
        for one in mapped:
            if isinstance(one, Drop):
                self.partly.update(weight.stored_names())
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
            made = [_named(name, value, given, stage.plugin) for name, value in _items(returned)]
        except WeightError as err:
            self.errors.append(f"the remapper of plugin {stage.plugin}: {err}")
            return []
        except Exception as err:
            err.add_note(f"in the state-dict remapper of plugin {stage.plugin!r}")
            raise
        used = {id(source) for weight in made for source in weight.stored_sources()}
        for name, weight in self.weights.items():
            if not any(id(source) in used for source in weight.stored_sources()):
                self.dropped[name] = stage.plugin, weight
        return made

    def _join(self, name: str, parts: list[Weight]) -> Weight:
        if len(parts) == 1:
            return parts[0]
        try:
            whole = join(parts)
        except WeightError as err:
            self.errors.append(str(err))
            return parts[0]
        problem = find_hole_or_overlap([piece.box(whole.shape) for piece in whole.pieces], whole.shape)
        if problem is not None:
            self.errors.append(f"{name} {problem}, from {whole.origin()}")
        return whole


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
