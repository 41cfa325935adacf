"""Tokenizers from both published layouts, against the tokenizers library and transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from server.errors import ConfigurationError, InvalidRequest
from server.text.tokenizer import Tokenizer
from server.types import Message

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = sorted(str(path.parent.relative_to(GOLDEN)) for path in GOLDEN.glob("*-tiny/*/tokenizer.json"))
TEXTS = [
    "",
    " ",
    "Hello, world!  Two spaces\n\n\tand a tab\r\n",
    "don't we'll 1234567 x²",
    "naïve cafe\u0301 — 日本語 👩‍👩‍👧 \u200b",
    "for i in range(10):\n    print(i)  \n",
    "trailing <|im_end|> special <|mask|>",
    "\ufb01 \u1e9b\u0323 \u212b",
]


def golden(name: str = "dream-tiny/dlm") -> Tokenizer:
    return Tokenizer.load(GOLDEN / name)


def write_slow_layout(folder: Path, **changes: Any) -> Path:
    """The golden vocabulary as vocab.json and merges.txt, its four special tokens declared beside it as Dream does."""
    tokenizer = json.loads((GOLDEN / "dream-tiny/dlm/tokenizer.json").read_text())
    entries = sorted(tokenizer["model"]["vocab"].items(), key=lambda entry: entry[1])
    words = [string for string, index in entries if index >= 4]
    specials = [string for string, index in entries if index < 4]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    merges = [" ".join(merge) for merge in tokenizer["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    config = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": {
            str(len(words) + index): {"content": token, "special": True, "normalized": False}
            for index, token in enumerate(specials)
        },
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": {"content": "<|mask|>", "lstrip": False, "rstrip": False},
        "bos_token": None,
        "chat_template": "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize("folder", FOLDERS)
def test_encoding_equals_transformers(folder: str) -> None:
    ours, theirs = golden(folder), PreTrainedTokenizerFast.from_pretrained(GOLDEN / folder)
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
        assert ours.encode_data(text) == theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
    for name in ("bos", "eos", "pad", "unk", "mask"):
        assert getattr(ours, f"{name}_token_id") == getattr(theirs, f"{name}_token_id")
    assert ours.vocab_size == len(theirs)
    assert ours.vocab() == theirs.get_vocab()
    assert ours.special_ids == frozenset(theirs.all_special_ids)


@pytest.mark.parametrize("folder", FOLDERS)
def test_chats_equal_transformers(folder: str) -> None:
    ours, theirs = golden(folder), PreTrainedTokenizerFast.from_pretrained(GOLDEN / folder)
    turns = [("system", "Be brief."), ("user", "Hi  there \n"), ("assistant", ""), ("user", "don't\tstop 日本語")]
    for count in range(1, 5):
        chat = [{"role": role, "content": content} for role, content in turns[:count]]
        messages = [Message(**turn) for turn in chat]  # type: ignore[arg-type]
        for prompt in (True, False):
            expected = theirs.apply_chat_template(chat, add_generation_prompt=prompt, return_dict=False)
            assert ours.render_chat(messages, add_generation_prompt=prompt) == expected


def test_golden_prompts() -> None:
    for family in ("dream", "llada"):  # those that recorded the text beside the ids
        tokenizer = golden(f"{family}-tiny/dlm")
        for case in json.loads((GOLDEN / f"{family}-tiny/units.json").read_text())["prompts"]:
            assert tokenizer.render_chat([Message("user", case["prompt"])]) == case["prompt_ids"]


def test_slow_layout_equals_the_fast_one_built_by_transformers(tmp_path: Path) -> None:
    ours = Tokenizer.load(write_slow_layout(tmp_path / "slow"))
    theirs = Qwen2Tokenizer(
        vocab=str(tmp_path / "slow/vocab.json"),
        merges=str(tmp_path / "slow/merges.txt"),
        unk_token=None,
        extra_special_tokens=["<|im_start|>", "<|im_end|>", "<|mask|>"],
    )
    theirs.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    shutil.copy(tmp_path / "slow/tokenizer_config.json", tmp_path)
    fast = Tokenizer.load(tmp_path)
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == fast.encode(text) == ids
        assert ours.encode_data(text) == fast.encode_data(text)
        assert ours.decode(ids) == fast.decode(ids)
    assert ours.vocab() == fast.vocab()
    assert (ours.eos_token_id, ours.pad_token_id, ours.mask_token_id, ours.bos_token_id) == (508, 508, 511, None)
    assert ours.special_ids == {508, 509, 510, 511}
    assert ours.encode("cafe\u0301") == ours.encode("caf\u00e9")  # NFC
    assert ours.has_chat_template
    assert ours.decode(ours.render_chat([Message("user", "a")]), skip_special_tokens=False) == "<|im_start|>a<|im_end|>"


def test_slow_layout_with_an_added_tokens_file(tmp_path: Path) -> None:
    folder = write_slow_layout(tmp_path, added_tokens_decoder={}, additional_special_tokens=["<|im_start|>"])
    added = {"<|endoftext|>": 508, "<|im_start|>": 509, "<tool>": 510, "<|mask|>": 511}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("<|im_start|><tool><|mask|>") == [509, 510, 511]
    assert tokenizer.special_ids == {508, 509, 511}
    assert tokenizer.decode([509, 510, 511]) == "<tool>"


def test_what_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"neither tokenizer\.json nor vocab\.json"):
        Tokenizer.load(tmp_path)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"tokenizer_class": "GPT2Tokenizer"}, "tokenizer_class 'GPT2Tokenizer'"),
        ({"added_tokens_decoder": {"600": {"content": "<a>"}}}, "declared as id 600"),
        ({"chat_template": "{% for %}"}, "chat_template: line 1"),
        ({"chat_template": 7}, "chat_template must be"),
    ]
    for number, (changes, message) in enumerate(wrong):
        with pytest.raises(ConfigurationError, match=message):
            Tokenizer.load(write_slow_layout(tmp_path / str(number), **changes))
    folder = tmp_path / "broken"
    shutil.copytree(GOLDEN / "dream-tiny/dlm", folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigurationError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.load(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer.load(folder)


def test_chat_templates_are_found_in_each_of_their_places(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "{{ messages[0].content }}"}]
    folder, message = write_slow_layout(tmp_path, chat_template=named), [Message("user", "abc")]
    assert Tokenizer.load(folder).render_chat(message) == Tokenizer.load(folder).encode("abc")
    (folder / "chat_template.jinja").write_text("{{ eos_token }}")
    assert Tokenizer.load(folder).render_chat(message) == [508]
    (folder / "chat_template.jinja").unlink()
    bare = Tokenizer.load(write_slow_layout(tmp_path, chat_template=None))
    assert not bare.has_chat_template
    with pytest.raises(InvalidRequest, match="the diffusion model has no chat template") as refused:
        bare.render_chat(message)
    assert refused.value.param == "messages"


def test_template_errors_are_the_requests_fault(tmp_path: Path) -> None:
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}{{ 1 / 0 }}"
    folder = write_slow_layout(tmp_path, chat_template=template)
    for role, reason in (("system", "roles must alternate"), ("user", "division by zero")):
        for tokenizer in (Tokenizer.load(folder), Tokenizer.load(folder, "reward model tone")):
            with pytest.raises(InvalidRequest, match=f"template of {tokenizer.owner} .*{reason}") as refused:
                tokenizer.render_chat([Message(role, "a")])  # type: ignore[arg-type]
            assert refused.value.param == "messages"


def test_templates_have_what_transformers_gives_them(tmp_path: Path) -> None:
    template = """
    {%- for m in messages %}
        {%- if loop.index > 2 %}{% break %}{% endif %}
        {%- generation %}{{ m.content | tojson }}{% endgeneration %}
    {%- endfor %}
    {% if tools is none and not bos_token is defined %}
{{ strftime_now('%Y') | length }}{{ {'b': '<é>', 'a': 1} | tojson(indent=1, sort_keys=true) }}
    {% endif %}{{ add_generation_prompt }}
    """
    folder = write_slow_layout(tmp_path, chat_template=template)
    messages = [("user", "a'<b>"), ("assistant", "c"), ("user", "d")]
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.chat_template is not None
    ours = tokenizer.chat_template.render([Message(*message) for message in messages], True)  # type: ignore[arg-type]
    shutil.copy(GOLDEN / "dream-tiny/dlm/tokenizer.json", folder)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>")
    chat = [{"role": role, "content": content} for role, content in messages]
    expected = theirs.apply_chat_template(chat, chat_template=template, add_generation_prompt=True, tokenize=False)
    assert ours == expected


def test_odd_text_and_ids() -> None:
    tokenizer = golden()
    with pytest.raises(InvalidRequest, match="surrogate"):
        tokenizer.encode("\ud800")
    assert tokenizer.decode([600, 1, 2]) == ""
    assert (tokenizer.token_string(600), tokenizer.id_of("no such token at all")) == (None, None)
    assert (tokenizer.token_string(3), tokenizer.id_of("<|mask|>")) == ("<|mask|>", 3)


def test_a_run_that_continues_a_text_gets_no_space_in_front(tmp_path: Path) -> None:
    pieces = ["<s>", "▁", "\n", "▁a", "a", "b", "<|x|>", "<", "|", "x", ">"]
    backend = tokenizers.Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, [("▁", "a")]))
    backend.normalizer = normalizers.Sequence([])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.add_special_tokens([AddedToken("<|x|>", normalized=False)])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("a<|x|>{{ messages[0].content }}a")
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.render_chat([Message("user", "ab<|x|>")])
    assert [tokenizer.token_string(index) for index in ids] == ["▁a", "<|x|>", *"ab<|x|>", "a"]
    assert tokenizer.render_chat([Message("user", "ab")]) == tokenizer.encode("a<|x|>aba")
