"""Chat templates: what they write, and what they are not let to do."""

from __future__ import annotations

from datetime import datetime

import pytest

from everstate.core.errors import TokenizerError
from everstate.tokenizers import ByteTokenizer, ChatTemplate

# ChatML with a system line, tools and a date, in the manner of published templates.
CHATML = """\
{{ bos_token }}
{%- if tools %}
    {{- '<|tools|>' + tools | tojson + '\\n' }}
{%- endif %}
{% for message in messages %}
    {% if message.role not in ['system', 'user', 'assistant'] %}
        {{ raise_exception('Unknown role: ' + message['role']) }}
    {% endif %}
    {% if message.content == 'skip' %}{% continue %}{% endif %}
<|{{ message['role'] }}|>
    {% generation %}
{{ message['content'] | trim }}<|eos|>
    {% endgeneration %}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}
"""

USER = {"role": "user", "content": " Grüße <b> "}
ANSWER = {"role": "assistant", "content": "Hallo"}


def test_a_conversation() -> None:
    template = ChatTemplate(CHATML, {"bos_token": "<|bos|>"})
    written = "<|bos|><|user|>\nGrüße <b><|eos|>\n<|assistant|>\nHallo<|eos|>\n"
    assert template.render([USER, {"role": "user", "content": "skip"}, ANSWER]) == written
    assert template.render([USER, ANSWER], add_generation_prompt=True) == written + "<|assistant|>\n"
    ids = ByteTokenizer(template).encode(template.render([USER]), special=True)
    assert (ids[0], ids[-2:]) == (256, [257, 10])


def test_tools_are_json_as_models_know_it() -> None:
    template = ChatTemplate(CHATML)
    written = template.render([], tools=[{"name": "größe", "doc": "a < b & 'c'"}])
    assert written == '<|tools|>[{"name": "größe", "doc": "a < b & \'c\'"}]\n'
    assert ChatTemplate("{{ [1, {'a': 2}] | tojson(indent=2) }}").render([]) == '[\n  1,\n  {\n    "a": 2\n  }\n]'


def test_time_is_passed() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}")
    assert template.render([], now=datetime(2026, 2, 3)) == "03 Feb 2026"
    with pytest.raises(TokenizerError, match="writes the date and was given none; pass now="):
        template.render([])


def test_variables_of_its_own() -> None:
    template = ChatTemplate("{% if enable_thinking is defined and enable_thinking %}<think>{% endif %}")
    assert template.render([]) == ""
    assert template.render([], variables={"enable_thinking": True}) == "<think>"


def test_a_refused_conversation_is_one_line() -> None:
    with pytest.raises(TokenizerError, match=r"^the chat template refused the conversation: Unknown role: robot$"):
        ChatTemplate(CHATML).render([{"role": "robot", "content": ""}])
    with pytest.raises(TokenizerError, match="message 1 has no role"):
        ChatTemplate(CHATML).render([USER, {"content": "x"}])


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ messages.nothing.deeper }}", "no attribute 'nothing'"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 'a' + 1 }}", "TypeError"),
        ("{{ '%q' % 1 }}", "ValueError"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ],
)
def test_a_template_that_fails_is_one_line(source: str, words: str) -> None:
    with pytest.raises(TokenizerError, match="the chat template refused") as caught:
        ChatTemplate(source).render([])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__closure__[0].cell_contents }}",
        "{{ messages.append({'role': 'user'}) }}",
        "{{ ''|attr('__class__')|attr('__base__')|attr('__subclasses__')() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
    ],
)
def test_a_template_that_leaves_its_sandbox_is_refused(source: str) -> None:
    messages = [USER]
    with pytest.raises(TokenizerError, match=r"tried to leave its sandbox|has no attribute '__subclasses__'"):
        ChatTemplate(source).render(messages)
    assert messages == [USER]


def test_a_template_that_is_none_is_refused() -> None:
    with pytest.raises(TokenizerError, match=r"is not Jinja at line 2: .*mend chat_template\.jinja"):
        ChatTemplate("fine\n{% if %}")
    with pytest.raises(TokenizerError, match="nested too deeply"):
        ChatTemplate("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}")


def test_templates_are_values() -> None:
    assert ChatTemplate("a", {"x": "y"}) == ChatTemplate("a", {"x": "y"})
    assert len({ChatTemplate("a"), ChatTemplate("a"), ChatTemplate("b")}) == 2
    assert ChatTemplate("a") != ChatTemplate("a", {"x": "y"})
