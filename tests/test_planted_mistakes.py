"""The parity check must see: every mistake planted here makes it fail, and without one it passes.

Mistakes in weights are planted by editing the stored tensors, mistakes in the config by a wrapper plugin, mistakes in
the arithmetic of a backend by patching torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import oracle
import pytest
import torch
from oracle import Stored
from planting import (
    ConfigMistake,
    Mistaken,
    WeightMistake,
    edited,
    in_embedding,
    in_final_norm,
    in_logits,
    in_mixers,
    in_mlps,
    in_norms,
    swapped,
    with_windows,
    with_windows_swapped,
    without,
    without_biases,
)
from torch import Tensor
from transformers import (
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from infinilm import LLM
from infinilm.backends.torch import attention
from infinilm.backends.torch.cache import PagedCache
from infinilm_hookspecs import LinearRopeScaling, NormConfig, RopeConfig

IN_THE_PROMPT = r"prompt \d: a log-probability is off by"
WHILE_GENERATING = r"prompt \d: \[.*\], not \[|answer \d: a log-probability is off by"

HEAD_DIM = 12
# Square where it can be, so that a transposed matrix still fits, and with every bias there is.
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-2,
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SIZES, sliding_window=20),
    "qwen2": Qwen2Config(**SIZES, **WINDOWS),
    "qwen3": Qwen3Config(**SIZES, head_dim=HEAD_DIM, attention_bias=True),
    # Caps as in the published models: a mistake must show where they hardly bend anything.
    "gemma2": Gemma2Config(**SIZES, head_dim=HEAD_DIM, sliding_window=20, query_pre_attn_scalar=9),
    "gpt2": GPT2Config(
        vocab_size=97,
        n_embd=48,
        n_layer=2,
        n_head=4,
        n_positions=128,
        layer_norm_epsilon=1e-2,
        bos_token_id=None,
        eos_token_id=None,
    ),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
}


@pytest.fixture(scope="module")
def checkpoint(request, tmp_path_factory) -> tuple[Path, list[list[int]], list[oracle.Answer]]:
    folder = tmp_path_factory.mktemp(request.param)
    model = oracle.write_checkpoint(folder, CONFIGS[request.param])
    return folder, *oracle.examine(model)


def each(mistakes: Mapping[str, Mapping[str, object]]) -> pytest.MarkDecorator:
    """Parametrize a test by family and mistake."""
    cases = [
        pytest.param(family, mistake, id=f"{family}: {name}")
        for family, by_name in mistakes.items()
        for name, mistake in by_name.items()
    ]
    return pytest.mark.parametrize(("checkpoint", "mistake"), cases, indirect=["checkpoint"])


def in_family(*families: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("checkpoint", families, indirect=True)


def check(checkpoint, *, folder: Path | None = None, plugins: tuple[object, ...] = (), backend: str = "auto") -> None:
    original, prompts, expected = checkpoint
    options: dict[str, Any] = {"platform": "cpu", "dtype": "float32", "max_model_len": 128}
    llm = LLM(str(folder or original), plugins=plugins, backend=backend, **options)
    oracle.check_parity(llm, prompts, expected)


@pytest.mark.parametrize("backend", oracle.BACKENDS)
@in_family(*CONFIGS)
def test_without_a_mistake_the_check_passes(checkpoint, backend):
    check(checkpoint, backend=backend)


# ---------------------------------------------------------------- in the weights


def heads_rolled(tensor: Tensor) -> Tensor:
    return tensor.roll(HEAD_DIM, 0)


def pairs_interleaved(tensor: Tensor) -> Tensor:
    """Store rows as a model does that rotates neighbours instead of halves."""
    return tensor.unflatten(0, (-1, 2, HEAD_DIM // 2)).transpose(1, 2).reshape(tensor.shape)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.T if tensor.ndim == 2 else tensor


def qkv_rolled(tensor: Tensor) -> Tensor:
    """Store v, q, k instead of q, k, v."""
    return tensor.roll(tensor.shape[-1] // 3, -1)


def without_last_layer(stored: Stored) -> Stored:
    skipped = ("model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj")
    return {name: tensor * 0 if name.startswith(skipped) else tensor for name, tensor in stored.items()}


def tied_by_mistake(stored: Stored) -> Stored:
    return {**stored, "lm_head.weight": stored["model.embed_tokens.weight"].clone()}


def without_final_norm_weight(stored: Stored) -> Stored:
    return {**stored, "model.norm.weight": torch.ones_like(stored["model.norm.weight"])}


WEIGHT_MISTAKES: dict[str, dict[str, WeightMistake]] = {
    "llama": {
        "norms swapped": swapped("input_layernorm", "post_attention_layernorm"),
        "one added to norms": edited("input_layernorm", edit=lambda weight: weight + 1),
        "final norm's weight ignored": without_final_norm_weight,
        "layers swapped": swapped("0", "1"),
        "a layer skipped": without_last_layer,
        "output tied": tied_by_mistake,
        "q bias dropped": without_biases("q_proj"),
        "k bias dropped": without_biases("k_proj"),
        "v bias dropped": without_biases("v_proj"),
        "output bias dropped": without_biases("o_proj"),
        "mlp biases dropped": without_biases("gate_proj", "up_proj", "down_proj"),
        "q heads permuted": edited("q_proj", edit=heads_rolled),
        "kv heads swapped": edited("k_proj", "v_proj", edit=heads_rolled),
        "k and v swapped": swapped("k_proj", "v_proj"),
        "rope interleaved": edited("q_proj", "k_proj", edit=pairs_interleaved),
        "output transposed": edited("o_proj", edit=transposed),
        "gate and up swapped": swapped("gate_proj", "up_proj"),
    },
    "qwen2": {
        "q bias dropped": without_biases("q_proj"),
        "k bias dropped": without_biases("k_proj"),
        "v bias dropped": without_biases("v_proj"),
    },
    "qwen3": {
        "q and k norm swapped": swapped("q_norm", "k_norm"),
        "q norm's weight ignored": edited("q_norm", edit=torch.ones_like),
        "k norm's weight ignored": edited("k_norm", edit=torch.ones_like),
        "output bias dropped": without_biases("o_proj"),
    },
    "gemma2": {
        "norms around attention swapped": swapped("input_layernorm", "post_attention_layernorm"),
        "norms between the halves swapped": swapped("post_attention_layernorm", "pre_feedforward_layernorm"),
        "norms around the mlp swapped": swapped("pre_feedforward_layernorm", "post_feedforward_layernorm"),
        "one added to norms": edited("post_feedforward_layernorm", edit=lambda weight: weight + 1),
    },
    "gpt2": {
        "positions shifted by one": edited("wpe", edit=lambda table: table.roll(1, 0)),
        "positions dropped": edited("wpe", edit=torch.zeros_like),
        "first norm's bias dropped": without("ln_1.bias"),
        "second norm's bias dropped": without("ln_2.bias"),
        "final norm's bias dropped": without("ln_f.bias"),
        "qkv bias dropped": without_biases("c_attn"),
        "projections' biases dropped": without_biases("c_proj"),
        "mlp bias dropped": without_biases("c_fc"),
        "qkv in another order": edited("c_attn", edit=qkv_rolled),
        "output not transposed": edited("attn.c_proj", edit=transposed),
    },
    "mixtral": {
        "experts swapped": swapped("experts.0", "experts.3"),
        "experts' gates swapped": swapped("experts.1.w1", "experts.2.w1"),
        "experts' outputs swapped": swapped("experts.1.w2", "experts.2.w2"),
        "gate and up swapped": swapped("w1", "w3"),
        "router's experts rolled": edited("gate", edit=lambda router: router.roll(1, 0)),
    },
}


@each(WEIGHT_MISTAKES)
def test_mistake_in_the_weights(checkpoint, tmp_path, mistake):
    folder, _, _ = checkpoint
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    oracle.edit_tensors(folder, mistake, target=tmp_path)
    with pytest.raises(AssertionError, match=IN_THE_PROMPT):
        check(checkpoint, folder=tmp_path)


# ---------------------------------------------------------------- in the config

WINDOW_MISTAKES: dict[str, ConfigMistake] = {
    "window one too short": with_windows(19),
    "window one too long": with_windows(21),
    "window dropped": with_windows(None),
}
CONFIG_MISTAKES: dict[str, dict[str, ConfigMistake]] = {
    "llama": {
        "rope off": in_mixers(rope=None),
        "rope base changed": in_mixers(rope=RopeConfig(theta=20000.0)),
        "rope scaled": in_mixers(rope=RopeConfig(scaling=LinearRopeScaling(2.0))),
        "attention scale of the whole width": in_mixers(scale=48**-0.5),
        "activation changed": in_mlps(activation="gelu"),
        "eps of the layers changed": in_norms(eps=1e-6),
        "eps of the final norm changed": in_final_norm(eps=1e-6),
        "logits scaled": in_logits(scale=1.01),
    },
    "mistral": WINDOW_MISTAKES,
    "qwen2": {
        **WINDOW_MISTAKES,
        "windows in the lower layers": with_windows_swapped,
        "windows in all layers": in_mixers(sliding_window=20),
    },
    "qwen3": {"eps of q and k norm changed": in_mixers(query_key_norm=NormConfig(eps=1e-6))},
    "gemma2": {
        **WINDOW_MISTAKES,
        "alternating windows swapped": with_windows_swapped,
        "windows in all layers": in_mixers(sliding_window=20),
        "attention's softcap dropped": in_mixers(softcap=None),
        "attention's softcap that of the logits": in_mixers(softcap=30.0),
        "final softcap dropped": in_logits(softcap=None),
        "norm offset dropped": in_norms(offset=0.0),
        "final norm's offset dropped": in_final_norm(offset=0.0),
        "embedding scale dropped": in_embedding(scale=1.0),
        "attention scale of the head": in_mixers(scale=None),
        "exact gelu": in_mlps(activation="gelu"),
    },
    "gpt2": {
        "exact gelu": in_mlps(activation="gelu"),
        "mean left in": in_norms(kind="rms"),
        "mean left in at the end": in_final_norm(kind="rms"),
        "eps of the layers changed": in_norms(eps=1e-5),
    },
    "mixtral": {
        "router not normalised": in_mlps(normalize=False),
        "one expert too few": in_mlps(experts_per_token=1),
        "one expert too many": in_mlps(experts_per_token=3),
        "activation changed": in_mlps(activation="gelu"),
    },
}


@each(CONFIG_MISTAKES)
def test_mistake_in_the_config(checkpoint, mistake):
    with pytest.raises(AssertionError, match=IN_THE_PROMPT):
        check(checkpoint, plugins=(Mistaken(mistake),))


# ---------------------------------------------------------------- in the torch backend


@in_family("llama")
def test_attention_to_the_future(checkpoint, monkeypatch):
    def attend_all(config: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return right(config, query, key.flip(1), value.flip(1))

    right = attention._attend_whole
    monkeypatch.setattr(attention, "_attend_whole", attend_all)
    with pytest.raises(AssertionError, match=IN_THE_PROMPT):
        check(checkpoint, backend="torch")


@in_family("qwen3")
def test_query_and_key_norm_dropped(checkpoint, monkeypatch):
    monkeypatch.setattr("infinilm.backends.torch.decoder._norm", norm_but_not_of_heads)
    with pytest.raises(AssertionError, match=IN_THE_PROMPT):
        check(checkpoint, backend="torch")


def norm_but_not_of_heads(config: NormConfig | None, name: str, weights: Any) -> Callable[[Tensor], Tensor]:
    from infinilm.backends.torch.decoder import _Norm, _unchanged

    return _unchanged if config is None or name.endswith(("q_norm", "k_norm")) else _Norm(config, name, weights)


@in_family("gemma2")
def test_a_norm_after_the_residual(checkpoint, monkeypatch):
    def call(self: Any, hidden: Tensor, step: Any) -> Tensor:
        hidden = self._after_mixer(hidden + self._mixer(self._before_mixer(hidden), step))
        return self._after_mlp(hidden + self._mlp(self._before_mlp(hidden)))

    monkeypatch.setattr("infinilm.backends.torch.decoder._Layer.__call__", call)
    with pytest.raises(AssertionError, match=IN_THE_PROMPT):
        check(checkpoint, backend="torch")


@in_family(*CONFIGS)
def test_decoding_from_the_wrong_slots_shows_in_what_is_generated(checkpoint, monkeypatch):
    def gather_one_off(self: PagedCache, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        return right(self, layer, slots.roll(1))

    right = PagedCache.gather
    monkeypatch.setattr(PagedCache, "gather", gather_one_off)
    with pytest.raises(AssertionError, match=WHILE_GENERATING):
        check(checkpoint, backend="torch")


@in_family("mistral")
def test_decoding_in_a_window_one_off_shows_in_what_is_generated(checkpoint, monkeypatch):
    def slots_one_off(batch: Any, sequences: Any, starts: Any, length: int) -> Any:
        return right(batch, sequences, numpy.maximum(starts - 1, 0), length)

    right = attention._context_slots
    monkeypatch.setattr(attention, "_context_slots", slots_one_off)
    with pytest.raises(AssertionError, match=WHILE_GENERATING):
        check(checkpoint, backend="torch")
