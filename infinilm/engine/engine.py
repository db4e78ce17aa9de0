"""`Engine`: the step loop. schedule -> backend.forward -> sampler -> detokenizer -> outputs."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from operator import index
from typing import TYPE_CHECKING

from infinilm.engine.batch import Step, build_step
from infinilm.engine.detokenizer import Detokenizer
from infinilm.engine.kv_cache import BlockPool
from infinilm.engine.request import Request
from infinilm.engine.sampler import TokenLogprob, make_generator, sample, score
from infinilm.engine.scheduler import Scheduler
from infinilm.outputs import Logprob, RequestOutput
from infinilm.sampling_params import SamplingParams
from infinilm_hookspecs import Backend, Processor, RequestError

if TYPE_CHECKING:
    import torch


class Engine:
    """Serves requests on one backend, many at a time. Not thread-safe: one thread adds, steps and aborts.

    The backend's cache is allocated already, with `num_blocks` blocks and `max_num_seqs` slots. Lengths are in tokens.
    `seed` makes a run repeatable: it seeds the requests that bring no seed, in the order they are added. `processor` is
    `None` for a model without text: results have token ids only.
    """

    def __init__(
        self,
        backend: Backend,
        processor: Processor | None,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        seed: int | None,
    ) -> None:
        self.max_model_len = max_model_len
        self._backend = backend
        self._processor = processor
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._seeds = random.Random(seed)
        self._pool = BlockPool(num_blocks, block_size)
        self._scheduler = Scheduler(
            self._pool, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens
        )
        self._requests: dict[str, Request] = {}

    @property
    def num_running(self) -> int:
        """How many requests hold a slot."""
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        """How many requests wait for their first step, or for another after a preemption."""
        return len(self._scheduler.waiting)

    @property
    def num_free_blocks(self) -> int:
        """How many blocks of the cache nobody holds."""
        return self._pool.num_free

    @property
    def num_preemptions(self) -> int:
        """How often a request gave up its blocks to one that started before it."""
        return self._scheduler.num_preemptions

    def has_unfinished(self) -> bool:
        """Return whether `step` has anything to do."""
        return bool(self._requests)

    def add_request(
        self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams, *, prompt: str | None = None
    ) -> None:
        """Queue a request. Raises `RequestError` where it is malformed or could never be served, even alone."""
        if request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is in use; take another until that request is finished")
        token_ids = self._checked_token_ids(request_id, prompt_token_ids)
        if params.stop and self._processor is None:
            raise RequestError(
                f"request {request_id!r}: stop={params.stop!r} needs text, and this model has no processor; "
                "leave stop out, or give the model a tokenizer"
            )
        request = Request(
            request_id=request_id,
            prompt=prompt,
            token_ids=token_ids,
            params=params,
            max_num_tokens=self._checked_length(request_id, len(token_ids), params.max_tokens),
            seed=self._seeds.getrandbits(63) if params.seed is None else params.seed,
            detokenizer=self._detokenizer(params, context=token_ids[-1:]),
        )
        self._requests[request_id] = request
        self._scheduler.add(request)

    def step(self) -> list[RequestOutput]:
        """Run one step and return the requests that finished in it.

        When the backend, or anything after it, raises, the requests of that step are aborted and the error propagates;
        those that wait stay.
        """
        return [request.output() for request in self._advance() if request.is_finished]

    def abort(self, request_ids: Iterable[str]) -> None:
        """Drop requests, running or waiting, and free all they hold. Unknown ids are ignored: they may be finished."""
        self._forget([self._requests[request_id] for request_id in set(request_ids) if request_id in self._requests])

    def _advance(self) -> list[Request]:
        """Run one step and return the requests that got a token."""
        scheduled = self._scheduler.schedule()
        try:
            self._release(scheduled.released_slots)
            if not scheduled.num_tokens:
                assert not self._requests, "requests are left and none can run"
                return []
            chunks = [(self._requests[request_id], count) for request_id, count in scheduled.num_tokens.items()]
            step = build_step(chunks, self._pool.block_size)
            logits = self._backend.forward(step.batch)  # (len(logits_indices), vocab_size)
            for request, num_tokens in chunks:
                request.num_computed_tokens += num_tokens
            self._score_prompts(step, logits)
            advanced = self._sample(step, logits)
        except BaseException:
            self.abort(scheduled.num_tokens)
            raise
        self._forget([request for request in advanced if request.is_finished])
        return advanced

    def _forget(self, requests: Sequence[Request]) -> None:
        for request in requests:
            del self._requests[request.request_id]
        slots = [self._scheduler.remove(request) for request in requests]
        self._release([slot for slot in slots if slot is not None])

    def _release(self, slots: Sequence[int]) -> None:
        if slots:
            self._backend.release(slots)

    def _sample(self, step: Step, logits: torch.Tensor) -> list[Request]:
        if not step.sampled:
            return []
        requests = [request for request, _ in step.sampled]
        rows = [row for _, row in step.sampled]
        last_logits = logits if len(rows) == len(logits) else logits[rows]  # (num_sampled, vocab_size)
        for request in requests:
            if request.generator is None and not request.params.is_greedy:
                request.generator = make_generator(request.seed, logits.device)
        token_ids = sample(last_logits, [its.params for its in requests], [its.generator for its in requests])
        self._score_samples(requests, last_logits, token_ids)
        for request, token_id in zip(requests, token_ids, strict=True):
            request.append(token_id, self._eos_token_ids)
        return requests

    def _score_samples(self, requests: Sequence[Request], logits: torch.Tensor, token_ids: Sequence[int]) -> None:
        rows = [row for row, request in enumerate(requests) if request.params.logprobs is not None]
        if not rows:
            return
        num_top = [requests[row].params.logprobs or 0 for row in rows]
        for row, entries in zip(rows, score(logits[rows], [token_ids[row] for row in rows], num_top), strict=True):
            requests[row].logprobs.append(self._logprobs(entries))

    def _score_prompts(self, step: Step, logits: torch.Tensor) -> None:
        for request, rows in step.scored:
            start = len(request.prompt_logprobs)
            num_top = [request.params.prompt_logprobs or 0] * len(rows)
            targets = request.token_ids[start : start + len(rows)]
            for entries in score(logits[rows.start : rows.stop], targets, num_top):
                request.prompt_logprobs.append(self._logprobs(entries))

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> dict[int, Logprob]:
        result: dict[int, Logprob] = {}
        for token_id, logprob, rank in entries:
            if token_id not in result:
                result[token_id] = Logprob(logprob, rank, self._decode_token(token_id))
        return result

    def _decode_token(self, token_id: int) -> str | None:
        if self._processor is None:
            return None
        return self._processor.decode([token_id], skip_special_tokens=False)

    def _detokenizer(self, params: SamplingParams, *, context: Sequence[int]) -> Detokenizer | None:
        if self._processor is None:
            return None
        return Detokenizer(self._processor, params.stop or (), context)

    def _checked_token_ids(self, request_id: str, prompt_token_ids: Sequence[int]) -> list[int]:
        try:
            token_ids = [index(token_id) for token_id in prompt_token_ids]
        except TypeError as err:
            raise RequestError(f"request {request_id!r}: prompt_token_ids must be integers: {err}") from err
        if not token_ids:
            raise RequestError(f"request {request_id!r}: the prompt is empty; give at least one token")
        if min(token_ids) < 0 or max(token_ids) >= self._vocab_size:
            position = next(at for at, token_id in enumerate(token_ids) if not 0 <= token_id < self._vocab_size)
            raise RequestError(
                f"request {request_id!r}: token id {token_ids[position]} at position {position} of the prompt is not "
                f"in the vocabulary; ids go from 0 to {self._vocab_size - 1}"
            )
        return token_ids

    def _checked_length(self, request_id: str, prompt_length: int, max_tokens: int | None) -> int:
        """Return the length at which the request is full, after making sure that the cache can hold it."""
        if prompt_length + 1 > self.max_model_len:
            raise RequestError(
                f"request {request_id!r}: a prompt of {prompt_length} tokens leaves no room to generate, max_model_len "
                f"is {self.max_model_len}; shorten the prompt, or raise max_model_len"
            )
        full = self.max_model_len if max_tokens is None else min(prompt_length + max_tokens, self.max_model_len)
        # The last token is never computed, only sampled.
        needed, there_are = self._pool.blocks_for(full - 1), self._pool.num_blocks
        if needed > there_are:
            capacity = there_are * self._pool.block_size
            raise RequestError(
                f"request {request_id!r}: {prompt_length} prompt tokens and max_tokens={max_tokens} can reach {full} "
                f"tokens, which takes {needed} blocks of {self._pool.block_size}, and the cache has {there_are} "
                f"({capacity} tokens); lower max_tokens or max_model_len, or give the cache more memory"
            )
        return full
