"""What the tests of calibration share: texts, and how statistics are compared."""

import pytest
import torch

from tcsp_hf import Calibration

WORDS = [" ".join(f"w{(5 * i + j) % 100}" for j in range(2 + i % 7)) for i in range(30)]


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def assert_equal_statistics(one: Calibration, other: Calibration, tolerance: float = 1e-8) -> None:
    assert list(one.sites) == list(other.sites)
    assert one.summary() == other.summary()
    assert one.sample.sequences() == other.sample.sequences()
    for name, site in one.sites.items():
        found, expected = vars(site), vars(other.sites[name])
        assert found["tokens"] == expected["tokens"]
        assert one.sites[name].coherence == pytest.approx(other.sites[name].coherence, abs=tolerance)
        for kind in found.keys() - {"tokens", "common_sum"}:
            assert (found[kind] is None) == (expected[kind] is None), (name, kind)
            if found[kind] is not None and expected[kind].any():
                assert relative(found[kind], expected[kind]) <= tolerance, (name, kind)
