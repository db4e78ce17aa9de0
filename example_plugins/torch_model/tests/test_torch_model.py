"""parallax, held against an implementation of its own: all positions at once, in float64, without a cache."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from infinilm import LLM, SamplingParams
from infinilm_hookspecs import ConfigError, InfinilmError, PlanError, UnavailableError

CONFIG: dict[str, Any] = {
    "model_type": "parallax",
    "vocab_size": 54,
    "max_position_embeddings": 128,
    "width": 32,
    "depth": 3,
    "heads": 6,
    "kv_heads": 2,
    "head_dim": 8,
    "rotary_dim": 4,
    "rope_base": 100.0,
    "ffn_width": 40,
    "window": 7,
    "norm_eps": 1e-5,
}
LENGTHS = (1, 2, 15, 16, 30, 45, 75, 100)
MAX_TOKENS = 8


# ---------------------------------------------------------------- the reference


def random_weights(seed: int = 0) -> dict[str, Tensor]:
    c = CONFIG
    queries, keys = c["heads"] * c["head_dim"], c["kv_heads"] * c["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"embed.table": (c["vocab_size"], c["width"]), "norm.gain": (c["width"],)}
    for i in range(c["depth"]):
        shapes |= {
            f"blocks.{i}.norm.gain": (c["width"],),
            f"blocks.{i}.mix.wqkv": (queries + 2 * keys, c["width"]),
            f"blocks.{i}.mix.gate": (c["heads"], c["width"]),
            f"blocks.{i}.mix.wo": (c["width"], queries),
            f"blocks.{i}.ffn.up": (c["ffn_width"], c["width"]),
            f"blocks.{i}.ffn.down": (c["width"], c["ffn_width"]),
        }
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.25 * torch.randn(shape, generator=generator) + name.endswith("gain") for name, shape in shapes.items()
    }


def reference_logits(weights: Mapping[str, Tensor], tokens: list[int]) -> Tensor:
    """Return logits (len(tokens), vocab_size): every position attends to every earlier one, by a loop over heads."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    x = w["embed.table"][tokens]
    for i in range(CONFIG["depth"]):
        n = reference_norm(x, w[f"blocks.{i}.norm.gain"])
        ffn = (n @ w[f"blocks.{i}.ffn.up"].T).clamp(min=0) ** 2 @ w[f"blocks.{i}.ffn.down"].T
        x = x + reference_mix(n, w, i) + ffn
    return reference_norm(x, w["norm.gain"]) @ w["embed.table"].T


def reference_mix(n: Tensor, w: Mapping[str, Tensor], i: int) -> Tensor:
    heads, kv_heads, dim = CONFIG["heads"], CONFIG["kv_heads"], CONFIG["head_dim"]
    rows = n @ w[f"blocks.{i}.mix.wqkv"].T
    gates = 1 / (1 + torch.exp(-n @ w[f"blocks.{i}.mix.gate"].T))
    distance = torch.arange(len(n))[:, None] - torch.arange(len(n))
    is_seen = (distance >= 0) & (distance < (CONFIG["window"] if i % 2 == 0 else len(n)))
    parts = []
    for head in range(heads):
        kv_head = head // (heads // kv_heads)
        query = reference_rotated(rows[:, head * dim :][:, :dim])
        key = reference_rotated(rows[:, (heads + kv_head) * dim :][:, :dim])
        value = rows[:, (heads + kv_heads + kv_head) * dim :][:, :dim]
        scores = (query @ key.T / dim**0.5).masked_fill(~is_seen, float("-inf"))
        parts.append(scores.softmax(-1) @ value * gates[:, head, None])
    return torch.cat(parts, 1) @ w[f"blocks.{i}.mix.wo"].T


