"""Processor plugin for folders with a sentencepiece model (`tokenizer.model`, `spiece.model`) and no `tokenizer.json`.

The `sentencepiece` package is the extra `infinilm[sentencepiece]`, imported when a checkpoint has such a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from infinilm_hookspecs import hookimpl

if TYPE_CHECKING:
    from infinilm_hookspecs import Checkpoint, Config, DecoderConfig, Processor

_NAMES = ("tokenizer.model", "spiece.model")


@hookimpl
def select_processor(lineage: Sequence[Config | DecoderConfig], checkpoint: Checkpoint) -> Processor | None:
    """Take every checkpoint with a sentencepiece model that nobody has converted."""
    paths = [path for path in map(checkpoint.file, _NAMES) if path is not None]
    if not paths or checkpoint.file("tokenizer.json") is not None:
        return None
    from infinilm.processors._sentencepiece import SentencePieceProcessor  # kept out of the plugin's own import

    return SentencePieceProcessor.open(paths[0], lineage, checkpoint)
