import enum
import json
from datetime import datetime
from types import MappingProxyType

import chat_templates
import jinja2
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


CALL = {"id": "abcdef123", "type": "function", "function": {"name": "add", "arguments": {"a": [1, "é <b>"], "c": None}}}
CONVERSATIONS = {
    "question": [{"role": "user", "content": "  1 < 2 & 'ü'?\n"}],
    "system": [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hello"}],
    "turns": [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "<think>\nWell\n</think>\n\nHi"},
        {"role": "user", "content": "And?"},
    ],
    "tools": [
        {"role": "user", "content": "3 + 4"},
        {"role": "assistant", "content": "", "reasoning_content": "I add", "tool_calls": [CALL]},
        {"role": "tool", "name": "add", "content": "7", "tool_call_id": "abcdef123"},
    ],
    "two tools": [
        {"role": "user", "content": "3 + 4, and 5"},
        {"role": "assistant", "content": "So", "reasoning": "twice", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "7", "tool_call_id": "abcdef123"},
        {"role": "tool", "content": "9", "tool_call_id": "abcdef123"},
    ],
    "a call without text": [
        {"role": "user", "content": "3 + 4"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": CALL["function"]}]},
    ],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": "image"}]}],
}
KWARGS = {
    "none": {},
    "no thinking": {"enable_thinking": False},
    "thinking": {"enable_thinking": True, "date_string": "1 Jan 2026", "builtin_tools": ["x"], "bos_token": "<mine>"},
    "documents": {"documents": [{"title": "A", "text": "é"}, {"n": 1}], "xml_tools": ["a", "b"]},
}


def rendered_or_refused(render, messages, **options):
    try:
        return render(messages, **options)
    except (jinja2.TemplateError, TypeError, RequestError) as err:
        return "refused: " + str(err).rpartition("refuses the conversation: ")[2]


@pytest.mark.parametrize("name", chat_templates.TEMPLATES)
@pytest.mark.parametrize("tools", [None, [], TOOLS * 2], ids=["no tools", "empty tools", "tools"])
def test_families_templates_render_as_in_transformers(folder, name, tools):
    """Text for text; and what a template refuses there it refuses here, in the same words."""
    checkpoint = folder(chat_template=chat_templates.TEMPLATES[name])
    processor, oracle = select_processor([], checkpoint), AutoTokenizer.from_pretrained(checkpoint.path)
    num_rendered = 0
    for messages in CONVERSATIONS.values():
        for kwargs in KWARGS.values():
            for prompt in (True, False):
                options = {"tools": tools, "add_generation_prompt": prompt, **kwargs}
                expected = rendered_or_refused(oracle.apply_chat_template, messages, tokenize=False, **options)
                assert rendered_or_refused(processor.render_chat, messages, **options) == expected
                num_rendered += "refused: " not in expected
    assert num_rendered >= 8


def test_a_template_is_compiled_once(folder, monkeypatch):
    processor = select_processor([], folder(chat_template="{{ messages | length }}"))
    assert processor.render_chat([]) == "0"
    monkeypatch.setattr(jinja2.Environment, "compile", None)
    assert processor.render_chat([{}]) == "1"


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


def test_of_values_with_methods_only_the_value_reaches_a_template(folder):
    class Text(str):
        def wipe(self):
            raise AssertionError("a template ran this")

    class Number(enum.IntEnum):
        SEVEN = 7

    processor = select_processor([], folder(chat_template="{{ messages[0].content.wipe() }}"))
    with pytest.raises(RequestError, match="has no attribute 'wipe'"):
        processor.render_chat([{"role": "user", "content": Text("x")}])
    processor = select_processor([], folder(chat_template="{{ messages[0].content }} {{ n }}"))
    assert processor.render_chat([{"role": "user", "content": Text("x")}], n=Number.SEVEN) == "x 7"


@pytest.mark.parametrize(
    ("messages", "tools", "message"),
    [
        (["hello"], None, r"messages\[0\] is 'hello', and an object is wanted"),
        ("hello", None, "messages is str, and a list of objects is wanted"),
        ([], ["add"], r"tools\[0\] is 'add', and an object is wanted"),
        ([], {"name": "add"}, "tools is dict, and a list of objects is wanted"),
    ],
)
def test_what_is_no_conversation_is_refused(folder, messages, tools, message):
    processor = select_processor([], folder(chat_template="{{ messages }}"))
    with pytest.raises(RequestError, match=message):
        processor.render_chat(messages, tools=tools)


ATTACKS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['json'] }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ ''|attr('__class__') }}",
    "{{ ''|attr('format')('{0.__class__}', 1) | attr('__class__') }}",
    "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "{{ dict.mro() }}",
    "{{ messages.clear() }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{{ messages.sort() }}",
    "{{ range(10 ** 9) | list }}",
    "{{ self.__init__ }}{{ self._TemplateReference__context.environment.from_string('x').render() }}",
    "{% include 'other' %}",
    "{% import 'os' as os %}{{ os }}",
]


