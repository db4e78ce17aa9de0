"""What a sequence forbids and favours: changes to its logits before a token is chosen.

In this order: what a grammar allows; bad words, the ends before `min_tokens`, biases; the logits processors of plugins;
penalties. A sequence that wants none of it has no `LogitsEdits`, and costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infinilm.engine.grammar import Masks, Matcher
from infinilm.sampling_params import SamplingParams
from infinilm_hookspecs import RequestError
from infinilm_hookspecs.types import LogitsProcessor

_Ids = np.ndarray[Any, np.dtype[np.int64]]
_Values = np.ndarray[Any, np.dtype[np.float32]]


class LogitsEdits:
    """The edits of one sequence, and what they need to know of its tokens, which `accept` is told one by one.

    `bad_words` are sequences of token ids; `end_token_ids` are forbidden before `params.min_tokens`.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        *,
        matcher: Matcher | None = None,
        bad_words: Sequence[tuple[int, ...]] = (),
        end_token_ids: Sequence[int] = (),
        processors: Sequence[LogitsProcessor] = (),
    ) -> None:
        self.matcher = matcher
        self.processors = processors
        self.penalties = _Penalties(params, prompt_token_ids) if has_penalties(params) else None
        self._token_ids: list[int] = []
        self._prompt_token_ids = prompt_token_ids
        self._bad_words = bad_words
        self._min_tokens = params.min_tokens
        self._end_token_ids = list(end_token_ids)
        self._biases = dict(params.logit_bias or {})

    @property
    def is_complete(self) -> bool:
        """Whether the grammar allows nothing more."""
        return self.matcher is not None and self.matcher.is_complete

    def accept(self, token_id: int) -> None:
        """Take note of the next token."""
        self._token_ids.append(token_id)
        if self.matcher is not None:
            self.matcher.accept(token_id)
        if self.penalties is not None:
            self.penalties.count(token_id)

    def additions(self) -> dict[int, float]:
        """Return what is added to the logits of single tokens now."""
        added = dict(self._biases)
        for word in self._bad_words:
            before = len(word) - 1
            if before <= len(self._token_ids) and (not before or tuple(self._token_ids[-before:]) == word[:-1]):
                added[word[-1]] = -np.inf
        if len(self._token_ids) < self._min_tokens:
            added.update(dict.fromkeys(self._end_token_ids, -np.inf))
        return added

    def process(self, logits: Tensor) -> Tensor:
        """Return the logits (vocab_size,) as the processors of plugins leave them."""
        for processor in self.processors:
            logits = processor(self._prompt_token_ids, self._token_ids, logits)
        return logits


def has_penalties(params: SamplingParams) -> bool:
    """Return whether any penalty is on."""
    return params.presence_penalty != 0 or params.frequency_penalty != 0 or params.repetition_penalty != 1


@torch.inference_mode()
def edit_logits(logits: Tensor, edits: Sequence[LogitsEdits], masks: Masks) -> dict[int, Exception]:
    """Apply the edits of each row to `logits`, float32 (num_rows, vocab_size), in place. Return what failed, by row.

    Where the rest forbids every token that a grammar allows, the grammar has the last word.
    """
    failed: dict[int, Exception] = {}
    constrained = [(row, its.matcher) for row, its in enumerate(edits) if its.matcher is not None]
    if constrained:
        _constrain(logits, constrained, masks, failed)
    additions = [its.additions() for its in edits]
    _add(logits, additions)
    for row, its in enumerate(edits):
        if its.processors:
            try:
                logits[row] = its.process(logits[row])
            except Exception as err:  # a plugin's code, for one request
                failed[row] = err
    _penalize(logits, [its.penalties for its in edits])
    forbidding = [row for row, its in enumerate(edits) if its.processors or -np.inf in additions[row].values()]
    _require_choice(logits, forbidding, dict(constrained), masks, failed)
    return failed


