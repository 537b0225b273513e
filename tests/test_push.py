"""Pushing to the Hub and loading from it, end to end: the real client, over HTTP, against `hub_server.Hub`."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from common import calibrated, find, make_dense, make_inputs, make_small
from hub_server import Hub
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from test_card import tokenizer_of
from test_cli import tcsp
from test_save_load import CODE, other_auto_classes

import tcsp_hf
from tcsp_hf import TCSPError
from tcsp_hf.modeling_tcsp import TCSPPreTrainedMixin
from tcsp_hf.publish import CardResults, push, write_card
from tcsp_hf.publish.checkpoint import read_checkpoint
from tcsp_hf.publish.push import PushPlan, _deletions, _plan, plan_push

BERT, T5 = find("bert-ForSequenceClassification"), find("t5-ForConditionalGeneration")
PART = 40_000
"""Bytes of one part of a large upload: the BERT's weights take two, the T5's three."""
DERIVED = (
    *("onnx/model.onnx", "onnx/model.onnx.data", "onnx/my_own.onnx", "openvino/openvino_model.xml"),
    *("openvino/openvino_model.bin", "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"),
    *("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"),
)
HERE = Path(__file__).parent


def run_script(
    script: str, jobs: dict[str, Any], top: Path, hub: Hub | None, *options: str, limit: float = 600, **more: str
) -> str:
    """Run one of the tests' scripts on jobs, in a process whose Hub is `hub`; what it printed."""
    (top / "jobs.json").write_text(json.dumps(jobs))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_HOME": str(top / "home"), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(HERE.parent), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*", **more}
    if hub is not None:
        environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, **more}
    done = subprocess.run(
        [sys.executable, *options, str(HERE / script), str(top / "jobs.json")],
        cwd=top,
        env=environment,
        capture_output=True,
        text=True,
        timeout=limit,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def save(case: Any, folder: Path, **kwargs: Any) -> Path:
    make_small(case, **kwargs).save_pretrained(folder)
    tokenizer_of(case).save_pretrained(folder)
    return folder


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Pushed:
    """A Hub after all the pushes of this file, made in one process, and what they printed and returned."""

    def __init__(self, hub: Hub, top: Path) -> None:
        self.hub, self.top = hub, top
        self.bert, self.t5 = save(BERT, top / "bert"), save(T5, top / "t5")
        self.smaller, self.third = save(BERT, top / "smaller", hidden_size=8), save(BERT, top / "third", hidden_size=24)
        tcsp_hf.publish.write_card(self.bert, tcsp_hf.publish.CardResults(machine="none"))
        sharded = top / "sharded"
        make_small(BERT).save_pretrained(sharded, max_shard_size="20KB")
        other = json.loads((self.bert / "config.json").read_text())
        other["projection"]["source_model"] = "someone/else"
        hub.create("me/stock", {"config.json": b'{"model_type": "bert"}', "pytorch_model.bin": b"weights"})
        hub.create("me/foreign", {"config.json": b'{"model_type": "bert"}', "pytorch_model.bin": b"weights"})
        hub.create("me/other-source", {"config.json": json.dumps(other).encode(), "model.safetensors": b"weights"})
        hub.create("me/no-model", {"data.csv": b"1,2"})
        hub.create("me/readme-only", {"README.md": b"---\nlicense: mit\n---\n"})
        hub.drops = {sha256(self.smaller / "model.safetensors"): 1000, sha256(self.third / "model.safetensors"): 1}
        jobs: dict[str, dict[str, Any]] = {}

        def add(name: str, folder: Path, repo_id: str, how: str = "push", **options: Any) -> None:
            jobs[name] = {"how": how, "folder": str(folder), "repo_id": repo_id, "options": options}

        auto = BERT.auto_class.__name__
        add("bert", self.bert, "bert", commit_message="First")
        add("t5", self.t5, "my-org/t5", private=True)
        add("again", self.bert, "me/bert")
        add("branch", self.t5, "me/branches", revision="v1")
        add("branch of another", self.bert, "me/branches", revision="v2")
        add("pull request", self.third, "me/bert", create_pr=True, commit_message="Narrower")
        add("model", self.bert, "me/model", how="model", auto=auto)
        add("saved", self.bert, "me/saved", how="save", auto=auto)
        add("sharded", sharded, "me/sharded")
        add("whole", self.bert, "me/sharded")
        derived = top / "derived"
        shutil.copytree(self.bert, derived)
        for name in DERIVED:
            (derived / name).parent.mkdir(exist_ok=True)
            (derived / name).write_text("{}" if name.endswith("json") else "old")
        add("derived", derived, "me/derived")
        add("alone", self.bert, "me/derived")
        add("grown", self.bert, "me/grown")
        add("grown by shards", sharded, "me/grown", revision="v2")
        add("command", self.bert, "me/command", how="tcsp", words=["--private", "--json", "--token", hub.token])
        add("foreign", self.bert, "me/foreign")
        add("foreign by a new branch", self.bert, "me/foreign", revision="new")
        add("foreign from a model", self.bert, "me/foreign", how="model", auto=auto)
        add("other source", self.bert, "me/other-source")
        add("no model", self.bert, "me/no-model")
        add("readme only", self.bert, "me/readme-only")
        add("overwritten", self.bert, "me/stock", overwrite=True)
        add("wrong token", self.bert, "me/x", token="hf_" + "w" * 34)
        add("not mine", self.bert, "someone/x")
        add("broken", self.smaller, "me/broken")
        add("broken over", self.smaller, "me/command")
        add("resumed", self.third, "me/resumed")
        add("stock", self.bert, "me/transformers", how="stock", auto=auto)
        self.output = run_script("push_to_the_hub.py", jobs, top, hub)
        self.results = json.loads((top / "pushed.json").read_text())

    def error(self, name: str) -> str:
        return str(self.results[name]["error"])


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pushed]:
    with Hub(part_size=PART) as hub:
        yield Pushed(hub, tmp_path_factory.mktemp("push"))


