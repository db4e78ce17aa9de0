"""Adding a family touches one file: a new one, written here, run from a temporary folder with `-p`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from infinilm_hookspecs import (
    AttentionConfig,
    DecoderConfig,
    EmbeddingConfig,
    LayerConfig,
    LayerNorms,
    LogitsConfig,
    MlpConfig,
    NormConfig,
    RopeConfig,
    parameters,
)

FAMILY = '''
"""parrot: no checkpoint of any other family is like it; it becomes a DecoderConfig by itself."""
from infinilm_hookspecs import (
    AttentionConfig, DecoderConfig, EmbeddingConfig, LayerConfig, LayerNorms, LogitsConfig, MlpConfig, NormConfig,
    RopeConfig, hookimpl,
)

model_types = ("parrot",)

@hookimpl
def adapt_config(config):
    if config["model_type"] != "parrot":
        return None
    norm = NormConfig(eps=1e-5)
    layer = LayerConfig(
        mixer=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=config["width"] // 2, rope=RopeConfig()),
        mlp=MlpConfig(intermediate_size=2 * config["width"]),
        norms=LayerNorms(before_mixer=norm, before_mlp=norm),
    )
    return DecoderConfig(
        model_type="parrot", vocab_size=config["words"], hidden_size=config["width"],
        layers=(layer,) * config["depth"], embedding=EmbeddingConfig(), final_norm=norm, logits=LogitsConfig(),
        max_position_embeddings=64,
    )

@hookimpl
def remap_weight(config):
    if config["model_type"] == "parrot":
        return lambda weight: weight.rename(weight.name.removeprefix("parrot."))
'''


def test_family_in_one_file_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "parrot.py").write_text(FAMILY)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "parrot", "words": 11, "width": 16, "depth": 2}))
    norm = NormConfig(eps=1e-5)
    layer = LayerConfig(
        AttentionConfig(2, 1, 8, RopeConfig()), MlpConfig(32), LayerNorms(before_mixer=norm, before_mlp=norm)
    )
    config = DecoderConfig("parrot", 11, 16, (layer,) * 2, EmbeddingConfig(), norm, LogitsConfig(), 64)
    torch.manual_seed(0)
    stored = {f"parrot.{name}": torch.randn(spec.shape) for name, spec in parameters(config).items()}
    save_file(stored, model / "model.safetensors")
    words = ["-p", str(tmp_path / "parrot.py"), "inspect", str(model), "--json"]
    done = subprocess.run([sys.executable, "-m", "infinilm", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["errors"] == []
    assert [step["model_type"] for step in report["lineage"]] == ["parrot", "parrot"]
    assert report["plan"]["num_tensors"] == len(stored)
