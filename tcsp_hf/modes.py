"""Dense models as they are measured, for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_CHUNK = "chunk_size_feed_forward"


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models into evaluation mode, feed-forward networks in one piece; both are as before afterwards.

    In chunks (`chunk_size_feed_forward`) they compute the same, but who looks at a module would see each chunk.
    """
    modules = [module for model in models for module in model.modules()]
    training = [module for module in modules if module.training]
    chunked = [(module, getattr(module, _CHUNK)) for module in modules if hasattr(module, _CHUNK)]
    for model in models:
        model.eval()
    for module, _ in chunked:
        setattr(module, _CHUNK, 0)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for module, size in chunked:
            setattr(module, _CHUNK, size)
