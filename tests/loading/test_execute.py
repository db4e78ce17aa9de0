"""Carrying out a plan: every byte where it belongs, in the order a backend relies on, errors that name the place."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from checkpoints_made import write_folder
from torch import Tensor

from infinilm.checkpoints.safetensors import SafetensorsCheckpoint
from infinilm.loading import execute
from infinilm.loading.execute import load
from infinilm.loading.plan import LoadPlan, plan_load
from infinilm.loading.stages import RuleNote, Stage
from infinilm_hookspecs import (
    CheckpointError,
    Config,
    Mapped,
    ParameterSpec,
    PlanError,
    Quantization,
    StoredTensor,
    Weight,
    WeightError,
    WeightRule,
)
from infinilm_hookspecs.dtypes import dtype_name

Tensors = Mapping[str, Tensor]


@dataclass
class FakeCheckpoint:
    """Tensors in memory. Counts what is read, and whether it went straight into the buffer that was asked for."""

    stored: Tensors
    num_elements: int = 0
    reads: list[tuple[str, int]] = field(default_factory=list)  # (name, address of the first byte written)
    config: Config = field(default_factory=dict)
    quantization: Quantization | None = None
    trust: Literal["data", "restricted"] = "data"

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        return {n: StoredTensor(tuple(t.shape), dtype_name(t.dtype), None) for n, t in self.stored.items()}

    def read(self, name: str, region: tuple[slice, ...], out: Tensor) -> None:
        found = self.stored[name][region]
        assert out.is_contiguous()
        assert (out.dtype, out.shape) == (found.dtype, found.shape)
        self.num_elements += found.numel()
        self.reads.append((name, out.data_ptr()))
        out.copy_(found)

    def file(self, name: str) -> Path | None:
        return None

    def close(self) -> None:
        pass


@dataclass
class FakeLoader:
    """The part of a `Backend` that is loaded: buffers by name, and everything it was told, in order."""

    specs: Mapping[str, ParameterSpec]
    buffers: dict[str, Tensor]
    calls: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, wanted: Tensors, *, ties: Mapping[str, str] | None = None) -> FakeLoader:
        ties = ties or {}
        specs = {n: ParameterSpec(tuple(t.shape), dtype_name(t.dtype), tied_to=ties.get(n)) for n, t in wanted.items()}
        buffers = {n: torch.full_like(t, 77) for n, t in wanted.items() if n not in ties}
        return cls(specs, buffers)

    def parameters(self) -> Mapping[str, ParameterSpec]:
        return self.specs

    def destination(self, name: str) -> Tensor:
        self.calls.append(f"destination {name}")
        return self.buffers[name]

    def loaded(self, name: str) -> None:
        self.calls.append(f"loaded {name}")

    def finish_loading(self) -> None:
        self.calls.append("finish_loading")


def plan_of(checkpoint: FakeCheckpoint, backend: FakeLoader, *rules: WeightRule) -> LoadPlan:
    stages = [Stage(rule, name) for rule, name in zip(rules, ("first", "second"), strict=False)]
    return plan_load(checkpoint.tensors, stages, backend.specs)


def run(
    plan: LoadPlan, checkpoint: FakeCheckpoint, backend: FakeLoader, progress: Callable[[int], object] = lambda n: None
) -> None:
    load(plan, checkpoint, backend, progress)  # type: ignore[arg-type]  # nothing here asks a backend to run


def load_into(
    wanted: Tensors, stored: Tensors, *rules: WeightRule, **options: Any
) -> tuple[FakeCheckpoint, FakeLoader]:
    """Load `stored` through `rules` and hold every buffer against `wanted`, bit for bit."""
    checkpoint, backend = FakeCheckpoint(stored), FakeLoader.of(wanted, **options)
    run(plan_of(checkpoint, backend, *rules), checkpoint, backend)
    for name, buffer in backend.buffers.items():
        assert buffer.dtype == wanted[name].dtype
        assert torch.equal(buffer.reshape(-1).view(torch.uint8), wanted[name].reshape(-1).view(torch.uint8)), name
    return checkpoint, backend


# ---------------------------------------------------------------- bytes


@pytest.mark.parametrize("shape", [(6, 4), (5,), (), (0, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.int64])
def test_stored_bytes_that_are_the_parameters_are_read_into_its_buffer(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tensor = (torch.randn(shape) * 4).to(dtype)
    checkpoint, backend = load_into({"w": tensor}, {"w": tensor})
    assert checkpoint.reads == [("w", backend.buffers["w"].data_ptr())] * bool(tensor.numel())


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float8_e5m2, torch.float16),
        (torch.int8, torch.float32),
    ],
)
def test_other_dtypes_are_converted(stored: torch.dtype, wanted: torch.dtype) -> None:
    tensor = (torch.randn(6, 4) * 4).to(stored)
    checkpoint, backend = load_into({"w": tensor.to(wanted)}, {"w": tensor})
    assert checkpoint.num_elements == 24
    assert checkpoint.reads[0][1] != backend.buffers["w"].data_ptr()


def test_each_part_of_a_fused_tensor_is_read_once() -> None:
    fused = torch.randn(12, 4)
    q, k, v = fused[:8], fused[8:10], fused[10:]

    def rule(weight: Weight) -> Mapped:
        return [part.rename(name) for name, part in zip("qkv", weight.split([8, 2, 2]), strict=True)]

    checkpoint, _ = load_into({"q": q, "k": k, "v": v}, {"qkv": fused}, rule)
    assert checkpoint.num_elements == fused.numel()


def test_layouts_operations_and_joined_parts() -> None:
    a, b = torch.randn(3, 8), torch.randn(5, 8)
    rules: list[WeightRule] = [
        {"a": lambda w: w.part(0, 0, 8).rename("ab"), "b": lambda w: w.part(0, 3, 8).rename("ab")},
        {"ab": lambda w: [w[:4].t().rename("x"), (w[4:].to("bfloat16") * 2.0).rename("y")]},
    ]
    both = torch.cat([a, b])
    checkpoint, _ = load_into(
        {"x": both[:4].t().contiguous(), "y": both[4:].bfloat16() * 2.0}, {"a": a, "b": b}, *rules
    )
    assert checkpoint.num_elements == both.numel()


def test_numbers_are_added_in_the_dtype_of_the_weight() -> None:
    stored = torch.tensor([1, 2, 3], dtype=torch.int8)
    load_into({"w": torch.tensor([1.0, 2.0, 3.0])}, {"w": stored}, lambda w: w + 0.5)


def test_a_buffer_may_be_a_view_into_a_fused_one() -> None:
    """Rows, and columns that are not contiguous: nothing outside the view is touched."""
    rows, columns = torch.full((10, 4), 77.0), torch.full((4, 10), 77.0)
    q, k = torch.randn(6, 4), torch.randn(4, 3)
    checkpoint = FakeCheckpoint({"q": q, "k": k})
    backend = FakeLoader.of({"q": q, "k": k})
    backend.buffers = {"q": rows[2:8], "k": columns[:, 5:8]}
    run(plan_of(checkpoint, backend), checkpoint, backend)
    assert torch.equal(rows[2:8], q)
    assert torch.equal(columns[:, 5:8], k)
    assert (rows[:2] == 77).all()
    assert (rows[8:] == 77).all()
    assert (columns[:, :5] == 77).all()
    assert (columns[:, 8:] == 77).all()
    assert ("q", rows[2:8].data_ptr()) in checkpoint.reads


def test_a_buffer_may_be_a_parameter_that_takes_gradients() -> None:
    tensor = torch.randn(3, 4)
    for dtype in (torch.float32, torch.bfloat16):
        backend = FakeLoader.of({"w": tensor.to(dtype)})
        backend.buffers["w"] = torch.nn.Parameter(torch.zeros(3, 4, dtype=dtype))
        checkpoint = FakeCheckpoint({"w": tensor})
        run(plan_of(checkpoint, backend), checkpoint, backend)
        assert torch.equal(backend.buffers["w"], tensor.to(dtype))


# ---------------------------------------------------------------- the protocol


def test_backend_is_told_of_each_parameter_once_and_of_the_end_last() -> None:
    tensors = {name: torch.randn(2, 2) for name in "cab"}
    _, backend = load_into(tensors, tensors)
    assert [call for call in backend.calls if call.startswith("destination")] == [f"destination {n}" for n in "cab"]
    assert [call for call in backend.calls if call.startswith("loaded")] == [f"loaded {n}" for n in "cab"]
    assert all(backend.calls.index(f"destination {n}") < backend.calls.index(f"loaded {n}") for n in "cab")
    assert backend.calls.count("finish_loading") == 1
    assert backend.calls[-1] == "finish_loading"


def test_no_more_is_open_than_the_budget_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"t{i}": torch.randn(8, 4) for i in range(12)} | {"large": torch.randn(64, 4)}
    monkeypatch.setattr(execute, "BYTE_BUDGET", 3 * 128)
    _, backend = load_into(tensors, tensors)
    num_open, most = 0, 0
    for call in backend.calls:
        kind, _, name = call.partition(" ")
        size = tensors[name].nbytes if name in tensors else 0
        num_open += size if kind == "destination" else -size if kind == "loaded" else 0
        if name != "large":
            most = max(most, num_open)
        elif kind == "destination":
            assert num_open == size, "what is larger than the budget is open alone"
    assert most == 3 * 128


@pytest.mark.parametrize("max_bytes", [1, 100, 4096, 10**9])
def test_chunks_of_any_size_give_the_same_bytes(max_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "BYTE_BUDGET", 2 * len(os.sched_getaffinity(0)) * max_bytes)
    qkv, stacked = torch.randn(4 * 3 * 8, 16), torch.randn(3, 10, 6)
    wanted = {
        "q": qkv.view(4, 3, 8, 16)[:, 0].reshape(32, 16),
        "kv": qkv.view(4, 3, 8, 16)[:, 1:].transpose(1, 2).reshape(64, 16).bfloat16(),
        "flat": stacked.reshape(30, 6).t().contiguous(),
    }

    def split(w: Weight) -> list[Weight]:
        heads = w.view(4, 3, 8, 16)
        q, kv = heads[:, 0].reshape(32, 16), heads[:, 1:].transpose(1, 2).reshape(64, 16)
        return [q.rename("q"), kv.rename("kv")]

    checkpoint, backend = FakeCheckpoint({"qkv": qkv, "stacked": stacked}), FakeLoader.of(wanted)
    rules = {"qkv": split, "stacked": lambda w: w.reshape(30, 6).t().rename("flat")}
    run(plan_of(checkpoint, backend, rules), checkpoint, backend)
    assert all(torch.equal(backend.buffers[name], wanted[name]) for name in wanted)


def test_no_thread_is_left_whatever_happens() -> None:
    class Interrupting(FakeCheckpoint):
        def read(self, name: str, region: tuple[slice, ...], out: Tensor) -> None:
            if name == "t7":
                raise KeyboardInterrupt
            super().read(name, region, out)

    tensors = {f"t{i}": torch.randn(8, 4) for i in range(12)}
    checkpoint, backend = Interrupting(tensors), FakeLoader.of(tensors)
    with pytest.raises(KeyboardInterrupt):
        run(plan_of(checkpoint, backend), checkpoint, backend)
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("infinilm-load")] == []
    assert "finish_loading" not in backend.calls


def test_progress_adds_up_to_the_bytes_of_the_plan() -> None:
    wanted = {"a": torch.randn(3, 5).bfloat16(), "b": torch.randn(7), "empty": torch.randn(0, 2)}
    checkpoint, backend = FakeCheckpoint({n: t.float() for n, t in wanted.items()}), FakeLoader.of(wanted)
    plan = plan_of(checkpoint, backend)
    seen: list[int] = []
    run(plan, checkpoint, backend, progress=seen.append)
    assert sum(seen) == plan.num_bytes


def test_tensors_are_read_as_the_plan_says_although_the_rules_are_gone() -> None:
    rules: list[WeightRule] = [{"w": "x"}]
    checkpoint, backend = FakeCheckpoint({"w": torch.ones(2)}), FakeLoader.of({"x": torch.ones(2)})
    plan = plan_of(checkpoint, backend, *rules)
    rules.clear()
    run(plan, checkpoint, backend)
    assert torch.equal(backend.buffers["x"], torch.ones(2))


# ---------------------------------------------------------------- what cannot be loaded


def test_nothing_is_read_and_no_buffer_asked_for_when_the_plan_has_errors() -> None:
    checkpoint, backend = FakeCheckpoint({"a": torch.ones(2)}), FakeLoader.of({"a": torch.ones(2), "b": torch.ones(2)})
    with pytest.raises(PlanError, match="b is missing"):
        run(plan_of(checkpoint, backend), checkpoint, backend)
    assert checkpoint.reads == []
    assert backend.calls == []


@pytest.mark.parametrize(
    ("buffer", "message"),
    [
        (torch.zeros(3, 2), r"the backend's buffer for a is \[3, 2\] float32, and it asked for \[2, 3\] float32"),
        (torch.zeros(6), r"the backend's buffer for a is \[6\] float32"),
        (
            torch.zeros(2, 3).double(),
            r"the backend's buffer for a is \[2, 3\] float64, and it asked for \[2, 3\] float",
        ),
    ],
    ids=["shape", "rank", "dtype"],
)
def test_buffer_that_is_not_what_the_backend_asked_for_is_refused(buffer: Tensor, message: str) -> None:
    checkpoint, backend = FakeCheckpoint({"a": torch.ones(2, 3)}), FakeLoader.of({"a": torch.ones(2, 3)})
    backend.buffers["a"] = buffer
    with pytest.raises(PlanError, match=message):
        run(plan_of(checkpoint, backend), checkpoint, backend)
    assert checkpoint.reads == []
    assert (buffer == 0).all()


def test_checkpoint_that_cannot_be_read_is_told_as_it_is() -> None:
    class Broken(FakeCheckpoint):
        def read(self, name: str, region: tuple[slice, ...], out: Tensor) -> None:
            raise CheckpointError(f"'/m/x', tensor {name!r} at offset 8: the file is too short")

    checkpoint, backend = Broken({"a": torch.ones(2)}), FakeLoader.of({"a": torch.ones(2)})
    with pytest.raises(CheckpointError, match="tensor 'a' at offset 8: the file is too short"):
        run(plan_of(checkpoint, backend), checkpoint, backend)
    assert backend.calls == ["destination a"]


def test_exception_inside_apply_keeps_its_type_and_says_where_it_was() -> None:
    def explode(tensor: Tensor) -> Tensor:
        raise ZeroDivisionError("scale")

    tensors = {"a": torch.ones(2), "b": torch.ones(2)}
    checkpoint, backend = FakeCheckpoint(tensors), FakeLoader.of({"a": torch.ones(2), "x": torch.ones(2)})
    plan = plan_of(checkpoint, backend, {"b": lambda w: w.apply(explode).rename("x")})
    with pytest.raises(ZeroDivisionError, match="scale") as caught:
        run(plan, checkpoint, backend)
    (note,) = caught.value.__notes__
    assert isinstance(note, RuleNote)
    assert note == "while loading x from b [plugin first]"
    assert "loaded a" in backend.calls
    assert "loaded x" not in backend.calls


def test_apply_that_does_not_keep_its_word_says_where_it_was() -> None:
    checkpoint, backend = FakeCheckpoint({"a": torch.ones(4)}), FakeLoader.of({"a": torch.ones(4)})
    plan = plan_of(checkpoint, backend, lambda w: w.apply(lambda t: t[:2]))
    with pytest.raises(WeightError, match=r"returned \[2\] float32, and its rule declared \[4\] float32") as caught:
        run(plan, checkpoint, backend)
    assert caught.value.__notes__ == ["while loading a from a [plugin first]"]


SHORT = r"model\.safetensors', tensor 'b' at offset \d+: the file is too short, wanted 16 bytes, got 10"


@pytest.mark.parametrize("is_short", [False, True], ids=["raises in apply", "short file"])
def test_files_can_be_closed_whatever_was_raised(tmp_path: Path, is_short: bool) -> None:
    def explode(tensor: Tensor) -> Tensor:
        raise ZeroDivisionError

    folder = write_folder(tmp_path, {"a": torch.ones(4), "b": torch.ones(4)})
    path = folder / "model.safetensors"
    checkpoint = SafetensorsCheckpoint(folder)
    backend = FakeLoader.of({"a": torch.ones(4), "b": torch.ones(4)})
    rule: WeightRule = {} if is_short else {"b": lambda w: w.apply(explode)}
    plan = plan_load(checkpoint.tensors, [Stage(rule, "first")], backend.specs)
    if is_short:
        before = path.stat()
        os.truncate(path, before.st_size - 6)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    error, message = (CheckpointError, SHORT) if is_short else (ZeroDivisionError, None)
    with pytest.raises(error, match=message):
        load(plan, checkpoint, backend)  # type: ignore[arg-type]  # nothing here asks a backend to run
    assert str(path) in open_files()
    checkpoint.close()
    assert str(path) not in open_files()
    assert "loaded b" not in backend.calls


def open_files() -> list[str]:
    descriptors = Path("/proc/self/fd").iterdir()
    return [os.readlink(descriptor) for descriptor in descriptors if descriptor.is_symlink()]


# ---------------------------------------------------------------- deferred steps


class Counted:
    """A step that notes how often it runs, and which of its results are still in memory."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function
        self.num_calls = 0
        self.alive = weakref.WeakSet[Tensor]()

    def __call__(self, tensor: Tensor) -> Tensor:
        self.num_calls += 1
        result = self.function(tensor)
        self.alive.add(result)
        return result


