"""The folder's chat template, rendered as transformers renders it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .errors import ChatTemplateError, ManifestError, one_line
from .manifest import Manifest

__all__ = ["ChatTemplate", "load_chat_template"]

_SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class _Generation(Extension):
    """`{% generation %}`, which marks the assistant's part for training: here its body alone."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """Messages to the text that the model was tuned on. Templates are data from a checkpoint: they
    run in a sandbox that lets them change nothing.

    Args:
        source: the Jinja template, or None where the model has none.
        special_tokens: `bos_token` and the like, as the template names them.
    """

    def __init__(self, source: str | None, special_tokens: Mapping[str, str]) -> None:
        self._source = source
        self._special_tokens = dict(special_tokens)

    def require(self) -> None:
        """Whether there is one, and it is well-formed.

        Raises:
            ChatTemplateError: not so.
        """
        _ = self._compiled

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        values: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a chat.

        Args:
            messages: each with `role` and `content`.
            add_generation_prompt: end where the assistant's answer begins.
            values: further variables that the template knows, such as `tools` or
                `enable_thinking`.

        Raises:
            ChatTemplateError: no template, or it refuses these messages.
        """
        template = self._compiled
        # A copy: templates may not change what is the caller's.
        chat = json.loads(_as_json(messages))
        if not chat or not all(isinstance(message, dict) for message in chat):
            raise ChatTemplateError(
                "a chat is a list of messages such as {'role': 'user', 'content': 'Hello'}"
            )
        variables = {"tools": None, "documents": None, **self._special_tokens, **(values or {})}
        try:
            return template.render(
                messages=chat, add_generation_prompt=add_generation_prompt, **variables
            )
        except Exception as error:  # whatever a foreign template does wrong
            raise ChatTemplateError(
                f"the chat template refuses these messages: {one_line(error)}"
            ) from error

    @cached_property
    def _compiled(self) -> jinja2.Template:
        if self._source is None:
            raise ChatTemplateError(
                "this engine has no chat template: give the prompt as the model expects it, or "
                "export again from a checkpoint that has one (instruction-tuned models do)"
            )
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            return environment.from_string(self._source)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(
                f"the chat template is malformed: {one_line(error)}; export again from a "
                "checkpoint with a valid one"
            ) from error


def load_chat_template(folder: Path, manifest: Manifest) -> ChatTemplate:
    """From `chat_template.jinja`, else from `tokenizer_config.json`, where the folder has them.

    Raises:
        ManifestError: one of these files cannot be read, or has an entry of several templates
            without a name or a template.
    """
    files = {Path(name).name: folder / name for name in manifest.tokenizer_files}
    settings = _read_json(files.get("special_tokens_map.json"))
    settings |= _read_json(files.get("tokenizer_config.json"))
    source = settings.get("chat_template")
    if (path := files.get("chat_template.jinja")) is not None:
        source = _read(path)
    elif isinstance(source, list):  # several, each with a name
        source = _default_of(source, folder)
    tokens = {name: _token_text(settings.get(name)) for name in _SPECIAL_TOKENS}
    special = {name: text for name, text in tokens.items() if text is not None}
    return ChatTemplate(source if isinstance(source, str) else None, special)


def _default_of(entries: list[Any], folder: Path) -> str | None:
    named = {}
    for number, entry in enumerate(entries, start=1):
        match entry:
            case {"name": str(name), "template": str(template)}:
                named[name] = template
            case _:
                raise ManifestError(
                    f"{folder}: entry {number} of the tokenizer's chat_template must have a name "
                    "and a template, both texts; export the model again"
                )
    return named.get("default")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path} cannot be read: {error}; export the model again") from error


def _read_json(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        data = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise ManifestError(f"{path} is no JSON: {error}; export the model again") from error
    return data if isinstance(data, dict) else {}


def _token_text(token: object) -> str | None:
    if isinstance(token, dict):  # an AddedToken
        token = token.get("content")
    return token if isinstance(token, str) else None


def _as_json(messages: Sequence[Mapping[str, Any]]) -> str:
    try:
        return json.dumps([dict(message) for message in messages])
    except (TypeError, ValueError) as error:
        raise ChatTemplateError(f"messages must be plain data: {one_line(error)}") from error


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)  # local time, as the user's calendar has it
