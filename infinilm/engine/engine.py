"""`Engine`: the step loop. schedule -> backend.forward -> sampler -> detokenizer -> outputs."""

from __future__ import annotations

import itertools
import random
import time
from collections import abc

from infinilm.engine.admission import Admission, Prepared
from infinilm.engine.batch import Chunks, build_step
from infinilm.engine.choice import Chooser, Failures
from infinilm.engine.kv_cache import BlockPool
from infinilm.engine.request import Failure, Request
from infinilm.engine.scheduler import Scheduler
from infinilm.engine.sequence import Sequence
from infinilm.engine.stats import EngineStats
from infinilm.outputs import FinishReason, RequestOutput
from infinilm.sampling_params import SamplingParams
from infinilm_hookspecs import Backend, Processor, RequestError
from infinilm_hookspecs.types import LogitsProcessorFactory


class Engine:
    """Serves requests on one backend, many at a time. One thread adds, steps and aborts; any may `prepare`.

    The backend's cache is allocated already, with `num_blocks` blocks and `max_num_seqs` slots. Lengths are in tokens.
    `seed` makes a run repeatable: it seeds the requests that bring no seed, in the order they are added. `processor` is
    `None` for a model without text: results have token ids only. `is_sharing` lets requests start with what others
    computed of the same tokens. `logits_processors` are by the key of `SamplingParams.extra_args`.
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
        is_sharing: bool = False,
        logits_processors: abc.Mapping[str, LogitsProcessorFactory] | None = None,
    ) -> None:
        self.max_model_len = max_model_len
        self.max_num_seqs = max_num_seqs
        self.num_failed_steps = 0  # in a row
        self._backend = backend
        self._chooser = Chooser(processor, eos_token_ids)
        self._seeds = random.Random(seed)
        self._weight_version = "0"
        self._pool = BlockPool(num_blocks, block_size, is_sharing=is_sharing)
        self._scheduler = Scheduler(
            self._pool, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens
        )
        self._admission = Admission(
            processor,
            num_blocks=num_blocks,
            block_size=block_size,
            max_model_len=max_model_len,
            vocab_size=vocab_size,
            eos_token_ids=eos_token_ids,
            logits_processors=logits_processors or {},
        )
        self._requests: dict[str, Request] = {}
        self._sequences: dict[int, Sequence] = {}
        self._sequence_ids = itertools.count()
        self._num_prompt_tokens = 0
        self._num_generation_tokens = 0
        self._num_finished: dict[FinishReason, int] = {"stop": 0, "length": 0, "abort": 0}

    @property
    def weight_version(self) -> str:
        """What the weights are called that tokens are made with."""
        return self._weight_version

    def change_weight_version(self, version: str) -> None:
        """Take note that the backend has other weights: nothing is found in the prefix cache that is of those before.

        What runs goes on with what it has computed.
        """
        self._weight_version = version
        self._pool.forget_all(version)

    def stats(self) -> EngineStats:
        """Return the numbers of now. Any thread may ask."""
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=max(len(self._sequences) - len(self._scheduler.running), 0),  # another thread may be stepping
            num_blocks=self._pool.num_blocks,
            num_free_blocks=self._pool.num_free,
            num_preemptions=self._scheduler.num_preemptions,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generation_tokens=self._num_generation_tokens,
            prefix_cache_queries=self._scheduler.num_queried_tokens,
            prefix_cache_hits=self._scheduler.num_cached_tokens,
            num_finished=dict(self._num_finished),
            weight_version=self._weight_version,
        )

    def has_unfinished(self) -> bool:
        """Return whether `step` has anything to do."""
        return bool(self._requests)

    def prepare(
        self,
        request_id: str,
        prompt_token_ids: abc.Sequence[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
    ) -> Prepared:
        """Do what can be slow before a request is added: compile its grammar. Any thread may.

        Raises `RequestError` where it is malformed or could never be served, even alone.
        """
        return self._admission.prepare(request_id, prompt_token_ids, params, prompt)

    def add_request(
        self, request_id: str, prompt_token_ids: abc.Sequence[int], params: SamplingParams, *, prompt: str | None = None
    ) -> None:
        """Prepare and queue a request. Raises `RequestError`."""
        self.add(request_id, self.prepare(request_id, prompt_token_ids, params, prompt=prompt))

    def add(self, request_id: str, prepared: Prepared, *, arrival_time: float | None = None) -> None:
        """Queue a request that is prepared. Raises `RequestError` where its id is in use."""
        if request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is in use; take another until that request is finished")
        arrival_time = time.monotonic() if arrival_time is None else arrival_time
        seed = self._seeds.getrandbits(63) if prepared.params.seed is None else prepared.params.seed
        request = self._admission.make_request(request_id, prepared, seed, self._sequence_ids, arrival_time)
        self._requests[request_id] = request
        self._sequences.update((sequence.sequence_id, sequence) for sequence in request.sequences)
        # With a cache to share, the others wait until the first has put the prompt there.
        request.num_queued = 1 if self._pool.is_sharing else len(request.sequences)
        for sequence in request.sequences[: request.num_queued]:
            self._scheduler.add(sequence)

    def step(self) -> list[RequestOutput | Failure]:
        """Run one step and return what is due: what each request asks to be told, and those that failed.

        When the backend raises, the requests of that step fail and the others stay.
        """
        scheduled = self._scheduler.schedule()
        chunks = [(self._sequences[sequence_id], count) for sequence_id, count in scheduled.num_tokens.items()]
        assert chunks or not self._requests, "requests are left and none can run"
        if not chunks:
            return []
        try:
            self._release(scheduled.released_slots)
            sampled, failed = self._run(chunks)
        except Exception as err:
            self.num_failed_steps += 1
            sampled, failed = [], dict.fromkeys((sequence.request for sequence, _ in chunks), err)
        except BaseException:
            self._drop({sequence.request for sequence, _ in chunks})
            raise
        else:
            self.num_failed_steps = 0
        self._drop(failed)
        failures = [Failure(request.request_id, error) for request, error in failed.items()]
        return [*failures, *self._report([sequence for sequence in sampled if sequence.request not in failed])]

    def abort(self, request_ids: abc.Iterable[str]) -> list[RequestOutput]:
        """Drop requests, running or waiting, free all they hold, and return what there is of them.

        Unknown ids are ignored: they may be finished.
        """
        requests = [self._requests[known] for known in dict.fromkeys(request_ids) if known in self._requests]
        self._drop(requests)
        return self._outputs(requests)

    def _run(self, chunks: Chunks) -> tuple[list[Sequence], Failures]:
        """Compute one step. Return the sequences that got a token, and the requests that failed by themselves."""
        now = time.monotonic()
        for sequence, _ in chunks:
            if sequence.request.first_scheduled_time is None:
                sequence.request.first_scheduled_time = now
                sequence.request.num_cached_tokens = sequence.num_computed_tokens
        step = build_step(chunks, self._pool.block_size)
        logits = self._backend.forward(step.batch)  # (len(logits_indices), vocab_size)
        for sequence, num_tokens in chunks:
            sequence.num_computed_tokens += num_tokens
            self._pool.store(sequence.block_table, sequence.token_ids, sequence.num_computed_tokens)
        return self._chooser.finish_step(step, logits)

    def _report(self, sampled: abc.Sequence[Sequence]) -> list[RequestOutput]:
        """Take note of what a step did, let go of what is finished, and return the outputs that are due."""
        now = time.monotonic()
        self._num_generation_tokens += len(sampled)
        requests = dict.fromkeys(sequence.request for sequence in sampled)
        for sequence in sampled:
            if sequence.num_tokens == sequence.num_prompt_tokens + 1:
                self._note_first_token(sequence, now)
        finished = [sequence for sequence in sampled if sequence.finish_reason is not None]
        self._forget(finished)
        for request in dict.fromkeys(sequence.request for sequence in finished):
            if request.is_finished:
                request.finished_time = now
                del self._requests[request.request_id]
        return self._outputs(requests)

    def _outputs(self, requests: abc.Iterable[Request]) -> list[RequestOutput]:
        outputs = (request.output(self._weight_version) for request in requests)
        return [output for output in outputs if output is not None]

    def _note_first_token(self, sequence: Sequence, now: float) -> None:
        request = sequence.request
        self._num_prompt_tokens += sequence.num_prompt_tokens
        if request.first_token_time is None:
            request.first_token_time = now
            self._scheduler.add_first(request.sequences[request.num_queued :])
            request.num_queued = len(request.sequences)

    def _drop(self, requests: abc.Iterable[Request]) -> None:
        """Forget requests and every sequence of theirs that is not forgotten yet."""
        for request in requests:
            request.abort(time.monotonic())
            self._forget([its for its in request.sequences if its.sequence_id in self._sequences])
            del self._requests[request.request_id]

    def _forget(self, sequences: abc.Sequence[Sequence]) -> None:
        slots: list[int] = []
        for sequence in sequences:
            del self._sequences[sequence.sequence_id]
            self._num_finished[sequence.finish_reason or "abort"] += 1
            is_queued = sequence.index < sequence.request.num_queued
            slot = self._scheduler.remove(sequence) if is_queued else None
            if slot is not None:
                slots.append(slot)
        self._release(slots)

    def _release(self, slots: abc.Sequence[int]) -> None:
        if slots:
            self._backend.release(slots)
