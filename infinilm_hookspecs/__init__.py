"""The contract between infinilm and its plugins. pluggy and the standard library only."""

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
from infinilm_hookspecs.types import (
    Backend,
    BackendRequest,
    CacheSpec,
    Checkpoint,
    Config,
    ForwardBatch,
    ParsedText,
    Platform,
    Processor,
    Quantization,
    ResponseParser,
    StoredTensor,
    TokenStream,
)
