"""One pass over text: what the hidden states look like, and which directions of them matter."""

from .ranks import calibrate_on_ranks
from .run import calibrate
from .statistics import Calibration, SiteStatistics

__all__ = ["Calibration", "SiteStatistics", "calibrate", "calibrate_on_ranks"]
