"""The errors a user can meet: one root, one child per stage that can say no.

A message says what was wrong (with its `repr`), where it came from, and what to do next. Plugins raise these
too: the command line prints them as one line, without a traceback.
"""


class InfinilmError(Exception):
    """Root of every error that infinilm and its plugins raise on purpose."""


class PluginError(InfinilmError, ImportError):
    """A plugin could not be found, imported or registered, or answered a hook with the wrong type."""


class CheckpointError(InfinilmError, ValueError):
    """A checkpoint cannot be opened, or its files contradict themselves."""


class ConfigError(InfinilmError, ValueError):
    """A config has no owner, misses a key, or asks for something its family does not have."""


class UnavailableError(InfinilmError, RuntimeError):
    """No platform or backend here can do what was asked; the message lists every reason."""


class WeightError(InfinilmError, ValueError):
    """A weight rule asks for an operation that its weight cannot undergo."""


class PlanError(InfinilmError, ValueError):
    """The stored tensors and the backend's parameters do not fit; the message lists every misfit."""


class RequestError(InfinilmError, ValueError):
    """A request for generation is malformed or can never be served."""
