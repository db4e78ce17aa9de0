"""In-tree `select_processor` plugins: what turns text into tokens and back; and what plugins make parsers of.

`with_parser` gives a processor parsers for the answers of a model, from a `ResponseFormat` or a function.
"""

from infinilm.processors._response_formats import ParserFactory, ResponseFormat, with_parser
from infinilm.processors._response_parsers import AnswerParser, ContentParser
from infinilm.processors._tool_calls import ToolCallMarkup

__all__ = ["AnswerParser", "ContentParser", "ParserFactory", "ResponseFormat", "ToolCallMarkup", "with_parser"]
