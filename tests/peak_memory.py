"""Compresses a model in a process of its own, and prints the most memory of its own that this took: not a test itself.

Arguments: the dense folder, its statistics, and `offload` or `load`. Pages of files that are only mapped do not count:
the system drops and reads them again as it likes.
"""

import sys
import threading
from pathlib import Path

import torch

import tcsp_hf
from tcsp_hf import Calibration, compress
from tcsp_hf.loading import load_model


def own_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def main(folder: str, stats_folder: str, how: str) -> None:
    torch.set_num_threads(1)
    stats = Calibration.load(stats_folder)
    tiny = tcsp_hf.TCSPBertConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1, intermediate_size=8)
    tcsp_hf.TCSPBertModel(tiny)  # what imports and first uses take is no part of it
    before = peak = own_bytes()
    stop = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.01):
            peak = max(peak, own_bytes())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    dense = load_model(folder, "float32", offload=how == "offload")
    small = compress(dense, stats, hidden_size=stats.hidden_size // 2, subspace="pca", refit=False)
    stop.set()
    thread.join()
    weights = sum(p.numel() * p.element_size() for p in small.parameters())
    print(peak - before, weights)


if __name__ == "__main__":
    main(*sys.argv[1:])
