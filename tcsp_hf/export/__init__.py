"""Other forms of a compressed model: a stock T5 or BERT, ONNX graphs, a sentence-transformers folder."""

from .plain_bert import to_plain_bert
from .plain_t5 import to_plain_t5

__all__ = ["to_plain_bert", "to_plain_t5"]
