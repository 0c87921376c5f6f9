"""A GPU that is none: it checks every address, shape, order and alias, and computes on the CPU.

Work is put into a queue and done when someone waits, so that whoever reads without waiting, or
changes what is still to be read, gets wrong numbers. Plans are the ONNX files themselves.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from adainfer_runtime.backends.layout import ITEM_BYTES
from adainfer_runtime.backends.ort_cpu import open_session
from adainfer_runtime.errors import DeviceMemoryError, StageError

_BASE = 0x7000_0000_0000
_GUARD = 256


class FakeDriver:
    """See `tensorrt_protocols.GraphDriver`. `room` is what can be allocated.

    `capture_fails` makes recording fail as CUDA does: within a stage's run ("run"), or by what the
    stream says of it at its end ("end").
    """

    def __init__(self, room=None, capture_fails=None):
        self.lock = threading.RLock()
        self.room = room
        self.capture_fails = capture_fails
        self.captures = 0  # that were tried
        self.graphs = 0  # that were recorded and not given back
        self.blocks = {}
        self._next = _BASE
        self._queue = []
        self._recording = None
        self.log = []

    def allocate(self, size):
        with self.lock:
            if self.room is not None and self.live_bytes + size > self.room:
                raise DeviceMemoryError("the fake GPU's memory is full")
            address = self._next
            self._next += -(-size // 256) * 256 + _GUARD
            self.blocks[address] = np.zeros(size, np.uint8)
            return address

    @property
    def live_bytes(self):
        """Of what is allocated, once the stream is done."""
        self._flush()
        return sum(block.nbytes for block in self.blocks.values())

    def free(self, address):
        with self.lock:
            assert address in self.blocks, "freed twice"
            self._queue.append(lambda: self.blocks.pop(address))  # in the stream's order

    def upload(self, address, host):
        self.upload_rows(address, 0, np.ascontiguousarray(host).reshape(1, -1))

    def upload_rows(self, address, pitch, host):
        content = np.ascontiguousarray(host).view(np.uint8).copy()
        entry = ("upload", address, content.nbytes)
        places = [address + number * pitch for number in range(len(content))]
        with self.lock:
            for place, row in zip(places, content, strict=True):
                self.view(place, row.nbytes)
            writes = list(zip(places, content, strict=True))
            self._put(entry, lambda: [self._write(place, row) for place, row in writes])

    def download(self, host, address):
        self.download_rows(host.reshape(1, -1), address, 0)

    def download_rows(self, host, address, pitch):
        assert host.flags.c_contiguous
        assert self._recording is None, "a graph cannot wait"
        with self.lock:
            self.log.append(("download", address, host.nbytes))
            self._flush()
            for number, row in enumerate(host.view(np.uint8)):
                row[:] = self.view(address + number * pitch, row.nbytes)

    def copy(self, target, source, size):
        assert target + size <= source or source + size <= target, "overlapping copy"
        with self.lock:
            self.view(target, size)
            self.view(source, size)
            self._put(
                ("copy", target, size), lambda: self._write(target, self.view(source, size).copy())
            )

    def pinned(self, size):
        return np.zeros(size, np.uint8)

    def record(self, work):
        with self.lock:
            assert self._recording is None
            self.captures += 1
            self._recording = (threading.get_ident(), [])
            try:
                work()
            finally:
                (_, recorded), self._recording = self._recording, None
            if self.capture_fails == "end":
                raise StageError("CUDA: cudaStreamEndCapture failed")
            return FakeGraph(self, recorded)

    def launch(self, recorded):
        with self.lock:
            self.log.append(("graph", len(recorded), 0))
            for _, call in recorded:
                self._queue.append(call)

    @property
    def recording(self):
        """Whether work is put into a graph."""
        return self._recording is not None

    @property
    def busy(self):
        """Whether something is still to be done."""
        return bool(self._queue)

    def wait(self):
        """The stream is done."""
        with self.lock:
            self.log.append(("wait", 0, 0))
            self._flush()

    def enqueue(self, entry, call):
        self._put(entry, call)

    def view(self, address, size):
        """Bytes of one allocation; anything else is a wrong address."""
        for base, block in tuple(self.blocks.items()):
            if base <= address < base + max(1, block.nbytes):
                offset = address - base
                assert offset + size <= block.nbytes, (
                    f"{size} bytes at {address:#x} leave an allocation of {block.nbytes}"
                )
                return block[offset : offset + size]
        raise AssertionError(f"{address:#x} is no allocated address")

    def _write(self, address, content):
        self.view(address, content.nbytes)[:] = content

    def _put(self, entry, call):
        if self._recording is not None:
            thread, recorded = self._recording
            assert thread == threading.get_ident(), "another thread's work is being recorded"
            recorded.append((entry, call))
            return
        self.log.append(entry)
        self._queue.append(call)

    def _flush(self):
        with self.lock:
            queue, self._queue = self._queue, []
            for call in queue:
                call()


class FakeGraph:
    """Counts while it lives."""

    def __init__(self, driver, recorded):
        self._driver, self._recorded = driver, recorded
        driver.graphs += 1

    def __call__(self):
        self._driver.launch(self._recorded)

    def __del__(self):
        self._driver.graphs -= 1


@dataclass
class FakeLoader:
    """Loads ONNX files as plans; `profiles` by file name, `aliases` False breaks the promise."""

    driver: FakeDriver
    profiles_of: object
    aliases: bool = True

    def load(self, path):
        return FakePlan(path, self.driver, self.profiles_of(path), aliases=self.aliases)


class FakePlan:
    """See `tensorrt_protocols.Plan`."""

    def __init__(self, path, driver, profiles, *, aliases):
        self.path = path
        graph = ir.load(path).graph
        self._inputs = {value.name: value for value in graph.inputs}
        self._outputs = {value.name: value for value in graph.outputs}
        self._alias = {}
        for node in graph:
            if node.op_type == "TensorScatter" and aliases:
                self._alias[node.outputs[0].name] = node.inputs[0].name
        self._session = open_session(path)
        self._driver = driver
        self._profiles = profiles
        self.contexts = []

    def inputs(self):
        return tuple(self._inputs)

    def outputs(self):
        return tuple(self._outputs)

    def alias_of(self, output):
        return self._alias.get(output)

    def profiles(self):
        return len(self._profiles)

    def accepts(self, profile, name, shape):
        declared = tuple(self._inputs[name].shape)
        if all(isinstance(size, int) for size in declared):
            return declared == shape
        bounds = self._profiles[profile][name]
        if len(shape) != len(bounds.smallest):
            return False
        zipped = zip(bounds.smallest, shape, bounds.largest, strict=True)
        return all(low <= size <= high for low, size, high in zipped)

    def context(self, profile, *, fixed_shapes):
        self.contexts.append(FakeContext(self, self._driver, profile))
        return self.contexts[-1]

    def start(self, shapes, addresses):
        """Puts a run onto the stream."""
        assert set(shapes) == set(self._inputs), "a shape was not set"
        assert set(addresses) == {*self._inputs, *self._outputs}, "an address was not set"
        for output, source in self._alias.items():
            assert addresses[output] == addresses[source], "the cache is not updated in place"
        entry = ("run", self.path.name, shapes.get("hidden"))
        self._driver.enqueue(entry, lambda: self._execute(shapes, addresses))

    def _execute(self, shapes, addresses):
        feeds = {}
        for name, value in self._inputs.items():
            feeds[name] = self._tensor(value, shapes[name], addresses[name]).copy()
        results = self._session.run(list(self._outputs), feeds)
        for (name, value), result in zip(self._outputs.items(), results, strict=True):
            self._tensor(value, result.shape, addresses[name])[...] = result

    def _tensor(self, value, shape, address):
        dtype = value.dtype.numpy()
        for declared, size in zip(value.shape, shape, strict=True):
            assert not isinstance(declared, int) or declared == size, (value.name, shape)
        kind = {"int64": "int64", "bool": "bool"}.get(str(dtype), str(dtype))
        size = int(np.prod(shape)) * ITEM_BYTES[kind]
        return self._driver.view(address, size).view(dtype).reshape(shape)


class FakeContext:
    """See `tensorrt_protocols.PlanContext`.

    It keeps NVIDIA's rules for graphs: a context that was captured is left alone, the run after a
    change of shapes is none that is captured, and nothing is set within a capture.
    """

    def __init__(self, plan, driver, profile):
        self.captured = False
        self.told = []  # what was set, in order
        self._plan, self._driver, self._profile = plan, driver, profile
        self._shapes, self._addresses = {}, {}
        self._settled = False

    def set_input_shape(self, name, shape):
        self._change(name)
        if not self._plan.accepts(self._profile, name, shape):
            raise StageError(f"TensorRT refuses shape {list(shape)} of {name}")
        self._shapes[name] = shape
        self._settled = False

    def set_address(self, name, address):
        self._change(name)
        self._addresses[name] = address
        time.sleep(0)  # another thread may come in between

    def enqueue(self):
        assert not self.captured, "a context that a graph was captured from runs again"
        if self._driver.recording:
            assert self._settled, "the first run after a change of shapes is captured"
            self.captured = True
            if self._driver.capture_fails == "run":
                raise StageError("TensorRT could not run a stage; see its log")
        self._settled = True
        self._plan.start(dict(self._shapes), dict(self._addresses))

    def capturable(self):
        return True

    def _change(self, name):
        assert not self._driver.recording, f"{name} is set within a capture"
        assert not self.captured, f"{name} is set in a context that a graph was captured from"
        self.told.append(name)
