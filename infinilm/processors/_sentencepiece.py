"""`SentencePieceProcessor`: text and tokens through the `sentencepiece` package, with the tokens that were added to it.

A `tokenizer.model` knows nothing of what fine-tuning added to it: that stands in `tokenizer_config.json` and, in older
folders, `added_tokens.json` and `special_tokens_map.json`. The conventions are those of transformers' `LlamaTokenizer`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from infinilm.processors._chat_template import ChatTemplate
from infinilm.processors._checkpoint_json import read_json
from infinilm.processors._response_formats import recognise_format
from infinilm.processors._special_tokens import AddedToken, eos_token_ids, read_added_tokens, special_tokens
from infinilm.processors._token_streams import ByteStream, decode_bytes
from infinilm_hookspecs import Checkpoint, CheckpointError, Config, DecoderConfig, RequestError, UnavailableError
from infinilm_hookspecs.types import ResponseParser, TokenStream

# ModelProto.normalizer_spec (3) = {NormalizerSpec.add_dummy_prefix (3): false}, of sentencepiece_model.proto. Appended
# to a message, a part given twice is merged: https://protobuf.dev/programming-guides/encoding/#last-one-wins
_NO_PREFIX = b"\x1a\x02\x18\x00"


class Pieces:
    """A sentencepiece model as it is, and as it cuts a text that goes on: without a space put before it.

    Raises `UnavailableError` without the package, and `CheckpointError` where the file is no such model.
    """

    def __init__(self, path: Path) -> None:
        try:
            import sentencepiece
        except ImportError as err:
            raise UnavailableError(
                f"{path} needs the sentencepiece package, which is not installed: pip install "
                "'infinilm[sentencepiece]', or take token ids only with -p no:sentencepiece"
            ) from err
        try:
            data = path.read_bytes()
            self.model = sentencepiece.SentencePieceProcessor(model_proto=data)
            self._going_on = sentencepiece.SentencePieceProcessor(model_proto=data + _NO_PREFIX)
        except (OSError, RuntimeError) as err:
            raise CheckpointError(f"{path} is not a sentencepiece model: {err}; download it again") from err
        self.size: int = self.model.get_piece_size()
        self.adds_prefix = self.model.encode("a") != self._going_on.encode("a")

    def encode(self, text: str, *, is_start: bool) -> list[int]:
        """Return the ids of `text`, which stands at the start of a text or goes on after a special token."""
        ids: list[int] = (self.model if is_start else self._going_on).encode(text)
        return ids

    def token_id(self, piece: str) -> int | None:
        """Return the id of a piece, `None` for text that is none."""
        token_id: int = self.model.piece_to_id(piece)
        return token_id if self.model.id_to_piece(token_id) == piece else None

    def special_names(self) -> dict[str, str]:
        """Return the pieces of the model's own special tokens by their name in `tokenizer_config.json`."""
        own = {"bos_token": self.model.bos_id(), "eos_token": self.model.eos_id(), "unk_token": self.model.unk_id()}
        return {name: self.model.id_to_piece(token_id) for name, token_id in own.items() if token_id >= 0}

    def is_special(self, token_id: int) -> bool:
        """Return whether a token stands for no text: control pieces, and the one for what is not in the vocabulary."""
        return self.model.is_control(token_id) or self.model.is_unknown(token_id)

    def to_bytes(self, token_id: int) -> bytes:
        """Return what a piece stands for."""
        piece = self.model.id_to_piece(token_id)
        return bytes.fromhex(piece[3:5]) if self.model.is_byte(token_id) else piece.replace("▁", " ").encode()


