"""A back end in device memory: hidden states stay there, an exit decision reads back a few bytes.

Adapter, probe and classifier are put onto the stream one behind the other; features, trust and
score lie side by side and come to the host in one copy. Logits stay on the device until asked for.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import ExitUnavailableError
from ..manifest import Manifest
from .base import ExitEvidence, Float32, ProbeResult
from .device_blocks import BlockPool, DeviceBlocks, Slots
from .device_memory import ALIGNMENT, DeviceDriver, DeviceRows, Tensor
from .device_results import AdaptedRow, DeviceProbe, DeviceTrust
from .device_sequence import BoundRun, DeviceSequence, Stages
from .layout import CANDIDATE_ROWS, PROBED_ROWS
from .rescore import among

__all__ = ["DeviceBackend"]

_FEATURES = {"token": "int64", "top_prob": "float32", "gap": "float32"}
_Held = TypeVar("_Held")
_LEAST_CANDIDATES = 2  # AdaInfer's gap needs a second one


class DeviceBackend:
    """See `base.Backend`. Threads take turns by the driver's lock, for there is one stream."""

    def __init__(
        self, manifest: Manifest, stages: Stages, driver: DeviceDriver, max_rows: int
    ) -> None:
        """Allocates what all sequences share.

        Raises:
            DeviceMemoryError: it does not fit.
        """
        self.manifest = manifest
        self.max_rows = max_rows
        self.lock: threading.RLock = driver.lock
        self._stages = stages
        self._driver = driver
        width, vocabulary = manifest.model.hidden_size, manifest.model.vocab_size
        self._probed_rows = min(PROBED_ROWS, max_rows)
        self._candidate_rows = min(CANDIDATE_ROWS, vocabulary)
        self._classifiers = {spec.graph: spec for spec in manifest.classifiers}
        state = 4 * max((spec.state_size for spec in manifest.classifiers), default=0)
        reads_logits = any("logits" in spec.inputs for spec in manifest.classifiers)
        small = {"token": 8, "top_prob": 4, "gap": 4, "trust": 4}
        self._outputs = Slots({**small, "score": 4, "next_state": state})
        self._inputs = Slots({**small, "depth": 4, "state": state})
        self._blocks = DeviceBlocks(
            driver,
            {
                "outputs": self._outputs.bytes,
                "inputs": self._inputs.bytes,
                "staged": 4 * width * self._probed_rows,
                "logits": 4 * vocabulary * self._probed_rows,
                "candidates": 8 * self._candidate_rows,
                "uploaded_logits": 4 * vocabulary * reads_logits,
                "start": 8,
                **dict.fromkeys(_FEATURES, 8 * self._probed_rows),
            },
        )
        self._host_outputs = driver.pinned(self._outputs.bytes)
        self._adapted = BlockPool(driver, 4 * width)
        self.kept_logits = BlockPool(driver, 4 * vocabulary)
        self._unread: weakref.ref[DeviceProbe] | None = None
        self._unread_trust: weakref.ref[DeviceTrust] | None = None

    def close(self) -> None:
        """Frees what the sequences share; nothing can be run afterwards."""
        with self.lock:
            self._blocks.free()
            for pool in (self._adapted, self.kept_logits):
                pool.close()
            self._stages.close()

    def open_sequence(self) -> DeviceSequence:
        """Memory for one sequence.

        Raises:
            DeviceMemoryError: it does not fit.
        """
        return DeviceSequence(self.manifest, self._stages, self._driver, self.max_rows)

    def open_batch(self, slots: int) -> None:
        """Every pass is of one sequence."""

    def wait(self) -> None:
        """For the stream."""
        self._driver.wait()

    def probe(self, hidden: Float32) -> ProbeResult:
        """One position `[hidden_size]`, on the device or the host; the result is read on demand."""
        vocabulary = self.manifest.model.vocab_size
        with self.lock:
            self._settle()
            inputs = {"hidden": self._row(hidden)}
            self._run(self.manifest.probe.file, inputs, self._probe_outputs(vocabulary))
            result: Any = DeviceProbe(self, vocabulary)
            self._unread = weakref.ref(result)
            return result  # type: ignore[no-any-return]

    def probe_candidates(self, hidden: Float32, candidates: npt.NDArray[np.int64]) -> ProbeResult:
        """One position `[hidden_size]`, some tokens; read at once. A plan has room for a number of
        them: more are scored in several runs.
        """
        tokens = np.ascontiguousarray(candidates, np.int64)
        with self.lock:
            self._settle()
            row = self._row(hidden)
            if _LEAST_CANDIDATES <= len(tokens) <= self._candidate_rows:
                logits = self._score(row, tokens)
                values = self.read_block()
                token = int(tokens[int(values["token"][0])])
                top_prob, gap = (float(values[name][0]) for name in ("top_prob", "gap"))
                return ProbeResult(token, top_prob, gap, logits)
            starts = range(0, len(tokens), self._candidate_rows)
            parts = [tokens[start : start + self._candidate_rows] for start in starts]
            return among(tokens, np.concatenate([self._score(row, part) for part in parts]))

    def shortlist(self, hidden: Float32) -> ProbeResult:
        """Targets in device memory have none."""
        raise ExitUnavailableError(f"target {self.manifest.target} has no shortlist")

    def probe_logits(self, hidden: Float32) -> Float32:
        """`[rows, hidden_size]` to `[rows, vocab_size]` on the host, in small steps."""
        return np.concatenate([logits for logits, _ in self._scan(hidden, logits=True)])

    def probe_features(self, hidden: Float32) -> tuple[npt.NDArray[np.int64], Float32, Float32]:
        """`[rows, hidden_size]` to three times `[rows]`."""
        found = [features for _, features in self._scan(hidden, logits=False)]
        token, top_prob, gap = (
            np.concatenate([features[name] for features in found]) for name in _FEATURES
        )
        return token, top_prob, gap

    def adapt(self, exit_layer: int, hidden: Float32) -> tuple[Float32, float]:
        """`[hidden_size]` to the same on the device, and the trust, which is read on demand."""
        point = self.manifest.exit_points.get(exit_layer)
        adapter = point.adapter if point is not None else None
        if adapter is None:
            return hidden, 0.0
        width = self.manifest.model.hidden_size
        with self.lock:
            if (unread := _alive(self._unread_trust)) is not None:
                float(unread)  # its place is about to be used again
            rows: Any = AdaptedRow(self._driver, self._adapted, width)
            outputs = {
                "adapted": Tensor(rows.address, "float32", (1, 1, width)),
                "trust": Tensor(self._slot("trust"), "float32", (1, 1)),
            }
            self._run(adapter, {"hidden": self._row(hidden)}, outputs)
            trust: Any = DeviceTrust(self)
            self._unread_trust = weakref.ref(trust)
            return rows, trust

    def translate(
        self, exit_layer: int, hidden: Float32, start: int
    ) -> dict[int, tuple[Float32, Float32]]:
        """`[rows, hidden_size]` to K and V per layer above, on the host."""
        kv, total, width = self.manifest.kv, self.manifest.model.num_layers, hidden.shape[1]
        shape = (total - exit_layer, kv.num_heads, len(hidden), kv.head_dim)
        found = {name: np.empty(shape, np.float32) for name in ("key", "value")}
        most = min(len(hidden), self.max_rows)  # in one run
        size = 4 * shape[0] * kv.num_heads * most * kv.head_dim
        sizes = {"hidden": 4 * width * most, "key": size, "value": size}
        with self.lock, DeviceBlocks(self._driver, sizes) as places:
            for first in range(0, len(hidden), most):
                part = hidden[first : first + most]
                rows = slice(first, first + len(part))
                for name, values in self._translate(exit_layer, part, start + first, places):
                    found[name][:, :, rows] = values
        layers = range(exit_layer + 1, total + 1)
        return dict(zip(layers, zip(found["key"], found["value"], strict=True), strict=True))

    def kv_fill(self, layer: int, hidden: Float32, start: int) -> tuple[Float32, Float32]:
        """Targets in device memory have no such stages."""
        raise ExitUnavailableError(
            f"target {self.manifest.target} has no kv_fill stages: use kv_policy deferred"
        )

    def classify(
        self, graph: str, evidence: ExitEvidence, depth: float, state: Float32
    ) -> tuple[float, Float32]:
        """Score and next state: with the prediction still on the device, one copy reads it all."""
        size = state.shape[-1]
        outputs = {
            "score": Tensor(self._slot("score"), "float32", (1,)),
            "next_state": Tensor(self._slot("next_state"), "float32", (1, size)),
        }
        with self.lock:
            result, trust = self._still_there(evidence)
            there = {*((*_FEATURES, "logits") if result else ()), *(("trust",) if trust else ())}
            inputs = self._classifier_inputs(graph, evidence, depth, state, there)
            self._run(graph, inputs, outputs)
            values = self.read_block()
            if result is not None:
                result.settle(values)
            if trust is not None:
                trust.settle(values)
            return float(values["score"][0]), values["next_state"][:size].copy()

    def read_block(self) -> dict[str, npt.NDArray[Any]]:
        """Waits for the stream, and gives every small result of the last exit point: views of
        memory that the next call writes anew. The caller holds the lock.
        """
        self._driver.download(self._host_outputs, self._blocks["outputs"])
        offsets = self._outputs.offsets
        return {
            name: self._host_outputs[offset:].view(np.int64 if name == "token" else np.float32)
            for name, offset in offsets.items()
        }

    def read_logits(self, count: int, place: int | None = None) -> Float32:
        """The last probe's logits, or those that were kept of an earlier one."""
        logits = np.empty(count, np.float32)
        self._driver.download(logits, self._blocks["logits"] if place is None else place)
        return logits

    def keep_logits(self, count: int) -> int:
        """Copies the last probe's logits out of the next one's way; on the device."""
        place = self.kept_logits.take()
        self._driver.copy(place, self._blocks["logits"], 4 * count)
        return place

    def _settle(self) -> None:
        """Reads what the next probe would overwrite, if anyone still holds it unread."""
        if (unread := _alive(self._unread)) is not None:
            unread.settle_all()
        self._unread = None

    def _still_there(self, evidence: ExitEvidence) -> tuple[DeviceProbe | None, DeviceTrust | None]:
        """What of the evidence lies where the last probe and the last adapter put it."""
        held: tuple[Any, Any] = (evidence.result, evidence.trust)
        result, trust = _alive(self._unread), _alive(self._unread_trust)
        return result if result is held[0] else None, trust if trust is held[1] else None

    def _classifier_inputs(
        self, graph: str, evidence: ExitEvidence, depth: float, state: Float32, there: set[str]
    ) -> dict[str, Tensor]:
        """Values that are `there` stay where they are; the others are uploaded in one go."""
        values: dict[str, Callable[[], npt.NDArray[Any]]] = {
            "token": lambda: np.array([evidence.result.token], np.int64),
            "top_prob": lambda: np.array([evidence.result.top_prob], np.float32),
            "gap": lambda: np.array([evidence.result.gap], np.float32),
            "trust": lambda: np.array([float(evidence.trust)], np.float32),
            "depth": lambda: np.array([depth], np.float32),
            "state": lambda: np.ascontiguousarray(state, np.float32)[None],
        }
        place, host = self._blocks["inputs"], np.zeros(self._inputs.bytes, np.uint8)
        inputs: dict[str, Tensor] = {}
        for name in self._classifiers[graph].inputs:
            if name == "logits":
                inputs[name] = self._logits_of(evidence, still_there=name in there)
                continue
            if name in there:
                inputs[name] = Tensor(self._slot(name), _FEATURES.get(name, "float32"), (1,))
                continue
            value, offset = values[name](), self._inputs.offsets[name]
            host[offset : offset + value.nbytes] = value.reshape(-1).view(np.uint8)
            inputs[name] = Tensor(place + offset, str(value.dtype), value.shape)
        self._driver.upload(place, host)
        return inputs

    def _logits_of(self, evidence: ExitEvidence, *, still_there: bool) -> Tensor:
        """`[1, tokens]`: the last probe's where they still lie there, else uploaded."""
        if still_there:
            shape = (1, self.manifest.model.vocab_size)
            return Tensor(self._blocks["logits"], "float32", shape)
        logits = np.ascontiguousarray(evidence.result.logits, np.float32)
        place = self._blocks["uploaded_logits"]
        self._driver.upload(place, logits)
        return Tensor(place, "float32", (1, len(logits)))

    def _score(self, row: Tensor, tokens: npt.NDArray[np.int64]) -> Float32:
        """Logits `[tokens]` of one run, which leaves features of these tokens behind."""
        padded = tokens if len(tokens) >= _LEAST_CANDIDATES else np.repeat(tokens, 2)
        place = self._blocks["candidates"]
        self._driver.upload(place, padded)
        inputs = {"hidden": row, "candidates": Tensor(place, "int64", padded.shape)}
        outputs = self._probe_outputs(len(padded))
        self._run(self.manifest.candidates.file, inputs, outputs)
        return self.read_logits(len(tokens))

    def _probe_outputs(self, count: int) -> dict[str, Tensor]:
        outputs = {
            name: Tensor(self._slot(name), dtype, (1, 1)) for name, dtype in _FEATURES.items()
        }
        outputs["logits"] = Tensor(self._blocks["logits"], "float32", (1, 1, count))
        return outputs

    def _slot(self, name: str) -> int:
        return self._blocks["outputs"] + self._outputs.offsets[name]

    def _translate(
        self, exit_layer: int, hidden: Float32, start: int, places: DeviceBlocks
    ) -> list[tuple[str, Float32]]:
        """`key` and `value` of so many rows as one run takes."""
        point, kv = self.manifest.context_points[exit_layer], self.manifest.kv
        assert point.translate is not None  # a context point has one
        above = self.manifest.model.num_layers - exit_layer
        rows = DeviceRows(self._driver, places["hidden"], *hidden.shape)
        rows[:] = hidden  # aligned, and there
        self._driver.upload(self._blocks["start"], np.array([start], np.int64))
        given = {
            "hidden": Tensor(rows.address, "float32", rows.shape),
            "start": Tensor(self._blocks["start"], "int64", (1,)),
        }
        inputs: dict[str, Tensor] = {name: given[name] for name in point.translate_inputs}
        shape = (above, kv.num_heads, len(hidden), kv.head_dim)
        outputs = {name: Tensor(places[name], "float32", shape) for name in ("key", "value")}
        self._run(point.translate, inputs, outputs)
        found = [(name, np.empty(shape, np.float32)) for name in outputs]
        for name, values in found:
            self._driver.download(values, places[name])
        return found

    def _scan(self, hidden: Float32, *, logits: bool) -> list[tuple[Float32, dict[str, Any]]]:
        found = []
        with self.lock:
            self._settle()
            for start in range(0, len(hidden), self._probed_rows):
                found.append(self._scan_rows(hidden[start : start + self._probed_rows], logits))
        return found

    def _scan_rows(self, hidden: Float32, logits: bool) -> tuple[Float32, dict[str, Any]]:
        rows, vocabulary = len(hidden), self.manifest.model.vocab_size
        outputs = {
            name: Tensor(self._blocks[name], dtype, (1, rows)) for name, dtype in _FEATURES.items()
        }
        outputs["logits"] = Tensor(self._blocks["logits"], "float32", (1, rows, vocabulary))
        inputs = {"hidden": self._staged(hidden, rows)}
        self._run(self.manifest.probe.file, inputs, outputs)
        values = {name: np.empty(rows, dtype) for name, dtype in _FEATURES.items()}
        for name, host in values.items():
            self._driver.download(host, self._blocks[name])
        table = np.empty((rows if logits else 0, vocabulary), np.float32)
        if logits:
            self._driver.download(table, self._blocks["logits"])
        return table, values

    def _row(self, hidden: Float32) -> Tensor:
        """One position as `[1, 1, hidden_size]`; a row that is not aligned is copied first."""
        if isinstance(hidden, DeviceRows) and hidden.address % ALIGNMENT == 0:
            return Tensor(hidden.address, "float32", (1, 1, self.manifest.model.hidden_size))
        return self._staged(hidden, 1)

    def _staged(self, hidden: Float32, rows: int) -> Tensor:
        """A copy at an aligned place, `[1, rows, hidden_size]`."""
        width = self.manifest.model.hidden_size
        DeviceRows(self._driver, self._blocks["staged"], rows, width)[:] = hidden
        return Tensor(self._blocks["staged"], "float32", (1, rows, width))

    def _run(self, file: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        self._stages.load(file).bind(BoundRun(inputs, outputs))()


def _alive(held: weakref.ref[_Held] | None) -> _Held | None:
    return held() if held is not None else None
