"""Backends that come as shared libraries, through the C ABI of `infinilm/backend.h`.

`libraries` opens them and answers `provide_backend` for them, `backend` is the `Backend` over a model of one, `paths`
says where headers and the CMake package are installed, and `check` tries a library in a process of its own. Nothing is
loaded at import, and torch only once there is a model to run.
"""
