"""The engine folder's manifest: the only contract between the compiler and the runtimes."""

from .certificates import Certificate, CertificateGroup, CertificateLevel
from .exits import (
    CLASSIFIER_INPUTS,
    ClassifierInput,
    ClassifierSpec,
    CombinedExitSpec,
    ExitPoint,
    ExitSpec,
    LengthShares,
    ShortlistSpec,
)
from .model import KvGeometry, ModelSpec, Quantisation, SourceFile, SourceSpec
from .record import CacheType
from .stages import FileRecord, StageSpec, TensorSpec, TokenizerSpec
from .whole import SCHEMA_VERSION, Manifest

__all__ = [
    "CLASSIFIER_INPUTS",
    "SCHEMA_VERSION",
    "CacheType",
    "Certificate",
    "CertificateGroup",
    "CertificateLevel",
    "ClassifierInput",
    "ClassifierSpec",
    "CombinedExitSpec",
    "ExitPoint",
    "ExitSpec",
    "FileRecord",
    "KvGeometry",
    "LengthShares",
    "Manifest",
    "ModelSpec",
    "Quantisation",
    "ShortlistSpec",
    "SourceFile",
    "SourceSpec",
    "StageSpec",
    "TensorSpec",
    "TokenizerSpec",
]
