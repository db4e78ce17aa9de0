"""Chat templates, rendered as transformers renders them.

A template is a program that comes with the checkpoint: it runs in Jinja's immutable sandbox and sees JSON values only.
The conventions (trimmed blocks, loop controls, `raise_exception`, `strftime_now`, `tojson` without escapes, the
`{% generation %}` tag) are those of transformers' `chat_template_utils.py`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from infinilm.processors._checkpoint_json import read_json
from infinilm.processors._special_tokens import special_tokens
from infinilm_hookspecs import Checkpoint, CheckpointError, RequestError

_ADDITIONAL = ("tool_use", "rag")
_END = "<the message goes on here> "  # with a space, so that it shows whether the template cuts spaces off
_NAMES = ("chat_template.jinja", "tokenizer_config.json", "chat_template.json")


class ChatTemplate:
    """The template of one checkpoint; one of several by name, where it has a special one for tools."""

    def __init__(self, sources: Mapping[str, str], origin: str, variables: Mapping[str, str]) -> None:
        """Take the sources by template name, where they come from, and variables such as `bos_token`."""
        self._sources = sources
        self._origin = origin
        self._variables = variables
        self._environment = _environment()
        self._compiled: dict[str, jinja2.Template] = {}

    @property
    def sources(self) -> Collection[str]:
        """The text of every template."""
        return self._sources.values()

    @classmethod
    def open(cls, checkpoint: Checkpoint) -> ChatTemplate:
        """Find the template: `chat_template.jinja` before `tokenizer_config.json` before `chat_template.json`.

        Beside the first may stand others, such as `additional_chat_templates/tool_use.jinja` for conversations with
        tools.
        """
        config = read_json(checkpoint, "tokenizer_config.json")
        variables = special_tokens(checkpoint)
        path = checkpoint.file("chat_template.jinja")
        if path is not None:
            files = {name: checkpoint.file(f"additional_chat_templates/{name}.jinja") for name in _ADDITIONAL}
            sources = {name: _read(file) for name, file in files.items() if file is not None}
            return cls({"default": _read(path), **sources}, str(path), variables)
        for name, values in (_NAMES[1], config), (_NAMES[2], read_json(checkpoint, _NAMES[2])):
            if values.get("chat_template"):
                origin = str(checkpoint.file(name))
                return cls(_named_sources(values["chat_template"], origin), origin, variables)
        return cls({}, ", ".join(_NAMES), variables)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        template_kwargs: Mapping[str, Any],
    ) -> str:
        """Return the prompt. Raises `RequestError` where there is no template, or it refuses the conversation.

        Two of `template_kwargs` are not for the template: `chat_template` is the name of the one to take, and with
        `continue_final_message` the prompt ends where the last message does.
        """
        given = _plain(template_kwargs, "chat_template_kwargs")
        name, goes_on = given.pop("chat_template", None), given.pop("continue_final_message", False)
        if name is None:
            name = "tool_use" if tools is not None and "tool_use" in self._sources else "default"
        template = self._compile(str(name))
        conversation = [_as_templates_read(message) for message in _objects(messages, "messages")]
        if goes_on:
            _mark_end(conversation, add_generation_prompt)
        variables = {
            "documents": None,
            **self._variables,
            **given,
            "messages": conversation,
            "tools": None if tools is None else _objects(tools, "tools"),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            prompt = template.render(variables)
        except Exception as err:  # the template is a program: whatever it raises, it raises about this conversation
            raise RequestError(f"the chat template of {self._origin} refuses the conversation: {err}") from err
        return self._cut_at_end(prompt) if goes_on else prompt

    def _cut_at_end(self, prompt: str) -> str:
        at = prompt.rfind(_END.rstrip())
        if at < 0:
            raise RequestError(f"the chat template of {self._origin} leaves the last message out: it cannot go on")
        return prompt[:at] if prompt.startswith(_END, at) else prompt[:at].rstrip()

    def _compile(self, name: str) -> jinja2.Template:
        if not self._sources:
            raise RequestError(
                f"this model has no chat template (looked in {self._origin}); use generate() with a plain prompt, or "
                "put a chat_template.jinja beside the tokenizer"
            )
        if name not in self._sources:
            raise RequestError(
                f"{self._origin} has no chat template named {name!r:.80}, only {sorted(self._sources)}; name one "
                "'default', or give chat_template='...' the name of another"
            )
        try:
            if name not in self._compiled:
                self._compiled[name] = self._environment.from_string(self._sources[name])
            return self._compiled[name]
        except jinja2.TemplateSyntaxError as err:
            raise CheckpointError(
                f"the chat template {name!r} of {self._origin} is not Jinja: line {err.lineno}: {err.message}"
            ) from err


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as err:
        raise CheckpointError(f"the chat template {path} is not UTF-8: {err}; download it again") from err


def _named_sources(value: object, origin: str) -> dict[str, str]:
    """Read the two spellings: one template, or a list of `{"name": ..., "template": ...}`."""
    if isinstance(value, str):
        return {"default": value}
    try:
        sources = {item["name"]: item["template"] for item in value}  # type: ignore[attr-defined]  # checked by doing
    except (TypeError, KeyError) as err:
        raise CheckpointError(f"chat_template of {origin} is neither a string nor a list of named templates") from err
    return sources


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _Generation(Extension):
    """`{% generation %}` marks what a model said, for training; here it is a scope like any other."""

    tags = {"generation"}  # noqa: RUF012  # Jinja's own way to declare it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:  # templates name the argument
    return datetime.now().strftime(format)


def _objects(values: Sequence[Mapping[str, Any]], where: str) -> list[dict[str, Any]]:
    plain = _plain(values, where)
    if not isinstance(plain, list):
        raise RequestError(f"{where} is {type(values).__name__}, and a list of objects is wanted")
    for at, item in enumerate(plain):
        if not isinstance(item, dict):
            raise RequestError(f"{where}[{at}] is {item!r:.80}, and an object is wanted")
    return plain


def _as_templates_read(message: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is None, and call the reasoning `reasoning_content`, as most templates do, and `thinking`."""
    given = {key: value for key, value in message.items() if value is not None}
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((given[name] for name in names if name in given), None)
    return given if reasoning is None else {"thinking": reasoning, **given, "reasoning_content": reasoning}


def _mark_end(conversation: list[dict[str, Any]], add_generation_prompt: bool) -> None:
    """Put the mark behind the last text of the last message."""
    if add_generation_prompt:
        raise RequestError("continue_final_message goes with add_generation_prompt=False: the last message goes on")
    content = conversation[-1].get("content") if conversation else None
    if isinstance(content, str):
        conversation[-1]["content"] = content + _END
        return
    parts = (
        [part for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)] if content else []
    )
    if not parts:
        raise RequestError("continue_final_message is given, and the last message has no text that could go on")
    parts[-1]["text"] += _END


def _plain(value: Any, where: str) -> Any:
    """Rebuild `value` from JSON's types: methods of richer objects are no business of a template."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):  # an enum, say: its class has methods of its own
        return str.__str__(value)
    if isinstance(value, int | float):
        return int.__int__(value) if isinstance(value, int) else float.__float__(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_plain(item, f"{where}[{at}]") for at, item in enumerate(value)]
    raise RequestError(f"{where} is {type(value).__name__}, and a chat template takes JSON values only")
