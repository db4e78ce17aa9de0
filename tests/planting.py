"""Mistakes to plant: edits of stored tensors by name, and changes to the `DecoderConfig` that a plugin makes."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any

import torch
from oracle import Stored
from torch import Tensor

from infinilm_hookspecs import DecoderConfig, hookimpl

WeightMistake = Callable[[Stored], Stored]
ConfigMistake = Callable[[DecoderConfig], DecoderConfig]

# ---------------------------------------------------------------- in the weights


def layer_names(stored: Stored, part: str) -> list[str]:
    return [name for name in stored if f".{part}." in name]


def edited(*parts: str, edit: Callable[[Tensor], Tensor]) -> WeightMistake:
    """Return a mistake that replaces every tensor of `parts` by `edit` of it."""

    def mistake(stored: Stored) -> Stored:
        names = {name for part in parts for name in layer_names(stored, part)}
        assert names
        return {name: edit(tensor) if name in names else tensor for name, tensor in stored.items()}

    return mistake


def swapped(one: str, other: str) -> WeightMistake:
    """Return a mistake that exchanges the names of two parts."""

    def swap(name: str) -> str:
        if f".{one}." in name:
            return name.replace(f".{one}.", f".{other}.")
        return name.replace(f".{other}.", f".{one}.")

    def mistake(stored: Stored) -> Stored:
        assert layer_names(stored, one)
        assert layer_names(stored, other)
        return {swap(name): tensor for name, tensor in stored.items()}

    return mistake


def without_biases(*parts: str) -> WeightMistake:
    """Return a mistake that drops the biases of projections."""
    return edited(*parts, edit=lambda tensor: tensor if tensor.ndim == 2 else torch.zeros_like(tensor))


def without(*names: str) -> WeightMistake:
    """Return a mistake that drops whole tensors, by the ends of their names."""

    def mistake(stored: Stored) -> Stored:
        assert any(name.endswith(names) for name in stored)
        return {name: tensor * 0 if name.endswith(names) else tensor for name, tensor in stored.items()}

    return mistake


# ---------------------------------------------------------------- in the config


class Mistaken:
    """Wraps whoever makes the `DecoderConfig`, and gets it wrong."""

    def __init__(self, mistake: ConfigMistake) -> None:
        self._mistake = mistake

    @hookimpl(wrapper=True)
    def adapt_config(self) -> Generator[None, Any, Any]:
        config = yield
        return self._mistake(config) if isinstance(config, DecoderConfig) else config


def in_layers(change: Callable[[Any], Any]) -> ConfigMistake:
    return lambda config: replace(config, layers=tuple(change(layer) for layer in config.layers))


def in_mixers(**changes: Any) -> ConfigMistake:
    return in_layers(lambda layer: replace(layer, mixer=replace(layer.mixer, **changes)))


def in_mlps(**changes: Any) -> ConfigMistake:
    return in_layers(lambda layer: replace(layer, mlp=replace(layer.mlp, **changes)))


def in_norms(**changes: Any) -> ConfigMistake:
    """Return a mistake in all norms of the layers, and not in the final one."""

    def change(layer: Any) -> Any:
        fields = ("before_mixer", "after_mixer", "before_mlp", "after_mlp")
        norms = {name: getattr(layer.norms, name) for name in fields}
        changed = {name: replace(norm, **changes) for name, norm in norms.items() if norm is not None}
        return replace(layer, norms=replace(layer.norms, **changed))

    return in_layers(change)


def in_final_norm(**changes: Any) -> ConfigMistake:
    return lambda config: replace(config, final_norm=replace(config.final_norm, **changes))


def in_embedding(**changes: Any) -> ConfigMistake:
    return lambda config: replace(config, embedding=replace(config.embedding, **changes))


def in_logits(**changes: Any) -> ConfigMistake:
    return lambda config: replace(config, logits=replace(config.logits, **changes))


def with_windows_swapped(config: DecoderConfig) -> DecoderConfig:
    windows = [layer.mixer.sliding_window for layer in config.layers]
    assert windows != windows[::-1]
    layers = [
        replace(layer, mixer=replace(layer.mixer, sliding_window=window))
        for layer, window in zip(config.layers, reversed(windows), strict=True)
    ]
    return replace(config, layers=tuple(layers))


def with_windows(window: int | None) -> ConfigMistake:
    """Return a mistake in the width of those windows that there are."""
    return in_layers(
        lambda layer: (
            layer
            if layer.mixer.sliding_window is None
            else replace(layer, mixer=replace(layer.mixer, sliding_window=window))
        )
    )
