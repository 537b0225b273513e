"""Compresses the body of a model whose head is new: such a head's outputs say nothing about what may be lost."""

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from ..architectures import family_of
from ..calibration import Calibration
from ..offload import device_of
from . import bert, t5
from .compress import compress
from .sizes import count_parameters, removed_fraction
from .weights import DenseWeights

_LAST = ("classifier", "qa_outputs", "classification_head.out_proj")


def new_head(model: PreTrainedModel) -> str | None:
    """Name of the linear that the model answers with, where it looks as if never trained; None for any other model.

    transformers starts such a linear with a bias of zeros. Training moves it, unless the loss is of differences of one
    output alone (a reranker by margins), which no bias changes: such a model has to be called trained by who knows.
    """
    for name, module in model.named_modules():
        if name in _LAST and isinstance(module, torch.nn.Linear):
            return name if module.bias is not None and not bool(module.bias.any()) else None
    return None


def has_body(model: PreTrainedModel) -> bool:
    """Whether what lies below the head is a model of its own that reads the same rows.

    A T5 for question answering has its stacks itself, and a multiple-choice model's rows are several of its body's.
    """
    return model.base_model is not model and family_of(model)[1] != "ForMultipleChoice"


def compress_body(model: PreTrainedModel, stats: Calibration, **options: Any) -> PreTrainedModel:
    """`compress` for `model.base_model`, under the head as it is: what reads hidden states reads the narrow ones.

    Args:
        model: dense, with a head over a body (see `has_body`); it is left untouched.
        stats: of `model.base_model`.
        options: of `compress`.

    Returns:
        A new model of the TCSP class that matches `model`, in evaluation mode.

    Raises:
        TCSPError: see `compress`.
    """
    family, head = family_of(model)
    below: Any = model.base_model
    if options.get("remove") is not None:  # asked of the whole model, whatever goes of the head
        options["remove"] *= count_parameters(model).non_embedding / count_parameters(below).non_embedding
    body: Any = compress(below, stats, **options)
    with no_init_weights():
        small: Any = (bert if family == "bert" else t5).model_class(head)(body.config)
    small.to(dtype=model.dtype)  # the head; the body has its own dtypes already
    setattr(small, small.base_model_prefix, body)
    last = body if family == "bert" else body.decoder if hasattr(body, "decoder") else body.encoder
    weight, offset = (part.detach().cpu().double() for part in (last.lift_map.weight, last.lift_map.bias))
    source = DenseWeights(model)
    if family == "bert":
        tensors = bert.project_heads(model, source, {}, (weight, offset))
    else:
        tensors = t5.project_heads(model, source, weight)
    own = small.state_dict()
    for name in [name for name in tensors if not name.startswith(f"{small.base_model_prefix}.")]:
        own[name].copy_(tensors[name])
    small.to(device_of(model))
    whole = count_parameters(model)
    small.config.projection |= {
        "source_parameters": whole.total,
        "source_non_embedding_parameters": whole.non_embedding,
        "removed": round(removed_fraction(model, small), 6),
    }
    small.doubt = body.doubt
    return small.eval()
