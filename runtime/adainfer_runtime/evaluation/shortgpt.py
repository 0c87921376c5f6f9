"""ShortGPT: whole layers left out for good, those that change the hidden state least.

(arXiv 2403.03853.) A baseline that every saving is to be compared with: here it is a chain that
skips stages of the cut.
"""

from __future__ import annotations

from ..errors import RequestError
from ..manifest import Manifest

__all__ = ["drop_layers"]


def drop_layers(manifest: Manifest, count: int) -> Manifest:
    """The manifest without the `count` layers of least block influence, and without exits.

    Raises:
        RequestError: the calibration measured no influence, stages hold several layers, or there
            are not as many layers.
    """
    figures = manifest.exit.calibration.get("block_influence") if manifest.exit else None
    if not figures:
        raise RequestError("shortgpt needs block influences: run `adainfer calibrate DIR` first")
    if any(stage.first_layer != stage.last_layer for stage in manifest.cut):
        raise RequestError("shortgpt needs engines of one layer: leave out --layers-per-engine")
    layers = manifest.model.num_layers
    if not 0 < count < layers:
        raise RequestError(f"shortgpt can drop 1 to {layers - 1} layers, not {count}")
    influence = {int(layer): float(value) for layer, value in figures.items()}
    dropped = set(sorted(influence, key=influence.__getitem__)[:count])
    kept = tuple(stage for stage in manifest.stages if stage.first_layer not in dropped)
    return manifest.uncalibrated().model_copy(update={"stages": kept})
