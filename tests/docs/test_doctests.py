"""Every example in a docstring of the contract runs."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import zipfile
from pathlib import Path

import pytest

import infinilm_hookspecs

MODULES = [infinilm_hookspecs.__name__] + [
    f"infinilm_hookspecs.{module.name}" for module in pkgutil.iter_modules(infinilm_hookspecs.__path__)
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    module = importlib.import_module(name)
    names = {**vars(infinilm_hookspecs), **vars(module), "Path": Path, "zipfile": zipfile}
    failed, _ = doctest.testmod(module, extraglobs=names, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0
