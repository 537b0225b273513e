"""What importing the package and loading a compressed checkpoint cost, each in new processes that take turns."""

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..compression.sizes import count_parameters, meta_count
from ..errors import TCSPError
from .latency_models import build, builder_of, dense_of_shape, one_width

_IMPORT = """
import json, time
started = time.perf_counter()
import transformers
between = time.perf_counter()
import tcsp_hf
print(json.dumps({"transformers": between - started, "package": time.perf_counter() - between}))
"""
_LOAD = """
import json, sys, time
import transformers
import tcsp_hf
loader = getattr(transformers, sys.argv[2])
transformers.utils.logging.disable_progress_bar()
seconds = []
for turn in range(3):
    started = time.perf_counter()
    model = loader.from_pretrained(sys.argv[1])
    seconds.append(time.perf_counter() - started)
print(json.dumps({"class": type(model).__name__, "first": seconds[0], "again": min(seconds[1:])}))
"""


@dataclass(frozen=True)
class LoadCost:
    """Medians over processes, in seconds.

    Attributes:
        transformers, package: of `import transformers`, and of `import tcsp_hf` after it.
        dense_first, small_first: of the first `from_pretrained` in a process, which imports the model's code as well.
        dense_again, small_again: of a later one in the same process.
        dense_bytes, small_bytes: of the weight files.
    """

    transformers: float
    package: float
    dense_first: float
    small_first: float
    dense_again: float
    small_again: float
    dense_bytes: int
    small_bytes: int


def models_of_one_size(shape: str, hidden_size: int | None) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A stock model and a compressed one with about as many parameters, both with random weights.

    Args:
        hidden_size: of the compressed one, whose other sizes are the shape's; half the shape's when None.

    Raises:
        TCSPError: an unknown shape or size.
    """
    torch.manual_seed(0)
    builder = builder_of(dense_of_shape(shape))
    small = build(builder, one_width(builder, max(1, builder.full // 2) if hidden_size is None else hidden_size))
    wanted = count_parameters(small).total
    config: Any = builder.dense.config
    neurons = "d_ff" if builder.family == "t5" else "intermediate_size"
    heads = max(1, round(small.config.hidden_size * config.num_attention_heads / builder.full))
    head_size = builder.full // config.num_attention_heads
    fields = {**config.to_dict(), "hidden_size": heads * head_size, "num_attention_heads": heads}
    if builder.family == "t5":
        fields = {**config.to_dict(), "d_model": small.config.hidden_size}

    def sized(count: int) -> Any:
        return type(config)(**{**fields, neurons: count})

    one, two = (meta_count(type(builder.dense), sized(count)).total for count in (1, 2))
    count = max(1, round((wanted - one) / (two - one)) + 1)
    return type(builder.dense)(sized(count)).eval(), small


def measure_load(dense: Path, small: Path, loader: str, rounds: int) -> LoadCost:
    """Time imports and loads; the folders were just written, so their files are in the system's cache.

    Args:
        loader: name of the Auto class.

    Raises:
        TCSPError: a process failed.
    """
    imports: list[dict[str, Any]] = []
    loads: dict[Path, list[dict[str, Any]]] = {dense: [], small: []}
    for turn in range(rounds + 1):
        found = _run(_IMPORT, [])
        pairs = [(folder, _run(_LOAD, [str(folder), loader])) for folder in (dense, small)]
        if turn > 0:  # the first process reads the libraries from the disk
            imports.append(found)
            for folder, one in pairs:
                loads[folder].append(one)

    def median(rows: list[dict[str, Any]], name: str) -> float:
        return statistics.median(row[name] for row in rows)

    return LoadCost(
        transformers=median(imports, "transformers"),
        package=median(imports, "package"),
        dense_first=median(loads[dense], "first"),
        small_first=median(loads[small], "first"),
        dense_again=median(loads[dense], "again"),
        small_again=median(loads[small], "again"),
        dense_bytes=_weight_bytes(dense),
        small_bytes=_weight_bytes(small),
    )


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _run(program: str, arguments: Sequence[str]) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise TCSPError(f"A process that was timed failed: {done.stderr.strip()[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
