"""The lineage: the configs a checkpoint's config passes through on its way to something a backend runs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from infinilm.plugins.host import PluginManager, wrong_answer
from infinilm_hookspecs import Config, ConfigError, DecoderConfig

_log = logging.getLogger("infinilm")


@dataclass(frozen=True, slots=True)
class Lineage:
    """The configs a checkpoint's config passed through. `plugins[i]` made `configs[i + 1]` of `configs[i]`."""

    configs: tuple[Config | DecoderConfig, ...]
    plugins: tuple[str, ...]

    def last_raw(self) -> Config:
        """Return the last raw config: what the family the model came to knows it as."""
        return [config for config in self.configs if not isinstance(config, DecoderConfig)][-1]

    def stages(self, taken: Config | DecoderConfig) -> list[Config]:
        """Return the raw configs whose rules weights pass on their way to a backend that took `taken`."""
        configs = self.configs[: next(i for i, config in enumerate(self.configs) if config is taken)]
        return [config for config in configs if not isinstance(config, DecoderConfig)]


def trace_lineage(pm: PluginManager, config: Config, *, trust_remote_code: bool = False) -> Lineage:
    """Return the configs that `config` is adapted to, until a `DecoderConfig` comes back or nobody answers.

    Keys that name code are left out, and mentioned; with `trust_remote_code`, `auto_map` is kept. Raises `ConfigError`
    for a config without a `model_type`, and for a cycle, which it shows.
    """
    configs: list[Config | DecoderConfig] = [freeze(without_code(config, trust_remote_code=trust_remote_code))]
    plugins: list[str] = []
    answered: dict[str, set[str]] = {}
    while not isinstance(current := configs[-1], DecoderConfig):
        model_type = model_type_of(current)
        before = answered.setdefault(model_type, set())
        answer = pm.ask_first("adapt_config", exclude=before, config=current)
        if answer is None:
            break
        if not isinstance(answer.value, Mapping | DecoderConfig):
            raise wrong_answer(pm, answer, "adapt_config", "a config or a DecoderConfig")
        before.add(answer.plugin)
        adapted = answer.value if isinstance(answer.value, DecoderConfig) else freeze(answer.value)
        plugins.append(answer.plugin)
        configs.append(adapted)
        if any(adapted == earlier for earlier in configs[:-1]):
            circle = describe_lineage(Lineage(tuple(configs), tuple(plugins)))
            raise ConfigError(f"the config goes in a circle: {circle}")
    return Lineage(tuple(configs), tuple(plugins))


def describe_lineage(lineage: Lineage) -> str:
    """Return the lineage as one line: `abacus -> (minimal) llama -> (llama) DecoderConfig`."""
    steps = [_step_name(lineage.configs[0])]
    steps += [f"({p}) {_step_name(c)}" for p, c in zip(lineage.plugins, lineage.configs[1:], strict=True)]
    return " -> ".join(steps)


def _step_name(config: Config | DecoderConfig) -> str:
    return "DecoderConfig" if isinstance(config, DecoderConfig) else model_type_of(config)


def model_type_of(config: Config) -> str:
    """Return the `model_type` of a raw config, in lower case. Raises `ConfigError` when it has none."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise ConfigError(f"the config has the model_type {model_type!r}; a name such as 'llama' is wanted")
    return model_type.lower()


def without_code(config: Config, *, trust_remote_code: bool = False) -> Config:
    """Return `config` without the keys that name code to run: a checkpoint is data. Mentions what it removed.

    `trust_remote_code` keeps `auto_map`, the key of transformers; `_infinilm...` is never kept.
    """
    removed: list[str] = []
    cleaned: Config = _cleaned(config, None if trust_remote_code else "auto_map", "", removed)
    if removed:
        hint = "" if trust_remote_code else "; trust_remote_code keeps auto_map"
        _log.warning("ignored %s of the config: a checkpoint names no code%s", ", ".join(sorted(removed)), hint)
    return cleaned


def _cleaned(value: Any, unwanted: str | None, path: str, removed: list[str]) -> Any:
    """Return a copy of `value`, at `path` of a config, and add the paths of the keys left out to `removed`."""
    if isinstance(value, list | tuple):
        return [_cleaned(item, unwanted, f"{path}{at}.", removed) for at, item in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    names = {key for key in value if str(key).startswith("_infinilm") or key == unwanted}
    removed += [f"{path}{key}" for key in names]
    return {k: _cleaned(v, unwanted, f"{path}{k}.", removed) for k, v in value.items() if k not in names}


def freeze(value: Any) -> Any:
    """Return a config read-only all the way down: mappings that cannot be changed, and tuples for lists."""
    if isinstance(value, Mapping):
        return MappingProxyType({key: freeze(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return tuple(freeze(item) for item in value)
    return value
