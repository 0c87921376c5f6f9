"""Builds TensorRT-RTX plans of real shapes without a GPU: SmolLM2, and one Llama-2-7B layer.

    python tools/build_rtx.py --work /tmp/rtx [--models smollm2,llama2] [--precisions fp16,int4,fp8]

Needs `pip install 'adainfer-export[tensorrt-rtx]'`. Prints a table, and JSON with --json.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from adainfer_export import ExportRequest, export
from adainfer_export.build import BuildRequest, build_plans
from adainfer_export.progress import SilentReporter
from adainfer_runtime.devices import least_sm

# The shape of meta-llama/Llama-2-7b, with one of its 32 layers.
LLAMA2_7B_LAYER = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def random_llama_layer(folder: Path) -> str:
    """A checkpoint of that shape with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **LLAMA2_7B_LAYER)
    AutoModelForCausalLM.from_config(config).half().save_pretrained(folder)
    return str(folder)


def build_one(model: str, work: Path, target: str, precision: str, sm: tuple[int, ...]) -> dict:
    """Exports, builds every stage, and says what came out."""
    folder = work / f"{Path(model).name}-{target}-{precision}"
    export(ExportRequest(model, folder, target=target, precision=precision, force=True))
    from adainfer_runtime.engine_folder import load_manifest

    manifest = load_manifest(folder)
    report = build_plans(folder, manifest, BuildRequest("tensorrt-rtx", sm=sm), SilentReporter())
    plans = report.stamp.plans
    layers = [plan for file, plan in plans.items() if "layer" in file]
    row = {
        "model": Path(model).name,
        "target": target,
        "precision": precision,
        "stamp": report.stamp.name,
        "plans": len(plans),
        "plan_mb": round(sum(p.bytes for p in plans.values()) / 1e6, 1),
        "layer_mb": round(sum(p.bytes for p in layers) / len(layers) / 1e6, 1),
        "seconds": round(sum(p.seconds for p in plans.values()), 1),
        "layer_seconds": round(sum(p.seconds for p in layers) / len(layers), 2),
        "peak_mb": round(max(p.peak_memory_bytes for p in plans.values()) / 1e6),
        "fused_attention_per_layer": sum(p.fused_attention for p in layers) / len(layers),
        "float8_products_per_layer": sum(p.float8_products for p in layers) / len(layers),
    }
    shutil.rmtree(folder)
    return row


def main() -> None:
    """Builds the wanted combinations, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for engines and plans")
    parser.add_argument("--models", default="smollm2,llama2")
    parser.add_argument("--targets", default="tensorrt")
    parser.add_argument("--precisions", default="fp16,int4,fp8")
    parser.add_argument("--sm", default="86,89,120")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    sm = tuple(int(number) for number in options.sm.split(","))
    models = {
        "smollm2": lambda: "smollm2-135m",
        "llama2": lambda: random_llama_layer(options.work / "llama2-7b-layer"),
    }
    rows = []
    for name in options.models.split(","):
        model = models[name]()
        for target in options.targets.split(","):
            for precision in options.precisions.split(","):
                able = tuple(number for number in sm if number >= least_sm(precision))
                rows.append(build_one(model, options.work, target, precision, able))
                print(json.dumps(rows[-1]) if options.json else rows[-1], flush=True)


if __name__ == "__main__":
    main()
