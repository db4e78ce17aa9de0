"""Fixtures every test may use."""

from __future__ import annotations

import pytest

from infinilm.plugins import PluginManager, create_plugin_manager


@pytest.fixture
def pm() -> PluginManager:
    """A plugin manager with the in-tree plugins, that discovers nothing."""
    return create_plugin_manager(autoload=False)
