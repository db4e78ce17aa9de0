"""What stands between the stages: checkpoints, backends, processors, platforms, and one step's batch.

Protocols and frozen dataclasses only. Dtypes are names ("bfloat16", "float32", ...); index arrays are int32 on the CPU
and speak DLPack and the buffer protocol of NumPy; tensors are torch's, named here for type checkers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from infinilm_hookspecs.config import DecoderConfig, Named
from infinilm_hookspecs.parameters import ParameterSpec

if TYPE_CHECKING:
    import numpy
    from torch import Tensor
    from torch.nn import Module

    from infinilm_hookspecs.rules import WeightRule

    Int32 = numpy.ndarray[Any, numpy.dtype[numpy.int32]]

Config = Mapping[str, Any]
"""A raw config: the config.json, or what a plugin made of it. Read-only, nested mappings too."""


# ---------------------------------------------------------------- checkpoints


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as it lies in a checkpoint, known from headers alone.

    `extent` is (file, byte offset, bytes) of plain row-major little-endian data, or `None` where only
    `Checkpoint.read` knows how to get at it.
    """

    shape: tuple[int, ...]
    dtype: str
    extent: tuple[Path, int, int] | None


@dataclass(frozen=True, slots=True)
class Quantization:
    """Which stored tensors belong together and the scheme they are packed in.

    `groups` maps a logical name to its stored tensors by role ("weight", "scale", "zero", ...).
    """

    scheme: str
    block_shape: tuple[int, ...]
    groups: Mapping[str, Mapping[str, str]]


@runtime_checkable
class Checkpoint(Protocol):
    """An opened checkpoint. Opening reads headers only; `trust` says what reading it can do."""

    config: Config
    tensors: Mapping[str, StoredTensor]
    quantization: Quantization | None
    trust: Literal["data", "restricted"]

    def read(self, name: str, region: tuple[slice, ...], out: Tensor) -> None:
        """Fill `out`, contiguous on the CPU and of the stored dtype, with `region` of the tensor `name`.

        `region` has one slice of step 1 per dimension, with start and stop given. May be called from several threads at
        once. Raises `CheckpointError` naming file, tensor and offset when the bytes are not there.
        """

    def file(self, name: str) -> Path | None:
        """Return the path of a file that lies beside the weights (`tokenizer.json`), or `None`."""

    def close(self) -> None:
        """Close every file. Safe to call twice."""


# ---------------------------------------------------------------- platforms


@runtime_checkable
class Platform(Protocol):
    """A kind of device. Classes are what `provide_platform` returns; instances are made once per `LLM`."""

    name: str
    default_backend: str
    communication: str

    @classmethod
    def availability(cls) -> tuple[bool, str]:
        """Return whether this machine has one, and why or why not. Touches no driver it does not need."""

    def device(self, local_rank: int) -> str:
        """Return the device of a process, e.g. "cpu" or "cuda:1"."""

    def memory(self, device: str) -> tuple[int, int]:
        """Return (free, total) bytes of `device`."""

    def supports(self, dtype: str) -> bool:
        """Return whether models may run in `dtype` here."""


# ---------------------------------------------------------------- backends


@dataclass(frozen=True, slots=True)
class BackendRequest:
    """What is asked of a backend. `lineage` ends with the latest config; take the last one you understand.

    `dtype` is the one to compute in and `device` where; `max_model_len` is in tokens, 0 where no config says.
    `torch_module` asks the plugins' `provide_torch_module` for a `Named` part of a config. `stored_weights` runs the
    weight rules of the lineage, and has the stored tensors by role of every weight that is quantized in the checkpoint
    and reaches the last config as it is, under its name there: what a backend may ask for as `NAME:ROLE`. `is_named`
    says that the user named your plugin: it is no longer a question of which backend is faster.
    """

    lineage: tuple[Config | DecoderConfig, ...]
    checkpoint: Checkpoint
    platform: Platform
    device: str
    dtype: str
    quantization: str | None
    trust_remote_code: bool
    rank: int
    world_size: int
    max_model_len: int
    max_num_seqs: int
    on_decline: Callable[[str], None] = field(repr=False, compare=False, default=lambda reason: None)
    torch_module: Callable[[Named, DecoderConfig], Callable[[], Module] | None] = field(
        repr=False, compare=False, default=lambda part, config: None
    )
    stored_weights: Callable[[], Mapping[str, Mapping[str, str]]] = field(repr=False, compare=False, default=dict)
    is_named: bool = False

    def decline(self, reason: str) -> Any:  # None; Any lets a typed plugin write `return request.decline(...)`
        """Record why this backend does not take the model, and return `None` for the hook to return."""
        self.on_decline(reason)


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """What the cache of a model costs: `block_size` in tokens, the rest in bytes on one rank.

    `bytes_per_slot` is state that does not grow with the context. `shareable=False`: blocks cannot be shared between
    sequences, and a preempted sequence starts again at token 0.
    """

    block_size: int
    bytes_per_block: int
    bytes_per_slot: int = 0
    shareable: bool = True


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step's work: the new tokens of every scheduled sequence, end to end, and where their cache lies."""

    token_ids: Int32  # (num_tokens,)
    positions: Int32  # (num_tokens,)
    query_starts: Int32  # (num_sequences + 1,)
    context_lengths: Int32  # (num_sequences,), this step's tokens included
    block_tables: Int32  # (num_sequences, max_blocks), padded with -1
    slot_mapping: Int32  # (num_tokens,): block * block_size + offset
    slots: Int32  # (num_sequences,): kept from a sequence's first token until release(slots)
    logits_indices: Int32  # ascending rows of token_ids whose logits are wanted
    extras: Sequence[Mapping[str, Any] | None]  # per sequence
    prompt_lengths: Int32 | None = None  # (num_sequences,): tokens given, not generated; None: context_lengths


