"""`pytorch_model.bin`: the tensors that torch itself loads, and a refusal for whatever else a pickle can be."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from checkpoints_made import CONFIG, llama_tensors, write_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig

from infinilm.checkpoints.pytorch_bin import PytorchBinCheckpoint, open_checkpoint
from infinilm_hookspecs import Checkpoint, CheckpointError
from infinilm_hookspecs.dtypes import ITEM_SIZES

BIN, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@pytest.fixture(autouse=True)
def _no_file_is_left_open(tmp_path: Path) -> Iterator[None]:
    yield
    links = [os.path.join("/proc/self/fd", descriptor) for descriptor in os.listdir("/proc/self/fd")]
    assert not [os.readlink(link) for link in links if os.path.exists(link) and tmp_path.name in os.readlink(link)]


def write_bin(folder: Path, saved: object, **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    torch.save(saved, folder / BIN, **options)
    return folder


def write_shards(
    folder: Path, shards: Mapping[str, Mapping[str, Tensor]], weight_map: Mapping[str, str] | None = None
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for file, tensors in shards.items():
        torch.save(dict(tensors), folder / file)
    whole = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"weight_map": whole if weight_map is None else weight_map}))
    return folder


def opened(folder: Path) -> PytorchBinCheckpoint:
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
    return alike and torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)))


def refusal_of(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder))
    return str(caught.value)


# ---------------------------------------------------------------- what torch itself loads


def unusual_tensors() -> dict[str, Tensor]:
    """Return tensors in every dtype, and of every kind of layout that `torch.save` keeps."""
    base = torch.arange(60.0).reshape(3, 4, 5)
    tagged = torch.arange(4.0)
    tagged.tag = "a tensor with an attribute"  # type: ignore[attr-defined]  # what torch allows
    tensors = {
        "matrix": base[0].clone(),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "transposed": base.transpose(0, 2),
        "every other": base[:, ::2],
        "row of a storage": base[1],
        "column of a storage": base[:, 2, 3],
        "expanded": torch.arange(3.0)[:, None].expand(3, 4),
        "one wide": torch.arange(6.0).reshape(6, 1)[:, :1],
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "tagged": tagged,
    }
    for dtype, size in ITEM_SIZES.items():
        top = 2 if dtype == "bool" else 256
        raw = torch.randint(0, top, (3, 5, size), dtype=torch.uint8)
        tensors[dtype] = raw.view(getattr(torch, dtype)).reshape(3, 5)
    return tensors


def test_every_tensor_is_the_one_torch_loads(tmp_path: Path) -> None:
    folder = write_bin(tmp_path, unusual_tensors())
    expected = torch.load(folder / BIN, weights_only=True)
    with closing(opened(folder)) as checkpoint:
        assert (checkpoint.config, checkpoint.trust) == (CONFIG, "restricted")
        assert checkpoint.tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            assert same_bytes(read(checkpoint, name), tensor.detach()), name


def test_extents_are_where_the_bytes_lie(tmp_path: Path) -> None:
    tensors = unusual_tensors()
    with closing(opened(write_bin(tmp_path, tensors))) as checkpoint:
        without = {name for name, stored in checkpoint.tensors.items() if stored.extent is None}
        assert without == {"transposed", "every other", "column of a storage", "expanded"}
        for name in tensors.keys() - without:
            extent = checkpoint.tensors[name].extent
            assert extent is not None
            path, offset, length = extent
            found = path.read_bytes()[offset : offset + length]
            assert found == bytes(tensors[name].detach().contiguous().reshape(-1).view(torch.uint8).tolist()), name


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_region_of_any_layout(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    base = torch.arange(3 * 4 * 5).reshape(3, 4, 5)
    view = base.permute(*data.draw(st.permutations(range(3))))
    view = view[data.draw(st.integers(0, view.shape[0] - 1)) :, :: data.draw(st.integers(1, 2))]
    region = []
    for size in view.shape:
        start = data.draw(st.integers(0, size))
        region.append(slice(start, data.draw(st.integers(start, size))))
    with closing(opened(write_bin(tmp_path_factory.mktemp("bin"), {"a": view}))) as checkpoint:
        assert torch.equal(read(checkpoint, "a", tuple(region)), view[tuple(region)])


def test_model_saved_with_torch_gives_transformers_answers(tmp_path: Path) -> None:
    """Tied weights are two names for one storage here."""
    config = LlamaConfig(
        **{key: value for key, value in CONFIG.items() if key not in ("model_type", "dtype")}, tie_word_embeddings=True
    )
    model = oracle.write_checkpoint(tmp_path, config)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / BIN)
    subject = oracle.Subject(tmp_path, *oracle.examine(model, (1, 7, 30)))
    with subject.load() as llm:
        assert llm.checkpoint.plugin == "pytorch_bin"
        oracle.check_parity(llm, subject.prompts, subject.expected)


def test_shards(tmp_path: Path) -> None:
    one, two = dict(list(llama_tensors().items())[:5]), dict(list(llama_tensors().items())[5:])
    shards = {"pytorch_model-00001-of-00002.bin": one, "pytorch_model-00002-of-00002.bin": two}
    with closing(opened(write_shards(tmp_path, shards))) as checkpoint:
        assert checkpoint.tensors.keys() == llama_tensors().keys()
        for name, tensor in llama_tensors().items():
            assert same_bytes(read(checkpoint, name), tensor), name


# ---------------------------------------------------------------- what it claims


def test_claims_no_folder_with_safetensors(tmp_path: Path) -> None:
    folder = write_bin(write_llama(tmp_path), llama_tensors())
    assert open_checkpoint(str(folder)) is None
    (folder / "model.safetensors").rename(folder / "model.safetensors.index.json")
    assert open_checkpoint(str(folder)) is None


def test_claims_nothing_else(tmp_path: Path) -> None:
    assert open_checkpoint(str(tmp_path)) is None
    assert open_checkpoint(str(tmp_path / "nowhere")) is None
    assert open_checkpoint("s3://bucket/model") is None


# ---------------------------------------------------------------- what a pickle may not do


class Call:
    """Pickled, a call of a function: what a checkpoint that means harm is made of."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


