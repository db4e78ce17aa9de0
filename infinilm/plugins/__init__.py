"""The plugin host: which plugins there are, in which order, what they answered, and what failed and why.

Imports neither torch nor transformers.
"""

from infinilm.plugins.host import Answer, PluginManager
from infinilm.plugins.lineage import Lineage, trace_lineage
from infinilm.plugins.loading import create_plugin_manager
from infinilm.plugins.report import PluginRecord
from infinilm_hookspecs import hookimpl

__all__ = ["Answer", "Lineage", "PluginManager", "PluginRecord", "create_plugin_manager", "hookimpl", "trace_lineage"]
