"""The one exception class of the package."""


class TCSPError(ValueError):
    """Bad input or an impossible request. The message names the value and the remedy."""
