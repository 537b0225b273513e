"""Puts a checkpoint on the Hub in one commit: all of it or nothing."""

import fnmatch
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ..errors import TCSPError, is_of_the_connection
from .card import CARD_FILE, render_card, shown_path, stored_results
from .checkpoint import Checkpoint, read_checkpoint, weight_files
from .results import CardResults
from .secrets import holds_token, redact

_LEFT_OUT = (
    "checkpoint-*",
    "runs",
    "*.pt",
    "*.pth",
    "*.pkl",
    "*.partial",
    "trainer_state.json",
    "tcsp_trainer.*",
    "tcsp_run.json",
    "results.json",
    "calibration.json",
    "calibration*.safetensors",
    "__pycache__",
)
"""What a trainer, an editor or `calibrate` leaves in the folder: none of it belongs to the model, statistics hold a
sample of the text, and pickles are not published."""
_TEXT = (".json", ".md", ".py", ".txt", ".yaml", ".yml")
_NO_TEXT = (".safetensors", ".bin", ".onnx", ".data", ".png", ".jpg", ".jpeg", ".gif", ".webp")
_SCANNED_BYTES = 10_000_000
_OLD_WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
_GRAPH_NAMES = ("model", "encoder_model", "decoder_model", "decoder_with_past_model")
_OLD_GRAPHS = (
    *(f"onnx/{name}.onnx" for name in _GRAPH_NAMES),
    *(f"onnx/{name}.onnx.data" for name in _GRAPH_NAMES),
    *(f"openvino/openvino_{name}.{suffix}" for name in _GRAPH_NAMES for suffix in ("xml", "bin")),
)
"""What `tcsp export` writes beside weights, and what goes with them."""
_OLD_LIFT = "[0-9]_Dense/*"
_OLD_MODULES = (
    *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"),
    *("[0-9]_Pooling/*", _OLD_LIFT, "[0-9]_Normalize/*"),
)
"""What --sentence-transformer writes beside an encoder; the linear module holds the lift of these very weights."""
_LOG_IN = "run `hf auth login`, or set HF_TOKEN to a token with write access (https://huggingface.co/settings/tokens)"


@dataclass(frozen=True)
class PushPlan:
    """What a push sends.

    Attributes:
        repo_id: where to, as asked for.
        files: path in the repository -> bytes.
        card_made: whether the card is rendered for the push, since the folder has none.
        warnings: what is not wrong but may surprise.
    """

    repo_id: str
    files: dict[str, int]
    card_made: bool
    warnings: list[str]


@dataclass(frozen=True)
class Pushed:
    """Where a push went: the commit's or the pull request's address, and the commit's hash."""

    url: str
    repo_id: str
    commit: str
    plan: PushPlan


