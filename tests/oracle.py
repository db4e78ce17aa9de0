"""The oracle: transformers on seeded random checkpoints, and the check that an engine agrees with it.

Every parameter is random, norms and biases included: on default initialisation swapped norms change nothing at all.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from infinilm import LLM, SamplingParams

Stored = dict[str, Tensor]

PROMPT_LENGTHS = (1, 2, 15, 16, 30, 45, 75, 100)
MAX_TOKENS = 8
LOGPROB_TOLERANCE = 1e-4
MARGIN = 1e-3
STD = 0.25

# Models this small lose more to threads waiting for each other than they gain: minutes, where the machine is busy.
torch.set_num_threads(1)


@dataclass(frozen=True)
class Answer:
    """What a model says to one prompt: what follows, and the log-probability of every token but the first.

    Tokens alone would not do: many a random model says one and the same whatever it is asked.
    """

    prompt_logprobs: list[float]
    token_ids: list[int]
    logprobs: list[float]


# ---------------------------------------------------------------- checkpoints


def write_checkpoint(folder: Path, config: PreTrainedConfig, *, seed: int = 0, **options: Any) -> PreTrainedModel:
    """Write a checkpoint of `config` as transformers writes it, every parameter random, and return its model.

    `options` are those of `save_pretrained`.
    """
    config._attn_implementation = config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            mean = (
                1.0 if bool((parameter == 1).all()) else 0.0
            )  # weights of norms begin as ones, or what is added to one
            parameter.copy_(mean + STD * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder, **options)
    return model


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Replace the `config.json` in `folder` by `edit` of it."""
    path = folder / "config.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text())), indent=2))


