"""What the linear layers of a model are given: the decoder in float32, run layer by layer.

Each stage is written, run on all prompts with the inputs of its linear layers as further outputs,
and removed before the next one: a model takes the disk of one layer, and the memory of its weights,
of its inputs' second moments (in x in, float32) and of the prompts' hidden states. Activations are
the float model's own, not those behind layers that are rounded already: on SmolLM2 that gave the
same (KL .30 and .30, blocks of 64), in one pass instead of five.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from adainfer_runtime.backends.ort_cpu import open_session
from adainfer_runtime.tokenizer import Tokenizer

from .calibrate.builtin import builtin_examples
from .decoder_source import prepare_decoder
from .gptq import ErrorFeedback, SecondMoment
from .journal import Journal
from .layout import StageLayout
from .lower import Precision, find_target
from .lower.decoder import DecoderRequest
from .lower.graph import find_linears, remove_dead_nodes
from .lower.targets import Dialect
from .lower_stage import lower_stage
from .sources import Checkpoint
from .split import StageGraph, layer_groups, split_decoder
from .writer import DataWriter

__all__ = ["InputMoments", "rounding_prompts"]

_EVERY = 11  # of about 1,500 prompts, by kinds: 137, some 6,500 tokens of SmolLM2
_SEED = 20260  # not the calibration's: exits are certified on other prompts than these


def rounding_prompts(tokenizer: Tokenizer, max_seq_len: int) -> list[list[int]]:
    """Token ids of built-in prompts of every kind, cut to what an engine takes."""
    chosen = builtin_examples(_SEED)[::_EVERY]
    return [tokenizer.encode(example.prompt)[:max_seq_len] for example in chosen]


@dataclass(frozen=True)
class _Stage:
    """A stage in float32.

    Attributes:
        taps: by output, the weights of the linear layers that read it.
        output: what the next stage reads; None of the last one.
    """

    name: str
    file: str
    inputs: dict[str, tuple[int | str, ...]]
    output: str | None
    taps: dict[str, tuple[str, ...]]


class InputMoments:
    """Second moments of the inputs of a model's linear layers, LM head included.

    Args:
        precision: of the export, whose blocks say how far feed-forward widths are padded.
        max_seq_len: of the export, which some rotary scalings depend on.
        scratch: an empty folder.
    """

    def __init__(
        self, checkpoint: Checkpoint, precision: Precision, max_seq_len: int, scratch: Path
    ) -> None:
        _, dialect, exact = find_target("ort-cpu", "fp32")
        prepared = prepare_decoder(checkpoint, max_seq_len, dialect, precision)
        model, count = prepared.decoder.model, len(prepared.decoder.layer_heads)
        dialect.lower_decoder(model, DecoderRequest(prepared.windows, max_seq_len, exact))
        self._layout = StageLayout(scratch)
        self._writer = DataWriter(scratch, prepared.checkpoint, Journal(scratch, {}))
        stages = split_decoder(model, layer_groups(count, 1))
        self._stages = [
            _add(stage, self._layout, dialect, exact, checkpoint.tied_head)
            for stage in stages
            if stage.kind != "candidates"
        ]

    @property
    def tensors(self) -> frozenset[str]:
        """Names of the weights whose inputs are seen."""
        taps = (names for stage in self._stages for names in stage.taps.values())
        return frozenset(name for names in taps for name in names)

    def feedbacks(
        self, prompts: Sequence[Sequence[int]], wanted: Collection[str]
    ) -> Iterator[tuple[tuple[str, ...], ErrorFeedback]]:
        """Weights that read the same, and how they are rounded, in the order of their stages; ends
        behind the last that is wanted.

        Args:
            prompts: token ids.
            wanted: weights whose inputs are of interest; those of others are not added up.

        Raises:
            UnsupportedError: activations are not finite.
        """
        last = max(
            (
                index
                for index, stage in enumerate(self._stages)
                for names in stage.taps.values()
                if set(names) & set(wanted)
            ),
            default=-1,
        )
        self._write("stages/shared.data")  # rotary tables
        states: list[npt.NDArray[Any]] = [np.array([prompt], np.int64) for prompt in prompts]
        for stage in self._stages[: last + 1]:
            taps = {tap: names for tap, names in stage.taps.items() if set(names) & set(wanted)}
            moments, states = self._run(stage, states, list(taps))
            for tap, names in taps.items():  # none is kept here: they are as large as the layer
                yield names, ErrorFeedback.of(moments.pop(tap).value())

    def _run(
        self, stage: _Stage, states: list[npt.NDArray[Any]], taps: list[str]
    ) -> tuple[dict[str, SecondMoment], list[npt.NDArray[Any]]]:
        """The moments of the taps, and what the next stage is given."""
        data = f"stages/{stage.name}.data"
        self._write(data)
        root = self._layout.root
        session = open_session(root / stage.file)
        with suppress(FileNotFoundError):
            (root / data).unlink()  # read
        moments: dict[str, SecondMoment] = {}
        following = []
        outputs = [*taps, *([stage.output] if stage.output else [])]
        for state in states:
            found = dict(zip(outputs, session.run(outputs, _feed(stage, state)), strict=True))
            for tap in taps:
                rows = found[tap].reshape(-1, found[tap].shape[-1])
                moments.setdefault(tap, SecondMoment(rows.shape[1])).add(rows)
            if stage.output:
                following.append(found[stage.output])
        return moments, following

    def _write(self, file: str) -> None:
        plans = [plan for plan in self._layout.plans if plan.file == file]
        self._writer.write_all(plans, 1, lambda _: None)


def _add(
    stage: StageGraph, layout: StageLayout, dialect: Dialect, exact: Precision, tied: bool
) -> _Stage:
    graph = stage.model.graph
    output = str(graph.outputs[0].name)
    last = stage.kind == "probe"
    if last:  # of the probe the norm alone, not the LM head
        graph.outputs.clear()
    taps = _tap_linears(graph)
    remove_dead_nodes(graph)
    weights = lower_stage(stage, dialect, exact, tied=tied)
    return _Stage(
        name=stage.name,
        file=layout.add(stage.model, weights),
        inputs={str(value.name): _shape(value) for value in graph.inputs},
        output=None if last else output,
        taps=taps,
    )


def _tap_linears(graph: ir.Graph) -> dict[str, tuple[str, ...]]:
    """Makes the inputs of linear layers outputs; by output, the weights that read it."""
    readers: dict[ir.Value, list[str]] = {}
    for linear in find_linears(graph):
        readers.setdefault(linear.input, []).append(str(linear.weight.name))
    taps = {}
    for value, names in readers.items():
        tap = ir.Node("", "Identity", [value])
        graph.append(tap)
        (out,) = tap.outputs
        out.name, out.type, out.shape = f"input_of.{names[0]}", value.type, value.shape
        graph.outputs.append(out)
        taps[out.name] = tuple(names)
    return taps


def _shape(value: ir.Value) -> tuple[int | str, ...]:
    assert value.shape is not None  # the split gives all inputs shapes
    return tuple(size if isinstance(size, int) else str(size) for size in value.shape)


def _feed(stage: _Stage, state: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
    """A whole prompt before which there is nothing: an empty cache."""
    rows = state.shape[1]
    known = {
        "input_ids": state,
        "hidden": state,
        "position_ids": np.arange(rows, dtype=np.int64)[None],
        "seqlens_k": np.array([rows - 1], np.int32),
        "total_sequence_length": np.array(rows, np.int32),
    }
    feed = {}
    for name, shape in stage.inputs.items():
        if name.startswith("past_"):
            feed[name] = np.zeros((1, int(shape[1]), 0, int(shape[3])), np.float32)
        else:
            feed[name] = known[name]
    return feed
