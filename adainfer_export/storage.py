"""What the user and the checkpoint add to a precision, checked before anything is written."""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir

from adainfer_models import QuantisationSettings

from .errors import UnsupportedError
from .lower import Precision, Target, find_target
from .lower.int8_products import INT8_WIDE_ROWS
from .lower.precision import STORED_WIDE_ROWS, KvCache, Prefill, Rounding
from .lower.targets import AS_IS, Dialect
from .preflight import weight_shapes
from .quantise import Blocks
from .sources import Checkpoint

__all__ = [
    "NO_LAYERS",
    "StorageRequest",
    "choose_storage",
    "keep_blocks",
    "keep_decoder",
    "parse_int8_layers",
    "parse_range",
]


NO_LAYERS = "none"  # of --int8-layers: not even those of the alias


@dataclass(frozen=True)
class StorageRequest:
    """How quantisation departs from what the precision alone says.

    Attributes:
        block_size: values that share a scale; None leaves the precision's own, 32.
        down_block_size: those in the products that end feed-forward networks; None: as many.
        int8_layers: sensitive layers (1-based) that are stored in 8 bits.
        int8_head: the LM head too, and with it a tied embedding.
        rounding: of 4-bit weights: each to its nearest code, or so that errors make up for each
            other in what the layers give (see `gptq`).
        prefill: what reads prompts (see `Precision.prefill`).
        kv_cache: what K and V are kept in (see `Precision.kv_cache`).
    """

    block_size: int | None = None
    int8_layers: frozenset[int] = frozenset()
    int8_head: bool = False
    rounding: Rounding = "nearest"
    prefill: Prefill = "stored"
    down_block_size: int | None = None
    kv_cache: KvCache = "auto"

    def refine(self, precision: Precision, target: Target) -> Precision:
        """The precision with these departures.

        Raises:
            UnsupportedError: they mean nothing in this precision, or the target takes no such size
                or no 8-bit layers.
        """
        if self.rounding != "nearest" and precision.bits != 4:
            raise UnsupportedError(f"--rounding {self.rounding} is for int4, not {precision.name}")
        if self.prefill == "int8" and precision.bits is None:
            raise UnsupportedError(f"--prefill int8 is for int4 and int8, not {precision.name}")
        if self.prefill == "int8" and not target.int8_prefill:
            raise UnsupportedError(f"target {target.name} does not take --prefill int8")
        if self.kv_cache == "int8" and not target.int8_caches:
            raise UnsupportedError(f"target {target.name} does not take --kv-cache-dtype int8")
        if self.kv_cache == "int8" and precision.bits is None:
            raise UnsupportedError(
                f"--kv-cache-dtype int8 is for int4 and int8, not {precision.name}"
            )
        sizes = {self.block_size, self.down_block_size} - {None}
        if (sizes or self.int8_layers or self.int8_head) and precision.bits is None:
            raise UnsupportedError(
                f"--block-size, --down-block-size and --int8-layers are for int4 and int8, not "
                f"{precision.name}"
            )
        _require_size("--block-size", self.block_size, target.block_sizes, target)
        _require_size("--down-block-size", self.down_block_size, target.down_block_sizes, target)
        if (self.int8_layers or self.int8_head) and not target.int8_layers:
            raise UnsupportedError(f"target {target.name} does not take --int8-layers")
        return replace(
            precision,
            block_size=self.block_size or precision.block_size,
            down_block_size=self.down_block_size,
            int8_layers=self.int8_layers,
            int8_head=self.int8_head,
            rounding=self.rounding,
            prefill=self.prefill,
            kv_cache=self.kv_cache,
            wide_rows=self._wide_rows(precision),
        )

    def _wide_rows(self, precision: Precision) -> int | None:
        if self.prefill == "int8":
            return INT8_WIDE_ROWS
        return STORED_WIDE_ROWS if self.kv_cache == "int8" else precision.wide_rows

    def check(self, num_layers: int) -> None:
        """Refuses layers that the model does not have."""
        if self.int8_layers and max(self.int8_layers) > num_layers:
            raise UnsupportedError(
                f"--int8-layers names layer {max(self.int8_layers)}: this model has {num_layers}"
            )


def _require_size(option: str, size: int | None, allowed: tuple[int, ...], target: Target) -> None:
    if size is None or size in allowed:
        return
    if not allowed:
        raise UnsupportedError(f"target {target.name} does not take {option}")
    sizes = ", ".join(map(str, sorted(allowed)))
    raise UnsupportedError(f"{option} {size}: it must be one of {sizes} for target {target.name}")


def choose_storage(
    asked: StorageRequest,
    int8_layers: str | None,
    known: QuantisationSettings | None,
    target: str,
    precision: str,
) -> StorageRequest:
    """What the user asked for; sensitive layers that he left open are those known of the alias,
    in int4, where the target takes any.

    Args:
        asked: all but the sensitive layers, which `int8_layers` names.

    Raises:
        UnsupportedError: unknown target, or no such layers (see `parse_int8_layers`).
    """
    if int8_layers is not None:
        layers, head = parse_int8_layers(int8_layers)
        return replace(asked, int8_layers=layers, int8_head=head)
    if known is None or precision != "int4" or not find_target(target, precision)[0].int8_layers:
        return asked
    return replace(asked, int8_layers=frozenset(known.int8_layers), int8_head=known.int8_head)


def parse_int8_layers(text: str) -> tuple[frozenset[int], bool]:
    """`1-2,29-30,head` as layers, and whether the head is among them; `none` names none.

    Raises:
        UnsupportedError: not of this form.
    """
    if text.strip() == NO_LAYERS:
        return frozenset(), False
    parts = [part.strip() for part in text.split(",")]
    ranges = [parse_range(part, "--int8-layers") for part in parts if part != "head"]
    layers = frozenset(layer for first, last in ranges for layer in range(first, last + 1))
    return layers, "head" in parts


def parse_range(text: str, option: str) -> tuple[int, int]:
    """`12-15` or `12` as (first, last), 1-based and inclusive."""
    first, dash, last = text.strip().partition("-")
    last = last if dash else first
    if not first.isdigit() or not last.isdigit():
        raise UnsupportedError(f"{option} {text!r}: expected layers such as 3 or 12-15")
    found = int(first), int(last)
    if not 1 <= found[0] <= found[1]:
        raise UnsupportedError(f"{option} {text!r}: layers count from 1, the first one first")
    return found


def keep_blocks(precision: Precision, graph: ir.Graph, checkpoint: Checkpoint) -> Precision:
    """Of precision `keep`: knowing which matrices are kept as the checkpoint stores them.

    Raises:
        UnsupportedError: the checkpoint has none.
    """
    if precision.name != "keep":
        return precision
    kept: dict[str, Blocks] = {}
    for name in weight_shapes(graph):
        blocks = checkpoint.blocks(name)
        if blocks is not None:
            kept[name] = blocks
    if not kept:
        raise UnsupportedError(
            f"{checkpoint.source_name}: --precision keep is for quantised checkpoints (GGUF, GPTQ, "
            "AWQ), and this one holds floats; export with fp32, int8 or int4"
        )
    return replace(precision, kept=kept)


def keep_decoder(checkpoint: Checkpoint, precision: Precision) -> Dialect:
    """The dialect of a source that is ONNX already.

    Raises:
        UnsupportedError: another precision than its own is asked for.
    """
    if precision.name != "keep":
        raise UnsupportedError(
            f"{checkpoint.source_name} is an ONNX model, which is split as it is: export with "
            f"--precision keep, or from the checkpoint with {precision.name}"
        )
    return AS_IS
