"""Chats, as agents are trained on them: whole to the template; what it loses is noted or refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from factories import TEMPLATE, notes_on_models, perturbed, save_model, tiny_llama, tiny_tokenizer
from lazarus import activation_diff, compare
from lazarus.errors import ChatTemplateError, PromptsError
from lazarus.models import ChatTemplate, render_chats
from lazarus.models.chat_forms import AS_EMPTY, AS_JSON, AS_OBJECTS, AS_PARTS, AS_TEXT
from lazarus.models.chats import AS_PYTHON, QUOTED
from lazarus.prompts import make_prompts

CALLS = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}<{{ m.role }} {{ m.name }}>{{ m.reasoning_content }}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<{{ c.id }}>{{ c.function.name }}({{ c.function.arguments | tojson }})"
    "{% endfor %}{{ m.tool_call_id }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
ARGUMENTS = {"a": 2, "b": [2, None]}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


def call(arguments: Any) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": "add", "arguments": arguments}}


def agent(arguments: Any = ARGUMENTS, content: Any = "") -> list[dict[str, Any]]:
    return [
        {"role": "system", "content": "Use the tools."},
        {"role": "user", "name": "Ada", "content": "2 + 2"},
        {
            "role": "assistant",
            "content": content,
            "reasoning_content": "Hm.",
            "tool_calls": [call(arguments)],
        },
        {"role": "tool", "tool_call_id": "c1", "name": "add", "content": "4"},
    ]


def render(
    rows: Sequence[Any], template: str | None, tokenizer: Any = None
) -> tuple[list[str], dict[str, Any]]:
    own = ChatTemplate(tokenizer or tiny_tokenizer(template=None), "base", template)
    return render_chats(make_prompts(rows).prompts, own)


def by_transformers(messages: Any, template: str, **more: Any) -> str:
    text: str = tiny_tokenizer(template=None).apply_chat_template(
        messages,
        chat_template=template,
        tokenize=False,
        add_generation_prompt=messages[-1]["role"] != "assistant",
        **more,
    )
    return text


# --- Whole to the template


@pytest.mark.parametrize("content", ["", None, "I add."])
@pytest.mark.parametrize("n_messages", [3, 4])
def test_a_template_is_given_every_key_of_every_message_and_the_tools(content: Any, n_messages: int) -> None:
    messages = agent(content=content)[:n_messages]
    [text], remarks = render([{"messages": messages, "tools": TOOLS}], CALLS)
    assert text == by_transformers(messages, CALLS, tools=TOOLS)
    assert '<c1>add({"a": 2, "b": [2, null]})' in text
    assert remarks == {}


def test_what_both_models_read_is_what_the_template_makes_of_the_whole_row(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", tiny_llama(max_position_embeddings=512), tiny_tokenizer())
    tuned = save_model(
        tmp_path / "tuned", perturbed(tiny_llama(max_position_embeddings=512)), tiny_tokenizer()
    )
    (tmp_path / "calls.jinja").write_text(CALLS, encoding="utf-8")
    rows: list[Any] = [{"messages": agent(), "tools": TOOLS}, {"prompt": "2 + 2", "tools": TOOLS}]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    options: Any = {"chat_template": str(tmp_path / "calls.jinja")}
    diff = activation_diff(base, tuned, tmp_path / "chats.jsonl", **options)
    expected = [
        by_transformers(agent(), CALLS, tools=TOOLS),
        by_transformers([{"role": "user", "content": "2 + 2"}], CALLS, tools=TOOLS),
    ]
    assert [prompt.rendered for prompt in diff.prompts] == expected
    assert [prompt.text for prompt in diff.prompts] == ["4", "2 + 2"]
    lens = compare(base, tuned, rows[0], **options)
    assert lens.record.model1.rendered == expected[0]


def test_a_row_gives_documents_and_variables_to_the_template() -> None:
    template = "{{ documents[0].title }}{{ ' thinks' if enable_thinking }}{{ messages[0].content }}"
    rows = [
        {
            "prompt": "Why?",
            "documents": [{"title": "Sky"}],
            "chat_template_kwargs": {"enable_thinking": True},
        },
        {
            "prompt": "Why?",
            "documents": [{"title": "Sea"}],
            "chat_template_kwargs": {"enable_thinking": False},
        },
    ]
    assert render(rows, template)[0] == ["Sky thinksWhy?", "SeaWhy?"]


@pytest.mark.parametrize("name", ["tokenize", "messages", "chat_template", "add_generation_prompt"])
def test_a_row_does_not_set_what_is_not_a_variable_of_the_template(name: str) -> None:
    row = {"prompt": "Hi", "chat_template_kwargs": {name: True}}
    with pytest.raises(ChatTemplateError, match=f"Prompt 0 .*`chat_template_kwargs` sets `{name}`"):
        render([row], TEMPLATE)


def test_a_tokenizer_with_a_template_for_tools_uses_it_for_rows_with_tools() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": "plain {{ messages[0].content }}", "tool_use": CALLS}
    texts, remarks = render([{"prompt": "Hi"}, {"prompt": "Hi", "tools": TOOLS}], None, tokenizer)
    user = [{"role": "user", "content": "Hi"}]
    assert texts == ["plain Hi", by_transformers(user, CALLS, tools=TOOLS)]
    assert remarks == {}


@pytest.mark.parametrize(
    ("own", "says"),
    [
        (None, "base has no chat template. Use the other"),
        (
            {"rag": "a", "tool_use": "b"},
            "base has several chat templates \\(rag, tool_use\\), and none of them",
        ),
    ],
)
def test_a_tokenizer_without_a_default_template_is_told_of(own: Any, says: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = own
    with pytest.raises(ChatTemplateError, match=says):
        render(["Hi"], None, tokenizer)


# --- The two forms of arguments, and content in parts


OBJECTS_ALONE = "{% for k, v in a | items %}{{ k }}={{ v }};{% endfor %}"
TEXT_ALONE = "{{ 'args:' + a }}"
EITHER = "{{ a if a is string else a | tojson }}"
QUOTING = "{{ a | tojson }}"
QUOTING_TEXT_ALONE = "{{ a.strip() | tojson }}"
PRINTING = "{{ a }}"


@pytest.mark.parametrize(
    ("template", "given", "text", "remark"),
    [
        (OBJECTS_ALONE, {"a": 2}, "a=2;Add", None),
        (OBJECTS_ALONE, '{"a": 2}', "a=2;Add", AS_OBJECTS),
        (TEXT_ALONE, '{"a":2}', 'args:{"a":2}Add', None),
        (TEXT_ALONE, {"a": "é"}, 'args:{"a": "é"}Add', AS_JSON),
        (EITHER, '{"a":2}', '{"a":2}Add', None),
        (EITHER, {"a": 2}, '{"a": 2}Add', None),
        (QUOTING, {"a": 2}, '{"a": 2}Add', None),
        (QUOTING, '{"a":"é"}', '{"a": "é"}Add', AS_OBJECTS),
        (QUOTING, "{}", "{}Add", AS_OBJECTS),
        (QUOTING, "not JSON", '"not JSON"Add', None),
        (QUOTING_TEXT_ALONE, '{"a":2}', '"{\\"a\\":2}"Add', QUOTED),
        (PRINTING, '{"a":2}', '{"a":2}Add', None),
        (PRINTING, {"a": 2}, "{'a': 2}Add", AS_PYTHON),
    ],
)
def test_arguments_are_as_given_unless_the_template_cannot_take_them(
    template: str, given: Any, text: str, remark: str | None
) -> None:
    messages = [{"role": "user", "content": "Add"}, {"role": "assistant", "tool_calls": [call(given)]}]
    whole = (
        "{% for c in messages[1].tool_calls %}{% set a = c.function.arguments %}"
        + template
        + "{% endfor %}{{ messages[0].content }}"
    )
    assert render([{"messages": messages}], whole) == ([text], {} if remark is None else {remark: [0]})


PARTS = "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{{ p.text }}|{% endfor %}{% endfor %}"
JOINING = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}"
)


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def test_parts_are_given_to_a_template_that_takes_them() -> None:
    messages = [{"role": "user", "content": parts("one", "two")}]
    assert render([{"messages": messages}], PARTS) == (["<user>one|two|"], {})
    assert render([{"messages": messages}, {"prompt": "Hi"}], JOINING) == (["onetwo", "Hi"], {})
    upper = "{% for p in messages[0].content %}{{ p.text | upper }}{% endfor %}"
    assert render([{"messages": messages}], upper) == (["ONETWO"], {})


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE,
        "{{ messages[-1].content.strip() }}",
        "{{ messages[-1]['content'] + '!' }}",
        "{{ messages[-1].content | tojson }}",
    ],
)
def test_one_part_of_text_is_given_as_text_where_the_template_takes_no_parts(template: str) -> None:
    given = [{"role": "user", "content": parts('2 "+" 2')}]
    as_text = [{"role": "user", "content": '2 "+" 2'}]
    [text], remarks = render([{"messages": given}], template)
    assert text == by_transformers(as_text, template)
    assert remarks == {AS_TEXT: [0]}


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (TEMPLATE, "prints content in parts with its brackets"),
        ("{{ messages[0].content | tojson }}", "prints content in parts with its brackets"),
        (
            "{% for p in messages[0].content %}{{ p }}{% endfor %}",
            "prints content in parts with its brackets",
        ),
        ("{{ messages[0].content[0].text }}", "leaves out a part of the content"),
        ("{{ messages[0].content + '' }}", "the chat template fails on it: TypeError"),
    ],
)
def test_several_parts_are_not_joined_by_guess(template: str, says: str) -> None:
    messages = [{"role": "user", "content": parts("one", "two")}]
    with pytest.raises(
        ChatTemplateError, match=rf"Prompt 0 \('one\\ntwo'\): the chat template .*{says}|{says}"
    ):
        render([{"messages": messages}], template)


@pytest.mark.parametrize(
    "template",
    [
        PARTS,  # of a text it writes nothing, letter by letter
        "{% for m in messages %}{{ m.content[0].text }}{% endfor %}",
        "{% for m in messages %}{% for p in m.content if p is mapping %}{{ p.text }}{% endfor %}{% endfor %}",
    ],
)
def test_text_is_given_as_a_part_where_the_template_takes_parts_alone(template: str) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    texts, remarks = render([{"messages": chat}, {"prompt": "Oh?"}], template)
    in_parts = [{**message, "content": parts(str(message["content"]))} for message in chat]
    user = [{"role": "user", "content": parts("Oh?")}]
    assert texts == [by_transformers(in_parts, template), by_transformers(user, template)]
    assert remarks == {AS_PARTS: [0, 1]}


def test_null_is_an_empty_text_to_a_template_that_takes_no_message_without_content() -> None:
    template = "{% for m in messages %}{{ '<' + m['content'] + '>' }}{{ m.tool_calls }}{% endfor %}"
    chat = agent(content=None)
    [text], remarks = render([{"messages": chat}], template)
    assert text == by_transformers(agent(content=""), template)
    assert AS_EMPTY in remarks


def test_a_chat_in_which_several_forms_are_changed_is_written_whole() -> None:
    template = (
        "{% for m in messages %}{{ m.content + '' }}{% for c in m.tool_calls or [] %}"
        "{{ '(' + c.function.arguments + ')' }}{% endfor %}{% endfor %}"
    )
    chat = [{"role": "user", "content": parts("Add")}, *agent({"a": 2}, None)[2:3]]
    texts, remarks = render([{"messages": chat}], template)
    assert texts == ['Add({"a": 2})']
    assert set(remarks) == {
        AS_EMPTY,
        AS_JSON,
        AS_TEXT,
        "the chat template leaves out `reasoning_content`",
    }


# --- What a template leaves out


NO_TOOLS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def test_what_a_template_leaves_out_is_named_with_its_prompts() -> None:
    rows = [
        {"prompt": "Hi"},
        {"messages": agent(), "tools": TOOLS, "documents": [{"text": "a"}]},
        {"prompt": "2 + 2", "tools": TOOLS},
    ]
    _, remarks = render(rows, NO_TOOLS)
    assert remarks == {
        "the chat template leaves out `tools`": [1, 2],
        "the chat template leaves out `documents`": [1],
        "the chat template leaves out `tool_calls`": [1],
        "the chat template leaves out `reasoning_content`": [1],
    }


def test_a_template_without_a_role_leaves_out_what_it_says() -> None:
    template = "{% for m in messages if m.role in ('user', 'assistant') %}{{ m.content }}{% endfor %}"
    chats: list[Any] = [
        {"messages": [{"role": r, "content": f"{r} says"} for r in ("system", "user", "tool")]}
    ]
    _, remarks = render(chats, template)
    assert remarks == {
        f"the chat template leaves out the content of a '{role}' message": [0] for role in ("system", "tool")
    }


def test_a_template_that_writes_one_text_for_all_prompts_is_told_of() -> None:
    texts, remarks = render(["Hello", "Why?"], "{{ bos_token }}<assistant>")
    assert texts == ["<s><assistant>"] * 2
    assert remarks == {"the chat template leaves out the content of a 'user' message": [0, 1]}


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content.split('</think>')[-1] | trim }}{% endfor %}",
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{{ messages | tojson }}",
        "{% for m in messages %}{{ m.content[:5] }}{% endfor %}",
    ],
)
def test_a_text_that_is_trimmed_shortened_or_quoted_is_not_left_out(template: str) -> None:
    messages = [
        {"role": "user", "content": '  say "hello"\n'},
        {"role": "assistant", "content": "<think>one\ntwo</think>\n\nHello."},
        {"role": "user", "content": "Good."},
    ]
    assert render([{"messages": messages}], template)[1] == {}


def test_notes_tell_what_a_template_left_out(base_folder: Path) -> None:
    rows: list[Any] = [{"prompt": "Hi", "tools": TOOLS}, {"prompt": "2 + 2"}]
    diff = activation_diff(base_folder, base_folder, rows, chat_template="base")
    assert notes_on_models(diff) == ["the chat template leaves out `tools`: prompts 0 (1 of 2)"]
    diff = activation_diff(base_folder, base_folder, rows)
    assert notes_on_models(diff) == [
        "without --chat-template the rows' `tools` are left out: prompts 0 (1 of 2)"
    ]


# --- Whose fault it is


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ 1 // 0 }}", "ZeroDivisionError: integer division or modulo by zero"),
        ("{{ {}.x.y }}", "has no attribute 'x'"),
        ("{{ '{b}'.format() }}", "KeyError: 'b'"),
        ("{{ '{0}'.format() }}", "IndexError: "),
        ("{{ 'a'.index('b') }}", "ValueError: substring not found"),
        ("{{ [].pop() }}", "pop"),
        ("{{ '%d' | format('a') }}", "TypeError: %d format"),
        ("{{ range(10 ** 9) | list }}", "OverflowError: Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ strftime_now(3) }}", "TypeError: strftime"),
        ("{{ messages | nothing }}", "No filter named 'nothing'"),
        ("{% for a in [1] %}" * 25 + "{% endfor %}" * 25, "SyntaxError: too many statically nested blocks"),
        ("{{ raise_exception('No\n  system  turn.') }}", "No system turn. Mend"),
        ("{{ '' }}", "makes an empty text of it"),
    ],
)
def test_whatever_a_template_raises_is_its_own_fault(template: str, says: str) -> None:
    with pytest.raises(ChatTemplateError, match=r"^Prompt 0 \('Hi'\): the chat template ") as raised:
        render(["Hi"], template)
    assert says in str(raised.value)


@pytest.mark.parametrize("kind", [ZeroDivisionError, TypeError, KeyError, AssertionError, MemoryError])
def test_what_is_raised_outside_of_the_template_is_not_its_fault(kind: type[Exception]) -> None:
    class Faulty(PreTrainedTokenizerFast):  # type: ignore[misc]  # transformers has no types
        def apply_chat_template(self, *arguments: Any, **options: Any) -> str:
            raise kind("ours")

    tokenizer = Faulty(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    with pytest.raises(kind, match="ours"):
        render(["Hi"], TEMPLATE, tokenizer)


# --- What is no chat


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], r"`messages` is not a chat: it is \[\]"),
        ({"role": "user"}, "`messages` is not a chat: it is {"),
        (["Hi"], "message 0 is 'Hi'"),
        ([{"role": "user", "content": "Hi"}, {"content": "Hi"}], "message 1 has no `role`"),
        ([{"role": 1, "content": "Hi"}], "message 0 has no `role`"),
        ([{"role": "user", "content": 42}], "message 0 has the `content` 42, which is neither"),
        ([{"role": "user", "content": {"text": "Hi"}}], "message 0 has the `content` {'text': 'Hi'}"),
        ([{"role": "user", "content": None}], "message 0 has no `content`"),
        ([{"role": "user"}], "message 0 has no `content`"),
        ([{"role": "user", "content": []}], "message 0 has no `content`"),
        ([{"role": "assistant", "content": None, "tool_calls": []}], "message 0 has no `content`"),
        ([{"role": "user", "content": ["Hi"]}], "message 0: a part of its `content` is 'Hi'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "has a part whose `text` is None"),
        ([{"role": "user", "content": [*parts("a"), {"type": "image"}]}], "has a part with `image`"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}],
            "with `image_url`",
        ),
        ([{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}], "with `input_audio`"),
        ([{"role": "user", "content": [{"video": "a.mp4"}]}], "with `video`"),
        ([("user", "Hi"), ("assistant", "Hi")], "`messages` is not a chat: it is "),
        ([("user", "Hi", 1)], r"message 0 is \['user', 'Hi', 1\]"),
        ([{"role": "user", "content": "Hi", "at": {1, 2}}], r"does not have \(set\)"),
        ([{"role": "user", "content": "Hi", "x": {1: 2}}], "keys are not all texts"),
        ([{"role": "user", "content": "Hi", "x": {"\ud83d": 2}}], "is not valid Unicode"),
        ([{"role": "assistant", "tool_calls": [call({"a": "\ud83d"})]}], "is not valid Unicode"),
    ],
)
def test_what_cannot_be_handed_on_is_refused_with_its_place(messages: Any, says: str) -> None:
    with pytest.raises(PromptsError, match=r"(?i)^prompt 0.*" + says):
        make_prompts([{"messages": messages}])


def test_brackets_without_end_are_refused() -> None:
    deep: Any = "x"
    for _ in range(500):
        deep = [deep]
    with pytest.raises(PromptsError, match="more than 64 brackets within brackets"):
        make_prompts([{"messages": [{"role": "user", "content": "Hi", "x": deep}]}])


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("tools", "no JSON", "prompt 0, `tools`: not JSON"),
        ("tools", {"name": "add"}, "prompt 0: `tools` is {'name': 'add'}. Write a JSON list of objects"),
        ("tools", '{"name": "add"}', "prompt 0: `tools` is {'name': 'add'}. Write a JSON list of objects"),
        ("tools", [print], "does not have"),
        ("tools", [1], r"prompt 0: `tools` is \[1\]. Write"),
        ("documents", "[1]", r"prompt 0: `documents` is \[1\]. Write"),
        ("chat_template_kwargs", [1], r"prompt 0: `chat_template_kwargs` is \[1\]. Write a JSON object"),
        ("chat_template_kwargs", {"tools": []}, "`chat_template_kwargs` holds `tools`. Make it a field"),
    ],
)
def test_what_is_for_the_template_has_its_form(field: str, value: Any, says: str) -> None:
    with pytest.raises(PromptsError, match=says):
        make_prompts([{"prompt": "Hi", field: value}])


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (5, "a chat template that is no text"),
        ({"default": None}, "a chat template that is no text"),
        ({None: "x"}, r"several chat templates \(None\)"),
    ],
)
def test_a_template_that_is_no_text_is_refused(template: Any, says: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ChatTemplateError, match=says):
        ChatTemplate(tokenizer, "its model").for_chat({})
