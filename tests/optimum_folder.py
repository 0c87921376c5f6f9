"""A tiny folder as optimum writes it: torch's own exporter, config.json and tokenizer beside it."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch


def write_optimum_folder(
    folder: Path, checkpoint: Path, model: Any, file: str = "model.onnx"
) -> None:
    """Writes `model`, which `checkpoint` holds, as ONNX (without a cache: weights are the same)."""
    path = folder / file
    path.parent.mkdir(parents=True)
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's, of every Python branch
        torch.onnx.export(
            model,
            (),
            path,
            kwargs={
                "input_ids": tokens,
                "attention_mask": torch.ones_like(tokens),
                "use_cache": False,
            },
            dynamo=False,
            opset_version=18,
        )
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, folder / name)
