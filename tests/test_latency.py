"""The latency bench: what it counts is checked, what it times is not."""

import json
from pathlib import Path

import pytest
import torch
from common import find, make_dense, make_small
from typer.testing import CliRunner

from tcsp_hf import TCSPError
from tcsp_hf.cli.main import app
from tcsp_hf.evaluation.latency import alternate, compare_latency, flops, parameter_bytes

BERT = find("bert-Model")


def bench(*arguments: object) -> dict:
    result = CliRunner().invoke(app, ["bench", "latency", *map(str, arguments), "--json"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_alternation() -> None:
    order: list[str] = []
    found = alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warmup=2)
    assert order == ["a", "b"] * 5
    assert set(found) == {"a", "b"} and all(0.0 <= t.median <= t.p90 for t in found.values())


def test_flops_by_hand() -> None:
    """Of a layer: query, key, value and output, scores and context, two feed-forward products; then the pooler."""
    dense, batch, n, d, ffn = make_dense(BERT, torch.float32), 3, 7, 32, 40
    layer = 4 * n * d * d + 2 * n * n * d + 2 * n * d * ffn
    assert flops(dense, batch, n) == 2 * batch * (2 * layer + d * d)
    k = 16
    small = make_small(BERT, hidden_size=k)
    layer = n * (3 * d * k + d * k + 2 * k * k) + 2 * n * n * d + 2 * n * k * ffn  # residual maps are counted
    assert flops(small, batch, n) == 2 * batch * (2 * layer + k * d)


def test_bytes() -> None:
    dense = make_dense(find("t5-EncoderModel"), torch.float32)
    assert parameter_bytes(dense) == 4 * sum(p.numel() for p in dense.parameters())
    assert parameter_bytes(dense.to(torch.bfloat16)) == 2 * sum(p.numel() for p in dense.parameters())


def test_encoder_of_a_sequence_to_sequence_model() -> None:
    case = find("t5-ForConditionalGeneration")
    pair = compare_latency(make_dense(case, torch.float32), make_small(case), 1, 4, rounds=1, warmup=0)
    assert pair.dense_ms > 0 and pair.small_ms > 0 and pair.speedup == pair.dense_ms / pair.small_ms


def test_command_on_a_shape(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    told = ["--shape", "tiny", "--batches", "1,2", "--lengths", "4,8", "--rounds", 2, "--warmup", 1]
    found = bench(*told, "--plot", tmp_path / "grid.png")
    places = [(point["backend"], point["batch"], point["length"]) for point in found["grid"]]
    assert places == [(name, b, n) for name in ("eager", "sdpa") for b in (1, 2) for n in (4, 8)]
    assert all(point["ideal"] > 1 and point["speedup"] > 0 for point in found["grid"])
    assert found["bytes_ratio"] > 1 and (tmp_path / "grid.png").stat().st_size > 1000
    result = CliRunner().invoke(app, ["bench", "latency", *map(str, told)])
    assert result.exit_code == 0 and "FLOPs ratio" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["compile", "onnx"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # PyTorch's compiler, of itself
def test_other_backends(backend: str) -> None:
    if backend == "onnx":
        pytest.importorskip("onnxruntime")
    told = ["--shape", "tiny", "--batches", "2", "--lengths", "8", "--rounds", 2, "--warmup", 1]
    found = bench(*told, "--backends", backend)
    assert [point["backend"] for point in found["grid"]] == [backend]


def test_command_on_a_checkpoint(tmp_path: Path) -> None:
    make_dense(BERT, torch.float32).save_pretrained(tmp_path / "dense")
    make_small(BERT).save_pretrained(tmp_path / "small")
    told = ["--model", tmp_path / "small", "--batches", 1, "--lengths", 4, "--rounds", 1, "--warmup", 0]
    assert len(bench(*told, "--dense", tmp_path / "dense")["grid"]) == 2


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "mine.png").write_text("")
    make_dense(BERT, torch.float32).save_pretrained(tmp_path / "dense")
    for arguments, named in (
        (["--shape", "huge"], "--shape is 'huge'"),
        (["--shape", "tiny", "--hidden-size", 40], "--hidden-size is 40"),
        (["--backends", "eager,fast"], "back-end is 'fast'"),
        (["--batches", "0"], "--batches is '0'"),
        (["--lengths", "a"], "--lengths is 'a'"),
        (["--plot", tmp_path / "mine.png"], "exists"),
        (["--model", tmp_path / "dense"], "no compressed model"),
    ):
        with pytest.raises(TCSPError, match=named):
            bench(*arguments)
