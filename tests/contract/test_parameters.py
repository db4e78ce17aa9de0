"""The canonical parameters against transformers' llama, configs as JSON, and which dtypes contain which."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from infinilm_hookspecs import (
    AttentionConfig,
    DecoderConfig,
    EmbeddingConfig,
    LayerConfig,
    LayerNorms,
    LinearRopeScaling,
    LogitsConfig,
    MlpConfig,
    MoeConfig,
    Named,
    NormConfig,
    RopeConfig,
    Shard,
    parameters,
)
from infinilm_hookspecs.dtypes import ITEM_SIZES, dtype_name, is_lossless

NORM = NormConfig(eps=1e-5)
# Odd sizes: no two are equal, and heads * head_dim is not hidden_size, so that a wrong dimension shows.
CONFIG = DecoderConfig(
    model_type="llama",
    vocab_size=50,
    hidden_size=48,
    layers=(
        LayerConfig(
            mixer=AttentionConfig(num_heads=6, num_kv_heads=2, head_dim=10, rope=RopeConfig()),
            mlp=MlpConfig(intermediate_size=70),
            norms=LayerNorms(before_mixer=NORM, before_mlp=NORM),
        ),
    )
    * 3,
    embedding=EmbeddingConfig(),
    final_norm=NORM,
    logits=LogitsConfig(),
    max_position_embeddings=128,
)


def changed(*, tied: bool = False, attention_bias: bool = False, mlp_bias: bool = False) -> DecoderConfig:
    layer = CONFIG.layers[0]
    assert isinstance(layer.mixer, AttentionConfig)
    assert isinstance(layer.mlp, MlpConfig)
    mixer = replace(layer.mixer, qkv_bias=attention_bias, output_bias=attention_bias)
    layer = replace(layer, mixer=mixer, mlp=replace(layer.mlp, bias=mlp_bias))
    return replace(CONFIG, layers=(layer,) * 3, embedding=EmbeddingConfig(tied=tied))


# ---------------------------------------------------------------- parameters


def transformers_shapes(**options: bool) -> dict[str, tuple[int, ...]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50,
        hidden_size=48,
        intermediate_size=70,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        tie_word_embeddings=options.get("tied", False),
        attention_bias=options.get("attention_bias", False),
        mlp_bias=options.get("mlp_bias", False),
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}  # a tied one is named once


@pytest.mark.parametrize(
    "options",
    [{}, {"tied": True}, {"attention_bias": True}, {"mlp_bias": True}],
    ids=["plain", "tied", "attention biases", "mlp biases"],
)
def test_names_and_shapes_are_those_of_transformers(options: dict[str, bool]) -> None:
    specs = parameters(changed(**options))
    stored = {name: spec.shape for name, spec in specs.items() if spec.tied_to is None}
    assert stored == transformers_shapes(**options)
    ties = {name: spec.tied_to for name, spec in specs.items() if spec.tied_to is not None}
    assert ties == ({"lm_head.weight": "model.embed_tokens.weight"} if options.get("tied") else {})


def test_every_parameter_is_kept_in_the_dtype_asked_for() -> None:
    assert {spec.dtype for spec in parameters(CONFIG).values()} == {"float32"}
    assert {spec.dtype for spec in parameters(changed(tied=True), "bfloat16").values()} == {"bfloat16"}


def test_only_attention_is_cut_at_heads_and_norms_not_at_all() -> None:
    specs = parameters(changed(attention_bias=True, mlp_bias=True))
    layer = "model.layers.1"
    assert specs[f"{layer}.self_attn.k_proj.weight"].shard == Shard(0, multiple=10)
    assert specs[f"{layer}.self_attn.k_proj.bias"].shard == Shard(0, multiple=10)
    assert specs[f"{layer}.self_attn.o_proj.weight"].shard == Shard(1, multiple=10)
    assert specs[f"{layer}.mlp.up_proj.bias"].shard == Shard(0)
    assert specs[f"{layer}.mlp.down_proj.weight"].shard == Shard(1)
    for name in ("self_attn.o_proj.bias", "mlp.down_proj.bias", "input_layernorm.weight"):
        assert specs[f"{layer}.{name}"].shard is None, name


def test_layers_differ_as_data() -> None:
    plain, named = CONFIG.layers[0], Named("acme_mixer")
    layers = (plain, replace(plain, mixer=named), replace(plain, mlp=None, norms=LayerNorms(before_mixer=NORM)))
    names = set(parameters(replace(CONFIG, layers=layers)))
    assert not any(name.startswith("model.layers.1.self_attn") for name in names)
    assert "model.layers.1.mlp.up_proj.weight" in names
    assert not any(name.startswith("model.layers.2.mlp") for name in names)
    assert "model.layers.2.input_layernorm.weight" in names
    assert "model.layers.2.post_attention_layernorm.weight" not in names


# ---------------------------------------------------------------- JSON


def test_config_at_its_defaults_is_written_without_them() -> None:
    layer: dict[str, Any] = {
        "mixer": {"kind": "attention", "num_heads": 6, "num_kv_heads": 2, "head_dim": 10, "rope": {}},
        "mlp": {"kind": "mlp", "intermediate_size": 70},
        "norms": {"before_mixer": {"eps": 1e-5}, "before_mlp": {"eps": 1e-5}},
    }
    assert json.loads(CONFIG.to_json()) == {
        "model_type": "llama",
        "vocab_size": 50,
        "hidden_size": 48,
        "layers": [layer] * 3,
        "embedding": {},
        "final_norm": {"eps": 1e-5},
        "logits": {},
        "max_position_embeddings": 128,
    }


def test_whatever_is_not_at_its_default_is_written_with_its_kind() -> None:
    rope = RopeConfig(theta=5e5, scaling=LinearRopeScaling(factor=2.0))
    mixer = AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=4, rope=rope, scale=0.5, qkv_bias=True)
    layer = replace(CONFIG.layers[0], mixer=mixer, mlp=Named("acme_mlp", {"sizes": (1, 2), "deep": {"x": None}}))
    config = replace(changed(tied=True), layers=(layer,), logits=LogitsConfig(scale=0.25))
    written = json.loads(config.to_json())
    assert written["embedding"] == {"tied": True}
    assert written["logits"] == {"scale": 0.25}
    assert written["layers"][0]["mixer"] == {
        "kind": "attention",
        "num_heads": 1,
        "num_kv_heads": 1,
        "head_dim": 4,
        "rope": {"theta": 5e5, "scaling": {"kind": "linear", "factor": 2.0}},
        "scale": 0.5,
        "qkv_bias": True,
    }
    assert written["layers"][0]["mlp"] == {
        "kind": "named",
        "name": "acme_mlp",
        "options": {"sizes": [1, 2], "deep": {"x": None}},
    }


# ---------------------------------------------------------------- dtypes


def all_values(dtype: torch.dtype) -> torch.Tensor:
    """Return every value of a dtype of one or two bytes."""
    if dtype == torch.bool:
        return torch.tensor([False, True])
    size = torch.empty((), dtype=dtype).element_size()
    bits = torch.arange(256**size, dtype=torch.int64)
    return bits.to(torch.uint8 if size == 1 else torch.uint16).view(dtype)


def survives(values: torch.Tensor, target: torch.dtype) -> bool:
    """Return whether torch finds every value of `values` in `target`, -0 and infinities too."""
    one, other = values.double(), values.to(target).double()
    same = (one == other) & (torch.signbit(one) == torch.signbit(other))
    return bool((same | (one.isnan() & other.isnan())).all())


REAL = [name for name in ITEM_SIZES if not name.startswith("complex")]
SMALL = [name for name in REAL if ITEM_SIZES[name] <= 2]


@pytest.mark.parametrize("source", SMALL)
def test_lossless_is_what_torch_converts_without_a_change(source: str) -> None:
    values = all_values(getattr(torch, source))
    lossless = {target for target in REAL if is_lossless(source, target)}
    kept = {target for target in REAL if survives(values, getattr(torch, target))}
    assert lossless == kept


def test_lossless_is_a_partial_order() -> None:
    contained = {(a, b) for a, b in product(REAL, REAL) if is_lossless(a, b)}
    assert all((a, a) in contained for a in REAL)
    assert all(a == b or (b, a) not in contained for a, b in contained)
    assert all((a, d) in contained for (a, b), (c, d) in product(contained, contained) if b == c)


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("float32", "float64", True),
        ("float64", "float32", False),
        ("int32", "float32", False),
        ("int32", "float64", True),
        ("uint32", "int64", True),
        ("uint64", "int64", False),
        ("int64", "float64", False),
        ("float32", "complex64", True),
        ("float64", "complex64", False),
        ("complex64", "float32", False),
    ],
)
def test_wider_dtypes(source: str, target: str, expected: bool) -> None:
    assert is_lossless(source, target) is expected


def test_names_and_sizes_are_torchs() -> None:
    for name, size in ITEM_SIZES.items():
        dtype = getattr(torch, name)
        assert torch.empty((), dtype=dtype).element_size() == size
        assert dtype_name(dtype) == dtype_name(f"torch.{name}") == dtype_name(name) == name
    with pytest.raises(ValueError, match=r"unknown dtype torch.complex128; known: bool, uint8"):
        dtype_name(torch.complex128)


# ---------------------------------------------------------------- parts that llama lacks


def layer_shapes(**changes: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters of one layer, which is llama's but for `changes`, by their short names."""
    specs = parameters(replace(CONFIG, layers=(replace(CONFIG.layers[0], **changes),)))
    prefix = "model.layers.0."
    return {name.removeprefix(prefix): spec.shape for name, spec in specs.items() if name.startswith(prefix)}


