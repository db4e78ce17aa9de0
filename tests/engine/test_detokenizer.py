import pytest
from engine_fakes import TEXT_OF_TOKEN, FakeProcessor
from hypothesis import given, settings
from hypothesis import strategies as st

from infinilm.engine.detokenizer import Detokenizer

A, B, C, AB, SPACE, E2, X82, XAC, ABC, EURO, BC = range(1, 12)


def detokenize(token_ids, stop=()):
    """Return the pieces as they come, the detokenizer stopping where it says so."""
    detokenizer, pieces = Detokenizer(FakeProcessor(), stop), []
    for at, token_id in enumerate(token_ids):
        pieces.append(detokenizer.put(token_id))
        if detokenizer.stop_reason is not None:
            return pieces, detokenizer, at + 1
    pieces.append(detokenizer.finish())
    return pieces, detokenizer, len(token_ids)


@pytest.mark.parametrize(
    ("token_ids", "stop", "text", "reason", "num_tokens"),
    [
        ([A, B, C], ["b"], "a", "b", 2),
        ([A, B, C], ["abc"], "", "abc", 3),
        ([A, A, B, C], ["abc"], "a", "abc", 4),  # the text held back is not the stop string after all
        ([C, ABC, C], ["b"], "ca", "b", 2),  # inside a token
        ([C, AB, C], ["bc"], "ca", "bc", 3),  # across tokens
        ([A, E2, X82, XAC, B], ["€"], "a", "€", 4),  # across bytes
        ([A, EURO, B], ["€b"], "a", "€b", 3),
        ([A, B, A, C], ["abab", "ac"], "ab", "ac", 4),
        ([A, A, A, B], ["aab"], "a", "aab", 4),  # a stop string that begins within a failed one
        ([A, ABC], ["abc", "bc"], "a", "abc", 2),  # both end together: the longer
        ([ABC], ["abc", "b"], "a", "b", 1),  # the one complete first, whatever the token
        ([A, B], ["abc"], "ab", None, 2),  # held back, and given at the end
        ([A, E2], ["b"], "a\ufffd", None, 2),  # half a character, completed at the end
        ([A, E2], ["\ufffd"], "a", "\ufffd", 2),  # found in what the end brought
        ([], ["a"], "", None, 0),
    ],
)
def test_stop_strings(token_ids, stop, text, reason, num_tokens):
    pieces, detokenizer, num_taken = detokenize(token_ids, stop)
    assert (detokenizer.text, detokenizer.stop_reason, num_taken) == (text, reason, num_tokens)
    assert "".join(pieces) == text


def test_text_is_held_back_only_while_it_may_become_a_stop_string():
    pieces, _, _ = detokenize([C, A, B, B, A, C], ["abc"])
    assert pieces == ["c", "", "", "abb", "", "ac", ""]


def test_half_a_character_never_leaves():
    pieces, _, _ = detokenize([A, E2, X82, XAC, B])
    assert pieces == ["a", "", "", "€", "b", ""]


texts = st.lists(st.sampled_from("abc€ "), min_size=1, max_size=4).map("".join)


@given(token_ids=st.lists(st.integers(1, 11), max_size=30), stop=st.lists(texts, max_size=3))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_the_cut_depends_on_the_text_alone(token_ids, stop):
    pieces, detokenizer, num_taken = detokenize(token_ids, stop)
    text = FakeProcessor().decode(token_ids)
    ends = [(text.find(its) + len(its), -len(its), its) for its in stop if its in text]
    end, _, reason = min(ends, default=(len(text), 0, None))
    assert detokenizer.text == text[: end - len(reason or "")]
    assert detokenizer.stop_reason == reason
    assert "".join(pieces) == detokenizer.text
    # It stops with the token that completes the stop string; half a character may need the one after.
    assert len(b"".join(TEXT_OF_TOKEN[its] for its in token_ids[: num_taken - 1])) <= len(text[:end].encode())


class SpacedProcessor(FakeProcessor):
    """Like sentencepiece: the first space of a text is not part of it."""

    def decode(self, token_ids, *, skip_special_tokens=True):
        return super().decode(token_ids).removeprefix(" ")

    def stream(self):
        return SpacedStream(super().stream())


class SpacedStream:
    def __init__(self, stream):
        self.stream, self.is_first = stream, True

    def put(self, token_id):
        text = self.stream.put(token_id)
        if text and self.is_first:
            self.is_first, text = False, text.removeprefix(" ")
        return text


@pytest.mark.parametrize(
    ("context", "text"),
    [([], "a"), ([B], " a"), ([EURO], " a"), ([E2], "a")],
)
def test_text_continues_the_prompt(context, text):
    detokenizer = Detokenizer(SpacedProcessor(), (), context)
    streamed = [detokenizer.put(SPACE), detokenizer.put(A), detokenizer.put(E2)]
    assert "".join(streamed) == text
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.text == text + "\ufffd"


def test_what_was_taken_is_what_became_certain_since():
    detokenizer = Detokenizer(FakeProcessor(), ["abc"])
    taken = []
    for token_id in [C, A, B, B, C]:
        detokenizer.put(token_id)
        taken.append(detokenizer.take())
    assert taken == ["c", "", "", "abb", "c"]
    assert (detokenizer.take(), detokenizer.text) == ("", "cabbc")


def test_the_stop_string_may_be_part_of_the_text():
    detokenizer = Detokenizer(FakeProcessor(), ["bc"], includes_stop=True)
    assert [detokenizer.put(token_id) for token_id in (A, B, C)] == ["a", "", "bc"]
    assert (detokenizer.text, detokenizer.stop_reason) == ("abc", "bc")


def test_no_stop_string_is_looked_for_before_its_time():
    detokenizer = Detokenizer(FakeProcessor(), ["a", "bc"])
    assert [detokenizer.put(token_id, is_stopping=False) for token_id in (A, B)] == ["a", "b"]
    assert detokenizer.put(C) == "c"  # what came too early is no beginning
    assert detokenizer.stop_reason is None
    assert detokenizer.put(A) == ""
    assert detokenizer.stop_reason == "a"


class SkippingProcessor(FakeProcessor):
    """Token 11 is special."""

    def decode(self, token_ids, *, skip_special_tokens=True):
        return super().decode([its for its in token_ids if its != BC or not skip_special_tokens])


@given(token_ids=st.lists(st.integers(1, 11), max_size=20), context=st.lists(st.integers(1, 11), max_size=1))
@settings(deadline=None, derandomize=True)
def test_special_tokens_are_shown_where_they_are_wanted(token_ids, context):
    processor = SkippingProcessor()
    detokenizer = Detokenizer(processor, (), context, skips_special_tokens=False)
    streamed = "".join(detokenizer.put(token_id) for token_id in token_ids) + detokenizer.finish()
    assert streamed == detokenizer.text == FakeProcessor().decode(token_ids)
