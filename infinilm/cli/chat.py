"""`infinilm chat`: talk to a model in the terminal."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from infinilm.cli.options import (
    EngineOptions,
    ModelOptions,
    add_engine_arguments,
    add_model_arguments,
    positive_integer,
)
from infinilm_hookspecs import ParsedText, RequestError

if TYPE_CHECKING:
    from infinilm.async_llm import AsyncLLM
    from infinilm.llm import LLM
    from infinilm.sampling_params import SamplingParams

HELP = """\
/reset          forget the conversation
/system TEXT    say what the model shall be, and start again
/help           show this
/exit           leave, as the end of the input does; Ctrl-C stops an answer"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_model_arguments(parser)
    add_engine_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the model shall be")
    parser.add_argument("--max-tokens", type=positive_integer, metavar="N", help="at most so many tokens an answer")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")


def run(arguments: Any) -> int:
    """Take lines and answer them until the input ends."""
    from infinilm.async_llm import AsyncLLM
    from infinilm.llm import LLM

    options = asdict(ModelOptions.of(arguments)) | asdict(EngineOptions.of(arguments))
    with LLM(arguments.model, plugins=arguments.plugins, **options) as llm, asyncio.Runner() as runner:
        engine = AsyncLLM(llm)
        try:
            _talk(runner, Conversation(engine, _params(llm, arguments), arguments.system))
        finally:
            runner.run(engine.close())
    return 0


class Conversation:
    """What was said so far, and the model that goes on with it."""

    def __init__(self, engine: AsyncLLM, params: SamplingParams, system: str | None) -> None:
        self._engine = engine
        self._params = params
        self.set_system(system)

    def set_system(self, system: str | None) -> None:
        """Start again, with `system` as what the model shall be."""
        self._start = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self._messages = list(self._start)

    async def answer(self, text: str) -> AsyncGenerator[tuple[ParsedText, int], None]:
        """Yield what the model says to `text`, each piece with its number of tokens.

        Both become part of the conversation, and of an answer that was stopped what had come of it. Raises
        `RequestError` where the model cannot chat; `text` is then forgotten.
        """
        processor = self._engine.llm.processor
        if processor is None:
            raise RequestError("chat needs a tokenizer, and this model has none; take another's with --tokenizer PATH")
        messages = [*self._messages, {"role": "user", "content": text}]
        prompt = processor.value.render_chat(messages)
        token_ids = processor.value.encode(prompt, add_special_tokens=False)
        parser = processor.value.parser(prompt=prompt)
        params = replace(self._params, skip_special_tokens=not parser.reads_special_tokens)
        content = ""
        outputs = self._engine.generate({"prompt": prompt, "prompt_token_ids": token_ids}, params)
        assert isinstance(outputs, AsyncGenerator)
        async with aclosing(outputs):
            try:
                async for output in outputs:
                    (completion,) = output.outputs
                    parsed = parser.put(completion.text)
                    if completion.finish_reason is not None:
                        parsed += parser.finish()
                    content += parsed.content
                    yield parsed, len(completion.token_ids)
            finally:
                if content:
                    self._messages = [*messages, {"role": "assistant", "content": content}]


def _params(llm: LLM, arguments: Any) -> SamplingParams:
    from infinilm.sampling_params import RequestOutputKind

    given = {"temperature": arguments.temperature} if arguments.temperature is not None else {}
    defaults = llm.get_default_sampling_params()
    return replace(defaults, max_tokens=arguments.max_tokens, output_kind=RequestOutputKind.DELTA, **given)


def _talk(runner: asyncio.Runner, conversation: Conversation) -> None:
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        with suppress(ImportError):  # it edits lines and recalls them, where Python has it
            import readline  # noqa: F401  # importing it is what makes input() use it
        print(HELP)
    while True:
        try:
            line = input("> " if is_terminal else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            continue
        command, _, rest = line.partition(" ")
        if command in ("/exit", "/quit"):
            return
        if command == "/reset":
            conversation.reset()
        elif command == "/system":
            conversation.set_system(rest.strip() or None)
        elif command.startswith("/"):
            print(HELP if command == "/help" else f"there is no {command}\n{HELP}")
        elif line:
            _answer(runner, conversation, line, is_terminal)


def _answer(runner: asyncio.Runner, conversation: Conversation, line: str, is_terminal: bool) -> None:
    """Print one answer as it comes. Ctrl-C ends it, and not the program."""
    try:
        runner.run(_print(conversation, line, is_terminal))
    except KeyboardInterrupt:
        print(" (stopped)")
    except RequestError as err:
        if not is_terminal:
            raise
        print(f"infinilm: {err}")


async def _print(conversation: Conversation, line: str, is_terminal: bool) -> None:
    first: float | None = None
    num_later_tokens = 0
    async with aclosing(conversation.answer(line)) as pieces:
        async for parsed, num_tokens in pieces:
            if parsed.reasoning:
                print(f"\033[2m{parsed.reasoning}\033[0m" if is_terminal else parsed.reasoning, end="", flush=True)
            print(parsed.content, end="", flush=True)
            num_later_tokens += num_tokens if first is not None else 0
            first = time.perf_counter() if first is None else first
    print()
    if is_terminal and first is not None and num_later_tokens:
        print(f"\033[2m{num_later_tokens / (time.perf_counter() - first):.1f} tokens/s\033[0m")
