"""TensorRT: plans chained on one stream, the cache updated in place, decode in CUDA graphs.

`tensorrt_stage` and `tensorrt_graphs` are all of the logic; what needs a GPU is behind the
protocols of `tensorrt_protocols`, of which the real ones (`tensorrt_engine`, `cuda_driver`) are as
thin as they can be.
"""

from __future__ import annotations

import importlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..devices import find_gpu
from ..errors import DeviceError
from ..manifest import Manifest
from ..plans import (
    BACKEND_MODULES,
    PLAN_FOLDER,
    Backend,
    BuildStamp,
    check_plan,
    engine_files,
    find_stamp,
)
from .cuda_driver import CudaDriver
from .device_backend import DeviceBackend
from .kernel_cache import KernelCache
from .tensorrt_engine import EngineLoader
from .tensorrt_graphs import GraphRecorder
from .tensorrt_protocols import GraphDriver, PlanLoader
from .tensorrt_stage import PlanStage
from .tensorrt_tables import SharedTables

__all__ = ["PlanStages", "installed_modules", "load"]

_KERNELS = "kernels.cache"


@dataclass
class PlanStages:
    """The plans of a stamp, each loaded on first use."""

    folder: Path
    stamp: BuildStamp
    loader: PlanLoader
    driver: GraphDriver

    def __post_init__(self) -> None:
        self._recorder = GraphRecorder(self.driver)
        self._tables = SharedTables(self.folder, self.driver)
        self._loaded: dict[str, PlanStage] = {}

    def load(self, file: str) -> PlanStage:
        """The plan of an ONNX file, and what it shares with others.

        Raises:
            DeviceMemoryError: that does not fit.
            PlanError: the file is not the one that was built: a plan is machine code.
        """
        if file not in self._loaded:
            path = check_plan(self.folder, self.stamp, file)
            tables = {
                table.name: self._tables.tensor(table) for table in self.stamp.plans[file].tables
            }
            plan = self.loader.load(path)
            self._loaded[file] = PlanStage(file, plan, self._recorder, tables)
        return self._loaded[file]

    def close(self) -> None:
        """Frees the tables; again it does nothing."""
        self._tables.free()

    def load_all(self, manifest: Manifest) -> None:
        """All that a request may need, so that nothing is left to fail within one.

        Of plans that do not share the LM head (built by earlier versions) the one for candidate
        tokens holds it once more: it is loaded where one asks for it.
        """
        for file in engine_files(manifest):
            if file != manifest.candidates.file or self.stamp.plans[file].tables:
                self.load(file)


def load(
    folder: Path, manifest: Manifest, *, threads: int | None, low_memory: bool | None
) -> DeviceBackend:
    """Loads the plans that were built for this device.

    Raises:
        DeviceError: no GPU, or TensorRT is not installed.
        PlanError: no plans for this TensorRT, GPU or folder.
    """
    gpu = find_gpu()
    if gpu is None:
        raise DeviceError(
            "device cuda: no NVIDIA GPU was found (no driver, or no device); use device cpu, "
            "and see `adainfer doctor`"
        )
    modules = installed_modules()
    versions = {backend: str(module.__version__) for backend, module in modules.items()}
    stamp = find_stamp(folder, manifest, installed=versions, gpu=gpu)
    driver = CudaDriver("tensorrt")
    kernels = None
    if stamp.backend == "tensorrt-rtx":
        kernels = KernelCache(folder / PLAN_FOLDER / stamp.name / _KERNELS)
    loader = EngineLoader(modules[stamp.backend], driver, kernels)
    stages = PlanStages(folder, stamp, loader, driver)
    stages.load_all(manifest)
    return DeviceBackend(manifest, stages, driver, stamp.max_rows)


def installed_modules() -> dict[Backend, Any]:
    """TensorRT's Python packages here, by the back end whose plans they run.

    Raises:
        DeviceError: there is none.
    """
    found = {}
    for backend, name in BACKEND_MODULES.items():
        with suppress(ImportError, OSError):  # of one that lacks its own libraries
            found[backend] = importlib.import_module(name)
    if not found:
        raise DeviceError(
            "TensorRT's Python package is not installed: install that of your JetPack or CUDA, or "
            "pip install 'adainfer-export[tensorrt-rtx]'"
        )
    return found
