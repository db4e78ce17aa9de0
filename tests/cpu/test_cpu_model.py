"""The cpu backend against the torch backend: every part of a `DecoderConfig`, on every level of instructions.

Both get the same random weights. The torch backend is held against transformers by its own tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from backend_driver import NUM_BLOCKS, Context, blocks_for, decoder_config, forward, load, prompt, whole
from cpu_library import CpuBackend, isas

from infinilm.backends.torch.backend import TorchBackend
from infinilm_hookspecs import (
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
    NormConfig,
    RopeConfig,
    YarnRopeScaling,
)

LENGTH = 150
RMS = NormConfig()
LAYER = NormConfig(kind="layer", eps=1e-5, bias=True)
GEMMA = NormConfig(offset=1.0)


def config(
    *,
    mixer: dict[str, Any] | None = None,
    mlp: MlpConfig | MoeConfig | None = None,
    norms: LayerNorms | None = None,
    layers: Sequence[LayerConfig] | None = None,
    **fields: Any,
) -> DecoderConfig:
    """Return a small decoder that is llama but for what is given. No size is a multiple of another."""
    part = AttentionConfig(
        **({"num_heads": 6, "num_kv_heads": 2, "head_dim": 10, "rope": RopeConfig()} | (mixer or {}))
    )
    layer = LayerConfig(
        mixer=part, mlp=mlp or MlpConfig(43), norms=norms or LayerNorms(before_mixer=RMS, before_mlp=RMS)
    )
    defaults: dict[str, Any] = {
        "embedding": EmbeddingConfig(),
        "final_norm": RMS,
        "logits": LogitsConfig(),
        "max_position_embeddings": 1024,
    }
    return DecoderConfig(
        model_type="test",
        vocab_size=31,
        hidden_size=37,
        layers=tuple(layers) if layers else (layer, layer),
        **(defaults | fields),
    )


def windowed() -> DecoderConfig:
    one, two = config(mixer={"sliding_window": 21}), config(mixer={"num_heads": 4, "num_kv_heads": 4, "head_dim": 18})
    return config(layers=[*one.layers, *two.layers])


def rope(scaling: Any) -> dict[str, Any]:
    return {"rope": RopeConfig(theta=500.0, scaling=scaling)}


CONFIGS: dict[str, DecoderConfig] = {
    "llama": config(),
    "tied": config(embedding=EmbeddingConfig(tied=True)),
    "biases": config(mixer={"qkv_bias": True, "output_bias": True}, mlp=MlpConfig(43, bias=True)),
    "one head for all": config(mixer={"num_heads": 5, "num_kv_heads": 1}),
    "more heads than a tile has rows": config(mixer={"num_heads": 50, "num_kv_heads": 1, "head_dim": 4}),
    "wide heads": config(mixer={"num_heads": 2, "num_kv_heads": 1, "head_dim": 80}),
    "odd heads": config(mixer={"head_dim": 7, "rope": None}),
    "window": config(mixer={"sliding_window": 20}),
    "window of one": config(mixer={"sliding_window": 1}),
    "windows of some layers": windowed(),
    "scale and softcap": config(mixer={"scale": 0.7, "softcap": 1.5}),
    "softcap and window": config(mixer={"softcap": 2.0, "sliding_window": 33}),
    "query and key norms": config(mixer={"query_key_norm": NormConfig(eps=1e-5)}),
    "linear": config(mixer=rope(LinearRopeScaling(factor=3.0))),
    "dynamic": config(mixer=rope(DynamicRopeScaling(factor=2.0, original_max_position_embeddings=48))),
    "llama3": config(
        mixer=rope(
            Llama3RopeScaling(
                factor=8.0, original_max_position_embeddings=64, low_freq_factor=1.0, high_freq_factor=4.0
            )
        )
    ),
    "yarn": config(mixer=rope(YarnRopeScaling(factor=4.0, original_max_position_embeddings=32, attention_factor=1.14))),
    "yarn untruncated": config(
        mixer=rope(
            YarnRopeScaling(
                factor=4.0,
                original_max_position_embeddings=32,
                attention_factor=0.9,
                beta_fast=20.0,
                beta_slow=2.0,
                truncate=False,
            )
        )
    ),
    "gpt2": config(
        mixer={"rope": None, "qkv_bias": True, "output_bias": True},
        mlp=MlpConfig(43, activation="gelu_tanh", bias=True, gated=False),
        norms=LayerNorms(before_mixer=LAYER, before_mlp=LAYER),
        final_norm=LAYER,
        embedding=EmbeddingConfig(tied=True, num_positions=512),
    ),
    "gemma2": config(
        mixer={"softcap": 5.0, "scale": 0.25},
        mlp=MlpConfig(43, activation="gelu_tanh"),
        norms=LayerNorms(before_mixer=GEMMA, after_mixer=GEMMA, before_mlp=GEMMA, after_mlp=GEMMA),
        final_norm=GEMMA,
        embedding=EmbeddingConfig(tied=True, scale=37**0.5),
        logits=LogitsConfig(softcap=3.0),
    ),
    "norms after, none before": config(norms=LayerNorms(after_mixer=RMS, after_mlp=NormConfig(bias=True))),
    "gelu": config(mlp=MlpConfig(43, activation="gelu")),
    "relu, not gated": config(mlp=MlpConfig(43, activation="relu", gated=False)),
    "logits scaled": config(logits=LogitsConfig(scale=0.125)),
    "experts": config(mlp=MoeConfig(num_experts=5, experts_per_token=2, intermediate_size=19)),
    "experts normalised, norm after": config(
        mlp=MoeConfig(num_experts=8, experts_per_token=3, intermediate_size=19, normalize=True),
        norms=LayerNorms(before_mixer=RMS, before_mlp=RMS, after_mlp=RMS),
    ),
    "one expert": config(mlp=MoeConfig(num_experts=17, experts_per_token=1, intermediate_size=21)),
    "no MLP": config(layers=[replace(config().layers[0], mlp=None), config().layers[0]]),
    "no layers": replace(config(), layers=()),
}


def loaded(backend: Any) -> Any:
    load(backend)
    backend.allocate_cache(NUM_BLOCKS, num_slots=8)
    return backend


@cache
def expected(name: str, dtype: str) -> torch.Tensor:
    """Return the torch backend's logits of a prompt, all at once, in float32 however the weights are rounded."""
    backend = TorchBackend(CONFIGS[name], dtype="float32", device="cpu")
    specs = backend.parameters()
    generator = torch.Generator().manual_seed(0)
    stored = {name: torch.randn(spec.shape, generator=generator) * 0.5 for name, spec in specs.items()}
    for name_, spec in specs.items():
        if spec.tied_to is None:
            backend.destination(name_).copy_(stored[name_].to(getattr(torch, dtype)))
            backend.loaded(name_)
    backend.finish_loading()
    backend.allocate_cache(NUM_BLOCKS, num_slots=8)
    return whole(backend, prompt(LENGTH))


