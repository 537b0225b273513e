"""The trainer on tiny models of both families: what it compresses, learns, saves, resumes and refuses."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from common import Case, find, make_dense, make_small, make_tokenizer, planted
from datasets import Dataset
from processes import on_two_ranks
from training import make_arguments, make_data, make_plain_trainer, make_trainer, same, weights
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments

from tcsp_hf import TCSPError, TCSPTrainer
from tcsp_hf.calibration import calibrate
from tcsp_hf.compression import compress
from tcsp_hf.train.sites import SiteSums, SiteTargets, record_compressed, record_dense

BERT = find("bert-ForSequenceClassification")
T5 = find("t5-ForConditionalGeneration")
HEADS = [
    find(name)
    for name in (
        "bert-ForSequenceClassification",
        "bert-ForQuestionAnswering",
        "bert-ForTokenClassification",
        "bert-ForMaskedLM",
        "bert-ForMultipleChoice",
        "bert-Model",
        "t5-ForConditionalGeneration",
        "t5-ForSequenceClassification",
        "t5-ForTokenClassification",
        "t5-ForQuestionAnswering",
        "t5-EncoderModel",
        "mt5-ForConditionalGeneration",
    )
]

# transformers 5.23 renamed it
_FIELDS = TrainingArguments.__dataclass_fields__
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in _FIELDS else "gradient_checkpointing"


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("case", HEADS, ids=str)
@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no-labels"])
def test_train_compresses_and_learns(case: Case, labelled: bool, tmp_path: Path) -> None:
    # far below the dense width, and all rows in one step: there is something to learn, and no noise of batches
    trainer = make_trainer(
        case, tmp_path, labelled=labelled, hidden_size=8, num_train_epochs=20, per_device_train_batch_size=64
    )
    dense = trainer.model
    before = weights(dense)
    trainer.train()
    assert trainer.model.config.model_type.startswith("tcsp_")
    assert trainer.model.config.hidden_size == 8
    assert trainer.model.config.projection["calibration"]["sequences"] == len(trainer.train_dataset)
    assert same(before, weights(dense)), "the teacher must not be trained"
    found = losses(trainer)
    assert sum(found[-5:]) < sum(found[:5])


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_rows_with_a_label_for_every_output(problem: str, tmp_path: Path) -> None:
    dense = make_dense(BERT, torch.float32, problem_type=problem)
    rows = [{**row, "labels": [float((i + j) % 2) for j in range(3)]} for i, row in enumerate(make_data(BERT, False))]
    trainer = make_trainer(BERT, tmp_path, model=dense, num_train_epochs=1, _train_dataset=rows)
    trainer.train()
    assert trainer.calibration.sequences == len(rows) and all(loss > 0 for loss in losses(trainer))


class _Probabilities(TrainerCallback):
    """Keeps what the model's dropout is at the first step."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.found = self.found or probabilities(model)


def probabilities(model: torch.nn.Module) -> dict[str, float]:
    found = {}
    for name, module in model.named_modules():
        value = module.p if isinstance(module, torch.nn.Dropout) else getattr(module, "dropout", None)
        if isinstance(value, float):
            found[name] = value
    return found


@pytest.mark.parametrize("case", [BERT, T5], ids=str)
@pytest.mark.parametrize(
    ("labelled", "fields", "on"),
    [
        (True, {}, False),
        (False, {}, False),
        (True, {"dropout": True}, True),
        (False, {"dropout": True}, True),
        (True, {"distillation": 0.0, "dropout": False}, False),
        (True, {"distillation": 0.0}, True),
    ],
    ids=str,
)
def test_dropout_where_labels_alone_count(
    case: Case, labelled: bool, fields: dict[str, Any], on: bool, tmp_path: Path
) -> None:
    seen = _Probabilities()
    trainer = make_trainer(case, tmp_path, labelled=labelled, max_steps=2, _callbacks=[seen], **fields)
    trainer.train()
    assert len(seen.found) > 4 and all((value > 0) == on for value in seen.found.values())
    assert all(value > 0 for value in probabilities(trainer.model).values()), "only while it is trained"


def test_hidden_size_of_a_compressed_model_is_left_alone(tmp_path: Path) -> None:
    small = make_small(BERT)
    trainer = make_trainer(BERT, tmp_path, model=small, hidden_size=None, num_train_epochs=1)
    trainer.train()
    assert trainer.model is small
    assert trainer.calibration is None