def reference_rotated(head: Tensor) -> Tensor:
    """Turn every pair of the first elements as a complex number, by an angle that grows with the position."""
    dim = CONFIG["rotary_dim"]
    speeds = torch.tensor([CONFIG["rope_base"] ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float64)
    turn = torch.exp(1j * torch.arange(len(head))[:, None] * speeds)
    turned = torch.view_as_real(torch.view_as_complex(head[:, :dim].reshape(len(head), -1, 2)) * turn)
    return torch.cat((turned.flatten(1), head[:, dim:]), 1)


def reference_norm(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + CONFIG["norm_eps"]).sqrt() * gain


# ---------------------------------------------------------------- the same answers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("parallax"), random_weights())


def write(folder: Path, weights: Mapping[str, Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(dict(weights), folder / "model.safetensors")
    return folder


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(CONFIG["vocab_size"], (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.mark.parametrize(
    "options",
    [{}, {"max_num_batched_tokens": 24}, {"kv_cache_memory": 11 * 3 * 2 * 16 * 2 * 8 * 4}],
    ids=["in_one_batch", "in_chunks", "with_preemption"],
)
def test_answers_are_the_references(folder: Path, options: dict[str, Any]) -> None:
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, prompt_logprobs=0, logprobs=0, ignore_eos=True)
    with LLM(folder, **options) as llm:
        assert llm.choice.plugin == "torch_model"
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts()], params)
        assert (llm.engine.stats().num_preemptions > 0) == ("kv_cache_memory" in options)
    for prompt, output in zip(prompts(), outputs):
        answer = output.outputs[0]
        tokens = [*prompt, *answer.token_ids]
        logits = reference_logits(random_weights(), tokens)
        assert list(answer.token_ids) == logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        entries = [*output.prompt_logprobs[1:], *answer.logprobs]
        said = [entry[token].logprob for token, entry in zip(tokens[1:], entries, strict=True)]
        expected = logits.log_softmax(-1)[torch.arange(len(tokens) - 1), tokens[1:]]
        torch.testing.assert_close(torch.tensor(said, dtype=torch.float64), expected, atol=1e-4, rtol=0)


def test_bfloat16_stays_near(folder: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    prompt = prompts()[4]
    with LLM(folder, dtype="bfloat16") as llm:
        (output,) = llm.generate({"prompt_token_ids": prompt}, params)
    logprobs = reference_logits(random_weights(), prompt).log_softmax(-1)
    for row, token, entry in zip(logprobs, prompt[1:], output.prompt_logprobs[1:], strict=False):
        assert abs(entry[token].logprob - row[token].item()) < 0.5


# ---------------------------------------------------------------- what is said of it


def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "infinilm", *map(str, words)], capture_output=True, text=True, check=False
    )


def test_inspect_plans_two_ranks(folder: Path) -> None:
    done = command("inspect", folder, "--tensor-parallel-size", "2", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["backend"]["plugin"] == "torch_model"
    weights = random_weights()
    whole = {name: tensor.nbytes for name, tensor in weights.items() if name.endswith("gain")}
    halves = sum(tensor.nbytes for name, tensor in weights.items() if name not in whole) // 2
    assert [rank["num_bytes"] for rank in report["ranks"]] == [sum(whole.values()) + halves] * 2


def test_inspect_says_what_four_ranks_cannot_share(folder: Path) -> None:
    done = command("inspect", folder, "--tensor-parallel-size", "4")
    assert done.returncode == 2
    # 6 heads of queries and 2 of keys for 4 ranks
    assert "mix.wqkv: {16,48} rows of dimension 0 cannot be cut for 4 ranks at multiples of 8" in done.stdout


def test_listing_plugins_imports_no_torch() -> None:
    code = (
        "import sys; from infinilm.cli import main; code = main(['plugins', 'list']); "
        "print([m for m in ('torch', 'infinilm_torch_model.parallax') if m in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    listed = next(line for line in done.stdout.splitlines() if line.startswith("torch_model"))
    assert "infinilm-torch-model" in listed
    assert done.stdout.splitlines()[-1] == "[]"


# ---------------------------------------------------------------- what is wrong with it


def refusal_of(folder: Path, kind: type[InfinilmError]) -> str:
    with pytest.raises(kind) as caught:
        LLM(folder)
    return str(caught.value)


def test_weights_that_do_not_fit_are_all_named(tmp_path: Path) -> None:
    weights = random_weights()
    weights["blocks.1.mix.wvkq"] = weights.pop("blocks.1.mix.wqkv")
    weights["blocks.2.ffn.up"] = weights["blocks.2.ffn.up"][:-1]
    weights["blocks.0.mix.bias"] = torch.zeros(32)
    message = refusal_of(write(tmp_path, weights), PlanError)
    assert "blocks.1.mix.wqkv is missing; did a rule mean it by blocks.1.mix.wvkq?" in message
    assert "blocks.2.ffn.up is [39, 32] from blocks.2.ffn.up, and the model needs [40, 32]" in message
    assert "blocks.0.mix.bias [32] is no parameter of this model" in message


def test_config_with_more_than_it_knows_is_declined(tmp_path: Path) -> None:
    message = refusal_of(write(tmp_path, random_weights(), moe_experts=4), UnavailableError)
    assert "no backend runs this parallax: " in message
    assert "torch_model: parallax does not know 'moe_experts' of this config" in message


def test_config_that_is_incomplete(tmp_path: Path) -> None:
    write(tmp_path, random_weights())
    config = {key: value for key, value in CONFIG.items() if key not in ("rope_base", "window")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "the config of this parallax lacks rope_base, window" in refusal_of(tmp_path, ConfigError)


def test_quantized_checkpoint_is_declined_by_name(tmp_path: Path) -> None:
    quantized = {"quantization_config": {"quant_method": "hqq", "bits": 3}}
    message = refusal_of(write(tmp_path, random_weights(), **quantized), UnavailableError)
    assert "parallax does not know 'quantization_config' of this config" in message


def test_no_room_for_the_cache(folder: Path) -> None:
    with pytest.raises(UnavailableError, match="the cache has 1024 bytes"):
        LLM(folder, kv_cache_memory=1024)


# ---------------------------------------------------------------- and back


@pytest.mark.parametrize("is_original", [False, True])
def test_export_gives_back_what_was_loaded(folder: Path, tmp_path: Path, is_original: bool) -> None:
    with LLM(folder) as llm:
        llm.export(tmp_path / "out", original=is_original)
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == random_weights().keys()
    for name, tensor in random_weights().items():
        assert torch.equal(exported[name], tensor), name
    with LLM(tmp_path / "out") as llm:
        assert llm.choice.plugin == "torch_model"
