"""Model cards: one regex over the whole card, the code that a card shows really run, and no file of the user's lost."""

import http.client
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from common import (
    EOS,
    ONE_SOURCE_CASES,
    Case,
    calibrated,
    find,
    make_dense,
    make_rows,
    make_small,
    make_tokenizer,
    make_uneven,
)
from huggingface_hub import ModelCard, constants
from test_cli import tcsp
from tokenizers.processors import TemplateProcessing
from training import make_trainer
from transformers import PreTrainedTokenizerFast, Trainer, TrainerControl, TrainerState, TrainingArguments

from tcsp_hf import TCSPError, calibrate, compress
from tcsp_hf.publish import CardResults, Evaluation, Latency, ModelCardCallback, render_card, write_card
from tcsp_hf.publish.card import licence_of
from tcsp_hf.publish.checkpoint import read_checkpoint
from tcsp_hf.publish.results import RESULTS_FILE
from tcsp_hf.publish.secrets import MASK, redact
from tcsp_hf.publish.shelf import shelve_card

CLASSIFIER = find("bert-ForSequenceClassification")
FAKE_TOKEN = "hf_" + "aB3" * 11 + "x"
RESULTS = CardResults(
    command="tcsp compress my-org/dense --remove 0.4 -o small",
    base_model="my-org/dense",
    license="apache-2.0",
    language="en",
    machine="2 cores, float32",
    evaluations=(
        Evaluation("text-classification", "nyu-mll/glue", "validation", "accuracy", 0.9, 0.91, config="sst2"),
        Evaluation("text-classification", "nyu-mll/glue", "validation", "f1", 0.88, config="sst2"),
    ),
    latency=(Latency(1, 32, 3.0, 2.0), Latency(8, 128, 30.0, 15.0)),
)


def tokenizer_of(case: Case) -> PreTrainedTokenizerFast:
    """The tests' words, framed as the family frames a text."""
    tokenizer = make_tokenizer()
    if case.family == "t5":
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", EOS)]
        )
        tokenizer.eos_token = "</s>"
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_small(CLASSIFIER).save_pretrained(tmp_path / "small")
    make_tokenizer().save_pretrained(tmp_path / "small")
    return tmp_path / "small"