def halves(weight: Weight, names: Sequence[str]) -> list[Weight]:
    return [half.rename(name) for name, half in zip(names, weight.chunk(2), strict=True)]


def test_step_that_is_cut_into_several_parameters_runs_once_and_is_freed_after_the_last() -> None:
    step = Counted(lambda t: t.flip(0))
    stored = torch.randn(8, 3)
    alive: list[int] = []
    checkpoint = FakeCheckpoint({"w": stored, "z": torch.ones(2)})
    backend = FakeLoader.of({"a": torch.ones(4, 3), "b": torch.ones(4, 3), "z": torch.ones(2)})
    plan = plan_of(checkpoint, backend, {"w": lambda w: halves(w.apply(step), "ab")})

    def progress(num_bytes: int) -> None:
        gc.collect()
        alive.append(len(step.alive))

    run(plan, checkpoint, backend, progress=progress)
    assert torch.equal(torch.cat([backend.buffers["a"], backend.buffers["b"]]), stored.flip(0))
    assert step.num_calls == 1
    assert alive == [1, 0, 0]
    assert checkpoint.num_elements == stored.numel() + 2


def test_steps_upon_steps_run_once_each() -> None:
    first, second = Counted(lambda t: t * 2), Counted(lambda t: t + 1)
    stored = torch.randn(8, 3)

    def rule(weight: Weight) -> Mapped:
        doubled = weight.apply(first)
        return [*halves(doubled[:4].apply(second), "ab"), *halves(doubled[4:].apply(second), "cd")]

    expected = stored * 2 + 1
    checkpoint, _ = load_into(dict(zip("abcd", expected.chunk(4), strict=True)), {"w": stored}, rule)
    assert (first.num_calls, second.num_calls) == (1, 2)
    assert len(first.alive) == len(second.alive) == 0
    assert checkpoint.num_elements == stored.numel()


