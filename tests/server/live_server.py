"""A real server on a real socket, in a thread of this process, over a real engine."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from openai import OpenAI
from tiny_checkpoint import write_model, write_tokenizer

from infinilm import LLM, AsyncLLM
from infinilm.engine.stats import EngineStats
from infinilm.server.app import create_app
from infinilm.server.settings import Limits, Settings

MODEL = "tiny"
DEMO = Path(__file__).parent.parent.parent / "example_plugins" / "minimal"
DEMO_PLUGIN = ["no:minimal", str(DEMO / "infinilm_minimal.py")]
TEMPLATE = (
    "{% if tools %}Tools: {{ tools | tojson }} Call one as "
    '<tool_call>{"name": ..., "arguments": ...}</tool_call>\n{% endif %}'
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant:{{ greeting or '' }}{% endif %}"
)
"""Shows what a request came to, in few characters: the tokenizer has one token for each byte."""


def write_tiny(folder: Path, chat_template: str = TEMPLATE) -> Path:
    """Write a random llama of a thousand positions whose text is bytes, and its chat template."""
    write_model(folder, max_position_embeddings=1024)
    return write_tokenizer(folder, chat_template=chat_template)


@dataclass(frozen=True)
class LiveServer:
    """A server that runs. `client` is OpenAI's, unmodified."""

    url: str
    engine: AsyncLLM
    api_key: str

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.api_key, max_retries=0, timeout=60)

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    @contextmanager
    def pausing(self, *, after: int) -> Iterator[None]:
        """Let the backend run so many steps, then hold it until the block ends: nothing here depends on speed."""
        backend, go_on, num_steps = self.engine.llm.backend, threading.Event(), 0
        forward = backend.forward

        def holding(batch: Any) -> Any:
            nonlocal num_steps
            num_steps += 1
            if num_steps > after:
                go_on.wait()
            return forward(batch)

        backend.forward = holding  # type: ignore[method-assign]  # the engine asks for it at every step
        try:
            yield
        finally:
            backend.forward = forward  # type: ignore[method-assign]
            go_on.set()

    def stats(self) -> EngineStats:
        return self.engine.stats()

    def wait_until(self, condition: Callable[[EngineStats], bool], seconds: float = 20) -> EngineStats:
        """Return the engine's numbers as soon as they are as wanted."""
        deadline = time.monotonic() + seconds
        while not condition(stats := self.stats()):
            assert time.monotonic() < deadline, f"after {seconds} s it is still {stats}"
            time.sleep(0.01)
        return stats

    def wait_for_requests(self, count: int) -> None:
        """Wait until so many requests are with the engine, those too that it looks at after the step it is in."""
        self.wait_until(lambda _: len(self.engine._streams) == count)

    def wait_until_idle(self) -> EngineStats:
        """Return the numbers of an engine that has nothing to do, after holding them to that."""
        stats = self.wait_until(lambda it: it.num_running == it.num_waiting == 0)
        assert stats.num_free_blocks == stats.num_blocks
        return stats


@contextmanager
def serving(llm: LLM, **settings: Any) -> Iterator[LiveServer]:
    """Serve `llm` on a free port for as long as the block lasts, then close it."""
    limits = Limits(**settings.pop("limits", {}))
    names = settings.pop("served_model_names", (MODEL,))
    all_settings = Settings(served_model_names=names, limits=limits, **settings)
    bound = socket.create_server(("127.0.0.1", 0))
    ready = threading.Event()
    started: list[tuple[AsyncLLM, uvicorn.Server]] = []

    async def serve() -> None:
        engine = AsyncLLM(llm, max_num_waiting=limits.max_num_waiting)
        config = uvicorn.Config(create_app(engine, all_settings), http="h11", lifespan="off", log_config=None)
        server = uvicorn.Server(config)
        started.append((engine, server))
        ready.set()
        await server.serve([bound])
        await engine.close()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    ready.wait()
    engine, server = started[0]
    try:
        keys = all_settings.api_keys
        yield LiveServer(f"http://127.0.0.1:{bound.getsockname()[1]}", engine, keys[0] if keys else "none")
    finally:
        server.should_exit = True
        thread.join()
