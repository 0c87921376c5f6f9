"""What a machine lacks to check a target on its GPU, by what `adainfer doctor` finds."""

from __future__ import annotations

from adainfer_runtime.devices import least_sm
from adainfer_runtime.doctor import Diagnosis

BACKENDS = ("tensorrt", "tensorrt-rtx")
EXPORTS = "export and calibrate"
RUNS_ORT = "run target ort-cuda on the GPU"
RUNS_PLANS = "run TensorRT plans on the GPU"
BUILDS = {
    ("tensorrt", "tensorrt"): "build plans of target tensorrt here",
    ("tensorrt-basic", "tensorrt"): "build plans of target tensorrt-basic here",
    ("tensorrt", "tensorrt-rtx"): "build plans with TensorRT-RTX, without a GPU",
    ("tensorrt-basic", "tensorrt-rtx"): "build plans with TensorRT-RTX, without a GPU",
}


def lacking(
    found: Diagnosis, target: str, precision: str, backend: str = "tensorrt"
) -> tuple[str, ...]:
    """What is missing, a phrase each; empty where everything is there.

    Args:
        backend: what builds plans, one of `BACKENDS`; target `ort-cuda` has none.
    """
    missing = {ability.what: ability.missing for ability in found.abilities}
    wanted = (RUNS_ORT,) if target == "ort-cuda" else (BUILDS[target, backend], RUNS_PLANS)
    reasons = [reason for what in (EXPORTS, *wanted) for reason in missing[what]]
    least = least_sm(precision)
    if found.gpu is not None and found.gpu.sm < least:
        reasons.append(f"a GPU of SM {least} or later for {precision}, found {found.gpu.sm}")
    return tuple(dict.fromkeys(reasons))
