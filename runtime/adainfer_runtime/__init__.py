"""Run LLMs with adaptive early exit: loads engine folders that `adainfer-export` writes."""

from .batch import BatchScheduler, TakeTurns
from .confidence import ConfidenceDecay
from .decode_options import DecodeOptions
from .draft_schedule import Adaptive, DecodeCosts, Fixed
from .engine import ChoiceResult, Engine, GenerationResult
from .errors import AdaInferError
from .exit_policy import ClassifierExit, ExitPolicy, FixedExit, NoExit
from .manifest import Manifest
from .session import Prediction, Session

__all__ = [
    "AdaInferError",
    "Adaptive",
    "BatchScheduler",
    "ChoiceResult",
    "ClassifierExit",
    "ConfidenceDecay",
    "DecodeCosts",
    "DecodeOptions",
    "Engine",
    "ExitPolicy",
    "Fixed",
    "FixedExit",
    "GenerationResult",
    "Manifest",
    "NoExit",
    "Prediction",
    "Session",
    "TakeTurns",
    "__version__",
]

__version__ = "0.1.0"
