"""A decoder as torch runs it: the layers of a `DecoderConfig` over the tokens of one step.

Every part holds its own config and its own weights and is called with activations (num_tokens, hidden_size).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy
import torch.nn.functional as F
from torch import Tensor

from infinilm.backends.torch.attention import AttentionPlan, Indices, attend, index_tensor, plan_attention
from infinilm.backends.torch.cache import PagedCache
from infinilm.backends.torch.rope import Rotary, Rotation, rotate
from infinilm.backends.torch.weights import Weights
from infinilm_hookspecs import (
    AttentionConfig,
    DecoderConfig,
    ForwardBatch,
    LayerConfig,
    MlpConfig,
    NormConfig,
    RopeConfig,
)

ACTIVATIONS: Final[Mapping[str, Callable[[Tensor], Tensor]]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}

_RotaryKey = tuple[RopeConfig, int]  # and head_dim


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers of one step share."""

    cache: PagedCache
    plan: AttentionPlan
    rotations: Mapping[_RotaryKey, Rotation]


class Decoder:
    """The whole model, made anew after every load of its weights."""

    def __init__(self, config: DecoderConfig, weights: Weights) -> None:
        self._embedding = weights["model.embed_tokens.weight"]  # (vocab_size, hidden_size)
        self._layers = [_Layer(index, layer, weights) for index, layer in enumerate(config.layers)]
        self._final_norm = _Norm(config.final_norm, weights["model.norm.weight"])
        self._output = _Linear("lm_head", weights)
        self._logits_scale = config.logits.scale
        self._rotaries = {
            (mixer.rope, mixer.head_dim): Rotary(mixer.rope, mixer.head_dim, self._embedding.device)
            for mixer in (layer.mixer for layer in config.layers)
            if isinstance(mixer, AttentionConfig) and mixer.rope is not None
        }

    def __call__(self, batch: ForwardBatch, cache: PagedCache) -> Tensor:
        """Return float32 logits (len(batch.logits_indices), vocab_size)."""
        device = self._embedding.device
        positions = index_tensor(batch.positions, device)
        lengths = index_tensor(_rotary_lengths(batch), device)
        step = Step(
            cache=cache,
            plan=plan_attention(batch, cache.zero_slot, device),
            rotations={
                key: rotary.rotation(positions, lengths, self._embedding.dtype)
                for key, rotary in self._rotaries.items()
            },
        )
        hidden = F.embedding(index_tensor(batch.token_ids, device), self._embedding)
        for layer in self._layers:
            hidden = layer(hidden, step)
        wanted = hidden.index_select(0, index_tensor(batch.logits_indices, device))
        logits = self._output(self._final_norm(wanted)).float()
        return logits if self._logits_scale == 1 else logits * self._logits_scale


class _Layer:
    def __init__(self, index: int, config: LayerConfig, weights: Weights) -> None:
        name = f"model.layers.{index}"
        self._before_mixer = _norm(config.norms.before_mixer, f"{name}.input_layernorm", weights)
        assert isinstance(config.mixer, AttentionConfig)  # anything else was declined
        self._mixer = _Attention(index, config.mixer, f"{name}.self_attn", weights)
        self._before_mlp = _norm(config.norms.before_mlp, f"{name}.post_attention_layernorm", weights)
        assert config.mlp is None or isinstance(config.mlp, MlpConfig)
        self._mlp = None if config.mlp is None else _Mlp(config.mlp, f"{name}.mlp", weights)

    def __call__(self, hidden: Tensor, step: Step) -> Tensor:
        hidden = hidden + self._mixer(self._before_mixer(hidden), step)
        return hidden if self._mlp is None else hidden + self._mlp(self._before_mlp(hidden))


class _Attention:
    def __init__(self, index: int, config: AttentionConfig, name: str, weights: Weights) -> None:
        self._index = index
        self._config = config
        self._qkv = _Linear(f"{name}.qkv_proj", weights)
        self._output = _Linear(f"{name}.o_proj", weights)

    def __call__(self, hidden: Tensor, step: Step) -> Tensor:
        config = self._config
        # (num_tokens, num_heads + 2 * num_kv_heads, head_dim): queries, keys, values
        heads = self._qkv(hidden).view(len(hidden), -1, config.head_dim)
        num_rotated = config.num_heads + config.num_kv_heads
        rotated, value = heads[:, :num_rotated], heads[:, num_rotated:]
        if config.rope is not None:
            rotated = rotate(rotated, step.rotations[config.rope, config.head_dim])
        query, key = rotated[:, : config.num_heads], rotated[:, config.num_heads :]
        attended = attend(config, step.plan, step.cache, self._index, query, key, value)
        return self._output(attended.flatten(1))


class _Mlp:
    def __init__(self, config: MlpConfig, name: str, weights: Weights) -> None:
        self._activation = ACTIVATIONS[config.activation]
        self._gate_up = _Linear(f"{name}.gate_up_proj", weights)
        self._down = _Linear(f"{name}.down_proj", weights)

    def __call__(self, hidden: Tensor) -> Tensor:
        gate, up = self._gate_up(hidden).chunk(2, dim=-1)  # (num_tokens, intermediate_size) each
        return self._down(self._activation(gate) * up)


class _Linear:
    """`x @ weight.T`, plus the bias where the model has one."""

    def __init__(self, name: str, weights: Weights) -> None:
        self._weight = weights[f"{name}.weight"]  # (out_features, in_features)
        self._bias = weights.get(f"{name}.bias")

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)


class _Norm:
    """Root-mean-square norm. torch takes the statistics of low-precision activations in float32."""

    def __init__(self, config: NormConfig, weight: Tensor) -> None:
        self._eps = config.eps
        # 1 + a small weight loses the weight in bfloat16, so a sum is kept, and applied, in float32.
        self._weight = weight if config.offset == 0 else weight.float() + config.offset

    def __call__(self, x: Tensor) -> Tensor:
        weight = self._weight
        return F.rms_norm(x.to(weight.dtype), weight.shape, weight, self._eps).to(x.dtype)


def _norm(config: NormConfig | None, name: str, weights: Weights) -> Callable[[Tensor], Tensor]:
    return _unchanged if config is None else _Norm(config, weights[f"{name}.weight"])


def _unchanged(x: Tensor) -> Tensor:
    return x


def _rotary_lengths(batch: ForwardBatch) -> Indices:
    """Return for every token how long its sequence counts as (num_tokens,); see `DynamicRopeScaling`."""
    prompt_lengths = batch.context_lengths if batch.prompt_lengths is None else batch.prompt_lengths
    per_token = numpy.repeat(prompt_lengths, numpy.diff(batch.query_starts))
    return numpy.maximum(per_token, batch.positions + 1)
