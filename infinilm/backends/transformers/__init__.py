"""The transformers backend: runs any causal language model of the installed transformers, more slowly than others.

This module is the plugin. It is asked after every other one, and imports transformers only then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from infinilm.backends.transformers.support import why_not
from infinilm_hookspecs import BackendRequest, Config, UnavailableError, hookimpl

if TYPE_CHECKING:
    from infinilm.backends.transformers.backend import TransformersBackend


@hookimpl
def adapt_config(config: Config) -> Config | None:
    """State the sizes that the engine needs where a config that nobody else adapts leaves them to transformers."""
    if why_not() is not None:
        return None
    from infinilm.backends.transformers.families import missing_sizes

    sizes = missing_sizes(config)
    return {**config, **sizes} if sizes else None


@hookimpl
def provide_backend(request: BackendRequest) -> TransformersBackend | None:
    """Run the last raw config of the lineage that transformers knows as a causal language model."""
    reason = why_not(request)
    if reason is not None:
        request.decline(reason)
        return None
    from infinilm.backends.transformers.backend import TransformersBackend
    from infinilm.backends.transformers.families import find_family

    try:
        return TransformersBackend(request, find_family(request))
    except UnavailableError as err:
        request.decline(str(err))
        return None
