"""The cpu backend's table: what it declines and in which words, its parameters, loading, errors, cancelling."""

from __future__ import annotations

import ctypes
import json
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from backend_driver import NUM_BLOCKS, Context, blocks_for, decoder_config, forward, load, prompt, whole
from cpu_library import CpuBackend, Host, NativeError, call, table
from test_cpu_model import CONFIGS

from infinilm_hookspecs import AttentionConfig, DecoderConfig, Named, parameters

UNSUPPORTED, INVALID, OUT_OF_MEMORY, CANCELLED = 3, 2, 5, 6


def loaded(config: DecoderConfig | None = None, **options: Any) -> CpuBackend:
    backend = CpuBackend(config or decoder_config(), **options)
    load(backend)
    backend.allocate_cache(NUM_BLOCKS, num_slots=8)
    return backend


# ---------------------------------------------------------------- parameters


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_are_the_canonical_ones(name, dtype):
    wanted = parameters(CONFIGS[name], dtype)
    found = CpuBackend(CONFIGS[name], dtype=dtype).parameters()
    assert list(found) == list(wanted)
    assert found == dict(wanted)


def test_a_missing_parameter_is_named():
    backend = CpuBackend(decoder_config())
    for name, spec in backend.parameters().items():
        if spec.tied_to is None and name != "model.layers.1.mlp.down_proj.weight":
            backend.destination(name)
            backend.loaded(name)
    with pytest.raises(NativeError, match=r"1 parameters were not loaded: model\.layers\.1\.mlp\.down_proj\.weight"):
        backend.finish_loading()


def test_a_buffer_that_was_given_up_is_not_loaded():
    backend = CpuBackend(decoder_config())
    load(backend)
    backend.destination("model.norm.weight").fill_(5)
    backend.give_up("model.norm.weight")
    backend.finish_loading()  # the value there was stays
    with pytest.raises(NativeError, match=r"model\.norm\.weight is not open"):
        call("close_parameter", backend._model, backend._indices["model.norm.weight"])


def test_buffers_are_freed_once_they_are_packed():
    backend = CpuBackend(decoder_config())
    name = "model.embed_tokens.weight"
    backend.destination(name)
    assert backend.memory()["buffers"] == 31 * 16 * 4
    with pytest.raises(NativeError, match="is open already"):
        backend.destination(name)
    backend.loaded(name)
    assert backend.memory()["buffers"] == 0


def test_a_buffer_outlives_the_backend():
    backend = CpuBackend(decoder_config())
    buffer = backend.destination("model.embed_tokens.weight")
    lent = backend._open.pop("model.embed_tokens.weight")
    backend.close()
    buffer.fill_(1)
    lent.contents.deleter(ctypes.cast(lent, ctypes.c_void_p))


def test_an_update_takes_effect_on_the_cache_there_is():
    backend, fresh = loaded(), CpuBackend(decoder_config())
    load(backend, seed=1)
    load(fresh, seed=1)
    fresh.allocate_cache(NUM_BLOCKS, num_slots=8)
    torch.testing.assert_close(whole(backend, prompt(20)), whole(fresh, prompt(20)))


def test_a_tied_parameter_has_no_buffer():
    backend = CpuBackend(decoder_config(tied=True))
    with pytest.raises(NativeError, match=r"tied to model\.embed_tokens\.weight"):
        backend.destination("lm_head.weight")


# ---------------------------------------------------------------- declining


def plain(**changes: Any) -> dict[str, Any]:
    return {**json.loads(decoder_config().to_json()), **changes}


def refusal(config: Any, **options: Any) -> NativeError:
    text = json.dumps(config).encode() if isinstance(config, dict) else config
    with pytest.raises(NativeError) as caught:
        CpuBackend(text, **options)
    assert caught.value.code == UNSUPPORTED
    return caught.value


