"""Reading certificates: which one speaks of a request, and which threshold it allows here."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from .devices import find_gpu
from .errors import ExitUnavailableError
from .long_text import LongText
from .manifest import Certificate, CertificateLevel, CombinedExitSpec, ExitSpec
from .text_certificate_spec import TextCertificate, TextCertificateLevel

__all__ = [
    "ExitMode",
    "LevelRequest",
    "certified_text_threshold",
    "certified_threshold",
    "device_class",
    "device_option",
    "threshold_at_level",
]

ExitMode = Literal["adaptive", "context", "combined"]

_Level = TypeVar("_Level", CertificateLevel, TextCertificateLevel)


def device_class(device: str = "cpu") -> str:
    """What certificates and stage times are tied to: another kind of device has other kernels.

    Args:
        device: `cpu` or `cuda`, as `Engine.load` takes it.
    """
    if device == "cuda":
        gpu = find_gpu()
        return "gpu-unknown" if gpu is None else f"gpu-sm{gpu.sm}"
    return f"cpu-{platform.machine().lower() or 'unknown'}"


def device_option(name: str) -> str:
    """What a command that runs on a device class needs to be told, with a space before it."""
    return " --device cuda" if name.startswith("gpu-") else ""


@dataclass(frozen=True)
class LevelRequest:
    """A level, and what is asked for at it: an answer of one token, where nothing else is said.

    Attributes:
        text: a text that goes on after its first token.
        longest_label: of a choice among labels, the tokens of its longest one.
        among_labels: of a choice, whether the exit graph that was calibrated for choices decides.
    """

    level: float
    mode: ExitMode
    device_class: str
    text: LongText | None = None
    longest_label: int | None = None
    among_labels: bool = False


def threshold_at_level(
    spec: ExitSpec | CombinedExitSpec, asked: LevelRequest
) -> tuple[float, float | None]:
    """The threshold that keeps a request within its level, by the certificate that speaks of it,
    and the share of disagreement with the full model that it promises (none against gold answers).

    - An answer of one token: the certificate of answers.
    - A choice: that of the exit graph for choices, which saw the labels' first tokens. (Where the
      likeliest token of all is the full model's, the likeliest label may be another one.)
    - A text in modes `context` and `combined` with kv_policy `deferred`: the certificate of
      answers, for what follows the first token is the full model's, given that token.
    - Other texts: a certificate of texts.

    Raises:
        ExitUnavailableError: there is no such certificate, or it does not have the level.
    """
    if asked.longest_label is not None:
        _check_choice(asked, asked.longest_label)
    text = asked.text
    if text is None or (asked.mode != "adaptive" and text.kv_policy == "deferred"):
        threshold = certified_threshold(spec.certificate, asked.level, asked.device_class)
        against_model = spec.certificate is not None and spec.certificate.against == "model"
        return threshold, asked.level if against_model else None
    texts = spec.text_certificate if isinstance(spec, ExitSpec) else None
    threshold = certified_text_threshold(texts, asked.level, asked.mode, text, asked.device_class)
    return threshold, asked.level


def _check_choice(asked: LevelRequest, longest_label: int) -> None:
    if not asked.among_labels:
        raise ExitUnavailableError(
            f"level {asked.level} is certified for answers, not for choices in mode {asked.mode}: "
            "use mode adaptive of an engine that was calibrated on prompts with labels, or leave "
            "the level out"
        )
    if longest_label > 1:
        raise ExitUnavailableError(
            f"level {asked.level}: choices are certified by the first token of each label, and one "
            f"has {longest_label} tokens: give labels of one token, or leave the level out"
        )


def certified_threshold(certificate: Certificate | None, level: float, here: str) -> float:
    """The threshold that keeps disagreement within a certified level.

    Args:
        here: the device class of the engine that asks.

    Raises:
        ExitUnavailableError: no certificate, not of this level, or of another kind of device.
    """
    if certificate is None:
        raise ExitUnavailableError(
            "this engine's exits carry no certificate: run `adainfer certify DIR --prompts FILE`"
        )
    _check_device(certificate.device_class, here, "--prompts FILE")
    entry = _entry(certificate.levels, level)
    if entry is not None and entry.threshold is not None:
        return entry.threshold
    fewer = _fewer(entry.prompts, entry.prompts_needed, "prompts") if entry else ""
    raise _not_certified(f"level {level} is not certified{fewer}", certificate.levels)


def certified_text_threshold(
    certificate: TextCertificate | None, level: float, mode: ExitMode, text: LongText, here: str
) -> float:
    """The threshold that keeps the share of differing tokens of such texts within a level.

    Args:
        certificate: of the exits that are asked for; combined ones have none.
        here: the device class of the engine that asks.

    Raises:
        ExitUnavailableError: no certificate, not of this level or of such texts, or of another
            kind of device.
    """
    files = f"--texts FILE --max-new-tokens {text.tokens}"
    command = f"`adainfer certify DIR {files}`"
    # Of these modes the certificate of answers covers exact texts.
    exact = "" if mode == "adaptive" else ", or use kv_policy deferred"
    if certificate is None:
        if mode == "adaptive":
            deferred = "" if text.kv_policy == "deferred" else "use kv_policy deferred and "
            how = f"{deferred}run {command}, or ask for one new token"
        else:
            how = f"run {command} (for mode context with kv_policy translated){exact}"
        raise ExitUnavailableError(
            f"level {level} in mode {mode} with kv_policy {text.kv_policy} is certified for "
            f"answers, not for texts: {how}"
        )
    if text.kv_policy != certificate.kv_policy:
        raise ExitUnavailableError(
            f"texts in mode {mode} are certified under kv_policy {certificate.kv_policy}, not "
            f"{text.kv_policy}: use that one{exact}"
        )
    if not text.own_end:
        raise ExitUnavailableError(
            f"level {level}: texts are certified as the model ends them; leave stop, "
            f"stop_token_ids and ignore_eos out{exact}"
        )
    if text.tokens > certificate.max_new_tokens:
        raise ExitUnavailableError(
            f"texts are certified up to {certificate.max_new_tokens} new tokens, this one may have "
            f"{text.tokens}: ask for fewer, or run {command}"
        )
    _check_device(certificate.device_class, here, files)
    entry = _entry(certificate.levels, level)
    if entry is not None and entry.threshold is not None:
        return entry.threshold
    fewer = _fewer(entry.texts, entry.texts_needed, "texts") if entry else ""
    raise _not_certified(f"level {level} is not certified for texts{fewer}", certificate.levels)


def _check_device(found: str, here: str, files: str) -> None:
    if found != here:
        raise ExitUnavailableError(
            f"the certificate is of {found}, this is {here}: run "
            f"`adainfer certify DIR {files}{device_option(here)}` here"
        )


def _entry(levels: Sequence[_Level], level: float) -> _Level | None:
    return next((entry for entry in levels if entry.level == level), None)


def _fewer(count: int, needed: int | None, what: str) -> str:
    return "" if needed is None else f" ({count} {what}, at least {needed} are needed)"


def _not_certified(what: str, levels: Sequence[_Level]) -> ExitUnavailableError:
    certified = [str(entry.level) for entry in levels if entry.threshold is not None]
    return ExitUnavailableError(f"{what}; certified: {', '.join(certified) or 'none'}")