def _constrain(
    logits: Tensor, constrained: Sequence[tuple[int, Matcher]], masks: Masks, failed: dict[int, Exception]
) -> None:
    rows = [row for row, _ in constrained]
    allowed, failures = masks.allowed_tokens([matcher for _, matcher in constrained], logits.shape[-1])
    failed.update({rows[at]: err for at, err in failures.items()})
    forbidden = allowed.logical_not_().to(logits.device)  # (num_constrained, vocab_size)
    if len(rows) == len(logits):
        logits.masked_fill_(forbidden, -torch.inf)
    else:
        logits[rows] = logits[rows].masked_fill_(forbidden, -torch.inf)


def _add(logits: Tensor, additions: Sequence[Mapping[int, float]]) -> None:
    if not any(additions):
        return
    rows = np.repeat(np.arange(len(additions)), [len(added) for added in additions])
    token_ids = np.array([token_id for added in additions for token_id in added], np.int64)
    values = np.array([value for added in additions for value in added.values()], np.float32)
    at = torch.from_numpy(rows * logits.shape[-1] + token_ids).to(logits.device)  # (num_additions,), each one once
    flat = logits.view(-1)
    flat[at] += torch.from_numpy(values).to(logits.device)


def _penalize(logits: Tensor, penalties: Sequence[_Penalties | None]) -> None:
    """Apply the penalties of each row that has some, to the tokens it has seen."""
    there = [(row, its) for row, its in enumerate(penalties) if its is not None]
    if not there:
        return
    at = [row * logits.shape[-1] + its.token_ids for row, its in there]
    device = logits.device
    flat, where = logits.view(-1), torch.from_numpy(np.concatenate(at)).to(device)
    taken_off = torch.from_numpy(np.concatenate([its.taken_off() for _, its in there])).to(device)
    divisors = np.repeat(np.array([its.repetition for _, its in there], np.float32), [len(ids) for ids in at])
    repetition = torch.from_numpy(divisors).to(device)
    seen = flat[where]  # (num_seen,)
    flat[where] = torch.where(seen > 0, seen / repetition, seen * repetition) - taken_off


def _require_choice(
    logits: Tensor, rows: Sequence[int], matchers: Mapping[int, Matcher], masks: Masks, failed: dict[int, Exception]
) -> None:
    """Make sure that each of `rows` has a token left."""
    if not rows:
        return
    largest = logits[rows].amax(-1).tolist()
    for row in (row for row, value in zip(rows, largest, strict=True) if value == -np.inf and row not in failed):
        if row in matchers:
            allowed, _ = masks.allowed_tokens([matchers[row]], logits.shape[-1])
            logits[row] = torch.where(allowed[0].to(logits.device), 0.0, -torch.inf)
        else:
            failed[row] = RequestError("every token is forbidden: bad_words or a logits processor leave none to choose")


class _Penalties:
    """Which tokens a sequence has seen: in the prompt, where that counts, and how often it generated them."""

    def __init__(self, params: SamplingParams, prompt_token_ids: Sequence[int]) -> None:
        self.repetition = params.repetition_penalty
        self._presence, self._frequency = params.presence_penalty, params.frequency_penalty
        seen = np.unique(np.array(prompt_token_ids if self.repetition != 1 else [], np.int64))
        self._num_seen = len(seen)
        self._token_ids = np.concatenate([seen, np.zeros(64, np.int64)])  # room to grow
        self._counts = np.zeros(len(self._token_ids), np.float32)
        self._places = {token_id: at for at, token_id in enumerate(seen.tolist())}

    @property
    def token_ids(self) -> _Ids:
        """Each token that was seen, once: (num_seen,)."""
        return self._token_ids[: self._num_seen]

    def taken_off(self) -> _Values:
        """What presence and frequency take off the logits of `token_ids`: (num_seen,)."""
        counts = self._counts[: self._num_seen]
        return self._frequency * counts + self._presence * (counts > 0).astype(np.float32)

    def count(self, token_id: int) -> None:
        """Take note of a generated token."""
        at = self._places.setdefault(token_id, self._num_seen)
        if at == self._num_seen:
            if at == len(self._token_ids):
                self._token_ids = np.concatenate([self._token_ids, np.zeros_like(self._token_ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._token_ids[at] = token_id
            self._num_seen += 1
        self._counts[at] += 1