PLAIN = layer_shapes()


def test_norms_on_both_sides_are_called_as_in_gemma2() -> None:
    shapes = layer_shapes(norms=LayerNorms(NORM, NORM, NORM, NORM))
    assert [name for name in shapes if "norm" in name] == [
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "pre_feedforward_layernorm.weight",
        "post_feedforward_layernorm.weight",
    ]
    assert list(shapes).index("post_attention_layernorm.weight") > list(shapes).index("self_attn.o_proj.weight")


def test_a_norm_after_the_mlp_alone_takes_no_name_from_another() -> None:
    shapes = layer_shapes(norms=LayerNorms(before_mlp=NORM, after_mlp=NORM))
    names = [name for name in shapes if "norm" in name]
    assert names == ["post_attention_layernorm.weight", "post_feedforward_layernorm.weight"]


def test_biases_of_norms() -> None:
    norm = NormConfig(kind="layer", bias=True)
    assert layer_shapes(norms=LayerNorms(norm, NORM)) == {**PLAIN, "input_layernorm.bias": (48,)}
    specs = parameters(replace(CONFIG, final_norm=norm))
    assert specs["model.norm.bias"].shape == (48,)


def test_norms_of_heads_are_shared_by_all_of_them() -> None:
    mixer = replace(CONFIG.layers[0].mixer, query_key_norm=NORM)
    norms = {"self_attn.q_norm.weight": (10,), "self_attn.k_norm.weight": (10,)}
    assert layer_shapes(mixer=mixer) == {**PLAIN, **norms}


