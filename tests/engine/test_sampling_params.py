import subprocess
import sys
from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from infinilm.sampling_params import RequestOutputKind, SamplingParams
from infinilm_hookspecs import RequestError


def test_defaults_are_vllms():
    params = SamplingParams()
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (1.0, 1.0, 0, 16)
    assert (params.seed, params.logprobs, params.prompt_logprobs, params.ignore_eos) == (None, None, None, False)
    assert (params.n, params.min_p, params.min_tokens) == (1, 0.0, 0)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.0, 0.0, 1.0)
    assert (params.stop, params.stop_token_ids, params.bad_words, params.logit_bias) == ((), (), (), None)
    assert (params.include_stop_str_in_output, params.skip_special_tokens) == (False, True)
    assert (params.structured_outputs, params.extra_args) == (None, None)
    assert params.output_kind is RequestOutputKind.CUMULATIVE


@pytest.mark.parametrize(("stop", "expected"), [(None, ()), ("a", ("a",)), (["a", "bc"], ("a", "bc")), ([], ())])
def test_stop_becomes_a_tuple(stop, expected):
    assert SamplingParams(stop=stop).stop == expected


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"top_k": -1},
        {"top_k": np.int64(5)},
        {"temperature": np.float32(0.5)},
        {"max_tokens": None},
        {"seed": -1},
        {"seed": 2**64 - 1},
        {"logprobs": 0, "prompt_logprobs": 0},
        {"stop_token_ids": [np.int64(3)], "logit_bias": {np.int64(1): 2}},
        {"min_tokens": 16},
        {"min_tokens": 99, "max_tokens": None},
        {"bad_words": "a"},
        {"presence_penalty": -2, "frequency_penalty": 2.0, "repetition_penalty": 0.1},
    ],
)
def test_what_is_allowed(options):
    SamplingParams(**options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", None),
        ("temperature", True),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 1.5),
        ("top_k", None),
        ("max_tokens", 0),
        ("max_tokens", True),
        ("seed", 2**64),
        ("seed", -(2**63) - 1),
        ("seed", "1"),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", [1]),
        ("stop", 3),
        ("logprobs", -1),
        ("prompt_logprobs", 2.0),
        ("ignore_eos", 1),
        ("n", 0),
        ("n", None),
        ("min_p", -0.1),
        ("min_p", 1.01),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("presence_penalty", 2.1),
        ("frequency_penalty", "much"),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("inf")),
        ("stop_token_ids", 3),
        ("stop_token_ids", ["a"]),
        ("stop_token_ids", [True]),
        ("bad_words", [""]),
        ("logit_bias", [1]),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {1: float("nan")}),
        ("logit_bias", {1: float("-inf")}),
        ("include_stop_str_in_output", 1),
        ("skip_special_tokens", None),
        ("structured_outputs", {"regex": "a"}),
        ("output_kind", "DELTA"),
        ("extra_args", ["a"]),
        ("extra_args", {1: 2}),
    ],
)
def test_a_refusal_names_the_option_and_its_value(name, value):
    with pytest.raises(RequestError, match=rf"{name}=.* is not allowed; it takes") as error:
        SamplingParams(**{name: value})
    assert repr(value) in str(error.value)
    assert isinstance(error.value, ValueError)


def test_unknown_options_raise():
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=0.5)


def test_it_is_frozen():
    with pytest.raises(FrozenInstanceError):
        SamplingParams().temperature = 0.5


@pytest.mark.parametrize(("temperature", "is_greedy"), [(0, True), (1e-6, True), (0.01, False)])
def test_the_smallest_temperatures_are_greedy(temperature, is_greedy):
    assert SamplingParams(temperature=temperature).is_greedy is is_greedy


def test_params_and_outputs_need_no_torch():
    code = "import sys, infinilm.sampling_params, infinilm.outputs; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
