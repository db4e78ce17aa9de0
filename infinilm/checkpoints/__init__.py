"""In-tree `open_checkpoint` plugins, one module each, and what plugins for other formats are built of."""

from infinilm.checkpoints._derived_files import DerivedFiles
from infinilm.checkpoints._files import OpenFiles, contiguous_runs
from infinilm.checkpoints._folder import file_inside, read_json_object, read_shard_index
from infinilm.checkpoints._restricted_pickle import Inert, load_restricted
from infinilm.checkpoints._shards import read_shards
from infinilm.checkpoints._torch_archive import ArchivedTensor, read_archive

__all__ = [
    "ArchivedTensor",
    "DerivedFiles",
    "Inert",
    "OpenFiles",
    "contiguous_runs",
    "file_inside",
    "load_restricted",
    "read_archive",
    "read_json_object",
    "read_shard_index",
    "read_shards",
]
