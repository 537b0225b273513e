"""For processes of tests: huggingface_hub's client does not wait between its tries after a broken connection."""

import time
from typing import Any

import huggingface_hub.utils._http as client


class Impatient:
    """The module `time`, without the waiting."""

    def __getattr__(self, name: str) -> Any:
        return (lambda seconds: None) if name == "sleep" else getattr(time, name)


def do_not_wait() -> None:
    """From here on, in this process and in its children."""
    client.time = Impatient()