def in_pieces(backend: Any, bounds: Sequence[int]) -> torch.Tensor:
    sequence = Context(prompt(LENGTH), list(reversed(blocks_for(LENGTH))))
    return torch.cat([forward(backend, [(sequence, stop - start)]) for start, stop in pairwise(bounds)])


def assert_same_logprobs(logits: torch.Tensor, wanted: torch.Tensor) -> None:
    """The bound of the parity tests: log-probabilities within 1e-4."""
    torch.testing.assert_close(logits.log_softmax(-1), wanted.log_softmax(-1), atol=1e-4, rtol=0)


def row_errors(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return (logits - wanted).norm(dim=-1) / wanted.norm(dim=-1)


# ---------------------------------------------------------------- every part, every level


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_agrees_on_every_level(name):
    for isa in isas():
        backend = loaded(CpuBackend(CONFIGS[name], isa_name=isa))
        # A whole prompt, then a chunk of it, single tokens, few and many: all the ways of the kernels.
        bounds = [0, 70, 71, 72, 74, 77, 90, LENGTH]
        assert_same_logprobs(in_pieces(backend, bounds), expected(name, "float32"))


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_is_close_on_every_level(name):
    """Closer to float32 arithmetic on the same weights than torch is in bfloat16, row by row.

    Not all rows: where two experts are nearly as likely, rounding decides which one a token gets.
    """
    most = 0.95 if "expert" in name else 0.97
    wanted = expected(name, "bfloat16")
    reference = row_errors(
        whole(loaded(TorchBackend(CONFIGS[name], dtype="bfloat16", device="cpu")), prompt(LENGTH)), wanted
    )
    for isa in isas():
        backend = loaded(CpuBackend(CONFIGS[name], dtype="bfloat16", isa_name=isa))
        logits = in_pieces(backend, [0, 70, 71, 72, 74, 77, 90, LENGTH])
        error = row_errors(logits, wanted)
        assert error.median() <= reference.median(), isa
        assert error.quantile(most) <= reference.quantile(most), isa


@pytest.mark.parametrize("num_threads", [1, 2, 3, 7])
@pytest.mark.parametrize("name", ["windows of some layers", "experts", "gemma2"])
def test_any_number_of_threads(name, num_threads):
    backend = loaded(CpuBackend(CONFIGS[name], num_threads=num_threads))
    assert_same_logprobs(in_pieces(backend, [0, 3, 4, 100, LENGTH]), expected(name, "float32"))


def test_prompt_and_generated_tokens_are_rotated_as_the_contract_says():
    tokens = prompt(60)
    torch_backend, backend = loaded(TorchBackend(decoder_config(), dtype="float32", device="cpu")), None
    backend = loaded(CpuBackend(decoder_config()))
    for prompt_length in (8, 20, 60):  # of a dynamic scaling that begins at 16
        assert_same_logprobs(whole(backend, tokens, prompt_length), whole(torch_backend, tokens, prompt_length))


def test_sequences_of_a_batch_do_not_see_each_other():
    lengths, done = [1, 5, 17, 33, 40, 64, 2, 90], [0, 0, 16, 20, 39, 63, 1, 3]
    backend = loaded(CpuBackend(CONFIGS["window"]))
    first = np.cumsum([0, *(len(blocks_for(length)) for length in lengths)])
    sequences = [
        Context(prompt(length, seed=length), blocks_for(length, int(block)))
        for length, block in zip(lengths, first, strict=False)
    ]
    for sequence, count in zip(sequences, done, strict=True):
        if count:
            forward(backend, [(sequence, count)])
    counts = [length - count for length, count in zip(lengths, done, strict=True)]
    pieces = forward(backend, list(zip(sequences, counts, strict=True))).split(counts)
    for length, count, piece in zip(lengths, done, pieces, strict=True):
        wanted = whole(backend, prompt(length, seed=length))[count:]
        torch.testing.assert_close(piece, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama", "window"])
def test_a_long_context_is_cut_into_parts_and_joined(name):
    tokens = prompt(700)
    torch_backend = loaded(TorchBackend(CONFIGS[name], dtype="float32", device="cpu"))
    wanted = forward(torch_backend, [(Context(tokens, blocks_for(700)), 700)])
    backend = loaded(CpuBackend(CONFIGS[name], num_threads=4))
    sequence = Context(tokens, blocks_for(700))
    pieces = [forward(backend, [(sequence, count)]) for count in (690, 1, 1, 8)]
    assert_same_logprobs(torch.cat(pieces), wanted)


def test_only_the_logits_that_are_wanted():
    backend = loaded(CpuBackend(CONFIGS["llama"]))
    every = whole(backend, prompt(LENGTH))
    some = forward(backend, [(Context(prompt(LENGTH), blocks_for(LENGTH)), LENGTH)], [3, 77, 78, 100, 140, 149])
    torch.testing.assert_close(some, every[[3, 77, 78, 100, 140, 149]])
    assert forward(backend, [(Context(prompt(40), blocks_for(40)), 40)], []).shape == (0, 31)


# ---------------------------------------------------------------- the cache


def test_copied_blocks_go_their_own_ways():
    backend = loaded(CpuBackend(CONFIGS["llama"]))
    tokens = prompt(24)
    original = Context(tokens, [0, 1])
    forward(backend, [(original, 20)])
    backend.copy_blocks([(0, 5), (1, 6)])
    copy = Context([*tokens[:20], 1, 2, 3, 4], [5, 6])
    copy.num_computed = 20
    forward(backend, [(copy, 4)])
    torch.testing.assert_close(forward(backend, [(original, 4)]), whole(backend, tokens)[20:], atol=1e-5, rtol=0)


def test_blocks_are_copied_as_if_all_were_read_first():
    backend = loaded(CpuBackend(CONFIGS["llama"]))
    one, two = Context(prompt(17, seed=1), [0, 1]), Context(prompt(17, seed=2), [2, 3])
    forward(backend, [(one, 16), (two, 16)])
    backend.copy_blocks([(0, 2), (2, 0)])
    one.blocks, two.blocks = [2, 1], [0, 3]
    for sequence in (one, two):
        wanted = whole(backend, sequence.tokens)[16:]
        torch.testing.assert_close(forward(backend, [(sequence, 1)]), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("isa", ["scalar", None])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_others_left_in_a_block_is_not_seen(dtype, isa):
    backend = CpuBackend(CONFIGS["windows of some layers"], dtype=dtype, isa_name=isa)
    load(backend)
    backend.destination("model.embed_tokens.weight").fill_(float("nan"))
    backend.loaded("model.embed_tokens.weight")
    backend.allocate_cache(NUM_BLOCKS, num_slots=8)
    assert whole(backend, prompt(100)).isnan().all()
    load(backend)
    tokens = prompt(20)
    assert not forward(backend, [(Context(tokens, blocks_for(20, NUM_BLOCKS // 2)), 20)]).isnan().any()


# ---------------------------------------------------------------- integers


def in_groups(matrix: torch.Tensor, group: int) -> torch.Tensor:
    """Return a matrix as (rows, groups, group), with zeros behind its last column."""
    rows, columns = matrix.shape
    return torch.nn.functional.pad(matrix, (0, -columns % group)).view(rows, -1, group)


def at_scales(groups: torch.Tensor, scales: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """Return groups as they are once they are integers of fp16 scales."""
    scales = scales.half().float()
    return (groups / scales).nan_to_num(0).round().clamp(low, high) * scales


def int4_scales(groups: torch.Tensor) -> torch.Tensor:
    """Return the best of three: the largest weight is at -8, -9 or 7.5, and levels get their least squares scale."""
    peak = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    levels = torch.stack([(groups / (peak / place)).round().clamp(-8, 7) for place in (-8.0, -9.0, 7.5)])
    scales = (levels * groups).sum(-1, keepdim=True) / levels.square().sum(-1, keepdim=True)
    best = (levels * scales - groups).square().sum(-1, keepdim=True).argmin(0, keepdim=True)
    return scales.gather(0, best)[0]


def rounded_weight(name: str, weight: torch.Tensor, quantization: str, *, tied: bool) -> torch.Tensor:
    is_head = name == "lm_head.weight" or (tied and name == "model.embed_tokens.weight")
    if not is_head and (weight.ndim < 2 or "_proj." not in name):
        return weight
    if is_head or quantization == "int8":
        groups = in_groups(weight, 32)
        rounded = at_scales(groups, groups.abs().amax(-1, keepdim=True) / 127, -127, 127)
    else:
        groups = in_groups(weight, 128 if quantization.endswith("g128") else 32)
        rounded = at_scales(groups, int4_scales(groups), -8, 7)
    return rounded.flatten(1)[:, : weight.shape[1]]


@pytest.mark.parametrize("quantization", ["int8", "int4", "int4-g128"])
@pytest.mark.parametrize("name", ["llama", "tied", "biases", "gpt2", "experts", "wide heads"])
def test_quantized_models_are_their_rounded_weights(name, quantization):
    """torch runs the rounded weights in float32: what is left is the rounding of activations, as large as int8's."""
    config = CONFIGS[name]
    reference = TorchBackend(config, dtype="float32", device="cpu")
    generator = torch.Generator().manual_seed(0)
    stored = {key: torch.randn(spec.shape, generator=generator) * 0.5 for key, spec in reference.parameters().items()}
    for key, spec in reference.parameters().items():
        if spec.tied_to is None:
            weight = rounded_weight(key, stored[key], quantization, tied=config.embedding.tied)
            reference.destination(key).copy_(weight)
            reference.loaded(key)
    reference.finish_loading()
    reference.allocate_cache(NUM_BLOCKS, num_slots=8)
    wanted = whole(reference, prompt(LENGTH))
    for isa in isas():
        backend = loaded(CpuBackend(config, quantization=quantization, isa_name=isa))
        logits = in_pieces(backend, [0, 70, 71, 74, 90, LENGTH])
        assert row_errors(logits, wanted).median() <= 0.05, isa


def test_int8_weights_take_half_the_memory_of_bfloat16():
    sizes = {}
    for quantization in (None, "int8", "int4", "int4-g128"):
        wide = replace(
            config(mlp=MlpConfig(1024), mixer={"num_heads": 8, "num_kv_heads": 8, "head_dim": 64}), hidden_size=512
        )
        backend = CpuBackend(wide, dtype="bfloat16", quantization=quantization)
        load(backend)
        sizes[quantization] = backend.memory()["parameters"]
    assert sizes["int8"] / sizes[None] == pytest.approx(8.5 / 16, abs=0.02)
    assert sizes["int4"] / sizes[None] == pytest.approx(4.5 / 16, abs=0.02)
    assert sizes["int4-g128"] / sizes[None] == pytest.approx(4.125 / 16, abs=0.02)
