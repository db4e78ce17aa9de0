"""Hub ids: from a filled cache, from a stand-in for the Hub, and every way to fail as one line that says what to do."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hub_stand_in
import pytest
import tiny_checkpoint
from hub_stand_in import Hub, Repository, commit_of

from infinilm import LLM, SamplingParams
from infinilm.hub import resolve
from infinilm_hookspecs import CheckpointError

OLD, NEW, PICKLED, GATED = (commit_of(name) for name in ("old", "new", "pickled", "gated"))
UNWANTED = ("modeling.py", "README.md", "pytorch_model.bin", "consolidated.safetensors", "onnx/config.json")
RESOLVE = "import sys; from infinilm.hub import resolve; print(resolve(*sys.argv[1:]))"
COMMAND = ["--prompt", "cab", "--max-tokens", "4", "--temperature", "0", "--json"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the repositories hold, by commit."""
    root = tmp_path_factory.mktemp("repositories")
    for name in ("old", "new"):
        tiny_checkpoint.write_tokenizer(tiny_checkpoint.write_model(root / name), note=name)
    for name in UNWANTED:
        (root / "new" / name).parent.mkdir(exist_ok=True)
        (root / "new" / name).write_text("not this")
    (root / "new" / "additional_chat_templates").mkdir()
    (root / "new" / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    pickled = root / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_bytes(b"a pickle")
    return {OLD: root / "old", NEW: root / "new", PICKLED: pickled}


@pytest.fixture
def hub(folders: dict[str, Path]) -> Iterator[Hub]:
    """A Hub with a model of two commits, one in pickles, and a gated one."""
    repositories = {
        "acme/tiny": Repository({OLD: folders[OLD], NEW: folders[NEW]}, {"main": NEW, "v1": OLD, "pr/1": OLD}),
        "acme/pickled": Repository({PICKLED: folders[PICKLED]}, {"main": PICKLED}),
        "acme/gated": Repository({OLD: folders[OLD]}, {"main": OLD}, is_gated=True),
    }
    with hub_stand_in.serve(Hub(repositories)) as served:
        yield served


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment with an empty cache, no token, and no Hub."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith("HF_") and "proxy" not in name.lower()
    }
    return {**kept, "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": "http://127.0.0.1:9"}


