"""Weight rules: which key of a table a name fits, what becomes of it, and how a malformed table is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable

import pytest

from infinilm_hookspecs import DROP, Mapped, Weight, WeightError, WeightRule, rules
from infinilm_hookspecs.rules import compile_rule


def weight(name: str) -> Weight:
    return Weight.stored(name, (4, 2), "float32")


def name_after(rule: WeightRule, name: str) -> str | None:
    """Return the name that `rule` gives the weight `name`, `None` where it passes unchanged."""
    mapped = compile_rule(rule)(weight(name))
    if mapped is None:
        return None
    assert isinstance(mapped, Weight)
    return mapped.name


# ---------------------------------------------------------------- what a name becomes


@pytest.mark.parametrize(
    ("key", "template", "name", "expected"),
    [
        ("wte", "embed", "wte", "embed"),
        ("h.{layer}.w", "layers.{layer}.w", "h.7.w", "layers.7.w"),
        ("h.{layer}.w", "layers.{layer}.w", "h.117.w", "layers.117.w"),
        ("h.{a}.{b}", "{b}.h.{a}.{b}", "h.3.4", "4.h.3.4"),
        ("h{layer}.w", "layers.{layer}.w", "h12.w", "layers.12.w"),
        ("h.{layer}", "layer", "h.5", "layer"),
        ("h.{i}.to.{i}", "same.{i}", "h.5.to.5", "same.5"),
        ("h.{layer}.w1", "layers.{layer}.gate", "h.0.w1", "layers.0.gate"),
        ("a+b.{i}[0]", "escaped.{i}", "a+b.1[0]", "escaped.1"),
        ("{{h}}.{i}", "braces.{i}", "{h}.1", "braces.1"),
        ("h#.{i}", "hash.{i}", "h#.1", "hash.1"),
    ],
)
def test_whole_names_with_captured_integers(key: str, template: str, name: str, expected: str) -> None:
    assert name_after({key: template}, name) == expected


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("h.{layer}.w", "h.w"),
        ("h.{layer}.w", "h.x.w"),
        ("h.{layer}.w", "h.-1.w"),
        ("h.{layer}.w", "h.1.w.more"),
        ("h.{layer}.w", "model.h.1.w"),
        ("h.{layer}.w", "h.1xw"),
        ("h.{layer}.w", "h.\N{ARABIC-INDIC DIGIT ONE}.w"),  # a digit to str.isdigit, and no layer number
        ("h.{i}.to.{i}", "h.5.to.6"),
        ("h.0.w", "h.1.w"),
        ("h#.w", "h1.w"),
        ("h.{layer}.w1", "h.0.w2"),
    ],
)
def test_name_that_no_key_fits_passes_unchanged(key: str, name: str) -> None:
    assert name_after({key: "never"}, name) is None


def test_most_literal_key_wins_in_any_order() -> None:
    table = {
        "h.{a}.{b}.w": "general",
        "h.0.{b}.w": "first layer",
        "h.0.1.w": "one weight",
        "h.{a}.{a}.w": "diagonal",
    }
    for entries in (table.items(), reversed(table.items())):
        rule = dict(entries)
        assert name_after(rule, "h.2.3.w") == "general"
        assert name_after(rule, "h.0.3.w") == "first layer"
        assert name_after(rule, "h.0.1.w") == "one weight"
        assert name_after(rule, "h.2.2.w") == "diagonal"


def test_drop_is_handed_on() -> None:
    rule = compile_rule({"rotary.{layer}.inv_freq": DROP})
    assert rule(weight("rotary.3.inv_freq")) is DROP
    assert rule(weight("rotary.inv_freq")) is None


def test_callable_gets_the_weight_and_the_captured_integers_by_name() -> None:
    seen: list[dict[str, object]] = []

    def split(w: Weight, layer: int, expert: int) -> list[Weight]:
        seen.append({"name": w.name, "layer": layer, "expert": expert})
        return [half.rename(f"{layer}.{expert}.{i}") for i, half in enumerate(w.chunk(2))]

    mapped = compile_rule({"h.{layer}.e.{expert}": split})(weight("h.3.e.14"))
    assert seen == [{"name": "h.3.e.14", "layer": 3, "expert": 14}]
    assert [(w.name, w.shape) for w in mapped] == [("3.14.0", (2, 2)), ("3.14.1", (2, 2))]  # type: ignore[union-attr]


@pytest.mark.parametrize("answer", [None, DROP, (DROP,)], ids=["unchanged", "drop", "sequence"])
def test_callable_may_answer_whatever_a_rule_may(answer: Mapped) -> None:
    assert compile_rule({"h.{i}": lambda w, i: answer})(weight("h.1")) is answer


def test_function_is_the_rule_itself() -> None:
    def rule(w: Weight) -> Mapped:
        return w.rename("other")

    assert compile_rule(rule) is rule


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"h.{layer": "x"}, r"key 'h\.\{layer' of a weight table: expected '}' before end of string"),
        ({"h.layer}": "x"}, r"key 'h\.layer}' of a weight table: Single '}' encountered"),
        ({"h.{}.w": "x"}, r"key 'h\.\{\}\.w' of a weight table: \{\} must be a plain name in braces"),
        ({"h.{0}.w": "x"}, r"\{0\} must be a plain name in braces"),
        ({"h.{a.b}.w": "x"}, r"\{a\.b\} must be a plain name in braces"),
        ({"h.{layer:02d}.w": "x"}, r"\{layer\} must be a plain name in braces"),
        ({"h.{layer!r}.w": "x"}, r"\{layer\} must be a plain name in braces"),
        ({"h.{a}{b}.w": "x"}, r"key 'h\.\{a\}\{b\}\.w' of a weight table: \{a\} and \{b\} touch"),
        ({"h.1{a}.w": "x"}, r"key 'h\.1\{a\}\.w' of a weight table: \{a\} touches a digit"),
        ({"h.{a}1.w": "x"}, r"key 'h\.\{a\}1\.w' of a weight table: \{a\} touches a digit"),
        ({"h.{layer}.w": "x.{lyer}"}, r"'h\.\{layer\}\.w': 'x\.\{lyer\}' uses lyer, which the key lacks"),
        ({"wte": "x.{layer}.{a}"}, r"'x\.\{layer\}\.\{a\}' uses a, layer, which the key lacks"),
        ({"h.{layer}.w": "x.{layer"}, r"weight table 'h\.\{layer\}\.w': 'x\.\{layer': expected '}'"),
        ({"h.{layer}.w": "x.{}"}, r"'x\.\{\}'"),
        ({"h.{layer}.w": "x.{layer:q}"}, r"'x\.\{layer:q\}': Unknown format code 'q'"),
        ({"h.{layer}.w": 5}, r"weight table 'h\.\{layer\}\.w': 5 is neither a template, DROP, nor a callable"),
        ({"h.{layer}.w": None}, r"None is neither a template, DROP, nor a callable"),
        ({"h.{layer}.w": ["a", "b"]}, r"\['a', 'b'\] is neither a template, DROP, nor a callable"),
        ({5: "x"}, r"key 5 of a weight table: a key is the whole name of a weight"),
        ({"h.{a}.w": "x", "h.{b}.w": "y"}, r"'h\.\{a\}\.w' and 'h\.\{b\}\.w' fit the same names"),
        ({"h.0.{a}": "x", "h.0.{b}": "y"}, r"'h\.0\.\{a\}' and 'h\.0\.\{b\}' fit the same names"),
        ("h.{layer}.w", r"a weight rule is a function or a table, not 'h\.\{layer\}\.w'"),
        (None, r"a weight rule is a function or a table, not None"),
    ],
)
def test_malformed_table_is_refused_when_it_is_compiled(table: WeightRule, message: str) -> None:
    with pytest.raises(WeightError, match=message):
        compile_rule(table)


def test_name_that_two_keys_fit_equally_well_is_refused() -> None:
    rule: dict[str, str] = {"h.{a}.0": "last", "h.0.{b}": "first"}
    assert name_after(rule, "h.1.0") == "last"
    assert name_after(rule, "h.0.1") == "first"
    with pytest.raises(WeightError, match=r"'h\.\{a\}\.0' and 'h\.0\.\{b\}' both fit; give 'h\.0\.0' a key of its own"):
        name_after(rule, "h.0.0")
    assert name_after({**rule, "h.0.0": "corner"}, "h.0.0") == "corner"


# ---------------------------------------------------------------- cost


def tables() -> Iterable[tuple[str, WeightRule, Callable[[int], str]]]:
    size = 5_000
    yield "one template", {"h.{i}.w": "x.{i}"}, lambda i: f"h.{i}.w"
    yield "a key for every name", {f"h.{i}.w": f"x.{i}" for i in range(size)}, lambda i: f"h.{i}.w"
    yield "a key for every layer", {f"h.{i}.{{e}}": f"x.{i}.{{e}}" for i in range(size)}, lambda i: f"h.{i}.3"
    yield "names of other families", {f"{'a' * i}.{{i}}": "x.{i}" for i in range(200)}, lambda i: f"b.{i}.c"


@pytest.mark.parametrize(("table", "name"), [pytest.param(t, n, id=label) for label, t, n in tables()])
def test_each_of_thousands_of_names_is_held_against_few_keys(
    table: WeightRule, name: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = 0
    fits = rules._Entry.fits

    def counting(entry: rules._Entry, numbers: list[str]) -> bool:
        nonlocal tried
        tried += 1
        return fits(entry, numbers)

    monkeypatch.setattr(rules._Entry, "fits", counting)
    rule = compile_rule(table)
    for i in range(5_000):
        rule(weight(name(i)))
    assert tried <= 5_000


# ---------------------------------------------------------------- DROP


def test_drop_is_one_object_that_survives_copying_and_pickling() -> None:
    assert repr(DROP) == "DROP"
    assert copy.copy(DROP) is DROP
    assert copy.deepcopy({"a": [DROP]})["a"][0] is DROP
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps([DROP], protocol))[0] is DROP
