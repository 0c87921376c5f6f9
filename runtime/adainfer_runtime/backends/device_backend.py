"""A back end in device memory: hidden states stay there, an exit decision reads back a few bytes.

Adapter, probe and classifier are put onto the stream one behind the other; features, trust and
score lie side by side and come to the host in one copy. Logits stay on the device until asked for.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ExitUnavailableError
from ..manifest import Manifest
from .base import ExitEvidence, Float32, ProbeResult
from .device_memory import ALIGNMENT, DeviceDriver, DeviceRows, Tensor
from .device_sequence import BoundRun, DeviceSequence, Stages
from .layout import PROBED_ROWS

__all__ = ["DeviceBackend"]

# Slots of the read-back block, one for each value: TensorRT wants every tensor aligned.
_SLOTS = ("token", "top_prob", "gap", "trust", "score", "next_state")


class DeviceBackend:
    """See `base.Backend`."""

    def __init__(
        self, manifest: Manifest, stages: Stages, driver: DeviceDriver, max_rows: int
    ) -> None:
        self.manifest = manifest
        self.max_rows = max_rows
        self._stages = stages
        self._driver = driver
        self._lock = threading.RLock()
        width, vocabulary = manifest.model.hidden_size, manifest.model.vocab_size
        self._probed_rows = min(PROBED_ROWS, max_rows)
        self._block = driver.allocate(ALIGNMENT * len(_SLOTS))
        self._host_block = driver.pinned(ALIGNMENT * len(_SLOTS))
        self._staged = driver.allocate(4 * width * self._probed_rows)
        self._adapted = driver.allocate(4 * width)
        self._logits = driver.allocate(4 * vocabulary * self._probed_rows)
        self._features = {
            name: driver.allocate(size * self._probed_rows)
            for name, size in (("token", 8), ("top_prob", 4), ("gap", 4))
        }
        self._small = {name: driver.allocate(8 * vocabulary) for name in ("candidates", "inputs")}
        self._classifier_inputs = {spec.graph: spec.inputs for spec in manifest.classifiers}
        self._unread: weakref.ref[_DeviceProbe] | None = None
        self._spare_logits: list[int] = []
        self._unread_trust: _DeviceTrust | None = None

    def open_sequence(self) -> DeviceSequence:
        """Memory for one sequence."""
        return DeviceSequence(self.manifest, self._stages, self._driver, self.max_rows)

    def open_batch(self, slots: int) -> None:
        """Every pass is of one sequence."""

    def wait(self) -> None:
        """For the stream."""
        self._driver.wait()

    def probe(self, hidden: Float32) -> ProbeResult:
        """One position `[hidden_size]`, on the device or the host; the result is read on demand."""
        with self._lock:
            self._settle()
            outputs = {
                name: Tensor(self._slot(name), dtype, (1, 1))
                for name, dtype in (("token", "int64"), ("top_prob", "float32"), ("gap", "float32"))
            }
            vocabulary = self.manifest.model.vocab_size
            outputs["logits"] = Tensor(self._logits, "float32", (1, 1, vocabulary))
            self._run(self.manifest.probe.file, {"hidden": self._rows(hidden)}, outputs)
            result: Any = _DeviceProbe(self, vocabulary)
            self._unread = weakref.ref(result)
            return result  # type: ignore[no-any-return]

    def probe_candidates(self, hidden: Float32, candidates: npt.NDArray[np.int64]) -> ProbeResult:
        """One position `[hidden_size]`, some tokens; read at once."""
        with self._lock:
            self._settle()
            count = len(candidates)
            rows = np.ascontiguousarray(candidates, np.int64)
            self._driver.upload(self._small["candidates"], rows)
            inputs = {
                "hidden": self._rows(hidden),
                "candidates": Tensor(self._small["candidates"], "int64", (count,)),
            }
            outputs = {
                name: Tensor(self._slot(name), dtype, (1, 1))
                for name, dtype in (("token", "int64"), ("top_prob", "float32"), ("gap", "float32"))
            }
            outputs["logits"] = Tensor(self._logits, "float32", (1, 1, count))
            self._run(self.manifest.candidates.file, inputs, outputs)
            values = self._read_block()
            token = int(candidates[int(values["token"][0])])
            return ProbeResult(
                token,
                float(values["top_prob"][0]),
                float(values["gap"][0]),
                self.read_logits(count),
            )

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
            np.concatenate([features[name] for features in found])
            for name in ("token", "top_prob", "gap")
        )
        return token, top_prob, gap

    def adapt(self, exit_layer: int, hidden: Float32) -> tuple[Float32, float]:
        """`[hidden_size]` to the same on the device, and the trust, which is read on demand."""
        point = self.manifest.exit_points.get(exit_layer)
        adapter = point.adapter if point is not None else None
        if adapter is None:
            return hidden, 0.0
        with self._lock:
            if self._unread_trust is not None:
                float(self._unread_trust)  # its place is about to be used again
            width = self.manifest.model.hidden_size
            outputs = {
                "adapted": Tensor(self._adapted, "float32", (1, 1, width)),
                "trust": Tensor(self._slot("trust"), "float32", (1, 1)),
            }
            self._run(adapter, {"hidden": self._rows(hidden)}, outputs)
            rows: Any = DeviceRows(self._driver, self._adapted, 1, width)
            self._unread_trust = _DeviceTrust(self)
            trust: Any = self._unread_trust
            return rows, trust

    def translate(
        self, exit_layer: int, hidden: Float32, start: int
    ) -> dict[int, tuple[Float32, Float32]]:
        """`[rows, hidden_size]` to K and V per layer above, on the host."""
        point = self.manifest.context_points[exit_layer]
        file = point.translate
        assert file is not None  # a context point has one
        kv, total = self.manifest.kv, self.manifest.model.num_layers
        shape = (total - exit_layer, kv.num_heads, len(hidden), kv.head_dim)
        size = 4 * int(np.prod(shape))
        with self._lock:
            rows = hidden if isinstance(hidden, DeviceRows) else self._upload_rows(hidden)
            self._driver.upload(self._small["inputs"], np.array([start], np.int64))
            inputs = {
                "hidden": Tensor(rows.address, "float32", rows.shape),
                "start": Tensor(self._small["inputs"], "int64", (1,)),
            }
            inputs = {name: inputs[name] for name in point.translate_inputs}
            places = {name: self._driver.allocate(size) for name in ("key", "value")}
            outputs = {name: Tensor(place, "float32", shape) for name, place in places.items()}
            self._run(file, inputs, outputs)
            keys, values = (np.empty(shape, np.float32) for _ in places)
            self._driver.download(keys, places["key"])
            self._driver.download(values, places["value"])
            for place in places.values():
                self._driver.free(place)
        layers = range(exit_layer + 1, total + 1)
        return dict(zip(layers, zip(keys, values, strict=True), strict=True))

    def kv_fill(self, layer: int, hidden: Float32, start: int) -> tuple[Float32, Float32]:
        """Targets in device memory have no such stages."""
        raise ExitUnavailableError(
            f"target {self.manifest.target} has no kv_fill stages: use kv_policy deferred"
        )

    def classify(
        self, graph: str, evidence: ExitEvidence, depth: float, state: Float32
    ) -> tuple[float, Float32]:
        """Score and next state: with the prediction still on the device, one copy reads it all."""
        with self._lock:
            held: tuple[Any, Any] = (evidence.result, evidence.trust)
            unread = self._unread() if self._unread is not None else None
            direct = held == (unread, self._unread_trust) and None not in held
            place = self._small["inputs"]
            host = np.zeros(ALIGNMENT * 6, np.uint8)
            result = None if direct else evidence.result
            given: dict[str, npt.NDArray[Any]] = {
                "token": np.array([result.token if result else 0], np.int64),
                "top_prob": np.array([result.top_prob if result else 0.0], np.float32),
                "gap": np.array([result.gap if result else 0.0], np.float32),
                "trust": np.array([0.0 if direct else float(evidence.trust)], np.float32),
                "depth": np.array([depth], np.float32),
                "state": np.ascontiguousarray(state, np.float32)[None],
            }
            inputs: dict[str, Tensor] = {}
            for number, name in enumerate(self._classifier_inputs[graph]):
                value = given[name]
                at = number * ALIGNMENT
                host[at : at + value.nbytes] = value.reshape(-1).view(np.uint8)
                inputs[name] = Tensor(place + at, str(value.dtype), value.shape)
            self._driver.upload(place, host)
            if direct:
                for name in inputs.keys() & {"token", "top_prob", "gap", "trust"}:
                    dtype = str(given[name].dtype)
                    inputs[name] = Tensor(self._slot(name), dtype, (1,))
            size = state.shape[-1]
            outputs = {
                "score": Tensor(self._slot("score"), "float32", (1,)),
                "next_state": Tensor(self._slot("next_state"), "float32", (1, size)),
            }
            self._run(graph, inputs, outputs)
            values = self._read_block()
            if direct:
                held[0].settle(values)
                held[1].settle(values)
            return float(values["score"][0]), values["next_state"][:size].copy()

    def read_block(self) -> Mapping[str, npt.NDArray[Any]]:
        """Waits for the stream, and gives every small result of the last exit point."""
        with self._lock:
            return self._read_block()

    def read_logits(self, count: int, place: int | None = None) -> Float32:
        """The last probe's logits, or those that were kept of an earlier one."""
        logits = np.empty(count, np.float32)
        self._driver.download(logits, self._logits if place is None else place)
        return logits

    def keep_logits(self, count: int) -> int:
        """Copies the last probe's logits out of the next one's way; on the device."""
        size = 4 * count
        place = self._spare_logits.pop() if self._spare_logits else self._driver.allocate(size)
        self._driver.copy(place, self._logits, size)
        return place

    def drop_logits(self, place: int) -> None:
        """A place of `keep_logits` is free again."""
        self._spare_logits.append(place)

    def _settle(self) -> None:
        """Reads what the next probe would overwrite, if anyone still holds it unread."""
        unread = self._unread() if self._unread is not None else None
        if unread is not None:
            unread.settle_all()
        self._unread = None

    def _read_block(self) -> dict[str, npt.NDArray[Any]]:
        self._driver.download(self._host_block, self._block)
        return {
            name: self._host_block[number * ALIGNMENT : (number + 1) * ALIGNMENT].view(
                np.int64 if name == "token" else np.float32
            )
            for number, name in enumerate(_SLOTS)
        }

    def _slot(self, name: str) -> int:
        return self._block + ALIGNMENT * _SLOTS.index(name)

    def _scan(self, hidden: Float32, *, logits: bool) -> list[tuple[Float32, dict[str, Any]]]:
        width, vocabulary = self.manifest.model.hidden_size, self.manifest.model.vocab_size
        found = []
        with self._lock:
            self._settle()
            for start in range(0, len(hidden), self._probed_rows):
                part = hidden[start : start + self._probed_rows]
                rows = len(part)
                outputs = {"logits": Tensor(self._logits, "float32", (1, rows, vocabulary))}
                for name, place in self._features.items():
                    dtype = "int64" if name == "token" else "float32"
                    outputs[name] = Tensor(place, dtype, (1, rows))
                staged = DeviceRows(self._driver, self._staged, self._probed_rows, width)
                staged[:rows] = part
                inputs = {"hidden": Tensor(self._staged, "float32", (1, rows, width))}
                self._run(self.manifest.probe.file, inputs, outputs)
                values = {}
                for name, place in self._features.items():
                    values[name] = np.empty(rows, np.int64 if name == "token" else np.float32)
                    self._driver.download(values[name], place)
                table = np.empty((rows if logits else 0, vocabulary), np.float32)
                if logits:
                    self._driver.download(table, self._logits)
                found.append((table, values))
        return found

    def _rows(self, hidden: Float32) -> Tensor:
        """One position as `[1, 1, hidden_size]`; rows that are not aligned are copied first."""
        width = self.manifest.model.hidden_size
        if isinstance(hidden, DeviceRows) and hidden.address % ALIGNMENT == 0:
            return Tensor(hidden.address, "float32", (1, 1, width))
        staged = DeviceRows(self._driver, self._staged, 1, width)
        staged[:] = hidden if isinstance(hidden, DeviceRows) else np.asarray(hidden)
        return Tensor(self._staged, "float32", (1, 1, width))

    def _upload_rows(self, hidden: Float32) -> DeviceRows:
        width = self.manifest.model.hidden_size
        empty = DeviceRows(self._driver, self._staged, len(hidden), width).copy()
        empty[:] = hidden
        return empty

    def _run(self, file: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        self._stages.load(file).bind(BoundRun(inputs, outputs))()


class _DeviceProbe:
    """A `ProbeResult` that is read when asked for."""

    def __init__(self, backend: DeviceBackend, vocabulary: int) -> None:
        self._backend = backend
        self._vocabulary = vocabulary
        self._read: _Read | None = None
        self._logits: Float32 | None = None
        self._kept: int | None = None

    def __del__(self) -> None:
        if self._kept is not None:
            self._backend.drop_logits(self._kept)

    @property
    def token(self) -> int:
        """Id of the most probable token."""
        return self._values().token

    @property
    def top_prob(self) -> float:
        """Its probability."""
        return self._values().top_prob

    @property
    def gap(self) -> float:
        """Less that of the second."""
        return self._values().gap

    @property
    def logits(self) -> Float32:
        """`[vocab_size]`, copied from the device at the first use."""
        if self._logits is None:
            self._logits = self._backend.read_logits(self._vocabulary, self._kept)
        return self._logits

    def settle(self, values: Mapping[str, npt.NDArray[Any]]) -> None:
        """Keeps what was read together with a score."""
        self._read = _Read(
            int(values["token"][0]), float(values["top_prob"][0]), float(values["gap"][0])
        )

    def settle_all(self) -> None:
        """Keeps everything: the buffers are about to be used again."""
        self._values()
        if self._logits is None and self._kept is None:
            self._kept = self._backend.keep_logits(self._vocabulary)

    def _values(self) -> _Read:
        if self._read is None:
            self.settle(self._backend.read_block())
        assert self._read is not None  # settled just now
        return self._read


@dataclass(frozen=True)
class _Read:
    token: int
    top_prob: float
    gap: float


class _DeviceTrust:
    """The adapter's trust, read when asked for."""

    def __init__(self, backend: DeviceBackend) -> None:
        self._backend = backend
        self._value: float | None = None

    def settle(self, values: Mapping[str, npt.NDArray[Any]]) -> None:
        """Keeps what was read together with a score."""
        self._value = float(values["trust"][0])

    def __float__(self) -> float:
        if self._value is None:
            self.settle(self._backend.read_block())
        assert self._value is not None  # settled just now
        return self._value
