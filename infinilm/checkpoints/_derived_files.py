"""Files that a checkpoint has only in another form, written out where somebody asks for them."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path


class DerivedFiles:
    """Made when they are first asked for, in a temporary folder that goes with the checkpoint."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._remove: weakref.finalize[[str], DerivedFiles] | None = None

    def path(self, name: str, make: Callable[[], str]) -> Path:
        """Return the path of the file `name`, whose text is what `make` returns."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="infinilm-"))
            self._remove = weakref.finalize(self, shutil.rmtree, str(self._folder), ignore_errors=True)
        path = self._folder / name
        if not path.exists():
            path.write_text(make(), encoding="utf-8")
        return path

    def close(self) -> None:
        """Remove every file. Safe to call twice; a file that is asked for later is made again."""
        if self._remove is not None:
            self._remove()
        self._folder = self._remove = None
