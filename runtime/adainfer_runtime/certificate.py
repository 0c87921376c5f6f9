"""Reading certificates: which threshold a request may use, and whether it holds here."""

from __future__ import annotations

import platform

from .errors import ExitUnavailableError
from .manifest import Certificate, CertificateLevel

__all__ = ["certified_threshold", "device_class"]


def device_class() -> str:
    """What certificates are tied to: kernels of another kind of device round otherwise."""
    return f"cpu-{platform.machine().lower() or 'unknown'}"


def certified_threshold(certificate: Certificate | None, level: float) -> float:
    """The threshold that keeps disagreement within a certified level.

    Raises:
        ExitUnavailableError: no certificate, not of this level, or of another kind of device.
    """
    if certificate is None:
        raise ExitUnavailableError(
            "this engine's exits carry no certificate: run `adainfer certify DIR --prompts FILE`"
        )
    if certificate.device_class != (here := device_class()):
        raise ExitUnavailableError(
            f"the certificate is of {certificate.device_class}, this is {here}: run "
            "`adainfer certify DIR --prompts FILE` here"
        )
    entry = next((entry for entry in certificate.levels if entry.level == level), None)
    if entry is not None and entry.threshold is not None:
        return entry.threshold
    certified = [str(entry.level) for entry in certificate.levels if entry.threshold is not None]
    raise ExitUnavailableError(
        f"level {level} is not certified{_why(entry)}; certified: {', '.join(certified) or 'none'}"
    )


def _why(entry: CertificateLevel | None) -> str:
    if entry is None or entry.prompts_needed is None:
        return ""
    return f" ({entry.prompts} prompts, at least {entry.prompts_needed} are needed)"
