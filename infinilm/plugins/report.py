"""What is known of every plugin, loaded or not: the rows of `infinilm plugins list`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Origin(StrEnum):
    """Where a plugin came from; the later in this list, the more the user meant it."""

    IN_TREE = "in-tree"
    ENTRY_POINT = "entry point"
    NAMED = "named"
    REGISTERED = "registered"

    @property
    def is_users_word(self) -> bool:
        """Whether the user asked for the plugin by name or in code."""
        return self in (Origin.NAMED, Origin.REGISTERED)


class Status(StrEnum):
    """What became of a plugin."""

    ACTIVE = "active"
    FAILED = "failed"
    BLOCKED = "blocked"
    FILTERED = "filtered"


@dataclass(frozen=True, slots=True)
class PluginRecord:
    """One plugin. `import_ms` is in milliseconds; `error` says why a failed one failed.

    `reference` is the name, module or path by which it can be loaded again, and `module` where its code lies; `None`
    for an object of this process. `library` is the path of a backend library.
    """

    name: str
    status: Status
    origin: Origin
    distribution: str | None = None
    version: str | None = None
    hooks: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()
    import_ms: float = 0.0
    error: str | None = None
    reference: str | None = None
    module: str | None = None
    library: str | None = None

    def describe(self) -> str:
        """Return the plugin's name with the distribution it comes from, for messages."""
        return f"{self.name!r} ({self.distribution} {self.version})" if self.distribution else repr(self.name)

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain JSON types."""
        return {name: value for name, value in asdict(self).items() if name not in ("reference", "module")}


def render_table(records: list[PluginRecord]) -> str:
    """Return the records as a table for a terminal, errors below their rows."""
    header = ("name", "status", "origin", "distribution", "hooks", "import")
    rows = [
        (
            record.name,
            str(record.status),
            str(record.origin),
            f"{record.distribution} {record.version}" if record.distribution else "-",
            ", ".join(record.hooks) or "-",
            f"{record.import_ms:.1f} ms" if record.status is Status.ACTIVE else "-",
        )
        for record in records
    ]
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [_line(header, widths)]
    for record, row in zip(records, rows, strict=True):
        lines.append(_line(row, widths))
        if record.error:
            lines.append(f"  {record.error}")
    return "\n".join(lines)


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
