"""Reading certificates: which threshold a request may use, and whether it holds here."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import TypeVar

from .approximate_text import ApproximateText
from .devices import find_gpu
from .errors import ExitUnavailableError
from .manifest import Certificate, CertificateLevel
from .text_certificate_spec import TextCertificate, TextCertificateLevel

__all__ = ["certified_text_threshold", "certified_threshold", "device_class", "device_option"]

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
    certificate: TextCertificate | None, level: float, text: ApproximateText, here: str
) -> float:
    """The threshold that keeps the share of differing tokens of such texts within a level.

    Args:
        certificate: of the exits that are asked for; only context exits have one.
        here: the device class of the engine that asks.

    Raises:
        ExitUnavailableError: no certificate, not of this level or of such texts, or of another
            kind of device.
    """
    files = f"--texts FILE --max-new-tokens {text.tokens}"
    if certificate is None:
        raise ExitUnavailableError(
            f"level {level} with kv_policy {text.kv_policy} is certified for answers, not for "
            f"texts: run `adainfer certify DIR {files}` (for mode context with kv_policy "
            "translated), or use kv_policy deferred"
        )
    if text.kv_policy != certificate.kv_policy:
        raise ExitUnavailableError(
            f"texts are certified under kv_policy {certificate.kv_policy}, not {text.kv_policy}: "
            "use that one, or deferred"
        )
    if not text.own_end:
        raise ExitUnavailableError(
            f"level {level}: texts are certified as the model ends them; leave stop, "
            "stop_token_ids and ignore_eos out, or use kv_policy deferred"
        )
    if text.tokens > certificate.max_new_tokens:
        raise ExitUnavailableError(
            f"texts are certified up to {certificate.max_new_tokens} new tokens, this one may have "
            f"{text.tokens}: ask for fewer, or run `adainfer certify DIR {files}`"
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
