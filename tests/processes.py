"""Other processes for the tests: what they inherit, and two ranks of torch.distributed."""

import os
import subprocess
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent


def environment(**fields: str) -> dict[str, str]:
    """The package and the tests can be imported, and one thread is used."""
    paths = os.pathsep.join([str(_HERE.parent), str(_HERE), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **fields}


def on_two_ranks(*arguments: str, **fields: str) -> subprocess.CompletedProcess[str]:
    """torchrun of a script, or of a module after "-m"; `fields` are added to the environment."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments]
    return subprocess.run(command, env=environment(**fields), capture_output=True, text=True, timeout=280)
