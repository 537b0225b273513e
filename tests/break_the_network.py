"""Run by test_faults.py in a process of its own, whose HF_ENDPOINT is the loopback Hub: pushes and downloads broken.

Reads a JSON file: how many rounds, a seed, and two folders with compressed checkpoints of one dense model. Every round
pushes or downloads in a child that is killed at a random moment, or whose connections break at random, or both; then
looks at what is on the Hub and on the disk, and does the same again undisturbed. Writes counts and failures beside the
file. The client waits seconds between its tries after a broken connection; here it does not.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import urllib.request
from pathlib import Path

import torch
import transformers
from impatient import do_not_wait

from tcsp_hf.publish import push
from tcsp_hf.selftest.children import REFUSED, RIGHT, finish, finish_within, hide_bars, kill, last_words, start
from tcsp_hf.selftest.jobs import digest

do_not_wait()
hide_bars()
torch.set_num_threads(1)  # children are forked
JOBS = Path(sys.argv[1])
JOB = json.loads(JOBS.read_text())
TOP, NEW, BASE = JOBS.parent, Path(JOB["new"]), "me/base"
LOG, CACHE = TOP / "log.txt", TOP / "cache"
GITATTRIBUTES = ".gitattributes"


def hub(path: str, method: str = "POST"):
    request = urllib.request.Request(os.environ["HF_ENDPOINT"] + path, method=method)
    with urllib.request.urlopen(request) as answer:
        return json.loads(answer.read())


def files_of(repo: str) -> dict[str, str]:
    """Path -> hash; of the card, which names the repository, that it is there."""
    found = hub(f"/_state/{repo}", "GET")["files"]
    return {name: "" if name == "README.md" else sha for name, sha in found.items() if name != GITATTRIBUTES}


def weights(repo: str, local: bool = False) -> str:
    options = {"cache_dir": CACHE, "local_files_only": local}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(repo, **options)
    content = b"".join(tensor.numpy().tobytes() for _, tensor in sorted(model.state_dict().items()))
    return hashlib.sha256(content).hexdigest()


def disturbed(action, seconds: float, draw: random.Random) -> tuple[int, str]:
    """How the action ended in a child, and the fault."""
    fault = draw.choice(["killed", "broken connections", "both"])
    if fault != "killed":
        hub(f"/_faults/{draw.choice([0.1, 0.3, 0.6])}/{draw.getrandbits(30)}")
    child = start(action, LOG)
    if fault == "broken connections":
        code = finish(child)
    else:
        code = finish_within(child, draw.uniform(0.0, seconds))
        code = kill(child) if code is None else code
    hub("/_faults/0/0")
    return code, fault


def push_round(number: int, draw: random.Random) -> tuple[str, str | None]:
    repo = f"me/push-{number}"
    if draw.random() < 0.5:
        hub(f"/_copy/{BASE}/to/{repo}")
    before = files_of(repo)
    code, fault = disturbed(lambda: push(NEW, repo), SECONDS["push"], draw)
    words, found = last_words(LOG), files_of(repo)
    if digest(NEW) != FOLDER:
        return fault, "the folder was changed"
    if found not in (before, PUSHED):
        return fault, f"the repository holds {sorted(found)}, neither what it held nor what was pushed"
    if code == RIGHT and found != PUSHED:
        return fault, "it ended well, but the files are not there"
    if code not in (RIGHT, REFUSED, -signal.SIGKILL):
        return fault, f"it ended with {code}: {words}"
    if code == REFUSED and "nothing was committed" in words and found != before:
        return fault, f"something was committed, but it says: {words}"
    if finish(start(lambda: push(NEW, repo), LOG)) != RIGHT or files_of(repo) != PUSHED:
        return fault, f"the next push failed: {last_words(LOG)}"
    return fault, None


def download_round(number: int, draw: random.Random) -> tuple[str, str | None]:
    shutil.rmtree(CACHE, ignore_errors=True)
    result = TOP / "weights.txt"

    def load(local: bool = False):
        return lambda: result.write_text(weights(BASE, local)) and None

    result.unlink(missing_ok=True)
    code, fault = disturbed(load(), SECONDS["download"], draw)
    words = last_words(LOG)
    if code not in (RIGHT, REFUSED, -signal.SIGKILL):
        return fault, f"it ended with {code}: {words}"
    if code == RIGHT and result.read_text() != WEIGHTS:
        return fault, "other weights were loaded"
    for local in (True, False):  # what is in the cache, without a network; and the next run
        result.unlink(missing_ok=True)
        code = finish(start(load(local), LOG))
        if code == RIGHT and result.read_text() != WEIGHTS:
            return fault, "something partial was taken for the weights"
        if code != RIGHT and not (local and code == REFUSED):
            return fault, f"the next run failed: {last_words(LOG)}"
    return fault, None


def timed(action) -> float:
    begun = time.monotonic()
    assert finish(start(action, LOG)) == RIGHT, LOG.read_text()
    return time.monotonic() - begun


FOLDER = digest(NEW)
assert finish(start(lambda: push(JOB["old"], BASE), LOG)) == RIGHT, LOG.read_text()
SECONDS = {"push": timed(lambda: push(NEW, "me/first"))}
PUSHED = files_of("me/first")
SECONDS["download"] = timed(lambda: (TOP / "weights.txt").write_text(weights(BASE)) and None)
WEIGHTS = (TOP / "weights.txt").read_text()

counts: dict[str, int] = {}
failures: list[str] = []
for number in range(JOB["rounds"]):
    draw = random.Random(f"{JOB['seed']}-{number}")
    name, action = [("push", push_round), ("download", download_round)][number % 2]
    fault, wrong = action(number, draw)
    counts[f"{name}, {fault}"] = counts.get(f"{name}, {fault}", 0) + 1
    if wrong is not None:
        failures.append(f"{name} {number} (seed {JOB['seed']}, {fault}): {wrong}")
JOBS.with_name("broken.json").write_text(json.dumps({"counts": counts, "failures": failures}))
