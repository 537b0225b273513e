"""The command line on a tiny model: what it writes, what it prints for a program, and how it refuses."""

import http.client
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from common import find, make_dense, make_rows, make_small, make_tokenizer
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, ByT5Tokenizer
from typer.testing import CliRunner

from tcsp_hf import TCSPBertForSequenceClassification, TCSPConfig, TCSPError, calibrate
from tcsp_hf.cli import main
from tcsp_hf.cli.main import app
from tcsp_hf.data.sources import load_data
from tcsp_hf.errors import ends_a_command, message_of
from tcsp_hf.loading import demo_model_path, load_model, load_tokenizer, resolve_name
from tcsp_hf.tasks import find_task
from tcsp_hf.train.models import load_for_task

BERT = find("bert-ForSequenceClassification")
ENCODER = find("bert-Model")


def tcsp(*arguments: Any) -> str:
    """Standard output of `tcsp` with these arguments; its exception if it raised one."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    make_dense(BERT, torch.float32, 0).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "train.txt"
    words = [f"w{i}" for i in range(40)]
    path.write_text("\n".join(" ".join(words[i % 30 : i % 30 + 3 + i % 7]) for i in range(60)) + "\n")
    return path


def test_calibrate_compress_inspect(dense: Path, texts: Path, tmp_path: Path) -> None:
    stats, small = tmp_path / "stats", tmp_path / "small"
    found = json.loads(tcsp("calibrate", dense, "--data", texts, "-o", stats, "--json"))
    assert found["objective"] == "classification"
    assert found["sequences"] == 60
    found = json.loads(
        tcsp("compress", dense, "--stats", stats, "--hidden-size", 16, "--multiple-of", 4, "-o", small, "--json")
    )
    assert found["projection"]["kind"] == "per_site"
    model = AutoModelForSequenceClassification.from_pretrained(small)
    assert isinstance(model, TCSPBertForSequenceClassification)
    assert model.config.hidden_size == 16
    assert AutoTokenizer.from_pretrained(small)("a")["input_ids"]
    seen = json.loads(tcsp("inspect", small, "--json"))
    assert seen["projection"] == TCSPConfig.from_pretrained(small).projection
    widths = json.loads(tcsp("inspect", dense, "--stats", stats, "--json"))["widths"]
    assert widths[0]["hidden_size"] == 32
    assert all(a["removed"] <= b["removed"] for a, b in itertools.pairwise(widths[1:]))
    assert all(0.0 <= row["kept_energy_min"] <= 1.0 + 1e-9 for row in widths)
    with pytest.raises(TCSPError, match=r"--stats are of a dense model, but .* is compressed"):
        tcsp("inspect", small, "--stats", stats)
    for words in (("inspect", small), ("inspect", dense), ("--help",), ("compress", "--help")):
        assert tcsp(*words).strip()


def test_compress_without_statistics_calibrates_first(
    dense: Path, texts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = json.loads(tcsp("compress", dense, "--data", texts, "--energy", 0.9, "-o", tmp_path / "e", "--json"))
    assert "--data" not in caplog.text
    assert found["parameters"]["before"] > 0
    assert len({site["hidden_size"] for site in found["projection"]["sites"]}) >= 1


def test_left_out_data_is_said(dense: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    few = ("--max-sequences", 20, "--json")
    tcsp("calibrate", dense, "-o", tmp_path / "stats", *few)
    assert "--data with some 2,000 texts" in caplog.text
    caplog.clear()
    tcsp("compress", dense, "--stats", tmp_path / "stats", "--hidden-size", 16, "-o", tmp_path / "a", "--json")
    assert "--data" not in caplog.text, "nothing is calibrated"
    tcsp("compress", dense, "--hidden-size", 16, "-o", tmp_path / "b", *few)
    assert "--data with some 2,000 texts" in caplog.text


def test_demo_on_a_tiny_encoder(tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    make_dense(ENCODER, torch.float32, 0, max_position_embeddings=256).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    output = tmp_path / "demo"
    found = json.loads(
        tcsp("demo", "--model", folder, "-o", output, "--paragraphs", 20, "--test-paragraphs", 10, "--json")
    )
    assert found["removed"] >= 0.25
    assert found["bytes"][1] < found["bytes"][0]
    assert 0.0 <= found["recall_small"][0] <= found["recall_small"][1] <= 1.0
    assert -1.0 <= found["cosine"] <= 1.0
    assert type(AutoModel.from_pretrained(output)).__name__ == "TCSPBertModel"
    assert not (output / "dense").exists()
    with pytest.raises(TCSPError, match="not empty"):
        tcsp("demo", "--model", folder, "-o", output)


def test_refusals_come_before_any_work(dense: Path, texts: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    with pytest.raises(TCSPError, match="not empty"):
        tcsp("calibrate", "no/such-model", "--data", texts, "-o", full)
    with pytest.raises(TCSPError, match="exactly one"):
        tcsp("compress", dense, "-o", tmp_path / "x")
    with pytest.raises(TCSPError, match="no data"):
        tcsp("calibrate", dense, "--data", "nowhere", "-o", tmp_path / "x")
    with pytest.raises(TCSPError, match="no folder"):
        tcsp("calibrate", tmp_path / "empty", "--data", texts, "-o", tmp_path / "x")
    with pytest.raises(TCSPError, match="dtype"):
        tcsp("calibrate", dense, "--data", texts, "-o", tmp_path / "x", "--dtype", "int8")
    with pytest.raises(TCSPError, match=r"holds 'mine\.txt'"):
        tcsp("calibrate", "no/such-model", "--data", texts, "-o", full, "--overwrite")
    with pytest.raises(TCSPError, match=r"--checkpoint .* is in --output .*: name another one"):
        tcsp("calibrate", "no/such-model", "--data", texts, "-o", tmp_path / "x", "--checkpoint", tmp_path / "x" / "c")
    train = ("train", "--model", "no/such-model", "--data", texts, "-o", tmp_path / "x")
    for told, said in (
        (("--hidden-size", 16, "--axes", "heads"), "--axes is 'heads'"),
        (("--student", "small", "--axes", "heads"), "--axes is 'heads'"),
        (("--student", "small", "--calibration-samples", 9), "--calibration-samples cannot go with --student"),
        (("--hidden-size", 16, "--eval-split", "test"), "--eval-split is 'test', but unlabelled text is not scored"),
        (("--hidden-size", 16, "--eval-samples", 9), "--eval-samples is 9, but unlabelled text is not scored"),
    ):
        with pytest.raises(TCSPError, match=said):
            tcsp(*train, *told)
    compress = ("compress", dense, "--hidden-size", 16, "-o", tmp_path / "x")
    with_stats = (*compress, "--stats", tmp_path / "none")
    for words, said in (
        ((*with_stats, "--data", texts), "--data is .*, but with --stats nothing is calibrated"),
        ((*with_stats, "--split", "test"), "--split is 'test'"),
        ((*with_stats, "--text-columns", "a"), "--text-columns is 'a'"),
        ((*with_stats, "--max-sequences", 9), "--max-sequences is 9"),
        ((*with_stats, "--pooling", "cls"), "--pooling is 'cls'"),
        ((*compress, "--sentence-transformer", "--max-shard-size", "1GB"), "--max-shard-size cannot go with"),
        (("card", tmp_path, "--print", "-o", "x.md"), "--print writes nothing, so --output"),
        (("card", tmp_path, "--print", "--picture", "x.png"), "--print writes nothing, so --picture"),
        (("card", tmp_path, "--print", "--stats", "x"), "--print writes nothing, so --stats"),
    ):
        with pytest.raises(TCSPError, match=said):
            tcsp(*words)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert (full / "mine.txt").read_text() == "keep"


def test_overwrite_deletes_no_input(dense: Path, texts: Path, tmp_path: Path) -> None:
    """A run's folder that holds the dense model, its statistics and its data is not replaced by what they give."""
    run = tmp_path / "run"
    shutil.copytree(dense, run / "dense")
    (run / "stats").mkdir()
    shutil.copyfile(texts, run / "texts.txt")
    before = sorted(run.rglob("*"))
    for said, words in (
        ("MODEL", ("compress", run / "dense", "--hidden-size", 16)),
        ("--stats", ("compress", dense, "--stats", run / "stats", "--hidden-size", 16)),
        ("--data", ("compress", dense, "--data", run / "texts.txt", "--hidden-size", 16)),
        ("--data", ("compress", dense, "--data", f"{texts}+{run / 'texts.txt'}", "--hidden-size", 16)),
        ("--data", ("train", "--model", dense, "--data", run, "--hidden-size", 16)),
        ("--model", ("train", "--model", run / "dense", "--data", texts, "--hidden-size", 16)),
        ("--student", ("train", "--model", dense, "--data", texts, "--student", run / "dense")),
        ("--model", ("finetune", "--model", run / "dense", "--task", "mrpc")),
        ("--teacher", ("finetune", "--model", dense, "--task", "mrpc", "--teacher", run / "dense")),
        ("--model", ("demo", "--model", run / "dense")),
    ):
        with pytest.raises(TCSPError, match=f"^{said} .* is in the output folder .*: name another one"):
            tcsp(*words, "-o", run, "--overwrite")
    for said, words in (("MODEL", (run / "dense",)), ("--stats", (dense, "--stats", run / "stats"))):
        with pytest.raises(TCSPError, match=f"^{said} .* is in the output folder"):
            tcsp("export", words[0], run, *words[1:], "--format", "bert", "--overwrite")
    assert sorted(run.rglob("*")) == before