def test_an_mlp_without_a_gate() -> None:
    shapes = layer_shapes(mlp=MlpConfig(70, bias=True, gated=False))
    assert {name: shape for name, shape in shapes.items() if name.startswith("mlp.")} == {
        "mlp.up_proj.weight": (70, 48),
        "mlp.up_proj.bias": (70,),
        "mlp.down_proj.weight": (48, 70),
        "mlp.down_proj.bias": (48,),
    }


def test_experts_are_one_by_one_and_every_rank_routes() -> None:
    shapes = layer_shapes(mlp=MoeConfig(num_experts=2, experts_per_token=1, intermediate_size=70))
    assert {name: shape for name, shape in shapes.items() if name.startswith("mlp.")} == {
        "mlp.gate.weight": (2, 48),
        **{
            f"mlp.experts.{expert}.{part}_proj.weight": (48, 70) if part == "down" else (70, 48)
            for expert in range(2)
            for part in ("gate", "up", "down")
        },
    }
    moe = replace(CONFIG.layers[0], mlp=MoeConfig(2, 1, 70))
    specs = parameters(replace(CONFIG, layers=(moe,)))
    assert specs["model.layers.0.mlp.gate.weight"].shard is None
    assert specs["model.layers.0.mlp.experts.1.up_proj.weight"].shard == Shard(0)
    assert specs["model.layers.0.mlp.experts.1.down_proj.weight"].shard == Shard(1)


def test_learned_positions_lie_beside_the_tokens() -> None:
    specs = parameters(replace(CONFIG, embedding=EmbeddingConfig(num_positions=33)))
    assert list(specs)[:2] == ["model.embed_tokens.weight", "model.embed_positions.weight"]
    assert specs["model.embed_positions.weight"].shape == (33, 48)
    assert specs["model.embed_positions.weight"].shard is None


def test_what_is_only_computed_has_no_parameters() -> None:
    mixer = replace(CONFIG.layers[0].mixer, sliding_window=7, softcap=2.0, scale=0.5)
    assert layer_shapes(mixer=mixer) == PLAIN
    config = replace(CONFIG, embedding=EmbeddingConfig(scale=7.0), logits=LogitsConfig(scale=2.0, softcap=30.0))
    assert parameters(config) == parameters(CONFIG)
