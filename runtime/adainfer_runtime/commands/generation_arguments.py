"""The options of commands that generate text, in one place."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from enum import Enum
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

from ..errors import RequestError
from ..generation_options import GenerationKeywords, GenerationOptions
from .decode_arguments import (
    ConfidenceDecayOption,
    DraftLayerOption,
    DraftsOption,
    ExitLooksChoice,
    ExitLooksOption,
    KvPolicyChoice,
    KvPolicyOption,
    ProbeChoice,
    ProbeOption,
    decode_options,
)
from .options import LevelOption, ThresholdOption

__all__ = ["ModeChoice", "changed_flags", "takes_generation_options"]

_LENGTHS = "Length and end"
_SAMPLING = "Sampling"
# Options that the command line calls otherwise.
_FLAGS = {
    "stop_token_ids": "--stop-token-id",
    "confidence": "--confidence-decay",
    "draft_schedule": "--drafts",
}


class ModeChoice(str, Enum):
    """Values of --mode."""

    off = "off"
    adaptive = "adaptive"
    context = "context"
    combined = "combined"
    auto = "auto"
    verified = "verified"


def _collect(
    max_new_tokens: Annotated[
        int, typer.Option(help="Tokens to generate at most.", rich_help_panel=_LENGTHS)
    ],
    min_new_tokens: Annotated[
        int, typer.Option(help="No end of the text before.", rich_help_panel=_LENGTHS)
    ] = 0,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Text that ends the answer; repeatable.", rich_help_panel=_LENGTHS),
    ] = None,
    stop_token_id: Annotated[
        list[int] | None,
        typer.Option(help="Token that ends the answer; repeatable.", rich_help_panel=_LENGTHS),
    ] = None,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            "--ignore-eos", help="Go on after the model's own end.", rich_help_panel=_LENGTHS
        ),
    ] = False,
    timeout: Annotated[
        float | None, typer.Option(help="Deadline in seconds.", rich_help_panel=_LENGTHS)
    ] = None,
    mode: Annotated[ModeChoice, typer.Option(help="Run all layers, or exit early.")] = (
        ModeChoice.off
    ),
    threshold: ThresholdOption = None,
    level: LevelOption = None,
    kv_policy: KvPolicyOption = KvPolicyChoice.deferred,
    probe: ProbeOption = ProbeChoice.full,
    exit_looks: ExitLooksOption = ExitLooksChoice.paying,
    confidence_decay: ConfidenceDecayOption = None,
    draft_layer: DraftLayerOption = None,
    drafts: DraftsOption = None,
    temperature: Annotated[
        float, typer.Option(help="0 is greedy.", rich_help_panel=_SAMPLING)
    ] = 0.0,
    top_k: Annotated[
        int, typer.Option(help="The k most probable tokens; 0: all.", rich_help_panel=_SAMPLING)
    ] = 0,
    top_p: Annotated[
        float, typer.Option(help="The fewest with this probability.", rich_help_panel=_SAMPLING)
    ] = 1.0,
    min_p: Annotated[
        float,
        typer.Option(help="At least this share of the best one's.", rich_help_panel=_SAMPLING),
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="1 does nothing.", rich_help_panel=_SAMPLING)
    ] = 1.0,
    frequency_penalty: Annotated[
        float, typer.Option(help="Per occurrence in the answer.", rich_help_panel=_SAMPLING)
    ] = 0.0,
    presence_penalty: Annotated[
        float, typer.Option(help="Once, if in the answer.", rich_help_panel=_SAMPLING)
    ] = 0.0,
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(
            help="Added to a token's logit, -inf forbids it; repeatable.",
            metavar="ID=VALUE",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the random draws.", rich_help_panel=_SAMPLING)
    ] = None,
) -> GenerationKeywords:
    return {
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens,
        "stop": tuple(stop or ()),
        "stop_token_ids": tuple(stop_token_id or ()),
        "ignore_eos": ignore_eos,
        "timeout": timeout,
        "mode": mode.value,
        "threshold": threshold,
        "level": level,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "frequency_penalty": frequency_penalty,
        "presence_penalty": presence_penalty,
        "logit_bias": dict(map(_bias, logit_bias or ())),
        "seed": seed,
        "decoding": decode_options(
            kv_policy=kv_policy,
            probe=probe,
            exit_looks=exit_looks,
            confidence_decay=confidence_decay,
            draft_layer=draft_layer,
            drafts=drafts,
            max_new_tokens=max_new_tokens,
        ),
    }


def _bias(given: str) -> tuple[int, float]:
    """`ID=VALUE`."""
    token, _, value = given.partition("=")
    try:
        return int(token), float(value)
    except ValueError as error:
        raise RequestError(
            f"--logit-bias must be ID=VALUE, such as 42=-1.5, found {given!r}"
        ) from error


def changed_flags(options: GenerationKeywords, max_new_tokens: int) -> tuple[str, ...]:
    """The options above that are not at their defaults, as the command line spells them.

    Args:
        max_new_tokens: the command's default.
    """
    defaults = _collect(max_new_tokens)
    given = [
        _flag(name)
        for name, value in options.items()
        if name != "decoding" and value != defaults.get(name)
    ]
    decoding = map(_flag, options["decoding"].changed)
    return (*given, *decoding)


def _flag(name: str) -> str:
    return _FLAGS.get(name, f"--{name.replace('_', '-')}")


def takes_generation_options(max_new_tokens: int) -> Callable[[Callable[..., None]], Any]:
    """Gives a command the options above. Its parameter `options` receives them together, after
    they were checked: what no engine would serve is refused before one is loaded.

    Args:
        max_new_tokens: the command's default.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        shared = dict(inspect.signature(_collect, eval_str=True).parameters)
        shared["max_new_tokens"] = shared["max_new_tokens"].replace(default=max_new_tokens)
        own = dict(inspect.signature(command, eval_str=True).parameters)
        del own["options"]

        @wraps(command)
        def call(**given: Any) -> None:
            options = _collect(**{name: given.pop(name) for name in shared})
            GenerationOptions.of(options)
            command(**given, options=options)

        parameters = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in (*own.values(), *shared.values())
        ]
        # Typer reads both.
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        hints = get_type_hints(_collect, include_extras=True) | get_type_hints(
            command, include_extras=True
        )
        call.__annotations__ = {name: hints[name] for name in (*own, *shared)}
        del call.__wrapped__
        return call

    return decorate
