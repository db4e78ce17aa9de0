"""The parity check must see: every mistake planted here makes it fail, and without one it passes.

Mistakes in weights are planted by editing the stored tensors, mistakes in the config by a wrapper plugin, mistakes in
the arithmetic of the backend by patching it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig

from infinilm import LLM
from infinilm.backends.torch import attention
from infinilm.backends.torch.cache import PagedCache
from infinilm_hookspecs import DecoderConfig, LinearRopeScaling, RopeConfig, hookimpl

HEAD_DIM = 12
WEIGHTS_FILE = "model.safetensors"
# Square where it can be, so that a transposed matrix still fits, and with every bias there is.
CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=72,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    rms_norm_eps=1e-2,
    attention_bias=True,
    mlp_bias=True,
)

Stored = dict[str, Tensor]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> tuple[Path, list[list[int]], list[oracle.Answer]]:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = oracle.write_checkpoint(folder, CONFIG)
    return folder, *oracle.examine(model)


def check(checkpoint, *, folder: Path | None = None, plugins: tuple[object, ...] = ()) -> None:
    original, prompts, expected = checkpoint
    llm = LLM(str(folder or original), platform="cpu", dtype="float32", plugins=plugins)
    oracle.check_parity(llm, prompts, expected)


def test_without_a_mistake_the_check_passes(checkpoint):
    check(checkpoint)


# ---------------------------------------------------------------- in the weights


def layer_names(stored: Stored, part: str) -> list[str]:
    return [name for name in stored if f".{part}." in name]


def edited(*parts: str, edit: Callable[[Tensor], Tensor]) -> Callable[[Stored], Stored]:
    """Return a mistake that replaces every tensor of `parts` by `edit` of it."""

    def mistake(stored: Stored) -> Stored:
        names = {name for part in parts for name in layer_names(stored, part)}
        assert names
        return {name: edit(tensor) if name in names else tensor for name, tensor in stored.items()}

    return mistake


def swapped(one: str, other: str) -> Callable[[Stored], Stored]:
    """Return a mistake that exchanges the names of two parts."""

    def swap(name: str) -> str:
        if f".{one}." in name:
            return name.replace(f".{one}.", f".{other}.")
        return name.replace(f".{other}.", f".{one}.")

    return lambda stored: {swap(name): tensor for name, tensor in stored.items()}


def without_biases(*parts: str) -> Callable[[Stored], Stored]:
    return edited(*parts, edit=lambda tensor: tensor if tensor.ndim == 2 else torch.zeros_like(tensor))


def heads_rolled(tensor: Tensor) -> Tensor:
    return tensor.roll(HEAD_DIM, 0)


def pairs_interleaved(tensor: Tensor) -> Tensor:
    """Store rows as a model does that rotates neighbours instead of halves."""
    return tensor.unflatten(0, (-1, 2, HEAD_DIM // 2)).transpose(1, 2).reshape(tensor.shape)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.T if tensor.ndim == 2 else tensor


def without_last_layer(stored: Stored) -> Stored:
    skipped = ("model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj")
    return {name: tensor * 0 if name.startswith(skipped) else tensor for name, tensor in stored.items()}


def tied_by_mistake(stored: Stored) -> Stored:
    return {**stored, "lm_head.weight": stored["model.embed_tokens.weight"].clone()}


def without_final_norm_weight(stored: Stored) -> Stored:
    return {**stored, "model.norm.weight": torch.ones_like(stored["model.norm.weight"])}


WEIGHT_MISTAKES: dict[str, Callable[[Stored], Stored]] = {
    "norms swapped": swapped("input_layernorm", "post_attention_layernorm"),
    "one added to norms": edited("input_layernorm", edit=lambda weight: weight + 1),
    "final norm's weight ignored": without_final_norm_weight,
    "layers swapped": swapped("0", "1"),
    "a layer skipped": without_last_layer,
    "output tied": tied_by_mistake,
    "q bias dropped": without_biases("q_proj"),
    "k bias dropped": without_biases("k_proj"),
    "v bias dropped": without_biases("v_proj"),
    "output bias dropped": without_biases("o_proj"),
    "mlp biases dropped": without_biases("gate_proj", "up_proj", "down_proj"),
    "q heads permuted": edited("q_proj", edit=heads_rolled),
    "kv heads swapped": edited("k_proj", "v_proj", edit=heads_rolled),
    "k and v swapped": swapped("k_proj", "v_proj"),
    "rope interleaved": edited("q_proj", "k_proj", edit=pairs_interleaved),
    "output transposed": edited("o_proj", edit=transposed),
    "gate and up swapped": swapped("gate_proj", "up_proj"),
}


@pytest.mark.parametrize("mistake", WEIGHT_MISTAKES.values(), ids=WEIGHT_MISTAKES.keys())
def test_mistake_in_the_weights(checkpoint, tmp_path, mistake):
    folder, _, _ = checkpoint
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    stored = mistake(load_file(folder / WEIGHTS_FILE))
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(AssertionError, match="a log-probability is off by"):
        check(checkpoint, folder=tmp_path)


# ---------------------------------------------------------------- in the config


class Mistaken:
    """Wraps whoever makes the `DecoderConfig`, and gets it wrong."""

    def __init__(self, mistake: Callable[[DecoderConfig], DecoderConfig]) -> None:
        self._mistake = mistake

    @hookimpl(wrapper=True)
    def adapt_config(self) -> Generator[None, Any, Any]:
        config = yield
        return self._mistake(config) if isinstance(config, DecoderConfig) else config


def in_mixers(**changes: Any) -> Callable[[DecoderConfig], DecoderConfig]:
    return in_layers(lambda layer: replace(layer, mixer=replace(layer.mixer, **changes)))


def in_layers(change: Callable[[Any], Any]) -> Callable[[DecoderConfig], DecoderConfig]:
    return lambda config: replace(config, layers=tuple(change(layer) for layer in config.layers))


def with_default_eps(norm: Any) -> Any:
    return replace(norm, eps=1e-6)


CONFIG_MISTAKES: dict[str, Callable[[DecoderConfig], DecoderConfig]] = {
    "rope off": in_mixers(rope=None),
    "rope base changed": in_mixers(rope=RopeConfig(theta=20000.0)),
    "rope scaled": in_mixers(rope=RopeConfig(scaling=LinearRopeScaling(2.0))),
    "attention scale of the whole width": in_mixers(scale=48**-0.5),
    "activation changed": in_layers(lambda layer: replace(layer, mlp=replace(layer.mlp, activation="gelu"))),
    "eps of the layers changed": in_layers(
        lambda layer: replace(
            layer,
            norms=replace(
                layer.norms,
                before_mixer=with_default_eps(layer.norms.before_mixer),
                before_mlp=with_default_eps(layer.norms.before_mlp),
            ),
        )
    ),
    "eps of the final norm changed": lambda config: replace(config, final_norm=with_default_eps(config.final_norm)),
    "logits scaled": lambda config: replace(config, logits=replace(config.logits, scale=1.01)),
}


@pytest.mark.parametrize("mistake", CONFIG_MISTAKES.values(), ids=CONFIG_MISTAKES.keys())
def test_mistake_in_the_config(checkpoint, mistake):
    with pytest.raises(AssertionError, match="a log-probability is off by"):
        check(checkpoint, plugins=(Mistaken(mistake),))


# ---------------------------------------------------------------- in the backend


def test_attention_to_the_future(checkpoint, monkeypatch):
    def attend_all(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return right(query, key.flip(0), value.flip(0), scale)

    right = attention._attend_whole
    monkeypatch.setattr(attention, "_attend_whole", attend_all)
    with pytest.raises(AssertionError, match="a log-probability is off by"):
        check(checkpoint)


def test_decoding_from_the_wrong_slots_shows_in_the_tokens_alone(checkpoint, monkeypatch):
    def gather_one_off(self: PagedCache, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        return right(self, layer, slots.roll(1))

    right = PagedCache.gather
    monkeypatch.setattr(PagedCache, "gather", gather_one_off)
    with pytest.raises(AssertionError, match=r"prompt \d: \[.*\], not \["):
        check(checkpoint)