@runtime_checkable
class Backend(Protocol):
    """A model that can be loaded and run. The engine schedules and samples; the backend computes logits.

    Loading: `parameters()`, then for each of them `destination(name)`, filled by the engine, and `loaded(name)` once;
    `finish_loading()` at the end. An update goes the same way again.

    A backend that says `keeps_parameters = True` still has each value in `destination(name)` after the load, and can be
    exported from.
    """

    name: str
    config: Config | DecoderConfig
    weight_rule: WeightRule | None

    def parameters(self) -> Mapping[str, ParameterSpec]:
        """Return every parameter wanted. Allocates nothing."""

    def destination(self, name: str) -> Tensor:
        """Return this rank's buffer for `name`, maybe a view into a fused one. `KeyError` for an unknown name."""

    def loaded(self, name: str) -> None:
        """Take note that the buffer is full: it may now be packed and freed."""

    def finish_loading(self) -> None:
        """Take note that all parameters are loaded: compute what is derived from them."""

    def cache_spec(self) -> CacheSpec:
        """Return what the cache costs."""

    def allocate_cache(self, num_blocks: int, num_slots: int) -> None:
        """Allocate the cache. Raises `UnavailableError` when it cannot fit."""

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy cache blocks, (from, to) pairs: all of them are read before any is written."""

    def release(self, slots: Sequence[int]) -> None:
        """Forget the state of sequences that ended, if there is any; their slots may be given out again."""

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Run one step and return float32 logits (len(batch.logits_indices), vocab_size), which the next step keeps."""

    def close(self) -> None:
        """Free everything. Safe to call twice."""


# ---------------------------------------------------------------- processors


@dataclass(frozen=True, slots=True)
class ParsedText:
    """What a piece of a model's answer turned out to be. Pieces add up with `+`: to the whole answer, in the end.

    A tool call comes in parts, each a mapping with `index`, which counts the calls of one answer from 0. The first part
    of a call has its `name`, and `id` where the model wrote one before the arguments; any part may have `arguments`,
    the next characters of a JSON object. Where an answer breaks off, so do the arguments: whoever calls the tool checks
    them.
    """

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[Mapping[str, Any], ...] = ()

    def __add__(self, other: ParsedText) -> ParsedText:
        """Return both texts end to end, and one mapping for every tool call."""
        calls: dict[int, dict[str, Any]] = {}
        for part in (*self.tool_calls, *other.tool_calls):
            known = calls.get(part["index"], {})
            arguments = known.get("arguments", "") + part.get("arguments", "")
            calls[part["index"]] = {**known, **part, "arguments": arguments}
        return ParsedText(self.content + other.content, self.reasoning + other.reasoning, tuple(calls.values()))


class TokenStream(Protocol):
    """Turns one sequence's tokens into text as they come."""

    def put(self, token_id: int) -> str:
        """Return the text that is certain now: never half a character, "" while one is incomplete."""


class ResponseParser(Protocol):
    """Sorts one answer's text into content, reasoning and tool calls as it comes.

    However the text is cut into pieces, what `put` and then `finish` return adds up to the same.
    """

    reads_special_tokens: bool
    """Whether it looks for special tokens: it is then to be given the text of `stream(skip_special_tokens=False)`."""

    def put(self, text: str) -> ParsedText:
        """Return what is certain now."""

    def finish(self) -> ParsedText:
        """Return what was held back and cannot become anything else now: the answer has ended."""


@runtime_checkable
class Processor(Protocol):
    """Between text and tokens for one model."""

    eos_token_ids: frozenset[int]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `token_ids`."""

    def stream(self, *, skip_special_tokens: bool = True) -> TokenStream:
        """Return a fresh detokenizer for one sequence."""

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **template_kwargs: Any,
    ) -> str:
        """Return the prompt text of a conversation. Raises `RequestError` where there is no chat template."""

    def parser(self, *, tools: Sequence[Mapping[str, Any]] | None = None, prompt: str = "") -> ResponseParser:
        """Return a fresh parser for one answer to `prompt`, which may end inside the answer's reasoning.

        Without `tools`, what looks like a call of one is content.
        """

    def token_bytes(self) -> Sequence[bytes | None]:
        """Return the bytes each token stands for, `None` for special tokens; for constrained decoding."""


# ---------------------------------------------------------------- choosing tokens


class LogitsProcessor(Protocol):
    """Changes the logits of one answer before each of its tokens is chosen. Each answer has one of its own."""

    def __call__(self, prompt_token_ids: Sequence[int], token_ids: Sequence[int], logits: Tensor) -> Tensor:
        """Return the logits, float32 (vocab_size,), after what was generated so far, `token_ids`.

        `logits` may be changed in place, is on the device of the model, and -inf forbids a token.
        """


LogitsProcessorFactory = Callable[[Any], LogitsProcessor]
"""Makes the processor of one answer from the value of its `SamplingParams.extra_args`. Raises `RequestError`."""
