"""A decoder as torch runs it: the layers of a `DecoderConfig` over the tokens of one step.

Every part holds its own config and its own weights and is called with activations (num_tokens, hidden_size).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from types import MappingProxyType
from typing import Final

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infinilm.backends.torch.attention import Indices, Plans, attend, index_tensor, plan_windows
from infinilm.backends.torch.attention_layer import BoundLayers
from infinilm.backends.torch.cache import PagedCache
from infinilm.backends.torch.rope import Rotary, Rotation, rotate
from infinilm.backends.torch.weights import Weights
from infinilm_hookspecs import (
    AttentionConfig,
    DecoderConfig,
    EmbeddingConfig,
    ForwardBatch,
    LayerConfig,
    LogitsConfig,
    MlpConfig,
    MoeConfig,
    Named,
    NormConfig,
    PluginError,
    RopeConfig,
)
from infinilm_hookspecs.parameters import norm_names

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
    plans: Plans
    positions: Tensor  # (num_tokens,)
    rotations: Mapping[_RotaryKey, Rotation]


class Decoder:
    """The whole model, made anew after every load of its weights.

    `modules` are those of its `Named` parts, by path, and `supplied` the attention layers in them.
    """

    def __init__(
        self,
        config: DecoderConfig,
        weights: Weights,
        modules: Mapping[str, nn.Module] = MappingProxyType({}),
        supplied: BoundLayers | None = None,
    ) -> None:
        self._supplied = BoundLayers({}) if supplied is None else supplied
        self._embedding = _Embedding(config.embedding, weights)
        places = count()  # in the cache
        self._layers = [
            _Layer(index, layer, _Parts(weights, modules, places)) for index, layer in enumerate(config.layers)
        ]
        self._final_norm = _Norm(config.final_norm, "model.norm", weights)
        self._output = _Linear("lm_head", weights)
        self._logits = config.logits
        mixers = [layer.mixer for layer in config.layers if isinstance(layer.mixer, AttentionConfig)]
        self._windows = {mixer.sliding_window for mixer in mixers} | self._supplied.windows
        self._rotaries = {
            (mixer.rope, mixer.head_dim): Rotary(mixer.rope, mixer.head_dim, self._embedding.device)
            for mixer in mixers
            if mixer.rope is not None
        }

    def __call__(self, batch: ForwardBatch, cache: PagedCache) -> Tensor:
        """Return float32 logits (len(batch.logits_indices), vocab_size)."""
        device = self._embedding.device
        positions = index_tensor(batch.positions, device)
        lengths = index_tensor(_rotary_lengths(batch), device)
        hidden = self._embedding(index_tensor(batch.token_ids, device), positions)
        step = Step(
            cache=cache,
            plans=plan_windows(batch, self._windows, cache.zero_slot, device),
            positions=positions,
            rotations={
                key: rotary.rotation(positions, lengths, hidden.dtype) for key, rotary in self._rotaries.items()
            },
        )
        with self._supplied.running(cache, step.plans):
            for layer in self._layers:
                hidden = layer(hidden, step)
        wanted = hidden.index_select(0, index_tensor(batch.logits_indices, device))
        return _adjusted(self._logits, self._output(self._final_norm(wanted)).float())


def _adjusted(config: LogitsConfig, logits: Tensor) -> Tensor:
    if config.scale != 1:
        logits = logits * config.scale
    return logits if config.softcap is None else (logits / config.softcap).tanh_().mul_(config.softcap)


class _Embedding:
    """Tokens to activations, and what a model adds to tell positions apart."""

    def __init__(self, config: EmbeddingConfig, weights: Weights) -> None:
        self._tokens = weights["model.embed_tokens.weight"]  # (vocab_size, hidden_size)
        self._positions = weights.get("model.embed_positions.weight")  # (num_positions, hidden_size)
        self._scale = None if config.scale == 1 else self._tokens.new_tensor(config.scale)
        self.device = self._tokens.device

    def __call__(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        hidden = F.embedding(token_ids, self._tokens)
        if self._scale is not None:
            hidden = hidden * self._scale
        return hidden if self._positions is None else hidden + F.embedding(positions, self._positions)


@dataclass(frozen=True, slots=True)
class _Parts:
    """What the parts of a layer are made from. `places` are those in the cache that are not taken yet."""

    weights: Weights
    modules: Mapping[str, nn.Module]
    places: Iterator[int]

    def mixer(self, config: AttentionConfig | Named, name: str) -> Callable[[Tensor, Step], Tensor]:
        """Return what mixes positions, called with activations and the step."""
        if isinstance(config, AttentionConfig):
            return _Attention(next(self.places), config, name, self.weights)
        return _NamedMixer(name, self.modules[name])

    def mlp(self, config: MlpConfig | MoeConfig | Named | None, name: str) -> Callable[[Tensor], Tensor] | None:
        """Return what mixes channels, or `None` where a layer has no such half."""
        match config:
            case MlpConfig():
                return _Mlp(config, name, self.weights)
            case MoeConfig():
                return _Moe(config, name, self.weights)
            case Named():
                return _NamedMlp(name, self.modules[name])
            case None:
                return None


class _Layer:
    def __init__(self, index: int, config: LayerConfig, parts: _Parts) -> None:
        weights = parts.weights
        name = f"model.layers.{index}"
        norms, names = config.norms, norm_names(config.norms)
        self._before_mixer = _norm(norms.before_mixer, f"{name}.{names['before_mixer']}", weights)
        self._after_mixer = _norm(norms.after_mixer, f"{name}.{names['after_mixer']}", weights)
        self._before_mlp = _norm(norms.before_mlp, f"{name}.{names['before_mlp']}", weights)
        self._after_mlp = _norm(norms.after_mlp, f"{name}.{names['after_mlp']}", weights)
        self._mixer = parts.mixer(config.mixer, f"{name}.self_attn")
        self._mlp = parts.mlp(config.mlp, f"{name}.mlp")

    def __call__(self, hidden: Tensor, step: Step) -> Tensor:
        hidden = hidden + self._after_mixer(self._mixer(self._before_mixer(hidden), step))
        if self._mlp is None:
            return hidden
        return hidden + self._after_mlp(self._mlp(self._before_mlp(hidden)))


class _NamedMixer:
    """A plugin's module, called with activations and the positions (num_tokens,) of the tokens."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self._name = name
        self._module = module

    def __call__(self, hidden: Tensor, step: Step) -> Tensor:
        return _of_shape(self._name, self._module(hidden, step.positions), hidden)


