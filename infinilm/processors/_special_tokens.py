"""Special and added tokens, from the files beside the weights: which they are, their ids, and which end a sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infinilm.processors._checkpoint_json import read_json
from infinilm_hookspecs import Checkpoint, CheckpointError, Config, DecoderConfig

_LISTS = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is found in a text before the vocabulary sees it; fields as in `tokenizers.AddedToken`.

    `lstrip` and `rstrip` take the whitespace beside it along, and `single_word` wants no word there.
    """

    content: str
    token_id: int
    is_special: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


def special_tokens(checkpoint: Checkpoint) -> dict[str, str]:
    """Return `bos_token`, `eos_token` and their kind: text by name, from `tokenizer_config.json` before the map."""
    return {
        name: content for name, value in _declared(checkpoint) if name not in _LISTS and (content := _content(value))
    }


def read_added_tokens(checkpoint: Checkpoint, token_to_id: Callable[[str], int | None]) -> list[AddedToken]:
    """Return the tokens that a folder without `tokenizer.json` adds to its vocabulary, by id.

    They are `added_tokens_decoder` of `tokenizer_config.json`, or in older folders `added_tokens.json`; and special
    tokens, which the vocabulary may have itself. Raises `CheckpointError` naming the file that is malformed.
    """
    declared = {content: value for _, value in _declared(checkpoint) if (content := _content(value))}
    tokens = {token.content: token for token in _listed(checkpoint, declared)}
    for content, value in declared.items():
        token_id = token_to_id(content)
        if content not in tokens and token_id is not None:
            tokens[content] = _added_token(content, token_id, True, value)
    return sorted(tokens.values(), key=lambda token: token.token_id)


def eos_token_ids(lineage: Sequence[Config | DecoderConfig], checkpoint: Checkpoint, own: int | None) -> frozenset[int]:
    """Take the first that says: `generation_config.json`, a config of the lineage, the tokenizer with its `own`.

    Raises `CheckpointError` where that is neither a token id nor several.
    """
    configs = [("the model's config", config) for config in lineage if isinstance(config, Mapping)]
    for where, config in (("generation_config.json", read_json(checkpoint, "generation_config.json")), *configs):
        value = config.get("eos_token_id")
        if value is not None:
            ids = value if isinstance(value, list | tuple) else [value]
            if not all(type(token_id) is int for token_id in ids):
                raise CheckpointError(
                    f"eos_token_id of {where} is {value!r:.80}; a token id or a list of them is wanted"
                )
            return frozenset(ids)
    return frozenset() if own is None else frozenset([own])


def _declared(checkpoint: Checkpoint) -> Iterator[tuple[str, object]]:
    """Yield the special tokens that the files name, as they are written there; the last of a name counts."""
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        for name, value in read_json(checkpoint, file).items():
            if name.endswith("_token"):
                yield name, value
            elif name in _LISTS and isinstance(value, list | dict):
                yield from ((name, item) for item in (value.values() if isinstance(value, dict) else value))


def _content(value: object) -> str | None:
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) and content else None


def _listed(checkpoint: Checkpoint, declared: Mapping[str, object]) -> Iterator[AddedToken]:
    decoder = read_json(checkpoint, "tokenizer_config.json").get("added_tokens_decoder")
    if decoder is None:
        for content, token_id in read_json(checkpoint, "added_tokens.json").items():
            if not content or not isinstance(token_id, int):
                raise CheckpointError(f"{checkpoint.file('added_tokens.json')} gives {content!r} the id {token_id!r}")
            yield _added_token(content, token_id, content in declared, declared.get(content))
        return
    file = checkpoint.file("tokenizer_config.json")
    if not isinstance(decoder, dict):
        raise CheckpointError(f"added_tokens_decoder of {file} is {decoder!r:.80}, and tokens by id are wanted")
    for token_id, value in decoder.items():
        text = _content(value)
        if text is None or not token_id.isdecimal():
            raise CheckpointError(f"added_tokens_decoder of {file} gives the id {token_id!r} the token {value!r:.80}")
        is_special = text in declared or (isinstance(value, dict) and value.get("special") is True)
        yield _added_token(text, int(token_id), is_special, value)


def _added_token(content: str, token_id: int, is_special: bool, value: object) -> AddedToken:
    flags: Mapping[str, Any] = value if isinstance(value, dict) else {}
    return AddedToken(
        content,
        token_id,
        is_special,
        lstrip=bool(flags.get("lstrip")),
        rstrip=bool(flags.get("rstrip")),
        single_word=bool(flags.get("single_word")),
        normalized=bool(flags.get("normalized", not is_special)),
    )
