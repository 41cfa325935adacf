"""Tokenizers of published checkpoints, loaded from a local folder without running any code from it.

Two layouts exist. Most checkpoints bring `tokenizer.json`, which the `tokenizers` library reads whole. Dream brings the
older pair `vocab.json` + `merges.txt` with `tokenizer_class: DreamTokenizer`, which is Qwen2's byte-level BPE with two
more special tokens: it is put together here from its parts.

Words used here: a *special token* is one that the tokenizer marks as such (`<|im_end|>`, the mask token): decoding can
skip it, and whether its string counts as that token or as plain characters is the caller's choice (`encode` against
`encode_data`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from server.errors import ConfigurationError, InvalidRequest
from server.text.template import NAMED_TOKENS, NOTHING, Arguments, ChatTemplate, chat_ids
from server.types import Message

# Qwen2's pre-tokenizer, as published with the Qwen2 tokenizer.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SLOW_QWEN2_CLASSES = frozenset({"DreamTokenizer", "Qwen2Tokenizer", "Qwen2TokenizerFast"})


class Tokenizer:
    """A checkpoint's tokenizer and chat template.

    Token ids are int; a `*_token_id` is None where the checkpoint names no such token. `vocab_size` counts the base
    vocabulary and the added tokens. `owner` names the model in messages. Safe to use from several threads.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        named_tokens: dict[str, str],
        chat_template: str | None = None,
        owner: str = "the diffusion model",
    ) -> None:
        self.owner = owner
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        # The switch that turns special tokens into plain text belongs to the whole backend: a second one keeps
        # concurrent calls apart.
        self._plain = tokenizers.Tokenizer.from_str(backend.to_str())
        self._plain.encode_special_tokens = True
        added: dict[int, AddedToken] = backend.get_added_tokens_decoder()
        special = {index: token for index, token in added.items() if token.special}
        self.special_ids = frozenset(special)
        self.special_pattern = _special_pattern(special.values())
        self.special_strings = tuple(sorted((token.content for token in special.values()), key=len, reverse=True))
        self.special_starts = re.compile(f"(?={'|'.join(map(re.escape, self.special_strings)) or '(?!)'})")
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.named_tokens = dict(named_tokens)
        self.bos_token_id = self._named_id("bos_token")
        self.eos_token_id = self._named_id("eos_token")
        self.pad_token_id = self._named_id("pad_token")
        self.unk_token_id = self._named_id("unk_token")
        self.mask_token_id = self._named_id("mask_token")
        self.chat_template = None if chat_template is None else ChatTemplate(chat_template, named_tokens, owner)
        self._newline_ids = newline = self.encode_data("\n")
        # SentencePiece-like tokenizers put a space in front of the first word of a text, which a run that continues a
        # text must not get.
        after_newline = self.encode_data("\na")
        self._prefixes_space = after_newline != newline + self.encode_data("a") and after_newline[:-1] == newline

    @classmethod
    def load(cls, path: str | Path, owner: str = "the diffusion model") -> Tokenizer:
        """Read the tokenizer of a local checkpoint folder. ConfigurationError names the file that is wrong."""
        folder = Path(path)
        config = _read_json(folder / "tokenizer_config.json") or {}
        special_map = _read_json(folder / "special_tokens_map.json") or {}
        if (folder / "tokenizer.json").is_file():
            backend = _read_fast(folder)
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            backend = _read_slow_qwen2(folder, config)
        else:
            raise ConfigurationError(f"{folder.name}: neither tokenizer.json nor vocab.json with merges.txt is there")
        named = _named_tokens(config, special_map)
        _add_missing(backend, folder, config, special_map, named)
        return cls(backend, named, _chat_template(folder, config), owner)

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be rendered."""
        return self.chat_template is not None

    def encode(self, text: str) -> list[int]:
        """Ids of `text` parsed as it stands: special tokens' strings are special tokens. No BOS or EOS is added."""
        return _encode(self._backend, text)

    def encode_data(self, text: str) -> list[int]:
        """Ids of `text` in which a special token's string is plain characters."""
        return _encode(self._plain, text)

    def encode_data_run(self, text: str) -> list[int]:
        """As `encode_data`, for text that continues something: no space is put in front of its first word."""
        if self._prefixes_space:
            ids = self.encode_data("\n" + text)
            if ids[: len(self._newline_ids)] == self._newline_ids:
                return ids[len(self._newline_ids) :]
        return self.encode_data(text)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, ids outside the vocabulary become nothing."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_string(self, token_id: int) -> str | None:
        """The vocabulary's own string of an id (byte-level, not text), or None outside the vocabulary."""
        token: str | None = self._backend.id_to_token(token_id)
        return token

    def id_of(self, token: str) -> int | None:
        """The id of exactly this vocabulary entry, or None."""
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    def vocab(self) -> dict[str, int]:
        """Every vocabulary entry, added tokens included, with its id."""
        entries: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        return entries

    def render_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, arguments: Arguments = NOTHING
    ) -> list[int]:
        """Ids of the conversation in the chat template. Contents are data: a special token's string in them is plain
        characters. InvalidRequest (`messages`) when there is no template or it refuses the conversation."""
        return chat_ids(self, messages, add_generation_prompt, arguments)

    def _named_id(self, name: str) -> int | None:
        token = self.named_tokens.get(name)
        return None if token is None else self.id_of(token)


