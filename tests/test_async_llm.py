"""`AsyncLLM` on a tiny checkpoint: what tasks get, and what is left when they go."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoint import write_model, write_tokenizer

from infinilm import (
    LLM,
    AsyncLLM,
    QueueFullError,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)
from infinilm.engine import grammar
from infinilm_hookspecs import RequestError, UnavailableError

LONG = SamplingParams(max_tokens=200, ignore_eos=True, seed=0, output_kind=RequestOutputKind.DELTA)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return write_tokenizer(write_model(folder, max_position_embeddings=512))


class Gate:
    """Lets the steps of a backend through, or holds them back, or has them fail."""

    def __init__(self, llm: LLM) -> None:
        self.is_open = threading.Event()
        self.is_open.set()
        self.error: BaseException | None = None
        self.num_steps = 0
        self._forward = llm.backend.forward
        llm.backend.forward = self._step  # type: ignore[method-assign]  # of this instance

    def _step(self, batch: Any) -> Any:
        assert self.is_open.wait(30)
        self.num_steps += 1
        if self.error is not None:
            raise self.error
        return self._forward(batch)


def serve(
    folder: Path,
    test: Callable[[AsyncLLM, Gate], Coroutine[Any, Any, None]],
    *,
    max_num_waiting: int | None = None,
    **options: Any,
) -> None:
    """Run `test` with an AsyncLLM, and see that it leaves nothing behind."""

    async def run() -> None:
        llm = LLM(folder, **options)
        gate = Gate(llm)
        served = AsyncLLM(llm, max_num_waiting=max_num_waiting)
        try:
            await asyncio.wait_for(test(served, gate), 60)
            gate.is_open.set()
            await eventually(lambda: not served._streams)
            await eventually(lambda: not llm.engine.has_unfinished() or served._is_stopped)
            check_clean(served)
        finally:
            gate.is_open.set()
            await served.close()
        assert not served._thread.is_alive()

    asyncio.run(run())


async def eventually(is_so: Callable[[], bool]) -> None:
    for _ in range(1000):
        if is_so():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came")


def check_clean(served: AsyncLLM) -> None:
    engine, stats = served.llm.engine, served.stats()
    engine._pool.check([])
    assert (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (0, 0, stats.num_blocks)
    assert not served._serving
    assert not engine._sequences


async def read(outputs: AsyncIterator[RequestOutput]) -> list[RequestOutput]:
    return [output async for output in outputs]


def joined(outputs: list[RequestOutput], index: int = 0) -> tuple[str, list[int]]:
    deltas = [its for output in outputs for its in output.outputs if its.index == index]
    return "".join(its.text for its in deltas), [token_id for its in deltas for token_id in its.token_ids]


def test_tasks_get_what_generate_gives(folder: Path) -> None:
    params = [SamplingParams(max_tokens=20, temperature=at % 2, seed=at, logprobs=1, n=1 + at % 3) for at in range(12)]
    prompts = [f"prompt {at} " * (1 + at % 4) for at in range(12)]
    with LLM(folder) as llm:
        expected = llm.generate(prompts, params)

    async def test(served: AsyncLLM, gate: Gate) -> None:
        kinds = list(RequestOutputKind) * 4
        tasks = [
            read(served.generate(prompt, dataclass_with(its, kind)))
            for prompt, its, kind in zip(prompts, params, kinds, strict=True)
        ]
        for outputs, wanted, kind in zip(await asyncio.gather(*tasks), expected, kinds, strict=True):
            assert [its.finished for its in outputs] == [False] * (len(outputs) - 1) + [True]
            assert outputs[-1].prompt_token_ids == wanted.prompt_token_ids
            for completion in wanted.outputs:
                if kind is RequestOutputKind.DELTA:
                    assert joined(outputs, completion.index) == (completion.text, completion.token_ids)
                else:
                    assert outputs[-1].outputs[completion.index].token_ids == completion.token_ids
                    assert outputs[-1].outputs[completion.index].text == completion.text
            assert kind is not RequestOutputKind.FINAL_ONLY or len(outputs) == 1

    serve(folder, test)


def dataclass_with(params: SamplingParams, kind: RequestOutputKind) -> SamplingParams:
    return SamplingParams(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        seed=params.seed,
        logprobs=params.logprobs,
        n=params.n,
        output_kind=kind,
    )


def test_a_slow_reader_stalls_nobody_and_misses_nothing(folder: Path) -> None:
    async def test(served: AsyncLLM, gate: Gate) -> None:
        slow = served.generate("a", LONG)
        first = await anext(slow)
        others = await asyncio.gather(*(read(served.generate("a", LONG)) for _ in range(3)))
        await eventually(lambda: not served._serving)
        rest = await read(slow)
        assert len(rest) == 1  # all that came meanwhile, in one
        assert joined([first, *rest]) == joined(others[0])
        assert all(joined(outputs) == joined(others[0]) for outputs in others)
        assert len(others[0]) > 20

    serve(folder, test)


def test_clients_that_are_killed_leave_the_engine_idle_and_clean(folder: Path) -> None:
    rng = random.Random(0)
    schema = StructuredOutputsParams(json={"type": "array", "items": {"type": "integer"}})

    async def client(served: AsyncLLM, at: int) -> None:
        structured = schema if at % 5 == 0 else None
        params = SamplingParams(max_tokens=400, ignore_eos=True, n=1 + at % 3, structured_outputs=structured, seed=at)
        await read(served.generate("ab" * (at % 40 + 1), params))

    async def test(served: AsyncLLM, gate: Gate) -> None:
        tasks = [asyncio.create_task(client(served, at)) for at in range(60)]
        while alive := [task for task in tasks if not task.done()]:
            await asyncio.sleep(0.003)
            for task in rng.sample(alive, min(len(alive), 3)):
                task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(its) for its in results if its is not None} == {asyncio.CancelledError}
        await eventually(lambda: not served.llm.engine.has_unfinished())
        assert served.stats().num_finished["abort"] > 20
        assert (await read(served.generate("a", LONG)))[-1].finished

    serve(folder, test, max_num_seqs=8, max_num_batched_tokens=64, kv_cache_memory=16 * 32 * 128)


@pytest.mark.parametrize("moment", ["waiting", "running", "unread"])
def test_a_generator_that_is_closed_ends_its_request(folder: Path, moment: str) -> None:
    async def test(served: AsyncLLM, gate: Gate) -> None:
        if moment == "waiting":
            running = served.generate("b", LONG)
            await anext(running)
            gate.is_open.clear()
            task = asyncio.create_task(read(served.generate("a", LONG)))
            await eventually(lambda: served._commands.qsize() + served.stats().num_waiting == 1)
            task.cancel()
            gate.is_open.set()
            await read(running)
        else:
            outputs = served.generate("a", LONG)
            await anext(outputs)
            if moment == "unread":
                await eventually(lambda: not served._serving)
            await outputs.aclose()
        await eventually(lambda: not served.llm.engine.has_unfinished())

    serve(folder, test, max_num_seqs=1)


@pytest.mark.parametrize("moment", ["compiling", "running", "unknown"])
def test_abort_gives_the_reader_what_there_is(folder: Path, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiling, original = threading.Event(), grammar._grammar_of
    monkeypatch.setattr(grammar, "_grammar_of", lambda wanted: compiling.wait(30) and original(wanted))

    async def test(served: AsyncLLM, gate: Gate) -> None:
        structured = StructuredOutputsParams(regex="a{500}") if moment == "compiling" else None
        params = SamplingParams(max_tokens=300, ignore_eos=True, seed=0, structured_outputs=structured)
        task = asyncio.create_task(read(served.generate("a", params, request_id="mine")))
        await eventually(lambda: "mine" in served._streams and (moment == "compiling" or gate.num_steps > 3))
        await served.abort("other" if moment == "unknown" else "mine")
        compiling.set()
        last = (await task)[-1]
        wanted = "length" if moment == "unknown" else "abort"
        assert (last.finished, last.outputs[0].finish_reason) == (True, wanted)
        assert (len(last.outputs[0].token_ids) > 0) == (moment != "compiling")
        await eventually(lambda: not served._commands.qsize())
        assert (served.stats().num_generation_tokens > 0) == (moment != "compiling")

    serve(folder, test)


def test_a_grammar_that_takes_long_to_compile_holds_up_nobody(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiling, original = threading.Event(), grammar._grammar_of
    monkeypatch.setattr(grammar, "_grammar_of", lambda wanted: compiling.wait(30) and original(wanted))

    async def test(served: AsyncLLM, gate: Gate) -> None:
        params = [
            SamplingParams(structured_outputs=StructuredOutputsParams(regex=f"[ab]{{{at + 1}}}")) for at in range(5)
        ]
        tasks = [asyncio.create_task(read(served.generate("a", its))) for its in params]
        assert (await read(served.generate("a", LONG)))[-1].finished
        assert not any(task.done() for task in tasks)
        compiling.set()
        lengths = [len((await task)[-1].outputs[0].text) for task in tasks]
        assert lengths == [1, 2, 3, 4, 5]

    serve(folder, test)


def test_what_is_malformed_is_an_error_at_the_first_step(folder: Path) -> None:
    async def test(served: AsyncLLM, gate: Gate) -> None:
        for prompt, params, message in (
            ({"prompt_token_ids": [999]}, None, "token id 999"),
            ({"text": "a"}, None, "a prompt is text"),
            ("a", SamplingParams(structured_outputs=StructuredOutputsParams(regex="a((")), "unclosed group"),
            ("a" * 600, None, "leaves no room to generate"),
        ):
            outputs = served.generate(prompt, params)
            with pytest.raises(RequestError, match=message):
                await anext(outputs)
        first = served.generate("a", LONG, request_id="x")
        await anext(first)
        with pytest.raises(RequestError, match="request id 'x' is in use"):
            await anext(served.generate("a", LONG, request_id="x"))
        assert len(await read(first)) > 0  # it is not the second's to end
        assert (await read(served.generate("a", LONG, request_id="x")))[-1].request_id == "x"

    serve(folder, test)


def test_a_full_queue_says_so(folder: Path) -> None:
    async def test(served: AsyncLLM, gate: Gate) -> None:
        gate.is_open.clear()
        tasks = [asyncio.create_task(read(served.generate("a", LONG))) for _ in range(4)]
        await eventually(lambda: len(served._streams) == 4)
        with pytest.raises(QueueFullError, match="requests wait, and no more than 2 may"):
            await anext(served.generate("a", LONG))
        gate.is_open.set()
        await asyncio.gather(*tasks)
        assert (await read(served.generate("a", LONG)))[-1].finished

    serve(folder, test, max_num_seqs=2, max_num_waiting=2)


def test_a_step_that_fails_fails_its_requests_and_health_says_so_when_it_goes_on(folder: Path) -> None:
    async def test(served: AsyncLLM, gate: Gate) -> None:
        for num_failed in range(1, 5):
            gate.error = RuntimeError("the device is on fire")
            results = await asyncio.gather(
                *(read(served.generate("a", LONG)) for _ in range(2)), return_exceptions=True
            )
            assert [str(its) for its in results] == ["the device is on fire"] * 2
            is_sick = served.llm.engine.num_failed_steps >= 3
            assert (served.health() is not None) == is_sick
            assert num_failed < 4 or is_sick
        assert "RuntimeError: the device is on fire" in (served.health() or "")
        gate.error = None
        assert (await read(served.generate("a", LONG)))[-1].finished
        assert served.health() is None

    serve(folder, test)


def test_what_kills_the_engine_is_said_to_all_and_nobody_hangs(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test(served: AsyncLLM, gate: Gate) -> None:
        outputs = served.generate("a", LONG)
        await anext(outputs)
        gate.error = SystemExit("gone")
        with pytest.raises(UnavailableError, match="the engine stopped: SystemExit: gone"):
            await read(outputs)
        assert served.health() == "the engine stopped: SystemExit: gone"
        for _ in range(2):
            with pytest.raises(UnavailableError, match="the engine stopped: SystemExit: gone"):
                await anext(served.generate("a", LONG))
        with pytest.raises(UnavailableError, match="the engine stopped"):
            await served.call(lambda: 1)
        await served.abort("unknown")
        assert "the engine stopped" in caplog.text

    serve(folder, test)


def test_drain_refuses_the_new_and_waits_for_the_rest(folder: Path) -> None:
    async def test(served: AsyncLLM, gate: Gate) -> None:
        outputs = served.generate("a", LONG)
        await anext(outputs)
        with pytest.raises(TimeoutError):
            await served.drain(0.05)
        assert served.health() == "draining"
        with pytest.raises(UnavailableError, match="draining"):
            await anext(served.generate("a", LONG))
        rest = asyncio.create_task(read(outputs))
        await served.drain(30)
        assert (await rest)[-1].outputs[0].finish_reason == "length"

    serve(folder, test)


def test_close_ends_what_runs(folder: Path) -> None:
    async def run() -> None:
        served = AsyncLLM(LLM(folder))
        outputs = served.generate("a", SamplingParams(max_tokens=500, ignore_eos=True))
        await anext(outputs)
        await served.close()
        await served.close()
        assert (await read(outputs))[-1].outputs[0].finish_reason == "abort"
        check_clean(served)
        with pytest.raises(UnavailableError, match="closed"):
            await anext(served.generate("a", LONG))

    asyncio.run(run())


def test_a_loop_that_ends_takes_its_requests_along(folder: Path) -> None:
    with LLM(folder) as llm:
        served = AsyncLLM(llm)
        loop = asyncio.new_event_loop()
        outputs = served.generate("a", SamplingParams(max_tokens=500, ignore_eos=True))
        loop.run_until_complete(anext(outputs))
        loop.close()  # without a word to the generator
        asyncio.run(eventually(lambda: not llm.engine.has_unfinished()))
        check_clean(served)
        assert served.stats().num_finished["abort"] == 1

        async def again() -> None:
            assert (await read(served.generate("a", LONG)))[-1].finished
            await served.close()

        asyncio.run(again())
        with contextlib.suppress(RuntimeError, StopIteration):  # its loop is gone
            outputs.aclose().send(None)


def test_one_at_a_time_uses_an_llm(folder: Path) -> None:
    async def test(served: AsyncLLM, gate: Gate) -> None:
        for use in (lambda: served.llm.generate("a"), lambda: AsyncLLM(served.llm)):
            with pytest.raises(RequestError, match="this LLM is in use by an AsyncLLM"):
                use()

    serve(folder, test)


def test_calls_are_made_between_steps_on_the_engines_thread(folder: Path) -> None:
    async def test(served: AsyncLLM, gate: Gate) -> None:
        task = asyncio.create_task(read(served.generate("a", LONG)))
        assert await served.call(threading.current_thread) is served._thread
        with pytest.raises(ZeroDivisionError):
            await served.call(lambda: 1 // 0)
        await served.call(lambda: served.llm.engine.change_weight_version("step 7"))
        assert (await task)[-1].weight_version == served.stats().weight_version == served.llm.weight_version == "step 7"

    serve(folder, test)
