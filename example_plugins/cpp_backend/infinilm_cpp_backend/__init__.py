"""A backend in plain C++. This is its Python half: it says where the library is, and leaves the answer to it."""

from pathlib import Path

from infinilm.plugins import hookimpl, load_backend_plugin


@hookimpl
def provide_backend(request):
    # The folders of this package: in an editable install the library is in another one than this file.
    library = next(path for folder in __path__ if (path := Path(folder) / "plain.so").exists())
    return load_backend_plugin(library)
