"""The walk through every causal language model that transformers lists: which of them the backend runs, and how.

Each is built tiny, with every parameter random; what transformers generates of a few prompts, one at a time, is the
oracle for a ragged batch of all of them with so small a cache that one is preempted.
"""

from __future__ import annotations

import copy
import logging
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import oracle
import torch
import transformers
from overrides import OVERRIDES
from tiny import families, tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from infinilm import LLM, SamplingParams
from infinilm.backends.transformers.sequences import Cut
from infinilm_hookspecs import InfinilmError

PROMPT_LENGTHS = (1, 12, 15, 28, 31, 44)
MOST_DRAWS = 12
TOLERANCE = 2e-3  # of log-probabilities: recurrences add up rounding errors, otherwise where chunks are cut otherwise


@dataclass(frozen=True)
class Row:
    """One family: `outcome` is "paged", "own cache", "declined", "not built" or "wrong"; `note` says why or how."""

    model_type: str
    outcome: str
    note: str = ""
    has_state: bool = False
    worst: float = 0.0

    @property
    def runs(self) -> bool:
        """Whether the backend said what transformers says."""
        return self.outcome in ("paged", "own cache")


@dataclass(frozen=True)
class Said:
    """What follows a prompt, and the log-probability of every token of it."""

    token_ids: list[int]
    logprobs: list[float]


def examine(model_type: str, folder: Path) -> Row:
    """Build a tiny model of a family, ask transformers and the backend the same, and say what came of it."""
    try:
        config = tiny_config(model_type, OVERRIDES.get(model_type, {}))
        model = oracle.write_checkpoint(folder, config)
        if model.config.model_type != model_type:  # of several parts, of which the model is one
            config.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        prompts, expected = _ask(model)
    except Exception as err:
        return Row(model_type, "not built", _one_line(err))
    try:
        return _compare(model_type, folder, model.state_dict(), prompts, expected)
    except InfinilmError as err:
        return Row(model_type, "declined", _reason(err))
    except Exception as err:
        return Row(model_type, "wrong", _one_line(err))


def _ask(model: Any) -> tuple[list[list[int]], list[Said]]:
    """Return prompts and what transformers says to each alone, drawn again until none hangs on a rounding error."""
    model.generation_config = GenerationConfig()  # no tokens forced or forbidden, as some families have it
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    for seed in range(MOST_DRAWS):
        generator = torch.Generator().manual_seed(seed)
        prompts = [torch.randint(3, vocab_size, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]
        said = [_generate(copy.deepcopy(model), prompt) for prompt in prompts]
        if all(one is not None for one in said):
            return prompts, said
    raise ValueError(f"in {MOST_DRAWS} draws of prompts some token was always about as likely as another")


@torch.no_grad()
def _generate(model: Any, prompt: list[int]) -> Said | None:
    generated = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=oracle.MAX_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.cat(generated.logits)  # (MAX_TOKENS, vocab_size)
    best, second = logits.topk(2).values.unbind(1)
    if (best - second).min() < oracle.MARGIN:
        return None
    token_ids = generated.sequences[0, len(prompt) :].tolist()
    return Said(token_ids, oracle._logprobs(logits, token_ids))


def _compare(
    model_type: str, folder: Path, loaded: Mapping[str, Tensor], prompts: Sequence[list[int]], expected: Sequence[Said]
) -> Row:
    options = {"backend": "transformers", "platform": "cpu", "dtype": "float32", "max_model_len": 64}
    with LLM(str(folder), max_num_seqs=1, kv_cache_memory=1 << 28, **options) as llm:
        spec = llm.backend.cache_spec()
        _compare_parameters(llm.backend, loaded)
    # All but the last fit, and every one of them grows by a block.
    memory = 7 * spec.bytes_per_block + len(prompts) * spec.bytes_per_slot
    sizes = {"max_num_seqs": len(prompts), "max_num_batched_tokens": 32, "kv_cache_memory": memory}
    params = SamplingParams(temperature=0, max_tokens=oracle.MAX_TOKENS, logprobs=0, ignore_eos=True)
    with LLM(str(folder), **sizes, **options) as llm:
        counts = _count_tokens(llm.backend)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        findings = llm.backend.findings
    worst = 0.0
    for number, (output, wanted) in enumerate(zip(outputs, expected, strict=True)):
        token_ids = list(output.outputs[0].token_ids)
        assert token_ids == wanted.token_ids, f"prompt {number}: {token_ids}, not {wanted.token_ids}"
        worst = max(worst, oracle._worst(oracle._chosen(token_ids, output.outputs[0].logprobs), wanted.logprobs))
    # The last token of an answer is never computed; every other is once, and again after a preemption.
    assert sum(counts) > sum(len(prompt) + oracle.MAX_TOKENS - 1 for prompt in prompts), "nothing was preempted"
    assert worst < TOLERANCE, f"a log-probability is off by {worst:.2e}"
    has_state = spec.bytes_per_slot > 64 and findings.cut is not Cut.NOWHERE
    if findings.unpaged is None:
        return Row(model_type, "paged", "", has_state, worst)
    return Row(model_type, "own cache", f"{findings.cut.value}; {findings.unpaged}", has_state, worst)


def _count_tokens(backend: Any) -> list[int]:
    """Return a list that gets the number of tokens of every forward from now on."""
    counts: list[int] = []
    forward = backend.forward

    def counted(batch: Any) -> Tensor:
        counts.append(len(batch.token_ids))
        return forward(batch)

    backend.forward = counted
    return counts


def _compare_parameters(backend: Any, loaded: Mapping[str, Tensor]) -> None:
    """Hold every parameter against what `from_pretrained` made of the same checkpoint, bit for bit."""
    specs = backend.parameters()
    assert set(specs) == set(loaded)
    for name, spec in specs.items():
        held = backend.destination(spec.tied_to or name)
        assert held.dtype == loaded[name].dtype, f"{name} is {held.dtype}, not {loaded[name].dtype}"
        assert torch.equal(held, loaded[name]), f"{name} is not what from_pretrained loads"


def _reason(err: InfinilmError) -> str:
    """Return what the backend says, of all that an error does."""
    found = re.search(r" transformers: (.*?)\.( \d+ discovered|$)", str(err))
    return found[1] if found else str(err)


def _one_line(err: BaseException) -> str:
    return " ".join(f"{type(err).__name__}: {err}".split())[:300]


def _examine_in_folder(model_type: str) -> Row:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        return examine(model_type, Path(folder))


def walk(model_types: Sequence[str], num_processes: int = 2) -> Iterator[Row]:
    """Yield a row for each family, in order."""
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_examine_in_folder, model_types)


