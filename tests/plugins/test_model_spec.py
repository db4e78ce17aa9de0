"""`ModelSpec` and `register_model`: remappers written for state dicts of tensors, run unmodified on headers."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infinilm.loading.plan import plan_load
from infinilm.loading.stages import Stage, Walk
from infinilm.loading.values import evaluate
from infinilm.pipeline import choose_backend
from infinilm.platforms.cpu import CpuPlatform
from infinilm.plugins import (
    ModelSpec,
    PluginManager,
    create_plugin_manager,
    get_model_spec,
    register_model,
    registered_model_types,
    registry,
    trace_lineage,
)
from infinilm.plugins import adapt_config as adapt_config_of
from infinilm.plugins.loading import register_found
from infinilm_hookspecs import (
    DROP,
    BackendRequest,
    ConfigError,
    InfinilmError,
    ParameterSpec,
    PluginError,
    StoredTensor,
    Weight,
    WeightError,
)
from infinilm_hookspecs.state_dicts import RuleChain, StateDictRule

StateDict = dict[str, Any]
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, EXPERTS = 4, 2, 8, 24, 3
Q, KV = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
CONFIG = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "scale": 3.0}


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registry", registry._Registry())


# ---------------------------------------------------------------- remappers as integrators write them today


def rename(weights: StateDict) -> StateDict:
    out = {}
    for name, tensor in weights.items():
        out[name.replace("transformer.h.", "model.layers.").replace("ln_1", "input_layernorm")] = tensor
    return out


def packed_qkv(weights: StateDict) -> StateDict:
    for name in list(weights):
        if "qkv" in name:
            q, k, v = weights.pop(name).chunk(3, dim=0)
            for letter, part in (("q", q), ("k", k), ("v", v)):
                weights[name.replace("qkv", f"{letter}_proj")] = part
    return weights


def gate_up(weights: StateDict) -> StateDict:
    for name in [n for n in weights if "gate" in n]:
        gate, up = weights.pop(name), weights.pop(name.replace("gate", "up"))
        weights[name.replace("gate", "gate_up")] = torch.cat([gate, up], dim=0)
    return weights


def experts_stacked(weights: StateDict) -> StateDict:
    names = sorted(n for n in weights if re.fullmatch(r"experts\.\d+\.w1", n))
    stacked = torch.stack([weights[n] for n in names])
    return {**{n: w for n, w in weights.items() if n not in names}, "experts.w1": stacked}


def conv1d(weights: StateDict) -> StateDict:
    return {n: tensor.t().contiguous() if tensor.dim() == 2 else tensor for n, tensor in weights.items()}


def grouped_qkv(weights: StateDict, config: Mapping[str, Any]) -> StateDict:
    heads, kv_heads, dim = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    out = {}
    for name, tensor in weights.items():
        if not name.endswith("qkv"):
            out[name] = tensor
            continue
        grouped = tensor.view(kv_heads, heads // kv_heads + 2, dim, -1)
        q, k, v = torch.split(grouped, [heads // kv_heads, 1, 1], dim=1)
        for letter, part in (("q", q), ("k", k), ("v", v)):
            out[name[:-3] + letter] = part.reshape(-1, tensor.shape[-1])
    return out


def norm_plus_one(weights: StateDict) -> StateDict:
    return {n: tensor + torch.ones_like(tensor) if "norm" in n else tensor for n, tensor in weights.items()}


def scaled_embedding(weights: StateDict, config: Mapping[str, Any]) -> StateDict:
    weights["embed"] = weights["embed"] * config["scale"]
    return weights


def slices_and_drops(weights: StateDict) -> StateDict:
    out = {n: tensor for n, tensor in weights.items() if "rotary" not in n}
    out["head"] = out.pop("padded")[:10]
    out["even"], out["odd"] = out["mixed"][::2], out.pop("mixed")[1::2]
    out["last"] = weights["stack"][-1, ..., 2:]
    out["bias"] = torch.zeros(4)
    return out


def dtypes_and_reductions(weights: StateDict) -> StateDict:
    for name, tensor in list(weights.items()):
        if tensor.dtype == torch.float16 or tensor.dtype is torch.float16:
            weights[name] = tensor.to(torch.float32)
    weights["mean"] = torch.mean(weights["a"], dim=0)
    weights["product"] = weights["a"] @ weights["b"].t()
    weights["halves"] = torch.maximum(weights["a"], -weights["a"]).float().half()
    return weights


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


CASES: list[tuple[Callable[..., StateDict], dict[str, Tensor]]] = [
    (rename, {"transformer.h.0.ln_1.weight": rand(6), "transformer.h.1.ln_1.weight": rand(6)}),
    (packed_qkv, {"attn.qkv": rand(3 * Q, HIDDEN), "norm": rand(HIDDEN)}),
    (gate_up, {"0.gate": rand(10, 6), "0.up": rand(10, 6), "1.gate": rand(10, 6), "1.up": rand(10, 6)}),
    (experts_stacked, {f"experts.{e}.w1": rand(5, 4) for e in range(EXPERTS)} | {"router": rand(3, 4)}),
    (conv1d, {"c_attn": rand(HIDDEN, 3 * Q), "bias": rand(3 * Q)}),
    (grouped_qkv, {"0.qkv": rand(Q + 2 * KV, HIDDEN), "norm": rand(HIDDEN)}),
    (norm_plus_one, {"norm": rand(64, dtype=torch.bfloat16), "w": rand(4, 4)}),
    (scaled_embedding, {"embed": rand(12, 8, dtype=torch.bfloat16)}),
    (
        slices_and_drops,
        {"padded": rand(16, 4), "mixed": rand(8, 3), "stack": rand(3, 2, 5), "rotary.inv_freq": rand(4)},
    ),
    (dtypes_and_reductions, {"a": rand(5, 6), "b": rand(7, 6), "h": rand(3, dtype=torch.float16)}),
]


def run_on_headers(function: Callable[..., StateDict], stored: Mapping[str, Tensor]) -> dict[str, Weight]:
    """Run a remapper as a ModelSpec does, and return the weights it made."""
    spec = ModelSpec(model_type="acme", weight_remapper=function)
    chain = spec.remap_weight({"model_type": "acme", **CONFIG})
    assert isinstance(chain, RuleChain)
    walk = Walk({n: Weight.stored(n, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in stored.items()})
    for rule in chain.rules:
        walk.run(Stage(rule, "acme"))
    assert walk.errors == []
    return walk.weights


def assert_equals_running_on_tensors(function: Callable[..., StateDict], stored: Mapping[str, Tensor]) -> None:
    weights = run_on_headers(function, stored)
    is_two = function.__code__.co_argcount == 2
    expected = function(dict(stored), CONFIG) if is_two else function(dict(stored))
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert weights[name].shape == tuple(tensor.shape), name
        assert weights[name].dtype_name == str(tensor.dtype).removeprefix("torch."), name
        found = evaluate(weights[name], lambda source, region: stored[source][region].contiguous())
        # A product may be summed in another order on a buffer that is laid out otherwise.
        close = torch.allclose(found, tensor, rtol=1e-5, atol=1e-6) if name == "product" else torch.equal(found, tensor)
        assert close, name


@pytest.mark.parametrize(("function", "stored"), CASES, ids=[case[0].__name__ for case in CASES])
def test_remapper_runs_unmodified(function: Callable[..., StateDict], stored: dict[str, Tensor]) -> None:
    assert_equals_running_on_tensors(function, stored)


@pytest.mark.parametrize("function", [rename, packed_qkv, gate_up, experts_stacked, conv1d, grouped_qkv])
def test_common_remappers_stay_symbolic(function: Callable[..., StateDict]) -> None:
    stored = dict(CASES)[function]
    for weight in run_on_headers(function, stored).values():
        assert all(piece.source.deferred is None for piece in weight.pieces)
        assert weight.losses() == ()


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda w: {"a": w["a"] if w["a"].sum() > 0 else -w["a"]}, r"needs the tensor's values.*weight.apply\("),
        (lambda w: {"a": w["a"] * w["a"].max().item()}, r"item of .* cannot be planned.*weight.apply\("),
        (lambda w: {"a": w["a"][torch.tensor([0, 1])]}, r"neither an int nor a slice"),
        (lambda w: {"a": w["a"].add_(1)}, r"never changes; use add for add_"),
        (lambda w: w["a"].__setitem__(0, 1), r"never changes; make a new weight"),
        (lambda w: {"a": 3}, r"it returned 3 as 'a'; a tensor is wanted"),
        (lambda w: {0: w["a"]}, r"it returned the key 0; keys are names"),
        (lambda w: [w["a"]], r"not the dict of weights that replaces"),
        (lambda w: {"a": torch.cat([w["a"], w["a"].t()])}, r"cat of .* the other sizes differ"),
    ],
)
def test_mistakes_are_collected_with_the_way_out(mistake: Callable[[Any], Any], message: str) -> None:
    walk = Walk({"a": Weight.stored("a", (4, 6), "float32")})
    walk.run(Stage(StateDictRule(mistake), "acme"))
    (error,) = walk.errors
    assert error.startswith("the remapper of plugin acme: ")
    assert re.search(message, error), error


def test_rest_of_a_weight_is_dropped_by_name() -> None:
    def first_rows(weights: StateDict) -> StateDict:
        return {"kept": weights["padded"][:3], "padded": DROP}

    tensors = {"padded": StoredTensor((4, 2), "float32", None)}
    spec = ModelSpec(model_type="acme", weight_remapper=first_rows)
    chain = spec.remap_weight({"model_type": "acme"})
    assert chain is not None
    stages = [Stage(rule, "acme") for rule in chain.rules]
    plan = plan_load(tensors, stages, {"kept": ParameterSpec((3, 2), "float32")})
    assert plan.errors == ()
    assert plan.dropped == {"padded": "acme"}


# ---------------------------------------------------------------- random programs


@st.composite
def remappers(draw: st.DrawFn) -> list[tuple[str, Any]]:
    return draw(
        st.lists(
            st.one_of(
                st.tuples(st.just("cat"), st.integers(0, 1)),
                st.tuples(st.just("stack"), st.integers(0, 2)),
                st.tuples(st.just("split"), st.integers(1, 4)),
                st.tuples(st.just("chunk"), st.integers(1, 3)),
                st.tuples(st.just("t"), st.none()),
                st.tuples(st.just("flatten"), st.none()),
                st.tuples(st.just("view"), st.integers(0, 30)),
                st.tuples(st.just("slice"), st.tuples(st.integers(0, 2), st.integers(1, 3))),
                st.tuples(st.just("add"), st.sampled_from([0.5, -2])),
                st.tuples(st.just("mul"), st.sampled_from([0.25, 3])),
                st.tuples(st.just("ones"), st.none()),
                st.tuples(st.just("abs"), st.none()),
            ),
            min_size=1,
            max_size=6,
        )
    )


def interpret(steps: list[tuple[str, Any]], weights: StateDict) -> StateDict:
    """Run a random program over a dict, tensors or symbolic ones alike."""
    pool = list(weights.values())
    for kind, argument in steps:
        last = pool[-1]
        if kind in ("cat", "stack"):
            alike = [t for t in pool if t.shape == last.shape and t.dtype == last.dtype][:3]
            dim = min(argument, last.dim() - (kind == "cat"))
            if dim >= 0:
                pool.append(getattr(torch, kind)(alike, dim))
        elif kind == "split":
            pool += list(torch.split(last, argument))
        elif kind == "chunk":
            pool += list(last.chunk(argument, dim=-1))
        elif kind == "t" and last.dim() == 2:
            pool.append(last.t().contiguous())
        elif kind == "flatten":
            pool.append(last.flatten())
        elif kind == "view":
            divisors = [d for d in range(1, last.numel() + 1) if last.numel() % d == 0]
            pool.append(last.contiguous().view(divisors[argument % len(divisors)], -1))
        elif kind == "slice":
            pool.append(last[argument[0] % last.shape[0] :: argument[1]])
        elif kind == "add":
            pool.append(last + argument)
        elif kind == "mul":
            pool.append(argument * last)
        elif kind == "ones":
            pool.append(last + torch.ones_like(last))
        elif kind == "abs":
            pool.append(torch.abs(last))
    return {str(index): tensor for index, tensor in enumerate(pool)}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(remappers(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_random_remappers_equal_running_on_tensors(steps: list[tuple[str, Any]], dtype: torch.dtype) -> None:
    stored = {"a": rand(4, 6, dtype=dtype), "b": rand(4, 6, dtype=dtype), "c": rand(5, dtype=dtype)}
    stored = {name: stored[name] for name in ("c", "b", "a")}

    def remapper(weights: StateDict) -> StateDict:
        return interpret(steps, weights)

    assert_equals_running_on_tensors(remapper, stored)


# ---------------------------------------------------------------- config adapters


@pytest.mark.parametrize(
    "adapter",
    [
        {"hidden_size": "$width", "hidden_act": "silu", "intermediate_size": lambda config: 4 * config["width"]},
        lambda config: {**config, "hidden_size": config["width"], "hidden_act": "silu", "intermediate_size": 32},
    ],
    ids=["mapping", "callable"],
)
def test_config_adapter_of_either_kind(pm: PluginManager, adapter: Any) -> None:
    pm.register(ModelSpec(model_type="Acme", backend_model_type="house", config_adapter=adapter))
    lineage = trace_lineage(pm, {"model_type": "ACME", "width": 8, "nested": {"list": [1, 2]}})
    assert lineage.plugins == ("model_spec:acme",)
    adapted = lineage.configs[1]
    assert isinstance(adapted, Mapping)
    assert {k: adapted[k] for k in ("model_type", "hidden_size", "hidden_act", "intermediate_size")} == {
        "model_type": "house",
        "hidden_size": 8,
        "hidden_act": "silu",
        "intermediate_size": 32,
    }


def test_copy_of_a_key_that_is_not_there_is_named(pm: PluginManager) -> None:
    pm.register(ModelSpec(model_type="acme", backend_model_type="house", config_adapter={"hidden_size": "$widht"}))
    with pytest.raises(ConfigError, match="'acme' copies 'hidden_size' from 'widht', which the config lacks"):
        trace_lineage(pm, {"model_type": "acme", "width": 8})


# ---------------------------------------------------------------- rules


def test_rules_run_after_the_remapper_in_order_and_may_be_of_every_kind(pm: PluginManager) -> None:
    def remapper(weights: StateDict) -> StateDict:
        return {f"a.{name}": tensor for name, tensor in weights.items()}

    def one(weight: Weight) -> Any:
        return DROP if weight.name == "b.drop" else None

    spec = ModelSpec(
        model_type="acme",
        weight_remapper=remapper,
        weight_rules=({"a.{i}": "b.layers.{i}", "a.drop": "b.drop"}, one, rename),
    )
    chain = spec.remap_weight({"model_type": "acme"})
    assert chain is not None
    walk = Walk({n: Weight.stored(n, (2,), "float32") for n in ("0", "1", "drop")})
    for rule in chain.rules:
        walk.run(Stage(rule, "acme"))
    assert list(walk.weights) == ["b.layers.0", "b.layers.1"]
    assert [weight.name for _, weight in walk.dropped] == ["b.drop"]
    assert not chain.is_final


def test_walk_ends_where_the_builtin_remapper_is_not_wanted() -> None:
    spec = ModelSpec(model_type="acme", use_builtin_weight_remapper=False)
    assert spec.remap_weight({"model_type": "acme"}) == RuleChain((), is_final=True)


# ---------------------------------------------------------------- registration


@pytest.fixture
def registered() -> ModelSpec:
    return register_model(model_type="acme", model_types=("Acme-2",), backend_model_type="house")


def test_registered_spec_is_known_and_given_to_later_managers(registered: ModelSpec) -> None:
    assert registered_model_types() == ["acme", "acme-2"]
    assert get_model_spec("ACME-2") is registered
    assert get_model_spec("nobody") is None
    for _ in range(2):
        lineage = trace_lineage(create_plugin_manager(autoload=False), {"model_type": "acme"})
        assert lineage.plugins == ("model_spec:acme",)
    assert adapt_config_of({"model_type": "acme", "x": [1]}) == {"model_type": "house", "x": [1]}


def test_same_spec_again_is_fine_and_another_is_an_error(registered: ModelSpec) -> None:
    assert register_model(registered) is registered
    assert register_model(model_types=("acme", "acme-2"), backend_model_type="house") == registered
    with pytest.raises(PluginError, match="model_type 'acme' is registered already, with another spec"):
        register_model(model_type="acme", backend_model_type="other")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: register_model(), "takes a ModelSpec, or the fields of one"),
        (lambda: register_model("acme"), "takes a ModelSpec, not 'acme'"),  # type: ignore[arg-type]  # the mistake
        (lambda: ModelSpec(backend_model_type="x"), "give model_type"),
        (lambda: ModelSpec(model_type="a", processor="p", processor_cls=object), "exclude each other"),  # type: ignore[arg-type]  # not reached
        (lambda: ModelSpec(model_type="a", backend="acme.backend"), "backend='acme.backend' is not 'module:attribute'"),
    ],
)
def test_mistakes_in_a_spec_are_errors(call: Callable[[], object], message: str) -> None:
    with pytest.raises(PluginError, match=message):
        call()


# ---------------------------------------------------------------- a backend of its own

LAZY = """
def make(request):
    return request.decline(f"asked for {request.lineage[-1]['model_type']}")
