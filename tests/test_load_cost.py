"""`tcsp bench load`: what it compares and how it judges; the times are the machine's."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from tcsp_hf import TCSPError
from tcsp_hf.cli.bench.load import missed
from tcsp_hf.cli.main import app
from tcsp_hf.compression import count_parameters
from tcsp_hf.evaluation.load_cost import LoadCost, models_of_one_size


@pytest.mark.slow
def test_command() -> None:
    result = CliRunner().invoke(app, ["bench", "load", "--shape", "tiny", "--rounds", "1", "--json"])
    assert result.exit_code == 0, (result.output, result.exception)
    found = json.loads(result.stdout)
    for name in ("transformers", "package", "dense_first", "small_first", "dense_again", "small_again"):
        assert 0.0 < found[name] < 300.0, name
    assert abs(found["small_bytes"] / found["dense_bytes"] - 1.0) < 0.5  # headers and the lift are much of a tiny one


@pytest.mark.parametrize("shape", ["tiny", "tiny-t5"])
def test_models_are_of_one_size(shape: str) -> None:
    dense, small = models_of_one_size(shape, None)
    assert abs(count_parameters(dense).total / count_parameters(small).total - 1.0) < 0.02
    assert small.config.model_type.startswith("tcsp_") and not dense.config.model_type.startswith("tcsp_")


def test_bars() -> None:
    good = LoadCost(2.0, 0.15, 0.2, 0.21, 0.1, 0.105, 100, 100)
    assert missed(good) == []
    assert len(missed(replace(good, package=0.16))) == 1
    assert len(missed(replace(good, small_first=0.22, small_again=0.11))) == 2


def test_refusals() -> None:
    for told, named in ((["--shape", "huge"], "--shape is 'huge'"), (["--hidden-size", "999"], "--hidden-size is 999")):
        result = CliRunner().invoke(app, ["bench", "load", "--rounds", "1", "--shape", "tiny", *told])
        assert isinstance(result.exception, TCSPError) and named in str(result.exception)
