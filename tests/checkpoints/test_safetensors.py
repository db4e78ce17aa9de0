"""Safetensors folders: the bytes that `safetensors` itself reads, and one refusal for every way a file can lie."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints_made import CONFIG, llama_tensors, safetensors_bytes, write_folder, write_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from infinilm.checkpoints.safetensors import SafetensorsCheckpoint, open_checkpoint
from infinilm_hookspecs import Checkpoint, CheckpointError

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
    torch.uint16,
    torch.int16,
    torch.float16,
    torch.bfloat16,
    torch.uint32,
    torch.int32,
    torch.float32,
    torch.uint64,
    torch.int64,
    torch.float64,
    torch.complex64,
]


def opened(folder: Path) -> SafetensorsCheckpoint:
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint is not None
    return checkpoint


def read(checkpoint: Checkpoint, name: str, region: tuple[slice, ...] | None = None) -> Tensor:
    stored = checkpoint.tensors[name]
    region = region if region is not None else tuple(slice(0, size) for size in stored.shape)
    out = torch.empty([s.stop - s.start for s in region], dtype=getattr(torch, stored.dtype))
    checkpoint.read(name, region, out)
    return out


def same_bytes(one: Tensor, other: Tensor) -> bool:
    alike = one.dtype == other.dtype and one.shape == other.shape
    bytes_of = [t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    return alike and torch.equal(*bytes_of)


def open_descriptors() -> set[str]:
    """Return the files this process has open."""
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        except FileNotFoundError:  # the one that listed the others
            continue
    return found


@pytest.fixture(autouse=True)
def _no_file_is_left_open(tmp_path: Path) -> Iterator[None]:
    """Every test here closes what it opens, and an open that fails leaves nothing behind."""
    yield
    assert not {name for name in open_descriptors() if name.startswith(str(tmp_path))}


# ---------------------------------------------------------------- what safetensors itself reads


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    size = torch.empty((), dtype=dtype).element_size()
    top = 2 if dtype == torch.bool else 256
    return torch.randint(0, top, (*shape, size), dtype=torch.uint8).view(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_that_torch_saves(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "matrix": random_tensor((5, 7), dtype),
        "scalar": random_tensor((), dtype),
        "empty": random_tensor((0, 3), dtype),
        "four": random_tensor((2, 1, 3, 2), dtype),
    }
    folder = write_folder(tmp_path, tensors)
    with closing(opened(folder)) as checkpoint:
        assert checkpoint.config == CONFIG
        assert checkpoint.trust == "data"
        expected = load_file(folder / "model.safetensors")
        assert checkpoint.tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            assert same_bytes(read(checkpoint, name), tensor), name
            assert same_bytes(tensor, tensors[name])


def test_extents_are_where_the_bytes_lie(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5).bfloat16(), "none": torch.empty(0, 2)}
    with closing(opened(write_folder(tmp_path, tensors))) as checkpoint:
        for name, stored in checkpoint.tensors.items():
            assert stored.extent is not None
            path, offset, num_bytes = stored.extent
            content = path.read_bytes()[offset : offset + num_bytes]
            assert content == bytes(tensors[name].reshape(-1).view(torch.uint8).tolist())


def test_metadata_is_no_tensor(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"a": torch.ones(2)})
    save_file({"a": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    with closing(opened(folder)) as checkpoint:
        assert list(checkpoint.tensors) == ["a"]


def test_shards_as_transformers_writes_them(tmp_path: Path) -> None:
    tensors = llama_tensors()
    names = sorted(tensors)
    shards = {f"model-{i + 1:05}-of-00003.safetensors": {name: tensors[name] for name in names[i::3]} for i in range(3)}
    with closing(opened(write_shards(tmp_path, shards))) as checkpoint:
        assert checkpoint.tensors.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert same_bytes(read(checkpoint, name), tensor)


def test_shards_in_a_folder_below(tmp_path: Path) -> None:
    shards = {"sub/one.safetensors": {"a": torch.ones(2)}, "two.safetensors": {"b": torch.ones(3)}}
    with closing(opened(write_shards(tmp_path, shards))) as checkpoint:
        assert checkpoint.tensors.keys() == {"a", "b"}


def test_links_out_of_the_folder_are_followed_as_the_hub_cache_has_them(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "snapshot", {"a": torch.ones(2)})
    blob = tmp_path / "blob"
    (folder / "model.safetensors").rename(blob)
    (folder / "model.safetensors").symlink_to(blob)
    with closing(opened(folder)) as checkpoint:
        assert torch.equal(read(checkpoint, "a"), torch.ones(2))


def test_file_without_tensors(tmp_path: Path) -> None:
    with closing(opened(write_bytes(tmp_path, safetensors_bytes({})))) as checkpoint:
        assert checkpoint.tensors == {}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 5), max_size=4), st.data())
def test_any_region_is_what_slicing_gives(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], data: st.DataObject
) -> None:
    shape = tuple(sizes)
    dtype = data.draw(st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.int64]))
    tensor = random_tensor(shape, dtype)
    starts = [data.draw(st.integers(0, size)) for size in shape]
    stops = [data.draw(st.integers(start, size)) for start, size in zip(starts, shape, strict=True)]
    region = tuple(map(slice, starts, stops))
    folder = write_folder(tmp_path_factory.mktemp("region"), {"before": torch.ones(3), "x": tensor})
    with closing(opened(folder)) as checkpoint:
        assert same_bytes(read(checkpoint, "x", region), tensor[region])


def test_region_reads_no_byte_outside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path, {"x": torch.randn(8, 6, 4)})
    num_bytes = 0
    preadv = os.preadv

    def counting(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal num_bytes
        count = preadv(descriptor, buffers, offset)
        num_bytes += count
        return count

    monkeypatch.setattr(os, "preadv", counting)
    with closing(opened(folder)) as checkpoint:
        num_bytes = 0
        read(checkpoint, "x", (slice(2, 5), slice(0, 6), slice(0, 4)))
        assert num_bytes == 3 * 6 * 4 * 4
        read(checkpoint, "x", (slice(0, 8), slice(1, 3), slice(1, 2)))
        assert num_bytes == 3 * 6 * 4 * 4 + 8 * 2 * 4


def test_reads_that_come_in_pieces_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(10, 10)
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:7]], offset))
    with closing(opened(write_folder(tmp_path, {"x": tensor}))) as checkpoint:
        assert torch.equal(read(checkpoint, "x"), tensor)


def test_read_fills_views_and_tensors_of_inference_mode(tmp_path: Path) -> None:
    tensor = torch.randn(3, 4)
    with closing(opened(write_folder(tmp_path, {"x": tensor}))) as checkpoint:
        fused = torch.zeros(8, 4)
        with torch.inference_mode():
            mine = torch.zeros(3, 4)
            checkpoint.read("x", (slice(0, 3), slice(0, 4)), mine)
            checkpoint.read("x", (slice(0, 3), slice(0, 4)), fused[2:5])
        assert torch.equal(mine, tensor)
        assert torch.equal(fused[2:5], tensor)
        assert (fused[:2] == 0).all()
        assert (fused[5:] == 0).all()


def test_buffer_that_does_not_fit_is_never_filled_in_part(tmp_path: Path) -> None:
    with closing(opened(write_folder(tmp_path, {"x": torch.randn(3, 4)}))) as checkpoint:
        whole = (slice(0, 3), slice(0, 4))
        for out in (torch.zeros(3, 5), torch.zeros(2, 4), torch.zeros(3, 4).double()):
            with pytest.raises(AssertionError):
                checkpoint.read("x", whole, out)
            assert (out == 0).all()
        with pytest.raises(RuntimeError):
            checkpoint.read("x", whole, torch.zeros(4, 3).t())


# ---------------------------------------------------------------- which folders are this plugin's


def test_folders_without_safetensors_are_not_this_plugins(tmp_path: Path) -> None:
    assert open_checkpoint(str(tmp_path)) is None
    assert open_checkpoint(str(tmp_path / "missing")) is None
    assert open_checkpoint("https://example.org/model") is None
    (tmp_path / "config.json").write_text("{}")
    assert open_checkpoint(str(tmp_path)) is None
    assert open_checkpoint(str(tmp_path / "config.json")) is None


def test_files_beside_the_weights(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"a": torch.ones(2)})
    (folder / "sub").mkdir()
    (folder / "sub" / "vocab.txt").write_text("x")
    with closing(opened(folder)) as checkpoint:
        assert checkpoint.file("config.json") == folder / "config.json"
        assert checkpoint.file("sub/vocab.txt") == folder / "sub" / "vocab.txt"
        assert checkpoint.file("tokenizer.json") is None
        assert checkpoint.file("sub") is None
        for name in ("../secret", "/etc/passwd", "sub/../../secret", "", "a\0b"):
            with pytest.raises(CheckpointError, match="leads out of the folder"):
                checkpoint.file(name)


def test_close_closes_every_file_and_may_be_called_twice(tmp_path: Path) -> None:
    shards = {f"{i}.safetensors": {f"t{i}": torch.ones(2)} for i in range(3)}
    checkpoint = opened(write_shards(tmp_path, shards))
    assert {f"{tmp_path}/{i}.safetensors" for i in range(3)} <= open_descriptors()
    checkpoint.close()
    checkpoint.close()
    assert not {name for name in open_descriptors() if name.startswith(str(tmp_path))}
    with pytest.raises(CheckpointError, match=r"0.safetensors', tensor 't0' at offset \d+: the checkpoint is closed"):
        read(checkpoint, "t0")


# ---------------------------------------------------------------- headers that lie


def write_bytes(folder: Path, content: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(content)
    return folder


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def twice(name: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> bytes:
    """Return a header in which one name stands twice, which no dict can say."""
    return f'{{"{name}": {json.dumps(one)}, "{name}": {json.dumps(other)}}}'.encode()


POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4cac19622fc3ada9c0fdeadb33f88f367b541f38b89102a3f12\n"
)

LIES: list[tuple[str, bytes, str]] = [
    *((f"{n} bytes", bytes(n), f"it has {n} bytes, and the length of the header takes 8") for n in range(8)),
    ("length 0", safetensors_bytes(b"{}", length=0), "its header claims 0 bytes, in a file of 10"),
    ("length 1", safetensors_bytes(b"{}", length=1), "its header claims 1 bytes, in a file of 10"),
    ("length 2**63", safetensors_bytes(b"{}", length=2**63), f"its header claims {2**63} bytes, in a file of 10"),
    ("length past the end", safetensors_bytes(b"{}", length=3), "its header claims 3 bytes, in a file of 10"),
    ("not JSON", safetensors_bytes(b"{]"), "its header is no JSON: "),
    ("not UTF-8", safetensors_bytes(b'{"\xff": 1}'), "its header is no JSON: 'utf-8' codec can't decode byte 0xff"),
    ("UTF-16", safetensors_bytes("{}".encode("utf-16")), "its header is no JSON: 'utf-8' codec can't decode"),
    ("a list", safetensors_bytes([]), "its header is a JSON list, and an object is wanted"),
    ("null", safetensors_bytes(None), "its header is a JSON null, and an object is wanted"),
    ("a number", safetensors_bytes(12), "its header is a JSON number, and an object is wanted"),
    ("nested", safetensors_bytes(b'{"a":' * 100_000), "its header is no JSON: "),
    (
        "an endless number",
        safetensors_bytes(b'{"a":' + b"9" * 5000 + b"}"),
        "its header is no JSON: Exceeds the limit",
    ),
    ("a name twice", safetensors_bytes(twice("a", entry(), entry()), bytes(8)), "its header has the name 'a' twice"),
    (
        "a key of an entry twice",
        safetensors_bytes(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
        "its header has the name 'dtype' twice",
    ),
    (
        "a name twice, one of them empty",
        safetensors_bytes(b'{"a":{},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
        "its header has the name 'a' twice",
    ),
    (
        "a name twice, once escaped",
        safetensors_bytes(rb'{"\u0061":5,"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
        "its header has the name 'a' twice",
    ),
    (
        "a name twice, beside as many numbers where text is due",
        safetensors_bytes(
            b'{"__metadata__":{"b":1,"c":2,"d":3,"e":4,"f":5},' + twice("a", entry(), entry())[1:], bytes(8)
        ),
        "its header has the name 'a' twice",
    ),
    (
        "metadata twice",
        safetensors_bytes(b'{"__metadata__":{"b":"1"},"__metadata__":{"b":"2"}}'),
        "its header has the name '__metadata__' twice",
    ),
    (
        "bool size after the number it equals",
        safetensors_bytes({"a": entry("U8", [1], [0, 1]), "b": entry("U8", [True], [1, 2])}, bytes(2)),
        "tensor 'b' has the shape [True]",
    ),
    (
        "float size after the number it equals",
        safetensors_bytes({"a": entry(offsets=[0, 8]), "b": entry(shape=[2.0], offsets=[8, 16])}, bytes(16)),
        "tensor 'b' has the shape [2.0]",
    ),
    (
        "float offset in a shape met before",
        safetensors_bytes({"a": entry(offsets=[0, 8]), "b": entry(offsets=[8.0, 16])}, bytes(16)),
        "tensor 'b' has the data_offsets [8.0, 16]",
    ),
    (
        "wrong bytes in a shape met before",
        safetensors_bytes({"a": entry(offsets=[0, 8]), "b": entry(offsets=[8, 12])}, bytes(12)),
        "tensor 'b' takes 4 bytes, and [2] of F32 needs 8",
    ),
    ("an entry that is null", safetensors_bytes({"a": None}), "tensor 'a' is described by None, and dtype, shape and"),
    ("an entry without shape", safetensors_bytes({"a": {"dtype": "F32"}}), "tensor 'a' is described by {'dtype': 'F3"),
    ("unknown dtype", safetensors_bytes({"a": entry("F33")}, bytes(8)), "tensor 'a' has the dtype 'F33'; known: BOOL"),
    ("dtype null", safetensors_bytes({"a": entry(None)}, bytes(8)), "tensor 'a' has the dtype None; known: BOOL, U8"),
    ("dtype a list", safetensors_bytes({"a": entry(["F32"])}, bytes(8)), "tensor 'a' has the dtype ['F32']; known"),
    ("negative size", safetensors_bytes({"a": entry(shape=[-2])}, bytes(8)), "tensor 'a' has the shape [-2]"),
    ("two negative", safetensors_bytes({"a": entry(shape=[-1, -2])}, bytes(8)), "tensor 'a' has the shape [-1, -2]"),
    ("float size", safetensors_bytes({"a": entry(shape=[2.0])}, bytes(8)), "tensor 'a' has the shape [2.0]"),
    ("bool size", safetensors_bytes({"a": entry(shape=[True])}, bytes(8)), "tensor 'a' has the shape [True]"),
    ("text size", safetensors_bytes({"a": entry(shape=["2"])}, bytes(8)), "tensor 'a' has the shape ['2']"),
    ("shape a number", safetensors_bytes({"a": entry(shape=2)}, bytes(8)), "tensor 'a' has the shape 2"),
    ("shape null", safetensors_bytes({"a": entry(shape=None)}, bytes(8)), "tensor 'a' has the shape None"),
    ("NaN size", safetensors_bytes({"a": entry(shape=[float("nan")])}, bytes(8)), "tensor 'a' has the shape [nan]"),
    ("size past 2**63", safetensors_bytes({"a": entry(shape=[2**63, 0])}), f"tensor 'a' has the shape [{2**63}, 0]"),
    ("65 dimensions", safetensors_bytes({"a": entry(shape=[1] * 65)}, bytes(8)), "tensor 'a' has the shape [1, 1, 1"),
    ("a million", safetensors_bytes({"a": entry(shape=[10**18] * 10**6)}), "tensor 'a' has the shape [1000000000000"),
    ("reversed", safetensors_bytes({"a": entry(offsets=[8, 0])}, bytes(8)), "tensor 'a' has the data_offsets [8, 0]"),
    ("negative", safetensors_bytes({"a": entry(offsets=[-8, 0])}, bytes(8)), "tensor 'a' has the data_offsets [-8, 0]"),
    ("one offset", safetensors_bytes({"a": entry(offsets=[8])}, bytes(8)), "tensor 'a' has the data_offsets [8]"),
    ("three", safetensors_bytes({"a": entry(offsets=[0, 8, 8])}, bytes(8)), "tensor 'a' has the data_offsets [0, 8, 8"),
    ("a bool", safetensors_bytes({"a": entry(offsets=[False, 8])}, bytes(8)), "tensor 'a' has the data_offsets [False"),
    ("no offsets", safetensors_bytes({"a": entry(offsets=None)}, bytes(8)), "tensor 'a' has the data_offsets None"),
    (
        "fewer bytes than the shape",
        safetensors_bytes({"a": entry(shape=[3])}, bytes(8)),
        "tensor 'a' takes 8 bytes, and [3] of F32 needs 12",
    ),
    (
        "more bytes than the shape",
        safetensors_bytes({"a": entry("F16")}, bytes(8)),
        "tensor 'a' takes 8 bytes, and [2] of F16 needs 4",
    ),
    (
        "out of range",
        safetensors_bytes({"a": entry(offsets=[0, 8]), "b": entry(offsets=[8, 16])}, bytes(8)),
        "its tensors end at byte ",
    ),
    (
        "a hole at the start",
        safetensors_bytes({"a": entry(offsets=[4, 12])}, bytes(12)),
        "tensor 'a' begins at 4, and the one before ends at 0",
    ),
    (
        "a hole",
        safetensors_bytes({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)),
        "tensor 'b' begins at 12, and the one before ends at 8",
    ),
    (
        "an overlap",
        safetensors_bytes({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)),
        "tensor 'b' begins at 4, and the one before ends at 8",
    ),
    (
        "two tensors in one place",
        safetensors_bytes({"a": entry(), "b": entry()}, bytes(8)),
        "tensor 'b' begins at 0, and the one before ends at 8",
    ),
    (
        "an empty tensor inside another",
        safetensors_bytes({"a": entry(), "b": entry(shape=[0], offsets=[4, 4])}, bytes(8)),
        "tensor 'b' begins at 4, and the one before ends at 8",
    ),
    ("trailing bytes", safetensors_bytes({"a": entry()}, bytes(11)), "3 bytes follow its last tensor"),
    ("bytes without a tensor", safetensors_bytes({}, bytes(5)), "5 bytes follow its last tensor"),
    (
        "a truncated body",
        safetensors_bytes({"a": entry()}, bytes(3)),
        "its tensors end at byte 77, and the file at 72: it is truncated; download it again",
    ),
    ("a git-lfs pointer", POINTER, "it is a git-lfs pointer; fetch the file itself with 'git lfs pull'"),
]


@pytest.mark.parametrize(("content", "message"), [pytest.param(c, m, id=name) for name, c, m in LIES])
def test_file_that_lies_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    folder = write_bytes(tmp_path, content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder))
    start = f"'{folder}/model.safetensors' is not a sound safetensors file: "
    assert str(caught.value).startswith(start + message)
    assert len(str(caught.value)) < 600


def test_header_of_more_than_100_million_bytes_is_refused_unread(tmp_path: Path) -> None:
    folder = write_bytes(tmp_path, (100_000_001).to_bytes(8, "little"))
    os.truncate(folder / "model.safetensors", 200_000_000)  # sparse: it takes no room
    with pytest.raises(CheckpointError, match=r"its header claims 100000001 bytes, in a file of 200000000"):
        open_checkpoint(str(folder))


def test_name_twice_among_a_hundred_thousand_is_found_in_one_pass(tmp_path: Path) -> None:
    names = [f"layer.{i}" for i in range(100_000)]
    header = "{" + ", ".join(f'"{name}": 0' for name in [*names, names[-1]]) + "}"
    with pytest.raises(CheckpointError, match=r"its header has the name 'layer\.99999' twice"):
        open_checkpoint(str(write_bytes(tmp_path, safetensors_bytes(header.encode()))))


def test_name_as_long_as_a_book_is_shown_in_part(tmp_path: Path) -> None:
    folder = write_bytes(tmp_path, safetensors_bytes({"x" * 1_000_000: entry("F33")}, bytes(8)))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder))
    assert len(str(caught.value)) < 600


def test_error_of_the_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    folder = write_folder(tmp_path, {"x": torch.ones(2, 3)})
    with closing(opened(folder)) as checkpoint:
        monkeypatch.setattr(os, "preadv", failing)
        message = r"model\.safetensors', tensor 'x' at offset \d+: Input/output error"
        with pytest.raises(CheckpointError, match=message):
            read(checkpoint, "x")
    monkeypatch.setattr(os, "pread", failing)
    with pytest.raises(CheckpointError, match=r"model\.safetensors'.*: Input/output error"):
        open_checkpoint(str(folder))


def test_file_truncated_after_it_was_opened_is_a_short_read(tmp_path: Path) -> None:
    """A mapped file would die of SIGBUS here."""
    folder = write_folder(tmp_path, {"a": torch.ones(4), "b": torch.ones(4)})
    path = folder / "model.safetensors"
    with closing(opened(folder)) as checkpoint:
        stored = checkpoint.tensors["b"].extent
        assert stored is not None
        assert torch.equal(read(checkpoint, "a"), torch.ones(4))
        os.truncate(path, stored[1] + 10)
        with pytest.raises(CheckpointError) as caught:
            read(checkpoint, "b")
    assert str(caught.value) == (
        f"'{path}', tensor 'b' at offset {stored[1]}: the file is too short, wanted 16 bytes, got 10; "
        "was it changed while it was read?"
    )


def test_file_replaced_after_it_was_opened_is_read_as_it_was(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"a": torch.ones(4)})
    with closing(opened(folder)) as checkpoint:
        save_file({"a": torch.zeros(4)}, tmp_path / "new")
        (tmp_path / "new").rename(folder / "model.safetensors")
        assert torch.equal(read(checkpoint, "a"), torch.ones(4))


def test_file_written_to_after_it_was_opened_is_an_error_though_its_length_is_the_same(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"a": torch.ones(4), "b": torch.ones(4)})
    path = folder / "model.safetensors"
    opened_at = path.stat().st_mtime_ns
    with closing(opened(folder)) as checkpoint:
        assert torch.equal(read(checkpoint, "a"), torch.ones(4))
        with path.open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"\0\0\0\0")
        os.utime(path, ns=(opened_at, opened_at + 1))  # the clock of some file systems is coarse
        message = rf"'{path}', tensor 'b' at offset \d+: the file was written to after its header was read"
        with pytest.raises(CheckpointError, match=message):
            read(checkpoint, "b")


# ---------------------------------------------------------------- indices that lie

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SHARDS = {ONE: {"a": torch.ones(2)}, TWO: {"b": torch.ones(3)}}


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": ONE, "b": TWO, "c": TWO}, f"'c' is not in {TWO}, where the index says it is"),
        ({"a": TWO, "b": TWO}, f"'a' is not in {TWO}, where the index says it is"),
        (
            {"a": TWO, "b": ONE},
            f"'a' lies in {ONE}, and the index says {TWO}; 'b' lies in {TWO}, and the index says {ONE}",
        ),
        ({"b": TWO, "c": ONE}, f"'a' lies in {ONE}, and the index does not name it; 'c' is not in {ONE}, where"),
    ],
)
def test_index_that_disagrees_with_the_shards(tmp_path: Path, weight_map: dict[str, str], message: str) -> None:
    folder = write_shards(tmp_path, SHARDS, weight_map=weight_map)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder))
    start = f"model.safetensors.index.json and the shards of '{folder}' disagree: "
    assert str(caught.value).startswith(start + message)


def test_file_that_the_index_does_not_name_is_somebody_elses(tmp_path: Path) -> None:
    with closing(opened(write_shards(tmp_path, SHARDS, weight_map={"a": ONE}))) as checkpoint:
        assert checkpoint.tensors.keys() == {"a"}


def test_missing_shard_says_who_named_it(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, SHARDS)
    (folder / TWO).unlink()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder))
    assert str(caught.value) == (
        f"'{folder}/{TWO}' is missing, and model.safetensors.index.json names it; is the download complete?"
    )
    (folder / TWO).mkdir()
    with pytest.raises(CheckpointError, match=r"is no file, and model\.safetensors\.index\.json names it"):
        open_checkpoint(str(folder))


def test_every_disagreement_is_told_up_to_five(tmp_path: Path) -> None:
    shards = {ONE: {"a": torch.ones(2), "both": torch.ones(1)}, TWO: {"b": torch.ones(3), "both": torch.ones(1)}}
    weight_map = {"a": ONE, "both": ONE, "b": ONE, "gone": TWO}
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(write_shards(tmp_path, shards, weight_map=weight_map)))
    assert str(caught.value) == (
        f"model.safetensors.index.json and the shards of '{tmp_path}' disagree: "
        f"'b' lies in {TWO}, and the index says {ONE}; 'both' lies in {TWO} and in {ONE}; "
        f"'gone' is not in {TWO}, where the index says it is"
    )
    weight_map = {"a": ONE, "both": ONE, "b": TWO} | {f"gone{i}": ONE for i in range(7)}
    with pytest.raises(CheckpointError, match=r"; 'gone3' is not in [^;]*; and 3 more$"):
        open_checkpoint(str(write_shards(tmp_path, shards, weight_map=weight_map)))


def test_one_shard_under_two_spellings(tmp_path: Path) -> None:
    shards = {ONE: {"a": torch.ones(2), "b": torch.ones(1)}}
    with pytest.raises(CheckpointError, match="disagree"):
        open_checkpoint(str(write_shards(tmp_path, shards, weight_map={"a": ONE, "b": f"./{ONE}"})))


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "sub/../../x", "", ".", "a\0b"])
def test_index_cannot_lead_out_of_the_folder(tmp_path: Path, file: str) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    folder = write_shards(tmp_path / "model", {}, weight_map={"a": file})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder))
    assert str(caught.value) == f"'{folder}': the file name {file!r} leads out of the folder"


@pytest.mark.parametrize("weight_map", [5, ["a"], {"a": 5}, {"a": None}, "x", {"a": ["b"]}])
def test_index_without_a_map_of_names(tmp_path: Path, weight_map: object) -> None:
    folder = write_shards(tmp_path, {}, weight_map=weight_map)
    with pytest.raises(CheckpointError, match=r"index\.json' has no 'weight_map' from tensor names to file names"):
        open_checkpoint(str(folder))


def test_lie_in_one_shard_closes_the_others(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, SHARDS)
    (folder / TWO).write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"{TWO}' is not a sound safetensors file: it has 0 bytes"):
        open_checkpoint(str(folder))


# ---------------------------------------------------------------- config.json

CONFIGS: list[tuple[str, bytes, str]] = [
    ("a list", b"[]", "holds a JSON list, and an object is wanted"),
    ("text", b'"llama"', "holds a JSON string, and an object is wanted"),
    ("null", b"null", "holds a JSON null, and an object is wanted"),
    ("not JSON", b"{model_type: llama}", "cannot be read as JSON: Expecting property name"),
    ("empty", b"", "cannot be read as JSON: Expecting value"),
    ("not UTF-8", b'{"a": "\xff"}', "cannot be read as JSON: 'utf-8' codec can't decode"),
    ("an endless number", b'{"a": ' + b"9" * 5000 + b"}", "cannot be read as JSON: Exceeds the limit"),
    ("10,000 deep", b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "is nested too deeply to be read"),
    ("200 deep", b'{"a":' * 200 + b"1" + b"}" * 200, "is nested too deeply to be read"),
    ("lists 400 deep", b'{"a":' + b"[" * 400 + b"]" * 400 + b"}", "is nested too deeply to be read"),
]


@pytest.mark.parametrize(("content", "message"), [pytest.param(c, m, id=name) for name, c, m in CONFIGS])
def test_config_that_cannot_be_used(tmp_path: Path, content: bytes, message: str) -> None:
    folder = write_folder(tmp_path, {"a": torch.ones(2)})
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder))
    assert str(caught.value).startswith(f"'{folder}/config.json' {message}")


def test_config_as_deep_as_configs_are(tmp_path: Path) -> None:
    deep: Any = 1
    for _ in range(20):
        deep = {"a": [deep]}
    with closing(opened(write_folder(tmp_path, {"a": torch.ones(2)}, config=deep))) as checkpoint:
        assert checkpoint.config == deep


def test_folder_with_weights_and_no_config(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"a": torch.ones(2)})
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder))
    assert str(caught.value) == f"'{folder}' has no config.json"


def test_every_refusal_is_one_line(tmp_path: Path) -> None:
    messages: list[str] = []
    attempts: list[Callable[[Path], Path]] = [
        *(lambda folder, c=content: write_bytes(folder, c) for _, content, _ in LIES),
        lambda folder: write_shards(folder, SHARDS, weight_map={"a": TWO, "c": ONE}),
    ]
    for i, attempt in enumerate(attempts):
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(str(attempt(tmp_path / str(i))))
        messages.append(str(caught.value))
    assert not [message for message in messages if "\n" in message]
