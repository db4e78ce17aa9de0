"""`HuggingFaceProcessor`: text and tokens through the `tokenizers` library. Imports neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from infinilm.processors._byte_level_bpe import open_byte_level_bpe
from infinilm.processors._chat_template import ChatTemplate
from infinilm.processors._response_formats import recognise_format
from infinilm.processors._special_tokens import eos_token_ids, special_tokens
from infinilm.processors._token_bytes import vocabulary
from infinilm.processors._token_streams import ByteStream, WindowStream, decode_bytes
from infinilm_hookspecs import Checkpoint, CheckpointError, Config, DecoderConfig, RequestError
from infinilm_hookspecs.types import ResponseParser, TokenStream


class HuggingFaceProcessor:
    """The processor of a folder with a `tokenizer.json`, or the byte-level `vocab.json` and `merges.txt`.

    A chat template writes its special tokens itself: encode what `render_chat` returns with `add_special_tokens=False`.
    `decode` and `stream` agree with `tokenizers` on all valid text. A run of byte tokens that is not UTF-8 is read as
    far as it is, where `tokenizers` replaces all of it: text that was streamed never changes.
    """

    def __init__(self, tokenizer: Tokenizer, chat_template: ChatTemplate, eos_token_ids: frozenset[int]) -> None:
        self.eos_token_ids = eos_token_ids
        self._tokenizer = tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._chat_template = chat_template
        self._response_format = recognise_format(chat_template.sources)
        self._vocabulary = vocabulary(tokenizer)
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._bytes = cache(self._compute_bytes)

    @classmethod
    def open(cls, lineage: Sequence[Config | DecoderConfig], checkpoint: Checkpoint) -> HuggingFaceProcessor:
        """Read the files of a checkpoint. Raises `CheckpointError` naming the one that is damaged."""
        path = checkpoint.file("tokenizer.json")
        tokenizer = open_byte_level_bpe(checkpoint) if path is None else _read_tokenizer(path)
        own_eos = tokenizer.token_to_id(special_tokens(checkpoint).get("eos_token", ""))
        return cls(tokenizer, ChatTemplate.open(checkpoint), eos_token_ids(lineage, checkpoint, own_eos))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`, with the special tokens that the tokenizer itself puts around it.

        Raises `RequestError` where `text` is no text: lone surrogates, as a JSON escape can make.
        """
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as err:
            raise RequestError(f"cannot encode {text!r:.200}: it is not text in Unicode ({err})") from err

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `token_ids`; ids that are not in the vocabulary have none."""
        if not self._vocabulary.is_exact:
            return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        token_bytes = self._text_bytes if skip_special_tokens else self._bytes
        return decode_bytes(map(token_bytes, token_ids), self._vocabulary.num_stripped)

    def stream(self, *, skip_special_tokens: bool = True) -> TokenStream:
        """Return a fresh detokenizer."""
        if self._vocabulary.is_exact:
            token_bytes = self._text_bytes if skip_special_tokens else self._bytes
            return ByteStream(token_bytes, self._vocabulary.num_stripped)
        return WindowStream(partial(self.decode, skip_special_tokens=skip_special_tokens))

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
        return self._response_format.parser(tools, prompt, self._is_special)

    def token_bytes(self) -> Sequence[bytes | None]:
        """Return the bytes of each token id, `None` for special tokens and ids without a token."""
        tokens = self._tokenizer.get_vocab(with_added_tokens=True)
        result: list[bytes | None] = [None] * (max(tokens.values(), default=-1) + 1)
        for token_id in tokens.values():
            if token_id not in self._special_ids:
                result[token_id] = self._bytes(token_id)
        return result

    def _is_special(self, text: str) -> bool:
        return self._tokenizer.token_to_id(text) in self._special_ids

    def _text_bytes(self, token_id: int) -> bytes:
        return b"" if token_id in self._special_ids else self._bytes(token_id)

    def _compute_bytes(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        return b"" if token is None else self._vocabulary.to_bytes(token)


def _read_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as err:  # tokenizers raises nothing narrower
        raise CheckpointError(f"{path} is not a tokenizer: {err}; download it again") from err
