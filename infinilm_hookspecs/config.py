"""`DecoderConfig`: what a backend needs to know to run a decoder, and nothing a checkpoint calls it.

Layers are a tuple of small frozen parts, so models whose layers differ are data. A part belongs here once a family
needs it; what only one plugin knows is `Named`. Every formula names its source. No torch, no checkpoint names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from infinilm_hookspecs.types import Quantization


@dataclass(frozen=True, slots=True)
class Named:
    """A mixer or MLP that only a plugin and the backend it talks to know; every other backend declines it by name."""

    kind: ClassVar[str] = "named"
    name: str
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class NormConfig:
    """Normalisation over the last axis, times a learned `(offset + weight)`, plus a learned bias where `bias` says so.

    `rms` is root-mean-square norm (Zhang & Sennrich 2019, arXiv:1910.07467), `layer` is layer norm (Ba et al. 2016,
    arXiv:1607.06450), which takes the mean away first. Statistics are taken in float32.
    `offset` is what the model adds to the stored weight at run time (gemma: 1.0), never added at load.
    """

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    offset: float = 0.0
    bias: bool = False


@dataclass(frozen=True, slots=True)
class LinearRopeScaling:
    """Positions divided by `factor` (kaiokendev 2023)."""

    kind: ClassVar[str] = "linear"
    factor: float


@dataclass(frozen=True, slots=True)
class DynamicRopeScaling:
    """NTK-aware scaling whose base grows with the sequence (bloc97 and emozilla 2023).

    For a sequence of n tokens, n > `original_max_position_embeddings` = m, and d rotary dimensions the base becomes
    `theta * (factor * n / m - (factor - 1)) ** (d / (d - 2))`. A prompt token is rotated for n = length of the whole
    prompt, a generated one for n = its position + 1, so that neither chunking nor preemption changes a key.
    """

    kind: ClassVar[str] = "dynamic"
    factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class Llama3RopeScaling:
    """Wavelengths above `original / low_freq_factor` divided by `factor`, those below `original / high_freq_factor`
    kept, a linear blend of frequencies between them (Llama 3.1 model card)."""

    kind: ClassVar[str] = "llama3"
    factor: float
    original_max_position_embeddings: int
    low_freq_factor: float
    high_freq_factor: float


@dataclass(frozen=True, slots=True)
class YarnRopeScaling:
    """NTK-by-parts interpolation (Peng et al. 2023, arXiv:2309.00071).

    `attention_factor` multiplies cosine and sine. `truncate` rounds the corrected range outwards to whole dimensions.
    """

    kind: ClassVar[str] = "yarn"
    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


RopeScaling = LinearRopeScaling | DynamicRopeScaling | Llama3RopeScaling | YarnRopeScaling


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864), halves rotated against each other.

    Row i of the first half of a head pairs with row i of the second half, as in Hugging Face's llama.
    """

    theta: float = 10000.0
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Causal softmax attention with grouped queries (Ainslie et al. 2023, arXiv:2305.13245).

    `scale` multiplies the scores; `None` means `head_dim ** -0.5`. `qkv_bias` and `output_bias` add learned biases.
    With a `sliding_window` of w a token sees itself and the w - 1 tokens before it (Jiang et al. 2023,
    arXiv:2310.06825). `softcap` c makes scaled scores s `c * tanh(s / c)` before the softmax (Gemma Team 2024,
    arXiv:2408.00118). `query_key_norm` normalises every head of queries and of keys before they are rotated, all with
    the same two weights of head_dim elements (Henry et al. 2020, arXiv:2010.04245; as in Qwen3, arXiv:2505.09388).
    """

    kind: ClassVar[str] = "attention"
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig | None
    scale: float | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    sliding_window: int | None = None
    softcap: float | None = None
    query_key_norm: NormConfig | None = None


Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
"""`gelu_tanh` is the tanh approximation of GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""


@dataclass(frozen=True, slots=True)
class MlpConfig:
    """Gated MLP: `down(activation(gate(x)) * up(x))` (Shazeer 2020, arXiv:2002.05202).

    Not `gated`, it is `down(activation(up(x)))` (Vaswani et al. 2017, arXiv:1706.03762).
    """

    kind: ClassVar[str] = "mlp"
    intermediate_size: int
    activation: Activation = "silu"
    bias: bool = False
    gated: bool = True


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """Sparse mixture of experts, each a gated MLP of `intermediate_size` (Shazeer et al. 2017, arXiv:1701.06538).

    A router, linear and without bias, gives every token a softmax over all experts. The `experts_per_token` likeliest
    are run, and their results added, each times its probability; with `normalize` these are first divided by their
    sum (Jiang et al. 2024, arXiv:2401.04088).
    """

    kind: ClassVar[str] = "moe"
    num_experts: int
    experts_per_token: int
    intermediate_size: int
    activation: Activation = "silu"
    normalize: bool = False


@dataclass(frozen=True, slots=True)
class LayerNorms:
    """Which norms stand where around the two halves of a layer; the residual is added after the `after_` norm.

    Norms on both sides of a half are those of Gemma 2 (arXiv:2408.00118).
    """

    before_mixer: NormConfig | None = None
    before_mlp: NormConfig | None = None
    after_mixer: NormConfig | None = None
    after_mlp: NormConfig | None = None


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """One layer: a mixer over positions, an MLP over channels, and the norms around them."""

    mixer: AttentionConfig | Named
    mlp: MlpConfig | MoeConfig | Named | None
    norms: LayerNorms


@dataclass(frozen=True, slots=True)
class EmbeddingConfig:
    """Token embedding. `tied`: the output projection is the same matrix.

    `scale`, rounded to the dtype of the model, multiplies the embedding of a token (gemma: `hidden_size ** 0.5`;
    Vaswani et al. 2017, arXiv:1706.03762, section 3.4), not the output projection. `num_positions`: so many learned
    vectors, one a position from 0 on, are added to the tokens' (Radford et al. 2019); a longer sequence cannot be run.
    """

    tied: bool = False
    scale: float = 1.0
    num_positions: int | None = None


@dataclass(frozen=True, slots=True)
class LogitsConfig:
    """What happens to the output projection's result before sampling: times `scale`, then capped.

    `softcap` c makes logits l `c * tanh(l / c)` (Gemma Team 2024, arXiv:2408.00118).
    """

    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """A decoder-only language model, described completely and without reference to any checkpoint.

    `max_position_embeddings` is the longest sequence, in tokens, that the model was made for, rope scaling included.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerConfig, ...]
    embedding: EmbeddingConfig
    final_norm: NormConfig
    logits: LogitsConfig
    max_position_embeddings: int
    quantization: Quantization | None = None

    def to_json(self) -> str:
        """Return the config as one JSON object, fields at their default left out.

        A part that could be one of several kinds carries its kind under `"kind"`. A reader must decline a key it
        does not know: a field left out is at its default, so an unknown key always changes the model.
        """
        return json.dumps(_to_plain(self))


def _to_plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        kind = getattr(type(value), "kind", None)
        plain: dict[str, object] = {"kind": kind} if isinstance(kind, str) else {}
        for entry in fields(value):
            item = getattr(value, entry.name)
            default = entry.default_factory() if entry.default_factory is not MISSING else entry.default
            if default is MISSING or item != default:
                plain[entry.name] = _to_plain(item)
        return plain
    if isinstance(value, Mapping):
        return {str(key): _to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_to_plain(item) for item in value]
    return value
