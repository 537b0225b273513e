"""Dense models whose weights stay on disk: the same statistics and compressed models, with less in memory."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from common import Case, D, find, make_dense, make_rows, make_tokenizer
from transformers import PreTrainedModel
from typer.testing import CliRunner

from tcsp_hf import Calibration, TCSPError, calibrate, compress
from tcsp_hf.cli.main import app
from tcsp_hf.loading import load_model
from tcsp_hf.offload import device_of, is_offloaded

QUICK = ("bert-ForSequenceClassification", "t5-ForConditionalGeneration")
CASES = (*QUICK, "bert-ForMaskedLM", "t5-gated-EncoderModel")
per_case = pytest.mark.parametrize(
    "case", [pytest.param(find(name), marks=() if name in QUICK else pytest.mark.slow, id=name) for name in CASES]
)


def pair(case: Case, folder: Path, device_map: Any, **kwargs: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A dense model from its folder in memory, and with `device_map`."""
    make_dense(case, torch.float32).save_pretrained(folder)
    whole = case.dense_class.from_pretrained(folder).eval()
    return whole, case.dense_class.from_pretrained(folder, device_map=device_map, **kwargs).eval()


def statistics(case: Case, model: PreTrainedModel) -> Calibration:
    return calibrate(model, make_rows(case), batch_size=16, progress=False)


def assert_same_statistics(one: Calibration, other: Calibration) -> None:
    assert one.model_fingerprint == other.model_fingerprint and list(one.sites) == list(other.sites)
    assert one.sample.sequences() == other.sample.sequences() and one.sequences == other.sequences
    for name, site in one.sites.items():
        found = other.sites[name]
        assert site.tokens == found.tokens, name
        for kind in ("second_moment", "fisher", "query_fisher_sum"):
            expected, value = getattr(site, kind), getattr(found, kind)
            assert (expected is None) == (value is None), (name, kind)
            if expected is not None:
                assert (expected - value).abs().max() <= 1e-6 * expected.abs().max(), (name, kind)


def assert_same_models(one: PreTrainedModel, other: PreTrainedModel) -> None:
    expected, found = one.state_dict(), other.state_dict()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert value.device == found[name].device and value.dtype == found[name].dtype, name
        assert torch.equal(value, found[name]), name


@per_case
def test_same_results_from_disk(case: Case, tmp_path: Path) -> None:
    """Statistics agree to rounding; with the same statistics, search and refit give the same model to the last bit."""
    whole, offloaded = pair(case, tmp_path, {"": "disk"})
    assert is_offloaded(offloaded) and not is_offloaded(whole)
    stats = statistics(case, whole)
    assert_same_statistics(stats, statistics(case, offloaded))
    before = [vars(module).get("forward") for module in offloaded.modules()]
    for budget in ({"hidden_size": 16, "refit": False}, {"remove": 0.4, "multiple_of": 4}):
        made = compress(offloaded, stats, **budget)
        assert_same_models(compress(whole, stats, **budget), made)
        assert not is_offloaded(made)
    assert [vars(module).get("forward") for module in offloaded.modules()] == before, "accelerate's hooks are gone"
    assert is_offloaded(offloaded)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_part_of_the_model_on_disk(dtype: torch.dtype, tmp_path: Path) -> None:
    """Some layers in memory, the others in their file, there in another dtype than in the model."""
    case = find("bert-ForSequenceClassification")
    places = {"bert.embeddings": "cpu", "bert.encoder.layer.0": "cpu", "bert.encoder.layer.1": "disk"}
    places |= {"bert.pooler": "disk", "classifier": "cpu"}
    whole, offloaded = pair(case, tmp_path, places, dtype=dtype)
    whole = whole.to(dtype)
    stats = statistics(case, whole)
    assert_same_statistics(stats, statistics(case, offloaded))
    assert_same_models(compress(whole, stats, remove=0.3), compress(offloaded, stats, remove=0.3))


