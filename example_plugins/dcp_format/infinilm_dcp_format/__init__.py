"""Checkpoints of `torch.distributed.checkpoint`: `.metadata`, and the chunks of every rank in `*.distcp`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from infinilm_hookspecs import hookimpl

if TYPE_CHECKING:
    from infinilm_dcp_format.checkpoint import DcpCheckpoint


@hookimpl
def open_checkpoint(source: str) -> DcpCheckpoint | None:
    if not (Path(source) / ".metadata").is_file():
        return None
    from infinilm_dcp_format.checkpoint import DcpCheckpoint

    return DcpCheckpoint(source)
