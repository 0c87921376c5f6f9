"""Run LLMs with adaptive early exit: loads engine folders that `adainfer-export` writes."""

from .engine import ChoiceResult, Engine, GenerationResult
from .errors import AdaInferError
from .exit_policy import ClassifierExit, ExitPolicy, FixedExit, NoExit
from .manifest import Manifest
from .session import Prediction, Session

__all__ = [
    "AdaInferError",
    "ChoiceResult",
    "ClassifierExit",
    "Engine",
    "ExitPolicy",
    "FixedExit",
    "GenerationResult",
    "Manifest",
    "NoExit",
    "Prediction",
    "Session",
    "__version__",
]

__version__ = "0.1.0"
