"""Fixtures every test may use."""

from __future__ import annotations

import os

import pytest

from infinilm.plugins import PluginManager, create_plugin_manager

# Tests are tiny: threads of one step that wait for each other on a busy machine cost more than they save.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def pm() -> PluginManager:
    """A plugin manager with the in-tree plugins, that discovers nothing."""
    return create_plugin_manager(autoload=False)
