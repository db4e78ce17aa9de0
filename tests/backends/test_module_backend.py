"""`ModuleBackend`: a torch module of one's own, held against plain attention over whole sequences."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from backend_driver import NUM_BLOCKS, Context, blocks_for, decoder_config, forward, load, prompt, whole
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from infinilm import LLM, SamplingParams
from infinilm.backends.torch import Attention, ModuleBackend
from infinilm.plugins import PluginManager
from infinilm_hookspecs import (
    DROP,
    Backend,
    BackendRequest,
    PlanError,
    PluginError,
    Shard,
    UnavailableError,
    Weight,
    hookimpl,
)

VOCAB, WIDTH = 31, 16
CONFIG = {"model_type": "mine", "vocab_size": VOCAB}
KINDS: list[dict[str, Any]] = [  # of attention, a layer each
    {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6},
    {"num_heads": 3, "num_kv_heads": 1, "head_dim": 4, "sliding_window": 5, "scale": 0.7},
    {"num_heads": 2, "head_dim": 10, "softcap": 2.0, "sliding_window": 9},
]


class Mixing(nn.Module):
    def __init__(self, kind: Mapping[str, Any]) -> None:
        super().__init__()
        self.heads = kind["num_heads"], kind.get("num_kv_heads", kind["num_heads"]), kind["head_dim"]
        heads, kv_heads, head_dim = self.heads
        self.q = nn.Linear(WIDTH, heads * head_dim, bias=False)
        self.kv = nn.Linear(WIDTH, 2 * kv_heads * head_dim)
        self.o = nn.Linear(heads * head_dim, WIDTH, bias=False)
        self.attention = Attention(**kind)

    def forward(self, x: Tensor) -> Tensor:
        _, kv_heads, head_dim = self.heads
        key, value = self.kv(x).view(len(x), 2 * kv_heads, head_dim).chunk(2, dim=1)
        return self.o(self.attention(self.q(x).view(len(x), -1, head_dim), key, value).flatten(1))


class Positions(nn.Module):
    """Adds waves to what stands at a position."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("speeds", torch.empty(WIDTH), persistent=False)

    def init_buffers(self) -> None:
        self.speeds = 1 / torch.arange(1, WIDTH + 1)

    def forward(self, positions: Tensor) -> Tensor:
        return (positions[:, None] * self.speeds).sin()


class Mine(nn.Module):
    def __init__(self, config: Mapping[str, Any] = CONFIG) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.positions = Positions()
        self.layers = nn.ModuleList(Mixing(kind) for kind in KINDS)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        x = self.embedding(token_ids)
        x = x + self.positions(positions).to(x.dtype)
        for layer in self.layers:
            x = x + layer(x)
        return self.norm(x)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)


def ready(module: Any = Mine, *, seed: int = 0, **options: Any) -> ModuleBackend:
    backend = ModuleBackend(module, CONFIG, **options)
    load(backend, seed)
    backend.allocate_cache(NUM_BLOCKS, num_slots=8)
    return backend


