"""Run LLMs with adaptive early exit: loads engine folders that `adainfer-export` writes."""

from .batch import BatchScheduler, ContinuousBatching, TakeTurns
from .confidence import ConfidenceDecay
from .conversation import Conversation
from .decode_costs import DecodeCosts, FillCosts
from .decode_options import DecodeOptions
from .draft_schedule import Adaptive, Fixed
from .engine import Engine
from .errors import (
    AdaInferError,
    ChatTemplateError,
    DatasetUnavailableError,
    DeadlineError,
    DeviceError,
    DeviceMemoryError,
    ExitUnavailableError,
    IntegrityError,
    ManifestError,
    OutputError,
    PlanError,
    PromptTooLongError,
    RequestCancelledError,
    RequestError,
    SchemaVersionError,
    StageError,
    TaskFileError,
    TokenizerMissingError,
    UnsafePathError,
)
from .exit_policy import ClassifierExit, ExitPolicy, FixedExit, NoExit
from .generation_options import CancelToken, GenerationOptions
from .manifest import Manifest
from .results import (
    ChoiceResult,
    GenerationResult,
    RequestStatistics,
    StreamEvent,
    TokenLogprob,
)
from .sampling_options import SamplingOptions
from .session import Prediction, Session
from .statistics import EngineStatistics

__all__ = [
    "AdaInferError",
    "Adaptive",
    "BatchScheduler",
    "CancelToken",
    "ChatTemplateError",
    "ChoiceResult",
    "ClassifierExit",
    "ConfidenceDecay",
    "ContinuousBatching",
    "Conversation",
    "DatasetUnavailableError",
    "DeadlineError",
    "DecodeCosts",
    "DecodeOptions",
    "DeviceError",
    "DeviceMemoryError",
    "Engine",
    "EngineStatistics",
    "ExitPolicy",
    "ExitUnavailableError",
    "FillCosts",
    "Fixed",
    "FixedExit",
    "GenerationOptions",
    "GenerationResult",
    "IntegrityError",
    "Manifest",
    "ManifestError",
    "NoExit",
    "OutputError",
    "PlanError",
    "Prediction",
    "PromptTooLongError",
    "RequestCancelledError",
    "RequestError",
    "RequestStatistics",
    "SamplingOptions",
    "SchemaVersionError",
    "Session",
    "StageError",
    "StreamEvent",
    "TakeTurns",
    "TaskFileError",
    "TokenLogprob",
    "TokenizerMissingError",
    "UnsafePathError",
    "__version__",
]

__version__ = "0.1.0"
