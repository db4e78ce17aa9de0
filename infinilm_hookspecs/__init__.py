"""The contract between infinilm and its plugins, and how to write one. pluggy and the standard library only.

A plugin is a module, or any object, with functions marked `hookimpl`. This one, whole, makes infinilm run models of a
`model_type` it has never heard of, because they are llamas with other names:

    >>> from infinilm_hookspecs import DROP, hookimpl

    >>> class Acme:
    ...     model_types = ("acme",)
    ...
    ...     @hookimpl
    ...     def adapt_config(self, config):
    ...         if config["model_type"] == "acme":
    ...             return {**config, "model_type": "llama", "hidden_size": config["width"]}
    ...
    ...     @hookimpl
    ...     def remap_weight(self, config):
    ...         if config["model_type"] == "acme":
    ...             q, kv = config["width"], config["width"] // 4
    ...             return {
    ...                 "h.{i}.wo": "model.layers.{i}.self_attn.o_proj.weight",
    ...                 "h.{i}.wqkv": lambda weight, i: [
    ...                     part.rename(f"model.layers.{i}.self_attn.{name}_proj.weight")
    ...                     for name, part in zip("qkv", weight.split([q, kv, kv]))
    ...                 ],
    ...                 "rotary.freqs": DROP,
    ...             }

`None`, which is what falling off the end returns, means "not mine". Hooks are called a few times a load, in the order
of `infinilm_hookspecs.hookspecs`, where each is documented.

**Configs are a lineage.** `adapt_config` takes a config one step nearer to something a backend runs: here from `acme`
to `llama`, from which the plugin of that family goes on to a `DecoderConfig`.

    >>> Acme().adapt_config({"model_type": "acme", "width": 64})
    {'model_type': 'llama', 'width': 64, 'hidden_size': 64}

**Weights walk the same path**, so a plugin maps only to the names of the family it extends. A rule is a table of
whole names, in which `{braces}` capture integers, or a function. It is run on headers: a `Weight` has a name, a
shape, a dtype and torch's methods, and its bytes are read later, once, straight to where they belong.

    >>> from infinilm_hookspecs.rules import compile_rule
    >>> rule = compile_rule(Acme().remap_weight({"model_type": "acme", "width": 64}))
    >>> rule(Weight.stored("h.3.wqkv", (96, 64), "bfloat16"))
    [Weight('model.layers.3.self_attn.q_proj.weight', [64, 64], bfloat16), \
Weight('model.layers.3.self_attn.k_proj.weight', [16, 64], bfloat16), \
Weight('model.layers.3.self_attn.v_proj.weight', [16, 64], bfloat16)]

The core then checks that every element of every stored tensor is used or dropped, and every parameter filled exactly
once, and names all that is wrong with the plugin responsible, before it reads a byte.

**Optional attributes** of a plugin: `model_types`, the families it adapts, for messages and listings; `overrides`,
names of plugins that this one beats where both claim the same checkpoint or platform.

**Publishing one** takes an entry point; `infinilm -p ./acme.py ...` tries a file without installing it:

    [project.entry-points.infinilm]
    acme = "acme_infinilm"
"""

from infinilm_hookspecs.config import (
    AttentionConfig,
    DecoderConfig,
    DynamicRopeScaling,
    EmbeddingConfig,
    LayerConfig,
    LayerNorms,
    LinearRopeScaling,
    Llama3RopeScaling,
    LogitsConfig,
    MlpConfig,
    MoeConfig,
    Named,
    NormConfig,
    RopeConfig,
    YarnRopeScaling,
)
from infinilm_hookspecs.errors import (
    CheckpointError,
    ConfigError,
    InfinilmError,
    PlanError,
    PluginError,
    RequestError,
    UnavailableError,
    WeightError,
)
from infinilm_hookspecs.markers import hookimpl, hookspec
from infinilm_hookspecs.parameters import ParameterSpec, Shard, parameters
from infinilm_hookspecs.rules import DROP, Mapped, WeightRule
from infinilm_hookspecs.types import (
    Backend,
    BackendRequest,
    CacheSpec,
    Checkpoint,
    Config,
    ForwardBatch,
    LogitsProcessor,
    LogitsProcessorFactory,
    ParsedText,
    Platform,
    Processor,
    Quantization,
    ResponseParser,
    StoredTensor,
    TokenStream,
)
from infinilm_hookspecs.weight import Weight

__all__ = [
    "DROP",
    "AttentionConfig",
    "Backend",
    "BackendRequest",
    "CacheSpec",
    "Checkpoint",
    "CheckpointError",
    "Config",
    "ConfigError",
    "DecoderConfig",
    "DynamicRopeScaling",
    "EmbeddingConfig",
    "ForwardBatch",
    "InfinilmError",
    "LayerConfig",
    "LayerNorms",
    "LinearRopeScaling",
    "Llama3RopeScaling",
    "LogitsConfig",
    "LogitsProcessor",
    "LogitsProcessorFactory",
    "Mapped",
    "MlpConfig",
    "MoeConfig",
    "Named",
    "NormConfig",
    "ParameterSpec",
    "ParsedText",
    "PlanError",
    "Platform",
    "PluginError",
    "Processor",
    "Quantization",
    "RequestError",
    "ResponseParser",
    "RopeConfig",
    "Shard",
    "StoredTensor",
    "TokenStream",
    "UnavailableError",
    "Weight",
    "WeightError",
    "WeightRule",
    "YarnRopeScaling",
    "hookimpl",
    "hookspec",
    "parameters",
]
