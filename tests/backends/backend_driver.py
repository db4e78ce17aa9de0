"""Drive the torch backend by hand: a small model with random weights, and steps over sequences in any blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from infinilm.backends.torch.backend import TorchBackend
from infinilm.backends.torch.cache import BLOCK_SIZE
from infinilm_hookspecs import (
    AttentionConfig,
    DecoderConfig,
    DynamicRopeScaling,
    EmbeddingConfig,
    ForwardBatch,
    LayerConfig,
    LayerNorms,
    LogitsConfig,
    MlpConfig,
    NormConfig,
    RopeConfig,
)

NUM_BLOCKS = 64
DYNAMIC = RopeConfig(scaling=DynamicRopeScaling(factor=2.0, original_max_position_embeddings=16))


def decoder_config(rope: RopeConfig | None = DYNAMIC, *, tied: bool = False) -> DecoderConfig:
    norm = NormConfig()
    layer = LayerConfig(
        mixer=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6, rope=rope, qkv_bias=True),
        mlp=MlpConfig(intermediate_size=20),
        norms=LayerNorms(before_mixer=norm, before_mlp=norm),
    )
    return DecoderConfig(
        model_type="test",
        vocab_size=31,
        hidden_size=16,
        layers=(layer, layer),
        embedding=EmbeddingConfig(tied=tied),
        final_norm=norm,
        logits=LogitsConfig(),
        max_position_embeddings=1024,
    )


def load(backend: TorchBackend, seed: int = 0) -> dict[str, torch.Tensor]:
    """Fill every parameter with random numbers, last parameter first, and return them."""
    generator = torch.Generator().manual_seed(seed)
    stored = {name: torch.randn(spec.shape, generator=generator) * 0.5 for name, spec in backend.parameters().items()}
    for name, spec in reversed(backend.parameters().items()):
        if spec.tied_to is None:
            backend.destination(name).copy_(stored[name])
            backend.loaded(name)
    backend.finish_loading()
    return stored


def loaded_backend(config: DecoderConfig | None = None, *, dtype: str = "float32") -> TorchBackend:
    backend = TorchBackend(config or decoder_config(), dtype=dtype, device="cpu")
    load(backend)
    backend.allocate_cache(NUM_BLOCKS, num_slots=8)
    return backend


@dataclass
class Context:
    """A sequence on its way through the backend, and the blocks that hold it, in any order."""

    tokens: list[int]
    blocks: list[int]
    prompt_length: int | None = None
    num_computed: int = field(default=0, init=False)


def forward(
    backend: TorchBackend, work: Sequence[tuple[Context, int]], logits_indices: Sequence[int] | None = None
) -> torch.Tensor:
    """Compute the next so many tokens of each sequence in one step. By default all rows' logits are wanted."""
    token_ids, positions, slots = [], [], []
    tables = np.full((len(work), max(len(sequence.blocks) for sequence, _ in work)), -1, np.int32)
    for row, (sequence, count) in enumerate(work):
        span = range(sequence.num_computed, sequence.num_computed + count)
        token_ids += [sequence.tokens[position] for position in span]
        positions += span
        slots += [sequence.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE for position in span]
        tables[row, : len(sequence.blocks)] = sequence.blocks
        sequence.num_computed += count
    counts = [count for _, count in work]
    lengths = [sequence.prompt_length or len(sequence.tokens) for sequence, _ in work]
    return backend.forward(
        ForwardBatch(
            token_ids=np.array(token_ids, np.int32),
            positions=np.array(positions, np.int32),
            query_starts=np.cumsum([0, *counts], dtype=np.int32),
            context_lengths=np.array([sequence.num_computed for sequence, _ in work], np.int32),
            block_tables=tables,
            slot_mapping=np.array(slots, np.int32),
            slots=np.arange(len(work), dtype=np.int32),
            logits_indices=np.array(range(sum(counts)) if logits_indices is None else logits_indices, np.int32),
            extras=[None] * len(work),
            prompt_lengths=np.array(lengths, np.int32),
        )
    )


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 31, length).tolist()


def blocks_for(length: int, first: int = 0) -> list[int]:
    return list(range(first, first - (-length // BLOCK_SIZE)))


def whole(backend: TorchBackend, tokens: list[int], prompt_length: int | None = None) -> torch.Tensor:
    """Return the logits of all tokens, computed in one step in blocks nobody else uses."""
    sequence = Context(tokens, blocks_for(len(tokens), NUM_BLOCKS // 2), prompt_length)
    return forward(backend, [(sequence, len(tokens))])
