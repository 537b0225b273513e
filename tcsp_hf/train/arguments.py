"""The arguments that compression and distillation add to transformers' own."""

from dataclasses import dataclass, field
from typing import Any

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from ..errors import TCSPError
from ..pooling import POOLINGS


def check_teaching(distillation: Any, temperature: Any, hidden_weight: Any, dropout: Any) -> None:
    """Raise TCSPError unless the dense model's part in the loss can be what these fields of the arguments say."""
    if not isinstance(distillation, int | float) or not 0.0 <= distillation <= 1.0:
        raise TCSPError(f"distillation is {distillation!r}; it must be a number from 0 to 1.")
    if not isinstance(temperature, int | float) or not temperature > 0.0:
        raise TCSPError(f"temperature is {temperature!r}; it must be a number above 0.")
    if not isinstance(hidden_weight, int | float) or not hidden_weight >= 0.0:
        raise TCSPError(f"hidden_weight is {hidden_weight!r}; it must be a number and must not be below 0.")
    if not isinstance(dropout, bool | None):
        raise TCSPError(f"dropout is {dropout!r}; it must be true, false or left out.")


@dataclass
class TCSPTrainingArguments(TrainingArguments):
    """`TrainingArguments`, and how small the model becomes and how it learns from the dense one.

    A dense model needs `remove` or `hidden_size`; a compressed one is fine-tuned as it is.

    Raises:
        TCSPError: a value out of range; the message names it.
    """

    remove: float | None = field(
        default=None, metadata={"help": "Fraction of the non-embedding parameters to remove, in (0, 1)."}
    )
    hidden_size: int | None = field(default=None, metadata={"help": "Width of every site, instead of `remove`."})
    axes: list[str] | None = field(
        default=None, metadata={"help": "What `remove` may cut: some of hidden, filters, heads. None: all."}
    )
    calibration_samples: int = field(
        default=2000, metadata={"help": "Training sequences to calibrate on, over all processes."}
    )
    distillation: float = field(
        default=0.9,
        metadata={"help": "Weight of the dense model's part of the loss, in [0, 1]; the labels have the rest."},
    )
    temperature: float = field(default=2.0, metadata={"help": "Divides the logits that are compared."})
    hidden_weight: float = field(
        default=1.0, metadata={"help": "Weight of the hidden states beside the logits; 0 compares logits alone."}
    )
    dropout: bool | None = field(
        default=None,
        metadata={
            "help": "Whether the compressed model drops out while it is trained. None: only where it learns from "
            "labels alone, since the dense model drops nothing."
        },
    )
    pooling: str | None = field(
        default=None,
        metadata={
            "help": "Of an embedding model: mean, cls or pooler. None: what sentence-transformers' files beside it "
            "name, else the mean."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.remove is not None and self.hidden_size is not None:
            raise TCSPError(f"remove is {self.remove} and hidden_size {self.hidden_size}: give one of them.")
        if self.remove is not None and not 0.0 < self.remove < 1.0:
            raise TCSPError(f"remove is {self.remove!r}; it must be a fraction between 0 and 1.")
        if self.hidden_size is not None and self.hidden_size < 1:
            raise TCSPError(f"hidden_size is {self.hidden_size!r}; it must be a positive integer.")
        if self.calibration_samples < 1:
            raise TCSPError(f"calibration_samples is {self.calibration_samples!r}; it must be a positive integer.")
        check_teaching(self.distillation, self.temperature, self.hidden_weight, self.dropout)
        if self.pooling is not None and self.pooling not in POOLINGS:
            raise TCSPError(f"pooling is {self.pooling!r}; allowed: {', '.join(POOLINGS)}.")

    @property
    def budget(self) -> dict[str, object]:
        """What decides the compressed model's sizes; a checkpoint remembers it."""
        return {"remove": self.remove, "hidden_size": self.hidden_size, "axes": self.axes}


@dataclass
class TCSPSeq2SeqTrainingArguments(TCSPTrainingArguments, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with the arguments of `TCSPTrainingArguments`."""
