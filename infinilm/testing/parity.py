"""Parity: proof that a model's logits are right, with transformers as the oracle on small random checkpoints.

Every parameter is random, norms and biases included: on default initialisation swapped norms change nothing at all.
transformers is imported when it is first asked.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from infinilm.llm import LLM
from infinilm.sampling_params import SamplingParams
from infinilm.testing.verdicts import NotApplicable, require

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Stored = dict[str, Tensor]
"""The tensors of a checkpoint by name."""

PROMPT_LENGTHS: Final = (1, 2, 15, 16, 30, 45, 75, 100)
MAX_TOKENS: Final = 8
MARGIN: Final = 1e-3
_LOGPROB_TOLERANCE: Final = 1e-4
_STD: Final = 0.25
_MAX_MODEL_LEN: Final = 128


@dataclass(frozen=True, slots=True)
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
    from transformers import AutoModelForCausalLM

    config._attn_implementation = config._experts_implementation = "eager"
    auto: Any = AutoModelForCausalLM
    model: PreTrainedModel = auto.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            # weights of norms begin as ones, or what is added to one
            mean = 1.0 if bool((parameter == 1).all()) else 0.0
            parameter.copy_(mean + _STD * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder, **options)
    return model


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Replace the `config.json` in `folder` by `edit` of it."""
    path = folder / "config.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text())), indent=2))


def edit_tensors(folder: Path, edit: Callable[[Stored], Stored], *, target: Path | None = None) -> None:
    """Replace the tensors stored in `folder` by `edit` of them, or write that to `target`."""
    name = "model.safetensors"
    stored = edit(load_file(folder / name))
    save_file({key: tensor.contiguous() for key, tensor in stored.items()}, (target or folder) / name)


# ---------------------------------------------------------------- what transformers says


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


