"""`infinilm serve`: an OpenAI-compatible server with a chat page."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from infinilm import __version__
from infinilm.cli.options import (
    EngineOptions,
    ModelOptions,
    add_engine_arguments,
    add_model_arguments,
    byte_size,
    positive_integer,
    positive_number,
)
from infinilm.plugins.report import Origin, Status

if TYPE_CHECKING:
    from infinilm.llm import LLM
    from infinilm.server.settings import Limits, Settings

_KEY_VARIABLE = "INFINILM_API_KEY"
_MAX_PORT = 65535
_log = logging.getLogger("infinilm.server")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_model_arguments(parser)
    add_engine_arguments(parser)
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", metavar="HOST", help="where to listen (%(default)s)")
    server.add_argument("--port", type=_port, default=8000, metavar="N", help="0 takes a free one (%(default)s)")
    server.add_argument(
        "--served-model-name", action="append", metavar="NAME", help="what clients call the model; several may be given"
    )
    server.add_argument(
        "--api-key",
        action="append",
        metavar="KEY",
        help=f"let only clients with a key in; several may be given. {_KEY_VARIABLE} keeps one out of the process list",
    )
    server.add_argument("--log-format", choices=("text", "json"), default="text", help="of the lines on stderr")
    server.add_argument(
        "--drain-timeout",
        type=positive_number,
        default=60.0,
        metavar="S",
        help="how long the end waits for requests",
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-body-size", type=byte_size, metavar="SIZE", help="of a request, e.g. 8M")
    limits.add_argument("--max-prompt-tokens", type=positive_integer, metavar="N", help="of one prompt")
    limits.add_argument("--max-tokens", type=positive_integer, metavar="N", help="that one answer may have")
    limits.add_argument("--max-answers", type=positive_integer, metavar="N", help="answers to one request")
    limits.add_argument("--max-concurrent-requests", type=positive_integer, metavar="N", help="more get a 429")
    limits.add_argument("--max-num-waiting", type=positive_integer, metavar="N", help="in the queue; more get a 429")
    limits.add_argument("--request-timeout", type=positive_number, metavar="S", help="after which an answer breaks off")


def run(arguments: Any) -> int:
    """Take the address, load the model and serve until a signal ends it."""
    from infinilm.llm import LLM
    from infinilm.server.logs import set_up_logs
    from infinilm.server.run import bind, run_server

    settings = _settings(arguments)
    with bind(arguments.host, arguments.port) as bound:
        set_up_logs(arguments.log_format)
        host, port = bound.getsockname()[:2]
        options = asdict(ModelOptions.of(arguments)) | asdict(EngineOptions.of(arguments))
        with LLM(arguments.model, plugins=arguments.plugins, **options) as llm:
            if not settings.api_keys and not _is_loopback(host):
                _log.warning(
                    "%s may be reached from other machines, and there is no --api-key: anybody may use it", host
                )
            run_server(
                llm,
                bound,
                settings,
                drain_timeout=arguments.drain_timeout,
                on_ready=lambda: print(describe(llm, settings, host, port), flush=True),
            )
    return 0


def describe(llm: LLM, settings: Settings, host: str, port: int) -> str:
    """Return what an operator wants to know of a server that is ready."""
    engine = llm.engine
    records = [record for record in llm.plugin_manager.records if record.status is Status.ACTIVE]
    foreign = [record.describe() for record in records if record.origin is not Origin.IN_TREE]
    address = f"[{host}]" if ":" in host else host
    rows = {
        "url": f"http://{address}:{port}, the chat page; the API is under /v1",
        "model": f"{', '.join(settings.served_model_names)}; up to {engine.max_model_len} tokens a sequence",
        "backend": f"{llm.backend.name} [plugin {llm.choice.plugin}]",
        "plugins": f"{len(records) - len(foreign)} in-tree" + "".join(f", {name}" for name in foreign),
        "limits": _describe_limits(settings.limits),
        "access": "with an API key" if settings.api_keys else "without an API key",
    }
    return "\n".join([f"infinilm {__version__} is ready", *(f"  {name:<9} {value}" for name, value in rows.items())])


def _describe_limits(limits: Limits) -> str:
    seconds = {name: f"{value:g} s" for name, value in asdict(limits).items() if name.endswith("_timeout") and value}
    shown = asdict(limits) | seconds | {"max_body_size": f"{limits.max_body_size / 2**20:g} MiB"}
    del shown["retry_after"]
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown.items() if value is not None)


def _settings(arguments: Any) -> Settings:
    from infinilm.server.settings import Limits, Settings

    names = Limits.__dataclass_fields__.keys() & vars(arguments).keys()
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    keys = [*(arguments.api_key or ()), os.environ.get(_KEY_VARIABLE, "")]
    return Settings(
        served_model_names=tuple(arguments.served_model_name or [arguments.model]),
        api_keys=tuple(key for key in keys if key),
        limits=Limits(**given),
    )


def _is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host.partition("%")[0]).is_loopback


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > _MAX_PORT:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; those go from 0 to {_MAX_PORT}")
    return int(text)
