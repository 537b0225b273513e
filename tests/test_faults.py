"""Broken connections and dying ranks: nothing partial is taken for a result, and the next run works.

`TCSP_ROUNDS` sets how many rounds of each kind are tried, `TCSP_SEED` their seed. Kills of commands on one machine,
full disks, memory limits and missing rights are `tcsp selftest`'s.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from common import find
from hub_server import Hub
from processes import on_two_ranks
from test_calibration_checkpoint import assert_bit_equal
from test_push import run_script, save
from training import same

import tcsp_hf
from tcsp_hf import Calibration

ROUNDS, SEED = int(os.environ.get("TCSP_ROUNDS", "0")), int(os.environ.get("TCSP_SEED", "0"))
BERT = find("bert-ForSequenceClassification")


def _was_killed(folder: Path, said: str) -> bool:
    """Whether the victim came to its end, and the launcher names that, or what it saw first: the other's connection."""
    return folder.with_suffix(".killed").exists() and ("SIGKILL" in said or "by peer" in said)


@pytest.mark.slow
def test_broken_connections(tmp_path: Path) -> None:
    old, new = save(BERT, tmp_path / "old", hidden_size=8), save(BERT, tmp_path / "new", hidden_size=16)
    for folder in (old, new):
        tcsp_hf.publish.write_card(folder, tcsp_hf.publish.CardResults(machine="none"))
    job: dict[str, Any] = {"rounds": ROUNDS or 6, "seed": SEED, "old": str(old), "new": str(new)}
    with Hub(part_size=20_000) as hub:
        run_script("break_the_network.py", job, tmp_path, hub, limit=600 + 60 * job["rounds"])
    found = json.loads((tmp_path / "broken.json").read_text())
    print(f"{sum(found['counts'].values())} rounds, {hub.dropped} connections broken: {found['counts']}")
    assert not found["failures"], found
    assert sum(found["counts"].values()) == job["rounds"]


# Ranks that die -------------------------------------------------------------------------------------------------------

_CALIBRATE = """
import os, signal, sys, torch
torch.set_num_threads(1)
from common import find, make_dense, make_rows
from tcsp_hf.calibration import calibrate_on_ranks, run
from tcsp_hf.calibration.ranks import launched
from tcsp_hf.ranks import rank_and_size
folder, victim, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
case = find("bert-ForSequenceClassification")
with launched() as first:
    rank = rank_and_size()[0]
    seen, original = [], run.Recorder.start
    def start(self, inputs):
        seen.append(1)
        if rank == victim and len(seen) == batch:
            open(f"{folder}.killed", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, inputs)
    run.Recorder.start = start
    options = {"batch_size": 2, "progress": False, "checkpoint": f"{folder}/going", "checkpoint_every": 1}
    stats = calibrate_on_ranks(make_dense(case), make_rows(case, 20), **options)
    if first:
        stats.save(f"{folder}/stats")
    with open(f"{folder}/batches-{rank}", "w") as file:  # not printed: the lines of two processes may mix
        file.write(str(len(seen)))
"""


@pytest.mark.slow
def test_a_rank_killed_in_the_calibration(tmp_path: Path) -> None:
    """The others end with an error, nothing is written, and the next run goes on where it was."""
    (tmp_path / "rank.py").write_text(_CALIBRATE)
    whole = on_two_ranks(str(tmp_path / "rank.py"), str(tmp_path / "whole"), "-1", "0")
    assert whole.returncode == 0, whole.stderr
    expected = Calibration.load(tmp_path / "whole" / "stats")
    for number in range(ROUNDS or 1):
        folder = tmp_path / str(number)
        victim, batch = str((number + SEED) % 2), str(2 + (number // 2 + SEED) % 4)
        done = on_two_ranks(str(tmp_path / "rank.py"), str(folder), victim, batch)
        assert done.returncode != 0 and _was_killed(folder, done.stderr), done.stderr
        assert not (folder / "stats").exists()
        again = on_two_ranks(str(tmp_path / "rank.py"), str(folder), "-1", "0")
        assert again.returncode == 0, again.stderr
        batches = int((folder / f"batches-{victim}").read_text())
        assert batches == 5 - int(batch) + 1, "what was summed before the kill is not summed again"
        assert_bit_equal(Calibration.load(folder / "stats"), expected)


_TRAIN = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from transformers import TrainerCallback
from training import make_plain_trainer, weights
rank, folder = int(os.environ["RANK"]), Path({folder!r})

class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if rank == {victim} and state.global_step == {step}:
            folder.with_suffix(".killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)

trainer = make_plain_trainer(folder / "run", ddp_backend="gloo", **{fields})
trainer.add_callback(Kill())
trainer.train(resume_from_checkpoint={resume})
torch.save(weights(trainer.model), folder / f"{{rank}}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_a_rank_killed_in_the_training(tmp_path: Path) -> None:
    """The others end, and the next run resumes from the last complete checkpoint, to the same weights."""
    fields = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4}

    def run(folder: Path, victim: int, resume: bool = False) -> subprocess.CompletedProcess[str]:
        script = folder / "script.py"
        tests = str(Path(__file__).parent)
        options = {"tests": tests, "folder": str(folder), "victim": victim, "step": 2, "resume": resume}
        script.write_text(_TRAIN.format(**options, fields=repr(fields)))
        return on_two_ranks(str(script))

    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    assert run(tmp_path / "whole", -1).returncode == 0
    done = run(tmp_path / "killed", 1)
    assert done.returncode != 0 and _was_killed(tmp_path / "killed", done.stderr), done.stderr
    assert not list((tmp_path / "killed").glob("*.pt"))
    again = run(tmp_path / "killed", -1, resume=True)
    assert again.returncode == 0, again.stderr
    expected, found = (torch.load(tmp_path / name / "0.pt") for name in ("whole", "killed"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)
    assert same(found, torch.load(tmp_path / "killed" / "1.pt")), "both ranks hold the same model"