WHOLE_CARD = r"""---
base_model: my-org/dense
datasets:
- nyu-mll/glue
language: en
library_name: transformers
license: apache-2\.0
metrics:
- accuracy
- f1
pipeline_tag: text-classification
tags:
- tcsp
- compression
- subspace-projection
model-index:
- name: my-small
  results:
  - task:
      type: text-classification
    dataset:
      name: nyu-mll/glue sst2
      type: nyu-mll/glue
      config: sst2
      split: validation
    metrics:
    - type: accuracy
      value: 0\.9
    - type: f1
      value: 0\.88
---

# my-small

\[my-org/dense\]\(https://huggingface\.co/my-org/dense\) made smaller with TCSP (.|\n)*\. 4\d\.\d% of the parameters \
were removed, embeddings apart; the hidden size went from 32 to 16\.

Projection: `per_site`, `balanced`\. Calibration: 40 sequences, \d+ tokens, seed 0, data fingerprint `[0-9a-f]{32}`\.

## Size

\|  \| dense \| compressed \| change \|
\|---\|---\|---\|---\|
\| hidden size \| 32 \| 16 \| -50\.0% \|
\| parameters \| 20,371 \| [\d,]+ \| -\d+\.\d% \|
\| without embeddings \| 15,187 \| [\d,]+ \| -4\d\.\d% \|
\| bytes on disk \|  \| [\d,]+ \|  \|

## What was cut

.*

\| layer \| hidden size \| kept energy \| neurons \| heads \| query/key size \| value size \|
\|---\|---\|---\|---\|---\|---\|---\|
\| dense \| 32 \| 1 \| 40 \| 4 \| 8 \| 8 \|
\| embeddings \| 16 \| 0\.\d{4} \| - \| - \| - \| - \|
\| layer\.0 \| 16 \| 0\.\d{4}, 0\.\d{4} \| 40 \| 4 \| 8 \| 8 \|
\| layer\.1 \| 16 \| 0\.\d{4}, 0\.\d{4} \| 40 \| 4 \| 8 \| 8 \|

## Evaluation

\| data \| split \| metric \| dense \| compressed \| change \|
\|---\|---\|---\|---\|---\|---\|
\| nyu-mll/glue sst2 \| validation \| accuracy \| 0\.9100 \| 0\.9000 \| -0\.0100 \|
\| nyu-mll/glue sst2 \| validation \| f1 \| - \| 0\.8800 \| - \|

## Latency

Measured on 2 cores, float32\. .*

\| batch × tokens \| dense \| compressed \| faster by \|
\|---\|---\|---\|---\|
\| 1 × 32 \| 3\.0 ms \| 2\.0 ms \| 1\.50 × \|
\| 8 × 128 \| 30\.0 ms \| 15\.0 ms \| 2\.00 × \|

!\[A picture\]\(picture\.png\)

\*A picture\*

## How to load it

With the package `tcsp_hf`:

```python
(.|\n)*
model = AutoModelForSequenceClassification\.from_pretrained\("me/my-small"\)
(.|\n)*
```

Without it, .*:

```python
(.|\n)*
model = AutoModelForSequenceClassification\.from_pretrained\("me/my-small", trust_remote_code=True\)
tokenizer = AutoTokenizer\.from_pretrained\("me/my-small", trust_remote_code=True\)
```

As a pipeline:

```python
(.|\n)*
pipe = pipeline\("text-classification", "me/my-small", trust_remote_code=True\)
(.|\n)*
```

## Limitations

(- .*\n)+
## Licence

The weights derive from the dense model: the licence of \[my-org/dense\]\(.*\) holds, `apache-2\.0`\.

## How it was made

Card filled by tcsp_hf \S+ with transformers \S+\.

```bash
tcsp compress my-org/dense --remove 0\.4 -o small
```

\| option \| value \|
\|---\|---\|
\| method version \| `\d+` \|
(\| .* \| `.*` \|\n)+"""


def test_the_whole_card(folder: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"\x89PNG")
    path = write_card(folder, RESULTS, name="me/my-small", pictures={"A picture": picture})
    text = path.read_text()
    assert re.fullmatch(WHOLE_CARD.replace("\\\n", ""), text), text
    assert (folder / "picture.png").read_bytes() == b"\x89PNG"
    data = ModelCard.load(path).data
    assert data.base_model == "my-org/dense"
    assert [(r.metric_type, r.metric_value) for r in data.eval_results] == [("accuracy", 0.9), ("f1", 0.88)]


@pytest.mark.parametrize("case", ONE_SOURCE_CASES, ids=str)
def test_the_code_of_a_card_runs(case: Case, tmp_path: Path) -> None:
    model = make_uneven(case)
    model.save_pretrained(tmp_path)
    tokenizer_of(case).save_pretrained(tmp_path)
    text = render_card(tmp_path, name=str(tmp_path))
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) in (2, 3)
    for block in blocks:
        exec(block, {})


@pytest.mark.parametrize("case", ONE_SOURCE_CASES, ids=str)
def test_sizes_of_uneven_models(case: Case, tmp_path: Path) -> None:
    """Every layer's own sizes, as the configuration gives them."""
    model = make_uneven(case)
    model.save_pretrained(tmp_path)
    text = render_card(tmp_path)
    if case.family == "bert":
        assert "| layer.0 | 32 | - | 10 | 3 | 4 | 5 |" in text
        assert "| layer.1 | 17, 20 | - | 40 | 2 | 8 | 3 |" in text
    else:
        assert "| encoder.1 | 20 | - | 40 | 3 | 6 | 4 |" in text
        decoder = "| decoder.1 | 24 | - | 16 | 3, 4 | 8 | 6, 7 |" in text
        assert decoder == model.config.is_encoder_decoder
    assert f"{sum(p.numel() for p in model.parameters()):,}" in text


