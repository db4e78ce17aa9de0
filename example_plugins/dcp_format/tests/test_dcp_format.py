"""Checkpoints that torch.distributed.checkpoint itself wrote, by one process and by two: transformers' answers."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig

from infinilm.plugins import create_plugin_manager
from infinilm_dcp_format.checkpoint import DcpCheckpoint
from infinilm_hookspecs import CheckpointError

README = Path(__file__).parent.parent / "README.md"
CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=72,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # said of every save by one process

# Each rank holds rows of matrices and columns of others, unevenly where they do not divide.
SAVE_ON_TWO_RANKS = """
import os, sys, torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
placements = [Shard(0), Shard(1), Replicate()]
state = {}
for at, (name, tensor) in enumerate(sorted(load_file(f"{folder}/model.safetensors").items())):
    state[name] = distribute_tensor(tensor, mesh, [placements[at % 3 if tensor.ndim > 1 else 0]])
dcp.save({"model": state, "optimizer": {"step": torch.tensor(3), "rate": 0.5}}, checkpoint_id=folder)
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # threads of gloo may outlive the interpreter, and then end it with an error
"""


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> oracle.Subject:
    """A model that transformers wrote, and what it says."""
    folder = tmp_path_factory.mktemp("dcp")
    model = oracle.write_checkpoint(folder, CONFIG)
    return oracle.Subject(folder, *oracle.examine(model, (1, 15, 45)))


@pytest.fixture(scope="module")
def tensors(subject: oracle.Subject) -> dict[str, Tensor]:
    return load_file(subject.folder / "model.safetensors")


def write_dcp(folder: Path, state: dict[str, Any]) -> Path:
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    CONFIG.save_pretrained(folder)
    return folder


def check_answers(folder: Path, subject: oracle.Subject) -> None:
    with oracle.Subject(folder, subject.prompts, subject.expected).load() as llm:
        assert llm.checkpoint.plugin == "dcp_format"
        oracle.check_parity(llm, subject.prompts, subject.expected)


def read(checkpoint: DcpCheckpoint, name: str, region: tuple[slice, ...] | None = None) -> Tensor:
    stored = checkpoint.tensors[name]
    region = region if region is not None else tuple(slice(0, size) for size in stored.shape)
    out = torch.empty([s.stop - s.start for s in region], dtype=getattr(torch, stored.dtype))
    checkpoint.read(name, region, out)
    return out


# ---------------------------------------------------------------- what torch wrote


def test_one_process(tmp_path: Path, subject: oracle.Subject, tensors: dict[str, Tensor]) -> None:
    check_answers(write_dcp(tmp_path, dict(tensors)), subject)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, subject: oracle.Subject) -> Path:
    """A checkpoint that two processes wrote, each its own shards."""
    folder = tmp_path_factory.mktemp("two_ranks")
    weights = folder / "model.safetensors"
    weights.write_bytes((subject.folder / "model.safetensors").read_bytes())
    command = [sys.executable, "-W", "ignore", "-c", SAVE_ON_TWO_RANKS]
    ranks = [subprocess.Popen([*command, str(rank), str(folder)], stderr=subprocess.PIPE) for rank in range(2)]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors.decode()
    weights.unlink()
    CONFIG.save_pretrained(folder)
    return folder


def test_two_ranks(two_ranks: Path, subject: oracle.Subject) -> None:
    assert {path.name for path in two_ranks.glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    check_answers(two_ranks, subject)


def test_of_training_the_model_alone_is_read(two_ranks: Path, tensors: dict[str, Tensor]) -> None:
    with closing(DcpCheckpoint(str(two_ranks))) as checkpoint:
        assert checkpoint.trust == "restricted"
        assert checkpoint.tensors.keys() == tensors.keys()
        assert any(len(tensor.chunks) == 2 for tensor in checkpoint._chunked.values())
        for name, tensor in tensors.items():
            assert torch.equal(read(checkpoint, name), tensor), name


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_region_across_chunks(two_ranks: Path, tensors: dict[str, Tensor], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(tensors)))
    region = []
    for size in tensors[name].shape:
        start = data.draw(st.integers(0, size))
        region.append(slice(start, data.draw(st.integers(start, size))))
    with closing(DcpCheckpoint(str(two_ranks))) as checkpoint:
        assert torch.equal(read(checkpoint, name, tuple(region)), tensors[name][tuple(region)])


def test_layouts_and_dtypes(tmp_path: Path) -> None:
    state = {
        "transposed": torch.randn(4, 6).t(),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "bfloat16": torch.randn(3).bfloat16(),
        "float8": torch.randn(4).to(torch.float8_e4m3fn),
        "integer": torch.arange(3),
    }
    with closing(DcpCheckpoint(str(write_dcp(tmp_path, dict(state))))) as checkpoint:
        assert checkpoint.tensors.keys() == state.keys()
        for name, tensor in state.items():
            found, wanted = (t.reshape(-1).view(torch.uint8) for t in (read(checkpoint, name), tensor))
            assert torch.equal(found, wanted), name


# ---------------------------------------------------------------- what is refused


def refusal_of(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        create_plugin_manager().ask_one("open_checkpoint", source=str(folder))
    return str(caught.value)


@pytest.fixture(autouse=True)
def _no_file_is_left_open(tmp_path: Path) -> Iterator[None]:
    yield
    links = [os.path.join("/proc/self/fd", descriptor) for descriptor in os.listdir("/proc/self/fd")]
    assert not [os.readlink(link) for link in links if os.path.exists(link) and str(tmp_path) in os.readlink(link)]


def test_folder_without_a_config_says_what_to_put_there(tmp_path: Path) -> None:
    dcp.save({"a": torch.ones(2)}, checkpoint_id=tmp_path, no_dist=True)
    message = refusal_of(tmp_path)
    assert message.startswith(f"'{tmp_path}' has no config.json: ")
    assert "Put the model's config.json beside .metadata" in message


class Call:
    """Pickled, a call of a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
