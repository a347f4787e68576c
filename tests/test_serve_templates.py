# SPDX-License-Identifier: Apache-2.0
"""Chat templates render as transformers renders them; where it is installed, both are compared."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jinja2")

from paddle_ccq.errors import CcqError
from paddle_ccq.texts.chat_template import ChatTemplate

CHAT = [
    {"role": "system", "content": 'Be <brief> & "kind", 你好.'},
    {"role": "user", "content": "  one\ntwo "},
    {"role": "assistant", "content": "three", "reasoning_content": "because"},
    {"role": "user", "content": "four"},
]
SETTINGS = {
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "lstrip": False, "special": True},
    "pad_token": None,
    "cls_token": "<|begin_of_sentence|>",
    "sep_token": "<|end_of_sentence|>",
    "add_bos_token": True,
    "additional_special_tokens": ["<|a|>", "<|b|>"],
}
# In the way of ERNIE-4.5's own: cls_token first, roles by name, the mark for the answer.
ERNIE = """\
{%- if not add_generation_prompt is defined -%}
    {%- set add_generation_prompt = true -%}
{%- endif -%}
{{- cls_token -}}
{%- for message in messages -%}
    {%- if message["role"] == "user" -%}
        {{- "User: " + message["content"] + "\\n" -}}
    {%- elif message["role"] == "assistant" -%}
        {{- "Assistant: " -}}{% generation %}{{ message["content"] + sep_token }}{% endgeneration %}
    {%- elif message["role"] == "system" -%}
        {{- message["content"] + "\\n" -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "Assistant: " -}}
{%- endif -%}
"""
TEMPLATES = {
    "ernie": ERNIE,
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}\n"
        "  {% generation %}\n    {{ m.content }}{{ eos_token }}\n  {% endgeneration %}\n"
        "{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
    ),
    "generation dashes": "a {%- generation -%} b {{ messages[0].role }} {%- endgeneration -%} c",
    "generation scope": (
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
    ),
    "generation in a loop": (
        "{% for m in messages %}{% generation %}{{ loop.index }}{{ m.role }}{% endgeneration %}"
        "{% endfor %}"
    ),
    "two generations": ("{% generation %}a{% endgeneration %}{% generation %}{% endgeneration %}z"),
    "break and continue": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{{ m.content }}{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}"
    ),
    "tojson": "{{ messages | tojson }}",
    "tojson indent": "{{ messages[0] | tojson(indent=2) }}{{ [1] | tojson(indent=1) }}",
    "tojson sorted": (
        "{{ {'b': 1, 'a': [1, none]} | tojson(sort_keys=true, separators=(',', ':')) }}"
    ),
    "tojson ascii": "{{ messages[0] | tojson(ensure_ascii=true) }}",
    "tojson by place": "{{ {'b': '你', 'a': 2} | tojson(true, 4, none, true) }}",
    "blocks": "  {% if true %}\n    x\n  {% endif %}\n  {# note #}\ny\n",
    "undefined": "[{{ pad_token }}{{ nothing }}{{ tools }}{{ documents }}]",
    "tokens": "{{ bos_token }}{{ eos_token }}{{ cls_token }}",
    "defined": "{{ tools is defined }}{{ documents is none }}{{ mask_token is defined }}",
    "macros": (
        "{% macro show(m, extra='') %}<{{ m.role }}{{ extra }}>{% endmacro %}"
        "{% for m in messages %}{{ show(m, extra='!') }}{% endfor %}"
    ),
    "namespace": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ ns.n }}"
    ),
    "filters": "{{ messages[1].content | trim | upper | replace('ONE', '1') }}{{ [3,1]|sort }}",
    "methods": "{{ messages[1].content.strip().split('\\n') }}{{ messages[2].get('x', 'y') }}",
    "slices": "{% for m in messages[1:] %}{{ m['role'][:2] }}{% endfor %}{{ messages[::-1] }}",
    "reasoning": "{{ messages[2].reasoning_content }}",
    "year": "{{ strftime_now('%Y') }}",
    "html": "{{ '<b>' }}{{ messages[0].content | e }}",
    "raw": "{% raw %}{{ x }}{% endraw %}",
    "globals": "{{ range(3) | list }}{{ dict(a=1) }}{{ cycler('a', 'b').next() }}{{ joiner()() }}",
}


def made(folder: Path, template: Any, **settings: Any) -> ChatTemplate:
    found = {**SETTINGS, **settings}
    if template is not None:
        found["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(found))
    return ChatTemplate(folder)


@pytest.mark.parametrize("name", TEMPLATES)
def test_as_transformers_renders_it(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    ours = made(tmp_path, TEMPLATES[name]).render(CHAT)
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        chat_template=TEMPLATES[name],
        bos_token="<s>",
        eos_token="</s>",
        cls_token=SETTINGS["cls_token"],
        sep_token=SETTINGS["sep_token"],
        additional_special_tokens=["<|a|>", "<|b|>"],
    )
    # Releases before 5.24 do not repeat what was thought under each name.
    chat = [
        {"thinking": m["reasoning_content"], **m} if "reasoning_content" in m else m for m in CHAT
    ]
    expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert ours == expected


def test_further_tokens_are_a_list(tmp_path: Path) -> None:
    """As in transformers 4; since 5, templates no longer see them."""
    assert made(tmp_path, "{{ additional_special_tokens[1] }}").render(CHAT) == "<|b|>"


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_a_thought_has_every_name(tmp_path: Path, name: str) -> None:
    template = "{{ messages[0].thinking }} {{ messages[0].reasoning_content }}"
    message = {"role": "assistant", "content": "", name: "because"}
    assert made(tmp_path, template).render([message]) == "because because"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "ernie",
            '<|begin_of_sentence|>Be <brief> & "kind", 你好.\nUser:   one\ntwo \n'
            "Assistant: three<|end_of_sentence|>User: four\nAssistant: ",
        ),
        ("generation dashes", "ab systemc"),
        ("generation scope", "21"),
        ("generation in a loop", "1system2user3assistant4user"),
        ("two generations", "az"),
        ("break and continue", "  one\ntwo three"),
        ("tojson by place", '{\n    "a": 2,\n    "b": "\\u4f60"\n}'),
        ("tojson sorted", '{"a":[1,null],"b":1}'),
        ("blocks", "    x\ny"),
        ("undefined", "[NoneNone]"),
        ("tokens", "<s></s><|begin_of_sentence|>"),
        ("defined", "TrueTrueFalse"),
        ("html", "<b>Be &lt;brief&gt; &amp; &#34;kind&#34;, 你好."),
    ],
)
def test_what_it_renders(tmp_path: Path, name: str, text: str) -> None:
    assert made(tmp_path, TEMPLATES[name]).render(CHAT) == text


def test_the_date_is_todays(tmp_path: Path) -> None:
    before = datetime.now().strftime("%d %b %Y")
    text = made(tmp_path, "{{ strftime_now('%d %b %Y') }}").render(CHAT)
    assert text in (before, datetime.now().strftime("%d %b %Y"))


def test_where_a_template_is_looked_for(tmp_path: Path) -> None:
    assert made(tmp_path, None).is_plain
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "legacy"}))
    assert made(tmp_path, None).render(CHAT) == "legacy"
    assert made(tmp_path, "settings").render(CHAT) == "settings"
    (tmp_path / "chat_template.jinja").write_text("file {{ bos_token }}\r\nend\n", "utf-8")
    assert made(tmp_path, "settings").render(CHAT) == "file <s>\nend"


def test_several_templates_by_name(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "{{ tools | tojson }}"}]
    default = {"name": "default", "template": "d{{ messages | length }}"}
    assert made(tmp_path, [*named, default]).render(CHAT) == "d4"
    assert made(tmp_path, {"tool_use": "t", "default": "d"}).render(CHAT) == "d"
    for without in (named, {"tool_use": "t"}):
        with pytest.raises(CcqError, match=r"tokenizer_config\.json: .*'default', but tool_use"):
            made(tmp_path, without)


def test_a_folder_of_named_templates(tmp_path: Path) -> None:
    folder = tmp_path / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool_use.jinja").write_text("t")
    with pytest.raises(CcqError, match=r"additional_chat_templates: .*'default', but tool_use"):
        made(tmp_path, None)
    assert made(tmp_path, "settings").render(CHAT) == "settings"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert made(tmp_path, "settings").render(CHAT) == "file"
    (folder / "default.jinja").write_text("d{{ messages | length }}")
    assert made(tmp_path, "settings").render(CHAT) == "d4"
    (folder / "default.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(CcqError, match=r"default\.jinja: not UTF-8"):
        made(tmp_path, None)


def test_tokens_that_only_the_older_file_names(tmp_path: Path) -> None:
    found = {"mask_token": {"content": "<mask:1>"}, "bos_token": "<other>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(found))
    assert made(tmp_path, "{{ mask_token }}{{ bos_token }}").render(CHAT) == "<mask:1><s>"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% generation %}x", "chat_template (line 1)"),
        ("a\n{% if %}", "chat_template (line 2)"),
        ("{% endgeneration %}", "endgeneration"),
        (7, "not a string"),
        ([{"name": "default", "template": 7}], "not a string"),
    ],
)
def test_templates_that_are_none(tmp_path: Path, template: Any, text: str) -> None:
    with pytest.raises(CcqError) as error:
        made(tmp_path, template)
    assert text in str(error.value) and "tokenizer_config.json" in str(error.value)


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(CcqError, match=r"chat_template\.jinja: not UTF-8"):
        made(tmp_path, None)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[9].content }}",
        "{{ messages[0] | tojson(indent={}) }}",
        "{{ messages[0].content.index('zzz') }}",
        "{{ {}['a']['b'] }}",
        "{{ [].pop() }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% set x = messages.append(1) %}",
        "{{ messages[0].update({'role': 'x'}) }}",
    ],
)
def test_a_template_that_fails_is_one_line(tmp_path: Path, template: str) -> None:
    with pytest.raises(ValueError, match=r"^the chat template: [^\n]+$"):
        made(tmp_path, template).render(CHAT)
