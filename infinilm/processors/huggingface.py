"""Processor plugin for folders with a `tokenizer.json`: the `tokenizers` library and a Jinja chat template.

Imports neither until a checkpoint has such a file, and transformers never.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from infinilm_hookspecs import hookimpl

if TYPE_CHECKING:
    from infinilm_hookspecs import Checkpoint, Config, DecoderConfig, Processor


@hookimpl
def select_processor(lineage: Sequence[Config | DecoderConfig], checkpoint: Checkpoint) -> Processor | None:
    """Take every checkpoint with a `tokenizer.json`."""
    if checkpoint.file("tokenizer.json") is None:
        return None
    from infinilm.processors._huggingface import HuggingFaceProcessor  # kept out of the plugin's own import

    return HuggingFaceProcessor.open(lineage, checkpoint)
