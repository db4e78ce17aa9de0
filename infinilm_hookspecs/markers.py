"""The two markers of project `infinilm`: `hookspec` declares a hook, `hookimpl` answers one."""

import pluggy

PROJECT_NAME = "infinilm"

hookspec = pluggy.HookspecMarker(PROJECT_NAME)
hookimpl = pluggy.HookimplMarker(PROJECT_NAME)