def test_step_with_many_pieces_of_one_parameter_runs_once() -> None:
    step = Counted(lambda t: t.exp())
    stored = torch.randn(6, 4)

    def rule(weight: Weight) -> Mapped:
        computed = weight.apply(step)
        return [computed[i : i + 1].part(0, 5 - i, 6).rename("x") for i in range(6)]

    load_into({"x": stored.exp().flip(0)}, {"w": stored}, rule)
    assert step.num_calls == 1


def test_every_load_computes_its_own() -> None:
    """An update goes the same way again, with other values."""
    step = Counted(lambda t: t + 1)
    stored = {"w": torch.zeros(2)}
    checkpoint, backend = FakeCheckpoint(stored), FakeLoader.of({"w": torch.zeros(2)})
    plan = plan_of(checkpoint, backend, lambda w: w.apply(step))
    for value in (0.0, 5.0):
        stored["w"].fill_(value)
        run(plan, checkpoint, backend)
        assert torch.equal(backend.buffers["w"], torch.full((2,), value + 1))
    assert step.num_calls == 2


# ---------------------------------------------------------------- tied parameters

TIES = {"head": "embed"}


def load_tied(stored: Tensors, dtype: torch.dtype = torch.float32, *rules: WeightRule) -> FakeLoader:
    wanted = torch.zeros(4, 2, dtype=dtype)
    checkpoint, backend = FakeCheckpoint(stored), FakeLoader.of({"embed": wanted, "head": wanted}, ties=TIES)
    run(plan_of(checkpoint, backend, *rules), checkpoint, backend)
    return backend


