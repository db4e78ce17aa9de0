"""`ModelSpec`: a plugin made from data, for models that are a family infinilm knows by other names.

    ModelSpec(
        model_type="acme",
        backend_model_type="llama",
        config_adapter={"hidden_size": "$width", "hidden_act": "silu"},
        weight_rules=[{"h.{i}.wo": "model.layers.{i}.self_attn.o_proj.weight"}],
    )

Register it with `register_model`, give it to `LLM(plugins=[...])`, or name it in an entry point of group `infinilm`.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from infinilm.native.libraries import open_library
from infinilm_hookspecs import (
    Backend,
    BackendRequest,
    Checkpoint,
    Config,
    ConfigError,
    DecoderConfig,
    PluginError,
    Processor,
    WeightRule,
    hookimpl,
)
from infinilm_hookspecs.state_dicts import RuleChain, StateDictRule

ConfigAdapter = Callable[[dict[str, Any]], Mapping[str, Any]] | Mapping[str, Any]
StateDictRemapper = Callable[..., Mapping[str, Any]]
BackendMaker = Callable[[BackendRequest], Backend | None]


@dataclass(frozen=True, kw_only=True, eq=True)
class ModelSpec:
    """How models of one or several `model_type`s become models of a family infinilm runs. Types are case-insensitive.

    `config_adapter` is a callable from dict to dict, or a mapping put over the config, whose values are constants,
    `"$key"` for a copy of another key, or callables of the config; `backend_model_type` then replaces `model_type`.

    `weight_remapper` and then each of `weight_rules` are called as `f(weights)` or `f(weights, config)` with all
    weights by name and return the dict that replaces them; what it leaves out is dropped. A table, or a function whose
    first argument is called `weight`, is taken as a rule of `remap_weight`. `use_builtin_weight_remapper=False` ends
    the walk after this: the names are those of the backend's parameters.

    `backend` makes the backend of a model that is no known family: it is called with a `BackendRequest`, and answers as
    `provide_backend` does. As a string, "module:attribute", it is imported only once there is such a model to run.

    `backend_plugin`, or each of `backend_plugins` in turn, is the path of a backend library that runs these models. It
    is loaded when there is one to run, and one that cannot be loaded is an error.

    `processor` names the plugin that makes the processor; `processor_cls` is called with (lineage, checkpoint).
    `metadata` is the owner's to use. Raises `PluginError` for a spec that contradicts itself.
    """

    model_type: str | None = None
    model_types: tuple[str, ...] = ()
    backend_model_type: str | None = None
    config_adapter: ConfigAdapter | None = None
    weight_remapper: StateDictRemapper | WeightRule | None = None
    weight_rules: tuple[StateDictRemapper | WeightRule, ...] = ()
    use_builtin_weight_remapper: bool = True
    backend: BackendMaker | str | None = None
    backend_plugin: str | os.PathLike[str] | None = None
    backend_plugins: tuple[str | os.PathLike[str], ...] = ()
    processor: str | None = None
    processor_cls: Callable[[Sequence[Config | DecoderConfig], Checkpoint], Processor] | None = None
    metadata: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        given = (self.model_types,) if isinstance(self.model_types, str) else self.model_types
        types = tuple(dict.fromkeys(t.lower() for t in (*([self.model_type] if self.model_type else []), *given)))
        if not types:
            raise PluginError("ModelSpec: give model_type='...' or model_types=(...)")
        object.__setattr__(self, "model_type", types[0])
        object.__setattr__(self, "model_types", types)
        object.__setattr__(self, "weight_rules", tuple(self.weight_rules))
        libraries = self.backend_plugins
        libraries = (libraries,) if isinstance(libraries, str | os.PathLike) else tuple(libraries)
        first = () if self.backend_plugin is None else (self.backend_plugin,)
        object.__setattr__(self, "backend_plugins", tuple(dict.fromkeys((*first, *libraries))))
        if self.processor is not None and self.processor_cls is not None:
            raise PluginError(f"ModelSpec {types[0]!r}: processor and processor_cls exclude each other")
        if isinstance(self.backend, str) and not all(self.backend.partition(":")):
            raise PluginError(f"ModelSpec {types[0]!r}: backend={self.backend!r} is not 'module:attribute'")

    def __hash__(self) -> int:
        return hash(self.model_types)

    @property
    def plugin_name(self) -> str:
        """The name it is registered by where nobody gives it another."""
        return f"model_spec:{self.model_types[0]}"

    def owns(self, config: Config | DecoderConfig) -> bool:
        """Return whether a config is of one of this spec's model types."""
        return not isinstance(config, DecoderConfig) and str(config.get("model_type", "")).lower() in self.model_types

    @hookimpl
    def adapt_config(self, config: Config) -> Config | None:
        """Answer for a config of this spec's types with the config of the family it extends."""
        if not self.owns(config) or (self.config_adapter is None and self.backend_model_type is None):
            return None
        adapted = self._adapted(config)
        if self.backend_model_type is not None:
            adapted["model_type"] = self.backend_model_type
        return adapted

    @hookimpl
    def provide_backend(self, request: BackendRequest) -> Backend | None:
        """Answer for a lineage that begins with one of this spec's types, or passes one, with its backend."""
        if not any(self.owns(config) for config in request.lineage):
            return None
        for path in self.backend_plugins:
            backend = open_library(path).provide_backend(request)
            if backend is not None:
                return backend
        if self.backend is None:
            return None
        make = self._import_backend(self.backend) if isinstance(self.backend, str) else self.backend
        return make(request)

    @hookimpl
    def remap_weight(self, config: Config) -> RuleChain | None:
        """Answer for a config of this spec's types with its remapper and rules, in order."""
        if not self.owns(config):
            return None
        given = (self.weight_remapper, *self.weight_rules) if self.weight_remapper is not None else self.weight_rules
        if not given and self.use_builtin_weight_remapper:
            return None
        rules = tuple(_as_rule(rule, config) for rule in given)
        return RuleChain(rules, is_final=not self.use_builtin_weight_remapper)

    @hookimpl
    def select_processor(
        self, lineage: Sequence[Config | DecoderConfig], checkpoint: Checkpoint
    ) -> Processor | str | None:
        """Answer for a lineage that begins with one of this spec's types, or passes one, with its processor."""
        if not any(self.owns(config) for config in lineage):
            return None
        return self.processor_cls(lineage, checkpoint) if self.processor_cls is not None else self.processor

    def _import_backend(self, name: str) -> BackendMaker:
        module, _, attribute = name.partition(":")
        try:
            make: BackendMaker = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as err:
            raise PluginError(f"ModelSpec {self.model_types[0]!r} names the backend {name!r}: {err}") from err
        return make

    def _adapted(self, config: Config) -> dict[str, Any]:
        plain: dict[str, Any] = thaw(config)
        if self.config_adapter is None:
            return plain
        if callable(self.config_adapter):
            adapted = self.config_adapter(plain)
            if not isinstance(adapted, Mapping):
                raise ConfigError(
                    f"the config_adapter of ModelSpec {self.model_types[0]!r} returned {adapted!r:.80}, not a dict"
                )
            return dict(adapted)
        return plain | {key: self._value(plain, key, value) for key, value in self.config_adapter.items()}

    def _value(self, config: Mapping[str, Any], key: str, value: object) -> Any:
        if callable(value):
            return value(config)
        if isinstance(value, str) and value.startswith("$"):
            if value[1:] not in config:
                raise ConfigError(
                    f"ModelSpec {self.model_types[0]!r} copies {key!r} from {value[1:]!r}, which the config lacks"
                )
            return config[value[1:]]
        return value


