"""From statistics to a smaller model: choose subspaces, project the weights, build the model."""

from .compress import compress
from .search import Search
from .sizes import SizeTable, count_parameters, removed_fraction, size_table

__all__ = ["Search", "SizeTable", "compress", "count_parameters", "removed_fraction", "size_table"]
