"""The paper's evaluation: methods side by side on task files, counted and timed."""

from .answer_log import AnswerLog
from .methods import Method, make_methods
from .results import Evaluation, MethodResult, TaskResult
from .runner import evaluate
from .summary import SummaryRow, summary_rows

__all__ = [
    "AnswerLog",
    "Evaluation",
    "Method",
    "MethodResult",
    "SummaryRow",
    "TaskResult",
    "evaluate",
    "make_methods",
    "summary_rows",
]