def test_files_on_the_hub(pushed: Pushed) -> None:
    """Weights, code, tokenizer, card and the summary of the calibration; the very bytes of the folder."""
    for name, folder, family in (("me/bert", pushed.bert, "bert"), ("my-org/t5", pushed.t5, "t5")):
        files = pushed.hub.files(name)
        expected = {*CODE[family], "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
        expected |= {"README.md", ".gitattributes"}
        expected |= {"generation_config.json"} if family == "t5" else {"tcsp_results.json"}
        assert set(files) == expected
        for path in folder.iterdir():
            if path.name != "README.md":  # under the repository's name
                assert files[path.name] == path.read_bytes(), path.name
        config = json.loads(files["config.json"])
        assert config["auto_map"] == getattr(tcsp_hf, config["architectures"][0]).auto_map
        assert config["projection"]["calibration"]["tokens"] > 0
    card = pushed.hub.files("me/bert")["README.md"].decode()
    assert 'from_pretrained("me/bert"' in card and 'from_pretrained("bert"' in (pushed.bert / "README.md").read_text()
    card = ModelCard(pushed.hub.files("my-org/t5")["README.md"].decode())
    assert 'from_pretrained("my-org/t5"' in card.text and not (pushed.t5 / "README.md").exists()


def test_large_files_went_in_parts(pushed: Pushed) -> None:
    oid = sha256(pushed.t5 / "model.safetensors")
    parts = [request for request in pushed.hub.requests if request.startswith(f"PUT /lfs/{oid}")]
    assert len(parts) == -(-(pushed.t5 / "model.safetensors").stat().st_size // PART) == 3
    assert f"POST /lfs/{oid}/complete" in pushed.hub.requests


def test_visibility_messages_and_addresses(pushed: Pushed) -> None:
    repositories = pushed.hub.repositories
    assert repositories["my-org/t5"].private and repositories["me/command"].private
    assert not repositories["me/bert"].private
    commits = list(repositories["me/bert"].commits.values())
    assert [commit.message for commit in commits] == ["initial commit", "First", "Narrower"]
    assert pushed.results["bert"]["url"] == f"{pushed.hub.url}/me/bert/commit/{commits[1].sha}"
    assert pushed.results["again"]["url"] == pushed.results["bert"]["url"], "nothing had changed, so nothing was added"


def test_a_new_branch_keeps_no_weights_of_main(pushed: Pushed) -> None:
    """It begins with main's files, and transformers prefers a whole file to shards."""
    files = pushed.hub.files("me/grown", "v2")
    assert "model.safetensors" not in files and "model.safetensors.index.json" in files
    assert "model.safetensors" in pushed.hub.files("me/grown")


def test_branches_and_pull_requests(pushed: Pushed) -> None:
    hub = pushed.hub
    assert set(hub.repositories["me/branches"].refs) == {"main", "v1", "v2"}
    assert set(hub.files("me/branches")) == {".gitattributes"}
    assert hub.files("me/branches", "v1")["model.safetensors"] == (pushed.t5 / "model.safetensors").read_bytes()
    assert hub.files("me/branches", "v2")["model.safetensors"] == (pushed.bert / "model.safetensors").read_bytes()
    assert pushed.results["pull request"]["url"] == f"{hub.url}/me/bert/discussions/1"
    weights = "model.safetensors"
    assert hub.files("me/bert")[weights] == (pushed.bert / weights).read_bytes()
    assert hub.files("me/bert", "refs/pr/1")[weights] == (pushed.third / weights).read_bytes()


def test_a_models_own_push_gives_the_same_files(pushed: Pushed) -> None:
    expected = {name: content for name, content in pushed.hub.files("me/bert").items() if name != "tcsp_results.json"}
    for name in ("me/model", "me/saved"):
        found = pushed.hub.files(name)
        assert set(found) == set(expected)
        differing = {path for path in expected if found[path] != expected[path]}
        assert differing <= {
            "README.md",
            "config.json",
            "tokenizer_config.json",
        }  # they say where they were loaded from
        configs = [json.loads(files["config.json"]) for files in (found, expected)]
        assert [config.pop("dtype", None) for config in configs] and configs[0] == configs[1]
        assert f'from_pretrained("{name}"' in found["README.md"].decode()
    stock = pushed.hub.files("me/transformers")
    assert {*CODE["bert"], "config.json", "model.safetensors", "README.md"} <= set(stock)


def test_a_push_while_saving_takes_all_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(TCSPPreTrainedMixin, "publisher", lambda model, repo_id, **options: seen.update(options) or "")
    told = {"commit_message": "m", "commit_description": "d", "tags": ["t"], "max_shard_size": "20KB", "private": True}
    make_small(BERT).save_pretrained(tmp_path / "x", push_to_hub=True, is_main_process=False, **told)
    assert not seen, "the main process does it"
    make_small(BERT).save_pretrained(tmp_path / "x", push_to_hub=True, **told)
    assert seen == told and (tmp_path / "x" / "model.safetensors.index.json").is_file()


def test_stale_shards_are_removed(pushed: Pushed) -> None:
    before = list(pushed.hub.repositories["me/sharded"].commits.values())[1].files
    assert sum(name.startswith("model-") for name in before) > 2
    weights = [name for name in pushed.hub.files("me/sharded") if name.startswith("model") and not name.endswith(".py")]
    assert weights == ["model.safetensors"]


def test_what_was_made_of_earlier_weights_is_removed(pushed: Pushed) -> None:
    """Graphs, and the layout of sentence-transformers, whose linear module is the lift of those weights."""
    commits = list(pushed.hub.repositories["me/derived"].commits.values())
    assert set(DERIVED) <= set(commits[1].files)
    assert set(pushed.hub.files("me/derived")) == {*pushed.hub.files("me/bert"), "onnx/my_own.onnx"}


def test_what_may_be_somebodys_own_stays() -> None:
    plan = PushPlan("me/x", {"config.json": 1, "model.safetensors": 1}, False, [])
    remote = [".gitattributes", "config.json", "model.safetensors", "mine.txt", "modules.json", "1_Pooling/config.json"]
    assert not _deletions(remote, plan, overwrite=False)
    assert plan.warnings == ["modules.json in me/x stays, but may not fit the weights of this push"]
    plan.warnings.clear()
    gone = _deletions([*remote, "onnx/model.onnx", "onnx/model_quantized.onnx"], plan, overwrite=False)
    assert [operation.path_in_repo for operation in gone] == ["onnx/model.onnx"]
    assert plan.warnings[0] == "removed from me/x, since it was made of earlier weights: onnx/model.onnx"
    assert plan.warnings[1].startswith("modules.json, onnx/model_quantized.onnx in me/x stays")
    plan.files["modules.json"] = plan.files["onnx/model.onnx"] = 1
    plan.warnings.clear()
    assert not _deletions([*remote, "onnx/model.onnx", "2_Dense/config.json"], plan, overwrite=False)
    assert not plan.warnings


def test_another_model_is_not_overwritten(pushed: Pushed) -> None:
    hub = pushed.hub
    for job in ("foreign", "foreign by a new branch", "foreign from a model"):
        assert "holds a model of type 'bert', not 'tcsp_bert'" in pushed.error(job)
        assert "--overwrite" in pushed.error(job)
    assert "compressed from 'someone/else'" in pushed.error("other source")
    assert "holds data.csv" in pushed.error("no model")
    for name in ("me/foreign", "me/other-source", "me/no-model"):
        assert [commit.message for commit in hub.repositories[name].commits.values()] == ["initial commit", "files"]
    assert "model.safetensors" in hub.files("me/readme-only")
    replaced = hub.files("me/stock")
    assert "model.safetensors" in replaced and "pytorch_model.bin" not in replaced


def test_tokens_that_do_not_serve(pushed: Pushed) -> None:
    assert "does not accept the token: run `hf auth login`" in pushed.error("wrong token")
    assert "may not write to someone/x" in pushed.error("not mine")
    assert "me/x" not in pushed.hub.repositories and "someone/x" not in pushed.hub.repositories


def test_a_connection_that_breaks_leaves_no_commit(pushed: Pushed) -> None:
    hub = pushed.hub
    for job in ("broken", "broken over"):
        assert "nothing was committed" in pushed.error(job) and "Push again" in pushed.error(job)
    assert [commit.message for commit in hub.repositories["me/broken"].commits.values()] == ["initial commit"]
    assert set(hub.files("me/broken")) == {".gitattributes"}
    assert hub.files("me/command")["model.safetensors"] == (pushed.bert / "model.safetensors").read_bytes()
    assert len(hub.repositories["me/command"].commits) == 2
    assert hub.dropped >= 3


def test_one_broken_connection_is_tried_again(pushed: Pushed) -> None:
    weights = (pushed.third / "model.safetensors").read_bytes()
    assert pushed.hub.drops[sha256(pushed.third / "model.safetensors")] == 0
    assert pushed.hub.files("me/resumed")["model.safetensors"] == weights


def test_no_token_leaves_the_process(pushed: Pushed) -> None:
    """Not in the log at its most talkative, not in a result, not in a file of the Hub."""
    assert "https://" in pushed.output or "http://" in pushed.output, "the client logs its requests"
    assert pushed.hub.token not in pushed.output + json.dumps(pushed.results)
    assert "hf_" + "w" * 34 not in pushed.output + json.dumps(pushed.results)
    for name, repository in pushed.hub.repositories.items():
        for commit in repository.commits.values():
            for file in commit.files.values():
                assert pushed.hub.token.encode() not in file.content, name


def load_from(pushed: Pushed, top: Path, every_class: bool) -> dict[str, Any]:
    """What a clean process without the package makes of the repositories."""
    jobs: dict[str, dict[str, Any]] = {}
    cases = {
        "bert": (BERT, "me/bert", {}),
        "t5": (T5, "my-org/t5", {}),
        "branch": (T5, "me/branches", {"revision": "v1"}),
    }
    cases["pull request"] = (BERT, "me/bert", {"revision": "refs/pr/1"})
    cases["model"] = (BERT, "me/model", {})
    for name, (case, repo, more) in cases.items():
        folder = top / name
        (folder / "inputs").mkdir(parents=True)
        save_file(make_inputs(case), folder / "inputs" / "inputs.safetensors")
        others = other_auto_classes(case)[: None if every_class else 2] if name in ("bert", "t5") else []
        jobs[name] = {"folder": str(folder), "repo": repo, "auto": case.auto_class.__name__, "others": others, **more}
    jobs["bert"] |= {"pipeline": "text-classification", "text": "w3 w4 w5"}
    run_script("load_without_the_package.py", jobs, top, pushed.hub, "-I")
    results: dict[str, Any] = json.loads((top / "results.json").read_text())
    for name, result in results.items():
        result["output"] = load_file(top / name / "inputs" / "found.safetensors")["output"]
    return results


@pytest.fixture(scope="module")
def loaded(pushed: Pushed) -> dict[str, Any]:
    return load_from(pushed, pushed.top / "loading", every_class=False)


@pytest.mark.parametrize("name", ["bert", "t5", "branch", "pull request", "model"])
def test_loads_from_the_hub_without_the_package(pushed: Pushed, loaded: dict[str, Any], name: str) -> None:
    case = T5 if name in ("t5", "branch") else BERT
    folder = {"t5": pushed.t5, "branch": pushed.t5, "pull request": pushed.third}.get(name, pushed.bert)
    model = case.auto_class.from_pretrained(folder)
    with torch.no_grad():
        expected = model(**make_inputs(case))[0]
    assert (loaded[name]["output"] - expected).abs().max() <= 1e-5
    assert loaded[name]["same_again"]
    assert all("transformers_modules" in module for module in loaded[name]["modules"])
    assert len(loaded[name]["classes"]) == (2 if name in ("bert", "t5") else 0)
    assert not {auto for auto, names in loaded[name]["differing"].items() if names}


@pytest.mark.slow
def test_every_auto_class_loads_from_the_hub(pushed: Pushed, tmp_path: Path) -> None:
    results = load_from(pushed, tmp_path, every_class=True)
    for name, case in (("bert", BERT), ("t5", T5)):
        auto_map = getattr(tcsp_hf, case.small_class_name).auto_map
        expected = {auto: auto_map[auto].split(".")[-1] for auto in other_auto_classes(case)}
        assert results[name]["classes"] == expected
        assert not {auto for auto, names in results[name]["differing"].items() if names}


def test_pipeline_from_the_hub_without_the_package(pushed: Pushed, loaded: dict[str, Any]) -> None:
    model = BERT.auto_class.from_pretrained(pushed.bert)
    inputs = tokenizer_of(BERT)("w3 w4 w5", return_tensors="pt")
    with torch.no_grad():
        probabilities = model(**inputs).logits.softmax(-1)[0]
    (found,) = loaded["bert"]["pipeline"]
    assert found["label"] == model.config.id2label[int(probabilities.argmax())]
    assert found["score"] == pytest.approx(float(probabilities.max()), abs=1e-5)


# Without a Hub --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(BERT, tmp_path / "small")


def test_without_a_token(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(TCSPError, match="no Hugging Face token: run `hf auth login`"):
        push(folder, "me/small")
    with pytest.raises(TCSPError, match="token=False"):
        push(folder, "me/small", token=False)
    with pytest.raises(TCSPError, match="no Hugging Face token"):
        BERT.auto_class.from_pretrained(folder).push_to_hub("me/small")


def test_offline(folder: Path) -> None:
    with pytest.raises(TCSPError, match="HF_HUB_OFFLINE is set"):
        push(folder, "me/small", token="hf_" + "o" * 34)


def test_the_card_names_the_repository(folder: Path) -> None:
    """What `tcsp compress` and `tcsp card` write beside a checkpoint carries the folder's name."""
    write_card(folder, CardResults(command="tcsp compress x"))
    plan, sent = _plan(read_checkpoint(folder), "me/small-model", None)
    card = next(operation.path_or_fileobj for operation in sent if operation.path_in_repo == "README.md")
    text = bytes(card).decode()
    assert 'from_pretrained("me/small-model"' in text and f'"{folder.name}"' not in text and not plan.card_made
    assert "tcsp compress x" in text and not plan.warnings
    (folder / "README.md").write_text("# My own words\n")
    plan = plan_push(folder, "me/small-model")
    assert plan.files["README.md"] == len("# My own words\n") and "never says me/small-model" in plan.warnings[0]


def test_what_stays_on_this_disk(folder: Path) -> None:
    """Where the dense model lies, statistics with a sample of the text, the trainer's records; pickles."""
    config = json.loads((folder / "config.json").read_text())
    config["projection"]["source_model"] = "/home/alice/client-acme/dense"
    (folder / "config.json").write_text(json.dumps(config))
    calibrated(BERT, make_dense(BERT)).save(folder / "stats")
    for name in ("results.json", "tcsp_run.json", "tcsp_trainer.json", "pytorch_model.bin"):
        (folder / name).write_text("{}")
    (folder / "openvino").mkdir()
    for name in ("openvino_model.xml", "openvino_model.bin"):
        (folder / "openvino" / name).write_bytes(b"x")
    plan, sent = _plan(read_checkpoint(folder), "me/small", None)
    contents = {operation.path_in_repo: operation.path_or_fileobj for operation in sent}
    assert json.loads(bytes(contents["config.json"]))["projection"]["source_model"] == "dense"
    assert {"openvino/openvino_model.xml", "openvino/openvino_model.bin"} <= set(plan.files)
    kept = ("results", "tcsp_run", "tcsp_trainer", "pytorch", "stats")
    assert not [name for name in plan.files if name.startswith(kept)]
    assert "alice" not in "".join(bytes(c).decode() for c in contents.values() if isinstance(c, bytes))


def test_dry_run_lists_and_leaves_the_folder_alone(folder: Path) -> None:
    for name in ("optimizer.pt", "training_args.bin", ".env", "trainer_state.json"):
        (folder / name).write_text("x")
    (folder / "checkpoint-3").mkdir()
    shutil.copy(folder / "config.json", folder / "checkpoint-3")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"onnx")
    before = sorted(path.name for path in folder.iterdir())
    found = json.loads(tcsp("push", folder, "me/small", "--dry-run", "--json"))
    expected = {*CODE["bert"], "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(found["files"]) == {*expected, "README.md", "onnx/model.onnx"}
    assert found["files"]["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    assert found["url"] is None and "card" in found["warnings"][0]
    assert sorted(path.name for path in folder.iterdir()) == before
    assert "would be sent" in tcsp("push", folder, "me/small", "--dry-run")


def test_incomplete_folders_and_bad_names_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TCSPError, match="no repository name"):
        plan_push(folder, "a/b/c")
    with pytest.raises(TCSPError, match="not a folder"):
        push(tmp_path / "nowhere", "me/small", token="t")
    (folder / "modeling_tcsp_bert.py").unlink()
    with pytest.raises(TCSPError, match=r"lacks modeling_tcsp_bert\.py"):
        push(folder, "me/small", token="t")


def test_a_token_in_a_file_is_refused(folder: Path) -> None:
    secret = "hf_" + "Zz9" * 11 + "a"
    for name in ("notes.txt", "train.sh", "train.ipynb", "table.CSV", "log"):
        (folder / name).write_bytes(f"login with {secret} \xff".encode("latin-1"))
        with pytest.raises(TCSPError, match=f"{name} holds an access token") as caught:
            plan_push(folder, "me/small")
        assert secret not in str(caught.value)
        (folder / name).unlink()
    (folder / "picture.png").write_bytes(secret.encode())
    assert "picture.png" in plan_push(folder, "me/small").files


def test_links_out_of_the_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "private.txt").write_text("mine")
    (folder / "notes.txt").symlink_to(tmp_path / "private.txt")
    with pytest.raises(TCSPError, match="outside the folder"):
        plan_push(folder, "me/small")
