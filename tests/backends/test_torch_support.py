"""What the torch backend takes and what it declines: by name, and before torch is imported."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from infinilm.backends import torch as plugin
from infinilm.backends.torch.decoder import ACTIVATIONS
from infinilm.backends.torch.support import ACTIVATIONS as SUPPORTED_ACTIVATIONS
from infinilm.models import llama
from infinilm_hookspecs import (
    BackendRequest,
    DecoderConfig,
    EmbeddingConfig,
    LayerNorms,
    LogitsConfig,
    MlpConfig,
    MoeConfig,
    Named,
    NormConfig,
    Quantization,
    RopeConfig,
)

CONFIG = llama.adapt_config(
    {
        "model_type": "llama",
        "vocab_size": 31,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0},
    }
)
assert CONFIG is not None


def request(config: Any, **changes: Any) -> tuple[BackendRequest, list[str]]:
    reasons: list[str] = []
    fields: dict[str, Any] = {
        "lineage": (config,),
        "checkpoint": SimpleNamespace(quantization=None),
        "platform": SimpleNamespace(memory=lambda device: (1 << 30, 1 << 30)),
        "device": "cpu",
        "dtype": "float32",
        "quantization": None,
        "trust_remote_code": False,
        "rank": 0,
        "world_size": 1,
        "max_model_len": 128,
        "max_num_seqs": 8,
        "on_decline": reasons.append,
    }
    return BackendRequest(**{**fields, **changes}), reasons


def first_layer(**changes: Any) -> DecoderConfig:
    first, second = CONFIG.layers
    return replace(CONFIG, layers=(replace(first, **changes), second))


def mixer(**changes: Any) -> DecoderConfig:
    return first_layer(mixer=replace(CONFIG.layers[0].mixer, **changes))


PACKED = Quantization("gptq", (1, 128), {})


@pytest.mark.parametrize(
    ("config", "changes", "reason"),
    [
        ({"model_type": "qwen9"}, {}, "the torch backend runs a DecoderConfig, and no plugin made one of .*'qwen9'"),
        (first_layer(mixer=Named("mamba2")), {}, r"layer 0: its mixer is Named\('mamba2'\)"),
        (first_layer(mlp=Named("experts")), {}, r"layer 0: its MLP is Named\('experts'\)"),
        (first_layer(mlp=MlpConfig(8, activation="xielu")), {}, "layer 0: its activation is 'xielu'"),
        (first_layer(norms=LayerNorms(NormConfig(kind="group"))), {}, "layer 0: its norm is 'group'"),
        (mixer(num_heads=5), {}, "5 query heads cannot share 2 key-value heads"),
        (mixer(head_dim=7), {}, "a head of 7 has no two halves"),
        (mixer(head_dim=2), {}, "dynamic rope scaling has no base for a head of 2"),
        (mixer(rope=RopeConfig(scaling=Named("longrope"))), {}, r"its rope scaling is Named\('longrope'\)"),
        (first_layer(norms=LayerNorms(after_mlp=NormConfig(kind="group"))), {}, "layer 0: its norm is 'group'"),
        (first_layer(mlp=MoeConfig(4, 2, 8, activation="xielu")), {}, "layer 0: its activation is 'xielu'"),
        (first_layer(mlp=MoeConfig(2, 3, 8)), {}, "layer 0: 3 of 2 experts cannot be chosen"),
        (mixer(sliding_window=0), {}, "layer 0: its sliding window of 0 hides every token from itself"),
        (mixer(softcap=0.0), {}, "layer 0: its scores cannot be capped at 0.0"),
        (mixer(query_key_norm=NormConfig(kind="l2")), {}, "layer 0: its norm is 'l2'"),
        (replace(CONFIG, logits=LogitsConfig(softcap=-1.0)), {}, "cannot cap logits at -1.0"),
        (
            replace(CONFIG, embedding=EmbeddingConfig(num_positions=127)),
            {},
            "finds 127 positions in this model, and max_model_len is 128",
        ),
        (replace(CONFIG, final_norm=NormConfig(kind="group")), {}, "final norm: its norm is 'group'"),
        (replace(CONFIG, quantization=PACKED), {}, "quantized as 'gptq'"),
        (CONFIG, {"lineage": ({"quantization_config": {"quant_method": "hqq", "bits": 3}}, CONFIG)}, "'hqq'.*: bits 3"),
        (CONFIG, {"quantization": "int8"}, "quantization='int8' was asked for"),
        (CONFIG, {"world_size": 2}, "world_size is 2"),
        (CONFIG, {"dtype": "int4"}, "not in 'int4'"),
    ],
)
def test_declines_by_name(config, changes, reason):
    asked, reasons = request(config, **changes)
    assert plugin.provide_backend(asked) is None
    assert len(reasons) == 1
    assert re.search(reason, reasons[0])


def test_takes_the_last_config_it_understands():
    asked, reasons = request({"model_type": "llama"})
    asked = replace(asked, lineage=(*asked.lineage, CONFIG))
    backend = plugin.provide_backend(asked)
    assert backend is not None
    assert backend.config == CONFIG
    assert not reasons


def test_every_activation_it_supports_is_one_it_has():
    assert set(SUPPORTED_ACTIVATIONS) == set(ACTIVATIONS)


def test_declining_imports_no_torch():
    program = (
        "import sys; from infinilm.backends import torch; "
        "from types import SimpleNamespace as N; "
        "torch.provide_backend(N(lineage=[{'model_type': 'acme'}], decline=print)); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
