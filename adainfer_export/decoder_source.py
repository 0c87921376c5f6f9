"""The decoder of a checkpoint, its weights known to be there: built, or the source's own graph."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .architectures import find_architecture, sliding_windows
from .config_values import require_values
from .decoders.builder import Decoder
from .frontend import build_decoder
from .lower import Precision
from .lower.targets import Dialect
from .padding import pad_inner_widths
from .preflight import require_same_tensors
from .sources import Checkpoint
from .sources.viewed import ViewedCheckpoint
from .storage import keep_blocks, keep_decoder

__all__ = ["PreparedDecoder", "prepare_decoder"]


@dataclass(frozen=True)
class PreparedDecoder:
    """A decoder before it is lowered and split.

    Attributes:
        checkpoint: the weights, under the names that the graph uses.
        dialect: what lowers it.
        windows: of each layer, the tokens that a position attends to; None for all before it.
        precision: knows which matrices are kept as they are stored.
    """

    decoder: Decoder
    checkpoint: Checkpoint
    windows: tuple[int | None, ...]
    dialect: Dialect
    precision: Precision


def prepare_decoder(
    checkpoint: Checkpoint, max_seq_len: int, dialect: Dialect, precision: Precision
) -> PreparedDecoder:
    """Builds the decoder and compares it with the checkpoint; no weight is read.

    Raises:
        UnsupportedError, CheckpointError: the checkpoint is not what its configuration says.
    """
    config, own = checkpoint.config, checkpoint.decoder()
    if own is not None:
        dialect = keep_decoder(checkpoint, precision)
        _crop_tables(own.graph, int(config.max_position_embeddings), max_seq_len)
        whole = (None,) * int(config.num_hidden_layers)  # its windows stay in its graph
        return PreparedDecoder(Decoder(own), checkpoint, whole, dialect, precision)
    require_values(config, checkpoint.eos_token_ids, checkpoint.source_name)
    architecture = find_architecture(config.model_type)
    windows = sliding_windows(architecture, config, max_seq_len)
    decoder = build_decoder(config, architecture, max_seq_len, checkpoint.shape)
    decoder = pad_inner_widths(decoder, precision)
    viewed = ViewedCheckpoint(checkpoint, decoder.views, architecture.aliases, architecture.others)
    require_same_tensors(decoder.model.graph, viewed)
    precision = keep_blocks(precision, decoder.model.graph, viewed)
    return PreparedDecoder(decoder, viewed, windows, dialect, precision)


def _crop_tables(graph: ir.Graph, positions: int, max_seq_len: int) -> None:
    """Rotary tables hold a row per position; rows that the engine cannot reach are cut."""
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is None or len(tensor.shape) != 2 or tensor.shape[0] != positions:
            continue
        table = np.ascontiguousarray(tensor.numpy()[:max_seq_len])
        value.const_value = ir.tensor(table, name=value.name)
        value.shape = ir.Shape(table.shape)
