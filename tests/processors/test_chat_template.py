import json
from datetime import datetime
from types import MappingProxyType

import pytest
from tokenizer_folders import byte_level, write_folder
from transformers import AutoTokenizer

from infinilm.processors.huggingface import select_processor
from infinilm_hookspecs import CheckpointError, RequestError

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 < 2 & 'ü' \"quoted\""},
    {"role": "assistant", "content": "yes", "tool_calls": [{"name": "add", "arguments": {"a": [1, 2.5, None, True]}}]},
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Köln <b>", "parameters": {"type": "object"}}}]

TEMPLATES = {
    "tokens": "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m.content }}{{ eos_token }}\n{% endfor %}",
    "prompt": "{% if add_generation_prompt %}go{% endif %}{{ pad_token }}{{ documents }}",
    "blocks": "  {% for m in messages %}\n   {% if m.role == 'user' %}\n{{ m.content }}\n   {% endif %}\n{% endfor %}",
    "tojson": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ tools | tojson(sort_keys=true) }}",
    "loop": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
    "generation": "{% generation %}{% set x = 1 %}{{ messages[0].content }}{{ x }}{% endgeneration %}{{ x }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "macro": "{% macro f(m, n=2) %}{{ m.role | upper }}{{ n }}{% endmacro %}{{ f(messages[0]) }}{{ f(messages[1]) }}",
    "filters": "{{ messages | map(attribute='role') | join(',') }}{{ messages[0].content.split(' ')[0] | trim }}",
    "kwargs": "{{ enable_thinking is defined and enable_thinking }}{{ nothing }}{{ messages[0].get('name') }}",
    "calls": "{% for c in messages[2].tool_calls %}{{ c.name }}{{ c.arguments.items() | list }}{% endfor %}",
}


@pytest.fixture
def folder(tmp_path):
    def make(**tokenizer_config):
        return write_folder(tmp_path, byte_level(), **tokenizer_config)

    return make


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_renders_as_transformers_does(folder, name, tools, add_generation_prompt):
    checkpoint = folder(chat_template=TEMPLATES[name])
    options = {"tools": tools, "add_generation_prompt": add_generation_prompt, "enable_thinking": True}
    expected = AutoTokenizer.from_pretrained(checkpoint.path).apply_chat_template(MESSAGES, tokenize=False, **options)
    assert select_processor([], checkpoint).render_chat(MESSAGES, **options) == expected


def test_read_only_mappings_are_messages_too(folder):
    processor = select_processor([], folder(chat_template="{{ messages | tojson }}"))
    assert processor.render_chat((MappingProxyType({"role": "user"}),)) == '[{"role": "user"}]'


def test_the_jinja_file_comes_before_the_config_and_the_config_before_the_json_file(folder):
    checkpoint = folder()
    path = checkpoint.path
    (path / "chat_template.json").write_text(json.dumps({"chat_template": "third"}))
    assert select_processor([], checkpoint).render_chat([]) == "third"
    checkpoint = folder(chat_template="second")
    assert select_processor([], checkpoint).render_chat([]) == "second"
    (path / "chat_template.jinja").write_text("first")
    assert select_processor([], checkpoint).render_chat([]) == "first"


def test_named_templates(folder):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    processor = select_processor([], folder(chat_template=named))
    assert processor.render_chat([]) == "plain"
    assert processor.render_chat([], tools=TOOLS) == "tools"
    processor = select_processor([], folder(chat_template=named[1:]))
    with pytest.raises(RequestError, match=r"no chat template named 'default', only \['tool_use'\]"):
        processor.render_chat([])


def test_a_template_for_tools_lies_in_a_folder_of_its_own(folder):
    checkpoint = folder()
    (checkpoint.path / "chat_template.jinja").write_text("plain {{ tools | length if tools else 0 }}")
    (checkpoint.path / "additional_chat_templates").mkdir()
    (checkpoint.path / "additional_chat_templates" / "tool_use.jinja").write_text("with {{ tools | length }}")
    oracle = AutoTokenizer.from_pretrained(checkpoint.path)
    for tools, expected in (None, "plain 0"), (TOOLS, "with 1"):
        assert oracle.apply_chat_template(MESSAGES, tools=tools, tokenize=False) == expected
        assert select_processor([], checkpoint).render_chat(MESSAGES, tools=tools) == expected


def test_special_tokens_come_from_either_file(folder):
    checkpoint = folder(chat_template="{{ bos_token }}{{ eos_token }}{{ pad_token }}", eos_token=None)
    special = {"bos_token": "<other>", "eos_token": {"content": "</s>"}, "pad_token": "<pad>"}
    (checkpoint.path / "special_tokens_map.json").write_text(json.dumps(special))
    assert select_processor([], checkpoint).render_chat([]) == "<s></s><pad>"


def test_the_date_is_today(folder):
    processor = select_processor([], folder(chat_template="{{ strftime_now('%Y-%m') }}"))
    assert processor.render_chat([]) == datetime.now().strftime("%Y-%m")


def test_without_a_template_the_error_says_what_to_do(folder):
    with pytest.raises(RequestError, match=r"no chat template \(looked in chat_template\.jinja, .*put a chat_template"):
        select_processor([], folder()).render_chat(MESSAGES)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[9].content }}", "no element 9"),
        ("{{ messages + 1 }}", "can only concatenate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% set _ = messages.append(1) %}", "unsafe"),
    ],
)
def test_a_template_that_refuses_is_a_request_error(folder, template, message):
    processor = select_processor([], folder(chat_template=template))
    with pytest.raises(RequestError, match=message):
        processor.render_chat(MESSAGES)


def test_objects_with_methods_never_reach_a_template(folder):
    processor = select_processor([], folder(chat_template="{{ messages }}"))
    with pytest.raises(RequestError, match=r"messages\[0\]\.content is object"):
        processor.render_chat([{"role": "user", "content": object()}])


def test_a_template_that_is_not_jinja_names_file_and_line(folder):
    processor = select_processor([], folder(chat_template="line\n{% if %}"))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is not Jinja: line 2"):
        processor.render_chat([])


@pytest.mark.parametrize("template", [7, [1], [{"name": "default"}]])
def test_a_template_of_another_type_names_the_file(folder, template):
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is neither"):
        select_processor([], folder(chat_template=template))
