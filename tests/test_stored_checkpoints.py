"""What earlier versions wrote (tests/checkpoints) loads and gives the same; what a newer one writes is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from common import find
from safetensors.torch import load_file
from test_cli import tcsp

import tcsp_hf
from tcsp_hf import Calibration, TCSPConfig, TCSPError, compress
from tcsp_hf.publish.checkpoint import read_checkpoint

TOP = Path(__file__).parent / "checkpoints"
STORED = sorted(path.parent for path in TOP.glob("*/*/outputs.safetensors"))
AUTO = {
    "TCSPBertForSequenceClassification": transformers.AutoModelForSequenceClassification,
    "TCSPBertForMaskedLM": transformers.AutoModelForMaskedLM,
    "TCSPT5ForConditionalGeneration": transformers.AutoModelForSeq2SeqLM,
}
per_stored = pytest.mark.parametrize("folder", STORED, ids=lambda path: "/".join(path.parts[-2:]))
_WITH_ITS_CODE = """
import json, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tcsp_hf":
            raise ModuleNotFoundError("blocked")
sys.meta_path.insert(0, Blocker())
import torch, transformers
from safetensors.torch import load_file
auto, folder, outputs = sys.argv[1:]
model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
inputs = load_file(outputs)
logits = inputs.pop("logits")
with torch.no_grad():
    found = model(**inputs).logits
assert "transformers_modules" in type(model).__module__
print("difference", float((found - logits).abs().max()))
"""


def test_there_is_something_to_read() -> None:
    assert len(STORED) >= 4 and (TOP / "0.1.0").is_dir()


@per_stored
def test_it_loads_and_gives_the_same(folder: Path) -> None:
    name = json.loads((folder / "small" / "config.json").read_text())["architectures"][0]
    model = AUTO[name].from_pretrained(folder / "small").eval()
    assert type(model) is getattr(tcsp_hf, name)
    inputs = load_file(folder / "outputs.safetensors")
    expected = inputs.pop("logits")
    with torch.no_grad():
        found = model(**inputs).logits
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_with_the_code_it_was_saved_with(name: str, tmp_path: Path) -> None:
    """As users of `trust_remote_code` load it, whatever has become of this package and of transformers."""
    for folder in [path for path in STORED if path.name == name]:
        architecture = json.loads((folder / "small" / "config.json").read_text())["architectures"][0]
        copy = tmp_path / f"{name}-{folder.parent.name}"
        shutil.copytree(folder / "small", copy)
        arguments = [AUTO[architecture].__name__, str(copy), str(folder / "outputs.safetensors")]
        command = [sys.executable, "-I", "-c", _WITH_ITS_CODE, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert float(done.stdout.split()[-1]) <= 1e-3


@pytest.mark.parametrize("folder", [path for path in STORED if (path / "statistics").is_dir()], ids=str)
def test_statistics_still_serve(folder: Path) -> None:
    stats = Calibration.load(folder / "statistics")
    dense = find("bert-ForSequenceClassification").dense_class.from_pretrained(folder / "dense")
    small = compress(dense, stats, hidden_size=16)
    assert small.config.projection["calibration"] == stats.summary()


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_a_newer_format_is_refused_politely(name: str, tmp_path: Path) -> None:
    """With what to do, by every way to load; not with a traceback on the command line."""
    for path in (TOP / "0.1.0" / name / "small").iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["projection"]["method_version"] += 1
    config["projection"]["something_new"] = {"a": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = "projection.method_version is 2, but this version of tcsp_hf reads up to 1: install a newer tcsp_hf"
    auto = AUTO[config["architectures"][0]]
    for load in (auto.from_pretrained, TCSPConfig.from_pretrained, transformers.AutoConfig.from_pretrained):
        with pytest.raises(ValueError, match=said):
            load(tmp_path)
    with pytest.raises(TCSPError, match=said):
        read_checkpoint(tmp_path)
    with pytest.raises(TCSPError, match=said):
        tcsp("inspect", tmp_path)


def test_newer_statistics_are_refused_politely(tmp_path: Path) -> None:
    shutil.copytree(TOP / "0.1.0" / "bert" / "statistics", tmp_path / "stats")
    summary = json.loads((tmp_path / "stats" / "calibration.json").read_text())
    summary["format_version"] += 1
    (tmp_path / "stats" / "calibration.json").write_text(json.dumps(summary))
    with pytest.raises(TCSPError, match="format_version 2; this version of tcsp_hf reads up to 1: install a newer"):
        Calibration.load(tmp_path / "stats")
