"""ONNX Runtime's CUDA provider: sessions on one stream, every tensor bound where it lies.

No node may fall back to the CPU: sessions are made with `session.disable_cpu_ep_fallback`, and what
provider a session got is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import numpy as np

from ..cuda_libraries import provider_problem
from ..errors import DeviceError, StageError, one_line
from ..manifest import Manifest
from ..plans import engine_files
from .cuda_driver import CudaDriver
from .device_backend import DeviceBackend
from .device_sequence import BoundRun
from .ort_stage import run_error

__all__ = [
    "SessionStages",
    "load",
    "open_stages",
    "require_cuda_libraries",
    "require_cuda_sessions",
]

_PROVIDER = "CUDAExecutionProvider"
_MAX_ROWS = 512
_KEPT_BINDINGS = 8
_BFLOAT16 = 16  # TensorProto.BFLOAT16: numpy has no such type
_INSTALL = "pip uninstall onnxruntime, then pip install 'adainfer-export[cuda]'"


def load(
    folder: Path, manifest: Manifest, *, threads: int | None, low_memory: bool | None
) -> DeviceBackend:
    """Loads every stage of the folder onto the first GPU.

    Raises:
        DeviceError: no GPU, or onnxruntime-gpu or cuda-python is not installed.
        StageError: the CUDA provider does not take every node of a stage.
    """
    driver = CudaDriver("cuda")
    stages = open_stages(folder, manifest, _import_onnxruntime(), driver.stream)
    return DeviceBackend(manifest, stages, driver, min(_MAX_ROWS, manifest.kv.max_length))


def open_stages(folder: Path, manifest: Manifest, onnxruntime: Any, stream: int) -> SessionStages:
    """Sessions of everything that may run, exit graphs as well: a node that CUDA does not take is
    found here, and not in the middle of a request.

    Raises:
        StageError: with the file, and what ONNX Runtime says.
    """
    stages = SessionStages(folder, onnxruntime, stream)
    for file in engine_files(manifest):
        stages.load(file)
    return stages


def require_cuda_sessions(path: Path, providers: list[str]) -> None:
    """Raises `StageError` where a session's first provider is not CUDA: a silent fall-back."""
    if not providers or providers[0] != _PROVIDER:
        raise StageError(
            f"{path}: ONNX Runtime's CUDA provider was not loaded (the session runs on "
            f"{', '.join(providers) or 'nothing'}); see `adainfer doctor`"
        )


def require_cuda_libraries(onnxruntime: Any) -> None:
    """Raises `DeviceError` where a library of CUDA or cuDNN is missing, and names it."""
    missing = provider_problem(onnxruntime)
    if missing is not None:
        raise DeviceError(
            f"device cuda: onnxruntime-gpu {onnxruntime.__version__} needs {missing}, which is not "
            "here: pip install 'adainfer-export[cuda]', or install CUDA and cuDNN"
        )


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise DeviceError(f"onnxruntime-gpu is not installed: {_INSTALL}") from None
    if _PROVIDER not in onnxruntime.get_available_providers():
        raise DeviceError(
            f"device cuda: the installed onnxruntime {onnxruntime.__version__} is the one for "
            f"CPUs: {_INSTALL}"
        )
    require_cuda_libraries(onnxruntime)
    return onnxruntime


class SessionStages:
    """See `device_sequence.Stages`."""

    def __init__(self, folder: Path, onnxruntime: Any, stream: int) -> None:
        self._folder = folder
        self._ort = onnxruntime
        self._stream = stream
        self._loaded: dict[str, _SessionStage] = {}

    def load(self, file: str) -> _SessionStage:
        """The session of an ONNX file."""
        if file not in self._loaded:
            session = self._open(self._folder / file)
            self._loaded[file] = _SessionStage(file, self._ort, session)
        return self._loaded[file]

    def close(self) -> None:
        """Sessions share nothing."""

    def _open(self, path: Path) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        settings = {
            "device_id": "0",
            "user_compute_stream": str(self._stream),
            # The arena grows by what is asked for: 30 sessions would else hold 30 times too much.
            "arena_extend_strategy": "kSameAsRequested",
        }
        try:
            session = self._ort.InferenceSession(
                str(path), options, providers=[(_PROVIDER, settings)]
            )
        except Exception as error:  # onnxruntime's exception types share no public base
            reason = one_line(error)
            raise StageError(
                f"{path} cannot be run by ONNX Runtime's CUDA provider alone: {reason}"
            ) from error
        require_cuda_sessions(path, list(session.get_providers()))
        return session


class _SessionStage:
    """See `device_sequence.LoadedStage`. GroupQueryAttention updates the cache in place where past
    and present are bound to one address.
    """

    def __init__(self, file: str, onnxruntime: Any, session: Any) -> None:
        self._file = file
        self._session = session
        self._kept: dict[Hashable, Any] = {}
        self._options = onnxruntime.RunOptions()
        # The caller's stream orders runs and copies; waiting after every stage would cost a launch.
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def bind(self, run: BoundRun) -> Callable[[], None]:
        """An IOBinding onto the given addresses; the last ones are kept for runs in the same places
        (probe, adapters and classifiers, whose callers bind anew each time).
        """
        places = (frozenset(run.inputs.items()), frozenset(run.outputs.items()))
        if run.host:  # of a sequence, which keeps its bindings itself
            binding = self._bind(run)
        elif (binding := self._kept.get(places)) is None:
            if len(self._kept) == _KEPT_BINDINGS:
                del self._kept[next(iter(self._kept))]
            binding = self._kept[places] = self._bind(run)
        session, options, file = self._session, self._options, self._file

        def call() -> None:
            try:
                session.run_with_iobinding(binding, options)
            except Exception as error:  # onnxruntime's exception types share no public base
                raise run_error(file, error) from error

        return call

    def _bind(self, run: BoundRun) -> Any:
        binding = self._session.io_binding()
        try:
            self._bind_tensors(binding, run)
        except Exception as error:  # as above
            raise run_error(self._file, error) from error
        return binding

    def _bind_tensors(self, binding: Any, run: BoundRun) -> None:
        for name, tensor in run.inputs.items():
            dtype = _element_type(tensor.dtype)
            binding.bind_input(name, "cuda", 0, dtype, tensor.shape, tensor.address)
        for name, array in run.host.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name, tensor in run.outputs.items():
            dtype = _element_type(tensor.dtype)
            binding.bind_output(name, "cuda", 0, dtype, tensor.shape, tensor.address)


def _element_type(dtype: str) -> Any:
    return _BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype).type