class SentencePieceProcessor:
    """The processor of a folder with a sentencepiece model.

    A chat template writes its special tokens itself: encode what `render_chat` returns with `add_special_tokens=False`.
    `decode` and `stream` agree with `sentencepiece` on valid text, but for the token of what is not in the vocabulary,
    which is special here and "⁇" there. Of bytes that are not UTF-8, U+FFFD stands for as many as Python takes.
    """

    def __init__(
        self,
        pieces: Pieces,
        added: Sequence[AddedToken],
        chat_template: ChatTemplate,
        *,
        eos_token_ids: frozenset[int],
        before: Sequence[int],
        after: Sequence[int],
        is_legacy: bool,
    ) -> None:
        """Put the tokens `before` and `after` around a text. `is_legacy` puts a space after every added token."""
        self.eos_token_ids = eos_token_ids
        self._pieces = pieces
        self._added = {token.token_id: token for token in added}
        self._by_length = sorted(added, key=lambda token: -len(token.content))
        self._pattern = re.compile("|".join(map(_pattern, self._by_length))) if added else None
        self._chat_template = chat_template
        self._response_format = recognise_format(chat_template.sources)
        self._before, self._after = before, after
        self._is_legacy = is_legacy
        self._num_stripped = 1 if pieces.adds_prefix else 0
        self._bytes = cache(self._compute_bytes)
        self._text_bytes = cache(self._compute_text_bytes)

    @classmethod
    def open(
        cls, path: Path, lineage: Sequence[Config | DecoderConfig], checkpoint: Checkpoint
    ) -> SentencePieceProcessor:
        """Read the model in `path` and the files beside it.

        Without a word in `tokenizer_config.json`, a text begins with the bos token and does not end with eos, as in
        the code that came with the first llama (meta-llama/llama, `llama/generation.py`).
        """
        pieces = Pieces(path)
        config = read_json(checkpoint, "tokenizer_config.json")
        names = pieces.special_names() | special_tokens(checkpoint)
        added = read_added_tokens(checkpoint, pieces.token_id)
        ids = {token.content: token.token_id for token in added}
        for content in names.values():
            token_id = pieces.token_id(content)
            if content not in ids and token_id is not None:
                added.append(AddedToken(content, token_id, is_special=True))
                ids[content] = token_id
        bos, eos = (ids.get(names.get(name, "")) for name in ("bos_token", "eos_token"))
        return cls(
            pieces,
            added,
            ChatTemplate.open(checkpoint),
            eos_token_ids=eos_token_ids(lineage, checkpoint, eos),
            before=[bos] if bos is not None and config.get("add_bos_token", True) else [],
            after=[eos] if eos is not None and config.get("add_eos_token", False) else [],
            is_legacy=config.get("legacy") is True,
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`, with the special tokens that belong around it.

        Raises `RequestError` where `text` is no text: lone surrogates, as a JSON escape can make.
        """
        try:
            text.encode()
        except UnicodeEncodeError as err:
            raise RequestError(f"cannot encode {text!r:.200}: it is not text in Unicode ({err})") from err
        ids = [*self._before] if add_special_tokens else []
        for start, part, added_id in self._split(text):
            if part:
                ids += self._pieces.encode(part, is_start=start == 0 or self._is_legacy)
            if added_id is not None:
                ids.append(added_id)
        return [*ids, *self._after] if add_special_tokens else ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `token_ids`; ids that are not in the vocabulary have none."""
        token_bytes = self._text_bytes if skip_special_tokens else self._bytes
        return decode_bytes(map(token_bytes, token_ids), self._num_stripped)

    def stream(self, *, skip_special_tokens: bool = True) -> TokenStream:
        """Return a fresh detokenizer."""
        return ByteStream(self._text_bytes if skip_special_tokens else self._bytes, self._num_stripped)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **template_kwargs: Any,
    ) -> str:
        """Return the prompt text of a conversation. Raises `RequestError` where there is no chat template."""
        return self._chat_template.render(messages, tools, add_generation_prompt, template_kwargs)

    def parser(self, *, tools: Sequence[Mapping[str, Any]] | None = None, prompt: str = "") -> ResponseParser:
        """Return a parser for one answer to `prompt`, in the format that the chat template speaks of."""
        return self._response_format.parser(tools, prompt, self._is_special_text)

    def token_bytes(self) -> Sequence[bytes | None]:
        """Return the bytes of each token id, `None` for special tokens and ids without a token."""
        size = max([self._pieces.size, *(token_id + 1 for token_id in self._added)])
        return [None if self._is_special(token_id) else self._bytes(token_id) for token_id in range(size)]

    def _split(self, text: str) -> Iterator[tuple[int, str, int | None]]:
        """Yield (start, text, id of the added token that follows) until the text ends, where none follows."""
        start = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            assert match.lastindex is not None
            yield start, text[start : match.start()], self._by_length[match.lastindex - 1].token_id
            start = match.end()
        yield start, text[start:], None

    def _is_special(self, token_id: int) -> bool:
        if token_id in self._added:
            return self._added[token_id].is_special
        return not 0 <= token_id < self._pieces.size or self._pieces.is_special(token_id)

    def _is_special_text(self, text: str) -> bool:
        added = (token.token_id for token in self._by_length if token.content == text)
        token_id = next(added, self._pieces.token_id(text))
        return token_id is not None and self._is_special(token_id)

    def _compute_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].content.encode()
        return self._pieces.to_bytes(token_id) if 0 <= token_id < self._pieces.size else b""

    def _compute_text_bytes(self, token_id: int) -> bytes:
        return b"" if self._is_special(token_id) else self._bytes(token_id)


def _pattern(token: AddedToken) -> str:
    """Return what finds a token in a text: one group, and around it what the token takes along."""
    found = rf"({re.escape(token.content)})"
    if token.single_word:
        found = rf"(?<!\w){found}(?!\w)"
    return (r"\s*" if token.lstrip else "") + found + (r"\s*" if token.rstrip else "")