"""


@pytest.fixture
def lazy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "acme_lazy_backend.py").write_text(LAZY)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "acme_lazy_backend:make"
    sys.modules.pop("acme_lazy_backend", None)


def why_no_backend(pm: PluginManager, model_type: str) -> str:
    request = BackendRequest(
        ({"model_type": model_type},),
        SimpleNamespace(file=lambda name: None, quantization=None),  # type: ignore[arg-type]  # only asked for a path
        CpuPlatform(),
        device="cpu",
        dtype="float32",
        quantization=None,
        trust_remote_code=False,
        rank=0,
        world_size=1,
        max_model_len=8,
        max_num_seqs=1,
    )
    with pytest.raises(InfinilmError) as caught:
        choose_backend(pm, request)
    return str(caught.value)


def test_backend_named_by_a_string_is_imported_for_its_models_alone(pm: PluginManager, lazy: str) -> None:
    pm.register(ModelSpec(model_type="acme", backend=lazy), "acme")
    message = why_no_backend(pm, "house")
    assert "no plugin adapts model_type 'house'" in message
    assert " acme: " not in message  # it has nothing to say of others' models
    assert "acme_lazy_backend" not in sys.modules
    message = why_no_backend(pm, "acme")
    assert "no backend runs this acme: " in message
    assert "acme: asked for acme" in message


def test_backend_of_one_of_several_specs(pm: PluginManager, lazy: str) -> None:
    other = ModelSpec(model_type="house", backend=lambda request: request.decline("a house has none"))
    register_found(pm, [ModelSpec(model_type="plain"), ModelSpec(model_type="acme", backend=lazy), other], None, [])
    assert "asked for acme" in why_no_backend(pm, "acme")
    assert "a house has none" in why_no_backend(pm, "house")
    assert "asked for" not in why_no_backend(pm, "plain")


@pytest.mark.parametrize("missing", ["acme_lazy_backend:take", "acme_lazier_backend:make"])
def test_backend_that_is_not_where_it_is_said_to_be(pm: PluginManager, lazy: str, missing: str) -> None:
    pm.register(ModelSpec(model_type="acme", backend=missing), "acme")
    assert f"ModelSpec 'acme' names the backend {missing!r}: " in why_no_backend(pm, "acme")


# ---------------------------------------------------------------- mistakes


def test_unknown_field_is_an_error() -> None:
    with pytest.raises(TypeError, match="backend_modeltype"):
        register_model(model_type="acme", backend_modeltype="house")


def test_weight_rule_of_one_weight_and_of_a_dict_are_told_apart() -> None:
    spec = ModelSpec(model_type="acme", weight_rules=(rename, lambda weight: None))
    chain = spec.remap_weight({"model_type": "acme"})
    assert chain is not None
    assert isinstance(chain.rules[0], StateDictRule)
    assert not isinstance(chain.rules[1], StateDictRule)


def test_remapper_that_raises_is_named() -> None:
    def broken(weights: StateDict) -> StateDict:
        return {"a": weights["nowhere"]}

    walk = Walk({"a": Weight.stored("a", (4,), "float32")})
    with pytest.raises(KeyError) as caught:
        walk.run(Stage(StateDictRule(broken), "acme"))
    assert caught.value.__notes__ == ["in the state-dict remapper of plugin 'acme'"]
    assert issubclass(WeightError, ValueError)
