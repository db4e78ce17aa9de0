"""Response formats: how a model marks reasoning and tool calls, as its chat template shows or a plugin says."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infinilm.processors._response_parsers import AnswerParser, ContentParser
from infinilm.processors._tool_calls import ToolCallMarkup
from infinilm_hookspecs import PluginError, Processor, RequestError
from infinilm_hookspecs.types import ResponseParser, TokenStream

Tools = Sequence[Mapping[str, Any]]
ParserFactory = Callable[[Tools | None, str], ResponseParser]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseFormat:
    """How a model writes its answers. `reasoning` is a pair of markers, `tool_calls` what stands around calls.

    Raises `PluginError` for markers that are empty.
    """

    reasoning: tuple[str, str] | None = None
    tool_calls: ToolCallMarkup | None = None

    def __post_init__(self) -> None:
        if self.reasoning is not None and (len(self.reasoning) != 2 or not all(self.reasoning)):
            raise PluginError(f"ResponseFormat: reasoning={self.reasoning!r} is not two markers")

    def parser(self, tools: Tools | None, prompt: str, is_special: Callable[[str], bool]) -> ResponseParser:
        """Return a parser for one answer to `prompt`; `is_special` says of a marker whether it is a special token."""
        markup = self.tool_calls if tools else None
        if self.reasoning is None and markup is None:
            return ContentParser()
        markers = (*(self.reasoning or ()), *(markup.markers if markup is not None else ()))
        return AnswerParser(
            reasoning=self.reasoning,
            tool_calls=markup,
            tool_names=_names(tools or ()),
            starts_in_reasoning=self.reasoning is not None and prompt.rstrip().endswith(self.reasoning[0]),
            reads_special_tokens=any(map(is_special, markers)),
        )


_TAGGED = ToolCallMarkup(begin="<tool_call>", end="</tool_call>")
_LISTED = ToolCallMarkup(begin="[TOOL_CALLS]", name_end="[ARGS]", id_begin="[CALL_ID]")
_BARE = ToolCallMarkup(begin="<|python_tag|>", separator=";", may_be_bare=True)

# What a template that teaches a markup has in it, all of it, and the markup. The first that fits counts.
_TOOL_CALLS = (
    # {"name": ..., "arguments": {...}} in tags: https://github.com/NousResearch/Hermes-Function-Calling
    (("<tool_call>", '{"name": '), _TAGGED),
    # An array of the same, later name{...} and name[ARGS]{...}: https://github.com/mistralai/mistral-common
    (("[TOOL_CALLS]",), _LISTED),
    # {"name": ..., "parameters": {...}} as the whole answer: https://github.com/meta-llama/llama-models
    (('{"name": function name, "parameters": ',), _BARE),
)
_REASONING = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))


def recognise_format(templates: Collection[str]) -> ResponseFormat:
    """Return what the chat templates of a model say about its answers.

    The template comes with the tokenizer, and a model that was tuned to another markup than its family's brings one.
    """
    text = "\n".join(templates).replace('\\"', '"')  # as in a string of the template's
    return ResponseFormat(
        reasoning=next((pair for pair in _REASONING if pair[1] in text), None),
        tool_calls=next((markup for signs, markup in _TOOL_CALLS if all(sign in text for sign in signs)), None),
    )


def with_parser(processor: Processor, parser: ResponseFormat | ParserFactory) -> Processor:
    """Return `processor` with other parsers: of a format, or from a function of the tools and the prompt."""
    return _ProcessorWithParser(processor, parser)


class _ProcessorWithParser:
    def __init__(self, processor: Processor, parser: ResponseFormat | ParserFactory) -> None:
        self.eos_token_ids = processor.eos_token_ids
        self._processor = processor
        self._parser = parser
        self._special: frozenset[str] | None = None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self._processor.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._processor.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def stream(self, *, skip_special_tokens: bool = True) -> TokenStream:
        return self._processor.stream(skip_special_tokens=skip_special_tokens)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Tools | None = None,
        add_generation_prompt: bool = True,
        **template_kwargs: Any,
    ) -> str:
        return self._processor.render_chat(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, **template_kwargs
        )

    def parser(self, *, tools: Tools | None = None, prompt: str = "") -> ResponseParser:
        if isinstance(self._parser, ResponseFormat):
            return self._parser.parser(tools, prompt, self._is_special)
        return self._parser(tools, prompt)

    def token_bytes(self) -> Sequence[bytes | None]:
        return self._processor.token_bytes()

    def _is_special(self, text: str) -> bool:
        if self._special is None:
            ids = (token_id for token_id, data in enumerate(self.token_bytes()) if data is None)
            self._special = frozenset(self.decode([token_id], skip_special_tokens=False) for token_id in ids)
        return text in self._special


def _names(tools: Tools) -> frozenset[str]:
    """Return the names of tools, in OpenAI's shape or without its outer object."""
    functions = [tool.get("function", tool) for tool in tools]
    for at, function in enumerate(functions):
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError(f"tools[{at}] has no function with a name: {tools[at]!r:.200}")
    return frozenset(function["name"] for function in functions)
