"""`no_repeat_ngram_size` against transformers' processor of that name."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import NoRepeatNGramLogitsProcessor

from infinilm import pipeline
from infinilm.logits_processors.no_repeat_ngram import NoRepeatNgram
from infinilm.sampling_params import SamplingParams
from infinilm_hookspecs import PluginError, RequestError, hookimpl


@given(
    prompt=st.lists(st.integers(0, 3), min_size=1, max_size=12),
    generated=st.lists(st.integers(0, 3), max_size=12),
    size=st.integers(1, 4),
)
@settings(deadline=None, derandomize=True)
def test_it_is_transformers(prompt, generated, size):
    processor = NoRepeatNgram(size)
    for length in range(len(generated) + 1):
        ours = processor(prompt, generated[:length], torch.zeros(5))
        tokens = torch.tensor([prompt + generated[:length]])
        assert ours.equal(NoRepeatNGramLogitsProcessor(size)(tokens, torch.zeros(1, 5))[0])


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "2", None])
def test_a_size_that_makes_no_sense_is_refused(size):
    with pytest.raises(RequestError, match=f"no_repeat_ngram_size={size!r} is not allowed"):
        NoRepeatNgram(size)


def test_it_is_there_and_can_be_switched_off(pm):
    assert pipeline.collect_logits_processors(pm, None) == {"no_repeat_ngram_size": NoRepeatNgram}
    pm.unregister(name="no_repeat_ngram")
    assert pipeline.collect_logits_processors(pm, None) == {}


class Offering:
    def __init__(self, value):
        self.value = value

    @hookimpl
    def provide_logits_processors(self, processor):
        return self.value


def test_a_name_from_two_plugins_is_an_error_naming_both(pm):
    pm.register(Offering({"no_repeat_ngram_size": NoRepeatNgram}), "acme")
    with pytest.raises(PluginError, match="'no_repeat_ngram_size'; settle it with -p no:") as error:
        pipeline.collect_logits_processors(pm, None)
    assert "acme" in str(error.value)
    assert "no_repeat_ngram" in str(error.value)


@pytest.mark.parametrize("value", ["x", {"x": 1}])
def test_what_is_no_mapping_to_factories_is_refused(pm, value):
    pm.register(Offering(value), "acme")
    with pytest.raises(PluginError, match="a mapping from names to factories is wanted"):
        pipeline.collect_logits_processors(pm, None)


def test_a_wrapper_sees_all_that_is_offered(pm):
    class Renaming:
        @hookimpl(wrapper=True)
        def provide_logits_processors(self, processor):
            offered = yield
            return [{f"my_{name}": its for name, its in one.items()} for one in offered]

    pm.register(Renaming(), "renaming")
    assert list(pipeline.collect_logits_processors(pm, None)) == ["my_no_repeat_ngram_size"]


def test_extra_args_are_names():
    with pytest.raises(RequestError, match="extra_args"):
        SamplingParams(extra_args={1: 2})
