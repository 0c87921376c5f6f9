"""Run LLMs with adaptive early exit: loads engine folders that `adainfer-export` writes."""

from .batch import BatchScheduler, ContinuousBatching, TakeTurns
from .confidence import ConfidenceDecay
from .conversation import Conversation
from .decode_costs import DecodeCosts
from .decode_options import DecodeOptions
from .draft_schedule import Adaptive, Fixed
from .engine import Engine
from .errors import AdaInferError
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
    "ChoiceResult",
    "ClassifierExit",
    "ConfidenceDecay",
    "ContinuousBatching",
    "Conversation",
    "DecodeCosts",
    "DecodeOptions",
    "Engine",
    "EngineStatistics",
    "ExitPolicy",
    "Fixed",
    "FixedExit",
    "GenerationOptions",
    "GenerationResult",
    "Manifest",
    "NoExit",
    "Prediction",
    "RequestStatistics",
    "SamplingOptions",
    "Session",
    "StreamEvent",
    "TakeTurns",
    "TokenLogprob",
    "__version__",
]

__version__ = "0.1.0"