def test_an_unknown_key_is_declined_wherever_it_is():
    def spoil(node: Any) -> list[Any]:
        """Return every config that has one more key, in some object of it."""
        if isinstance(node, list):
            return [[*node[:i], spoiled, *node[i + 1 :]] for i, item in enumerate(node) for spoiled in spoil(item)]
        if not isinstance(node, dict):
            return []
        deeper = [{**node, key: spoiled} for key, item in node.items() for spoiled in spoil(item)]
        return [{**node, "surprise": 1}, *deeper]

    spoiled = [each for name in CONFIGS for each in spoil(json.loads(CONFIGS[name].to_json()))]
    assert len(spoiled) > 100
    for config in spoiled:
        assert "surprise" in str(refusal(config))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mixer": {"kind": "named", "name": "mamba"}}, "layers[0].mixer: it is 'named' 'mamba'"),
        ({"mlp": {"kind": "named", "name": "kan"}}, "layers[0].mlp: it is 'named' 'kan'"),
        ({"mlp": {"kind": "mlp", "intermediate_size": 20, "activation": "mish"}}, "'mish'"),
        ({"norms": {"before_mlp": {"kind": "group"}}}, "the norm is 'group'"),
    ],
)
def test_a_part_that_is_not_known_is_declined_by_its_name(changes, words):
    config = plain()
    config["layers"][0].update(changes)
    assert words in str(refusal(config))


@pytest.mark.parametrize(
    ("mixer", "words"),
    [
        ({"num_heads": 5}, "5 query heads cannot share 2 key-value heads evenly"),
        ({"head_dim": 7}, "a head of 7 has no two halves to rotate"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"softcap": -1.0}, "scores cannot be capped at -1"),
        ({"rope": {"scaling": {"kind": "longrope", "factor": 2.0}}}, "longrope"),
        ({"head_dim": 2, "rope": decoder_config().layers[0].mixer.rope}, "no base for a head of 2"),
    ],
)
def test_attention_that_cannot_be_is_declined(mixer, words):
    config = plain()
    rope = mixer.get("rope", {})
    if not isinstance(rope, dict):
        mixer = {**mixer, "rope": config["layers"][0]["mixer"]["rope"]}
    config["layers"][1]["mixer"] |= mixer
    assert words in str(refusal(config))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float64"}, "computes in float32 or bfloat16, not in 'float64'"),
        ({"dtype": "float64", "quantization": "int8"}, "computes in float32 or bfloat16, not in 'float64'"),
        ({"dtype": "float16"}, "only where its weights are integers; ask for bfloat16, or for a quantization"),
        ({"quantization": "fp8"}, "quantizes to int8, int4"),
    ],
)
def test_a_request_that_cannot_be_met_is_declined(options, words):
    assert words in str(refusal(plain(), **options))


def test_a_model_longer_than_its_learned_positions_is_declined():
    config = json.loads(CONFIGS["gpt2"].to_json())
    assert "512 positions in this model, and max_model_len is 513" in str(refusal(config, max_model_len=513))


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"a": 1, "a": 2}', b"{} x", b'{"vocab_size": 1e999}', b"\xff"])
def test_what_is_no_config_is_refused(text):
    with pytest.raises(NativeError):
        CpuBackend(text)


def test_named_parts_of_the_contract_are_declined():
    layer = replace(decoder_config().layers[0], mixer=Named("mamba"))
    config = replace(decoder_config(), layers=(layer,))
    assert "mamba" in str(refusal(config.to_json().encode()))


def test_options_that_are_not_known_are_refused():
    host = Host(struct_size=ctypes.sizeof(Host), world_size=1)
    for options in (b'{"threads": 2}', b'{"num_threads": 0}', b"2"):
        with pytest.raises(NativeError):
            call("create", ctypes.byref(host), options, ctypes.byref(ctypes.c_void_p()))


def test_a_world_of_two_is_declined():
    host = Host(struct_size=ctypes.sizeof(Host), world_size=2)
    with pytest.raises(NativeError, match="world_size is 2"):
        call("create", ctypes.byref(host), b"{}", ctypes.byref(ctypes.c_void_p()))


