"""ONNX Runtime on the CPU: one session per stage, one thread pool for all of them."""

from __future__ import annotations

import logging
import os
import threading
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ..errors import DeviceError, ExitUnavailableError, StageError, one_line
from ..manifest import Manifest
from .base import ExitEvidence, Float32, ProbeResult
from .graph_forms import graph_forms, require_form
from .host_memory import memory_limit
from .host_results import BoundProbe, HostProbe
from .huge_pages import in_huge_pages
from .kv_scales import load_kv_scales
from .ort_batch import OrtBatch
from .ort_sequence import OrtSequence
from .ort_stage import OrtStage
from .rescore import rescored, top_features

__all__ = ["OrtCpuBackend", "fits_twice", "load", "open_session"]

_LOG = logging.getLogger(__name__)
_MAX_ROWS = 512
# The rest is for KV caches, activations and the application itself.
_SHARE_OF_TWO_COPIES = 0.25


def load(
    folder: Path, manifest: Manifest, *, threads: int | None, low_memory: bool | None
) -> OrtCpuBackend:
    """Loads every stage of the folder; with `low_memory` without their wide graphs.

    ONNX Runtime packs a graph's weights into memory of the process, in one layout for products
    with int8 activations and in another for float32 ones: a wide graph is a second copy (of 8-bit
    weights too, whose wide graphs differ in attention alone: both sessions pack them). With None
    it is held where both copies, by the size of the folder's weights, take at most a quarter of
    the memory that the process may use (`memory_limit`), and always where the export was asked for
    it (`--prefill int8`): what its exits were fitted and certified on comes from these weights.

    Raises:
        DeviceError: onnxruntime is not installed.
        StageError: ONNX Runtime refuses a file, or its graph is not what the manifest says.
    """
    if low_memory is None:
        low_memory = not (_reads_in_int8(manifest) or fits_twice(manifest, memory_limit()))
    with in_huge_pages():
        return OrtCpuBackend(folder, manifest, _Sessions(threads), low_memory=low_memory)


def _reads_in_int8(manifest: Manifest) -> bool:
    return manifest.quantisation is not None and manifest.quantisation.prefill == "int8"


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
                "this process's ONNX Runtime pool was made with %s threads; threads=%s is ignored",
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
            reason = one_line(error)
            raise StageError(f"{path} cannot be loaded by ONNX Runtime: {reason}") from error


def _claim_pool(onnxruntime: Any, threads: int | None) -> int:
    """Makes the pool; returns its threads, or 0 where other code made it before."""
    wanted = _usable_cores() if threads is None else threads
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
        forms = graph_forms(manifest, self.max_rows)

        def open_stage(file: str) -> OrtStage:
            session = sessions.open(folder / file)
            for form in forms.get(file, ()):
                require_form(file, session, form)
            return OrtStage(file, session)

        self._open_stage = open_stage
        self.manifest = manifest
        if manifest.kv.dtype == "bfloat16":
            raise DeviceError(
                "ONNX Runtime has no bfloat16 arithmetic on CPUs: export with --precision fp16 or "
                "fp32 to run on this device"
            )
        self.kv_scales = load_kv_scales(folder, manifest)
        self.embed: Any = open_stage(manifest.embed.file)
        self.positions: Any = open_stage(manifest.positions.file) if manifest.positions else None
        self._stages = [open_stage(stage.file) for stage in manifest.layer_stages]
        wide = {i: stage.wide_file for i, stage in enumerate(manifest.layer_stages)}
        self._wide = {i: open_stage(file) for i, file in wide.items() if file and not low_memory}
        quantisation = manifest.quantisation
        self._wide_rows = (quantisation.wide_rows if quantisation else None) or 0
        self._probe: Any = open_stage(manifest.probe.logits_file or manifest.probe.file)
        self._own = threading.local()  # a probe's buffers, of each thread
        self._candidates: Any = open_stage(manifest.candidates.file)
        self._proposals: Any = open_stage(manifest.shortlist.file) if manifest.shortlist else None
        self._adapters = {
            layer: open_stage(point.adapter)
            for layer, point in manifest.exit_points.items()
            if point.adapter is not None
        }
        self._classifiers = {
            spec.graph: (open_stage(spec.graph), spec.inputs) for spec in manifest.classifiers
        }
        self._translators = {
            layer: (open_stage(point.translate), point.translate_inputs)
            for layer, point in manifest.context_points.items()
            if point.translate is not None
        }

    @cached_property
    def _kv_fills(self) -> dict[int, OrtStage]:
        """Opened when the policy is first asked for: most engines never are."""
        fills = self.manifest.kv_fills.items()
        return {layer: self._open_stage(spec.file) for layer, spec in fills}

    def stage(self, index: int, rows: int) -> OrtStage:
        """What runs layer stage `index` over so many positions."""
        wide = self._wide.get(index) if rows >= self._wide_rows else None
        return wide or self._stages[index]

    def open_sequence(self) -> OrtSequence:
        """Memory and bindings for one sequence."""
        return OrtSequence(self)

    def open_batch(self, slots: int) -> OrtBatch | None:
        """Caches of several sequences in one block, where the stages take them so."""
        return OrtBatch(self, slots) if self.manifest.batched else None

    def wait(self) -> None:
        """Runs are done when they return."""

    def close(self) -> None:
        """Drops the sessions: ONNX Runtime gives their memory back once no sequence has them."""
        self.embed = self.positions = None
        self._probe = self._candidates = self._proposals = None
        self._own = threading.local()
        self._stages.clear()
        self.__dict__.pop("_kv_fills", None)
        for held in (self._wide, self._adapters, self._classifiers, self._translators):
            held.clear()

    def probe(self, hidden: Float32) -> ProbeResult:
        """One position `[hidden_size]`."""
        bound: BoundProbe | None = getattr(self._own, "probe", None)
        if bound is None:
            model = self.manifest.model
            bound = self._own.probe = BoundProbe(self._probe, model.hidden_size, model.vocab_size)
        return bound(hidden)

    def probe_rows(self, hidden: Float32) -> list[ProbeResult]:
        """Positions `[rows, hidden_size]`."""
        results: list[Any] = [HostProbe(row, threading.Lock()) for row in self.probe_logits(hidden)]
        return results

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
        logits = self.probe_logits(hidden)
        tokens = logits.argmax(axis=-1)
        pairs = [top_features(row, token) for row, token in zip(logits, tokens, strict=True)]
        top_prob, gap = np.array(pairs, np.float32).reshape(-1, 2).T
        return tokens, top_prob, gap

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
        translator, inputs = self._translators[exit_layer]
        given = {"hidden": hidden, "start": np.array([start], np.int64)}
        keys, values = translator.run(["key", "value"], {name: given[name] for name in inputs})
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
        classifier, inputs = self._classifiers[graph]
        given = {
            "token": np.array([result.token], np.int64),
            "top_prob": np.array([result.top_prob], np.float32),
            "gap": np.array([result.gap], np.float32),
            "depth": np.array([depth], np.float32),
            "trust": np.array([evidence.trust], np.float32),
            "state": state[None],
        }
        if "logits" in inputs:  # not otherwise: reading them copies them
            given["logits"] = result.logits[None]
        feed: dict[str, object] = {name: given[name] for name in inputs}
        score, next_state = classifier.run(["score", "next_state"], feed)
        return float(score[0]), next_state[0]


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
