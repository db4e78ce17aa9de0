"""`BackendCase`: a backend and a model it runs, as the conformance suite wants to be told of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from infinilm.platforms.cpu import CpuPlatform
from infinilm.testing.decoders import DECODERS, enlarged, with_all_experts
from infinilm.testing.verdicts import ConformanceError, NotApplicable
from infinilm_hookspecs import (
    Backend,
    BackendRequest,
    Config,
    ConfigError,
    DecoderConfig,
    ParameterSpec,
    Platform,
    Quantization,
    StoredTensor,
)

if TYPE_CHECKING:
    from torch import Tensor

    Values = Callable[[str, ParameterSpec, int], Tensor]
    Reference = Callable[[Mapping[str, Tensor], Sequence[int]], Tensor]

Provide = Callable[[BackendRequest], Backend | None]
"""A plugin's `provide_backend`."""

TOLERANCES: Final[Mapping[str, float]] = {"float64": 1e-5, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""By how much logits may differ between two ways to compute them, as a share of the largest of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendCase:
    """A backend and a model it runs. `dataclasses.replace` changes what `decoder_cases` or `hook_case` left as it is.

    `make` returns a fresh backend, independent of those it returned before, every time. It may raise `NotApplicable`.
    Sequences of up to `max_length` tokens are run, with token ids below `vocab_size`, and so many of them at once as
    `max_num_seqs`, which is 3 at least.

    `dtype` is what the backend computes in and settles how far logits may be apart, unless `tolerance` does, as a share
    of the largest logit. `values(name, spec, seed)` returns what a parameter is filled with; by default random numbers,
    which need a floating-point dtype. `reference(values, token_ids)` returns logits (len(token_ids), vocab_size) that
    somebody else computed with these parameters.

    Some checks need more, and say so where it is missing: `provide` and `request` are the plugin's hook and what it is
    asked; `make_large` returns a backend with gigabytes of parameters; `device_memory` returns how many bytes of a
    device other than the CPU are in use. A backend that does not promise the same bits for the same steps says
    `is_deterministic=False`.
    """

    name: str
    make: Callable[[], Backend]
    vocab_size: int
    max_length: int
    max_num_seqs: int = 64
    dtype: str = "float32"
    tolerance: float | None = None
    values: Values | None = None
    reference: Reference | None = None
    provide: Provide | None = None
    request: BackendRequest | None = None
    make_large: Callable[[], Backend] | None = None
    device_memory: Callable[[], int] | None = None
    is_deterministic: bool = True


def decoder_cases(
    provide: Provide,
    *,
    decoders: Mapping[str, DecoderConfig] = DECODERS,
    dtype: str = "float32",
    device: str = "cpu",
    platform: Platform | None = None,
    quantization: str | None = None,
) -> list[BackendCase]:
    """Return a case for each of `decoders`: by default small models that between them have every part there is.

    `provide` is the plugin's `provide_backend`. A model it declines is not held against it. In low precision, and with
    a `quantization`, all experts are run for every token, because a rounding would send one to another. Quantized
    logits may differ as those in bfloat16; give such a case the `reference` of the weights that the backend rounds to.
    """
    is_exact = quantization is None and TOLERANCES.get(dtype, 1.0) <= TOLERANCES["float32"]
    cases = []
    for name, decoder in decoders.items():
        config = decoder if is_exact else with_all_experts(decoder)
        request = make_request(config, dtype=dtype, device=device, platform=platform, quantization=quantization)
        case = hook_case(name, provide, request, large=enlarged(config))
        if quantization is None:
            case = replace(case, reference=_decoder_reference(config))
        else:
            case = replace(case, tolerance=TOLERANCES["bfloat16"])
        cases.append(case)
    return cases


def hook_case(
    name: str, provide: Provide, request: BackendRequest, *, large: Config | DecoderConfig | None = None
) -> BackendCase:
    """Return the case of what `provide` makes of `request`. Raises `ConfigError` where its last config lacks a size.

    `large` is a config with gigabytes of parameters to put in the place of the last one. Memory of a device other than
    the CPU is what the platform says is in use there.
    """
    config = request.lineage[-1]
    asked = replace(request, lineage=(*request.lineage[:-1], config if large is None else large))
    return BackendCase(
        name=name,
        make=partial(_provided, provide, request),
        vocab_size=_size(config, "vocab_size"),
        max_length=request.max_model_len,
        max_num_seqs=request.max_num_seqs,
        dtype=request.dtype,
        provide=provide,
        request=request,
        make_large=None if large is None else partial(_provided, provide, asked),
        device_memory=None if request.device == "cpu" else partial(_memory_in_use, request),
    )


def make_request(
    *lineage: Config | DecoderConfig,
    dtype: str = "float32",
    device: str = "cpu",
    platform: Platform | None = None,
    quantization: str | None = None,
    max_num_seqs: int = 64,
) -> BackendRequest:
    """Return what a backend is asked where `lineage` ends the search for a config, with an empty checkpoint.

    Raises `ConfigError` where the last config lacks `max_position_embeddings`, and where a device other than the CPU
    comes without its platform.
    """
    if platform is None and device != "cpu":
        raise ConfigError(f"device {device!r} needs its platform, which knows its memory; give platform=")
    return BackendRequest(
        lineage=lineage,
        checkpoint=_EmptyCheckpoint(),
        platform=CpuPlatform() if platform is None else platform,
        device=device,
        dtype=dtype,
        quantization=quantization,
        trust_remote_code=False,
        rank=0,
        world_size=1,
        max_model_len=_size(lineage[-1], "max_position_embeddings"),
        max_num_seqs=max_num_seqs,
    )


def ask(provide: Provide, request: BackendRequest) -> tuple[Backend | None, list[str]]:
    """Return what `provide` answers, and the reasons it gave for declining."""
    reasons: list[str] = []
    return provide(replace(request, on_decline=reasons.append)), reasons


def _size(config: Config | DecoderConfig, key: str) -> int:
    size = getattr(config, key) if isinstance(config, DecoderConfig) else config.get(key)
    if not isinstance(size, int):
        raise ConfigError(f"the last config has {key}={size!r}, and a case needs that number; state it in the config")
    return size


def _memory_in_use(request: BackendRequest) -> int:
    free, total = request.platform.memory(request.device)
    return total - free


def _provided(provide: Provide, request: BackendRequest) -> Backend:
    backend, reasons = ask(provide, request)
    if backend is not None:
        return backend
    if not reasons:
        raise ConformanceError("provide_backend returned None without a reason; return request.decline('why')")
    raise NotApplicable(f"declined: {'; '.join(reasons)}")


def _decoder_reference(config: DecoderConfig) -> Reference:
    def logits(values: Mapping[str, Tensor], token_ids: Sequence[int]) -> Tensor:
        from infinilm.testing.reference import decoder_logits

        return decoder_logits(config, values, token_ids)

    return logits


class _EmptyCheckpoint:
    """A checkpoint with nothing in it: parameters are filled by hand."""

    trust: Literal["data", "restricted"] = "data"
    quantization: Quantization | None = None

    def __init__(self) -> None:
        self.config: Config = {}
        self.tensors: Mapping[str, StoredTensor] = {}

    def read(self, name: str, region: tuple[slice, ...], out: Tensor) -> None:
        raise KeyError(name)

    def file(self, name: str) -> Path | None:
        return None

    def close(self) -> None:
        pass