def test_gradients_of_an_offloaded_model_are_whole(tmp_path: Path) -> None:
    """Layers run again for the backward pass: what their hooks see then must not count twice."""
    case = find("t5-ForConditionalGeneration")
    _, offloaded = pair(case, tmp_path, {"": "disk"})
    rows = make_rows(case, 5)
    stats = calibrate(offloaded, rows, progress=False)
    tokens = sum(len(row["input_ids"]) for row in rows)
    assert stats.sites["encoder.0.attention"].tokens == tokens
    moment = stats.sites["encoder.0.attention"].second_moment
    assert abs(float(moment.trace()) - D) < 1e-2 * D  # a normalised stream
    with pytest.raises(TCSPError, match="fingerprint"):
        compress(make_dense(case, torch.float32, seed=1), stats, hidden_size=16)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    case = find("bert-Model")
    with torch.device("meta"):
        empty = case.dense_class(make_dense(case).config)
    with pytest.raises(TCSPError, match="meta device and no values"):
        calibrate(empty, make_rows(case), progress=False)
    whole, offloaded = pair(case, tmp_path, {"": "disk"})
    assert device_of(whole) == device_of(offloaded) == torch.device("cpu")
    offloaded.encoder.layer[1].output.dense._hf_hook.execution_device = "meta"
    with pytest.raises(TCSPError, match=r"several devices \(cpu, meta\)"):
        calibrate(offloaded, make_rows(case), progress=False)


def test_commands(tmp_path: Path) -> None:
    """`tcsp calibrate --offload` and `tcsp compress --offload`, written in shards, equal what they are in memory."""
    case = find("bert-ForSequenceClassification")
    make_dense(case, torch.float32).save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "texts.txt").write_text("\n".join(f"w{i} w{i + 3} w{2 * i} w{i + 1}" for i in range(40)))
    told = ["calibrate", str(tmp_path / "dense"), "--data", str(tmp_path / "texts.txt"), "--quiet"]
    for name, more in (("whole", []), ("disk", ["--offload"])):
        result = CliRunner().invoke(app, [*told, "-o", str(tmp_path / f"stats-{name}"), *more])
        assert result.exit_code == 0, (result.output, result.exception)
    stats = [Calibration.load(tmp_path / f"stats-{name}") for name in ("whole", "disk")]
    assert_same_statistics(*stats)
    told = ["compress", str(tmp_path / "dense"), "--stats", str(tmp_path / "stats-whole"), "--remove", "0.3", "--json"]
    for name, more in (("whole", []), ("disk", ["--offload", "--max-shard-size", "10KB"])):
        result = CliRunner().invoke(app, [*told, "-o", str(tmp_path / name), *more])
        assert result.exit_code == 0, (result.output, result.exception)
    assert len(list((tmp_path / "disk").glob("model-*.safetensors"))) > 1
    index = json.loads((tmp_path / "disk" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] > 0
    assert_same_models(*(load_model(str(tmp_path / name)) for name in ("whole", "disk")))


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="reads /proc, and tells glibc to give memory back")
def test_peak_memory(tmp_path: Path) -> None:
    """Without the float32 copy of a bfloat16 file that an ordinary load makes."""
    config = transformers.BertConfig(
        vocab_size=1000, hidden_size=256, num_attention_heads=4, num_hidden_layers=8, intermediate_size=8192
    )
    torch.manual_seed(0)
    dense = transformers.BertModel(config).eval().to(torch.bfloat16)
    dense.save_pretrained(tmp_path / "dense")
    rows = [{"input_ids": [5 + (7 * i + 3 * j) % 900 for j in range(32)]} for i in range(10)]
    calibrate(dense, rows, fisher=False, sample_tokens=0, progress=False).save(tmp_path / "stats")
    whole = sum(parameter.numel() for parameter in dense.parameters()) * 4
    peaks = {}
    for how in ("load", "offload"):
        told = [sys.executable, str(Path(__file__).parent / "peak_memory.py"), str(tmp_path / "dense")]
        told += [str(tmp_path / "stats"), how]
        # freed memory goes back to the system at once, so that what is held is what is counted
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "PYTHONPATH": os.getcwd()}
        done = subprocess.run(told, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        peaks[how], weights = (int(part) for part in done.stdout.split())
    assert peaks["offload"] < peaks["load"] - 0.7 * whole
    assert weights < 0.6 * whole and peaks["offload"] < weights + 0.7 * whole, "a second copy of the weights was held"


@pytest.mark.parametrize(
    ("told", "named"),
    [
        (["--max-shard-size", "5"], "--max-shard-size is '5'"),
        (["--max-shard-size", "0GB"], "--max-shard-size is '0GB'"),
        (["--offload", "--sentence-transformer"], "--offload cannot go with"),
        (["--offload", "--device", "cuda"], "for the CPU only, but device is 'cuda'"),
        (["--offload"], "no safetensors file"),
    ],
)
def test_refusals(told: list[str], named: str, tmp_path: Path) -> None:
    (tmp_path / "dense").mkdir()
    arguments = ["compress", str(tmp_path / "dense"), "--hidden-size", "16", "-o", str(tmp_path / "small"), *told]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, TCSPError) and named in str(result.exception)
    assert not (tmp_path / "small").exists()
