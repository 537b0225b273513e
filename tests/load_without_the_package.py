"""Run by test_save_load.py in a process where `tcsp_hf` cannot be imported: loads checkpoints with their own code.

Reads a JSON file of jobs, one per checkpoint, and writes what it found beside it. A job loads from its folder, or from
the Hub's repository that it names.
"""

import json
import sys
from pathlib import Path

JOBS = Path(sys.argv[1])


class Blocker:
    """The package may be installed; here it must not be found."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tcsp_hf":
            raise ModuleNotFoundError("tcsp_hf is blocked: the checkpoint must not need it")


sys.meta_path.insert(0, Blocker())

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

torch.set_num_threads(1)  # as in the tests: sums are grouped alike
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def forward(model, folder):
    inputs = load_file(folder / "inputs" / "inputs.safetensors")
    with torch.no_grad():
        return model.eval()(**inputs)[0]


def base_tensors(model):
    return model.base_model.state_dict()


def differing(one, other):
    """Names in both state dicts of the base models whose tensors differ, and how many names they share."""
    common = one.keys() & other.keys()
    return [name for name in common if not torch.equal(one[name], other[name])], len(common)


results = {}
for name, job in json.loads(JOBS.read_text()).items():
    folder = Path(job["folder"])
    source = {"pretrained_model_name_or_path": job.get("repo", folder), "trust_remote_code": True}
    if "revision" in job:
        source["revision"] = job["revision"]
    result = results[name] = {"classes": {}, "modules": [], "differing": {}, "shared": {}, "equal": {}}
    own = getattr(transformers, job["auto"]).from_pretrained(**source)
    result["own"] = type(own).__name__
    result["modules"].append(type(own).__module__)
    output = forward(own, folder)
    result["config"] = type(transformers.AutoConfig.from_pretrained(**source)).__name__
    for auto in job["others"]:
        model = getattr(transformers, auto).from_pretrained(**source)
        result["classes"][auto] = type(model).__name__
        result["modules"].append(type(model).__module__)
        result["differing"][auto], result["shared"][auto] = differing(base_tensors(own), base_tensors(model))
        if type(model) is type(own):
            result["equal"][auto] = torch.equal(forward(model, folder), output)
    if "pipeline" in job:
        name = str(job.get("repo", folder))
        pipe = transformers.pipeline(job["pipeline"], name, revision=job.get("revision"), trust_remote_code=True)
        result["pipeline"] = pipe(job["text"])
    again = folder.with_name(folder.name + "-again")
    own.save_pretrained(again)
    result["files"] = sorted(path.name for path in again.iterdir())
    result["auto_map"] = json.loads((again / "config.json").read_text()).get("auto_map")
    (again / "inputs").symlink_to(folder / "inputs")
    reloaded = getattr(transformers, job["auto"]).from_pretrained(again, trust_remote_code=True)
    result["same_again"] = torch.equal(forward(reloaded, again), output)
    tensors = {"output": output.contiguous()}
    if hasattr(own, "lift") and "Model" in type(own).__name__:
        tensors["lifted"] = own.lift(output).contiguous()
    save_file(tensors, folder / "inputs" / "found.safetensors")
assert not [module for module in sys.modules if module.partition(".")[0] == "tcsp_hf"]
JOBS.with_name("results.json").write_text(json.dumps(results))
