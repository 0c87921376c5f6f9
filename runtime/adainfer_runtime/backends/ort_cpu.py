"""ONNX Runtime on the CPU: one session per stage, one thread pool for all of them."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ..errors import DeviceError, ExitUnavailableError, RequestError, StageError
from ..manifest import Manifest
from .base import ExitEvidence, Float32, ProbeResult
from .host_memory import lazy_zeros, memory_limit
from .layout import Region, SequenceLayout, StageRun, hidden_buffer
from .rescore import rescored

__all__ = ["OrtCpuBackend", "fits_twice", "load", "open_session"]

_LOG = logging.getLogger(__name__)
_MAX_ROWS = 512
# Bindings that a sequence keeps, in row counts: decode, drafts, the usual prompt chunk.
_KEPT_ROW_COUNTS = 8
# The rest is for KV caches, activations and the application itself.
_SHARE_OF_TWO_COPIES = 0.25


def load(
    folder: Path, manifest: Manifest, *, threads: int | None, low_memory: bool | None
) -> OrtCpuBackend:
    """Loads every stage of the folder; with `low_memory` without their wide graphs.

    ONNX Runtime packs a graph's weights into memory of the process, in one layout for products
    with int8 activations and in another for float32 ones: a wide graph is a second copy. With None
    it is held where both copies, by the size of the folder's weights, take at most a quarter of
    the memory that the process may use (`memory_limit`).

    Raises:
        DeviceError: onnxruntime is not installed.
        StageError: ONNX Runtime refuses a file.
    """
    if low_memory is None:
        low_memory = not fits_twice(manifest, memory_limit())
    return OrtCpuBackend(folder, manifest, _Sessions(threads), low_memory=low_memory)


def fits_twice(manifest: Manifest, limit: int | None) -> bool:
    """Whether two copies of the weights take at most a quarter of `limit` bytes (None: unknown)."""
    weights = sum(
        record.bytes for name, record in manifest.files.items() if name.startswith("stages/")
    )
    return limit is None or 2 * weights <= limit * _SHARE_OF_TWO_COPIES


def open_session(path: Path) -> Any:
    """An ONNX Runtime session beside the engines, on the pool that they share.

    Raises:
        DeviceError, StageError: see `load`.
    """
    return _Sessions(None).open(path)


class _Sessions:
    """Opens sessions that share the process's one thread pool, and one memory arena.

    A pool per session makes 30 sessions fight for the cores, spinning. ONNX Runtime has one pool
    per process for sessions that ask for it; its size is fixed by whoever makes it. (Once it
    exists, ONNX Runtime wants every later session of the process to ask for it too:
    `use_per_session_threads = False`.) An arena per session would keep 30 times the largest
    prompt's activations: 464 MB against 294 for SmolLM2 in int4.
    """

    _pool_threads: ClassVar[int | None] = None
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, threads: int | None) -> None:
        self._ort = _import_onnxruntime()
        with _Sessions._lock:
            if _Sessions._pool_threads is None:
                _Sessions._pool_threads = _claim_pool(self._ort, threads)
        if threads is not None and threads != _Sessions._pool_threads:
            _LOG.warning(
                "this process's ONNX Runtime pool was made with %s threads; threads=%d is ignored",
                _Sessions._pool_threads or "other",
                threads,
            )

    def open(self, path: Path) -> Any:
        """A session of one stage."""
        options = self._ort.SessionOptions()
        options.use_per_session_threads = False
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.use_env_allocators", "1")
        # int4 behind DequantizeLinear becomes MatMulNBits, by default with int8 activations.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        try:
            return self._ort.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's exception types share no public base
            reason = " ".join(str(error).split())
            raise StageError(f"{path} cannot be loaded by ONNX Runtime: {reason}") from error


def _claim_pool(onnxruntime: Any, threads: int | None) -> int:
    """Makes the pool; returns its threads, or 0 where other code made it before."""
    wanted = _usable_cores() if threads is None else threads
    if wanted < 1:
        raise RequestError(f"threads must be at least 1, found {wanted}")
    try:
        onnxruntime.set_global_thread_pool_sizes(wanted, 1)
        threads = wanted
    except Exception:  # "already been created": an exception without a public type
        threads = 0
    with suppress(Exception):  # other code registered its own, which serves as well
        onnxruntime.create_and_register_allocator(
            onnxruntime.OrtMemoryInfo(
                "Cpu",
                onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR,
                0,
                onnxruntime.OrtMemType.DEFAULT,
            ),
            None,
        )
    return threads


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise DeviceError(
            "onnxruntime is not installed: pip install 'adainfer-export[cpu]'"
        ) from None
    return onnxruntime


class OrtCpuBackend:
    """See `base.Backend`."""

    max_rows = _MAX_ROWS

    def __init__(
        self, folder: Path, manifest: Manifest, sessions: _Sessions, *, low_memory: bool
    ) -> None:
        def open_stage(file: str) -> Any:
            return sessions.open(folder / file)

        self._open_stage = open_stage
        self.manifest = manifest
        if manifest.kv.dtype == "bfloat16":
            raise DeviceError(
                "ONNX Runtime has no bfloat16 arithmetic on CPUs: export with --precision fp16 or "
                "fp32 to run on this device"
            )
        self.embed = open_stage(manifest.embed.file)
        self.positions = open_stage(manifest.positions.file) if manifest.positions else None
        self._stages = [open_stage(stage.file) for stage in manifest.layer_stages]
        wide = {i: stage.wide_file for i, stage in enumerate(manifest.layer_stages)}
        self._wide = {i: open_stage(file) for i, file in wide.items() if file and not low_memory}
        quantisation = manifest.quantisation
        self._wide_rows = (quantisation.wide_rows if quantisation else None) or 0
        self._probe = open_stage(manifest.probe.file)
        self._candidates = open_stage(manifest.candidates.file)
        self._proposals = open_stage(manifest.shortlist.file) if manifest.shortlist else None
        self._adapters = {
            layer: open_stage(point.adapter)
            for layer, point in manifest.exit_points.items()
            if point.adapter is not None
        }
        self._classifiers = {
            classifier.graph: open_stage(classifier.graph) for classifier in manifest.classifiers
        }
        self._translators = {
            layer: open_stage(point.translate)
            for layer, point in manifest.context_points.items()
            if point.translate is not None
        }

    @cached_property
    def _kv_fills(self) -> dict[int, Any]:
        """Opened when the policy is first asked for: most engines never are."""
        fills = self.manifest.kv_fills.items()
        return {layer: self._open_stage(spec.file) for layer, spec in fills}

    def stage(self, index: int, rows: int) -> Any:
        """The session that runs layer stage `index` over so many positions."""
        wide = self._wide.get(index) if rows >= self._wide_rows else None
        return wide or self._stages[index]

    def open_sequence(self) -> _OrtSequence:
        """Memory and bindings for one sequence."""
        return _OrtSequence(self)

    def wait(self) -> None:
        """Runs are done when they return."""

    def probe(self, hidden: Float32) -> ProbeResult:
        """One position `[hidden_size]`."""
        feed = {"hidden": hidden.reshape(1, 1, -1)}
        logits, token, top_prob, gap = self._probe.run(["logits", "token", "top_prob", "gap"], feed)
        return ProbeResult(int(token[0, 0]), float(top_prob[0, 0]), float(gap[0, 0]), logits[0, 0])

    def probe_candidates(self, hidden: Float32, candidates: npt.NDArray[np.int64]) -> ProbeResult:
        """One position `[hidden_size]`, some tokens."""
        feed = {"hidden": hidden.reshape(1, 1, -1), "candidates": candidates}
        logits, place, top_prob, gap = self._candidates.run(
            ["logits", "token", "top_prob", "gap"], feed
        )
        token = int(candidates[place[0, 0]])
        return ProbeResult(token, float(top_prob[0, 0]), float(gap[0, 0]), logits[0, 0])

    def shortlist(self, hidden: Float32) -> ProbeResult:
        """One position `[hidden_size]`."""
        if self._proposals is None:
            raise ExitUnavailableError(
                "this engine has no shortlist: run `adainfer calibrate DIR --shortlist`"
            )
        feed = {"hidden": hidden.reshape(1, 1, -1)}
        outputs = ["logits", "log_sum_exp", "candidates"]
        logits, total, candidates = self._proposals.run(outputs, feed)
        exact = self.probe_candidates(hidden, candidates).logits
        return rescored(logits, float(total[0]), candidates, exact)

    def probe_logits(self, hidden: Float32) -> Float32:
        """`[rows, hidden_size]` to `[rows, vocab_size]`."""
        logits: Float32 = self._probe.run(["logits"], {"hidden": hidden[None]})[0]
        return np.asarray(logits[0])

    def probe_features(self, hidden: Float32) -> tuple[npt.NDArray[np.int64], Float32, Float32]:
        """`[rows, hidden_size]` to three times `[rows]`."""
        token, top_prob, gap = self._probe.run(
            ["token", "top_prob", "gap"], {"hidden": hidden[None]}
        )
        return token[0], top_prob[0], gap[0]

    def adapt(self, exit_layer: int, hidden: Float32) -> tuple[Float32, float]:
        """`[hidden_size]` to `[hidden_size]`, and the trust."""
        adapter = self._adapters.get(exit_layer)
        if adapter is None:
            return hidden, 0.0
        feed = {"hidden": hidden.reshape(1, 1, -1)}
        adapted, trust = adapter.run(["adapted", "trust"], feed)
        return np.asarray(adapted[0, 0]), float(trust[0, 0])

    def translate(
        self, exit_layer: int, hidden: Float32, start: int
    ) -> dict[int, tuple[Float32, Float32]]:
        """`[rows, hidden_size]` to K and V per layer above."""
        feed = {"hidden": hidden, "start": np.array([start], np.int64)}
        keys, values = self._translators[exit_layer].run(["key", "value"], feed)
        layers = range(exit_layer + 1, self.manifest.model.num_layers + 1)
        return dict(zip(layers, zip(keys, values, strict=True), strict=True))

    def kv_fill(self, layer: int, hidden: Float32, start: int) -> tuple[Float32, Float32]:
        """`[rows, hidden_size]` to K and V of one layer."""
        feed = {"hidden": hidden[None], "start": np.array([start], np.int64)}
        key, value = self._kv_fills[layer].run(["key", "value"], feed)
        return key[0], value[0]

    def classify(
        self, graph: str, evidence: ExitEvidence, depth: float, state: Float32
    ) -> tuple[float, Float32]:
        """Score and next state."""
        result = evidence.result
        feed = {
            "token": np.array([result.token], np.int64),
            "top_prob": np.array([result.top_prob], np.float32),
            "gap": np.array([result.gap], np.float32),
            "depth": np.array([depth], np.float32),
            "trust": np.array([evidence.trust], np.float32),
            "state": state[None],
        }
        score, next_state = self._classifiers[graph].run(["score", "next_state"], feed)
        return float(score[0]), next_state[0]


class _OrtSequence:
    """See `base.SequenceBuffers`: a layout's buffers in the process's own memory."""

    def __init__(self, backend: OrtCpuBackend) -> None:
        manifest = backend.manifest
        self._backend = backend
        self._layout = SequenceLayout(manifest, backend.max_rows)
        self._memory = {name: lazy_zeros(spec) for name, spec in self._layout.buffers().items()}
        self.pending = np.zeros((manifest.max_seq_len, manifest.model.hidden_size), np.float32)
        self._caches = {
            layer: (self._cache("key", layer), self._cache("value", layer))
            for layer in range(1, manifest.model.num_layers + 1)
        }
        self._prepared: tuple[int, int] | None = None
        self._bound: dict[int, list[Callable[[], None]]] = {}
        self._bound_embed: dict[int, Callable[[], None]] = {}

    def embed(self, tokens: npt.NDArray[np.int64], start: int) -> None:
        """`[rows]` token ids into hidden buffer 0."""
        rows = len(tokens)
        for name, values in self._layout.embed_inputs(tokens, start).items():
            self._memory[name][:rows] = values
        run = self._bound_embed.get(rows)
        if run is None:
            run = self._bind(self._backend.embed, self._layout.embed(rows))
            _keep(self._bound_embed, rows, run)
        run()

    def run_stage(self, index: int, rows: int, past: int) -> None:
        """One layer stage over `rows` positions."""
        if self._prepared != (rows, past):
            self._prepare(rows, past)
        if self._layout.varies_with_past:
            self._bind_stage(index, rows, past)()
            return
        bound = self._bound.get(rows)
        if bound is None:
            stages = range(len(self._backend.manifest.layer_stages))
            bound = [self._bind_stage(i, rows, past) for i in stages]
            _keep(self._bound, rows, bound)
        bound[index]()

    def hidden(self, index: int, rows: int) -> Float32:
        """Rows of the buffer that stage `index` reads."""
        view: Float32 = self._memory[hidden_buffer(index)][:rows]
        return view

    def write_kv(self, layer: int, start: int, key: Float32, value: Float32) -> None:
        """Into the cache that the layer's stages are bound to."""
        end = start + key.shape[1]
        cached_key, cached_value = self._caches[layer]
        cached_key[:, start:end], cached_value[:, start:end] = key, value

    def kv(self, layer: int) -> tuple[Float32, Float32]:
        """K and V of a layer, without the batch axis (copies, where they are kept in 16 bits)."""
        key, value = self._caches[layer]
        return key.astype(np.float32, copy=False), value.astype(np.float32, copy=False)

    def _cache(self, part: str, layer: int) -> npt.NDArray[Any]:
        return self._layout.cache_view(layer, self._memory[f"{part}.{layer}"])

    def _prepare(self, rows: int, past: int) -> None:
        for name, value in self._layout.host_inputs(rows, past).items():
            self._memory[name].reshape(-1)[: value.size] = value.reshape(-1)
        run = self._layout.positions(rows, past)
        if run is not None:
            self._bind(self._backend.positions, run)()
        self._prepared = (rows, past)

    def _bind_stage(self, index: int, rows: int, past: int) -> Callable[[], None]:
        session = self._backend.stage(index, rows)
        return self._bind(session, self._layout.stage(index, rows, past))

    def _bind(self, session: Any, run: StageRun) -> Callable[[], None]:
        binding = session.io_binding()
        for name, region in run.inputs.items():
            binding.bind_input(name, "cpu", 0, *self._place(region))
        for name, region in run.outputs.items():
            binding.bind_output(name, "cpu", 0, *self._place(region))
        return _runner(session, binding)

    def _place(self, region: Region) -> tuple[Any, tuple[int, ...], int]:
        array = self._memory[region.buffer]
        return array.dtype.type, region.shape, array.ctypes.data + region.offset


def _runner(session: Any, binding: Any) -> Callable[[], None]:
    run = session.run_with_iobinding

    def call() -> None:
        # Without RunOptions: ONNX Runtime 1.32 looks an entry up in them by a C++ exception, which
        # costs 50 µs a run (SmolLM2: 35% of a decoded token's layers).
        run(binding)

    return call


def _keep(cache: dict[int, Any], rows: int, value: Any) -> None:
    if len(cache) >= _KEPT_ROW_COUNTS:
        oldest = next((key for key in cache if key != 1), 1)  # decode's binding stays
        del cache[oldest]
    cache[rows] = value


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
