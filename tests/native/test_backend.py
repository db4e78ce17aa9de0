"""`NativeBackend`: the life of a model of a library, and what each way to fail becomes."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from native_fixtures import (
    FIXTURE,
    VOCAB,
    batch,
    compile_fixture,
    compile_library,
    request,
    run_python,
    unique_name,
)

from infinilm.native.backend import NativeBackend
from infinilm.native.libraries import BackendLibrary, open_library
from infinilm_hookspecs import ForwardBatch, InfinilmError, PlanError, RequestError, UnavailableError


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> BackendLibrary:
    return open_library(compile_fixture(tmp_path_factory.mktemp("libraries") / "fixture.so"))


@pytest.fixture
def backend(library: BackendLibrary) -> Iterator[NativeBackend]:
    made = library.provide_backend(request()[0])
    assert made is not None
    yield made
    made.close()


def load(backend: NativeBackend, value: float = 0.0) -> None:
    backend.destination("table").copy_(torch.arange(VOCAB) + value)
    backend.loaded("table")
    backend.finish_loading()


# ---------------------------------------------------------------- a life


def test_model_is_filled_in_the_librarys_memory_and_runs(backend: NativeBackend) -> None:
    assert [(name, spec.shape, spec.tied_to) for name, spec in backend.parameters().items()] == [
        ("table", (VOCAB,), None),
        ("copy", (VOCAB,), "table"),
    ]
    load(backend)
    assert (backend.cache_spec().block_size, backend.cache_spec().shareable) == (4, True)
    backend.allocate_cache(2, 1)
    logits = backend.forward(batch([5, 3, 1], [0, 2]))
    assert logits.dtype is torch.float32
    assert logits.tolist() == [[5.0 + v for v in range(VOCAB)], [1.0 + v for v in range(VOCAB)]]
    assert backend.forward(batch([5], [])).shape == (0, VOCAB)
    assert logits[0, 0] == 5.0, "logits must not be those of a later step"


def test_update_goes_the_same_way_again(backend: NativeBackend) -> None:
    load(backend)
    backend.allocate_cache(2, 1)
    load(backend, 100.0)
    assert backend.forward(batch([0], [0]))[0, 0] == 100.0


def test_buffer_outlives_its_parameter_and_its_model(library: BackendLibrary) -> None:
    backend = library.provide_backend(request()[0])
    assert backend is not None
    before = library.native.query("deleters")
    buffer = backend.destination("table")
    assert backend.destination("table") is buffer
    buffer.fill_(3.0)
    backend.loaded("table")
    backend.close()
    assert library.native.query("deleters") == before
    assert buffer.tolist() == [3.0] * VOCAB
    del buffer, backend
    gc.collect()
    assert library.native.query("deleters") == before + 1


def test_deleter_is_called_once_for_every_buffer(library: BackendLibrary) -> None:
    before = library.native.query("deleters")
    for _ in range(3):
        backend = library.provide_backend(request()[0])
        assert backend is not None
        load(backend)
        load(backend)
        backend.destination("table")  # and given up
        backend.close()
    gc.collect()
    assert library.native.query("deleters") == before + 9


def test_buffer_nobody_makes_a_tensor_of_is_deleted(library: BackendLibrary) -> None:
    before = library.native.query("deleters")
    backend = library.provide_backend(request()[0])
    assert backend is not None
    capsule = backend._model.open(0)
    del capsule
    assert library.native.query("deleters") == before + 1
    backend.close()


def test_tensor_of_another_dlpack_is_only_deleted(tmp_path: Path) -> None:
    library = open_library(compile_fixture(tmp_path / "dlpack.so", DLPACK_MAJOR=2))
    backend = library.provide_backend(request()[0])
    assert backend is not None
    with pytest.raises(InfinilmError, match=r"a tensor of DLPack 2\.0, and this host knows 1\.x"):
        backend.destination("table")
    assert library.native.query("deleters") == 1
    backend.close()


def test_models_and_caches_are_destroyed_with_their_backend(library: BackendLibrary) -> None:
    backend = library.provide_backend(request()[0])
    assert backend is not None
    backend.allocate_cache(2, 1)
    backend.allocate_cache(3, 1)
    assert library.native.memory() == {
        "device_free": -1,
        "device_total": -1,
        "parameters": 1,
        "buffers": 0,
        "caches": 1,
        "scratch": -1,
    }
    backend.close()
    backend.close()
    assert (library.native.query("models"), library.native.query("caches")) == (0, 0)
    with pytest.raises(InfinilmError, match="this model is closed"):
        backend.finish_loading() if not backend._waiting else backend.cache_spec()


def test_blocks_are_copied_and_slots_released(library: BackendLibrary, backend: NativeBackend) -> None:
    backend.allocate_cache(3, 2)
    before = library.native.query("copies"), library.native.query("releases")
    backend.copy_blocks([(0, 1), (1, 2)])
    backend.copy_blocks([])
    backend.release([0, 1])
    backend.release([])
    assert (library.native.query("copies"), library.native.query("releases")) == (before[0] + 2, before[1] + 2)
    with pytest.raises(PlanError, match=r"failed in cache_copy_blocks: there is no such block"):
        backend.copy_blocks([(0, 3)])


# ---------------------------------------------------------------- what it declines, and how calls fail


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"config": {"model_type": "acme"}},
            "the {} backend runs a DecoderConfig, and no plugin made one of model_type 'acme'",
        ),
        ({"dtype": "bfloat16"}, "float32 is all there is"),
        ({"world_size": 2}, "the {} backend runs in one process, and world_size is 2"),
    ],
)
def test_library_declines_with_its_reason(library: BackendLibrary, changes: dict[str, Any], reason: str) -> None:
    asked, reasons = request(**changes)
    assert library.provide_backend(asked) is None
    assert reasons == [reason.format(library.name)]


def test_parameter_that_is_none_or_tied_has_no_destination(backend: NativeBackend) -> None:
    for name in ("tabel", "copy"):
        with pytest.raises(KeyError, match=name):
            backend.destination(name)


def test_missing_parameter_is_named(backend: NativeBackend) -> None:
    with pytest.raises(PlanError, match="1 of 2 parameters were not loaded: table"):
        backend.finish_loading()


def test_step_before_its_time_is_an_error(backend: NativeBackend) -> None:
    with pytest.raises(InfinilmError, match="this model has no cache"):
        backend.forward(batch([1], [0]))
    backend.allocate_cache(2, 1)
    with pytest.raises(InfinilmError, match="failed in forward: the model is not loaded"):
        backend.forward(batch([1], [0]))


def test_cache_that_cannot_fit_is_refused_with_numbers(backend: NativeBackend) -> None:
    with pytest.raises(UnavailableError, match=r"takes 64000000000000000 bytes, and 'cpu' has \d+ left"):
        backend.allocate_cache(10**15, 1)
    backend.allocate_cache(2, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": [0]}, "1 positions, and 2 are wanted"),
        ({"query_starts": [0]}, "1 query_starts, and 2 are wanted"),
        ({"slots": [0, 1]}, "2 slots, and 1 are wanted"),
        ({"block_tables": [0, 1]}, "no block table"),
    ],
)
def test_batch_that_does_not_fit_together_never_reaches_the_library(
    backend: NativeBackend, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        backend.forward(batch([1, 2], [1], **changes))


def test_requests_extras_are_refused(backend: NativeBackend) -> None:
    pixels = ForwardBatch(
        **{**{k: getattr(batch([1], [0]), k) for k in ForwardBatch.__slots__}, "extras": [{"pixels": 1}]}
    )
    with pytest.raises(RequestError, match="takes tokens alone"):
        backend.forward(pixels)


THROWS = """
#include <stdexcept>
extern "C" void throw_something(void) { throw std::runtime_error("from within"); }
"""


def test_exception_that_a_library_lets_through_is_stopped(tmp_path: Path) -> None:
    source = tmp_path / "throws.cpp"
    source.write_text(THROWS)
    flags = (f'-DNAME="{unique_name()}"', "-DFORWARD_THROWS", "-fexceptions", "-Wl,--no-as-needed", "-lstdc++")
    done = compile_library(tmp_path / "part.o", THROWS, "-c", language="c++")
    library = open_library(compile_library(tmp_path / "throws.so", FIXTURE, str(done), *flags))
    backend = library.provide_backend(request()[0])
    assert backend is not None
    backend.allocate_cache(2, 1)
    with pytest.raises(InfinilmError, match="forward let an exception through"):
        backend.forward(batch([1], [0]))
    backend.close()


# ---------------------------------------------------------------- threads and the end


def test_forward_releases_the_gil_and_cancel_ends_it(tmp_path: Path) -> None:
    library = open_library(compile_fixture(tmp_path / "waits.so", FORWARD_WAITS=True))
    backend = library.provide_backend(request()[0])
    assert backend is not None
    backend.allocate_cache(2, 1)
    errors: list[InfinilmError] = []

    def run() -> None:
        try:
            backend.forward(batch([1], [0]))
        except InfinilmError as err:
            errors.append(err)

    thread = threading.Thread(target=run)
    thread.start()
    while thread.is_alive():  # a cancel before the step begins is for nobody
        backend.cancel()
        time.sleep(0.001)
    assert "failed in forward: cancelled" in str(errors[0])
    backend.close()


@pytest.mark.parametrize("macro", ["CONCURRENT", "SERIAL"])
def test_models_that_run_in_threads_do_not_disturb_each_other(tmp_path: Path, macro: str) -> None:
    library = open_library(compile_fixture(tmp_path / "threads.so", **{macro: True}))

    def run(number: int) -> None:
        backend = library.provide_backend(request()[0])
        assert backend is not None
        load(backend, number)
        backend.allocate_cache(2, 1)
        for token in range(20):
            results[number] = backend.forward(batch([token], [0]))[0, 0].item() - token
        backend.close()

    results = [-1.0] * 8
    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [float(number) for number in range(8)]


LIVES_ON = """
import sys, threading, time
from native_fixtures import batch, request
from infinilm.native.libraries import open_library
backend = open_library(sys.argv[1]).provide_backend(request()[0])
backend.allocate_cache(2, 1)
if sys.argv[2] == "running":
    started = threading.Event()
    def run():
        started.set()
        backend.forward(batch([1], [0]))
    threading.Thread(target=run, daemon=True).start()
    started.wait()
    time.sleep(0.2)
kept = [backend]
kept.append(kept)
"""


@pytest.mark.parametrize("state", ["running", "idle"])
def test_process_ends_in_order_with_a_live_model(tmp_path: Path, state: str) -> None:
    macros = {"FORWARD_WAITS": True} if state == "running" else {}
    path = compile_fixture(tmp_path / "end.so", TELL_END=True, **macros)
    done = run_python(LIVES_ON, path, state)
    assert done.returncode == 0, done.stderr
    assert "destroyed" in done.stderr
    assert "models are left" not in done.stderr


def test_librarys_words_are_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", logger="infinilm.native")
    library = open_library(compile_fixture(tmp_path / "log.so"))
    logger = f"infinilm.native.{library.name}"
    said = [(record.name, record.levelname, record.getMessage()) for record in caplog.records]
    assert said == [(logger, "DEBUG", "probed"), (logger, "DEBUG", "created")]
