"""Trains any student, of a stock class too, on a dense model's outputs and the labels."""

from typing import Any

import torch
from transformers import PreTrainedModel, Trainer

from .distillation import Distiller, Silenced


class StudentTrainer(Trainer):
    """A Trainer whose loss is by `distillation` the teacher's outputs at temperature 2, for the rest the labels.

    The student drops nothing out, as the teacher does not.
    """

    def __init__(self, teacher: PreTrainedModel, distillation: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.distillation = distillation
        placed: Any = teacher.to(self.args.device)  # type: ignore[arg-type]
        self.distiller = Distiller(placed.eval(), None, 2.0, 0.0, "mean", ("labels",), self.accelerator.autocast)
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        taught = self.distiller.loss(model, inputs, outputs, {})
        loss: torch.Tensor = self.distillation * taught + (1.0 - self.distillation) * outputs.loss
        return (loss, outputs) if return_outputs else loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        assert self.model is not None
        silenced = Silenced(self.model)
        try:
            return super().train(*args, **kwargs)
        finally:
            silenced.restore()
