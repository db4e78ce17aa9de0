"""Processor plugin for folders with a `tokenizer.json`, or a byte-level `vocab.json` and `merges.txt`.

The `tokenizers` library and a Jinja chat template, imported when a checkpoint has such files; transformers never.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from infinilm_hookspecs import hookimpl

if TYPE_CHECKING:
    from infinilm_hookspecs import Checkpoint, Config, DecoderConfig, Processor

_KINDS = (("tokenizer.json",), ("vocab.json", "merges.txt"))


@hookimpl
def select_processor(lineage: Sequence[Config | DecoderConfig], checkpoint: Checkpoint) -> Processor | None:
    """Take every checkpoint with the files of one kind."""
    if not any(all(checkpoint.file(name) for name in names) for names in _KINDS):
        return None
    from infinilm.processors._huggingface import HuggingFaceProcessor  # kept out of the plugin's own import

    return HuggingFaceProcessor.open(lineage, checkpoint)
