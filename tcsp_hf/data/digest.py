"""A short name for what rows hold."""

import hashlib
import json
from typing import Any

_BATCH = 1000


def digest_of_rows(rows: Any) -> str:
    """Hash of a list, or of a `datasets.Dataset`, in its order."""
    digest = hashlib.sha256()
    for part in rows.iter(_BATCH) if hasattr(rows, "iter") else rows:
        digest.update(json.dumps(part, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]
