"""Quantized weights on the installed cpu backend, on sums that the demo model was not trained on.

Perplexity is held against torch in float32. The model learned to answer, so its answers are looked at by themselves,
and the whole text, whose questions it cannot foresee, as what changes before an answer does.
"""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from demo_model import MODEL, Questions, held_out, logits_of

from infinilm import LLM, SamplingParams

NUM_QUESTIONS = 400
EXACT_RATE = 0.98
MORE = {None: 1e-4, "int8": 0.01, "int4": 0.10, "int4-g128": 0.10}  # as a share of float32's


def model(quantization: str | None) -> LLM:
    llm = LLM(MODEL, backend="cpu", platform="cpu", quantization=quantization)
    assert llm.choice.plugin == "cpu"
    return llm


def losses(llm: LLM, questions: Questions) -> tuple[torch.Tensor, torch.Tensor]:
    """Return -log p of every token of the answers, and of every token but the first of the sentences."""
    sentences = questions.sentences
    ends = [0, *accumulate(map(len, sentences))]
    logprobs = logits_of(llm, sentences).double().log_softmax(-1)
    answers, texts = [], []
    for start, tokens, asked in zip(ends, sentences, questions.asked, strict=False):
        of_text = -logprobs[torch.arange(start, start + len(tokens) - 1), tokens[1:]]
        texts.append(of_text)
        answers.append(of_text[len(asked) - 1 :])
    return torch.cat(answers), torch.cat(texts)


def perplexities(llm: LLM, questions: Questions) -> list[float]:
    return [float(its.mean().exp()) for its in losses(llm, questions)]


@pytest.fixture(scope="module")
def float32() -> tuple[Questions, list[float]]:
    """The questions, and what torch says to them."""
    with LLM(MODEL, backend="torch", platform="cpu") as llm:
        assert llm.choice.plugin == "torch"
        questions = held_out(llm, NUM_QUESTIONS)
        return questions, perplexities(llm, questions)


@pytest.mark.parametrize("quantization", MORE)
def test_perplexity(float32, quantization):
    questions, wanted = float32
    with model(quantization) as llm:
        for what, found, exact in zip(("answers", "texts"), perplexities(llm, questions), wanted, strict=True):
            assert found <= exact * (1 + MORE[quantization]), what


def exact_rate(llm: LLM, questions: Questions) -> float:
    """Return the share of questions that are answered exactly, end included, as an engine answers many at once."""
    params = SamplingParams(temperature=0, max_tokens=16)
    prompts = [{"prompt_token_ids": asked} for asked in questions.asked]
    answers = [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]
    pairs = zip(answers, questions.answers, strict=True)
    return sum(list(found) == wanted for found, wanted in pairs) / len(answers)


@pytest.mark.parametrize("quantization", ["int8", "int4", "int4-g128"])
def test_answers_are_exact(quantization):
    with model(quantization) as llm:
        questions = held_out(llm)
        assert len(questions.asked) > 1900
        assert exact_rate(llm, questions) > EXACT_RATE
