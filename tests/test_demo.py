"""The demo model through every door a plugin has, and without transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from infinilm import LLM, SamplingParams
from infinilm.plugins import ModelSpec, PluginManager, create_plugin_manager
from infinilm.plugins.discovery import import_file
from infinilm_hookspecs import Weight, WeightRule, hookimpl

MINIMAL = Path(__file__).parent.parent / "example_plugins" / "minimal"
FILE = str(MINIMAL / "infinilm_minimal.py")
PROMPTS = ["seven plus eight is", "forty-one minus ninety is", "sixty-six plus thirteen is"]
ANSWERS = [" fifteen", " minus forty-nine", " seventy-nine"]


class HandWritten:
    """The same model, by hooks written out: rules are functions of one weight."""

    @hookimpl
    def adapt_config(self, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
        if config["model_type"] != "abacus":
            return None
        return {
            "model_type": "llama",
            "vocab_size": config["vocabulary"],
            "hidden_size": config["width"],
            "num_hidden_layers": config["depth"],
            "num_attention_heads": config["heads"],
            "num_key_value_heads": config["kv_heads"],
            "intermediate_size": config["ffn_width"],
            "max_position_embeddings": config["context"],
            "rope_theta": config["rope_base"],
            "rms_norm_eps": config["norm_epsilon"],
            "tie_word_embeddings": True,
        }

    @hookimpl
    def remap_weight(self, config: Mapping[str, Any]) -> WeightRule | None:
        if config["model_type"] != "abacus":
            return None
        head_dim = config["width"] // config["heads"]
        sizes = {
            "attn.qkv": [config["width"], config["kv_heads"] * head_dim, config["kv_heads"] * head_dim],
            "mlp.gate_up": [config["ffn_width"]] * 2,
        }
        names = {
            "attn.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            "mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
            "attn.out": ["self_attn.o_proj"],
            "mlp.down": ["mlp.down_proj"],
            "attn_norm": ["input_layernorm"],
            "mlp_norm": ["post_attention_layernorm"],
        }
        tops = {"tok": "model.embed_tokens", "final_norm": "model.norm"}

        def rule(weight: Weight) -> Sequence[Weight] | Weight:
            stem = weight.name.removesuffix(".weight")
            if stem in tops:
                return weight.rename(f"{tops[stem]}.weight")
            _, layer, part = stem.split(".", 2)
            parts = weight.split(sizes.get(part, weight.shape[0]))
            renamed = zip(names[part], parts, strict=True)
            return [piece.rename(f"model.layers.{layer}.{name}.weight") for name, piece in renamed]

        return rule


def spec() -> ModelSpec:
    """The same model as data, its remapper written for a state dict of tensors."""

    def remap(weights: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
        out = {"model.embed_tokens.weight": weights["tok.weight"], "model.norm.weight": weights["final_norm.weight"]}
        kv = config["width"] // config["heads"] * config["kv_heads"]
        for i in range(config["depth"]):
            ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
            qkv = weights[ours + "attn.qkv.weight"]
            out[theirs + "self_attn.q_proj.weight"] = qkv[: config["width"]]
            out[theirs + "self_attn.k_proj.weight"] = qkv[config["width"] : config["width"] + kv]
            out[theirs + "self_attn.v_proj.weight"] = qkv[config["width"] + kv :]
            gate, up = weights[ours + "mlp.gate_up.weight"].chunk(2, dim=0)
            out[theirs + "mlp.gate_proj.weight"], out[theirs + "mlp.up_proj.weight"] = gate, up
            out[theirs + "self_attn.o_proj.weight"] = weights[ours + "attn.out.weight"]
            out[theirs + "mlp.down_proj.weight"] = weights[ours + "mlp.down.weight"]
            out[theirs + "input_layernorm.weight"] = weights[ours + "attn_norm.weight"]
            out[theirs + "post_attention_layernorm.weight"] = weights[ours + "mlp_norm.weight"]
        return out

    adapter = {
        "vocab_size": "$vocabulary",
        "hidden_size": "$width",
        "num_hidden_layers": "$depth",
        "num_attention_heads": "$heads",
        "num_key_value_heads": "$kv_heads",
        "intermediate_size": "$ffn_width",
        "max_position_embeddings": lambda config: config["context"],
        "rope_theta": "$rope_base",
        "rms_norm_eps": "$norm_epsilon",
        "tie_word_embeddings": True,
    }
    return ModelSpec(model_type="abacus", backend_model_type="llama", config_adapter=adapter, weight_remapper=remap)


def spec_of_callables() -> ModelSpec:
    """The same model as data, by the other kinds: a callable adapter, then a table, then a rule of one weight."""
    hand_written = HandWritten()

    def adapt(config: dict[str, Any]) -> Mapping[str, Any]:
        return hand_written.adapt_config(config) or {}

    def split_gate_up(weight: Weight) -> Any:
        if not weight.name.endswith(".gate_up"):
            return None
        gate, up = weight.chunk(2)
        stem = weight.name.removesuffix("gate_up")
        return [gate.rename(f"{stem}gate_proj.weight"), up.rename(f"{stem}up_proj.weight")]

    def split_qkv(weight: Weight, i: int) -> list[Weight]:
        names = [f"model.layers.{i}.self_attn.{letter}_proj.weight" for letter in "qkv"]
        return [part.rename(name) for name, part in zip(names, weight.split([128, 64, 64]), strict=True)]

    table = {
        "tok.weight": "model.embed_tokens.weight",
        "blocks.{i}.attn_norm.weight": "model.layers.{i}.input_layernorm.weight",
        "blocks.{i}.attn.qkv.weight": split_qkv,
        "blocks.{i}.attn.out.weight": "model.layers.{i}.self_attn.o_proj.weight",
        "blocks.{i}.mlp_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
        "blocks.{i}.mlp.gate_up.weight": "model.layers.{i}.mlp.gate_up",
        "blocks.{i}.mlp.down.weight": "model.layers.{i}.mlp.down_proj.weight",
        "final_norm.weight": "model.norm.weight",
    }
    return ModelSpec(
        model_types=("abacus", "abacus-2"),
        config_adapter=adapt,
        weight_rules=(table, split_gate_up),
        use_builtin_weight_remapper=False,
        processor="huggingface",
    )


def registered(plugin: object) -> PluginManager:
    pm = create_plugin_manager(autoload=False)
    pm.register(plugin)
    return pm


DOORS = {
    "hooks written by hand": lambda: registered(HandWritten()),
    "pm.register(module)": lambda: registered(import_file(Path(FILE))),
    "ModelSpec": lambda: registered(spec()),
    "ModelSpec of callables and rules": lambda: registered(spec_of_callables()),
    "file": lambda: create_plugin_manager(plugins=[FILE], autoload=False),
    "entry point": lambda: create_plugin_manager(),
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_leads_to_the_same_text_and_numbers(door: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=16, logprobs=0)
    with LLM(MINIMAL / "model", plugin_manager=DOORS[door]()) as llm:
        results = llm.generate(PROMPTS, params)
    with LLM(MINIMAL / "model", plugins=["no:minimal", FILE]) as llm:
        expected = llm.generate(PROMPTS, params)
    assert [result.outputs[0].text for result in results] == ANSWERS
    for result, other in zip(results, expected, strict=True):
        assert result.outputs[0].logprobs == other.outputs[0].logprobs


@pytest.mark.parametrize("words", [("-p", FILE, "generate"), ("generate", "-p", FILE), ("generate",)])
def test_command_line_with_the_plugin_as_a_file_and_installed(words: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "infinilm", *words, str(MINIMAL / "model"), "--json", "--temperature", "0"]
    for prompt in PROMPTS:
        command += ["--prompt", prompt]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout)
    assert [row["text"] for row in rows] == ANSWERS
    assert [row["prompt"] for row in rows] == PROMPTS
    assert done.stderr == ""


def test_chat_answers_through_the_template_that_lies_beside_the_model() -> None:
    with LLM(MINIMAL / "model") as llm:
        (result,) = llm.chat([{"role": "user", "content": "seven plus eight"}], SamplingParams(temperature=0))
    assert result.outputs[0].text.strip() == "fifteen"
    assert result.outputs[0].finish_reason == "stop"


def test_demo_generates_without_transformers() -> None:
    code = f"""
import sys
sys.modules["transformers"] = None
from infinilm import LLM
print(LLM({str(MINIMAL / "model")!r}).generate({PROMPTS[0]!r})[0].outputs[0].text)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{ANSWERS[0]}\n"


def test_without_the_plugin_the_error_names_the_model_type_and_where_it_is_from() -> None:
    command = [
        sys.executable,
        "-m",
        "infinilm",
        "-p",
        "no:minimal",
        "generate",
        str(MINIMAL / "model"),
        "--prompt",
        "x",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("infinilm: error: no plugin adapts model_type 'abacus' (in '")
    assert "known: " in line
