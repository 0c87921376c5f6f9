"""Engines of calibrated folders on the fake device, beside the same folders' on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from adainfer_runtime import Engine
from adainfer_runtime.backends.device_backend import DeviceBackend

from .fake_device import FakeDriver
from .test_tensorrt import FakeSessions, fake_backend


@dataclass(frozen=True)
class Pair:
    """The same folder twice."""

    folder: Path
    cpu: Engine
    device: Engine
    driver: FakeDriver

    @property
    def exact(self) -> bool:
        """Whether its sums are of float32."""
        return self.cpu.manifest.precision == "fp32"


@dataclass(frozen=True)
class _Made:
    engine: Engine
    folder: Path


def on_both(folder: Path, max_rows: int = 16) -> Pair:
    """Passes of the device carry fewer positions than a prompt has."""
    cpu = Engine.load(folder)
    if cpu.manifest.target == "ort-cuda":
        driver = FakeDriver()
        sessions = FakeSessions(folder, driver)
        backend = DeviceBackend(cpu.manifest, sessions, driver, max_rows)
    else:
        backend, driver = fake_backend(_Made(cpu, folder), max_rows)
    return Pair(folder, cpu, Engine(cpu.manifest, backend, cpu.tokenizer), driver)