# ---------------------------------------------------------------- docs/models.md

PAGE = Path(__file__).parents[3] / "docs" / "models.md"
_HEAD = """\
# Models

Families with a plugin of their own run on every backend that takes a `DecoderConfig`: `infinilm plugins list` shows
them. Every other causal language model of transformers runs on the transformers backend, which is the slow choice, and
says so.

This page is written by `PYTHONPATH=tests python tests/backends/transformers/walk.py --write`, from a walk through
transformers' own list of causal language models, version {version}. Of each family a tiny model with random parameters
is built, saved and loaded. It counts as running if every parameter is the one `from_pretrained` loads, and greedy
tokens of a ragged batch, in which a request is preempted, are those `generate` gives for every prompt alone.

**{num_running} of {num_all} run**: {num_paged} on the engine's paged cache and {num_own} on their own, {num_state} of
these with a state that does not grow (state-space, convolution, linear attention). {num_declined} are declined, and
{num_missing} could not be built where there is nothing to download.

On its own cache a model runs one sequence after another; there is no prefix caching, and a preempted request starts
again at token 0. Prompts are then computed *in chunks*, *token by token* after the first chunk, or only once they are
*whole*, whatever the model's cache is right with.
"""
_HOW = {Cut.ANYWHERE: "in chunks", Cut.ONE_BY_ONE: "token by token", Cut.NOWHERE: "whole"}


def page(rows: Sequence[Row]) -> str:
    """Return docs/models.md for the rows of a walk."""
    running = [row for row in rows if row.runs]
    numbers = {
        "version": transformers.__version__,
        "num_all": len(rows),
        "num_running": len(running),
        "num_paged": sum(row.outcome == "paged" for row in rows),
        "num_own": sum(row.outcome == "own cache" for row in rows),
        "num_state": sum(row.has_state for row in running),
        "num_declined": sum(row.outcome == "declined" for row in rows),
        "num_missing": sum(row.outcome == "not built" for row in rows),
    }
    head = ["| model_type | cache | prompts | state | note |", "| --- | --- | --- | --- | --- |"]
    return "\n".join([_HEAD.format(**numbers), *head, *(line(row) for row in rows)]) + "\n"


def line(row: Row) -> str:
    """Return the line of a family in the table."""
    cut, _, why = row.note.partition("; ") if row.outcome == "own cache" else ("", "", row.note)
    how = {"paged": "paged", "own cache": "own"}.get(row.outcome, row.outcome)
    prompts = next((_HOW[one] for one in Cut if one.value == cut), "in chunks" if row.outcome == "paged" else "")
    cells = (f"`{row.model_type}`", how, prompts, "yes" if row.has_state else "", why.replace("|", "\\|"))
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Walk the families named, or all; `--write` writes the page."""
    names = [word for word in sys.argv[1:] if not word.startswith("-")]
    rows = []
    for row in walk(names or families()):
        rows.append(row)
        print(line(row), f"{row.worst:.0e}", flush=True)
    print(Counter(row.outcome for row in rows), sum(row.has_state for row in rows if row.runs), "with a state")
    if "--write" in sys.argv:
        PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
