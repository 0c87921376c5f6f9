"""What the manifest's records have in common: strict fields, and bounds of numbers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["CacheType", "Count", "ElementType", "Layers", "Length", "Record", "Share", "Width"]

ElementType = Literal["float32", "float16", "bfloat16"]
CacheType = ElementType | Literal["int8"]
# Bounds that no model comes near: beyond them buffers cannot even be asked for.
Layers = Annotated[int, Field(gt=0, le=1 << 16)]
Width = Annotated[int, Field(gt=0, le=1 << 24)]
Length = Annotated[int, Field(gt=0, le=1 << 24)]
Count = Annotated[int, Field(ge=0, le=1 << 62)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Record(BaseModel):
    """Immutable, and without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")
