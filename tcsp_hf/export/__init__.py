"""Other forms of a compressed model: a stock T5, ONNX graphs, a sentence-transformers folder."""

from .plain_t5 import to_plain_t5

__all__ = ["to_plain_t5"]
