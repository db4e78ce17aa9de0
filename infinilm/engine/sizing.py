"""How large the paged cache is: from the memory there is, or from what the user allows."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from infinilm_hookspecs import CacheSpec, Platform, UnavailableError

_log = logging.getLogger("infinilm")

# Of the memory that is free once the weights are loaded; on a CPU the rest of the machine wants some too.
_SHARE_OF_FREE_MEMORY = {"cpu": 0.5}
_SHARE_OF_FREE_DEVICE_MEMORY = 0.9


@dataclass(frozen=True, slots=True)
class CacheSize:
    """Blocks of the paged cache, and the longest sequence, in tokens, that they can hold."""

    num_blocks: int
    max_model_len: int


def size_cache(
    spec: CacheSpec,
    platform: Platform,
    device: str,
    *,
    max_model_len: int,
    is_length_demanded: bool,
    max_num_seqs: int,
    memory: int | None,
) -> CacheSize:
    """Return the cache for `max_num_seqs` sequences of `max_model_len` tokens, or as much of it as `memory` bytes hold.

    `memory=None` takes a share of what is free. A length that was not demanded shrinks to what fits, which is said;
    one that was raises `UnavailableError` with the numbers.
    """
    if memory is None:
        free, _ = platform.memory(device)
        memory = int(free * _SHARE_OF_FREE_MEMORY.get(platform.name, _SHARE_OF_FREE_DEVICE_MEMORY))
    memory -= spec.bytes_per_slot * max_num_seqs
    per_sequence = -(-max_model_len // spec.block_size)
    num_blocks = min(per_sequence * max_num_seqs, memory // spec.bytes_per_block if spec.bytes_per_block else 1 << 30)
    if num_blocks >= per_sequence:
        return CacheSize(num_blocks, max_model_len)
    fits = max(num_blocks, 0) * spec.block_size
    numbers = (
        f"the cache has {memory} bytes, which hold {fits} tokens at {spec.bytes_per_block} bytes for every "
        f"{spec.block_size}, and one sequence may take {max_model_len}"
    )
    if is_length_demanded or fits < 1:
        raise UnavailableError(f"{numbers}; raise kv_cache_memory or lower max_model_len")
    _log.warning("%s; sequences are limited to %d tokens", numbers, fits)
    return CacheSize(num_blocks, fits)