def test_compress_then_train_is_train(tmp_path: Path) -> None:
    whole = make_trainer(BERT, tmp_path / "whole")
    whole.train()
    parts = make_trainer(BERT, tmp_path / "parts")
    assert parts.compress().config.hidden_size == 16
    parts.train()
    assert same(weights(whole.model), weights(parts.model))
    with pytest.raises(TCSPError, match="compressed already"):
        parts.compress()


def test_a_given_calibration_is_used(tmp_path: Path) -> None:
    dense = make_dense(BERT, torch.float32)
    stats = calibrate(dense, make_data(BERT, False, 30), progress=False)
    trainer = make_trainer(BERT, tmp_path, model=dense, _calibration=stats, num_train_epochs=1)
    trainer.train()
    assert trainer.model.config.projection["calibration"]["sequences"] == 30


@pytest.mark.parametrize("case", [BERT, T5], ids=str)
def test_targets_are_the_states_where_nothing_is_lost(case: Case) -> None:
    """On a stream that lies in the subspace, the solved encoders give the compressed states themselves."""
    k = 16
    dense = planted(case, k, own=case.family == "bert").float()
    rows = make_data(case, True, 48)
    stats = calibrate(dense, rows, batch_size=16, progress=False)
    small = compress(dense, stats, hidden_size=k, multiple_of=1)
    trainer_rows = [{name: torch.tensor([value]) for name, value in row.items()} for row in rows]
    targets = SiteTargets.solve([SiteSums.collect(dense, small, trainer_rows)])
    inputs = trainer_rows[0]
    with (
        torch.no_grad(),
        record_dense(dense, targets.encoders) as expected,
        record_compressed(small, targets.encoders) as carried,
    ):
        dense(**inputs)
        small(**inputs)
    assert set(expected) == set(carried) == set(targets.encoders)
    for name in expected:
        error = (expected[name] - carried[name]).norm() / carried[name].norm()
        assert error < 0.05, name  # the ridge shrinks a little


def test_distillation_gradients(tmp_path: Path) -> None:
    """The loss is near zero, with no gradient, for a model that does what its teacher does; labels change that."""
    trainer = make_trainer(BERT, tmp_path, hidden_size=32, distillation=1.0, num_train_epochs=1)
    trainer._checkpoint = None
    small = trainer._start(trainer.model)
    trainer._take(small)
    batch = trainer._prepare_inputs(trainer.data_collator(trainer.train_dataset[:8]))
    small.eval()
    small.training = True  # dropout stays off in the modules below
    loss = trainer.compute_loss(small, batch)
    assert 0.0 <= loss.item() < 1e-3
    with torch.no_grad():
        small.classifier.weight[0].add_(0.5)  # all rows alike would shift all logits alike
    worse = trainer.compute_loss(small, batch)
    assert worse.item() > loss.item()
    worse.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in small.parameters() if p.grad is not None)
    assert float(small.classifier.weight.grad.norm()) > 0
    assert float(small.bert.embeddings.word_embeddings.weight.grad.norm()) > 0
    trainer.args.distillation = 0.5
    assert trainer.compute_loss(small, batch).item() != pytest.approx(worse.item())


@pytest.mark.parametrize("distillation", [0.9, 0.0])
def test_gradient_accumulation_is_the_mean(distillation: float, tmp_path: Path) -> None:
    """8 x 1 and 4 x 2 give the same step: without dropout, on rows of one length, and nothing hides its size."""
    found = []
    for batch_size, steps in ((8, 1), (4, 2)):
        trainer = make_plain_trainer(
            tmp_path,
            max_steps=2,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            distillation=distillation,
            dropout=False,
            optim="sgd",
            max_grad_norm=0.0,
            learning_rate=0.05,
        )
        trainer.train()
        found.append(weights(trainer.model))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-3, atol=1e-5)


def test_gradient_accumulation_of_a_plain_trainer(tmp_path: Path) -> None:
    """A compressed model is fine-tuned by transformers' own Trainer as well."""
    rows, found = make_data(BERT, rows=8), []
    for batch_size, steps in ((8, 1), (4, 2)):
        args = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            optim="sgd",
            max_grad_norm=0.0,
            learning_rate=0.05,
            report_to="none",
            use_cpu=True,
            train_sampling_strategy="sequential",
        )
        model = make_small(BERT)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        collator = DataCollatorWithPadding(make_tokenizer())
        Trainer(model, args, train_dataset=rows, data_collator=collator).train()
        found.append(weights(model))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-3, atol=1e-5)


