"""The tasks of the paper: the nine of GLUE, SQuAD v1.1 and v2, from their columns to their scores."""

from .metrics import GlueMetric
from .score import score
from .squad_metric import SquadMetric
from .table import TASKS, Task, find_task

__all__ = ["TASKS", "GlueMetric", "SquadMetric", "Task", "find_task", "score"]
