"""The latency bench: what it counts is checked, what it times is not."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from common import find, make_dense, make_small
from typer.testing import CliRunner

from tcsp_hf import TCSPBertConfig, TCSPError
from tcsp_hf.cli.main import app
from tcsp_hf.compression import count_parameters, removed_fraction
from tcsp_hf.evaluation.latency import (
    GridPoint,
    Timing,
    alternate,
    compare_latency,
    flops,
    parameter_bytes,
    token_bytes,
)
from tcsp_hf.evaluation.latency_models import (
    build,
    builder_of,
    dense_of_shape,
    even_sizes,
    one_width,
    peers_of,
    sizes_like,
)
from tcsp_hf.evaluation.latency_report import missed

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
    assert result.exit_code == 0 and "speed-up" in result.stdout


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


def test_parts_and_peers(tmp_path: Path) -> None:
    told = ["--shape", "tiny-t5", "--remove", "0.3", "--axes", "hidden", "--parts", "encoder,prefill,generation"]
    told += ["--batches", 2, "--lengths", 8, "--backends", "sdpa", "--rounds", 1, "--warmup", 0, "--new-tokens", 3]
    found = bench(*told, "--peers", "-o", tmp_path / "out")
    assert [point["part"] for point in found["grid"]] == ["encoder", "prefill", "generation"]
    assert {"dense", "small", "svd", "int8"} <= set(found["grid"][0]) and found["removed"] >= 0.3
    assert found["grid"][2]["tokens"] == 6 and found["ratios"]["token_bytes"] > 1
    assert json.loads((tmp_path / "out" / "grid.json").read_text()) == found
    page = (tmp_path / "out" / "grid.md").read_text()
    assert "Tokens per second" in page and "tcsp bench latency --shape tiny-t5" in page


def test_flops_of_a_decoder() -> None:
    """Of a layer: query, key, value and output, twice; scores and contexts; two feed-forward products; the LM head."""
    dense: Any = dense_of_shape("tiny-t5")
    batch, n, d, ffn, vocabulary = 2, 6, 32, 64, 120
    layer = 8 * n * d * d + 4 * n * n * d + 2 * n * d * ffn
    assert flops(dense, batch, n, "prefill") == 2 * batch * (2 * layer + n * d * vocabulary)
    layer = 4 * d * d + 2 * d * d + 2 * d * ffn  # the keys and values of the encoder's states are kept
    assert token_bytes(dense) == 4 * (2 * layer + d * vocabulary)


@pytest.mark.parametrize("shape", ["tiny", "tiny-t5"])
def test_even_sizes_are_the_largest_that_fit(shape: str) -> None:
    dense = dense_of_shape(shape)
    builder = builder_of(dense)
    for axes in (("hidden",), ("filters",), ("hidden", "filters", "heads")):
        sizes = even_sizes(builder, 0.2, axes)
        small = build(builder, sizes)
        assert removed_fraction(dense, small) >= 0.2
        assert all(len(set(values)) == 1 for values in (sizes.hidden, sizes.filters, sizes.heads))
        assert (sizes.hidden[0] < 32) == ("hidden" in axes) and (sizes.filters[0] < 64) == ("filters" in axes)
    with pytest.raises(TCSPError, match="remove at most"):
        even_sizes(builder, 0.9, ("filters",))


def test_sizes_of_a_checkpoint_scale() -> None:
    builder = builder_of(dense_of_shape("bert-base"))
    config = TCSPBertConfig(
        hidden_size=8,
        source_hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        site_hidden_sizes=[32, 16, 16, 16, 8],
        layer_intermediate_sizes=[64, 16],
        layer_attention_heads=[2, 1],
        layer_qk_head_sizes=[16, 4],
        layer_vo_head_sizes=[8, 16],
    )
    sizes = sizes_like(builder, config)
    assert sizes.hidden == [768] + [384] * 12 + [384, 192] * 6
    assert sizes.filters == [3072] * 6 + [768] * 6 and sizes.heads == [12] * 6 + [6] * 6
    assert sizes.qk == [64] * 6 + [16] * 6 and sizes.vo == [32] * 6 + [64] * 6


def test_peers_are_no_larger() -> None:
    dense = dense_of_shape("minilm")
    builder = builder_of(dense)
    small = build(builder, one_width(builder, 192))
    goal = count_parameters(small).non_embedding
    peers = peers_of(dense, small)
    assert set(peers) == {"svd", "filters", "shallow", "int8"}
    for name in ("svd", "filters", "shallow"):
        left = count_parameters(peers[name]).non_embedding
        assert 0.75 * goal <= left <= 1.001 * goal
    ids = torch.zeros(1, 4, dtype=torch.long)
    assert all(peer(input_ids=ids).last_hidden_state.shape == (1, 4, 384) for peer in peers.values())


def point(speedup: float, **fields: Any) -> GridPoint:
    times = {"dense": Timing(10.0 * speedup, 0.0), "small": Timing(10.0, 0.0)}
    return GridPoint(
        **{"part": "encoder", "backend": "sdpa", "batch": 8, "length": 128, "ideal": 1.8, **fields}, times=times
    )


def test_bars() -> None:
    every = ("hidden", "filters", "heads")
    assert (
        missed([point(1.72), point(1.63, batch=1), point(1.72, backend="compile", batch=1)], "bert", ["hidden"], 0.4)
        == []
    )
    low = [point(1.70), point(1.61, batch=1), point(1.70, backend="compile", batch=1), point(0.99, length=32)]
    assert len(missed(low, "bert", ["hidden"], 0.4)) == 4
    assert missed([point(2.0)], "bert", every, 0.6) == [] and len(missed([point(1.99)], "bert", every, 0.6)) == 1
    assert missed([point(1.99)], "bert", every, 0.5) == []
    written = {"part": "generation", "tokens": 32}
    assert missed([point(1.5, **written)], "t5", every, 0.44) == []
    assert len(missed([point(1.49, **written)], "t5", every, 0.44)) == 1


def test_a_check_that_fails_exits_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    told = ["bench", "latency", "--shape", "tiny", "--batches", "1", "--lengths", "4", "--rounds", "1", "--check"]
    monkeypatch.setattr("tcsp_hf.cli.bench.latency.missed", lambda *_: ["too slow"])
    result = CliRunner().invoke(app, told)
    assert result.exit_code == 1 and "Short of the bar: too slow" in result.output


def test_time_box() -> None:
    calls = {"a": lambda: time.sleep(0.02)}
    timed: list[int] = []
    calls["count"] = lambda: timed.append(1)
    alternate(calls, rounds=50, warmup=2, seconds_at_most=0.01)
    assert len(timed) == 4  # one that does not count, and three


def test_a_decoder_in_half_precision_is_counted() -> None:
    told = ("--shape", "tiny-t5", "--parts", "prefill", "--batches", 1, "--lengths", 8, "--rounds", 1)
    half, full = (bench(*told, "--dtype", dtype)["grid"][0]["ideal"] for dtype in ("bfloat16", "float32"))
    assert half == full > 1


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "mine.png").write_text("")
    make_dense(BERT, torch.float32).save_pretrained(tmp_path / "dense")
    for arguments, named in (
        (["--shape", "huge"], "--shape is 'huge'"),
        (["--shape", "tiny", "--parts", "generation"], "no decoder"),
        (["--parts", "all"], "--parts names 'all'"),
        (["--remove", "0.3", "--hidden-size", 8], "Give one of"),
        (["--dtype", "int8"], "--dtype is 'int8'"),
        (["--shape", "tiny", "--lengths", "8,600"], "length of 600"),
        (["--clock", "sun"], "--clock is 'sun'"),
        (["--shape", "tiny", "--hidden-size", 40], "--hidden-size is 40"),
        (["--backends", "eager,fast"], "back-end is 'fast'"),
        (["--batches", "0"], "--batches is '0'"),
        (["--lengths", "a"], "--lengths is 'a'"),
        (["--plot", tmp_path / "mine.png"], "exists"),
        (["--model", tmp_path / "dense"], "no compressed model"),
    ):
        with pytest.raises(TCSPError, match=named):
            bench(*arguments)
