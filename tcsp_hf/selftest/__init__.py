"""The self-test: faults, bad input and long use, at random but reproducible, on tiny models made on the spot."""

from .run import Sizes, run_selftest
from .tally import Tally

__all__ = ["Sizes", "Tally", "run_selftest"]
