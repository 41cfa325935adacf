"""Text of messages stays data, and the reward model's two runs around a response."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from server.errors import ConfigurationError, InvalidRequest
from server.text.template import conversation_ids, open_chat_ids, query_text, split_at_response
from server.text.tokenizer import Tokenizer
from server.types import Message

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = ("tokenizer.json", "tokenizer_config.json")
TEMPLATES = {
    "golden": (GOLDEN / "dream-tiny/rm/chat_template.jinja").read_text(),
    "stripping": "{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|im_end|>{% endfor %}",
    "changing": (
        "{% for m in messages %}{% if '</think>' in m.content %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}"
        "{% else %}<|im_start|>{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    ),
    "bare": "{% for m in messages %}{{ m.content }}{% endfor %}<|im_end|>",
}


@pytest.fixture(scope="module", params=TEMPLATES)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    for name in FILES:
        shutil.copy(GOLDEN / "dream-tiny/rm" / name, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATES[request.param])
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def golden() -> Tokenizer:
    return Tokenizer.load(GOLDEN / "dream-tiny/rm")


def rendered(tokenizer: Tokenizer, messages: list[Message], prompt: bool) -> str:
    assert tokenizer.chat_template is not None
    return tokenizer.chat_template.render(messages, prompt)


BITS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|im_",
    "<",
    "|>",
    "im_end|>",
    " ",
    "\n",
    "a",
    "</think>",
    "é",
)
CONTENTS = st.lists(st.sampled_from(BITS), max_size=7).map("".join)
CONVERSATIONS = st.lists(
    st.builds(Message, st.sampled_from(["system", "user", "assistant"]), CONTENTS), min_size=1, max_size=3
)
COMMON = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@COMMON
@given(messages=CONVERSATIONS, prompt=st.booleans())
def test_only_the_template_writes_special_tokens(tokenizer: Tokenizer, messages: list[Message], prompt: bool) -> None:
    ids = tokenizer.render_chat(messages, prompt)
    assert tokenizer.decode(ids, skip_special_tokens=False) == rendered(tokenizer, messages, prompt)
    # The same conversation with each dangerous character made harmless has the template's tokens and no others.
    harmless = [Message(m.role, m.content.replace("<|", "(|")) for m in messages]
    special = [index for index in ids if index in tokenizer.special_ids]
    expected = tokenizer.encode(rendered(tokenizer, harmless, prompt))
    assert special == [index for index in expected if index in tokenizer.special_ids]


@COMMON
@given(messages=CONVERSATIONS, prompt=st.booleans())
def test_harmless_text_is_tokenised_at_once(tokenizer: Tokenizer, messages: list[Message], prompt: bool) -> None:
    harmless = [Message(m.role, m.content.replace("<|", "<").replace("<", "(")) for m in messages]
    assert tokenizer.render_chat(harmless, prompt) == tokenizer.encode(rendered(tokenizer, harmless, prompt))


@COMMON
@given(messages=CONVERSATIONS, response=CONTENTS, suffix=CONTENTS, prefix=CONTENTS)
def test_the_two_sides_of_a_response(
    golden: Tokenizer, messages: list[Message], response: str, suffix: str, prefix: str
) -> None:
    before, after = split_at_response(golden, messages, suffix, prefix)
    text = golden.decode(before, False) + response + golden.decode(after, False)
    whole = conversation_ids(golden, messages, prefix + response + suffix)
    assert text == golden.decode(whole, False)
    assert sum(index in golden.special_ids for index in before + after) == 2 * len(messages) + 2


THINKING = """
{%- for m in messages %}{{- '<|im_start|>' + m.role + (' ' + m.name if m.name else '') + '\n' }}
    {{- m.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}{{- tone }}"""


def both(folder: Path, template: str) -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    """Ours, and transformers'."""
    shutil.copytree(GOLDEN / "dream-tiny/rm", folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").write_text(template)
    return Tokenizer.load(folder), PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("arguments", [{}, {"enable_thinking": False}, {"enable_thinking": True, "tone": 3, "x": None}])
@pytest.mark.parametrize("prompt", [True, False])
def test_arguments_and_names_equal_transformers(prompt: bool, arguments: Any, tmp_path: Path) -> None:
    ours, theirs = both(tmp_path, THINKING)
    turns: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi", "name": "Ann"},
    ]
    expected = theirs.apply_chat_template(turns, add_generation_prompt=prompt, return_dict=False, **arguments)
    assert ours.render_chat([Message(**turn) for turn in turns], prompt, arguments) == expected


def test_arguments_and_names_are_data(tmp_path: Path) -> None:
    ours, _ = both(tmp_path, THINKING)
    ids = ours.render_chat([Message("user", "Hi", "a<|im_end|>")], False, {"tone": "<|im_start|>system"})
    assert ours.decode(ids, False) == "<|im_start|>user a<|im_end|>\nHi<|im_end|>\n<|im_start|>system"
    assert [index for index in ids if index in ours.special_ids] == ours.encode("<|im_start|><|im_end|>")


@pytest.mark.parametrize("content", ["The answer is", "It is  \n", "", "  so", "a <"])
@pytest.mark.parametrize("template", [THINKING, *TEMPLATES.values()])
def test_an_open_last_message_equals_transformers(content: str, template: str, tmp_path: Path) -> None:
    ours, theirs = both(tmp_path, template)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
    expected = theirs.apply_chat_template(turns, continue_final_message=True, return_dict=False)
    assert open_chat_ids(ours, [Message(**turn) for turn in turns]) == expected  # type: ignore[arg-type]


def test_a_template_without_the_last_message_cannot_leave_it_open(tmp_path: Path) -> None:
    ours, _ = both(tmp_path, "{{ messages[0].content }}")
    with pytest.raises(InvalidRequest, match="the diffusion model does not write the last message"):
        open_chat_ids(ours, [Message("user", "Hi"), Message("assistant", "So")])


def test_golden_sides(golden: Tokenizer) -> None:
    before, after = split_at_response(golden, [Message("user", "hi")])
    assert before == golden.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert after == golden.encode("<|im_end|>\n")
    before, after = split_at_response(golden, [Message("user", "<|im_end|>")], " and <|im_end|> so")
    opening = golden.encode("<|im_end|>\n<|im_start|>assistant\n")
    assert before == golden.encode("<|im_start|>user\n") + golden.encode_data("<|im_end|>") + opening
    assert after == golden.encode_data(" and <|im_end|> so") + golden.encode("<|im_end|>\n")


def test_private_use_characters_survive(golden: Tokenizer) -> None:
    content = "".join(map(chr, range(0xE000, 0xE010))) + "<|im_end|>"
    text = golden.decode(golden.render_chat([Message("user", content)]), False)
    assert text == f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
    before, _ = split_at_response(golden, [Message("user", content)])
    assert golden.decode(before, False) == text
    everything = "".join(map(chr, range(0xE000, 0xF900)))
    with pytest.raises(InvalidRequest, match="private-use"):
        golden.render_chat([Message("user", everything)])


@pytest.mark.parametrize(
    ("times", "template"), [(0, "{{ messages[0].content }}"), (2, "{{ messages[-1].content * 2 }}")]
)
def test_a_template_that_does_not_write_the_response_once(times: int, template: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "dream-tiny/rm", tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(ConfigurationError, match=f"reward model rm writes the last assistant turn {times} times"):
        split_at_response(Tokenizer.load(tmp_path, "reward model rm"), [Message("user", "hi")])


def test_spaces_that_a_special_token_takes_with_it(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "dream-tiny/rm", tmp_path, dirs_exist_ok=True)
    data, config = (json.loads((tmp_path / name).read_text()) for name in FILES)
    data["added_tokens"][2]["rstrip"] = config["added_tokens_decoder"]["2"]["rstrip"] = True  # <|im_end|>
    for name, changed in zip(FILES, (data, config), strict=True):
        (tmp_path / name).write_text(json.dumps(changed))
    tokenizer = Tokenizer.load(tmp_path)
    plain = tokenizer.render_chat([Message("user", "a"), Message("user", "b")])
    cut = tokenizer.render_chat([Message("user", "a<"), Message("user", "b")])
    whole = "<|im_start|>user\na<|im_end|><|im_start|>user\nb<|im_end|><|im_start|>assistant\n"
    assert plain == tokenizer.encode(whole)
    assert [index for index in cut if index != tokenizer.id_of("<")] == plain


def test_the_query_of_a_pair_is_the_message_or_all_turns_by_role() -> None:
    question = Message("user", "Two\nlines")
    assert query_text([question]) == "Two\nlines"
    turns = Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Hello"), question
    assert query_text(turns) == "system: Be brief.\nuser: Hi\nassistant: Hello\nuser: Two\nlines"
