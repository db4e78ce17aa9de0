"""parallax: a decoder whose attention and MLP stand side by side, as a torch module over infinilm's paged attention.

Both halves of a block see the same normed activations, and their sum is added to the residual. The output of every
attention head is gated by the token, only the first `rotary_dim` elements of a head are rotated, every other block has
a sliding window, the MLP is `out(relu(in(x)) ** 2)`, and logits come from the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infinilm.backends.torch import Attention, ModuleBackend
from infinilm_hookspecs import BackendRequest, ConfigError, Shard

KEYS = {"model_type", "vocab_size", "width", "depth", "heads", "kv_heads", "head_dim", "rotary_dim", "rope_base",
        "ffn_width", "window", "norm_eps", "max_position_embeddings"}  # fmt: skip
NOT_THE_MODELS = {"dtype", "eos_token_id"}  # for the engine to read


def make_backend(request: BackendRequest) -> ModuleBackend | None:
    """Answer `provide_backend`; infinilm calls this when a checkpoint says that it is a parallax."""
    config = request.lineage[-1]
    unknown = sorted(set(config) - KEYS - NOT_THE_MODELS)
    if unknown:
        return request.decline(f"parallax does not know {', '.join(map(repr, unknown))} of this config")
    missing = sorted(KEYS - set(config))
    if missing:
        raise ConfigError(f"the config of this parallax lacks {', '.join(missing)}")
    return ModuleBackend.for_request(request, Parallax, shards={"embed.table": Shard(0)})


class Parallax(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.embed = nn.Module()
        self.embed.table = nn.Parameter(torch.empty(config["vocab_size"], config["width"]))
        self.rotary = Rotary(config["rotary_dim"], config["rope_base"])
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config["depth"]))
        self.norm = Norm(config)

    def forward(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """Return hidden states (num_tokens, width) of the new tokens of all sequences, end to end."""
        hidden = F.embedding(token_ids, self.embed.table)
        rotation = self.rotary(positions, hidden.dtype)
        for block in self.blocks:
            hidden = block(hidden, rotation)
        return self.norm(hidden)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Return logits (num_rows, vocab_size) of the rows that are wanted."""
        return F.linear(hidden, self.embed.table)


class Block(nn.Module):
    def __init__(self, config: Mapping[str, Any], index: int) -> None:
        super().__init__()
        self.norm = Norm(config)
        self.mix = Mix(config, window=None if index % 2 else config["window"])
        self.ffn = Ffn(config)

    def forward(self, hidden: Tensor, rotation: Tensor) -> Tensor:
        normed = self.norm(hidden)
        return hidden + self.mix(normed, rotation) + self.ffn(normed)


class Mix(nn.Module):
    def __init__(self, config: Mapping[str, Any], window: int | None) -> None:
        super().__init__()
        heads, kv_heads, head_dim = config["heads"], config["kv_heads"], config["head_dim"]
        width, rows = config["width"], (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
        self.num_heads = [heads, kv_heads, kv_heads]
        self.wqkv = nn.Parameter(torch.empty(sum(rows), width))
        self.gate = nn.Parameter(torch.empty(heads, width))
        self.wo = nn.Parameter(torch.empty(width, heads * head_dim))
        self.attention = Attention(heads, head_dim, num_kv_heads=kv_heads, sliding_window=window)
        self.shards = {
            "wqkv": Shard(0, multiple=head_dim, segments=rows),
            "gate": Shard(0),
            "wo": Shard(1, multiple=head_dim),
        }

    def forward(self, normed: Tensor, rotation: Tensor) -> Tensor:
        heads = F.linear(normed, self.wqkv).unflatten(-1, (sum(self.num_heads), -1))
        query, key, value = heads.split(self.num_heads, dim=1)  # (num_tokens, heads or kv_heads, head_dim)
        attended = self.attention(rotate(query, rotation), rotate(key, rotation), value)
        gate = F.linear(normed, self.gate).sigmoid()[:, :, None]  # (num_tokens, heads, 1)
        return F.linear((attended * gate).flatten(1), self.wo)


class Ffn(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(config["ffn_width"], config["width"]))
        self.down = nn.Parameter(torch.empty(config["width"], config["ffn_width"]))
        self.shards = {"up": Shard(0), "down": Shard(1)}

    def forward(self, normed: Tensor) -> Tensor:
        return F.linear(F.linear(normed, self.up).relu().square(), self.down)


class Norm(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.empty(config["width"]))
        self.eps = config["norm_eps"]

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.gain.shape, self.gain, self.eps)


class Rotary(nn.Module):
    """Angles of the pairs (2 i, 2 i + 1) of the first `dim` elements of a head."""

    def __init__(self, dim: int, base: float) -> None:
        super().__init__()
        self.dim, self.base = dim, base
        self.register_buffer("frequencies", torch.empty(dim // 2), persistent=False)

    def init_buffers(self) -> None:
        self.frequencies = self.base ** (-torch.arange(0, self.dim, 2) / self.dim)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        angles = positions[:, None, None].float() * self.frequencies
        return torch.stack((angles.cos(), angles.sin())).to(dtype)  # (2, num_tokens, 1, dim // 2)


def rotate(heads: Tensor, rotation: Tensor) -> Tensor:
    cosine, sine = rotation
    dim = 2 * cosine.shape[-1]
    even, odd = heads[..., 0:dim:2], heads[..., 1:dim:2]
    turned = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1).flatten(-2)
    return torch.cat((turned, heads[..., dim:]), dim=-1)
