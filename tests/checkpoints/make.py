"""Makes the stored checkpoints of this version: `python tests/checkpoints/make.py`, once for every released version.

Each folder `tests/checkpoints/VERSION/NAME` holds what this version's `save_pretrained` wrote (the code beside the
weights too) and `outputs.safetensors`: inputs and what the compressed model made of them; `bert` also the dense model
and its statistics. Later versions must read all of it and give the same (tests/test_stored_checkpoints.py).
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

from common import find, make_dense, make_inputs, make_rows  # noqa: E402

import tcsp_hf  # noqa: E402
from tcsp_hf import calibrate, compress  # noqa: E402

SMALL = {"bert": {"num_hidden_layers": 1}, "t5": {"num_layers": 1, "num_decoder_layers": 1}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert-ForSequenceClassification", {"remove": 0.4}),
    "bert-masked-lm": ("bert-ForMaskedLM", {"hidden_size": 16, "projection": "shared", "subspace": "pca"}),
    "t5": ("t5-gated-ForConditionalGeneration", {"remove": 0.3}),
    "t5-own-bases": ("t5-ForConditionalGeneration", {"hidden_size": 16, "projection": "per_site"}),
}
"""Name -> (case of tests/common.py, options of `compress`)."""


def make(folder: Path, name: str) -> None:
    case = find(CASES[name][0])
    dense = make_dense(case, torch.float32, **SMALL[case.family])
    stats = calibrate(dense, make_rows(case), progress=False, sample_tokens=300)
    if name == "bert":
        stats.save(folder / "statistics")
        dense.save_pretrained(folder / "dense")
    small = compress(dense, stats, multiple_of=4, **CASES[name][1])
    small.save_pretrained(folder / "small")
    if name not in ("bert", "t5"):  # the code of a family once is enough
        for path in (folder / "small").glob("*.py"):
            path.unlink()
    inputs = make_inputs(case)
    with torch.no_grad():
        logits = small(**inputs).logits
    save_file({**inputs, "logits": logits.contiguous()}, folder / "outputs.safetensors")


def main() -> None:
    top = HERE / tcsp_hf.__version__
    if top.exists():
        raise SystemExit(f"{top} is there already: a stored checkpoint is never made again.")
    torch.set_num_threads(1)
    for name in CASES:
        make(top / name, name)
    made_with = {"torch": torch.__version__, "transformers": transformers.__version__}
    (top / "made_with.json").write_text(json.dumps(made_with, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
