"""Edits of logits against transformers' processors, which say the same in another way."""

from __future__ import annotations

import pytest
import torch
from engine_fakes import EOS, FakeProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from infinilm.engine.grammar import Grammars, Masks
from infinilm.engine.logits import LogitsEdits, edit_logits
from infinilm.sampling_params import SamplingParams, StructuredOutputsParams

VOCAB_SIZE = 12
MASKS = Masks()
BAD_WORDS = [(1,), (2, 3), (2, 2, 4), (5, 1)]
token_ids = st.lists(st.integers(0, 11), max_size=20)


def random_logits(num_rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)).mul(3)


def edits_after(prompt: list[int], generated: list[int], params: SamplingParams, **options: object) -> LogitsEdits:
    edits = LogitsEdits(params, prompt, **options)
    for token_id in generated:
        edits.accept(token_id)
    return edits


@given(prompt=token_ids.filter(bool), generated=token_ids, penalty=st.sampled_from([0.5, 1.3, 2.0]))
@settings(deadline=None, derandomize=True)
def test_the_repetition_penalty_is_transformers(prompt, generated, penalty):
    edited, logits = random_logits(1), random_logits(1)
    params = SamplingParams(repetition_penalty=penalty)
    assert not edit_logits(edited, [edits_after(prompt, generated, params)], MASKS)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + generated]), logits)
    assert torch.allclose(edited, expected)


@given(prompt=token_ids.filter(bool), generated=token_ids)
@settings(deadline=None, derandomize=True)
def test_bad_words_biases_and_min_tokens_are_transformers(prompt, generated):
    edited, logits = random_logits(1), random_logits(1)
    bias = {3: 1.5, 7: -2.0, EOS: 0.5}
    params = SamplingParams(logit_bias=bias, min_tokens=5)
    edits = edits_after(prompt, generated, params, bad_words=BAD_WORDS, end_token_ids=[EOS, 9])
    assert not edit_logits(edited, [edits], MASKS)
    theirs = LogitsProcessorList(
        [
            SequenceBiasLogitsProcessor([[[token_id], value] for token_id, value in bias.items()]),
            MinNewTokensLengthLogitsProcessor(len(prompt), 5, [EOS, 9], device="cpu"),
            NoBadWordsLogitsProcessor([list(word) for word in BAD_WORDS]),
        ]
    )
    # They look for bad words in the prompt too; here an answer is free to go on as if the prompt had not been.
    separated = torch.tensor([[0] * len(prompt) + generated])
    assert torch.allclose(edited, theirs(separated, logits))


@given(prompt=token_ids, generated=token_ids)
@settings(deadline=None, derandomize=True)
def test_presence_and_frequency_count_what_was_generated(prompt, generated):
    edited, logits = random_logits(1), random_logits(1)
    params = SamplingParams(presence_penalty=0.7, frequency_penalty=-0.3)
    edit_logits(edited, [edits_after(prompt, generated, params)], MASKS)
    # "The equations" of https://platform.openai.com/docs/api-reference/parameter-details
    expected = [
        logit - generated.count(token_id) * -0.3 - (token_id in generated) * 0.7
        for token_id, logit in enumerate(logits[0].tolist())
    ]
    assert edited[0].tolist() == pytest.approx(expected)


def test_more_tokens_are_seen_than_there_was_room_for():
    edits = edits_after([], list(range(300)) * 2, SamplingParams(frequency_penalty=1))
    logits = torch.zeros(1, 1000)
    edit_logits(logits, [edits], MASKS)
    assert logits[0, :300].tolist() == [-2.0] * 300
    assert logits[0, 300:].tolist() == [0.0] * 700


options = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.just(1.4),
        "frequency_penalty": st.just(0.5),
        "logit_bias": st.sampled_from([{1: 3.0}, {2: -1.0, 5: 1.0}]),
        "min_tokens": st.just(3),
    },
)


def scaling(prompt_token_ids, token_ids, logits):
    return logits * (1 + len(token_ids))


@given(
    rows=st.lists(
        st.tuples(token_ids, st.lists(st.integers(1, 3), max_size=4), options, st.booleans(), st.booleans()),
        min_size=1,
        max_size=5,
    )
)
@settings(deadline=None, derandomize=True, max_examples=150)
def test_a_row_is_edited_as_if_it_were_alone(rows):
    grammars = Grammars(FakeProcessor(), VOCAB_SIZE)

    def edits_of_all():
        for prompt, generated, its, is_constrained, is_processed in rows:
            matcher = grammars.matcher(StructuredOutputsParams(regex="[abc]*")) if is_constrained else None
            processors = [scaling] if is_processed else []
            params = SamplingParams(**its)
            wanted = {"matcher": matcher, "processors": processors, "end_token_ids": [EOS], "bad_words": BAD_WORDS}
            yield edits_after(prompt, generated, params, **wanted)

    together = random_logits(len(rows))
    assert not edit_logits(together, list(edits_of_all()), MASKS)
    for row, edits in enumerate(edits_of_all()):
        alone = random_logits(len(rows))[row : row + 1]
        edit_logits(alone, [edits], MASKS)
        assert torch.equal(alone[0], together[row])


def test_the_order_is_grammar_then_biases_then_plugins_then_penalties():
    seen = []

    def watching(prompt_token_ids, token_ids, logits):
        seen.append(logits.clone())
        return logits

    params = SamplingParams(logit_bias={1: 2.0, 5: 2.0}, repetition_penalty=2.0)
    matcher = Grammars(FakeProcessor(), VOCAB_SIZE).matcher(StructuredOutputsParams(regex="a+"))
    edits = LogitsEdits(params, [1], matcher=matcher, processors=[watching])
    logits = torch.ones(1, VOCAB_SIZE)
    edit_logits(logits, [edits], MASKS)
    assert seen[0][1] == 3.0  # biased, not yet penalised
    assert (seen[0] == -torch.inf).sum() == VOCAB_SIZE - 1
    assert logits[0, 1] == 1.5
