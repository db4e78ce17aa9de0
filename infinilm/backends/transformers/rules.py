"""transformers' conversion tables as a weight rule: from the names of a checkpoint to those of the model.

The tables rename with patterns, and stack, split and permute with operations on tensors. Both are run on weights that
have not been read: experts become parts of one weight, and nothing is held back until the last of them was seen.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch

from infinilm.backends.transformers.families import describe
from infinilm.backends.transformers.model import initial_value
from infinilm_hookspecs import WeightError
from infinilm_hookspecs.state_dicts import StateDictRule


def conversion_rule(model: Any) -> StateDictRule:
    """Return the rule that `from_pretrained` follows for `model`, which is on the meta device and not tied yet."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    transforms = get_model_conversion_mapping(model)
    return StateDictRule(lambda weights: _Conversion(model, copy.deepcopy(transforms)).run(weights))


class _Conversion:
    """One run of the tables over all weights of a checkpoint."""

    def __init__(self, model: Any, transforms: list[Any]) -> None:
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self._model = model
        self._wanted = model.state_dict()
        self._renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        self._converters = [one for one in transforms if isinstance(one, WeightConverter)]
        self._by_pattern = {pattern: one for one in self._converters for pattern in one.source_patterns}
        self._unexpected = _any_of(_unexpected_patterns(model))
        self._ignored_if_missing = _any_of(model._keys_to_ignore_on_load_missing or ())

    def run(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        """Return the weights under the model's names. What it has no use for is kept, for the plan to name."""
        from transformers.core_model_loading import dot_natural_key

        made: dict[str, Any] = {}
        collected: dict[str, Any] = {}  # first target -> converter with its sources
        for name in sorted(weights, key=dot_natural_key):
            target, pattern = self._rename(name)
            if pattern is not None and target in self._wanted:
                converter = collected.setdefault(target, copy.deepcopy(self._by_pattern[pattern]))
                converter.add_tensor(target, name, pattern, weights[name])
            elif target in self._wanted or not (self._unexpected and self._unexpected.search(target)):
                _add(made, target, weights[name])
        for first, converter in collected.items():
            for target, weight in self._convert(first, converter).items():
                _add(made, target, weight)
        return made | self._initial(made)

    def _rename(self, name: str) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        prefix = self._model.base_model_prefix
        target, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self._wanted)
        if target not in self._wanted and name in self._wanted:
            target, pattern = rename_source_key(name, [], [], prefix, self._wanted)
        return target, pattern

    def _convert(self, target: str, converter: Any) -> dict[str, Any]:
        sources = [name for names in converter.layer_targets.values() for name in names]
        try:
            converted = converter.convert(target, model=self._model, config=self._model.config)
        except WeightError:
            raise
        except Exception as err:  # the operations tell a wrong input by whatever they stumble over
            shown = ", ".join(sorted(sources)[:4])
            raise WeightError(f"transformers cannot make {target} of {shown}, ...: {describe(err)}") from err
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}

    def _initial(self, made: Mapping[str, Any]) -> dict[str, Any]:
        """Return what transformers computes where a checkpoint does not hold it, such as sinusoids.

        What it would draw at random stays missing.
        """
        if self._ignored_if_missing is None:
            return {}
        ties = self._model.all_tied_weights_keys
        found: dict[str, Any] = {}
        for name in self._wanted:
            if name in made or name in ties or not self._ignored_if_missing.search(name):
                continue
            value = initial_value(self._model, name)
            if torch.equal(value, initial_value(self._model, name)):
                found[name] = value
        return found


def _add(made: dict[str, Any], target: str, weight: Any) -> None:
    if target in made:
        both = f"{made[target].origin()} and {weight.origin()}"
        raise WeightError(f"{both} both become {target} in transformers' tables")
    made[target] = weight


def _unexpected_patterns(model: Any) -> set[str]:
    """Return patterns of names that old checkpoints hold and the model computes."""
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    buffers = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.add(r"(^|\.)position_ids$")
    return patterns


def _any_of(patterns: Any) -> re.Pattern[str] | None:
    return re.compile("|".join(f"({pattern})" for pattern in patterns)) if patterns else None