def test_uneven_hidden_sizes_are_a_range(tmp_path: Path) -> None:
    case = find("bert-Model")
    dense = make_dense(case)
    small = compress(dense, calibrated(case, dense), energy=0.9, refit=False, multiple_of=1)
    widths = small.config.site_widths().values()
    assert min(widths) < max(widths)
    small.save_pretrained(tmp_path)
    text = render_card(tmp_path)
    assert f"went from 32 to between {min(widths)} and {max(widths)}, by site." in text
    assert f"| hidden size | 32 | between {min(widths)} and {max(widths)}, by site |  |" in text


def test_a_users_card_is_left_alone(folder: Path) -> None:
    (folder / "README.md").write_text("mine")
    with pytest.raises(TCSPError, match=r"README\.md exists"):
        write_card(folder, RESULTS)
    assert (folder / "README.md").read_text() == "mine" and not (folder / RESULTS_FILE).exists()
    write_card(folder, RESULTS, overwrite=True)
    assert (folder / "README.md").read_text().startswith("---")


def test_a_missing_picture_writes_nothing(folder: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(TCSPError, match=r"nowhere\.png"):
        write_card(folder, RESULTS, pictures={"x": tmp_path / "nowhere.png"})
    assert sorted(path.name for path in folder.iterdir()) == before


def test_pictures_of_one_name_are_refused(folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(b"\x89PNG")
    before = sorted(path.name for path in folder.iterdir())
    both = {"first": tmp_path / "a" / "x.png", "second": tmp_path / "b" / "x.png"}
    for write in (
        lambda: write_card(folder, RESULTS, pictures=both),
        lambda: shelve_card(folder, tmp_path / "shelf" / "one.md", RESULTS, pictures=both),
    ):
        with pytest.raises(TCSPError, match=r"Two pictures are called x\.png"):
            write()
    assert sorted(path.name for path in folder.iterdir()) == before and not (tmp_path / "shelf").exists()


def test_a_relative_folder_is_no_repository_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`runs/dense` would be a name on the Hub: the card says the same wherever it is written."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "elsewhere").mkdir()
    make_dense(CLASSIFIER, torch.float32).save_pretrained(tmp_path / "runs" / "dense")
    (tmp_path / "runs" / "dense" / "README.md").write_text("---\nlicense: mit\n---\n")
    monkeypatch.chdir(tmp_path)
    dense = transformers.BertForSequenceClassification.from_pretrained("runs/dense")
    compress(dense, calibrate(dense, make_rows(CLASSIFIER), progress=False), hidden_size=16).save_pretrained("small")
    here = render_card("small", name="me/small")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert render_card("../small", name="me/small") == here
    assert "license: mit" in here and "base_model" not in here and str(tmp_path) not in here


def test_a_trained_models_card_says_so(folder: Path, tmp_path: Path) -> None:
    assert "and then trained" not in render_card(folder) and "before the training" not in render_card(folder)
    for share, words in ((0.0, "labels alone"), (1.0, "the dense model's outputs (1)")):
        trainer = make_trainer(CLASSIFIER, tmp_path / "run", max_steps=1, distillation=share)
        trainer.train()
        trainer.save_model(str(tmp_path / f"trained-{share}"))
        card = render_card(tmp_path / f"trained-{share}")
        assert f"without labels, and then trained (on {words})" in card.replace("\n", " ")
        assert "| measured_kl (before the training) |" in card


def test_results_survive_and_merge(folder: Path) -> None:
    write_card(folder, RESULTS)
    newer = CardResults(evaluations=(Evaluation("text-classification", "nyu-mll/glue", "validation", "f1", 0.5),))
    write_card(folder, newer, overwrite=True)
    found = CardResults.load(folder / RESULTS_FILE)
    assert found.command == RESULTS.command and found.latency == RESULTS.latency
    assert [entry.value for entry in found.evaluations] == [0.9, 0.88, 0.5]  # the last one is of another config
    assert CardResults.from_dict(json.loads(found.to_json())) == found


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "cannot be read"),
        ("[]", "must be a JSON object"),
        ('{"scores": []}', "unknown field 'scores'"),
        ('{"command": 3}', "command is 3"),
        ('{"evaluations": [{"task": "x"}]}', r"evaluations\[0\] lacks the field 'dataset'"),
        ('{"latency": [{"batch": 1, "length": 2, "dense_ms": "3", "small_ms": 1}]}', r"latency\[0\]: dense_ms is '3'"),
        ('{"latency": [{"batch": true, "length": 2, "dense_ms": 3, "small_ms": 1}]}', "batch is True"),
        ('{"latency": [{"batch": 1, "length": 2, "dense_ms": 3, "small_ms": 0}]}', "small_ms is 0"),
        ('{"latency": [{"batch": 1, "length": 2, "dense_ms": NaN, "small_ms": 1}]}', "dense_ms is nan"),
        ('{"pictures": {"x": "../secret.png"}}', r"\.\./secret\.png"),
    ],
)
def test_damaged_results(tmp_path: Path, content: str, named: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(TCSPError, match=named):
        CardResults.load(tmp_path / "results.json")


def test_no_token_in_a_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-token-of-another-form")
    command = f"tcsp push x --token {FAKE_TOKEN} --or a-token-of-another-form"
    write_card(folder, CardResults(command=command, machine=f"m {FAKE_TOKEN}", latency=(Latency(1, 1, 1.0, 1.0),)))
    for name in ("README.md", RESULTS_FILE):
        text = (folder / name).read_text()
        assert FAKE_TOKEN not in text and "a-token-of-another-form" not in text and MASK in text
    assert redact("hf_hub and hf_xet are no tokens") == "hf_hub and hf_xet are no tokens"


def test_base_model_and_licence_from_the_dense_folder(tmp_path: Path) -> None:
    dense_folder = tmp_path / "dense"
    make_dense(CLASSIFIER).save_pretrained(dense_folder)
    (dense_folder / "README.md").write_text("---\nlicense: mit\n---\n")
    dense = type(make_dense(CLASSIFIER)).from_pretrained(dense_folder)
    compress(dense, calibrated(CLASSIFIER, dense), hidden_size=16).save_pretrained(tmp_path / "small")
    text = render_card(tmp_path / "small")
    assert "the licence of the dense model holds, `mit`" in text
    assert "`dense` made smaller" in text and str(tmp_path) not in text
    assert ModelCard(text).data.get("base_model") is None, "a folder is no name on the Hub"


@pytest.mark.parametrize("front_matter", ["license: [mit", "license: {a: b: c}", "- mit", "license: 3"])
def test_a_broken_card_of_the_dense_model_ends_nothing(tmp_path: Path, front_matter: str) -> None:
    """A licence line is optional: the last step of a long command does not hang on it."""
    (tmp_path / "README.md").write_text(f"---\n{front_matter}\n---\n")
    assert licence_of(str(tmp_path), None) is None


def test_a_broken_connection_ends_no_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise http.client.IncompleteRead(b"")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(ModelCard, "load", broken)
    assert licence_of("", "my-org/dense") is None


def test_pictures_are_copied_after_all_that_can_fail(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new.png").write_bytes(b"png")
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(TCSPError, match=r"'gone\.png'"):
        write_card(folder, CardResults(pictures={"x": "gone.png"}), pictures={"y": tmp_path / "new.png"})
    assert sorted(path.name for path in folder.iterdir()) == before
    write_card(folder, pictures={"y": tmp_path / "new.png"})
    assert (folder / "new.png").is_file() and "![y](new.png)" in (folder / "README.md").read_text()


def test_an_index_lists_cards_that_it_cannot_read(folder: Path, tmp_path: Path) -> None:
    cards = tmp_path / "cards"
    cards.mkdir()
    (cards / "odd.md").write_text("---\nlicense: [mit\n---\n")
    shelve_card(folder, cards / "mine.md", RESULTS, index=True)
    index = (cards / "README.md").read_text()
    assert "| [odd](odd.md) | - | - | its metadata cannot be read |" in index
    assert "[mine](mine.md) | my-org/dense |" in index


def test_a_card_that_fails_ends_no_training(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(folder, tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / RESULTS_FILE).write_text("{")
    args, state = TrainingArguments(tmp_path, use_cpu=True), TrainerState(global_step=2)
    ModelCardCallback().on_save(args, state, TrainerControl(), model=make_small(CLASSIFIER))
    assert "No model card was written" in caplog.text and "cannot be read" in caplog.text
    assert not (tmp_path / "checkpoint-2" / "README.md").exists()


def test_a_trainer_writes_cards(tmp_path: Path) -> None:
    model = make_small(CLASSIFIER)
    rows = [{"input_ids": [3, 7 + i, 4], "labels": i % 3} for i in range(4)]
    args = TrainingArguments(
        tmp_path / "out",
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="no",
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=make_tokenizer(),
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
        callbacks=[ModelCardCallback("my-org/rows")],
    )
    trainer.train()
    card = ModelCard.load(tmp_path / "out" / "checkpoint-2" / "README.md")
    scores = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert set(scores) == {"accuracy", "loss"}
    assert scores["accuracy"] == trainer.evaluate()["eval_accuracy"]


def test_card_command(folder: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores.json"
    scores.write_text(RESULTS.to_json())
    shown = tcsp("card", folder, "--results", scores, "--license", "mit", "--print")
    assert "license: mit" in shown and not (folder / "README.md").exists()
    assert "Card:" in tcsp("card", folder, "--results", scores)
    with pytest.raises(TCSPError, match="exists"):
        tcsp("card", folder)
    assert "accuracy" in tcsp("card", folder, "--print"), "the results beside the checkpoint"


def test_compress_writes_a_card_with_its_command(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    dense, texts, small = tmp_path / "dense", tmp_path / "texts.txt", tmp_path / "small"
    make_dense(CLASSIFIER).float().save_pretrained(dense)
    make_tokenizer().save_pretrained(dense)
    texts.write_text("\n".join(f"w{i} w{i + 1} w{i + 2}" for i in range(40)))
    tcsp("calibrate", dense, "--data", texts, "-o", tmp_path / "stats", "--json")
    tcsp("compress", dense, "--stats", tmp_path / "stats", "--hidden-size", 16, "-o", small, "--json")
    text = (small / "README.md").read_text()
    assert "\ntcsp compress dense --output small --hidden-size 16 --stats stats --json\n" in text
    assert str(tmp_path) not in text and text.count("# small") == 1
    tcsp("card", small, "--stats", tmp_path / "stats", "--overwrite")
    assert "(spectrum.png)" in (small / "README.md").read_text()
    assert (small / "spectrum.png").read_bytes().startswith(b"\x89PNG")
    tcsp("calibrate", dense, "--data", texts, "--seed", 5, "-o", tmp_path / "other", "--json")
    with pytest.raises(TCSPError, match="not those"):
        tcsp("card", small, "--stats", tmp_path / "other", "--overwrite")


def test_a_missing_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calibrated(CLASSIFIER, make_dense(CLASSIFIER)).save(tmp_path / "stats")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(TCSPError, match=r"pip install 'tcsp_hf\[plots\]'"):
        tcsp("card", folder, "--stats", tmp_path / "stats")
    assert not (folder / "README.md").exists()


def test_incomplete_checkpoints(folder: Path) -> None:
    assert read_checkpoint(folder).class_name == "TCSPBertForSequenceClassification"
    with pytest.raises(TCSPError, match="not a folder"):
        read_checkpoint(folder / "nowhere")
    config = folder / "config.json"
    good = config.read_text()
    for change, named in (
        ({"auto_map": {}}, "no auto_map entry for AutoConfig"),
        ({"architectures": ["BertModel"]}, "architectures"),
        ({"model_type": "bert"}, "model_type is 'bert'"),
        ({"layer_intermediate_sizes": [40, 24]}, "has the shape"),
    ):
        config.write_text(json.dumps({**json.loads(good), **change}))
        with pytest.raises(TCSPError, match=named):
            read_checkpoint(folder)
    config.write_text(good)
    for name in ("modeling_tcsp.py", "configuration_tcsp_bert.py", "model.safetensors"):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        with pytest.raises(TCSPError, match=re.escape(name)):
            read_checkpoint(folder)
        if name == "model.safetensors":
            (folder / name).write_bytes(content[:-7])
            with pytest.raises(TCSPError, match="damaged"):
                read_checkpoint(folder)
        (folder / name).write_bytes(content)
    read_checkpoint(folder)


def test_shards_and_tied_weights_are_complete(tmp_path: Path) -> None:
    for i, name in enumerate(("bert-ForMaskedLM", "t5-Model", "bert-Model")):
        make_small(find(name)).save_pretrained(tmp_path / str(i), max_shard_size="10KB")
        checkpoint = read_checkpoint(tmp_path / str(i))
        assert checkpoint.bytes == sum(p.stat().st_size for p in (tmp_path / str(i)).glob("*.safetensors"))
    shard = next((tmp_path / "0").glob("model-00002-of-*.safetensors"))
    shard.unlink()
    with pytest.raises(TCSPError, match=re.escape(shard.name)):
        read_checkpoint(tmp_path / "0")


def test_results_of_no_checkpoint(tmp_path: Path) -> None:
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(TCSPError, match="no compressed checkpoint"):
        render_card(tmp_path)


def test_cards_on_a_shelf(folder: Path, tmp_path: Path) -> None:
    """The card elsewhere, its picture beside it, an index over all cards; no file of the user's is touched."""
    picture, scores = tmp_path / "bars.png", tmp_path / "scores.json"
    picture.write_bytes(b"\x89PNG")
    scores.write_text(RESULTS.to_json())
    shelf = tmp_path / "model_cards"
    told = ("card", folder, "--results", scores, "--picture", f"Bars={picture}", "--index")
    before = sorted(path.name for path in folder.iterdir())
    tcsp(*told, "-o", shelf / "one.md")
    tcsp(*told, "-o", shelf / "two.md", "--name", "my-org/second")
    assert sorted(path.name for path in folder.iterdir()) == before
    assert sorted(path.name for path in shelf.iterdir()) == [
        "README.md",
        "one-bars.png",
        "one.md",
        "two-bars.png",
        "two.md",
    ]
    assert "# one\n" in (shelf / "one.md").read_text() and "![Bars](one-bars.png)" in (shelf / "one.md").read_text()
    index = (shelf / "README.md").read_text()
    row = r"\| \[one\]\(one\.md\) \| my-org/dense \| \d+\.\d% \| nyu-mll/glue sst2: accuracy 0\.9000; .* \|\n\| \[two\]"
    assert re.search(row, index)
    with pytest.raises(TCSPError, match=r"one\.md exists"):
        tcsp(*told, "-o", shelf / "one.md")
    (shelf / "README.md").write_text("mine")
    with pytest.raises(TCSPError, match="is no index of cards"):
        tcsp(*told, "-o", shelf / "three.md")
    assert (shelf / "README.md").read_text() == "mine" and not (shelf / "three.md").exists()
    with pytest.raises(TCSPError, match="give -o"):
        tcsp("card", folder, "--index")
