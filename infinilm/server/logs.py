"""Logs of a server: every line has the id of the request it is about; as text or as JSON."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal

from infinilm.server.trace import current_request_id

LogFormat = Literal["text", "json"]
LOGGERS = ("infinilm.server", "uvicorn.error")


def set_up_logs(log_format: LogFormat, level: int = logging.INFO) -> None:
    """Have the server's loggers write to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_add_request_id)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level if name.startswith("infinilm") else max(level, logging.WARNING))


def fields(**values: Any) -> dict[str, Any]:
    """Return what `extra=` takes to give a line figures besides its message."""
    return {"fields": values}


class TextFormatter(logging.Formatter):
    """`12:00:00 INFO [id] message key=value`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        figures = "".join(f" {key}={value}" for key, value in _fields_of(record).items() if value is not None)
        request_id = getattr(record, "request_id", None)
        where = f" [{request_id}]" if request_id else ""
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        error = f"\n{self.formatException(record.exc_info)}" if record.exc_info else ""
        return f"{time} {record.levelname}{where} {record.getMessage()}{figures}{error}"


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": getattr(record, "request_id", None),
            **_fields_of(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def _fields_of(record: logging.LogRecord) -> dict[str, Any]:
    return dict(getattr(record, "fields", {}))


def _add_request_id(record: logging.LogRecord) -> bool:
    if not hasattr(record, "request_id"):
        record.request_id = current_request_id.get()
    return True
