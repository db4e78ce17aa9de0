"""`Named` mixers and MLPs: a plugin's torch modules among the layers of the torch backend, and how it is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from infinilm import LLM, SamplingParams
from infinilm.backends.torch import Attention
from infinilm.plugins import PluginManager
from infinilm_hookspecs import (
    AttentionConfig,
    DecoderConfig,
    EmbeddingConfig,
    LayerConfig,
    LayerNorms,
    LogitsConfig,
    MlpConfig,
    Named,
    NormConfig,
    PlanError,
    PluginError,
    Shard,
    UnavailableError,
    hookimpl,
)

VOCAB, HIDDEN, FFN = 37, 24, 20
NORM = NormConfig(eps=1e-5)
PLAIN = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6, rope=None)
NORMS = LayerNorms(before_mixer=NORM, before_mlp=NORM)
SQUARED = Named("squared_relu", {"size": FFN})
LAYERS = (
    LayerConfig(PLAIN, SQUARED, NORMS),
    LayerConfig(Named("two_spans", {"span": 5}), MlpConfig(FFN), NORMS),
    LayerConfig(PLAIN, None, LayerNorms(before_mixer=NORM)),
    LayerConfig(Named("two_spans", {"span": 9}), SQUARED, NORMS),
)


# ---------------------------------------------------------------- a plugin


class SquaredRelu(nn.Module):
    def __init__(self, hidden: int, size: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, size)
        self.down = nn.Linear(size, hidden, bias=False)
        self.shards = {"up.weight": Shard(0), "up.bias": Shard(0), "down.weight": Shard(1)}

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(self.up(hidden).relu() ** 2)


class TwoSpans(nn.Module):
    """One head that sees everything less one that sees a window; values move along with their positions."""

    def __init__(self, hidden: int, span: int) -> None:
        super().__init__()
        self.far, self.near = Attention(1, 8), Attention(1, 4, sliding_window=span)
        self.rows = nn.Parameter(torch.empty(3 * 8 + 3 * 4, hidden))
        self.register_buffer("pace", torch.empty(()), persistent=False)
        self.out = nn.Parameter(torch.empty(hidden, 12))

    def init_buffers(self) -> None:
        self.pace = torch.tensor(0.1)

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        far, near = F.linear(hidden, self.rows).split((24, 12), dim=-1)
        near = near + (self.pace * positions[:, None]).sin().to(near.dtype)
        spans = [
            span(*heads.unflatten(-1, (3, 1, -1)).unbind(1)).flatten(1)
            for span, heads in ((self.far, far), (self.near, near))
        ]
        return F.linear(torch.cat((spans[0], -spans[1]), -1), self.out)


class Plugin:
    model_types = ("patchwork",)

    def __init__(self, layers: tuple[LayerConfig, ...] = LAYERS) -> None:
        self.layers = layers
        self.asked: list[Named] = []

    @hookimpl
    def adapt_config(self, config: Mapping[str, Any]) -> DecoderConfig | None:
        if config["model_type"] != "patchwork":
            return None
        return DecoderConfig(
            "patchwork", VOCAB, HIDDEN, self.layers, EmbeddingConfig(tied=True), NORM, LogitsConfig(), 128
        )

    @hookimpl
    def provide_torch_module(self, part: Named, config: DecoderConfig) -> Callable[[], nn.Module] | None:
        self.asked.append(part)
        kind = {"squared_relu": SquaredRelu, "two_spans": TwoSpans}.get(part.name)
        return None if kind is None else lambda: kind(config.hidden_size, **part.options)


# ---------------------------------------------------------------- the same, by hand


def random_weights() -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for i, layer in enumerate(LAYERS):
        at = f"model.layers.{i}"
        shapes[f"{at}.input_layernorm.weight"] = (HIDDEN,)
        if layer.mlp is not None:
            shapes[f"{at}.post_attention_layernorm.weight"] = (HIDDEN,)
        if layer.mixer is PLAIN:
            shapes |= {f"{at}.self_attn.{n}_proj.weight": (r, HIDDEN) for n, r in (("q", 24), ("k", 12), ("v", 12))}
            shapes[f"{at}.self_attn.o_proj.weight"] = (HIDDEN, 24)
        else:
            shapes |= {f"{at}.self_attn.rows": (36, HIDDEN), f"{at}.self_attn.out": (HIDDEN, 12)}
        if layer.mlp is SQUARED:
            shapes |= {f"{at}.mlp.up.weight": (FFN, HIDDEN), f"{at}.mlp.up.bias": (FFN,)}
            shapes[f"{at}.mlp.down.weight"] = (HIDDEN, FFN)
        elif layer.mlp is not None:
            shapes |= {f"{at}.mlp.{n}_proj.weight": (FFN, HIDDEN) for n in ("gate", "up")}
            shapes[f"{at}.mlp.down_proj.weight"] = (HIDDEN, FFN)
    generator = torch.Generator().manual_seed(0)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def reference(tokens: list[int]) -> Tensor:
    """Return logits (len(tokens), VOCAB), in float64, from scores of all pairs of positions."""
    w = {name: tensor.double() for name, tensor in random_weights().items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[name]

    def head(q: Tensor, k: Tensor, v: Tensor, span: int = 1000) -> Tensor:
        distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
        scores = (q @ k.T / q.shape[1] ** 0.5).masked_fill((distance < 0) | (distance >= span), float("-inf"))
        return scores.softmax(-1) @ v

    def mixed(x: Tensor, at: str, mixer: AttentionConfig | Named) -> Tensor:
        if isinstance(mixer, Named):
            q, k, v, nq, nk, nv = (x @ w[f"{at}.rows"].T).split((8, 8, 8, 4, 4, 4), -1)
            wave = (0.1 * torch.arange(len(x), dtype=torch.float64)).sin()[:, None]
            near = head(nq + wave, nk + wave, nv + wave, mixer.options["span"])
            return torch.cat((head(q, k, v), -near), -1) @ w[f"{at}.out"].T
        q, k, v = (x @ w[f"{at}.{n}_proj.weight"].T for n in "qkv")
        heads = [
            head(q[:, 6 * h : 6 * h + 6], k[:, 6 * (h // 2) :][:, :6], v[:, 6 * (h // 2) :][:, :6]) for h in range(4)
        ]
        return torch.cat(heads, -1) @ w[f"{at}.o_proj.weight"].T

    def mlp(x: Tensor, at: str, part: MlpConfig | Named) -> Tensor:
        if isinstance(part, Named):
            up = (x @ w[f"{at}.up.weight"].T + w[f"{at}.up.bias"]).clamp(min=0) ** 2
            return up @ w[f"{at}.down.weight"].T
        gate, up = (x @ w[f"{at}.{n}_proj.weight"].T for n in ("gate", "up"))
        return (gate / (1 + (-gate).exp()) * up) @ w[f"{at}.down_proj.weight"].T

    x = w["model.embed_tokens.weight"][tokens]
    for i, layer in enumerate(LAYERS):
        at = f"model.layers.{i}"
        x = x + mixed(norm(x, f"{at}.input_layernorm.weight"), f"{at}.self_attn", layer.mixer)
        if layer.mlp is not None:
            x = x + mlp(norm(x, f"{at}.post_attention_layernorm.weight"), f"{at}.mlp", layer.mlp)
    return norm(x, "model.norm.weight") @ w["model.embed_tokens.weight"].T


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("patchwork")
    (folder / "config.json").write_text(json.dumps({"model_type": "patchwork"}))
    save_file(random_weights(), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    "options",
    [{}, {"max_num_batched_tokens": 16}, {"kv_cache_memory": 8 * 16 * 2 * 4 * (2 * 12 + 2 * 12)}],
    ids=["in_one_batch", "in_chunks", "with_preemption"],
)
def test_answers_are_those_of_the_same_by_hand(pm: PluginManager, folder: Path, options: dict[str, Any]) -> None:
    plugin = Plugin()
    pm.register(plugin, "patchwork")
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in (1, 15, 30, 45)]
    params = SamplingParams(temperature=0, max_tokens=6, prompt_logprobs=0, logprobs=0, ignore_eos=True)
    with LLM(folder, plugin_manager=pm, **options) as llm:
        assert llm.choice.plugin == "torch"
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
        assert (llm.engine.stats().num_preemptions > 0) == ("kv_cache_memory" in options)
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = [*prompt, *output.outputs[0].token_ids]
        expected = reference(tokens).log_softmax(-1)
        assert tokens[len(prompt) :] == expected[len(prompt) - 1 : -1].argmax(-1).tolist()
        entries = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        for row, token, entry in zip(expected, tokens[1:], entries, strict=False):
            assert abs(entry[token].logprob - row[token].item()) < 1e-4
    assert plugin.asked == [SQUARED, LAYERS[1].mixer, LAYERS[3].mixer]


def test_parameters_and_how_they_are_cut(pm: PluginManager, folder: Path) -> None:
    pm.register(Plugin(), "patchwork")
    with LLM(folder, plugin_manager=pm) as llm:
        specs = llm.backend.parameters()
        assert specs.keys() == {*random_weights(), "lm_head.weight"}
        assert specs["model.layers.3.mlp.down.weight"].shard == Shard(1)
        assert specs["model.layers.3.self_attn.rows"].shard is None
        per_token = 2 * (2 * 12 + 2 * (8 + 4))
        assert llm.backend.cache_spec().bytes_per_block == 16 * per_token * 4


def test_a_second_load_keeps_the_addresses(pm: PluginManager, folder: Path) -> None:
    pm.register(Plugin(), "patchwork")
    with LLM(folder, plugin_manager=pm) as llm:
        backend, weights = llm.backend, random_weights()
        addresses = {name: backend.destination(name).data_ptr() for name in weights}
        for name, tensor in weights.items():
            backend.destination(name).copy_(tensor)
            backend.loaded(name)
        backend.finish_loading()
        assert {name: backend.destination(name).data_ptr() for name in weights} == addresses
        (answer,) = llm.generate({"prompt_token_ids": [1, 2, 3]}, SamplingParams(temperature=0, max_tokens=1))
        assert answer.outputs[0].token_ids[0] == reference([1, 2, 3])[-1].argmax()


def test_export_gives_back_what_was_loaded(pm: PluginManager, folder: Path, tmp_path: Path) -> None:
    pm.register(Plugin(), "patchwork")
    with LLM(folder, plugin_manager=pm) as llm:
        llm.export(tmp_path / "out")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == random_weights().keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in random_weights().items())


# ---------------------------------------------------------------- what is refused


def refusal_of(pm: PluginManager, folder: Path, plugin: object, kind: type[Exception] = UnavailableError) -> str:
    pm.register(plugin, "patchwork")
    with pytest.raises(kind) as caught:
        LLM(folder, plugin_manager=pm)
    return str(caught.value)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (LayerConfig(Named("mamba9"), None, NORMS), r"layer 1: its mixer is Named\('mamba9'\), and no plugin supplies"),
        (LayerConfig(PLAIN, Named("kan"), NORMS), r"layer 1: its MLP is Named\('kan'\), and no plugin supplies"),
    ],
)
def test_part_that_nobody_supplies_is_declined_by_name(
    pm: PluginManager, folder: Path, layer: LayerConfig, reason: str
) -> None:
    message = refusal_of(pm, folder, Plugin((LAYERS[0], layer)))
    assert re.search(rf"no backend runs this patchwork: .*torch: the torch backend does not run {reason}", message)


def test_weights_that_are_missing_are_named(pm: PluginManager, tmp_path: Path, folder: Path) -> None:
    weights = random_weights()
    weights["model.layers.1.self_attn.row"] = weights.pop("model.layers.1.self_attn.rows")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(weights, tmp_path / "model.safetensors")
    message = refusal_of(pm, tmp_path, Plugin(), PlanError)
    assert "model.layers.1.self_attn.rows is missing; did a rule mean it by model.layers.1.self_attn.row?" in message


class Answering(Plugin):
    def __init__(self, answer: Any) -> None:
        super().__init__((LayerConfig(PLAIN, SQUARED, NORMS),))
        self.answer = answer

    @hookimpl
    def provide_torch_module(self, part: Named, config: DecoderConfig) -> Any:
        return self.answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (3, "plugin 'patchwork' answered provide_torch_module with 3, and a function that makes a torch.nn.Module"),
        (lambda: 3, "model.layers.0.mlp is to be a torch.nn.Module, and is 3"),
    ],
)
def test_answer_that_is_no_module(pm: PluginManager, folder: Path, answer: Any, message: str) -> None:
    assert message in refusal_of(pm, folder, Answering(answer), PluginError)


class Narrow(nn.Module):
    def forward(self, hidden: Tensor, positions: Tensor | None = None) -> Tensor:
        return hidden[:, :1]


@pytest.mark.parametrize("where", ["mixer", "mlp"])
def test_module_that_returns_another_shape(pm: PluginManager, tmp_path: Path, folder: Path, where: str) -> None:
    norms = LayerNorms(before_mixer=NORM)
    part = Named("narrow")
    plugin = Answering(Narrow)
    plugin.layers = (LayerConfig(part if where == "mixer" else PLAIN, part if where == "mlp" else None, norms),)
    names = [n for n in random_weights() if ".layers." not in n or n.startswith("model.layers.2.")]
    names = [n for n in names if where == "mlp" or "self_attn" not in n]
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file({n.replace("layers.2", "layers.0"): random_weights()[n] for n in names}, tmp_path / "model.safetensors")
    pm.register(plugin, "patchwork")
    with LLM(tmp_path, plugin_manager=pm) as llm, pytest.raises(PluginError) as caught:
        llm.generate({"prompt_token_ids": [1, 2, 3]})
    name = {"mixer": "self_attn", "mlp": "mlp"}[where]
    assert f"the module of 'model.layers.0.{name}' returned (3, 1) for (3, 24)" in str(caught.value)
