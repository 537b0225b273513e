"""`tcsp bench calibrate`: what it counts and how it judges; the times are the machine's."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from tcsp_hf import TCSPError
from tcsp_hf.cli.bench.calibrate import _missed, _missed_ranks
from tcsp_hf.cli.main import app
from tcsp_hf.evaluation.calibration_cost import CostRow, random_rows
from tcsp_hf.evaluation.calibration_ranks import RanksResult

TINY = ["bench", "calibrate", "--tokens", "100", "--rounds", "1", "--few", "20", "--many", "40"]


def test_command() -> None:
    result = CliRunner().invoke(app, [*TINY, "--shapes", "32x1,32x2", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [(row["hidden_size"], row["layers"], row["tokens"]) for row in found["rows"]] == [(32, 1, 100), (32, 2, 100)]
    for row in found["rows"]:
        assert (
            row["sigma_ratio"] == row["sigma"] / row["forward"] and row["both_ratio"] == row["both"] / row["backward"]
        )
        assert row["projection"] > 0 and row["peak_bytes"] > 1 << 20
    assert found["memory"]["few_bytes"] > 1 << 20


def test_bars() -> None:
    good = CostRow(768, 12, 4000, forward=4.0, sigma=5.0, backward=8.0, both=10.0, projection=20.0, peak_bytes=1)
    slow = CostRow(768, 12, 4000, forward=4.0, sigma=5.1, backward=8.0, both=10.1, projection=20.1, peak_bytes=1)
    assert _missed([good], 0.01) == []
    assert [text.partition(": ")[2][:9] for text in _missed([slow], 0.0)] == ["Sigma cos", "Sigma and", "the eigen"]
    assert len(_missed([good], 0.011)) == 1


@pytest.mark.slow
def test_several_processes() -> None:
    told = [
        "bench",
        "calibrate",
        "--shapes",
        "32x1",
        "--tokens",
        "300",
        "--rounds",
        "1",
        "--ranks",
        "2",
        "--ranks-only",
    ]
    result = CliRunner().invoke(app, [*told, "--json"])
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["ranks"]
    assert found["agree"] and found["off"] < 1e-3 and found["one"] > 0 and found["gain"] > 0


def test_bars_of_several_processes() -> None:
    good = RanksResult(768, 12, 4000, 2, one=17.0, many=10.0, agree=True, off=0.0)
    assert _missed_ranks([good]) == []
    assert len(_missed_ranks([replace(good, one=16.9), replace(good, agree=False)])) == 2
    assert _missed_ranks([replace(good, ranks=4, one=16.9)]) == []  # the bar is two processes'


def test_rows_have_the_tokens_asked_for() -> None:
    rows = list(random_rows(1000, 120))
    assert sum(len(row["input_ids"]) for row in rows) == 1000
    assert rows == list(random_rows(1000, 120)) and max(len(row["input_ids"]) for row in rows) <= 56


@pytest.mark.parametrize(
    ("told", "named"),
    [
        (["--shapes", "32"], "--shapes is '32'"),
        (["--shapes", "0x2"], "--shapes is '0x2'"),
        (["--tokens", "a"], "--tokens is 'a'"),
        (["--tokens", "0"], "--tokens is '0'"),
        (["--ranks-only"], "--ranks of at least 2"),
    ],
)
def test_refusals(told: list[str], named: str) -> None:
    result = CliRunner().invoke(app, [*TINY, *told])
    assert isinstance(result.exception, TCSPError) and named in str(result.exception)
