"""Publishing a compressed checkpoint: its model card, and the Hub."""

from .callback import ModelCardCallback
from .card import render_card, write_card
from .push import push
from .results import CardResults, Evaluation, Latency

__all__ = ["CardResults", "Evaluation", "Latency", "ModelCardCallback", "push", "render_card", "write_card"]