class ModelSpecs:
    """Several specs as one plugin: an entry point that is a sequence, or a module that registered more than one."""

    def __init__(self, specs: Sequence[ModelSpec]) -> None:
        self.specs = tuple(specs)
        self.model_types = tuple(t for spec in self.specs for t in spec.model_types)
        repeated = {t for t in self.model_types if self.model_types.count(t) > 1}
        if repeated:
            raise PluginError(f"two specs for model_type {', '.join(map(repr, sorted(repeated)))}")

    @hookimpl
    def adapt_config(self, config: Config) -> Config | None:
        """Answer with the spec that owns the config."""
        return next((spec.adapt_config(config) for spec in self.specs if spec.owns(config)), None)

    @hookimpl
    def provide_backend(self, request: BackendRequest) -> Backend | None:
        """Answer with the first spec that has a backend for the lineage."""
        answers = (spec.provide_backend(request) for spec in self.specs)
        return next((answer for answer in answers if answer is not None), None)

    @hookimpl
    def remap_weight(self, config: Config) -> RuleChain | None:
        """Answer with the spec that owns the config."""
        return next((spec.remap_weight(config) for spec in self.specs if spec.owns(config)), None)

    @hookimpl
    def select_processor(
        self, lineage: Sequence[Config | DecoderConfig], checkpoint: Checkpoint
    ) -> Processor | str | None:
        """Answer with the first spec that has a processor for the lineage."""
        answers = (spec.select_processor(lineage, checkpoint) for spec in self.specs)
        return next((answer for answer in answers if answer is not None), None)


def thaw(value: Any) -> Any:
    """Return a read-only config as plain dicts and lists, to be changed at will."""
    if isinstance(value, Mapping):
        return {key: thaw(item) for key, item in value.items()}
    return [thaw(item) for item in value] if isinstance(value, tuple) else value


def _as_rule(rule: StateDictRemapper | WeightRule, config: Config) -> WeightRule:
    if not callable(rule):
        return rule
    arguments = list(inspect.signature(rule).parameters)
    remapper: Callable[..., Any] = rule
    if arguments and arguments[0] == "weight":
        return remapper
    if len(arguments) < 2:
        return StateDictRule(remapper)
    plain = thaw(config)
    return StateDictRule(lambda weights: remapper(weights, plain))