class _NamedMlp:
    """A plugin's module, called with activations."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self._name = name
        self._module = module

    def __call__(self, hidden: Tensor) -> Tensor:
        return _of_shape(self._name, self._module(hidden), hidden)


def _of_shape(name: str, result: Tensor, hidden: Tensor) -> Tensor:
    """Return the result of a plugin's module. Raises `PluginError` where adding it would have to broadcast it."""
    if result.shape != hidden.shape:
        raise PluginError(
            f"the module of {name!r} returned {tuple(result.shape)} for {tuple(hidden.shape)}; the same is wanted"
        )
    return result


class _Attention:
    def __init__(self, place: int, config: AttentionConfig, name: str, weights: Weights) -> None:
        self._place = place
        self._config = config
        self._qkv = _Linear(f"{name}.qkv_proj", weights)
        self._query_norm = _norm(config.query_key_norm, f"{name}.q_norm", weights)
        self._key_norm = _norm(config.query_key_norm, f"{name}.k_norm", weights)
        self._output = _Linear(f"{name}.o_proj", weights)

    def __call__(self, hidden: Tensor, step: Step) -> Tensor:
        config = self._config
        # (num_tokens, num_heads + 2 * num_kv_heads, head_dim): queries, keys, values
        heads = self._qkv(hidden).view(len(hidden), -1, config.head_dim)
        num_rotated = config.num_heads + config.num_kv_heads
        rotated, value = heads[:, :num_rotated], heads[:, num_rotated:]
        if config.query_key_norm is not None:
            query, key = rotated[:, : config.num_heads], rotated[:, config.num_heads :]
            rotated = torch.cat((self._query_norm(query), self._key_norm(key)), dim=1)
        if config.rope is not None:
            rotated = rotate(rotated, step.rotations[config.rope, config.head_dim])
        query, key = rotated[:, : config.num_heads], rotated[:, config.num_heads :]
        attended = attend(config, step.plans[config.sliding_window], step.cache, self._place, query, key, value)
        return self._output(attended.flatten(1))


