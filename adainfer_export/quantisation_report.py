"""What quantisation changed, per matrix and layer: `reports/quantisation.json`."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from adainfer_runtime.engine_folder import QUANTISATION_REPORT, record_file
from adainfer_runtime.manifest import FileRecord

from .lower.precision import layer_of_tensor
from .weights import Blocked, Columns, ErrorSum

__all__ = ["StoredMatrix", "write_quantisation_report"]


@dataclass(frozen=True)
class StoredMatrix:
    """One matrix in blocks, which may hold several of the checkpoint's.

    Attributes:
        kept: the checkpoint's own blocks: nothing was lost.
        error: sum of (stored - true)² over its values.
        values: sum of true².
    """

    tensors: tuple[str, ...]
    bits: int
    block_size: int
    kept: bool
    error: float
    values: float

    @classmethod
    def of(cls, expr: Blocked | Columns, errors: ErrorSum) -> StoredMatrix:
        """From what was written."""
        blocks = expr.blocks
        return cls(
            expr.parts, blocks.bits, blocks.block_size, blocks.kept, errors.error, errors.values
        )

    @property
    def layer(self) -> int | None:
        """1-based; None outside layers."""
        return layer_of_tensor(self.tensors[0])


def write_quantisation_report(
    folder: Path, matrices: Iterable[StoredMatrix]
) -> dict[str, FileRecord]:
    """Writes the report where anything is in blocks; its record by relative path.

    `relative_error` is the root of the summed squared error over the summed squares.
    """
    found = list(matrices)
    if not found:
        return {}
    by_place: dict[str, list[StoredMatrix]] = defaultdict(list)
    for matrix in found:
        place = matrix.tensors[0] if matrix.layer is None else f"layer {matrix.layer}"
        by_place[place].append(matrix)
    report = {
        "summary": [
            {
                "place": place,
                "bits": sorted({matrix.bits for matrix in group}),
                "kept": all(matrix.kept for matrix in group),
                "relative_error": _relative(group),
            }
            for place, group in by_place.items()
        ],
        "matrices": [_shown(matrix) for matrix in found],
    }
    path = folder / QUANTISATION_REPORT
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return {QUANTISATION_REPORT: record_file(path)}


def _shown(matrix: StoredMatrix) -> dict[str, object]:
    fields = asdict(matrix)
    del fields["error"], fields["values"]
    return {**fields, "layer": matrix.layer, "relative_error": _relative([matrix])}


def _relative(matrices: list[StoredMatrix]) -> float:
    total = ErrorSum(sum(m.error for m in matrices), sum(m.values for m in matrices))
    return float(f"{total.relative:.4g}")