def test_impossible_cuts_are_refused_before_calibration(
    dense: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("compress", "demo"):
        monkeypatch.setattr(f"tcsp_hf.cli.{name}.calibrate", lambda *args, **kwargs: pytest.fail("calibrated"))
    told = ("compress", dense, "--data", texts, "-o", tmp_path / "x")
    for more, match in (
        (("--remove", 44), "remove is 44"),
        (("--hidden-size", 9999), "from 1 to 32"),
        (("--remove", 0.4, "--axes", "filter"), "axes is"),
        (("--remove", 0.4, "--subspace", "balancd"), "subspace is 'balancd'"),
        (("--remove", 0.4, "--device", "gpu"), "device is 'gpu'"),
    ):
        with pytest.raises(TCSPError, match=match):
            tcsp(*told, *more)
    with pytest.raises(TCSPError, match="has a head"):
        tcsp("demo", "--model", dense, "-o", tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_folder_comes_before_the_copy_of_that_name(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_name("all-MiniLM-L6-v2") == demo_model_path()
    (tmp_path / "all-MiniLM-L6-v2").mkdir()
    assert resolve_name("all-MiniLM-L6-v2") == "all-MiniLM-L6-v2"


def test_statistics_of_another_width(dense: Path, tmp_path: Path) -> None:
    other = make_dense(BERT, torch.float32, 0, hidden_size=16, num_attention_heads=2)
    calibrate(other, make_rows(BERT, 8), progress=False).save(tmp_path / "stats")
    with pytest.raises(TCSPError, match="hidden size 16"):
        tcsp("inspect", dense, "--stats", tmp_path / "stats")


def test_errors_are_one_line_and_status_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.argv", ["tcsp", "compress", "x", "-o", str(tmp_path / "x")])
    with pytest.raises(SystemExit) as stop:
        main.run()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: Give exactly one of")


def test_the_card_says_what_was_switched_off(dense: Path, texts: Path, tmp_path: Path) -> None:
    tcsp("compress", dense, "--data", texts, "--hidden-size", 16, "--no-refit", "--quiet", "-o", tmp_path / "x")
    assert "--no-refit" in (tmp_path / "x" / "README.md").read_text()


def test_a_model_without_its_tokenizer_is_refused(dense: Path, texts: Path, tmp_path: Path) -> None:
    """transformers 5 makes up a tokenizer of special tokens, and every text would be [UNK]."""
    bare, small, bert, bytes_ = (tmp_path / name for name in ("bare", "small", "bert", "bytes"))
    AutoModelForSequenceClassification.from_pretrained(dense).save_pretrained(bare)
    make_small(BERT).save_pretrained(small)
    for words in (
        ("calibrate", bare, "--data", texts, "-o", tmp_path / "x"),
        ("compress", bare, "--data", texts, "--hidden-size", 16, "-o", tmp_path / "x"),
        ("export", small, tmp_path / "x", "--format", "bert"),
    ):
        with pytest.raises(TCSPError, match=r"no tokenizer beside the model .*: put the model's own there"):
            tcsp(*words)
    assert not (tmp_path / "x").exists()
    make_dense(find("t5-EncoderModel"), torch.float32).save_pretrained(bytes_)
    with pytest.raises(TCSPError, match="no tokenizer"):
        load_tokenizer(str(bytes_))
    ByT5Tokenizer().save_pretrained(bytes_)
    assert load_tokenizer(str(bytes_))("ab")["input_ids"] == [100, 101, 1], "of bytes: it has no vocabulary file"
    make_dense(BERT, torch.float32).save_pretrained(bert)
    (bert / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "w0"]))
    assert load_tokenizer(str(bert))("w0")["input_ids"] == [2, 5, 3]


@pytest.mark.parametrize(
    "fields",
    [{"hidden_size": 31}, {"hidden_act": "none"}, {"vocab_size": 0}, {"vocab_size": "many"}, {"hidden_size": -4}],
    ids=str,
)
def test_a_configuration_of_no_model_is_said_in_one_line(dense: Path, fields: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(dense, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(TCSPError, match="configuration of"):
        tcsp("inspect", folder)
    with pytest.raises(TCSPError, match="cannot be loaded"):
        load_model(str(folder))
    with pytest.raises(TCSPError, match="cannot be loaded"):
        load_for_task(str(folder), find_task("mrpc"))


def test_weights_of_other_sizes_are_said_in_one_line(dense: Path, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(dense, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 99}))
    with pytest.raises(TCSPError, match="cannot be loaded"):
        load_model(str(folder))


@pytest.mark.parametrize("named", [["BertForRanking"], ["pipeline"], "BertModel"])
def test_a_class_that_is_unknown_is_no_bare_model(dense: Path, named: Any, tmp_path: Path) -> None:
    """Its head would be gone without a word."""
    folder = tmp_path / "odd"
    shutil.copytree(dense, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": named}))
    with pytest.raises(TCSPError, match="names no class of transformers"):
        load_model(str(folder))
    (folder / "config.json").write_text(json.dumps({name: config[name] for name in config if name != "architectures"}))
    assert type(load_model(str(folder))).__name__ == "BertModel"


def test_data_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    carried = load_data("squad-sample")
    assert len(carried) == len(set(carried)) == 1618 and carried == load_data("squad-sample")
    assert sum(len(text) < 300 for text in carried[:200]) > 180, "sentences, with some paragraphs among them"
    (tmp_path / "glue" / "sst2").mkdir(parents=True)
    (tmp_path / "glue" / "sst2" / "train.json").write_text('{"sentence": "good", "label": 1}\n')
    monkeypatch.setenv("TCSP_DATA_DIR", str(tmp_path))
    assert load_data("sst2")["sentence"] == ["good"]
    with pytest.raises(TCSPError, match=r"validation.*train\.json"):
        load_data("sst2", "validation")
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1")
    with pytest.raises(TCSPError, match="cannot be read"):
        load_data(str(broken))
    with pytest.raises(TCSPError, match="no data file"):
        load_data(str(Path(__file__)))


@pytest.mark.slow
@pytest.mark.shared
def test_the_table_of_subspaces_on_a_real_classifier(
    shared: Path, monkeypatch: pytest.MonkeyPatch, all_threads: None
) -> None:
    """`tcsp bench subspaces` exits with an error when the refit model falls short of these bars."""
    monkeypatch.setenv("TCSP_DATA_DIR", str(shared / "data"))
    model = shared / "weights" / "minilm-l6-sst2"
    bars = ("--max-accuracy-drop", 0.0108, "--max-kl", 0.018)
    found = json.loads(tcsp("bench", "subspaces", "--model", model, "--widths", 216, *bars, "--json"))
    rows = {(row["projection"], row["subspace"]): row for row in found["rows"] if not row["refit"]}
    assert found["dense_accuracy"] == pytest.approx(0.8888, abs=0.003)
    assert rows["per_site", "pca"]["kl"] <= 0.045
    assert rows["shared", "pca"]["accuracy"] >= 0.855
    assert rows["per_site", "balanced"]["kl"] <= 0.030
    assert rows["per_site", "balanced"]["kl"] < rows["per_site", "pca"]["kl"] < rows["shared", "pca"]["kl"]


@pytest.mark.parametrize("words", ["could not create a primitive", "DefaultCPUAllocator: can't allocate memory"])
def test_no_memory_is_said_in_one_line(words: str) -> None:
    """As oneDNN and PyTorch say it; another RuntimeError is a bug and keeps its traceback."""
    error = RuntimeError(words)
    assert ends_a_command(error)
    assert "memory" in message_of(error)
    assert not ends_a_command(RuntimeError("shapes differ"))


def test_a_broken_connection_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The HTTP client's errors are no OSErrors."""

    def broken(*args: Any, **kwargs: Any) -> None:
        raise http.client.IncompleteRead(b"")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", broken)
    with pytest.raises(TCSPError, match="connection broke"):
        load_tokenizer("owner/name")
    assert ends_a_command(http.client.IncompleteRead(b""))


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "a/b/c"])
def test_a_folder_that_is_not_there_is_named(name: str, texts: Path, tmp_path: Path) -> None:
    expected = f"no folder '{name}'.*owner/model"
    for command in (("inspect", name), ("compress", name, "--data", texts, "--remove", 0.4, "-o", tmp_path / "x")):
        with pytest.raises(TCSPError, match=expected):
            tcsp(*command)
    for load in (load_model, load_tokenizer):
        with pytest.raises(TCSPError, match=expected):
            load(name)
    with pytest.raises(TCSPError, match=expected):
        load_for_task(name, find_task("mrpc"))


def test_a_card_shows_no_folder_of_joined_data(dense: Path, texts: Path, tmp_path: Path) -> None:
    tcsp("compress", dense, "-o", tmp_path / "small", "--data", f"{texts}+{texts}", "--hidden-size", 16, "--quiet")
    card = (tmp_path / "small" / "README.md").read_text()
    assert f"--data {texts.name}+{texts.name}" in card and str(tmp_path) not in card
