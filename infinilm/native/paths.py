"""Where the native part of infinilm is installed: headers, the CMake package, in-tree libraries.

It lies beside the extension module, which in an editable install is another folder than that of the Python files.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from infinilm_hookspecs import PluginError


def get_include() -> str:
    """Return the folder to give to a compiler with `-I`: it has `infinilm/backend.h`."""
    return str(_folder() / "include")


def get_cmake_dir() -> str:
    """Return the folder to give to CMake as `infinilm_DIR`, for `find_package(infinilm CONFIG)`."""
    return str(_folder() / "cmake")


def library_path(name: str) -> Path:
    """Return where the in-tree library `name` is installed."""
    return _folder() / "lib" / f"lib{name}.so"


def _folder() -> Path:
    spec = importlib.util.find_spec("infinilm._native")
    if spec is None or spec.origin is None:
        raise PluginError(
            "this infinilm has no native part: it runs from a folder that was never built; install it with "
            "'pip install .', or 'pip install -e .', which needs a C++ compiler"
        )
    return Path(spec.origin).parent