def plan_push(folder: str | os.PathLike[str], repo_id: str, *, token: str | None = None) -> PushPlan:
    """Check a checkpoint and list what a push would send; nothing leaves the machine.

    Raises:
        TCSPError: `repo_id` is no name, the folder is no complete checkpoint, or a file holds an access token.
    """
    _check_name(repo_id)
    return _plan(read_checkpoint(folder), repo_id, token)[0]


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    token: str | bool | None = None,
    overwrite: bool = False,
) -> Pushed:
    """Upload a compressed checkpoint: weights, code and its `auto_map`, tokenizer, generation config, card.

    Everything is checked before the repository is created, and everything goes in one commit, so a broken connection
    leaves the repository as it was. What an earlier push left there that was made of other weights (shards, graphs, the
    layout of sentence-transformers) goes with it.

    Args:
        folder: what `save_pretrained` wrote. It is not changed; without a card one is rendered for the push.
        repo_id: `"owner/name"`, or a name of your own.
        private: of a new repository; the account's default when None.
        revision: branch to commit to, created if it is not there; `"main"` when None.
        create_pr: open a pull request instead of committing.
        commit_message, commit_description: of the commit.
        token: an access token; the one of `hf auth login` or `HF_TOKEN` when None.
        overwrite: replace the repository's files although it holds another model.

    Raises:
        TCSPError: an incomplete checkpoint, no token or one without rights, a repository with another model, or a
            failed upload. Nothing was committed then.
    """
    _check_name(repo_id)
    checkpoint = read_checkpoint(folder)
    if token is False:
        raise TCSPError(f"token=False was given, but a push needs a token: {_LOG_IN}.")
    key = token if isinstance(token, str) else get_token()
    if not key:
        raise TCSPError(f"There is no Hugging Face token: {_LOG_IN}.")
    plan, additions = _plan(checkpoint, repo_id, key)
    api = HfApi(token=key, library_name="tcsp_hf")
    with _hub_errors(repo_id, key):
        full_name = _full_name(api, repo_id)
        if full_name != repo_id:
            plan, additions = _plan(checkpoint, full_name, key)  # the card says who owns it
        parent, remote = _look(api, full_name, revision)
        if not overwrite:
            _refuse_foreign(api, full_name, revision, checkpoint, remote)
        if parent is None:
            api.create_repo(full_name, private=private, exist_ok=True)
            if revision is not None and not revision.startswith("refs/pr"):
                api.create_branch(full_name, branch=revision, exist_ok=True)
        before = parent
        if parent is None:
            before, remote = _look(api, full_name, revision)  # a new branch begins with main's files
        try:
            commit = api.create_commit(
                full_name,
                [*additions, *_deletions(remote, plan, overwrite)],
                commit_message=commit_message or f"Upload {checkpoint.class_name}",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
                parent_commit=parent,  # refused by the Hub if someone else pushed since we looked
            )
        except Exception as error:
            answered = isinstance(error, HfHubHTTPError) and error.response is not None
            if answered or (not create_pr and _is_unchanged(api, full_name, revision, before)):
                raise
            raise TCSPError(
                f"The push to {full_name} failed, and it is not certain that nothing was committed: the connection may "
                "have been lost after the Hub took the commit. Push again: what is there already is not sent again."
            ) from None
    return Pushed(commit.pr_url or commit.commit_url, full_name, commit.oid, plan)