def _oracle_answer(model: PreTrainedModel, prompt: list[int]) -> Answer | None:
    # A copy, because dynamic rope remembers the longest sequence it has seen.
    speaker: Any = copy.deepcopy(model)
    with torch.no_grad():
        logits = copy.deepcopy(speaker)(torch.tensor([prompt])).logits[0]  # (prompt_length, vocab_size)
        generated = speaker.generate(
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
    return Answer(
        logprobs_of(logits[:-1], prompt[1:]),
        token_ids,
        logprobs_of(next_logits, token_ids),
    )


def logprobs_of(logits: Tensor, token_ids: Sequence[int]) -> list[float]:
    """Return the log-probability of one token a row of `logits` (len(token_ids), vocab_size)."""
    chosen = torch.tensor(token_ids, dtype=torch.long)[:, None]
    logprobs: list[float] = logits.double().log_softmax(-1).gather(1, chosen)[:, 0].tolist()
    return logprobs


# ---------------------------------------------------------------- what infinilm says


def check_parity(llm: LLM, prompts: Sequence[list[int]], expected: Sequence[Answer]) -> None:
    """Submit all prompts at once, and raise `ConformanceError` unless everything said is what is expected."""
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, prompt_logprobs=0, logprobs=0, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    assert_parity([_answer(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)], expected)


def assert_parity(answers: Sequence[Answer], expected: Sequence[Answer]) -> None:
    """Raise `ConformanceError` unless all answers are those expected, log-probabilities within the tolerance."""
    require(len(answers) == len(expected), f"{len(answers)} answers, and {len(expected)} were expected")
    pairs = list(enumerate(zip(answers, expected, strict=True)))
    for number, (answer, wanted) in pairs:
        worst = worst_difference(answer.prompt_logprobs, wanted.prompt_logprobs)
        require(worst <= _LOGPROB_TOLERANCE, f"prompt {number}: a log-probability is off by {worst:.2e}")
    for number, (answer, wanted) in pairs:
        is_same = answer.token_ids == wanted.token_ids
        require(is_same, f"prompt {number}: {answer.token_ids}, not {wanted.token_ids}")
        worst = worst_difference(answer.logprobs, wanted.logprobs)
        require(worst <= _LOGPROB_TOLERANCE, f"answer {number}: a log-probability is off by {worst:.2e}")


def worst_difference(logprobs: Sequence[float], wanted: Sequence[float]) -> float:
    """Return how far apart the two are where they are farthest; NaN where one of them is."""
    apart = [abs(a - b) for a, b in zip(logprobs, wanted, strict=True)]
    return math.nan if any(map(math.isnan, apart)) else max(apart, default=0.0)


def chosen_logprobs(token_ids: Sequence[int], logprobs: Sequence[Any]) -> list[float]:
    """Return the log-probability of each token from what a `RequestOutput` has for its place."""
    return [entries[token_id].logprob for token_id, entries in zip(token_ids, logprobs, strict=True)]


def _answer(prompt: list[int], output: Any) -> Answer:
    completion = output.outputs[0]
    return Answer(
        chosen_logprobs(prompt[1:], output.prompt_logprobs[1:]),
        list(completion.token_ids),
        chosen_logprobs(completion.token_ids, completion.logprobs),
    )


# ---------------------------------------------------------------- cases


@dataclass(frozen=True, slots=True)
class ParityCase:
    """A model to compare: its config in transformers, and how the checkpoint is written.

    `spelling` and `names` edit the `config.json` and the tensors that transformers wrote with `options`: into those of
    the model that a plugin adapts.
    """

    name: str
    config: PreTrainedConfig
    spelling: Callable[[dict[str, Any]], dict[str, Any]] = dict
    names: Callable[[Stored], Stored] = dict
    options: dict[str, Any] = field(default_factory=dict)

    def examine(self, folder: Path, *, plugins: Sequence[object] = (), backend: str = "auto") -> ParitySubject:
        """Write the checkpoint, and ask transformers. `plugins` and `backend` are those of `LLM`."""
        model = write_checkpoint(folder, self.config, **self.options)
        edit_config(folder, self.spelling)
        edit_tensors(folder, self.names)
        return ParitySubject(folder, *examine(model), plugins=tuple(plugins), backend=backend)


@dataclass(frozen=True, slots=True)
class ParitySubject:
    """A checkpoint, the prompts to ask it, and what transformers says to them.

    `dataclasses.replace(subject, backend=...)` asks another backend without asking transformers again.
    """

    folder: Path
    prompts: list[list[int]]
    expected: list[Answer]
    plugins: tuple[object, ...] = ()
    backend: str = "auto"

    def load(
        self, *, max_num_seqs: int = 256, max_num_batched_tokens: int = 2048, kv_cache_memory: int | None = None
    ) -> LLM:
        """Return the checkpoint as an `infinilm.LLM`, in float32 on the CPU."""
        llm = LLM(
            str(self.folder),
            plugins=self.plugins,
            backend=self.backend,
            platform="cpu",
            dtype="float32",
            max_model_len=_MAX_MODEL_LEN,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_memory=kv_cache_memory,
        )
        runs = llm.choice.plugin
        require(self.backend in ("auto", runs), f"the plugin {runs!r} runs it, and {self.backend!r} was to be asked")
        return llm

    def check(self) -> None:
        """Ask in every way there is. Raises `ConformanceError` where an answer is not that of transformers."""
        self.check_alone()
        self.check_in_a_ragged_batch_of_eight()
        self.check_with_preemption()

    def check_alone(self) -> None:
        """Ask one prompt at a time."""
        with self.load() as llm:
            for prompt, expected in zip(self.prompts, self.expected, strict=True):
                check_parity(llm, [prompt], [expected])

    def check_in_a_ragged_batch_of_eight(self) -> None:
        """Ask all prompts at once, long ones in several chunks."""
        require(len(self.prompts) == 8, f"there are {len(self.prompts)} prompts")
        with self.load(max_num_seqs=8, max_num_batched_tokens=64) as llm:
            check_parity(llm, self.prompts, self.expected)

    def check_with_preemption(self) -> None:
        """Ask all prompts at once, with a cache that cannot hold them all."""
        with self.load() as llm:
            spec = llm.backend.cache_spec()
        if not spec.bytes_per_block:
            raise NotApplicable("blocks cost nothing, says cache_spec(): nothing is ever preempted")
        num_blocks = -(-176 // spec.block_size)  # of the 284 tokens that the prompts have between them
        with self.load(
            max_num_seqs=8, kv_cache_memory=num_blocks * spec.bytes_per_block + 8 * spec.bytes_per_slot
        ) as llm:
            check_parity(llm, self.prompts, self.expected)
            require(llm.engine.stats().num_preemptions > 0, "nothing was preempted")