class _Mlp:
    def __init__(self, config: MlpConfig, name: str, weights: Weights) -> None:
        self._activation = ACTIVATIONS[config.activation]
        self._is_gated = config.gated
        self._gate_up = _Linear(f"{name}.gate_up_proj", weights)  # up alone where there is no gate
        self._down = _Linear(f"{name}.down_proj", weights)

    def __call__(self, hidden: Tensor) -> Tensor:
        if not self._is_gated:
            return self._down(self._activation(self._gate_up(hidden)))
        gate, up = self._gate_up(hidden).chunk(2, dim=-1)  # (num_tokens, intermediate_size) each
        return self._down(self._activation(gate) * up)


class _Moe:
    """Experts, each run once for all tokens that chose it."""

    def __init__(self, config: MoeConfig, name: str, weights: Weights) -> None:
        self._config = config
        self._activation = ACTIVATIONS[config.activation]
        self._router = _Linear(f"{name}.gate", weights)
        self._gate_up = weights[f"{name}.experts.gate_up_proj.weight"]  # (num_experts, 2 * intermediate_size, hidden)
        self._down = weights[f"{name}.experts.down_proj.weight"]  # (num_experts, hidden_size, intermediate_size)

    def __call__(self, hidden: Tensor) -> Tensor:
        shares, experts = self._route(hidden)
        choices = experts.flatten()  # all of the first token, then of the second, ...
        order = choices.argsort(stable=True)  # by expert
        counts = choices.bincount(minlength=self._config.num_experts).tolist()
        tokens = hidden.index_select(0, order // self._config.experts_per_token)
        groups = enumerate(torch.split(tokens, counts))
        results = torch.cat([self._run(expert, group) for expert, group in groups if len(group)])
        # Back in the order of the tokens, so that a sum does not depend on what else is in the batch.
        results = torch.empty_like(results).index_copy_(0, order, results)
        return (results.view(*shares.shape, -1) * shares[:, :, None]).sum(1).to(hidden.dtype)

    def _route(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return how much which expert counts, in float32, and which it is: each (num_tokens, experts_per_token)."""
        probabilities = self._router(hidden).float().softmax(-1)  # (num_tokens, num_experts)
        shares, experts = probabilities.topk(self._config.experts_per_token)
        if self._config.normalize:
            shares = shares / shares.sum(-1, keepdim=True)
        return shares, experts

    def _run(self, expert: int, tokens: Tensor) -> Tensor:
        gate, up = F.linear(tokens, self._gate_up[expert]).chunk(2, dim=-1)
        return F.linear(self._activation(gate) * up, self._down[expert])


class _Linear:
    """`x @ weight.T`, plus the bias where the model has one."""

    def __init__(self, name: str, weights: Weights) -> None:
        self._weight = weights[f"{name}.weight"]  # (out_features, in_features)
        self._bias = weights.get(f"{name}.bias")

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)


class _Norm:
    """Normalisation over the last axis. torch takes the statistics of low-precision activations in float32."""

    def __init__(self, config: NormConfig, name: str, weights: Weights) -> None:
        self._config = config
        weight = weights[f"{name}.weight"]
        # 1 + a small weight loses the weight in bfloat16, so a sum is kept, and applied, in float32.
        self._weight = weight if config.offset == 0 else weight.float() + config.offset
        bias = weights.get(f"{name}.bias")
        self._bias = None if bias is None else bias.to(self._weight.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        weight, eps = self._weight, self._config.eps
        wide = x.to(weight.dtype)
        if self._config.kind == "layer":
            return F.layer_norm(wide, weight.shape, weight, self._bias, eps).to(x.dtype)
        normed = F.rms_norm(wide, weight.shape, weight, eps)
        return (normed if self._bias is None else normed + self._bias).to(x.dtype)


def _norm(config: NormConfig | None, name: str, weights: Weights) -> Callable[[Tensor], Tensor]:
    return _unchanged if config is None else _Norm(config, name, weights)


def _unchanged(x: Tensor) -> Tensor:
    return x


def _rotary_lengths(batch: ForwardBatch) -> Indices:
    """Return for every token how long its sequence counts as (num_tokens,); see `DynamicRopeScaling`."""
    prompt_lengths = batch.context_lengths if batch.prompt_lengths is None else batch.prompt_lengths
    per_token = numpy.repeat(prompt_lengths, numpy.diff(batch.query_starts))
    return numpy.maximum(per_token, batch.positions + 1)