def reference(weights: Mapping[str, Tensor], tokens: list[int]) -> Tensor:
    """Return logits of all tokens, in float64, from scores of all pairs of positions."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    at = torch.arange(len(tokens), dtype=torch.float64)
    x = w["embedding.weight"][tokens] + (at[:, None] / torch.arange(1, WIDTH + 1)).sin()
    for i, kind in enumerate(KINDS):
        heads, dim = kind["num_heads"], kind["head_dim"]
        kv_heads = kind.get("num_kv_heads", heads)
        q = (x @ w[f"layers.{i}.q.weight"].T).view(len(x), heads, dim)
        k, v = (x @ w[f"layers.{i}.kv.weight"].T + w[f"layers.{i}.kv.bias"]).view(len(x), 2, kv_heads, dim).unbind(1)
        parts = []
        for head in range(heads):
            kv_head = head * kv_heads // heads
            scores = q[:, head] @ k[:, kv_head].T * kind.get("scale", dim**-0.5)
            cap = kind.get("softcap")
            scores = scores if cap is None else cap * (scores / cap).tanh()
            distance = at[:, None] - at
            seen = (distance >= 0) & (distance < kind.get("sliding_window", len(x)))
            parts.append(scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v[:, kv_head])
        x = x + torch.cat(parts, 1) @ w[f"layers.{i}.o.weight"].T
    return F.layer_norm(x, (WIDTH,), w["norm.weight"], w["norm.bias"]) @ w["head.weight"].T


# ---------------------------------------------------------------- logits


@pytest.fixture(scope="module")
def backend() -> ModuleBackend:
    return ready()


def test_is_a_backend(backend):
    assert isinstance(backend, Backend)
    assert backend.config is CONFIG


def test_logits_are_those_of_plain_attention():
    backend = ModuleBackend(Mine, CONFIG)
    weights = load(backend)
    backend.allocate_cache(NUM_BLOCKS, num_slots=1)
    tokens = prompt(70)
    torch.testing.assert_close(whole(backend, tokens).double(), reference(weights, tokens), atol=1e-4, rtol=0)


@given(cuts=st.sets(st.integers(1, 69)), order=st.permutations(range(5)))
@settings(max_examples=25, deadline=None)
def test_any_chunks_in_any_blocks_give_the_same_logits(backend, cuts, order):
    tokens = prompt(70)
    sequence = Context(tokens, list(order))
    pieces = [forward(backend, [(sequence, stop - start)]) for start, stop in pairwise([0, *sorted(cuts), 70])]
    torch.testing.assert_close(torch.cat(pieces), whole(backend, tokens), atol=1e-4, rtol=0)


def test_ragged_batch_of_prefills_chunks_and_decodes(backend):
    sequences = [Context(prompt(n, seed=n), blocks_for(n, at)) for n, at in ((5, 0), (40, 1), (33, 4), (20, 7))]
    forward(backend, [(sequences[1], 39), (sequences[2], 10), (sequences[3], 16)])
    counts = [5, 1, 23, 4]
    pieces = forward(backend, list(zip(sequences, counts, strict=True))).split(counts)
    for sequence, count, piece in zip(sequences, counts, pieces, strict=True):
        torch.testing.assert_close(piece, whole(backend, sequence.tokens)[-count:], atol=1e-5, rtol=0)


def test_logits_of_the_rows_asked_for_and_of_no_others():
    seen = []

    class Counting(Mine):
        def compute_logits(self, hidden: Tensor) -> Tensor:
            seen.append(len(hidden))
            return super().compute_logits(hidden)

    backend = ready(Counting)
    tokens = prompt(20)
    every = whole(backend, tokens)
    for rows in ([], [19], [0, 3, 4, 19]):
        some = forward(backend, [(Context(tokens, [3, 1]), 20)], rows)
        assert some.dtype == torch.float32
        torch.testing.assert_close(some, every[rows])
    assert seen == [20, 0, 1, 4]


def test_low_precision_stays_near_float32(backend):
    low = whole(ready(dtype="bfloat16"), prompt(40))
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, whole(backend, prompt(40)), atol=0.3, rtol=0.1)


def test_a_step_runs_on_another_device():
    backend = ready(dtype="bfloat16", device="meta")
    sequences = [Context(prompt(40), [3 * row, 3 * row + 1, 3 * row + 2]) for row in range(3)]
    forward(backend, list(zip(sequences, [40, 20, 39], strict=True)), [])
    logits = forward(backend, list(zip(sequences[1:], [20, 1], strict=True)))
    assert logits.device.type == "meta"
    assert logits.shape == (21, VOCAB)


def test_a_model_without_attention():
    class Bigram(nn.Module):
        def __init__(self, config: Mapping[str, Any]) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.empty(VOCAB, VOCAB))

        def forward(self, token_ids: Tensor, positions: Tensor) -> Tensor:
            return self.table[token_ids]

        def compute_logits(self, hidden: Tensor) -> Tensor:
            return hidden

    backend = ready(Bigram)
    assert backend.cache_spec().bytes_per_block == 0
    torch.testing.assert_close(whole(backend, [3, 1, 4]), backend.destination("table")[[3, 1, 4]])


# ---------------------------------------------------------------- two models


def test_two_models_that_run_at_once_do_not_mix():
    meeting = threading.Barrier(2, timeout=30)

    class Waiting(Mine):
        is_met = False

        def forward(self, token_ids: Tensor, positions: Tensor) -> Tensor:
            if self.is_met:
                meeting.wait()
            return super().forward(token_ids, positions)

        def compute_logits(self, hidden: Tensor) -> Tensor:
            if self.is_met:
                meeting.wait()
            return super().compute_logits(hidden)

    backends = [ready(Waiting, seed=seed) for seed in range(2)]
    tokens = [prompt(40, seed) for seed in range(2)]
    expected = [whole(*pair) for pair in zip(backends, tokens, strict=True)]
    found: dict[int, list[Tensor]] = {}

    def run(number: int) -> None:
        backends[number]._module.is_met = True
        found[number] = [whole(backends[number], tokens[number]) for _ in range(5)]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        for logits in found[number]:
            torch.testing.assert_close(logits, expected[number])


def test_one_module_in_two_backends():
    module = Mine()
    with pytest.raises(PluginError, match="declares no parameter"):
        ModuleBackend(module, CONFIG, shards={"nothing": Shard(0)})
    backend = ready(module)
    expected = whole(backend, prompt(9))
    with pytest.raises(PluginError, match=r"'layers.0.attention' belongs to a module that another backend runs"):
        ModuleBackend(module, CONFIG)
    torch.testing.assert_close(whole(backend, prompt(9)), expected)
    backend.close()
    other = ready(module)
    backend.close()
    torch.testing.assert_close(whole(other, prompt(9)), expected)


def test_a_module_that_was_built_before_runs_with_the_weights_of_the_load(backend):
    module = Mine()
    ModuleBackend(module, CONFIG).close()
    assert all(parameter.is_meta for parameter in module.parameters())  # what it held is given up
    torch.testing.assert_close(whole(ready(module), prompt(20)), whole(backend, prompt(20)))


# ---------------------------------------------------------------- mistakes that would give wrong answers


def running(layer: Callable[[Mixing, Tensor], Tensor]) -> ModuleBackend:
    """Return a backend of one layer, a `Mixing` called like this."""

    class Wrong(nn.Module):
        def __init__(self, config: Mapping[str, Any]) -> None:
            super().__init__()
            self.layer = Mixing(KINDS[0])

        def forward(self, token_ids: Tensor, positions: Tensor) -> Tensor:
            return layer(self.layer, torch.ones(len(token_ids), WIDTH))

        def compute_logits(self, hidden: Tensor) -> Tensor:
            return F.pad(hidden, (0, VOCAB - WIDTH))

    return ready(Wrong)


HEADS, KEYS = torch.ones(3, 4, 6), torch.ones(3, 2, 6)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda layer, x: layer(layer(x)), r"'layer.attention' was called twice in one forward pass"),
        (lambda layer, x: x, r"this one left out layer.attention"),
        (lambda layer, x: layer.attention(HEADS.flatten(1), KEYS, KEYS), r"a query \[3, 24\] .* and \[3, 4, 6\]"),
        (lambda layer, x: layer.attention(HEADS, HEADS, KEYS), r"a key \[3, 4, 6\] .* and \[3, 2, 6\] torch.float32"),
        (lambda layer, x: layer.attention(HEADS, KEYS, KEYS[:1]), r"a value \[1, 2, 6\]"),
        (lambda layer, x: layer.attention(HEADS, KEYS, KEYS.half()), r"a value \[3, 2, 6\] torch.float16"),
        (lambda layer, x: layer(x)[:1], r"forward of Wrong returned \(1, 16\), and \(3, hidden_size\) is wanted"),
        (lambda layer, x: layer(x).T, r"forward of Wrong returned \(16, 3\)"),
        (lambda layer, x: (layer(x), None), r"forward of Wrong returned tuple, and \(3, hidden_size\) is wanted"),
        (lambda layer, x: layer(x)[:, :9], r"compute_logits of Wrong returned \(3, 24\), and \(3, 31\) is wanted"),
    ],
)
def test_forward_that_is_wrong(layer, message):
    backend = running(layer)
    with pytest.raises(PluginError, match=message):
        whole(backend, [1, 2, 3])


def test_a_step_that_failed_leaves_nothing_behind():
    is_broken = True

    def layer(mixing: Mixing, x: Tensor) -> Tensor:
        mixed = mixing(x)
        if is_broken:
            raise ZeroDivisionError
        return mixed

    backend = running(layer)
    with pytest.raises(ZeroDivisionError):
        whole(backend, [1, 2, 3])
    is_broken = False
    whole(backend, [1, 2, 3])


def test_attention_outside_of_a_step():
    with pytest.raises(PluginError, match="an Attention layer was called outside of a step"):
        Attention(4, 6, num_kv_heads=2)(HEADS, KEYS, KEYS)
    backend = ready()
    whole(backend, [1, 2, 3])
    with pytest.raises(PluginError, match=r"the attention 'layers.0.attention' was called outside of a step"):
        backend._module.layers[0].attention(HEADS, KEYS, KEYS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kv_heads": 3}, "4 query heads of 6 cannot share 3 key-value heads"),
        ({"num_kv_heads": 0}, "cannot share 0"),
        ({"sliding_window": 0}, "a sliding window of 0 hides"),
        ({"softcap": 0.0}, "cannot be capped at 0.0"),
    ],
)
def test_attention_that_makes_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        Attention(4, 6, **options)


def test_module_without_logits():
    with pytest.raises(PluginError, match=r"Linear has no compute_logits\(hidden\)"):
        ModuleBackend(lambda config: nn.Linear(2, 2), CONFIG)
    with pytest.raises(PluginError, match=r"dict is to be a torch.nn.Module, and is \{"):
        ModuleBackend(dict, CONFIG)


# ---------------------------------------------------------------- what is asked for


def request(**changes: Any) -> tuple[BackendRequest, list[str]]:
    reasons: list[str] = []
    fields: dict[str, Any] = {
        "lineage": ({"model_type": "other"}, CONFIG),
        "checkpoint": SimpleNamespace(quantization=None),
        "platform": SimpleNamespace(memory=lambda device: (1 << 20, 1 << 20)),
        "device": "cpu",
        "dtype": "bfloat16",
        "quantization": None,
        "trust_remote_code": False,
        "rank": 0,
        "world_size": 1,
        "max_model_len": 128,
        "max_num_seqs": 8,
        "on_decline": reasons.append,
    }
    return BackendRequest(**{**fields, **changes}), reasons


def test_answers_a_request():
    asked, reasons = request()
    backend = ModuleBackend.for_request(asked, Mine)
    assert backend is not None
    assert backend.config is CONFIG
    assert {spec.dtype for spec in backend.parameters().values()} == {"bfloat16"}
    assert not reasons
    with pytest.raises(UnavailableError, match="has 1048576 of 1048576 bytes free"):
        backend.allocate_cache(1 << 20, num_slots=8)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"world_size": 2}, "world_size is 2"),
        ({"dtype": "int4"}, "not in 'int4'"),
        ({"quantization": "int8"}, "quantization='int8' was asked for"),
        ({"lineage": ({**CONFIG, "quantization_config": {"quant_method": "hqq"}},)}, "quantized as 'hqq'"),
    ],
)
def test_declines_by_name(changes, reason):
    asked, reasons = request(**changes)
    assert ModuleBackend.for_request(asked, Mine) is None
    assert len(reasons) == 1
    assert reason in reasons[0]


# ---------------------------------------------------------------- loading


def test_parameters_are_the_modules_and_allocate_nothing():
    class Wide(Mine):
        def __init__(self, config: Mapping[str, Any]) -> None:
            super().__init__(config)
            self.wide = nn.Linear(1 << 20, 1 << 20)

    tracemalloc.start()
    backend = ModuleBackend(Wide, CONFIG, dtype="bfloat16")
    specs = backend.parameters()
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert list(specs) == [name for name, _ in backend._module.named_parameters()]
    assert specs["wide.weight"].shape == (1 << 20, 1 << 20)
    assert {spec.dtype for spec in specs.values()} == {"bfloat16"}
    assert all(parameter.is_meta for parameter in backend._module.parameters())
    per_token = 2 * (2 * 6 + 1 * 4 + 2 * 10)
    assert backend.cache_spec().bytes_per_block == 16 * per_token * 2


def test_destinations_are_the_modules_own_memory():
    backend = ModuleBackend(Mine, CONFIG)
    assert backend.keeps_parameters
    for name, spec in backend.parameters().items():
        buffer = backend.destination(name)
        assert (buffer.shape, buffer.dtype) == (spec.shape, torch.float32)
        assert backend._module.get_parameter(name).data_ptr() == buffer.data_ptr()


def test_a_second_load_goes_to_the_same_addresses_and_changes_the_model():
    backend = ready()
    before = whole(backend, prompt(9))
    addresses = [backend.destination(name).data_ptr() for name in backend.parameters()]
    load(backend, seed=1)
    assert [backend.destination(name).data_ptr() for name in backend.parameters()] == addresses
    torch.testing.assert_close(whole(backend, prompt(9)), whole(ready(seed=1), prompt(9)))
    assert (whole(backend, prompt(9)) - before).abs().max() > 1e-2


def test_finish_loading_names_what_was_not_loaded():
    backend = ModuleBackend(Mine, CONFIG)
    backend.destination("norm.weight")
    backend.loaded("norm.weight")
    with pytest.raises(PlanError, match=r"15 of 16 parameters were not loaded: embedding.weight, head.weight"):
        backend.finish_loading()


def test_close_frees_the_parameters():
    backend = ready()
    module = backend._module
    backend.close()
    backend.close()
    assert all(parameter.is_meta for parameter in module.parameters())


class Tied(Mine):
    def __init__(self, config: Mapping[str, Any] = CONFIG) -> None:
        super().__init__(config)
        self.head.weight = self.embedding.weight


def test_one_parameter_under_two_names_is_tied():
    backend = ModuleBackend(Tied, CONFIG, shards={"head.weight": Shard(0)})
    specs = backend.parameters()
    assert specs["head.weight"].tied_to == "embedding.weight"
    assert specs["embedding.weight"].tied_to is None
    assert specs["embedding.weight"].shard == specs["head.weight"].shard == Shard(0)
    weights = load(backend)
    backend.allocate_cache(NUM_BLOCKS, num_slots=1)
    weights["head.weight"] = weights["embedding.weight"]
    torch.testing.assert_close(whole(backend, [1, 2]).double(), reference(weights, [1, 2]), atol=1e-4, rtol=0)


# ---------------------------------------------------------------- buffers


class Buffered(Mine):
    """`given` is computed where there are values, `stored` is a checkpoint's."""

    def __init__(self, config: Mapping[str, Any] = CONFIG) -> None:
        super().__init__(config)
        with torch.device("cpu"):
            self.register_buffer("given", torch.arange(3.0), persistent=False)
        self.register_buffer("stored", torch.zeros(2, 3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def test_stored_buffers_are_parameters():
    backend = ModuleBackend(Buffered, CONFIG, dtype="bfloat16")
    specs = backend.parameters()
    assert (specs["stored"].shape, specs["stored"].dtype) == ((2, 3), "bfloat16")
    assert (specs["count"].shape, specs["count"].dtype) == ((), "int64")
    assert "given" not in specs
    assert backend.destination("stored") is backend._module.stored
    assert not isinstance(backend._module.stored, nn.Parameter)
    for seed in range(2):
        weights = load(backend, seed)
        torch.testing.assert_close(backend._module.stored, weights["stored"].bfloat16())


def test_buffers_that_have_values_keep_them_and_others_are_computed_after_every_load():
    backend = ready(Buffered)
    module = backend._module
    assert module.given.tolist() == [0, 1, 2]
    assert module.positions.speeds[3] == 0.25
    module.positions.speeds = torch.zeros(WIDTH)
    load(backend)
    assert module.positions.speeds[3] == 0.25


def with_buffer(name: str, *, is_plain: bool = False, **methods: Any) -> Callable[[Any], nn.Module]:
    def build(config: Mapping[str, Any]) -> nn.Module:
        module = Mine(config)
        kind = type("Inner", (nn.Module,), methods)
        module.inner = kind()
        if is_plain:
            setattr(module.inner, name, torch.ones(2))
        else:
            module.inner.register_buffer(name, torch.ones(2), persistent=False)
        return module

    return build


@pytest.mark.parametrize("is_plain", [False, True])
def test_buffers_that_nobody_computes(is_plain):
    with pytest.raises(PluginError, match=r"inner.lost would have no value.*init_buffers\(\)"):
        ModuleBackend(with_buffer("lost", is_plain=is_plain), CONFIG)


@pytest.mark.parametrize("is_plain", [False, True])
def test_buffers_that_init_buffers_forgot(is_plain):
    backend = ModuleBackend(with_buffer("lost", is_plain=is_plain, init_buffers=lambda self: None), CONFIG)
    with pytest.raises(PluginError, match=r"init_buffers\(\) left these without a value: inner.lost"):
        load(backend)


def test_a_constructor_that_needs_values_is_told_where_to_compute():
    def build(config: Mapping[str, Any]) -> nn.Module:
        return nn.Linear(2, int(torch.ones(1).item()))

    with pytest.raises(RuntimeError) as caught:
        ModuleBackend(build, CONFIG)
    assert "build is built on torch's meta device" in caught.value.__notes__[0]


# ---------------------------------------------------------------- declarations


def declaring(**attributes: Any) -> type[Mine]:
    return type("Declaring", (Mine,), attributes)


def test_shards_of_modules_and_of_the_backend():
    module = declaring(shards={"layers.{i}.o.weight": Shard(1), "layers.1.o.weight": Shard(1, multiple=4)})
    specs = ModuleBackend(module, CONFIG, shards={"layers.0.kv.weight": Shard(0, segments=(12, 12))}).parameters()
    assert specs["layers.0.o.weight"].shard == specs["layers.2.o.weight"].shard == Shard(1)
    assert specs["layers.1.o.weight"].shard == Shard(1, multiple=4)
    assert specs["layers.0.kv.weight"].shard == Shard(0, segments=(12, 12))
    assert specs["layers.1.kv.weight"].shard is None


def test_dtypes_that_are_kept():
    class Mixed(Mine):
        def __init__(self, config: Mapping[str, Any]) -> None:
            super().__init__(config)
            self.dtypes = {"norm.weight": "float32"}
            self.exact = nn.Parameter(torch.empty(3, dtype=torch.float64))
            self.packed = nn.Parameter(torch.empty(3, dtype=torch.int8), requires_grad=False)

    specs = ModuleBackend(Mixed, CONFIG, dtype="bfloat16").parameters()
    kept = {name: spec.dtype for name, spec in specs.items() if spec.dtype != "bfloat16"}
    assert kept == {"norm.weight": "float32", "exact": "float64", "packed": "int8"}


@pytest.mark.parametrize(
    ("attributes", "options", "message"),
    [
        (
            {"shards": {"layer.{i}.o.weight": Shard(1)}},
            {},
            r"shards: 'layer.\{i\}.o.weight' declares no parameter, did you mean 'layers.0.o.weight'\?",
        ),
        ({}, {"shards": {"head": Shard(0)}}, "shards: 'head' declares no parameter"),
        ({}, {"shards": {"layers.{a}{b}": Shard(0)}}, r"\{a\} and \{b\} touch"),
        (
            {"shards": {"head.weight": Shard(0)}},
            {"shards": {"head.weight": Shard(0)}},
            "shards: 'head.weight' is declared twice",
        ),
        ({"shards": {"head.weight": 0}}, {}, r"'head.weight' is declared 0, and an infinilm_hookspecs.Shard is wanted"),
        ({"shards": {"norm.bias": Shard(1)}}, {}, r"'norm.bias' is \[16\] and has no dimension 1"),
        ({"shards": {"head.weight": Shard(0, multiple=0)}}, {}, "cannot be cut at multiples of 0"),
        ({"shards": {"head.weight": Shard(0, segments=(30,))}}, {}, "add up to 30, and dimension 0 is 31 long"),
        ({"dtypes": {"head.weight": "float23"}}, {}, "'head.weight' is to be kept in 'float23'; known: bool,"),
        ({"dtypes": {"tail.weight": "float32"}}, {}, "dtypes: 'tail.weight' declares no parameter"),
    ],
)
def test_declarations_that_are_wrong(attributes, options, message):
    with pytest.raises(PluginError, match=message):
        ModuleBackend(declaring(**attributes), CONFIG, **options)


def test_tied_parameter_that_is_declared_under_both_names():
    with pytest.raises(PluginError, match=r"'head.weight' and 'embedding.weight' are one parameter, and are"):
        ModuleBackend(Tied, CONFIG, shards={"embedding.weight": Shard(0), "head.weight": Shard(1)})
    ModuleBackend(Tied, CONFIG, shards={"embedding.weight": Shard(0), "head.weight": Shard(0)})


def test_word_of_a_module_about_itself_outweighs_a_template():
    class Own(Mine):
        def __init__(self, config: Mapping[str, Any]) -> None:
            super().__init__(config)
            self.layers[1].shards = {"o.weight": Shard(0)}

    specs = ModuleBackend(Own, CONFIG, shards={"layers.{i}.o.weight": Shard(1)}).parameters()
    assert [specs[f"layers.{i}.o.weight"].shard for i in range(3)] == [Shard(1), Shard(0), Shard(1)]


# ---------------------------------------------------------------- in an LLM


def stored_as(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights by other names, with the queries, keys and values of a layer in one tensor."""
    stored = {"words": weights["embedding.weight"], "output": weights["head.weight"], "old.speeds": torch.ones(3)}
    stored |= {name: weights[name] for name in ("norm.weight", "norm.bias")}
    for i in range(len(KINDS)):
        stored[f"h.{i}.qkv"] = torch.cat((weights[f"layers.{i}.q.weight"], weights[f"layers.{i}.kv.weight"]))
        stored |= {f"h.{i}.kv.b": weights[f"layers.{i}.kv.bias"], f"h.{i}.o": weights[f"layers.{i}.o.weight"]}
    return stored


def split_qkv(weight: Weight, i: int) -> list[Weight]:
    rows = KINDS[i]["num_heads"] * KINDS[i]["head_dim"]
    return [weight[:rows].rename(f"layers.{i}.q.weight"), weight[rows:].rename(f"layers.{i}.kv.weight")]


class Plugin:
    rule: ClassVar[dict[str, Any]] = {
        "words": "embedding.weight",
        "output": "head.weight",
        "old.speeds": DROP,
        "h.{i}.qkv": split_qkv,
        "h.{i}.kv.b": "layers.{i}.kv.bias",
        "h.{i}.o": "layers.{i}.o.weight",
    }

    @hookimpl
    def provide_backend(self, request: BackendRequest) -> ModuleBackend | None:
        if request.lineage[0]["model_type"] == "mine":
            return ModuleBackend.for_request(request, Mine, weight_rule=self.rule)
        return None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    backend = ModuleBackend(Mine, CONFIG)
    save_file(stored_as(load(backend)), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "max_position_embeddings": 64}))
    return tmp_path


def test_weights_by_other_names_through_the_backends_rule(pm: PluginManager, folder: Path) -> None:
    pm.register(Plugin(), "mine")
    tokens = prompt(40)
    with LLM(folder, plugin_manager=pm, max_num_batched_tokens=16) as llm:
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        (output,) = llm.generate({"prompt_token_ids": tokens}, params)
        weights = {name: llm.backend.destination(name) for name in llm.backend.parameters()}
        expected = reference(weights, tokens)
        llm.export(folder / "again", original=True, reuse=folder)
    assert output.outputs[0].token_ids[0] == expected[-1].argmax()
    for row, token, entry in zip(expected.log_softmax(-1), tokens[1:], output.prompt_logprobs[1:], strict=False):
        assert abs(entry[token].logprob - row[token].item()) < 1e-4
    stored, exported = (load_file(path / "model.safetensors") for path in (folder, folder / "again"))
    assert stored.keys() == exported.keys()
    assert all(torch.equal(stored[name], exported[name]) for name in stored)


def test_logits_of_another_vocabulary_are_refused(pm: PluginManager, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 40}))
    pm.register(Plugin(), "mine")
    with LLM(folder, plugin_manager=pm) as llm, pytest.raises(PluginError) as caught:
        llm.generate({"prompt_token_ids": [1, 2]}, SamplingParams(max_tokens=1))
    assert "compute_logits of Mine returned (1, 31), and (1, 40) is wanted" in str(caught.value)


def test_config_may_be_a_decoders():
    config = decoder_config()
    backend = ModuleBackend(lambda given: Mine({"vocab_size": given.vocab_size}), config)
    assert backend.config is config
    load(backend)
    backend.allocate_cache(NUM_BLOCKS, num_slots=1)
    assert whole(backend, [1, 2]).shape == (2, config.vocab_size)


def test_the_package_imports_no_torch_before_it_is_needed() -> None:
    code = (
        "import sys, infinilm.backends.torch as package; assert 'torch' not in sys.modules\n"
        "assert package.Attention.__name__ == 'Attention' and 'torch' in sys.modules\n"
        "try: package.Attenton\n"
        "except AttributeError as err: print(err)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "module 'infinilm.backends.torch' has no attribute 'Attenton'\n"