HARM = {
    "posix.system": Call(os.system, "touch harmed"),
    "builtins.eval": Call(eval, "open('harmed', 'w')"),
    "builtins.getattr": Call(getattr, torch.Size, "count"),
    "torch.serialization.load": Call(torch.load, "harmed"),
    "collections.Counter": Call(collections.Counter, [1, 2]),
    "torch._utils._rebuild_sparse_tensor": torch.eye(2).to_sparse(),
}


@pytest.mark.parametrize("name", HARM)
@pytest.mark.parametrize("protocol", [2, 4])
def test_pickle_that_asks_for_more_than_tensors_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_bin(tmp_path, {"a": torch.ones(2), "b": HARM[name]}, pickle_protocol=protocol)
    message = refusal_of(folder).replace("__builtin__", "builtins")  # what protocol 2 calls it
    assert message == (
        f"'{folder / BIN}' is refused: its pickle asks for {name}, and no tensor needs it; "
        "it may run code. Get the model as safetensors, or from somebody you trust"
    )
    assert not Path("harmed").exists()


def archive(pickled: bytes, *, compression: int = zipfile.ZIP_STORED, **records: bytes) -> bytes:
    """Return an archive like `torch.save`'s with this pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as made, warnings.catch_warnings(action="ignore"):
        made.writestr("archive/data.pkl", pickled)
        for name, data in {"version": b"3\n", **records}.items():
            made.writestr(f"archive/{name.replace('__', '/')}", data)
    return file.getvalue()


def tensor_pickle(*, size: tuple[int, ...], stride: tuple[int, ...], offset: int, numel: int, key: str = "0") -> bytes:
    """Return the pickle of {"a": a float tensor} that says of it what a test wants."""

    class Storage:
        pass

    class Made:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, size, stride, False, collections.OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: object) -> object:
            return ("storage", torch.FloatStorage, key, "cpu", numel) if isinstance(obj, Storage) else None

    file = io.BytesIO()
    Pickler(file, protocol=2).dump({"a": Made()})
    return file.getvalue()


SOUND = {"size": (2, 2), "stride": (2, 1), "offset": 0, "numel": 4}


def doubled(depth: int) -> bytes:
    """Return a pickle of a list of a list twice of a list twice ..., which is short, and endless in print."""
    lists = [b"](h%ch%ceq%c" % (level, level, level + 1) for level in range(depth)]
    return b"\x80\x02]q\x00" + b"".join(lists) + b"R."


PICKLES: list[tuple[str, bytes, str]] = [
    ("a memo index of 2^30", b"\x80\x02K\x01r\x00\x00\x00\x40.", "holds a int, and a state dict is wanted"),
    ("a key of tuples", b"\x80\x02})" + b"\x85" * 100_000 + b"K\x01s.", "a tuple is the key of a dict"),
    ("2^60 lists", doubled(60), "is called with"),
    ("no end", b"\x80\x02K\x01", "holds a damaged pickle"),
    ("an empty stack", b"\x80\x02\x85.", "takes from an empty stack"),
    ("a memo that is empty", b"\x80\x02h\x05.", "holds a damaged pickle: KeyError"),
    ("a set", b"\x80\x04\x8f.", "data does not need the opcode EMPTY_SET"),
    ("a class that gets a state", b"\x80\x02ctorch\nFloatStorage\n}b.", "a _Dtype is given a state"),
    ("a call of a dtype", b"\x80\x02ctorch\nFloatStorage\n)R.", "is called with ()"),
    (
        "a dict of tuples",
        b"\x80\x02ccollections\nOrderedDict\n](K\x01K\x02\x86e\x85R.",
        "holds a damaged pickle: TypeError",
    ),
    ("nothing", b"", "holds a damaged pickle"),
    ("text", b"not a pickle at all", "holds a damaged pickle"),
    ("numbers", pickle.dumps({"a": 1}, 2), "has a int for 'a', and tensors by name are wanted"),
    ("a nested dict", pickle.dumps({"model": {"a": 1}}, 2), "has a dict for 'model', and tensors by name are wanted"),
    ("no dict", pickle.dumps([1], 2), "holds a list, and a state dict is wanted"),
    (
        "too many rows",
        tensor_pickle(**{**SOUND, "size": (3, 2)}),
        "a tensor of [3, 2] lies outside its storage of 16 bytes",
    ),
    ("an offset", tensor_pickle(**{**SOUND, "offset": 1}), "a tensor of [2, 2] lies outside its storage"),
    ("a long step", tensor_pickle(**{**SOUND, "stride": (2**40, 1)}), "a tensor of [2, 2] lies outside its storage"),
    ("a step back", tensor_pickle(**{**SOUND, "stride": (-2, 1)}), "a tensor has the sizes (-2, 1)"),
    ("a size that is no size", tensor_pickle(**{**SOUND, "size": (2.0, 2)}), "a tensor has the sizes (2.0, 2)"),
    ("fewer steps", tensor_pickle(**{**SOUND, "stride": (1,)}), "a tensor of [2, 2] lies outside its storage"),
    (
        "a long storage",
        tensor_pickle(**{**SOUND, "numel": 2**61}),
        "storage '0' has 16 bytes, and 2305843009213693952 of",
    ),
    ("no storage", tensor_pickle(**{**SOUND, "key": "7"}), "it has no record 'data/7'"),
]


def write_bytes(folder: Path, content: bytes) -> Path:
    write_bin(folder, {})
    (folder / BIN).write_bytes(content)
    return folder


@pytest.mark.parametrize(("pickled", "message"), [pytest.param(p, m, id=name) for name, p, m in PICKLES])
def test_pickle_that_lies(tmp_path: Path, pickled: bytes, message: str) -> None:
    found = refusal_of(write_bytes(tmp_path, archive(pickled, data__0=bytes(16))))
    assert found.startswith(f"'{tmp_path / BIN}' ")
    assert message in found
    assert len(found) < 400
    assert "\n" not in found


FILES: list[tuple[str, bytes, str]] = [
    ("empty", b"", "is not a file of torch.save: it begins with b''"),
    ("text", b"hello", "is not a file of torch.save: it begins with b'hello'"),
    ("a bare pickle", pickle.dumps({"a": 1}), "is not a file of torch.save"),
    (
        "git-lfs",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "fetch the file itself with 'git lfs pull'",
    ),
    ("zip of nothing", b"PK\x03\x04" + bytes(40), "is not a sound file of torch.save: File is not a zip file"),
    (
        "compressed",
        archive(pickle.dumps({}, 2), compression=zipfile.ZIP_DEFLATED),
        "'data.pkl' is compressed or encrypted",
    ),
    (
        "two pickles",
        archive(b"", **{"data.pkl": b""}),
        "2 of its records are called data.pkl, and one is wanted",
    ),
    ("TorchScript", archive(pickle.dumps({}, 2), **{"constants.pkl": b""}), "is a TorchScript program"),
    ("big-endian", archive(pickle.dumps({}, 2), byteorder=b"big"), "has its bytes in the order b'big'"),
]


@pytest.mark.parametrize(("content", "message"), [pytest.param(c, m, id=name) for name, c, m in FILES])
def test_file_of_another_kind(tmp_path: Path, content: bytes, message: str) -> None:
    found = refusal_of(write_bytes(tmp_path, content))
    assert found.startswith(f"'{tmp_path / BIN}' ")
    assert message in found
    assert "\n" not in found


def test_file_from_before_zip_says_how_to_save_it_anew(tmp_path: Path) -> None:
    folder = write_bin(tmp_path, llama_tensors(), _use_new_zipfile_serialization=False)
    assert refusal_of(folder).endswith("save it anew: torch.save(torch.load(FILE, weights_only=True), FILE)")
    torch.save(torch.load(folder / BIN, weights_only=True), folder / BIN)
    opened(folder).close()


def test_conjugate_view(tmp_path: Path) -> None:
    folder = write_bin(tmp_path, {"a": torch.ones(2, dtype=torch.complex64).conj()})
    assert "a tensor is a view with {'conj': True}; save it after resolve_conj()" in refusal_of(folder)


# ---------------------------------------------------------------- files that are damaged


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.999])
def test_truncated_file(tmp_path: Path, kept: float) -> None:
    folder = write_bin(tmp_path, llama_tensors())
    content = (folder / BIN).read_bytes()
    (folder / BIN).write_bytes(content[: int(len(content) * kept)])
    assert "is it truncated? Download it again" in refusal_of(folder)


@pytest.mark.parametrize("name", ["a", "transposed"])
def test_file_that_shrinks_after_it_was_opened(tmp_path: Path, name: str) -> None:
    a = torch.randn(50, 40)
    folder = write_bin(tmp_path, {"a": a, "transposed": torch.randn(40, 50).t()})
    with closing(opened(folder)) as checkpoint:
        os.truncate(folder / BIN, 1000)
        with pytest.raises(CheckpointError, match=rf"{BIN}', tensor '{name}' at offset \d+: the file is too short"):
            read(checkpoint, name)


def test_closed_checkpoint(tmp_path: Path) -> None:
    checkpoint = opened(write_bin(tmp_path, {"a": torch.ones(2)}))
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(CheckpointError, match="the checkpoint is closed"):
        read(checkpoint, "a")


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # of pickletools, about text that was damaged
@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_file_is_refused_or_as_long_as_it_says(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    content = bytearray((write_bin(folder, {"a": torch.arange(6.0).reshape(2, 3)}) / BIN).read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    (folder / BIN).write_bytes(content)
    try:
        checkpoint = opened(folder)
    except CheckpointError:
        return
    with closing(checkpoint):
        for name, stored in checkpoint.tensors.items():
            assert read(checkpoint, name).shape == stored.shape


# ---------------------------------------------------------------- the index

ONE, TWO = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
SHARDS = {ONE: {"a": torch.ones(2), "b": torch.ones(3)}, TWO: {"c": torch.ones(4)}}
MAP = {"a": ONE, "b": ONE, "c": TWO}

INDEXES: list[tuple[str, Mapping[str, str], str]] = [
    ("too little", {"a": ONE, "c": TWO}, f"'b' lies in {ONE}, and the index does not name it"),
    ("too much", {**MAP, "d": TWO}, f"'d' is not in {TWO}, where the index says it is"),
    ("elsewhere", {**MAP, "b": TWO}, f"'b' lies in {ONE}, and the index says {TWO}"),
    ("outside", {**MAP, "c": "../pytorch_model.bin"}, "leads out of the folder"),
    ("absolute", {**MAP, "c": "/etc/passwd"}, "leads out of the folder"),
    ("missing", {**MAP, "c": "three.bin"}, "is missing, and pytorch_model.bin.index.json names it"),
]


@pytest.mark.parametrize(("weight_map", "message"), [pytest.param(w, m, id=name) for name, w, m in INDEXES])
def test_index_that_disagrees_with_the_files(tmp_path: Path, weight_map: Mapping[str, str], message: str) -> None:
    assert message in refusal_of(write_shards(tmp_path, SHARDS, weight_map))


def test_one_name_in_two_shards(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, {**SHARDS, TWO: {"c": torch.ones(4), "a": torch.ones(2)}}, MAP)
    assert f"'a' lies in {TWO} and in {ONE}" in refusal_of(folder)