def test_a_level_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(NativeError, match=r"INFINILM_CPU_ISA is 'mmx', and this processor has scalar"):
        CpuBackend(decoder_config(), isa_name="mmx")


# ---------------------------------------------------------------- steps that cannot be run


@pytest.mark.parametrize(
    ("field", "index", "value"),
    [
        ("token_ids", 3, 31),
        ("token_ids", 0, -1),
        ("slot_mapping", 2, NUM_BLOCKS * 16),
        ("slot_mapping", 2, -1),
        ("block_tables", (0, 1), NUM_BLOCKS),
        ("block_tables", (0, 0), -1),
        ("positions", 4, 9),
        ("context_lengths", 0, 1000),
        ("logits_indices", 0, 20),
        ("query_starts", 1, 19),
    ],
)
def test_a_batch_that_points_elsewhere_is_refused(field, index, value):
    backend = loaded()
    run = backend.forward

    def spoiled(batch: Any) -> torch.Tensor:
        array = np.array(getattr(batch, field))
        array[index] = value
        return run(replace(batch, **{field: array}))

    backend.forward = spoiled  # type: ignore[method-assign]
    with pytest.raises(NativeError, match="this batch cannot be run") as caught:
        forward(backend, [(Context(prompt(20), blocks_for(20)), 20)])
    assert caught.value.code == INVALID


def test_a_cache_that_cannot_fit_is_refused_before_memory_is_touched():
    backend = CpuBackend(decoder_config())
    with pytest.raises(NativeError, match=r"needs \d+ bytes, and \d+ are available") as caught:
        backend.allocate_cache(100_000_000, num_slots=1)
    assert caught.value.code == OUT_OF_MEMORY
    assert backend.memory()["caches"] == 0


def test_the_cache_costs_what_the_spec_says():
    backend = loaded()
    assert backend.memory()["caches"] == NUM_BLOCKS * backend.cache_spec().bytes_per_block


def test_a_step_can_be_cancelled_and_the_next_one_runs():
    layer = decoder_config().layers[0]
    wide = replace(layer, mixer=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6, rope=None))
    backend = loaded(replace(decoder_config(), layers=(wide,) * 200))
    tokens = prompt(1000)
    stop = threading.Event()

    def keep_cancelling() -> None:
        while not stop.is_set():
            backend.cancel()

    canceller = threading.Thread(target=keep_cancelling)
    canceller.start()
    try:
        with pytest.raises(NativeError) as caught:
            forward(backend, [(Context(tokens, blocks_for(1000)), 1000)])
    finally:
        stop.set()
        canceller.join()
    assert caught.value.code == CANCELLED
    assert not whole(backend, prompt(20)).isnan().any()


def test_the_host_can_abort():
    host = Host(struct_size=ctypes.sizeof(Host), world_size=1)
    host.is_aborted = type(host.is_aborted)(lambda context: 1)
    made = ctypes.c_void_p()
    call("create", ctypes.byref(host), b'{"num_threads": 2}', ctypes.byref(made))
    backend = loaded()
    mine, backend._backend = backend._backend, made
    try:
        model = ctypes.c_void_p()
        call("model_create", made, ctypes.byref(backend._request), ctypes.byref(model))
        kept, backend._model = backend._model, model
        cache, backend._cache = backend._cache, ctypes.c_void_p()
        load(backend)
        backend.allocate_cache(NUM_BLOCKS, num_slots=8)
        with pytest.raises(NativeError) as caught:
            whole(backend, prompt(20))
        assert caught.value.code == CANCELLED
    finally:
        backend.close()
        backend._backend, backend._model, backend._cache = mine, kept, cache


def test_another_major_version_gets_no_table():
    library = ctypes.CDLL(None)  # the entry is not visible to the process
    assert not hasattr(library, "infinilm_backend_entry")
    assert table().name == b"cpu"
    assert table().abi_major == 1