def _encode(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    try:
        # Unlike `encode` this lets other threads run meanwhile, and does not work out offsets.
        ids: list[int] = backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
    except TypeError as error:  # what tokenizers raises for a str that has no UTF-8 form
        raise InvalidRequest("text holds a lone surrogate, which is not a character") from error
    return ids


def _special_pattern(tokens: Iterable[AddedToken]) -> re.Pattern[str]:
    """Matches special tokens as the tokenizer does: the leftmost, then the longest; `lstrip`/`rstrip` take spaces."""
    pieces = []
    for token in sorted(tokens, key=lambda token: len(token.content), reverse=True):
        left, right = (r"\s*" if token.lstrip else ""), (r"\s*" if token.rstrip else "")
        pieces.append(f"{left}{re.escape(token.content)}{right}")
    return re.compile("|".join(pieces) or r"(?!)")


# -- reading a folder ------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigurationError(f"{path.name} is not valid JSON: {error}") from error


def _read_fast(folder: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises bare Exception
        raise ConfigurationError(f"tokenizer.json cannot be read: {error}") from error


def _read_slow_qwen2(folder: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    name = config.get("tokenizer_class")
    if name not in SLOW_QWEN2_CLASSES:
        known = ", ".join(sorted(SLOW_QWEN2_CLASSES))
        raise ConfigurationError(
            f"tokenizer_class {name!r} with vocab.json and merges.txt is not known; known: {known}"
        )
    try:
        model = BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # tokenizers raises bare Exception
        raise ConfigurationError(f"vocab.json or merges.txt cannot be read: {error}") from error
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _content(token: Any) -> str | None:
    """The string of a token that a config names either as a string or as an object with `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _named_tokens(config: dict[str, Any], special_map: dict[str, Any]) -> dict[str, str]:
    named = {name: _content(config.get(name)) or _content(special_map.get(name)) for name in NAMED_TOKENS}
    return {name: token for name, token in named.items() if token is not None}


def _add_missing(
    backend: tokenizers.Tokenizer,
    folder: Path,
    config: dict[str, Any],
    special_map: dict[str, Any],
    named: dict[str, str],
) -> None:
    """Add the tokens that the folder declares beside the vocabulary, each under the id that it declares."""
    specials = set(named.values())
    for source in (config, special_map):
        for key in ("additional_special_tokens", "extra_special_tokens"):
            tokens = source.get(key) or []
            specials.update(filter(None, map(_content, tokens.values() if isinstance(tokens, dict) else tokens)))
    declared: dict[int, AddedToken] = {}
    for token, index in (_read_json(folder / "added_tokens.json") or {}).items():
        declared[int(index)] = AddedToken(token, special=token in specials, normalized=False)
    for index, entry in (config.get("added_tokens_decoder") or {}).items():
        flags = {key: bool(entry.get(key, False)) for key in ("lstrip", "rstrip", "single_word", "normalized")}
        special = bool(entry.get("special", False)) or entry["content"] in specials
        declared[int(index)] = AddedToken(entry["content"], special=special, **flags)
    present = {token.content for token in backend.get_added_tokens_decoder().values()}
    for index in sorted(declared):
        token = declared[index]
        if token.content not in present:
            backend.add_tokens([token])
            present.add(token.content)
        if backend.token_to_id(token.content) != index:
            raise ConfigurationError(
                f"added token {token.content!r} is declared as id {index} but the vocabulary gives it "
                f"{backend.token_to_id(token.content)}"
            )
    # A named token that nothing declares (an EOS that is only a vocabulary entry) must still be recognised whole.
    missing = [token for token in sorted(specials) if token not in present and backend.token_to_id(token) is not None]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in missing])


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, else tokenizer_config.json's `chat_template`: a string, or named ones (`default`)."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict):
        template = template.get("default")
    if template is not None and not isinstance(template, str):
        raise ConfigurationError("tokenizer_config.json: chat_template must be a string or a list of named templates")
    return template
