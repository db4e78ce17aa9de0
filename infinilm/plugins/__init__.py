"""The plugin host: which plugins there are, in which order, what they answered, and what failed and why.

Imports neither torch nor transformers. A model that is a known family by other names is a `ModelSpec`:

    register_model(
        model_type="acme",
        backend_model_type="llama",
        config_adapter={"hidden_size": "$width"},
        weight_rules=[{"h.{i}.wo": "model.layers.{i}.self_attn.o_proj.weight"}],
    )
"""

from infinilm.plugins.api import (
    adapt_config,
    load_backend_plugin,
    load_backend_plugins,
    load_backend_plugins_from_env,
    load_plugin,
    load_plugins,
    loaded_backend_plugins,
)
from infinilm.plugins.fingerprint import Fingerprint
from infinilm.plugins.host import Answer, PluginManager
from infinilm.plugins.lineage import Lineage, trace_lineage
from infinilm.plugins.loading import create_plugin_manager
from infinilm.plugins.model_spec import ModelSpec
from infinilm.plugins.registry import get_model_spec, register_model, registered_model_types
from infinilm.plugins.report import PluginRecord
from infinilm_hookspecs import hookimpl

__all__ = [
    "Answer",
    "Fingerprint",
    "Lineage",
    "ModelSpec",
    "PluginManager",
    "PluginRecord",
    "adapt_config",
    "create_plugin_manager",
    "get_model_spec",
    "hookimpl",
    "load_backend_plugin",
    "load_backend_plugins",
    "load_backend_plugins_from_env",
    "load_plugin",
    "load_plugins",
    "loaded_backend_plugins",
    "register_model",
    "registered_model_types",
    "trace_lineage",
]