@pytest.mark.parametrize("names", [["embed"], ["head"], ["embed", "head"]], ids="+".join)
def test_tied_parameter_is_loaded_once_from_either_copy(names: list[str]) -> None:
    tensor = torch.randn(4, 2)
    backend = load_tied({name: tensor.clone() for name in names})
    assert torch.equal(backend.buffers["embed"], tensor)
    assert backend.calls == ["destination embed", "loaded embed", "finish_loading"]


def test_copies_of_a_tied_parameter_that_differ_are_refused() -> None:
    tensor = torch.randn(4, 2)
    with pytest.raises(PlanError) as caught:
        load_tied({"embed": tensor, "head": tensor + 1})
    assert str(caught.value) == (
        "embed and head are tied, and their stored copies embed and head differ; drop the wrong one in a weight rule, "
        "or untie them in the config"
    )


def test_copies_of_a_tied_parameter_are_compared_as_they_are_kept() -> None:
    tensor = torch.randn(4, 2).bfloat16()
    load_tied({"embed": tensor, "head": tensor.float()})
    load_tied({"embed": tensor, "head": tensor.float() * (1 + 2**-20)}, torch.bfloat16)
    with pytest.raises(PlanError, match="differ"):
        load_tied({"embed": tensor, "head": tensor.float() * (1 + 2**-20)})


def test_equal_copies_with_nan_in_them_are_equal() -> None:
    tensor = torch.full((4, 2), float("nan"))
    load_tied({"embed": tensor, "head": tensor.clone()})


def test_computed_twin_is_computed_once() -> None:
    step = Counted(lambda t: t * 2)
    tensor = torch.randn(4, 2)

    def rule(weight: Weight) -> Mapped:
        computed = weight.apply(step)
        return [computed.rename("embed"), computed.rename("head")]

    backend = load_tied({"wte": tensor}, torch.float32, rule)
    assert torch.equal(backend.buffers["embed"], tensor * 2)
    assert step.num_calls == 1
    assert len(step.alive) == 0
