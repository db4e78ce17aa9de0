"""The oracle: transformers on seeded random checkpoints, and the check that an engine agrees with it.

Every parameter is random, norms and biases included: on default initialisation swapped norms change nothing at all.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from infinilm import SamplingParams

PROMPT_LENGTHS = (1, 2, 15, 16, 30, 45, 75, 100)
MAX_TOKENS = 8
LOGPROB_TOLERANCE = 1e-4
MARGIN = 1e-3
STD = 0.25

# Models this small lose more to threads waiting for each other than they gain: minutes, where the machine is busy.
torch.set_num_threads(1)


@dataclass(frozen=True)
class Answer:
    """What a model says to one prompt: the log-probability of every prompt token but the first, and what follows."""

    prompt_logprobs: list[float]
    token_ids: list[int]


# ---------------------------------------------------------------- checkpoints


def write_checkpoint(folder: Path, config: PreTrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    """Write a checkpoint of `config` as transformers writes it, every parameter random, and return its model."""
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.copy_(mean + STD * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return model


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Replace the `config.json` in `folder` by `edit` of it."""
    path = folder / "config.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text())), indent=2))


def spelled_as_transformers_4(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config of transformers 5 as version 4 would have written it."""
    old = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype")}
    rope = dict(config.get("rope_parameters") or {})
    if "rope_theta" in rope:
        old["rope_theta"] = rope.pop("rope_theta")
    rope_type = rope.pop("rope_type", "default")
    old["rope_scaling"] = None if rope_type == "default" else {"type": rope_type, **rope}
    return {**old, "torch_dtype": config.get("dtype", "float32")}


def without_defaults(config: dict[str, Any], defaults: PreTrainedConfig) -> dict[str, Any]:
    """Return a config without the keys whose values are the family's defaults."""
    default = defaults.to_dict()
    kept = ("model_type", "architectures")
    return {key: value for key, value in config.items() if key in kept or value != default.get(key)}


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
    logprobs = logits.double().log_softmax(-1)[:-1].gather(1, torch.tensor(prompt[1:], dtype=torch.long)[:, None])
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
    best, second = torch.cat(generated.logits).topk(2).values.unbind(1)
    if (best - second).min() < MARGIN:
        return None
    return Answer(logprobs[:, 0].tolist(), generated.sequences[0, len(prompt) :].tolist())


def assert_parity(answers: Sequence[Answer], expected: Sequence[Answer]) -> None:
    """Raise `AssertionError` unless all answers are those expected, log-probabilities within the tolerance."""
    assert len(answers) == len(expected)
    pairs = list(enumerate(zip(answers, expected, strict=True)))
    for number, (answer, wanted) in pairs:
        difference = torch.tensor(answer.prompt_logprobs) - torch.tensor(wanted.prompt_logprobs)
        worst = max(difference.abs().tolist(), default=0.0)
        assert worst <= LOGPROB_TOLERANCE, f"prompt {number}: a log-probability is off by {worst:.2e}"
    for number, (answer, wanted) in pairs:
        assert answer.token_ids == wanted.token_ids, f"prompt {number}: {answer.token_ids}, not {wanted.token_ids}"


# ---------------------------------------------------------------- infinilm


def check_parity(llm: Any, prompts: Sequence[list[int]], expected: Sequence[Answer]) -> None:
    """Submit all prompts to an `infinilm.LLM` at once, and raise `AssertionError` unless it says what is expected."""
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, prompt_logprobs=0, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    assert_parity([_answer(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)], expected)


def _answer(prompt: list[int], output: Any) -> Answer:
    scored = zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
    logprobs = [logprobs[token_id].logprob for token_id, logprobs in scored]
    return Answer(logprobs, list(output.outputs[0].token_ids))