def spelled_as_transformers_4(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config of transformers 5 as version 4 would have written it."""
    old = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype", "layer_types")}
    rope = dict(config.get("rope_parameters") or {})
    if "rope_theta" in rope:
        old["rope_theta"] = rope.pop("rope_theta")
    rope_type = rope.pop("rope_type", "default")
    old["rope_scaling"] = None if rope_type == "default" else {"type": rope_type, **rope}
    return {**old, "torch_dtype": config.get("dtype", "float32")}


def without_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config without the keys whose values are the family's defaults."""
    default = AutoConfig.for_model(config["model_type"]).to_dict()
    kept = ("model_type", "architectures")
    return {key: value for key, value in config.items() if key in kept or value != default.get(key)}


def edit_tensors(folder: Path, edit: Callable[[Stored], Stored], *, target: Path | None = None) -> None:
    """Replace the tensors stored in `folder` by `edit` of them, or write that to `target`."""
    name = "model.safetensors"
    stored = edit(load_file(folder / name))
    save_file({key: tensor.contiguous() for key, tensor in stored.items()}, (target or folder) / name)


# ---------------------------------------------------------------- answers


def examine(model: PreTrainedModel, lengths: Sequence[int] = PROMPT_LENGTHS) -> tuple[list[list[int]], list[Answer]]:
    """Return a random prompt of each length, and what transformers says to it alone, in float32, greedily.

    Prompts are drawn again, with the next seed, until one token is the likeliest by a margin at every step: rounding
    errors cannot change it then.
    """
    answers = (_examine(model, lengths, seed) for seed in itertools.count())
    return next(answer for answer in answers if answer is not None)


def _examine(model: PreTrainedModel, lengths: Sequence[int], seed: int) -> tuple[list[list[int]], list[Answer]] | None:
    generator = torch.Generator().manual_seed(seed)
    vocab_size = model.config.vocab_size
    prompts = [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]
    answers = [_oracle_answer(model, prompt) for prompt in prompts]
    decided = [answer for answer in answers if answer is not None]
    return (prompts, decided) if len(decided) == len(prompts) else None


@torch.no_grad()
def _oracle_answer(model: PreTrainedModel, prompt: list[int]) -> Answer | None:
    # A copy, because dynamic rope remembers the longest sequence it has seen.
    logits = copy.deepcopy(model)(torch.tensor([prompt])).logits[0]  # (prompt_length, vocab_size)
    generated = copy.deepcopy(model).generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=MAX_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    next_logits = torch.cat(generated.logits)  # (MAX_TOKENS, vocab_size)
    best, second = next_logits.topk(2).values.unbind(1)
    if (best - second).min() < MARGIN:
        return None
    token_ids = generated.sequences[0, len(prompt) :].tolist()
    return Answer(_logprobs(logits[:-1], prompt[1:]), token_ids, _logprobs(next_logits, token_ids))


def _logprobs(logits: Tensor, token_ids: list[int]) -> list[float]:
    chosen = torch.tensor(token_ids, dtype=torch.long)[:, None]
    return logits.double().log_softmax(-1).gather(1, chosen)[:, 0].tolist()


def assert_parity(answers: Sequence[Answer], expected: Sequence[Answer]) -> None:
    """Raise `AssertionError` unless all answers are those expected, log-probabilities within the tolerance."""
    assert len(answers) == len(expected)
    pairs = list(enumerate(zip(answers, expected, strict=True)))
    for number, (answer, wanted) in pairs:
        worst = _worst(answer.prompt_logprobs, wanted.prompt_logprobs)
        assert worst <= LOGPROB_TOLERANCE, f"prompt {number}: a log-probability is off by {worst:.2e}"
    for number, (answer, wanted) in pairs:
        assert answer.token_ids == wanted.token_ids, f"prompt {number}: {answer.token_ids}, not {wanted.token_ids}"
        worst = _worst(answer.logprobs, wanted.logprobs)
        assert worst <= LOGPROB_TOLERANCE, f"answer {number}: a log-probability is off by {worst:.2e}"


def _worst(logprobs: Sequence[float], wanted: Sequence[float]) -> float:
    return max((abs(a - b) for a, b in zip(logprobs, wanted, strict=True)), default=0.0)


# ---------------------------------------------------------------- infinilm


def check_parity(llm: Any, prompts: Sequence[list[int]], expected: Sequence[Answer]) -> None:
    """Submit all prompts to an `infinilm.LLM` at once, and raise `AssertionError` unless it says what is expected."""
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, prompt_logprobs=0, logprobs=0, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    assert_parity([_answer(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)], expected)


def _answer(prompt: list[int], output: Any) -> Answer:
    completion = output.outputs[0]
    return Answer(
        _chosen(prompt[1:], output.prompt_logprobs[1:]),
        list(completion.token_ids),
        _chosen(completion.token_ids, completion.logprobs),
    )


def _chosen(token_ids: Sequence[int], logprobs: Sequence[Any]) -> list[float]:
    return [entries[token_id].logprob for token_id, entries in zip(token_ids, logprobs, strict=True)]


@dataclass(frozen=True)
class Case:
    """A model to compare: its config and how the checkpoint is written.

    `spelling` and `names` edit the `config.json` and the tensors that transformers wrote with `options`.
    """

    name: str
    config: PreTrainedConfig
    spelling: Callable[[dict[str, Any]], dict[str, Any]] = dict
    names: Callable[[Stored], Stored] = dict
    options: dict[str, Any] = field(default_factory=dict)

    def examine(self, folder: Path) -> Subject:
        """Write the checkpoint, and ask transformers."""
        model = write_checkpoint(folder, self.config, **self.options)
        edit_config(folder, self.spelling)
        edit_tensors(folder, self.names)
        return Subject(folder, *examine(model))


@dataclass(frozen=True)
class Subject:
    """A checkpoint, the prompts to ask it, and what transformers says to them."""

    folder: Path
    prompts: list[list[int]]
    expected: list[Answer]

    def load(self, **options: Any) -> LLM:
        """Return the checkpoint as an `infinilm.LLM`."""
        return LLM(str(self.folder), platform="cpu", dtype="float32", max_model_len=128, **options)

    def check_alone(self) -> None:
        """Ask one prompt at a time."""
        llm = self.load()
        for prompt, expected in zip(self.prompts, self.expected, strict=True):
            check_parity(llm, [prompt], [expected])

    def check_in_a_ragged_batch_of_eight(self) -> None:
        """Ask all prompts at once, long ones in several chunks."""
        assert len(self.prompts) == 8
        check_parity(self.load(max_num_seqs=8, max_num_batched_tokens=64), self.prompts, self.expected)

    def check_with_preemption(self) -> None:
        """Ask all prompts at once, with a cache that cannot hold them all."""
        layers = self.load().lineage.configs[-1].layers
        block_bytes = sum(2 * 16 * layer.mixer.num_kv_heads * layer.mixer.head_dim * 4 for layer in layers)
        llm = self.load(kv_cache_memory=11 * block_bytes)
        check_parity(llm, self.prompts, self.expected)
        assert llm.engine.num_preemptions > 0
