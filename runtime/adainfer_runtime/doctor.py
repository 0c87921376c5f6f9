"""What this machine can run and build, with versions, and what is missing for the rest."""

from __future__ import annotations

import importlib
import importlib.util
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

from . import cuda_bindings
from .cuda_libraries import installed_provider_problem
from .devices import RTX_SM, GpuInfo, find_gpu, jetson_model
from .errors import one_line
from .plans import BACKEND_MODULES

__all__ = ["Ability", "Diagnosis", "diagnose", "module_version"]

# Looked up as distributions: two of them hold one module, and torch is slow to load.
_DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu", "torch", "mobius-onnx", "onnx")
# Loaded as the runtime does: several distributions bring each, for this or that CUDA.
_MODULES: tuple[tuple[str, str], ...] = (
    *BACKEND_MODULES.items(),
    ("cuda-python", cuda_bindings.MODULE),
)
_TENSORRT = "TensorRT with its Python package (JetPack, CUDA)"
_MINIMUM_TENSORRT = (10, 3)
_FUSED_TENSORRT = (10, 15)


@dataclass(frozen=True)
class Ability:
    """Something that one may want to do here; `missing` is empty where it works."""

    what: str
    missing: tuple[str, ...] = ()

    @property
    def works(self) -> bool:
        """Whether nothing is missing."""
        return not self.missing


@dataclass(frozen=True)
class Diagnosis:
    """What was found. `packages` maps installed ones to their versions."""

    system: str
    python: str
    jetson: str | None
    gpu: GpuInfo | None
    packages: dict[str, str]
    abilities: tuple[Ability, ...]


def module_version(name: str) -> str | None:
    """Version of a module that is loaded for it; None where it is not installed.

    Raises:
        ImportError, OSError: it is, but cannot be loaded.
    """
    try:
        found = importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # not even the package around it
        found = False
    return str(getattr(importlib.import_module(name), "__version__", "?")) if found else None


def diagnose(
    gpu: Callable[[], GpuInfo | None] = find_gpu,
    version: Callable[[str], str] = metadata.version,
    provider_problem: Callable[[], str | None] = installed_provider_problem,
    module: Callable[[str], str | None] = module_version,
) -> Diagnosis:
    """Looks at the driver, at the installed packages, and at the libraries that they need."""
    found = gpu()
    packages, broken = {}, {}
    for name in _DISTRIBUTIONS:
        try:
            packages[name] = version(name)
        except metadata.PackageNotFoundError:
            continue
    for name, module_name in _MODULES:
        try:
            loaded = module(module_name)
        except (ImportError, OSError) as error:  # of a library of its own
            broken[name] = f"{name} cannot be loaded: {one_line(error)}"
            continue
        if loaded is not None:
            packages[name] = loaded
    library = provider_problem() if "onnxruntime-gpu" in packages else None
    return Diagnosis(
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        jetson=jetson_model(),
        gpu=found,
        packages=packages,
        abilities=tuple(_abilities(found, packages, broken, library)),
    )


def _abilities(
    gpu: GpuInfo | None, packages: dict[str, str], broken: dict[str, str], library: str | None
) -> list[Ability]:
    ort = [] if {"onnxruntime", "onnxruntime-gpu"} & packages.keys() else [_pip("cpu")]
    compiler = [] if {"torch", "mobius-onnx"} <= packages.keys() else [_pip("export")]
    device = [] if gpu else ["an NVIDIA GPU with its driver"]
    # Not extra `cuda`: it would bring ONNX Runtime, which TensorRT's plans do without.
    driver = _bindings(gpu, packages, broken, "tensorrt")
    trt = _lacking("tensorrt", packages, broken, _TENSORRT)
    rtx = _lacking("tensorrt-rtx", packages, broken, _pip("tensorrt-rtx"))
    basic, fused = (trt + _older(packages, least) for least in (_MINIMUM_TENSORRT, _FUSED_TENSORRT))
    building, building_rtx = (
        _lacking("onnx", packages, broken, _pip(extra)) for extra in ("tensorrt", "tensorrt-rtx")
    )
    return [
        Ability("export and calibrate", tuple(compiler + ort)),
        Ability("run any target on the CPU", tuple(ort)),
        Ability(
            "run target ort-cuda on the GPU",
            (*device, *dict.fromkeys(_ort_cuda(gpu, packages, broken, library))),
        ),
        Ability("build plans of target tensorrt here", tuple(device + fused + building)),
        Ability("build plans of target tensorrt-basic here", tuple(device + basic + building)),
        Ability(
            "build plans with TensorRT-RTX, without a GPU", tuple(dict.fromkeys(rtx + building_rtx))
        ),
        Ability(
            "run TensorRT plans on the GPU", (*device, *driver, *_running(gpu, packages, basic))
        ),
    ]


def _ort_cuda(
    gpu: GpuInfo | None, packages: dict[str, str], broken: dict[str, str], library: str | None
) -> list[str]:
    missing = _bindings(gpu, packages, broken, "cuda")
    if "onnxruntime-gpu" not in packages:
        missing.append(_pip("cuda"))
    elif "onnxruntime" in packages:
        missing.append("uninstall onnxruntime and onnxruntime-gpu (one module), install the latter")
    elif library:
        missing.append(f"{library} of CUDA or cuDNN: {_pip('cuda')}")
    return missing


def _bindings(
    gpu: GpuInfo | None, packages: dict[str, str], broken: dict[str, str], extra: str
) -> list[str]:
    """What is missing of cuda-python, which must not be newer than the driver."""
    found = packages.get("cuda-python")
    if found is None:
        fitting = f" {cuda_bindings.fitting_bindings(gpu.driver)}" if gpu else ""
        return _lacking("cuda-python", packages, broken, _pip(extra) + fitting)
    if gpu is not None and cuda_bindings.is_too_new(found, gpu.driver):
        return [cuda_bindings.too_new(found, gpu.driver)]
    return []


def _running(gpu: GpuInfo | None, packages: dict[str, str], tensorrt: list[str]) -> list[str]:
    """What is missing of a package that runs plans on this GPU; `tensorrt` of TensorRT itself."""
    if "tensorrt-rtx" not in packages or not tensorrt:
        return tensorrt
    if gpu is None or gpu.sm in RTX_SM:
        return []
    return [f"TensorRT-RTX has no plans for SM {gpu.sm}", *tensorrt]


def _lacking(
    name: str, packages: dict[str, str], broken: dict[str, str], install: str
) -> list[str]:
    if name in broken:
        return [broken[name]]
    return [] if name in packages else [install]


def _older(packages: dict[str, str], least: tuple[int, int]) -> list[str]:
    text = packages.get("tensorrt")
    if text is None:
        return []
    found = tuple(int(part) for part in text.split(".")[:2] if part.isdigit())
    return [f"TensorRT {least[0]}.{least[1]} or later, found {text}"] if found < least else []


def _pip(extra: str) -> str:
    return f"pip install 'adainfer-export[{extra}]'"
