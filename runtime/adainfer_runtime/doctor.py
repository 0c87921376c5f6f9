"""What this machine can run and build, with versions, and what is missing for the rest."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

from .cuda_libraries import installed_provider_problem
from .devices import GpuInfo, find_gpu, jetson_model

__all__ = ["Ability", "Diagnosis", "diagnose"]

_PACKAGES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "cuda-python",
    "torch",
    "mobius-onnx",
)
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


def diagnose(
    gpu: Callable[[], GpuInfo | None] = find_gpu,
    version: Callable[[str], str] = metadata.version,
    provider_problem: Callable[[], str | None] = installed_provider_problem,
) -> Diagnosis:
    """Looks at the driver, at the installed packages, and at the libraries that they need."""
    found = gpu()
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except metadata.PackageNotFoundError:
            continue
    library = provider_problem() if "onnxruntime-gpu" in packages else None
    return Diagnosis(
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        jetson=jetson_model(),
        gpu=found,
        packages=packages,
        abilities=tuple(_abilities(found, packages, library)),
    )


def _abilities(gpu: GpuInfo | None, packages: dict[str, str], library: str | None) -> list[Ability]:
    ort = [] if {"onnxruntime", "onnxruntime-gpu"} & packages.keys() else [_pip("cpu")]
    compiler = [] if {"torch", "mobius-onnx"} <= packages.keys() else [_pip("export")]
    both = {"onnxruntime", "onnxruntime-gpu"} <= packages.keys()
    device = [] if gpu else ["an NVIDIA GPU with its driver"]
    bindings = "cuda-python" in packages
    cuda = [*device] if bindings else [*device, _pip("cuda")]
    # Not extra `cuda`: it would bring ONNX Runtime, which TensorRT's plans do without.
    driver = [] if bindings else [_pip("tensorrt")]
    if "onnxruntime-gpu" not in packages:
        cuda.append(_pip("cuda"))
    elif both:
        cuda.append("uninstall onnxruntime and onnxruntime-gpu (one module), install the latter")
    elif library:
        cuda.append(f"{library} of CUDA or cuDNN: {_pip('cuda')}")
    trt = [] if "tensorrt" in packages else ["TensorRT with its Python package (JetPack, CUDA)"]
    rtx = [] if "tensorrt-rtx" in packages else [_pip("tensorrt-rtx")]
    basic, fused = (trt + _older(packages, least) for least in (_MINIMUM_TENSORRT, _FUSED_TENSORRT))
    run_rtx = [] if "tensorrt-rtx" in packages else trt
    return [
        Ability("export and calibrate", tuple(compiler + ort)),
        Ability("run any target on the CPU", tuple(ort)),
        Ability("run target ort-cuda on the GPU", tuple(dict.fromkeys(cuda))),
        Ability("build plans of target tensorrt here", tuple(device + fused)),
        Ability("build plans of target tensorrt-basic here", tuple(device + basic)),
        Ability("build plans with TensorRT-RTX, without a GPU", tuple(rtx)),
        Ability("run TensorRT plans on the GPU", (*device, *driver, *run_rtx)),
    ]


def _older(packages: dict[str, str], least: tuple[int, int]) -> list[str]:
    text = packages.get("tensorrt")
    if text is None:
        return []
    found = tuple(int(part) for part in text.split(".")[:2] if part.isdigit())
    return [f"TensorRT {least[0]}.{least[1]} or later, found {text}"] if found < least else []


def _pip(extra: str) -> str:
    return f"pip install 'adainfer-export[{extra}]'"