def test_everything_of_trainer(tmp_path: Path) -> None:
    """Evaluation, metrics, callbacks, best checkpoint, checkpointing, bfloat16, lengths together."""
    seen: list[int] = []

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert kwargs["model"].config.model_type == "tcsp_bert"
            seen.append(state.global_step)

    trainer = make_trainer(
        BERT,
        tmp_path,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="agreed",
        bf16=True,
        train_sampling_strategy="group_by_length",
        save_total_limit=1,
        **{CHECKPOINTING: True},
        _eval_dataset=make_data(BERT, rows=12),
        _compute_metrics=lambda found: {"agreed": float((found.predictions.argmax(-1) == found.label_ids).mean())},
        _callbacks=[Steps()],
    )
    result = trainer.train()
    assert result.global_step == seen[-1] == 12
    assert {"eval_agreed", "eval_loss"} <= trainer.evaluate().keys()
    trainer.save_model(str(tmp_path / "final"))
    again = TCSPTrainer(
        type(trainer.model).from_pretrained(tmp_path / "final"), make_arguments(tmp_path / "again", hidden_size=None)
    )
    assert same(weights(again.model), weights(trainer.model))


@pytest.mark.parametrize("bf16", [True, False])
def test_the_teacher_computes_in_bfloat16_where_the_student_does(tmp_path: Path, bf16: bool) -> None:
    """accelerate wraps only the model that is trained."""
    trainer = make_trainer(BERT, tmp_path, bf16=bf16, max_steps=1)
    layer = trainer.model.bert.encoder.layer[0].intermediate.dense
    trainer.compress()
    seen: list[torch.dtype] = []
    layer.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    trainer.train()
    assert seen[-1] == (torch.bfloat16 if bf16 else torch.float32)


def test_hidden_size_search_through_model_init(tmp_path: Path) -> None:
    trainer = make_trainer(BERT, tmp_path, _model_init=lambda: make_dense(BERT, torch.float32), num_train_epochs=1)
    assert trainer.model.config.model_type == "bert"
    for width in (8, 24):
        trainer.args.hidden_size = width
        trainer.train()
        assert trainer.model.config.hidden_size == width


def test_model_init_and_rows_without_labels(tmp_path: Path) -> None:
    """The model is dense anew each time, so that there is one to learn from."""
    trainer = make_trainer(
        BERT, tmp_path, _model_init=lambda: make_dense(BERT, torch.float32), labelled=False, max_steps=1
    )
    for _ in range(2):
        trainer.train()
        assert trainer.model.config.hidden_size == 16


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
def test_peft_on_a_compressed_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    small = make_small(BERT)
    before = weights(small)
    torch.manual_seed(0)  # of the adapters
    wrapped = peft.get_peft_model(small, peft.LoraConfig(target_modules="all-linear", r=2, task_type="SEQ_CLS"))
    trainer = make_trainer(
        BERT,
        tmp_path,
        model=wrapped,
        hidden_size=None,
        _teacher=make_dense(BERT, torch.float32),
        learning_rate=1e-2,
        num_train_epochs=5,
    )
    trainer.train()
    found = losses(trainer)
    assert sum(found[-10:]) < sum(found[:10])
    after = weights(wrapped)
    kept = "base_model.model.bert.embeddings.word_embeddings.weight"
    assert torch.equal(after[kept], before["bert.embeddings.word_embeddings.weight"])


