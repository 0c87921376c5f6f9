"""The decoder in float32, run layer by layer: its values before anything is rounded.

Each stage is written, run on all prompts, and removed before the next one: a model takes the disk
of one layer, and the memory of its weights and of the prompts' hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from adainfer_runtime.backends.ort_cpu import open_session
from adainfer_runtime.tokenizer import Tokenizer

from .calibrate.builtin import builtin_examples
from .decoder_source import prepare_decoder
from .journal import Journal
from .layout import StageLayout
from .lower import Precision, find_target
from .lower.decoder import DecoderRequest
from .lower.graph import remove_dead_nodes
from .lower.targets import Dialect
from .lower_stage import lower_stage
from .sources import Checkpoint
from .split import StageGraph, layer_groups, split_decoder
from .writer import DataWriter

__all__ = ["FloatDecoder", "FloatStage", "builtin_prompts"]

_EVERY = 11  # of about 1,500 prompts, by kinds: 137, some 6,500 tokens of SmolLM2
_SEED = 20260  # not the calibration's: exits are certified on other prompts than these
_Array = npt.NDArray[Any]
Found = TypeVar("Found")


def builtin_prompts(tokenizer: Tokenizer, max_seq_len: int) -> list[list[int]]:
    """Token ids of built-in prompts of every kind, cut to what an engine takes."""
    chosen = builtin_examples(_SEED)[::_EVERY]
    return [tokenizer.encode(example.prompt)[:max_seq_len] for example in chosen]


@dataclass(frozen=True)
class FloatStage(Generic[Found]):
    """A stage in float32.

    Attributes:
        layer: 1-based; 0 of the embedding and the probe.
        output: what the next stage reads; None of the last one.
        seen: what `look` found in its graph.
    """

    name: str
    layer: int
    file: str
    inputs: dict[str, tuple[int | str, ...]]
    output: str | None
    seen: Found


class FloatDecoder(Generic[Found]):
    """Embedding, every layer, and the final norm without the LM head: `stages`, in this order.

    Args:
        precision: of the export, whose blocks say how far feed-forward widths are padded.
        max_seq_len: of the export, which some rotary scalings depend on.
        scratch: a folder for its files.
        look: given each stage's graph before it is lowered, to which it may add outputs.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        precision: Precision,
        max_seq_len: int,
        scratch: Path,
        look: Callable[[ir.Graph], Found],
    ) -> None:
        _, dialect, exact = find_target("ort-cpu", "fp32")
        prepared = prepare_decoder(checkpoint, max_seq_len, dialect, precision)
        model, count = prepared.decoder.model, len(prepared.decoder.layer_heads)
        dialect.lower_decoder(model, DecoderRequest(prepared.windows, max_seq_len, exact))
        self._layout = StageLayout(scratch)
        self._writer = DataWriter(scratch, prepared.checkpoint, Journal(scratch, {}))
        stages = split_decoder(model, layer_groups(count, 1))
        self.stages = [
            _add(stage, self._layout, dialect, exact, checkpoint.tied_head, look)
            for stage in stages
            if stage.kind != "candidates"
        ]

    def start(self, prompts: Sequence[Sequence[int]]) -> list[_Array]:
        """What the first stage is given: token ids."""
        self._write("stages/shared.data")  # rotary tables
        return [np.array([prompt], np.int64) for prompt in prompts]

    def run(
        self,
        stage: FloatStage[Found],
        states: Sequence[_Array],
        outputs: Sequence[str],
        see: Callable[[Mapping[str, _Array]], None],
    ) -> list[_Array]:
        """Runs a stage on the prompts' states; what the next stage is given (nothing, of the last).

        Args:
            outputs: names of those that are of interest.
            see: told their values, prompt by prompt.
        """
        data = f"stages/{stage.name}.data"
        self._write(data)
        root = self._layout.root
        session = open_session(root / stage.file)
        with suppress(FileNotFoundError):
            (root / data).unlink()  # read
        wanted = [*outputs, *([stage.output] if stage.output else [])]
        following = []
        for state in states:
            found = dict(zip(wanted, session.run(wanted, _feed(stage, state)), strict=True))
            if stage.output:
                following.append(found.pop(stage.output))
            see(found)
        return following

    def _write(self, file: str) -> None:
        plans = [plan for plan in self._layout.plans if plan.file == file]
        self._writer.write_all(plans, 1, lambda _: None)


def _add(
    stage: StageGraph,
    layout: StageLayout,
    dialect: Dialect,
    exact: Precision,
    tied: bool,
    look: Callable[[ir.Graph], Found],
) -> FloatStage[Found]:
    graph = stage.model.graph
    output = str(graph.outputs[0].name)
    last = stage.kind == "probe"
    if last:  # of the probe the norm alone, not the LM head
        graph.outputs.clear()
    seen = look(graph)
    remove_dead_nodes(graph)
    weights = lower_stage(stage, dialect, exact, tied=tied)
    return FloatStage(
        name=stage.name,
        layer=stage.first_layer,
        file=layout.add(stage.model, weights),
        inputs={str(value.name): _shape(value) for value in graph.inputs},
        output=None if last else output,
        seen=seen,
    )


def _shape(value: ir.Value) -> tuple[int | str, ...]:
    assert value.shape is not None  # the split gives all inputs shapes
    return tuple(size if isinstance(size, int) else str(size) for size in value.shape)


def _feed(stage: FloatStage[Found], state: _Array) -> dict[str, _Array]:
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