def push_model(
    model: Any,
    repo_id: str,
    *,
    tokenizer: Any = None,
    max_shard_size: int | str = "50GB",
    tags: Any = None,
    **options: Any,
) -> str:
    """Save a model to a temporary folder and `push` it; what `model.push_to_hub` does.

    Args:
        model: a compressed model.
        repo_id: see `push`.
        tokenizer: pushed with it.
        max_shard_size: see `save_pretrained`.
        tags: not used: the card carries its own.
        options: see `push`.

    Returns:
        The address of the commit or of the pull request.

    Raises:
        TCSPError: see `push`.
    """
    with tempfile.TemporaryDirectory() as name:
        model.save_pretrained(name, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(name)
        return push(name, repo_id, **options).url


# Before anything is sent --------------------------------------------------------------------------------------------


def _check_name(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise TCSPError(f"{repo_id!r} is no repository name: it must be owner/name. {error}") from error


def _plan(checkpoint: Checkpoint, repo_id: str, token: str | None) -> tuple[PushPlan, list[CommitOperationAdd]]:
    paths = _paths(checkpoint.folder)
    for file in weight_files(checkpoint.folder):
        assert checkpoint.folder / file in paths
    operations = [CommitOperationAdd(path.relative_to(checkpoint.folder).as_posix(), path) for path in paths]
    made = checkpoint.folder / CARD_FILE not in paths
    sizes = {path.relative_to(checkpoint.folder).as_posix(): path.stat().st_size for path in paths}
    for path in paths:
        if _may_hold_text(path) and holds_token(path.read_text(encoding="utf-8", errors="replace"), token):
            raise TCSPError(f"{path} holds an access token: remove it (and revoke the token) before pushing.")
    warnings, card = [], render_card(checkpoint, CardResults(), name=repo_id) if made else None
    if not made:
        card = _renamed(checkpoint, repo_id)
        if card is None and repo_id not in (checkpoint.folder / CARD_FILE).read_text("utf-8", errors="replace"):
            warnings.append(f"README.md never says {repo_id}: its lines of code may load something else")
    replaced = {} if card is None else {CARD_FILE: card.encode()}
    replaced |= _without_paths(checkpoint.folder)
    operations = [operation for operation in operations if operation.path_in_repo not in replaced]
    for name, content in replaced.items():
        operations.append(CommitOperationAdd(name, content))
        sizes[name] = len(content)
    if not checkpoint.has_tokenizer:
        warnings.append("there is no tokenizer in the folder: tokenizer.save_pretrained(folder) puts one there")
    if made:
        warnings.append("there is no README.md in the folder: a card without scores is made (see `tcsp card`)")
    return PushPlan(repo_id, sizes, made, warnings), operations


def _may_hold_text(path: Path) -> bool:
    """Scripts, tables and logs without a known suffix do; files beyond some size only where the suffix says so."""
    suffix = path.suffix.lower()
    return suffix in _TEXT or (suffix not in _NO_TEXT and path.stat().st_size < _SCANNED_BYTES)


def _renamed(checkpoint: Checkpoint, repo_id: str) -> str | None:
    """The folder's card under the repository's name; None where it is not as `tcsp card` left it."""
    text = (checkpoint.folder / CARD_FILE).read_text(encoding="utf-8", errors="replace")
    heading = next((line[2:] for line in text.splitlines() if line.startswith("# ")), "")
    results = stored_results(checkpoint.folder)
    if not heading or render_card(checkpoint, results, name=heading) != text:
        return None
    return render_card(checkpoint, results, name=repo_id)


def _without_paths(folder: Path) -> dict[str, bytes]:
    """The configuration without the place of the dense model on this disk, where it says one."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    projection = config.get("projection") or {}
    source = projection.get("source_model")
    if not isinstance(source, str) or shown_path(source) == source:
        return {}
    projection["source_model"] = shown_path(source)
    return {"config.json": (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()}


def _paths(folder: Path) -> list[Path]:
    """Files to send: none hidden, none behind a link that leaves the folder, none of `_LEFT_OUT`."""
    top = folder.resolve()
    found = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        unwanted = any(part.startswith(".") or any(fnmatch.fnmatch(part, p) for p in _LEFT_OUT) for part in parts)
        if unwanted or (path.suffix == ".bin" and not _holds_plain_weights(path)) or not path.is_file():
            continue
        if not path.resolve().is_relative_to(top):
            raise TCSPError(f"{path} is a link to a file outside the folder: put the file itself there, or remove it.")
        found.append(path)
    return found


def _holds_plain_weights(path: Path) -> bool:
    """Beside a graph (OpenVINO's) or a vocabulary (CTranslate2's) a .bin file is no pickle, as it is elsewhere."""
    graph = path.with_suffix(".xml").is_file()
    return graph or (path.name == "model.bin" and any(path.parent.glob("*vocabulary.*")))


# What is there already ----------------------------------------------------------------------------------------------


def _full_name(api: HfApi, repo_id: str) -> str:
    """`owner/name`; asking who we are also tests the token."""
    user = api.whoami()["name"]
    return repo_id if "/" in repo_id else f"{user}/{repo_id}"


def _look(api: HfApi, repo_id: str, revision: str | None) -> tuple[str | None, list[str]]:
    """Last commit of the branch and its files; (None, []) where the repository or the branch is new."""
    try:
        info = api.model_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        return None, []  # a new branch starts from main, whose model was looked at
    except RepositoryNotFoundError:
        return None, []
    return info.sha, [sibling.rfilename for sibling in info.siblings or []]


def _is_unchanged(api: HfApi, repo_id: str, revision: str | None, before: str | None) -> bool:
    """Whether the branch still ends with the commit `before`; False where the Hub cannot be asked."""
    try:
        return _look(api, repo_id, revision)[0] == before
    except Exception:  # whatever it is, it is the first error that counts
        return False


def _refuse_foreign(api: HfApi, repo_id: str, revision: str | None, checkpoint: Checkpoint, remote: list[str]) -> None:
    """Raise TCSPError if the repository holds files of another model."""
    own = {".gitattributes", CARD_FILE}
    if revision is not None and not remote:
        _, remote = _look(api, repo_id, None)
        revision = None
    if not set(remote) - own:
        return
    remedy = "name another repository, or pass overwrite=True (--overwrite) to replace its files."
    if "config.json" not in remote:
        raise TCSPError(f"{repo_id} exists and holds {sorted(set(remote) - own)[0]}, but no such model: {remedy}")
    try:
        path = api.hf_hub_download(repo_id, "config.json", revision=revision)
        there = json.loads(Path(path).read_text(encoding="utf-8"))
    except (EntryNotFoundError, ValueError) as error:
        raise TCSPError(f"{repo_id} exists with a config.json that cannot be read: {remedy}") from error
    kind = there.get("model_type") if isinstance(there, dict) else None
    if kind != checkpoint.config.model_type:
        raise TCSPError(
            f"{repo_id} exists and holds a model of type {kind!r}, not {checkpoint.config.model_type!r}: {remedy}"
        )
    source = (there.get("projection") or {}).get("source_model")
    ours = (checkpoint.config.projection or {}).get("source_model")
    if shown_path(str(source)) != shown_path(str(ours)):
        raise TCSPError(f"{repo_id} exists and was compressed from {source!r}, not {ours!r}: {remedy}")


def _deletions(remote: list[str], plan: PushPlan, overwrite: bool) -> list[CommitOperationDelete]:
    """Weights of an earlier push that this one does not replace (other shards), and what was made of them: graphs, a
    sentence-transformers layout with its lift. With `overwrite` all other files.

    The plan's warnings say what goes beside weights, and what stays although it may not fit the new ones.
    """
    stale = [name for name in remote if name not in plan.files and name != ".gitattributes"]
    if overwrite:
        return [CommitOperationDelete(name) for name in stale]
    made = _matching(stale, _OLD_GRAPHS)
    if "modules.json" in stale and _matching(stale, (_OLD_LIFT,)):
        made += _matching(stale, _OLD_MODULES)
    if made:
        plan.warnings.append(f"removed from {plan.repo_id}, since it was made of earlier weights: {', '.join(made)}")
    unsure = [name for name in _matching(stale, ("modules.json", "onnx/*", "openvino/*")) if name not in made]
    if unsure:
        plan.warnings.append(f"{', '.join(unsure)} in {plan.repo_id} stays, but may not fit the weights of this push")
    return [CommitOperationDelete(name) for name in [*_matching(stale, _OLD_WEIGHTS), *made]]


def _matching(names: list[str], patterns: tuple[str, ...]) -> list[str]:
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


@contextmanager
def _hub_errors(repo_id: str, token: str) -> Iterator[None]:
    """Turn the client's errors into one message without the token.

    Raises:
        TCSPError: in their place.
    """
    try:
        yield
    except TCSPError:
        raise
    except OfflineModeIsEnabled:
        raise TCSPError("HF_HUB_OFFLINE is set, so nothing can be pushed: unset it.") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status == 401:
            raise TCSPError(f"{constants.ENDPOINT} does not accept the token: {_LOG_IN}.") from None
        if status == 403:
            raise TCSPError(f"The token may not write to {repo_id}: {_LOG_IN}.") from None
        if status == 412:
            raise TCSPError(f"{repo_id} changed during the push, nothing was committed: push again.") from None
        raise TCSPError(_failed(repo_id, error, token)) from None
    except (OSError, RuntimeError, ValueError) as error:
        raise TCSPError(_failed(repo_id, error, token)) from None
    except Exception as error:
        if not is_of_the_connection(error):
            raise
        raise TCSPError(_failed(repo_id, error, token)) from None


def _failed(repo_id: str, error: BaseException, token: str) -> str:
    cause = error.__cause__ if error.__cause__ is not None else error
    detail = redact(f"{error} ({type(cause).__name__}: {cause})" if cause is not error else str(error), token)
    return f"The push to {repo_id} failed, nothing was committed: {detail.strip()} Push again when the cause is gone."
