"""Dense models as they are measured, tokenizers, and PyTorch as we compute with it, for a while."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .errors import TCSPError

_CHUNK = "chunk_size_feed_forward"
_DEVICES = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def own_defaults() -> Iterator[None]:
    """PyTorch's defaults, whatever the caller's are: float32, the CPU, no autocast, and tensors that know gradients."""
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        for kind in _DEVICES:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":  # (to set a device slows every call down)
            stack.enter_context(torch.device("cpu"))
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def check_gradients(model: nn.Module) -> None:
    """That a model's outputs can have gradients.

    Raises:
        TCSPError: it was made in inference mode.
    """
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise TCSPError(
            f"The parameters of this {type(model).__name__} are inference tensors, which know no gradients: load or "
            "copy the model outside of torch.inference_mode()."
        )


def check_device(model: nn.Module) -> None:
    """That sums can be kept in float64 where a model is.

    Raises:
        TCSPError: it is on an Apple GPU.
    """
    if any(parameter.device.type == "mps" for parameter in model.parameters()):
        raise TCSPError(
            "The model is on mps, which has no float64, but calibrating and compressing add up in it: do both on the "
            'CPU with model.to("cpu") (use_cpu=True in the arguments of a trainer); the result may go to mps.'
        )


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models into evaluation mode, feed-forward networks in one piece, outputs by name; all as before afterwards.

    In chunks (`chunk_size_feed_forward`) they compute the same, but who looks at a module would see each chunk. A
    T5 encoder does not hand `return_dict=True` on to its stack (transformers 5.17): that goes by the configuration.
    """
    modules = [module for model in models for module in model.modules()]
    training = [module for module in modules if module.training]
    chunked = [(module, getattr(module, _CHUNK)) for module in modules if hasattr(module, _CHUNK)]
    configs = {id(module.config): module.config for module in modules if isinstance(module, PreTrainedModel)}
    by_name = [(config, config.return_dict) for config in configs.values()]
    for model in models:
        model.eval()
    for module, _ in chunked:
        setattr(module, _CHUNK, 0)
    for config, _ in by_name:
        config.return_dict = True
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for module, size in chunked:
            setattr(module, _CHUNK, size)
        for config, value in by_name:
            config.return_dict = value


@contextmanager
def kept_settings(tokenizer: Any) -> Iterator[None]:
    """Afterwards a tokenizer cuts and pads as before.

    A fast one remembers how it was told to last, and `save_pretrained` writes that into tokenizer.json, for everyone
    who reads that without transformers.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        yield
        return
    truncation, padding = backend.truncation, backend.padding
    try:
        yield
    finally:
        if truncation is None:
            backend.no_truncation()
        else:
            backend.enable_truncation(**truncation)
        if padding is None:
            backend.no_padding()
        else:
            backend.enable_padding(**padding)