# Resuming -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [BERT, T5], ids=str)
@pytest.mark.parametrize("sampling", ["random", "group_by_length"])
def test_resume_is_bit_equal(case: Case, sampling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"save_strategy": "steps", "save_steps": 4, "num_train_epochs": 3, "train_sampling_strategy": sampling}
    whole = make_trainer(case, tmp_path / "run", **options)
    whole.train()
    monkeypatch.setattr("tcsp_hf.train.trainer.calibrate", None)  # a second calibration would fail
    for step in (4, 8, 16):
        torch.manual_seed(step)
        resumed = make_trainer(case, tmp_path / "other", **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        assert resumed.state.global_step == whole.state.global_step == 18
        assert same(weights(whole.model), weights(resumed.model)), step


_KILLED = """
import sys
sys.path.insert(0, {tests!r})
import os, signal
import torch
torch.set_num_threads(1)
from pathlib import Path
from transformers import TrainerCallback
from common import find
from training import make_trainer, weights

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == {step}:
            os.kill(os.getpid(), signal.SIGKILL)

trainer = make_trainer(find("bert-ForSequenceClassification"), Path({folder!r}), save_strategy="steps", save_steps=3,
                       _callbacks=[Kill()])
trainer.train()
"""


@pytest.mark.slow
def test_a_killed_run_resumes(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(BERT, tmp_path / "whole", **options)
    whole.train()
    code = _KILLED.format(tests=str(Path(__file__).parent), step=8, folder=str(tmp_path / "run"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    # as if it had been killed while writing the next checkpoint
    (tmp_path / "run" / "checkpoint-9").mkdir()
    (tmp_path / "run" / "checkpoint-9" / "trainer_state.json").write_text('{"global_st')
    resumed = make_trainer(BERT, tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(whole.model), weights(resumed.model))


def test_resume_refuses(tmp_path: Path) -> None:
    def attempt(match: str, folder: Any, **fields: Any) -> None:
        trainer = make_trainer(BERT, tmp_path / "new", **fields)
        with pytest.raises(TCSPError, match=match):
            trainer.train(resume_from_checkpoint=folder)
        assert not list((tmp_path / "new").glob("checkpoint-*"))

    attempt("no complete checkpoint", True)
    attempt("no complete checkpoint", str(tmp_path / "nowhere"))
    run = make_trainer(BERT, tmp_path / "run", save_strategy="steps", save_steps=6)
    run.train()
    checkpoint = tmp_path / "run" / "checkpoint-6"
    attempt("hidden_size=16, but now hidden_size is 8", str(checkpoint), hidden_size=8)
    attempt("remove", str(checkpoint), hidden_size=None, remove=0.2)
    attempt("another dense model", str(checkpoint), model=make_dense(BERT, torch.float32, 5))
    make_dense(BERT, torch.float32).save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "trainer_state.json").write_text(json.dumps({"global_step": 6}))
    attempt("checkpoint of a dense model", str(tmp_path / "dense"))
    (checkpoint / "tcsp_trainer.json").unlink()
    attempt("cannot be resumed", str(checkpoint))


# Two processes ------------------------------------------------------------------------------------------------------

_RANK = """
import sys
sys.path.insert(0, {tests!r})
import os
import torch
torch.set_num_threads(1)
from pathlib import Path
from training import make_plain_trainer, weights

rank = int(os.environ["RANK"])
folder = Path({folder!r})
broken = {broken} if rank == 1 else 0
if broken == 2:
    os._exit(3)
trainer = make_plain_trainer(folder / "run", per_device_train_batch_size=4, ddp_backend="gloo", **{fields})
if broken == 1:
    trainer.train_dataset[-40:] = [{{"input_ids": [10**6]}}] * 40
trainer.calibrate()  # train() goes on from it, though the first process alone holds it
trainer.train()
import gc  # DDP that outlives its group can wait for ever when it goes
assert not any(isinstance(one, torch.nn.parallel.DistributedDataParallel) for one in gc.get_objects())
found = {{"weights": weights(trainer.model), "projection": trainer.model.config.projection}}
torch.save(found, folder / f"{{rank}}.pt")
torch.distributed.destroy_process_group()
"""


def two_ranks(folder: Path, broken: int = 0, **fields: Any) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    tests = str(Path(__file__).parent)
    script = folder / "script.py"
    script.write_text(_RANK.format(tests=tests, folder=str(folder), fields=repr(fields), broken=broken))
    return on_two_ranks(str(script))


@pytest.mark.slow
def test_two_ranks_hold_the_same_model(tmp_path: Path) -> None:
    """Bit-equal on both, and as one process would have it, but for rounding."""
    done = two_ranks(tmp_path / "two", max_steps=3, distillation=0.5, optim="sgd", learning_rate=0.05)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / "two" / f"{rank}.pt") for rank in (0, 1))
    assert first["projection"] == second["projection"]
    assert same(first["weights"], second["weights"])
    alone = make_plain_trainer(tmp_path / "one", max_steps=3, distillation=0.5, optim="sgd", learning_rate=0.05)
    alone.train()
    for name, value in weights(alone.model).items():
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-3, atol=1e-5)
    assert alone.model.config.projection["calibration"] == first["projection"]["calibration"]


