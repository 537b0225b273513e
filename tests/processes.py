"""Other processes for the tests: what they inherit, and two ranks of torch.distributed."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_LIMIT = 280.0
"""Seconds that two ranks may take."""

# A process that has imported what the scripts need, once, and is copied for each of them: importing it anew in every
# rank and in their launcher takes longer than most scripts.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["torch.distributed.launcher.api", "transformers", "tcsp_hf.train.trainer"])


def environment(**fields: str) -> dict[str, str]:
    """The package and the tests can be imported, and one thread is used."""
    paths = os.pathsep.join([str(_HERE.parent), str(_HERE), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **fields}


def on_two_ranks(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A script and its arguments, on two ranks that torchrun's own launcher starts, watches and ends."""
    with tempfile.TemporaryDirectory() as folder:
        agent = _SERVER.Process(target=_launch, args=(list(arguments), folder, environment()))
        agent.start()
        agent.join(_LIMIT)
        if agent.is_alive():
            agent.terminate()  # the launcher ends its ranks
            agent.join()
            raise subprocess.TimeoutExpired(list(arguments), _LIMIT)
        assert agent.exitcode is not None
        output, errors = ((Path(folder) / name).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(list(arguments), agent.exitcode, output, errors)


def _launch(arguments: list[str], folder: str, inherited: dict[str, str]) -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for number, name in ((1, "stdout"), (2, "stderr")):
        with open(Path(folder) / name, "wb") as file:
            os.dup2(file.fileno(), number)
    os.environ.update(inherited)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.05,
        start_method="fork",
    )
    elastic_launch(config, _run)(arguments)


def _run(arguments: list[str]) -> None:
    import torch

    torch.set_num_threads(1)  # the variable came too late for a process that is a copy
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def command_on_two_ranks(*arguments: str, **fields: str) -> subprocess.CompletedProcess[str]:
    """`torchrun -m` a module, as a user would; `fields` are added to the environment."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", *arguments]
    return subprocess.run(command, env=environment(**fields), capture_output=True, text=True, timeout=_LIMIT)
