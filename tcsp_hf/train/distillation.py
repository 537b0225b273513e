"""What a compressed model learns from its dense one: the outputs at a temperature (Hinton et al. 2015, arXiv
1503.02531), and the hidden states in the compressed model's own coordinates (`sites`). No labels are needed."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..architectures import writing_options
from .sites import Batch, SiteTargets, States, record_compressed, record_dense, token_masks

_LOGITS = ("logits", "start_logits", "end_logits", "prediction_logits", "seq_relationship_logits")
_FAR_BELOW = -1e4  # stands for minus infinity where 0 * infinity must not arise


def divergence(teacher: torch.Tensor, student: torch.Tensor, temperature: float) -> torch.Tensor:
    """`T² KL(teacher || student)` at temperature T of logits (..., classes): (...)."""
    target = (teacher.float() / temperature).log_softmax(-1)
    ours = (student.float() / temperature).log_softmax(-1)
    return (target.exp() * (target - ours)).sum(-1) * temperature**2


class Silenced:
    """Dropout of a model's own layers set to zero until `restore`; an adapter's inside it stays."""

    def __init__(self, model: nn.Module) -> None:
        self._before: list[tuple[nn.Module, str, float]] = []
        for name, module in model.named_modules():
            own = "p" if isinstance(module, nn.Dropout) and name.endswith("dropout") else "dropout"
            value = vars(module).get(own)  # T5's attentions keep the probability itself
            if isinstance(value, float):
                self._before.append((module, own, value))
                setattr(module, own, 0.0)

    def restore(self) -> None:
        for module, name, value in self._before:
            setattr(module, name, value)


@dataclass
class Distiller:
    """Compares a compressed model with its dense one on a batch.

    Attributes:
        teacher: the dense model; only ever run in evaluation mode without gradients.
        targets: of the hidden states; None compares outputs alone.
        temperature: of the logits.
        hidden_weight: of the hidden states beside the outputs.
        pooling: of an embedding model: `"mean"`, `"cls"` or `"pooler"`.
        label_names: inputs that the teacher does not see.
        autocast: the context that the teacher runs in; accelerate wraps only the model that is trained.
    """

    teacher: Any
    targets: SiteTargets | None
    temperature: float
    hidden_weight: float
    pooling: str
    label_names: tuple[str, ...]
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext

    @property
    def writes(self) -> bool:
        """Whether the model writes text, so that its decoder needs targets."""
        return type(self.teacher).__name__.endswith("ForConditionalGeneration")

    def without_labels(self, inputs: Batch) -> Batch:
        """What a model sees when its loss on the labels is not wanted; a decoder's inputs come from its labels."""
        if self.writes:
            return inputs
        return {name: value for name, value in inputs.items() if name not in self.label_names}

    @torch.no_grad()
    def complete(self, inputs: Batch, max_target_length: int = 32) -> Batch:
        """Adds what the teacher writes greedily as labels, where a model that writes has none (Kim and Rush 2016)."""
        if not self.writes or inputs.get("labels") is not None or inputs.get("decoder_input_ids") is not None:
            return inputs
        self.teacher.eval()
        ends = self.teacher.generation_config.eos_token_id
        tokens = self.teacher.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs.get("attention_mask"),
            max_new_tokens=max_target_length,
            do_sample=False,
            num_beams=1,
            **writing_options(self.teacher),
        )[:, 1:]
        ended = torch.isin(tokens, tokens.new_tensor([] if ends is None else ends)).long()
        after_end = (ended.cumsum(1) - ended) > 0
        return {**inputs, "labels": tokens.masked_fill(after_end, -100)}

    @contextmanager
    def recording(self, small: Any) -> Iterator[States]:
        """Run the compressed model inside; yields its hidden states, none where they are not compared."""
        if self.targets is None or not self.hidden_weight:
            yield {}
            return
        with record_compressed(small, self.targets.encoders) as states:
            yield states

    def loss(self, small: Any, inputs: Batch, outputs: Any, carried: States) -> torch.Tensor:
        """Of the compressed model's outputs and recorded states against the teacher's on the same inputs."""
        self.teacher.eval()
        with torch.no_grad(), self.autocast():
            if self.targets is not None and carried:
                with record_dense(self.teacher, self.targets.encoders) as states:
                    expected = self.teacher(**self.without_labels(inputs))
            else:
                states, expected = {}, self.teacher(**self.without_labels(inputs))
        masks = token_masks(inputs)
        total = self.output_loss(small, inputs, expected, outputs, masks)
        if states and self.targets is not None:
            shared = {name: state for name, state in states.items() if name in carried}
            total = total + self.hidden_weight * self.targets.loss(shared, carried, masks)
        return total

    def output_loss(
        self, small: Any, inputs: Batch, expected: Any, outputs: Any, masks: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Of logits, averaged over the model's heads; of an embedding where there are none."""
        losses = []
        for name in _LOGITS:
            teacher, student = expected.get(name), outputs.get(name)
            if teacher is not None and student is not None:
                losses.append(self._logit_loss(name, teacher, student, inputs, masks))
        if losses:
            return torch.stack(losses).mean()
        mask = masks.get("decoder", masks["encoder"])
        target = self._pooled(expected, mask, None)
        ours = self._pooled(outputs, mask, small)
        cosine = nn.functional.cosine_similarity(ours, target, dim=-1)
        error = (ours - target).square().sum(-1) / target.square().sum(-1)
        return (1.0 - cosine + error).mean()

    def _logit_loss(
        self, name: str, teacher: torch.Tensor, student: torch.Tensor, inputs: Batch, masks: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        config = self.teacher.config
        if name in ("start_logits", "end_logits"):
            outside = ~masks["encoder"]
            teacher, student = teacher.masked_fill(outside, _FAR_BELOW), student.masked_fill(outside, _FAR_BELOW)
            return divergence(teacher, student, self.temperature).mean()
        if teacher.dim() == 3:
            labels = inputs.get("labels")
            mask = masks["decoder"] if self.writes else masks["encoder"]
            if not self.writes and labels is not None and labels.shape == mask.shape:
                mask = labels != -100
            if not bool(mask.any()):
                return student.sum() * 0.0
            return divergence(teacher[mask], student[mask], self.temperature).mean()
        problem = getattr(config, "problem_type", None)
        if teacher.shape[-1] == 1 or problem == "regression":
            return nn.functional.mse_loss(student.float(), teacher.float())
        if problem == "multi_label_classification":
            return nn.functional.binary_cross_entropy_with_logits(student.float(), teacher.float().sigmoid())
        return divergence(teacher, student, self.temperature).mean()

    def _pooled(self, outputs: Any, mask: torch.Tensor, small: Any) -> torch.Tensor:
        """(batch, D) in the dense space; the lift is affine, so it may follow the mean."""
        if self.pooling == "pooler":
            return outputs["pooler_output"].float()
        hidden = outputs["last_hidden_state"].float()
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            weights = mask.to(hidden).unsqueeze(-1)
            pooled = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
        return pooled if small is None else small.lift(pooled)