def run(environment: dict[str, str], *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run python with `words`: huggingface_hub reads its environment when it is imported."""
    environment = {**environment, **variables}
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)


def resolved(environment: dict[str, str], *arguments: str, **variables: str) -> Path:
    done = run(environment, "-c", RESOLVE, *arguments, **variables)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.splitlines()[-1])


def failure(environment: dict[str, str], *arguments: str, **variables: str) -> str:
    """Return the one line that `infinilm inspect` says."""
    done = run(environment, "-m", "infinilm", "inspect", "--json", *arguments, **variables)
    assert done.returncode == 2, done.stdout + done.stderr
    (error,) = json.loads(done.stdout)["errors"]
    assert "\n" not in error
    assert "Traceback" not in done.stderr
    return str(error)


def fill_cache(environment: dict[str, str], folder: Path, commit: str = NEW, branch: str = "main") -> Path:
    """Write a model into the cache by hand, as huggingface_hub lays it out, and return the snapshot."""
    storage = Path(environment["HF_HOME"]) / "hub" / "models--acme--tiny"
    for name in ("refs", "blobs", f"snapshots/{commit}"):
        (storage / name).mkdir(parents=True)
    (storage / "refs" / branch).write_text(commit)
    for file in (path for path in folder.iterdir() if path.is_file()):
        blob = storage / "blobs" / commit_of(file.name)
        shutil.copy(file, blob)
        (storage / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{blob.name}")
    return storage / "snapshots" / commit


# ---------------------------------------------------------------- paths and URLs


def test_path_that_exists_is_itself_and_never_imports_the_package(tmp_path: Path) -> None:
    tiny_checkpoint.write_tokenizer(tiny_checkpoint.write_model(tmp_path / "acme" / "tiny"))
    code = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "from infinilm.hub import resolve\n"
        "assert resolve('acme/tiny') == 'acme/tiny'\n"
        "assert resolve('s3://bucket/model') == 's3://bucket/model'\n"
        "from infinilm.cli import main\n"
        "assert main(['inspect', 'acme/tiny', '--tokenizer', 'acme/tiny']) == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("model", ["/no/such/model", "./model", "../model", "a/b/c", "", "model/", "-x", "a b"])
def test_what_can_only_be_a_path_does_not_exist(model: str) -> None:
    with pytest.raises(CheckpointError, match="does not exist, and a Hub id would read 'org/name'"):
        resolve(model)


@pytest.mark.parametrize("model", [".", "s3://bucket/model"])
def test_revision_of_what_is_not_on_the_hub_is_an_error(model: str) -> None:
    with pytest.raises(CheckpointError, match=f"revision 'v1' is for a model of the Hub, and '{model}' is none"):
        resolve(model, "v1")


# ---------------------------------------------------------------- a filled cache


def test_model_comes_from_a_filled_cache(environment: dict[str, str], folders: dict[str, Path]) -> None:
    snapshot = fill_cache(environment, folders[OLD])
    assert resolved(environment, "acme/tiny", HF_HUB_OFFLINE="1") == snapshot
    assert resolved(environment, "acme/tiny", NEW, HF_HUB_OFFLINE="1") == snapshot
    cache = snapshot.parents[2]
    assert (
        resolved(environment, "acme/tiny", HF_HUB_OFFLINE="1", HF_HOME="/nowhere", HF_HUB_CACHE=str(cache)) == snapshot
    )
    done = run(environment, "-m", "infinilm", "generate", "acme/tiny", *COMMAND, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    with LLM(folders[OLD]) as llm:
        (expected,) = llm.generate("cab", SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
    assert json.loads(done.stdout)[0]["token_ids"] == list(expected.outputs[0].token_ids)


def test_what_is_not_in_the_cache_cannot_be_had_offline(environment: dict[str, str], folders: dict[str, Path]) -> None:
    error = failure(environment, "acme/tiny", HF_HUB_OFFLINE="1")
    cache = Path(environment["HF_HOME"]) / "hub"
    assert error == (
        f"'acme/tiny' (revision 'main') is no folder here and not in the cache {cache}, and HF_HUB_OFFLINE forbids a "
        "download; unset it, or give a folder"
    )
    fill_cache(environment, folders[OLD])
    assert "'acme/tiny' (revision 'v2') is no folder" in failure(
        environment, "acme/tiny", "--revision", "v2", HF_HUB_OFFLINE="1"
    )


# ---------------------------------------------------------------- the stand-in


def test_model_is_downloaded_once_and_then_found(
    environment: dict[str, str], hub: Hub, folders: dict[str, Path]
) -> None:
    environment["HF_ENDPOINT"] = hub.endpoint
    done = run(environment, "-m", "infinilm", "generate", "acme/tiny", "--revision", "v1", *COMMAND)
    assert done.returncode == 0, done.stderr
    with LLM(folders[OLD]) as llm:
        (expected,) = llm.generate("cab", SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
    assert json.loads(done.stdout)[0]["token_ids"] == list(expected.outputs[0].token_ids)
    assert done.stderr == ""
    assert hub.fetched() == {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    hub.requests.clear()
    snapshot = resolved(environment, "acme/tiny", "v1")
    assert snapshot.name == OLD
    assert not hub.fetched()
    assert resolved(environment, "acme/tiny", "v1", HF_HUB_OFFLINE="1") == snapshot


def test_revision_is_a_branch_or_a_commit(environment: dict[str, str], hub: Hub) -> None:
    wanted = {"main": NEW, "v1": OLD, "pr/1": OLD, OLD: OLD, NEW: NEW}
    code = (
        "import sys; from infinilm.hub import resolve; [print(resolve('acme/tiny', r)) for r in (None, *sys.argv[1:])]"
    )
    done = run(environment, "-c", code, *wanted, HF_ENDPOINT=hub.endpoint)
    assert done.returncode == 0, done.stderr
    folders = [Path(line) for line in done.stdout.splitlines()]
    assert [folder.name for folder in folders] == [NEW, *wanted.values()]
    for folder in folders:
        note = json.loads((folder / "tokenizer_config.json").read_text())["note"]
        assert note == ("new" if folder.name == NEW else "old")


def test_code_and_second_copies_of_the_weights_are_left_where_they_are(
    environment: dict[str, str], hub: Hub, folders: dict[str, Path]
) -> None:
    folder = resolved(environment, "acme/tiny", HF_ENDPOINT=hub.endpoint)
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    wanted = {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    assert found == {*wanted, "additional_chat_templates/tool_use.jinja"}
    assert {str(path.relative_to(folders[NEW])) for path in folders[NEW].rglob("*") if path.is_file()} > found


def test_pickles_are_fetched_where_there_are_no_safetensors(environment: dict[str, str], hub: Hub) -> None:
    folder = resolved(environment, "acme/pickled", HF_ENDPOINT=hub.endpoint)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "pytorch_model.bin"]


def test_model_that_nobody_opens_is_named_by_its_id(environment: dict[str, str], hub: Hub) -> None:
    hub.repositories["acme/pickled"].commits[PICKLED] = hub.repositories["acme/tiny"].commits[OLD] / "nowhere"
    error = failure(environment, "acme/pickled", HF_ENDPOINT=hub.endpoint)
    assert error.startswith("no plugin opens 'acme/pickled', in '")


def test_tokenizer_may_be_a_hub_id_and_comes_without_weights(
    environment: dict[str, str], hub: Hub, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = tiny_checkpoint.write_model(tmp_path / "model")
    words = ["-m", "infinilm", "inspect", str(model), "--json", "--tokenizer", "acme/tiny"]
    done = run(environment, *words, HF_ENDPOINT=hub.endpoint)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["processor"]["plugin"] == "huggingface"
    assert "model.safetensors" not in hub.fetched()


def test_half_a_model_is_none_offline(environment: dict[str, str], hub: Hub) -> None:
    code = "from infinilm.hub import resolve; resolve('acme/tiny', with_weights=False)"
    assert run(environment, "-c", code, HF_ENDPOINT=hub.endpoint).returncode == 0
    assert "is no folder here and not whole in the cache" in failure(environment, "acme/tiny", HF_HUB_OFFLINE="1")


# ---------------------------------------------------------------- what goes wrong


def test_unknown_model(environment: dict[str, str], hub: Hub) -> None:
    error = failure(environment, "acme/tinny", HF_ENDPOINT=hub.endpoint)
    assert error == (
        f"'acme/tinny' (revision 'main') is no folder here and no model of {hub.endpoint}, or a private one: check the "
        "name, or come with a token that may: run 'hf auth login', or set HF_TOKEN"
    )
    assert "no model of" in failure(environment, "acme/tinny", HF_ENDPOINT=hub.endpoint, HF_TOKEN="hf_any")


@pytest.mark.parametrize("revision", ["v9", commit_of("nowhere")])
def test_unknown_revision(environment: dict[str, str], hub: Hub, revision: str) -> None:
    error = failure(environment, "acme/tiny", "--revision", revision, HF_ENDPOINT=hub.endpoint)
    assert error == (
        f"'acme/tiny' has no revision '{revision}': a branch, a tag or a commit of {hub.endpoint}/acme/tiny is wanted"
    )


@pytest.mark.parametrize("variables", [{}, {"HF_TOKEN": "hf_other"}])
def test_gated_model(environment: dict[str, str], hub: Hub, variables: dict[str, str]) -> None:
    error = failure(environment, "acme/gated", HF_ENDPOINT=hub.endpoint, **variables)
    assert error == (
        f"'acme/gated' (revision 'main') is gated: ask for access at {hub.endpoint}/acme/gated, then come with a token "
        "that may: run 'hf auth login', or set HF_TOKEN"
    )


def test_gated_model_with_a_token_that_the_other_host_is_not_shown(environment: dict[str, str], hub: Hub) -> None:
    folder = resolved(environment, "acme/gated", HF_ENDPOINT=hub.endpoint, HF_TOKEN=hub_stand_in.TOKEN)
    assert (folder / "model.safetensors").is_file()
    given = {authorization for _, path, authorization in hub.requests if path.startswith("/cdn/")}
    assert given == {None}


def test_hub_that_cannot_be_reached(environment: dict[str, str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        error = failure(environment, "acme/tiny", HF_ENDPOINT=endpoint)
    assert error.startswith(
        f"'acme/tiny' (revision 'main') is no folder here and cannot be downloaded from {endpoint}: "
    )
    assert error.endswith("; check the network and HF_ENDPOINT, or give a folder")
    assert "refused" in error


def test_hub_that_is_broken(environment: dict[str, str], hub: Hub) -> None:
    hub.status = 501
    error = failure(environment, "acme/tiny", HF_ENDPOINT=hub.endpoint)
    assert "cannot be downloaded from" in error
    assert "501" in error


def test_name_that_the_hub_does_not_allow(environment: dict[str, str]) -> None:
    assert "'acme--tiny' does not exist, and is no Hub id: " in failure(environment, "acme--tiny")


def test_cause_is_chained() -> None:
    with pytest.raises(CheckpointError) as caught:
        resolve("acme--tiny")
    assert caught.value.__cause__ is not None
