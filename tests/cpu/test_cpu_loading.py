"""Loading into the cpu backend: when memory is taken and how much, in which order parameters come, how it fails."""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from backend_driver import NUM_BLOCKS, decoder_config, load, prompt, whole
from cpu_library import CpuBackend, NativeError, build

from infinilm_hookspecs import MoeConfig

INVALID, OUT_OF_MEMORY = 2, 5
QUANTIZATIONS = (None, "int8", "int4", "int4-g128")


def values(backend: CpuBackend, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    specs = backend.parameters().items()
    return {name: torch.randn(spec.shape, generator=generator) * 0.5 for name, spec in specs if spec.tied_to is None}


def fill(backend: CpuBackend, given: dict[str, torch.Tensor], order: list[str]) -> None:
    for name in order:
        backend.destination(name).copy_(given[name])
        backend.loaded(name)
    backend.finish_loading()


def logits(backend: CpuBackend) -> torch.Tensor:
    backend.allocate_cache(NUM_BLOCKS, num_slots=8)
    return whole(backend, prompt(40))


def experts() -> CpuBackend:
    config = decoder_config(tied=True)
    layers = tuple(
        replace(layer, mlp=MoeConfig(num_experts=4, experts_per_token=2, intermediate_size=20))
        for layer in config.layers
    )
    return CpuBackend(replace(config, layers=layers))


def test_the_check_of_plugins_has_nothing_to_say():
    library = build() / "libinfinilm_cpu.so"
    command = [sys.executable, "-m", "infinilm", "plugins", "check", str(library), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    findings = json.loads(done.stdout)
    assert [finding for finding in findings if finding["outcome"] != "ok"] == []
    assert done.returncode == 0
    assert [finding["step"] for finding in findings][-1] == "conformance"


# ---------------------------------------------------------------- memory


def test_a_model_that_was_not_loaded_holds_nothing():
    before = _address_space()
    config = replace(decoder_config(), vocab_size=1_000_000, hidden_size=1024)
    backend = CpuBackend(config)
    backend.parameters()
    assert backend.memory()["parameters"] == backend.memory()["buffers"] == 0
    assert _address_space() - before < 500 * 2**20  # of eight gigabytes; threads have stacks
    backend.close()


def test_the_parts_of_a_matrix_take_it_once():
    backend = CpuBackend(decoder_config())
    taken = []
    for part in ("k_proj", "q_proj", "v_proj", "o_proj"):
        name = f"model.layers.1.self_attn.{part}.weight"
        backend.destination(name).fill_(1)
        backend.loaded(name)
        taken.append(backend.memory()["parameters"])
    assert taken[0] == taken[1] == taken[2] == (4 + 2 + 2) * 16 * 16 * 4  # heads are padded to a block
    assert taken[3] == taken[0] + 16 * 24 * 4


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_new_values_go_where_the_old_ones_were(quantization):
    backend, fresh = (CpuBackend(decoder_config(tied=True), quantization=quantization) for _ in range(2))
    load(backend, seed=1)
    held = backend.memory()["parameters"]
    given = values(backend)
    for _ in range(2):
        fill(backend, given, list(given))
    fill(fresh, given, list(given))
    assert backend.memory()["parameters"] == held == fresh.memory()["parameters"]
    assert torch.equal(logits(backend), logits(fresh))


# ---------------------------------------------------------------- order


@pytest.mark.parametrize("make", [lambda: CpuBackend(decoder_config()), experts], ids=["untied", "tied experts"])
def test_parameters_may_come_in_any_order(make):
    found = []
    for seed in range(4):
        backend = make()
        given = values(backend)
        order = list(given)
        random.Random(seed).shuffle(order)
        fill(backend, given, order if seed else list(given))
        found.append(logits(backend))
    assert all(torch.equal(other, found[0]) for other in found[1:])


def test_all_may_be_open_at_once():
    backend, other = (CpuBackend(decoder_config()) for _ in range(2))
    given = values(backend)
    for name, value in given.items():
        backend.destination(name).copy_(value)
    for name in reversed(given):
        backend.loaded(name)
    backend.finish_loading()
    fill(other, given, list(given))
    assert torch.equal(logits(backend), logits(other))


def test_a_model_that_is_not_loaded_does_not_run():
    backend = CpuBackend(decoder_config())
    backend.allocate_cache(NUM_BLOCKS, num_slots=8)
    with pytest.raises(NativeError, match="cannot run before loading_done") as caught:
        whole(backend, prompt(20))
    assert caught.value.code == INVALID


# ---------------------------------------------------------------- failing


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


@contextmanager
def room(num_bytes: int) -> Iterator[None]:
    """Let this process take so many bytes more of address space."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("tied", [True, False])
def test_a_weight_there_is_no_room_for_can_come_again(tied):
    config = replace(decoder_config(tied=tied), vocab_size=50_000, hidden_size=512)
    backend = CpuBackend(config)
    given = values(backend)
    name = "model.embed_tokens.weight"
    with room(2**20), pytest.raises(NativeError, match=r"no room for \d+ bytes; \d+ are available") as caught:
        backend.destination(name)
    assert caught.value.code == OUT_OF_MEMORY
    backend.destination(name).copy_(given[name])
    with room(2**20), pytest.raises(NativeError, match=r"no room for \d+ bytes; \d+ are available") as caught:
        backend.loaded(name)
    assert caught.value.code == OUT_OF_MEMORY
    backend.give_up(name)
    assert backend.memory()["parameters"] == 0
    fill(backend, given, list(given))
    assert backend.memory()["buffers"] == 0  # those that waited to be used again are gone
    assert logits(backend).isfinite().all()
