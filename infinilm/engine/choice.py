"""From the logits of a step to the next token of each of its sequences, and the log-probabilities they want."""

from __future__ import annotations

from collections import abc

import torch
from torch import Tensor

from infinilm.engine.batch import Step
from infinilm.engine.grammar import Masks
from infinilm.engine.logits import edit_logits
from infinilm.engine.request import Request
from infinilm.engine.sampler import Sampler, Scratch, TokenLogprob, score
from infinilm.engine.sequence import Sequence
from infinilm.outputs import Logprob
from infinilm_hookspecs import Processor

Failures = dict[Request, Exception]


class Chooser:
    """Chooses tokens. `processor` gives log-probabilities their texts."""

    def __init__(self, processor: Processor | None, eos_token_ids: frozenset[int]) -> None:
        self._processor = processor
        self._eos_token_ids = eos_token_ids
        self._sampler = Sampler()
        self._masks = Masks()
        self._scratch = Scratch()

    def finish_step(self, step: Step, logits: Tensor) -> tuple[list[Sequence], Failures]:
        """Append a token to every sequence that gets one; return these, and the requests that failed by themselves.

        `logits` are float32 (len(step.batch.logits_indices), vocab_size); they are not changed.
        """
        self._score_prompts(step, logits)
        sequences = [sequence for sequence, _ in step.sampled]
        failed: Failures = {}
        if not sequences:
            return [], failed
        rows = [row for _, row in step.sampled]
        last_logits = logits if len(rows) == len(logits) else logits[rows]  # (num_sampled, vocab_size)
        token_ids = self._choose(sequences, last_logits, failed)
        self._score_samples(sequences, last_logits, token_ids)
        for sequence, token_id in zip(sequences, token_ids, strict=True):
            try:
                sequence.append(token_id, self._eos_token_ids)
            except Exception as err:  # a tokenizer or a grammar, for one request
                failed.setdefault(sequence.request, err)
        return sequences, failed

    def _choose(self, sequences: abc.Sequence[Sequence], logits: Tensor, failed: Failures) -> list[int]:
        """Choose a token for each row of `logits`, which are not changed."""
        edited = [(row, sequence.edits) for row, sequence in enumerate(sequences) if sequence.edits is not None]
        if not edited:
            return self._sample(sequences, logits)
        rows = [row for row, _ in edited]
        part = self._copy(logits, rows)  # (num_edited, vocab_size)
        failures = edit_logits(part, [edits for _, edits in edited], self._masks)
        failed.update({sequences[rows[at]].request: err for at, err in failures.items()})
        chosen = dict(zip(rows, self._sample([sequences[row] for row in rows], part), strict=True))
        plain = [row for row in range(len(sequences)) if row not in chosen]
        if plain:
            chosen.update(zip(plain, self._sample([sequences[row] for row in plain], logits[plain]), strict=True))
        return [chosen[row] for row in range(len(sequences))]

    @torch.inference_mode()
    def _copy(self, logits: Tensor, rows: abc.Sequence[int]) -> Tensor:
        """Return some rows, to be changed."""
        room = self._scratch.room(logits, len(rows) * logits.shape[-1]).view(len(rows), -1)
        return torch.index_select(logits, 0, torch.tensor(rows, device=logits.device), out=room)

    def _sample(self, sequences: abc.Sequence[Sequence], logits: Tensor) -> list[int]:
        return self._sampler.sample(logits, [its.params for its in sequences], [its.generator for its in sequences])

    def _score_samples(self, sequences: abc.Sequence[Sequence], logits: Tensor, token_ids: abc.Sequence[int]) -> None:
        rows = [row for row, sequence in enumerate(sequences) if sequence.params.logprobs is not None]
        if not rows:
            return
        num_top = [sequences[row].params.logprobs or 0 for row in rows]
        wanted = logits if len(rows) == len(sequences) else logits[rows]  # (num_wanted, vocab_size)
        for row, entries in zip(rows, score(wanted, [token_ids[row] for row in rows], num_top), strict=True):
            sequences[row].logprobs.append(self._logprobs(entries))
            sequences[row].cumulative_logprob += entries[0][1]

    def _score_prompts(self, step: Step, logits: Tensor) -> None:
        for sequence, rows in step.scored:
            request = sequence.request
            start = len(request.prompt_logprobs)
            num_top = [request.params.prompt_logprobs or 0] * len(rows)
            targets = request.prompt_token_ids[start : start + len(rows)]
            for entries in score(logits[rows.start : rows.stop], targets, num_top):
                request.prompt_logprobs.append(self._logprobs(entries))

    def _logprobs(self, entries: abc.Sequence[TokenLogprob]) -> dict[int, Logprob]:
        result: dict[int, Logprob] = {}
        for token_id, logprob, rank in entries:
            if token_id not in result:
                result[token_id] = Logprob(logprob, rank, self._decode_token(token_id))
        return result

    def _decode_token(self, token_id: int) -> str | None:
        if self._processor is None:
            return None
        return self._processor.decode([token_id], skip_special_tokens=False)