_SHARDED = """
import sys
sys.path.insert(0, {tests!r})
import copy
import torch
from torch.distributed.fsdp import fully_shard
torch.set_num_threads(1)
from pathlib import Path
from training import make_plain_trainer

trainer = make_plain_trainer(Path({folder!r}) / "run", ddp_backend="gloo", distillation=0.5)
trainer._take(trainer._start(trainer.model))
batch = trainer._collator()([trainer.train_dataset[i] for i in range(8)])

def gradients(model):
    model.train()
    loss = trainer.compute_loss(model, dict(batch))
    loss.backward()
    whole = lambda value: value.full_tensor() if hasattr(value, "full_tensor") else value
    return {{name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}}

sharded = copy.deepcopy(trainer.model)
expected = gradients(trainer.model)
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
for module in sharded.modules():
    if type(module).__name__ == "TCSPBertLayer":
        fully_shard(module, mesh=mesh)
fully_shard(sharded, mesh=mesh)
assert len(list(sharded.parameters())[0].to_local()) < len(list(trainer.model.parameters())[0])
found = gradients(sharded)
assert found.keys() == expected.keys() and len(found) > 20
for name, gradient in expected.items():
    torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_sharded_parameters_get_the_same_gradients(tmp_path: Path) -> None:
    """FSDP2 on two processes. accelerate has it for accelerators alone, so PyTorch's own call stands for it here."""
    script = tmp_path / "script.py"
    script.write_text(_SHARDED.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    done = on_two_ranks(str(script))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_others(tmp_path: Path) -> None:
    for broken, message in ((1, "Process 1 of 2 failed"), (2, "exitcode")):
        done = two_ranks(tmp_path / str(broken), broken)
        assert done.returncode != 0
        assert message in done.stderr


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"hidden_size": None}, "needed: give remove= or hidden_size="),
        ({"remove": 0.4}, "give one of them"),
        ({"hidden_size": None, "remove": 1.5}, "between 0 and 1"),
        ({"hidden_size": 0}, "positive integer"),
        ({"hidden_size": 99}, "from 1 to 32"),
        ({"hidden_size": None, "remove": 0.4, "axes": ["filter"]}, "axes is"),
        ({"calibration_samples": 0}, "positive integer"),
        ({"distillation": 1.5}, "from 0 to 1"),
        ({"temperature": 0.0}, "above 0"),
        ({"hidden_weight": -1.0}, "not be below 0"),
        ({"pooling": "max"}, "mean"),
        ({"eval_strategy": "epoch"}, "no eval_dataset"),
        ({f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}}, "use_reentrant"),
        ({"_args": TrainingArguments(output_dir="x", report_to="none", use_cpu=True)}, "TCSPTrainingArguments"),
        ({"_optimizers": (torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), None)}, "optimizer"),
    ],
)
def test_bad_arguments(fields: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(TCSPError, match=match):
        make_trainer(BERT, tmp_path, **fields)


def test_bad_data(tmp_path: Path) -> None:
    def attempt(match: str, **fields: Any) -> None:
        with pytest.raises(TCSPError, match=match):
            make_trainer(BERT, tmp_path, **fields).train()

    small = make_small(BERT)
    attempt("no labels", model=small, labelled=False, hidden_size=None)
    attempt("no labels", labelled=False, distillation=0.0)
    attempt("its columns: words", _train_dataset=Dataset.from_list([{"words": "a b"}] * 4))
    attempt("its columns: words", _train_dataset=[{"words": "a b"}])
    attempt("train_dataset is empty", _train_dataset=[])
    attempt("There is no train_dataset", _train_dataset=None)
    attempt(
        "eval_dataset gives no input_ids",
        eval_strategy="epoch",
        _eval_dataset=Dataset.from_list([{"words": "a b"}] * 4),
    )
    attempt("compressed", _teacher=small)
    attempt("cannot be reached", hidden_size=None, remove=0.999)


def test_tokenised_dataset_with_other_columns(tmp_path: Path) -> None:
    """A `datasets.Dataset` as users have it: more columns than the model reads, labels called label."""
    tokenizer = make_tokenizer()
    data = Dataset.from_list([{"sentence": f"w{i} w{i + 1} w{i % 7}", "label": i % 3} for i in range(40)])
    data = data.map(lambda row: tokenizer(row["sentence"]))
    trainer = make_trainer(BERT, tmp_path, _train_dataset=data, num_train_epochs=1)
    trainer.train()
    assert trainer.model.config.projection["calibration"]["sequences"] == 40
