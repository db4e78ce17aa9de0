"""Tools of a chat request: which the model sees, and what a forced call must look like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from infinilm.sampling_params import StructuredOutputsParams
from infinilm.server.errors import ApiError
from infinilm.server.protocol import ChatRequest, Function, NamedTool

_ANYTHING = {"type": "object"}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """How one request uses tools.

    `shown` is what the chat template and the parser get. `mode` says what the text of an answer is: "auto", whatever
    the model writes; "named", the arguments of `name`; "required", a JSON list of calls, each with name and parameters.
    """

    shown: tuple[dict[str, Any], ...] | None
    mode: Literal["auto", "named", "required"]
    name: str | None = None
    structure: StructuredOutputsParams | None = None
    is_parallel: bool = True


def tool_use(request: ChatRequest) -> ToolUse:
    """Return how a request uses tools. Raises `ApiError` where its choice and its tools contradict each other."""
    functions = {tool.function.name: tool.function for tool in request.tools or ()}
    if len(functions) < len(request.tools or ()):
        raise ApiError(400, "two tools have the same function name; rename one", param="tools")
    choice = request.tool_choice
    if choice is not None and choice != "none" and not functions:
        raise ApiError(400, "tool_choice wants tools, and there are none", param="tool_choice")
    if not functions or choice == "none":
        return ToolUse(None, "auto")
    shown = tuple(tool.model_dump(exclude_none=True) for tool in request.tools or ())
    is_parallel = request.parallel_tool_calls is not False
    if choice is None or choice == "auto":
        return ToolUse(shown, "auto", is_parallel=is_parallel)
    if isinstance(choice, NamedTool):
        return _named(choice.function.name, functions, shown)
    structure = StructuredOutputsParams(json=_calls_schema(functions, is_parallel))
    return ToolUse(shown, "required", structure=structure, is_parallel=is_parallel)


def _named(name: str, functions: dict[str, Function], shown: tuple[dict[str, Any], ...]) -> ToolUse:
    if name not in functions:
        raise ApiError(
            400, f"tool_choice names {name!r}, and the tools are {', '.join(map(repr, functions))}", param="tool_choice"
        )
    parameters = functions[name].parameters or _ANYTHING
    return ToolUse(shown, "named", name, StructuredOutputsParams(json=parameters))


def _calls_schema(functions: dict[str, Function], is_parallel: bool) -> dict[str, Any]:
    """Return the schema of a list of calls. Definitions of the functions' own schemas move to its root."""
    definitions: dict[str, Any] = {}
    calls = []
    for function in functions.values():
        parameters = dict(function.parameters or _ANYTHING)
        for key in ("$defs", "definitions"):
            for name, schema in parameters.pop(key, {}).items():
                if definitions.setdefault(key, {}).setdefault(name, schema) != schema:
                    raise ApiError(400, f"two tools define {key}/{name} differently; rename one of them", param="tools")
        properties = {"name": {"const": function.name}, "parameters": parameters}
        calls.append(
            {
                "type": "object",
                "properties": properties,
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    limits = {"minItems": 1} if is_parallel else {"minItems": 1, "maxItems": 1}
    return {"type": "array", "items": {"anyOf": calls}, **limits, **definitions}