@pytest.mark.parametrize("template", ATTACKS)
def test_a_template_stays_in_its_sandbox(folder, template):
    messages = [{"role": "user", "content": "x"}]
    processor = select_processor([], folder(chat_template=template))
    try:
        rendered = processor.render_chat(messages)
    except RequestError:
        rendered = ""
    assert rendered == ""
    assert messages == [{"role": "user", "content": "x"}]


@pytest.mark.parametrize("name", ["chatml", "tagged", "thinking", "named", "alternating"])
@pytest.mark.parametrize("content", ["Hi", "Hi \n", [{"type": "text", "text": "Hi "}], ""])
def test_the_last_message_may_go_on(folder, name, content):
    if name != "named" and isinstance(content, list):
        content = "Hi  there  "
    checkpoint = folder(chat_template=chat_templates.TEMPLATES[name])
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": content}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    oracle = AutoTokenizer.from_pretrained(checkpoint.path)
    expected = oracle.apply_chat_template(messages, tokenize=False, **options)
    assert select_processor([], checkpoint).render_chat(messages, **options) == expected


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        ([{"content": "x"}], {}, "goes with add_generation_prompt=False"),
        ([], {"add_generation_prompt": False}, "no text that could go on"),
        ([{"content": None}], {"add_generation_prompt": False}, "no text that could go on"),
        ([{"content": "x"}], {"add_generation_prompt": False}, "leaves the last message out"),
    ],
)
def test_what_cannot_go_on_is_refused(folder, messages, options, message):
    processor = select_processor([], folder(chat_template="{{ messages | length }}"))
    with pytest.raises(RequestError, match=message):
        processor.render_chat(messages, continue_final_message=True, **options)


def test_a_template_is_chosen_by_name_and_never_given(folder):
    named = [{"name": "default", "template": "plain"}, {"name": "rag", "template": "{{ documents[0].title }}"}]
    processor = select_processor([], folder(chat_template=named))
    assert processor.render_chat([], chat_template="rag", documents=[{"title": "A"}]) == "A"
    with pytest.raises(RequestError, match=r"no chat template named '\{\{ 1 \}\}', only \['default', 'rag'\]"):
        processor.render_chat([], chat_template="{{ 1 }}")


def test_a_template_file_that_is_no_text_is_named(folder):
    checkpoint = folder()
    (checkpoint.path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja is not UTF-8"):
        select_processor([], checkpoint)


def test_a_template_that_is_not_jinja_names_file_and_line(folder):
    processor = select_processor([], folder(chat_template="line\n{% if %}"))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is not Jinja: line 2"):
        processor.render_chat([])


@pytest.mark.parametrize("template", [7, [1], [{"name": "default"}]])
def test_a_template_of_another_type_names_the_file(folder, template):
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is neither"):
        select_processor([], folder(chat_template=template))
