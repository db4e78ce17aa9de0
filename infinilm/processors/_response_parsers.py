"""Response parsers: what a piece of a model's answer is."""

from __future__ import annotations

from infinilm_hookspecs import ParsedText


class ContentParser:
    """Takes all text for content."""

    def put(self, text: str) -> ParsedText:
        """Return `text` as content."""
        return ParsedText(content=text)
