"""Access tokens stay out of everything that is written, printed or uploaded."""

import re

from huggingface_hub import get_token

_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}\b")
"""The forms of the Hub's user and organisation tokens."""
MASK = "***"


def redact(text: str, *tokens: str | None) -> str:
    """`text` with every Hub token masked: those given, the one logged in with, and all that look like one."""
    for token in (*tokens, get_token()):
        if token:
            text = text.replace(token, MASK)
    return _TOKEN.sub(MASK, text)


def holds_token(text: str, *tokens: str | None) -> bool:
    """Whether `redact` would mask anything."""
    return redact(text, *tokens) != text
