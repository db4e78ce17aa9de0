"""The backend in plain C++: built with CMake against the headers of this environment, it conforms and gives reasons."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import infinilm
from infinilm.native.libraries import BackendLibrary, open_library
from infinilm.testing import DECODERS, ConformanceReport, decoder_cases, make_request, run_conformance
from infinilm_hookspecs import (
    AttentionConfig,
    DecoderConfig,
    EmbeddingConfig,
    LayerConfig,
    LayerNorms,
    LinearRopeScaling,
    LogitsConfig,
    MlpConfig,
    NormConfig,
    RopeConfig,
)

SOURCE = Path(__file__).parent.parent
LAYER = LayerConfig(
    AttentionConfig(4, 2, 8, RopeConfig()),
    MlpConfig(24),
    LayerNorms(before_mixer=NormConfig(), before_mlp=NormConfig()),
)
LLAMA = DecoderConfig("llama", 97, 32, (LAYER, LAYER), EmbeddingConfig(), NormConfig(), LogitsConfig(), 128)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> BackendLibrary:
    build = tmp_path_factory.mktemp("build")
    found = f"-Dinfinilm_DIR={infinilm.get_cmake_dir()}"
    for command in (["cmake", "-S", SOURCE, "-B", build, found], ["cmake", "--build", build]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return open_library(build / "plain.so")


def conformance(library: BackendLibrary, decoders: dict[str, DecoderConfig]) -> list[ConformanceReport]:
    return [run_conformance(case) for case in decoder_cases(library.provide_backend, decoders=decoders)]


@pytest.mark.parametrize("tied", [False, True])
def test_backend_conforms_on_the_model_it_runs(library: BackendLibrary, tied: bool) -> None:
    (report,) = conformance(library, {"llama": replace(LLAMA, embedding=EmbeddingConfig(tied=tied))})
    assert report.has_passed, str(report)


def test_other_models_of_the_suite_are_declined(library: BackendLibrary) -> None:
    taken = [name for name, config in DECODERS.items() if library.provide_backend(make_request(config)) is not None]
    assert taken == ["dense"]


def layer(**changes: Any) -> DecoderConfig:
    return replace(LLAMA, layers=(LAYER, replace(LAYER, **changes)))


def attention(**changes: Any) -> DecoderConfig:
    return layer(mixer=replace(LAYER.mixer, **changes))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (attention(sliding_window=4), "layers[1].mixer has 'sliding_window', which this backend does not know"),
        (attention(rope=RopeConfig(scaling=LinearRopeScaling(2.0))), "layers[1].mixer.rope has 'scaling', which"),
        (attention(rope=None), "layers[1].mixer.rope is missing"),
        (attention(head_dim=7), "layers[1].mixer has heads that cannot be shared or rotated"),
        (layer(mlp=MlpConfig(24, activation="gelu")), "layers[1].mlp.activation is 'gelu', and 'silu' is all there is"),
        (layer(mlp=None), "layers[1].mlp is missing"),
        (replace(LLAMA, final_norm=NormConfig(kind="layer")), "final_norm.kind is 'layer', and 'rms' is all there is"),
        (replace(LLAMA, logits=LogitsConfig(softcap=30.0)), "logits has 'softcap', which this backend does not know"),
        (replace(LLAMA, embedding=EmbeddingConfig(scale=2.0)), "embedding has 'scale', which"),
    ],
)
def test_what_it_does_not_know_is_declined_by_its_key(
    library: BackendLibrary, config: DecoderConfig, reason: str
) -> None:
    reasons: list[str] = []
    assert library.provide_backend(replace(make_request(config), on_decline=reasons.append)) is None
    assert len(reasons) == 1
    assert reason in reasons[0]
