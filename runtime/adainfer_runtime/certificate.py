"""Reading certificates: which threshold a request may use, and whether it holds here."""

from __future__ import annotations

import platform

from .devices import find_gpu
from .errors import ExitUnavailableError
from .manifest import Certificate, CertificateLevel

__all__ = ["certified_threshold", "device_class", "device_option"]


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
    if certificate.device_class != here:
        raise ExitUnavailableError(
            f"the certificate is of {certificate.device_class}, this is {here}: run "
            f"`adainfer certify DIR --prompts FILE{device_option(here)}` here"
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