def test_metadata_that_would_run_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    write_dcp(tmp_path, {"a": torch.ones(2)})
    (tmp_path / ".metadata").write_bytes(pickle.dumps([Call(os.system, "touch harmed")], protocol))
    assert refusal_of(tmp_path).startswith(f"'{tmp_path}/.metadata' is refused: its pickle asks for posix.system, ")
    assert not Path("harmed").exists()


def test_chunk_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_dcp(tmp_path, {"a": torch.ones(2)})
    file = io.BytesIO()
    torch.save(Call(os.system, "touch harmed"), file)
    edit_metadata(tmp_path, lambda metadata: set_info(metadata, length=len(file.getvalue()), offset=0))
    (tmp_path / "__0_0.distcp").write_bytes(file.getvalue())
    with (
        closing(DcpCheckpoint(str(tmp_path))) as checkpoint,
        pytest.raises(CheckpointError, match=r"from byte 0 is refused: its pickle asks for posix\.system"),
    ):
        read(checkpoint, "a")
    assert not Path("harmed").exists()


def edit_metadata(folder: Path, edit: Callable[[Any], object]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    edit(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def set_info(metadata: Any, **fields: Any) -> None:
    for info in metadata.storage_data.values():
        for name, value in fields.items():
            setattr(info, name, value)


def set_chunk(metadata: Any, **fields: Any) -> None:
    (chunk,) = metadata.state_dict_metadata["a"].chunks
    for name, value in fields.items():
        setattr(chunk, name, torch.Size(value))


EDITS: list[tuple[str, Callable[[Any], object], str]] = [
    ("outside", lambda m: set_info(m, relative_path="../__0_0.distcp"), "leads out of the folder"),
    ("absolute", lambda m: set_info(m, relative_path="/etc/passwd"), "leads out of the folder"),
    ("missing", lambda m: set_info(m, relative_path="__1_0.distcp"), "cannot be read: No such file"),
    ("beyond", lambda m: set_info(m, offset=10**6), "a has a chunk at byte 1000000 of"),
    ("negative", lambda m: set_info(m, offset=-1), "a size is (-1, "),
    ("compressed", lambda m: set_info(m, transform_descriptors=["zstd"]), "save it without extensions"),
    ("nowhere", lambda m: m.storage_data.clear(), "the chunk of a at [0, 0] lies nowhere"),
    (
        "hole",
        lambda m: set_chunk(m, sizes=(3, 4)),
        "a is filled only in part: 12 of 20 elements; was a rank's part left",
    ),
    ("too much", lambda m: set_chunk(m, sizes=(6, 4)), "a chunk of a is [6, 4] at [0, 0] of [5, 4]"),
    (
        "twice",
        lambda m: m.state_dict_metadata["a"].chunks.append(m.state_dict_metadata["a"].chunks[0]),
        "written twice",
    ),
    ("no dict", lambda m: setattr(m, "storage_data", 7), "is no metadata of a checkpoint: AttributeError"),
    ("strange path", lambda m: m.planner_data.update(a=("model", (1,))), "the path of a is ('model', (1,))"),
]


@pytest.mark.parametrize(("edit", "message"), [pytest.param(e, m, id=n) for n, e, m in EDITS])
def test_metadata_that_lies(tmp_path: Path, edit: Callable[[Any], object], message: str) -> None:
    write_dcp(tmp_path, {"a": torch.arange(20.0).reshape(5, 4)})
    edit_metadata(tmp_path, edit)
    found = refusal_of(tmp_path)
    assert message in found
    assert "\n" not in found


def test_chunk_that_is_not_what_metadata_says(tmp_path: Path) -> None:
    write_dcp(tmp_path, {"a": torch.arange(20.0).reshape(5, 4)})
    edit_metadata(
        tmp_path, lambda metadata: setattr(metadata.state_dict_metadata["a"].properties, "dtype", torch.int32)
    )
    with (
        closing(DcpCheckpoint(str(tmp_path))) as checkpoint,
        pytest.raises(
            CheckpointError, match=r"holds \[5, 4\] float32 at byte 0, and \.metadata says \[5, 4\] int32, of a"
        ),
    ):
        read(checkpoint, "a")


def test_file_that_is_truncated(tmp_path: Path) -> None:
    write_dcp(tmp_path, {"a": torch.ones(200), "b": torch.ones(3)})
    os.truncate(tmp_path / "__0_0.distcp", 1000)
    assert "is it truncated?" in refusal_of(tmp_path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_dcp(tmp_path_factory.mktemp("sound"), {"a": torch.arange(6.0).reshape(2, 3)})
    (folder / ".sound").write_bytes((folder / ".metadata").read_bytes())
    return folder


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # of pickletools, about text that was damaged
@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_metadata_is_refused_or_right(sound: Path, data: st.DataObject) -> None:
    content = bytearray((sound / ".sound").read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    (sound / ".metadata").write_bytes(content)
    with contextlib.suppress(CheckpointError), closing(DcpCheckpoint(str(sound))) as checkpoint:
        for name in checkpoint.tensors:
            assert torch.equal(read(checkpoint, name), torch.arange(6.0).reshape(2, 3))


# ---------------------------------------------------------------- the rest


def test_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, infinilm_dcp_format as plugin\nplugin.open_checkpoint('.')\n"
        "print({'torch', 'transformers', 'numpy'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_command_of_the_readme_inspects_a_folder(two_ranks: Path) -> None:
    (line,) = [line for line in README.read_text().splitlines() if line.startswith("$ infinilm inspect")]
    words = line.removeprefix("$ infinilm ").replace("MODEL", str(two_ranks)).split()
    done = subprocess.run([sys.executable, "-m", "infinilm", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "dcp_format" in done.stdout
