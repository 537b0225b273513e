"""The one exception class of the package."""


class TCSPError(ValueError):
    """Bad input or an impossible request. The message names the value and the remedy."""


_NO_ROOM = ("allocate memory", "out of memory", "create a primitive", "start new thread", "inline_container")
"""In PyTorch's RuntimeErrors: no memory (oneDNN's word is the third), no thread; the last is its file writer's word for
a full disk."""


def ends_a_command(error: BaseException) -> bool:
    """Whether an error says what is wrong without a traceback: one of ours, or the system's word on disk or memory."""
    if isinstance(error, (TCSPError, OSError, MemoryError)) or type(error).__name__ == "SafetensorError":
        return True
    if is_of_the_connection(error):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _NO_ROOM)


def is_of_the_connection(error: BaseException) -> bool:
    """Whether it is one of the HTTP client's errors, which have no base in common with OSError."""
    return type(error).__module__.startswith("http")


def message_of(error: BaseException) -> str:
    """What a command says of an error that ends it."""
    if isinstance(error, RuntimeError) and "create a primitive" in str(error):
        return f"{error}: there is most likely not enough memory"
    return str(error) or type(error).__name__
