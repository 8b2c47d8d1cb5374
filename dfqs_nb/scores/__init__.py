"""Score a model's reasoning and code on frozen questions, and its speed against what memory allows."""

from dfqs_nb.core import lazy
from dfqs_nb.scores import speed
from dfqs_nb.scores.grading import SetRun, compare_runs
from dfqs_nb.scores.item_sets import ItemSet
from dfqs_nb.scores.run import Answerer, Options, plan_questions, score_set
from dfqs_nb.scores.sandbox import find_sandbox

__all__ = ["Answerer", "ItemSet", "Options", "SetRun", "compare_runs", "figures", "find_sandbox"]
__all__ += ["plan_questions", "score_set", "speed"]

__getattr__ = lazy(__name__, figures="figures")
