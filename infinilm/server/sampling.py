"""From a request's fields to `SamplingParams`."""

from __future__ import annotations

from dataclasses import replace

from infinilm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from infinilm.server.errors import ApiError
from infinilm.server.protocol import (
    GenerationRequest,
    JsonObjectFormat,
    JsonSchemaFormat,
    ResponseFormat,
    StructuredOutputs,
)
from infinilm.server.settings import Limits

_SAME = (
    "n",
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "top_k",
    "min_p",
    "min_tokens",
    "stop_token_ids",
    "bad_words",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "extra_args",
)


def sampling_params(
    request: GenerationRequest,
    defaults: SamplingParams,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    structure: StructuredOutputsParams | None,
) -> SamplingParams:
    """Return the parameters of every prompt of a request. Raises `RequestError` naming the option out of range."""
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options wants stream to be true", param="stream_options")
    given = {name: getattr(request, name) for name in _SAME if getattr(request, name) is not None}
    return replace(
        defaults,
        **given,
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        logit_bias=_biases(request.logit_bias),
        structured_outputs=structure,
        output_kind=RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL_ONLY,
    )


def limited_max_tokens(wanted: int | None, limits: Limits, name: str = "max_tokens") -> int | None:
    """Return how many tokens a request may generate. Raises `ApiError` where it wants more than the operator allows."""
    if wanted is None:
        return limits.max_tokens
    if limits.max_tokens is not None and wanted > limits.max_tokens:
        raise ApiError(400, f"{name}={wanted} is above this server's limit of {limits.max_tokens}", param=name)
    return wanted


def structure_of(request: GenerationRequest) -> StructuredOutputsParams | None:
    """Return what the answer must look like, by `response_format` or `structured_outputs`."""
    by_format = _structure_of_format(request.response_format) if request.response_format else None
    if request.structured_outputs is None:
        return by_format
    if by_format is not None:
        raise ApiError(
            400, "response_format and structured_outputs say the same thing; give one", param="structured_outputs"
        )
    return _structure_of_options(request.structured_outputs)


def _structure_of_format(wanted: ResponseFormat) -> StructuredOutputsParams | None:
    if isinstance(wanted, JsonObjectFormat):
        return StructuredOutputsParams(json_object=True)
    if isinstance(wanted, JsonSchemaFormat):
        return StructuredOutputsParams(json=wanted.json_schema.schema_)
    return None


def _structure_of_options(wanted: StructuredOutputs) -> StructuredOutputsParams:
    return StructuredOutputsParams(
        json=wanted.json_,
        regex=wanted.regex,
        choice=wanted.choice,
        grammar=wanted.grammar,
        json_object=bool(wanted.json_object),
    )


def _biases(given: dict[str, float] | None) -> dict[int, float] | None:
    """Return biases by token id, which JSON can only write as text."""
    if given is None:
        return None
    try:
        return {int(token_id): bias for token_id, bias in given.items()}
    except ValueError as err:
        raise ApiError(400, f"logit_bias is by token id: {err}", param="logit_bias") from err
