"""Chat templates: a conversation as one text, by a Jinja template that comes with the model and is not trusted.

The language is that of `transformers` (chat templating documentation), rendered in Jinja's sandbox.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from everstate.core.errors import TokenizerError, did_you_mean

TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"

# What the code of a template can raise: Jinja's own errors, and Python's for wrong types, keys, indices and sizes.
FAILURES = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


class ChatTemplate:
    """A template and the names of the special tokens that it writes, such as `{"bos_token": "<s>"}`.

    named: further templates of the same tokenizer; `tool_use` serves conversations with tools, others are asked for.
    Raises `TokenizerError` when a template is not Jinja.
    """

    def __init__(
        self, source: str, tokens: Mapping[str, str] | None = None, named: Mapping[str, str] | None = None
    ) -> None:
        self.source = source
        self.tokens = dict(tokens or {})
        self.named = dict(named or {})
        self._template = _compiled(source, TEMPLATE_FILE)
        self._named = {name: _compiled(text, template_file(name)) for name, text in self.named.items()}

    def __eq__(self, other: object) -> bool:
        mine = (self.source, self.tokens, self.named)
        return isinstance(other, ChatTemplate) and mine == (other.source, other.tokens, other.named)

    def __hash__(self) -> int:
        return hash((self.source, *sorted(self.tokens.items()), *sorted(self.named.items())))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        now: datetime | None = None,
        variables: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> str:
        """The text of a conversation, to be encoded with `special=True` and no further `bos_id`.

        Each message has a `role` and mostly a `content`. `add_generation_prompt` ends the text where the model is to
        answer; `now` is for templates that write the date; `variables` are the template's own, such as
        `enable_thinking`; `name` is that of one of the further templates. The name of a special token inside a message
        becomes that token when the text is encoded: refuse such messages from users that are not trusted.
        Raises `TokenizerError` with the template's own words when it refuses the conversation.
        """
        for index, message in enumerate(messages):
            if not isinstance(message.get("role"), str):
                raise TokenizerError(f"message {index} has no role; give it one, such as 'user' or 'assistant'")

        def strftime_now(form: str) -> str:
            if now is None:
                raise ValueError("it writes the date and was given none; pass now=")
            return now.strftime(form)

        template = self._chosen(name, bool(tools))
        try:
            return template.render(
                {
                    **self.tokens,
                    **(variables or {}),
                    "messages": messages,
                    "tools": tools,
                    "add_generation_prompt": add_generation_prompt,
                    "strftime_now": strftime_now,
                }
            )
        except SecurityError as error:
            raise TokenizerError(
                f"the chat template tried to leave its sandbox ({_line(error)}); use a template that you trust"
            ) from None
        except FAILURES as error:
            raise TokenizerError(f"the chat template refused the conversation: {_line(error)}") from None

    def _chosen(self, name: str | None, tools: bool) -> Template:
        if name is None:
            return self._named.get("tool_use", self._template) if tools else self._template
        if name not in self._named:
            raise TokenizerError(f"there is no chat template {name!r}; {did_you_mean(name, self._named)}")
        return self._named[name]


def chat_files(chat: ChatTemplate | None) -> dict[str, str | bytes]:
    """The files of a tokenizer's folder that hold its templates, if it has any."""
    if chat is None:
        return {}
    return {TEMPLATE_FILE: chat.source, **{template_file(name): text for name, text in chat.named.items()}}


def template_file(name: str) -> str:
    """Where a further template is written. Raises `TokenizerError` for a name that is no plain file name."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise TokenizerError(f"a chat template is called {name!r}; name it in letters, digits, and _ . -")
    return f"{TEMPLATE_FOLDER}/{name}.jinja"


def chat_tokens(chat: ChatTemplate | None) -> dict[str, str]:
    """The special tokens that the template writes, by the names that it has for them."""
    return {} if chat is None else chat.tokens


class Generation(Extension):
    """`{% generation %}` marks what the model wrote, for training; it changes nothing in the text."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compiled(source: str, file: str) -> Template:
    try:
        return ENVIRONMENT.from_string(source)
    except TemplateSyntaxError as error:
        raise TokenizerError(
            f"the chat template is not Jinja at line {error.lineno}: {error.message}; mend {file}"
        ) from None
    except RecursionError:
        raise TokenizerError(f"the chat template is nested too deeply; simplify {file}") from None


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models were trained on it: Jinja's own filter writes `<` and non-ASCII letters as escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _line(error: BaseException) -> str:
    words = " ".join(str(error).split())
    return words if isinstance(error, TemplateError) else f"{type(error).__name__}: {words}"


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment


ENVIRONMENT = _environment()
