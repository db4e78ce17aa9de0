"""The wheel: built, installed into an empty environment, every module imported, and a backend built against it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import tiny_checkpoint

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    env = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False, env=env
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT)
    (found,) = folder.glob("infinilm-*.whl")
    return found


def test_wheel_holds_both_packages_typed_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    roots = {name.partition("/")[0] for name in names}
    assert roots == {"infinilm", "infinilm_hookspecs", next(r for r in roots if r.endswith(".dist-info"))}
    assert {"infinilm/py.typed", "infinilm_hookspecs/py.typed"} <= set(names)


def test_wheel_has_the_native_part_and_what_others_build_against(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    headers = {f"infinilm/include/infinilm/{name}" for name in ("backend.h", "backend.hpp", "config.hpp", "dlpack.h")}
    package = {"infinilm/cmake/infinilm-config.cmake", "infinilm/cmake/infinilm-config-version.cmake"}
    assert headers | package <= set(names)
    assert "infinilm/_native" + sysconfig.get_config_var("EXT_SUFFIX") in names
    assert "infinilm/lib/libinfinilm_cpu.so" in names
    assert not [name for name in names if name.endswith((".cpp", ".cc", ".a", ".o")) or "__pycache__" in name]


def test_source_distribution_holds_what_the_wheel_is_built_from(tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, ROOT)
    (found,) = tmp_path.glob("infinilm-*.tar.gz")
    with tarfile.open(found) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    python = {"infinilm/py.typed", "infinilm_hookspecs/py.typed", "README.md", "LICENSE"}
    native = {"CMakeLists.txt", "cmake/infinilm-config.cmake", "cmake/infinilm-backend.map", "csrc/cpu/CMakeLists.txt"}
    sources = {"csrc/bindings/module.cpp", "csrc/include/infinilm/backend.h", "csrc/src/library.cpp"}
    assert python | native | sources <= names
    roots = {name.partition("/")[0] for name in names} - {""}
    assert roots <= {"infinilm", "infinilm_hookspecs", "csrc", "cmake"} | {
        *("CMakeLists.txt", "README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml", "PKG-INFO", ".gitignore")
    }


def test_wheel_works_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel)
    code = """
import importlib, pkgutil, infinilm, infinilm_hookspecs
names = [m.name for p in (infinilm, infinilm_hookspecs) for m in pkgutil.walk_packages(p.__path__, p.__name__ + ".")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(len(names), infinilm.__file__)
"""
    count, _, location = run(python, "-c", code, cwd=tmp_path).strip().partition(" ")
    assert int(count) > 40
    assert location.startswith(str(tmp_path))
    assert "safetensors" in run(tmp_path / "env" / "bin" / "infinilm", "plugins", "list", cwd=tmp_path)


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel and nothing else into an environment, which takes torch and build tools from this one."""
    folder = tmp_path_factory.mktemp("native") / "env"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    ours = "\n".join(path for path in sys.path if path.endswith("-packages"))
    (Path(site) / "others.pth").write_text(ours + "\n")  # what is installed editable over there is not found this way
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    return folder


def test_backend_of_somebody_else_builds_against_the_wheel_and_runs(environment: Path, tmp_path: Path) -> None:
    source = tmp_path / "cpp_backend"
    shutil.copytree(ROOT / "example_plugins" / "cpp_backend", source)
    python = environment / "bin" / "python"
    options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation")
    run(python, "-m", "pip", "wheel", *options, "--wheel-dir", tmp_path, source, cwd=tmp_path)
    (built,) = tmp_path.glob("infinilm_cpp_backend-*.whl")
    assert "-py3-none-linux_" in built.name
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", built, cwd=tmp_path)
    listed = run(environment / "bin" / "infinilm", "plugins", "list", cwd=tmp_path)
    assert "plain_cpp" in listed

    tiny_checkpoint.write_model(tmp_path / "model")
    code = """
import sys
from infinilm import LLM, SamplingParams
params = SamplingParams(max_tokens=8, temperature=0.0, logprobs=3, prompt_logprobs=3, ignore_eos=True)
prompts = [{"prompt_token_ids": list(range(3, 40))}, {"prompt_token_ids": [7, 250, 9]}]
found = {}
for backend in ("auto", "torch"):
    with LLM(sys.argv[1], backend=backend, dtype="float32", kv_cache_memory=2**24) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        found[llm.backend.name] = [
            {token: entry.logprob for token, entry in row.items()}
            for output in outputs
            for row in [*(output.prompt_logprobs or []), *output.outputs[0].logprobs]
            if row
        ]
ours, theirs = found["plain_cpp"], found["torch"]
assert [set(row) for row in ours] == [set(row) for row in theirs]
assert len(ours) == 36 + 2 + 2 * 8, len(ours)
print(max(abs(mine[token] - its[token]) for mine, its in zip(ours, theirs) for token in its))
"""
    assert float(run(python, "-c", code, tmp_path / "model", cwd=tmp_path)) < 1e-4
