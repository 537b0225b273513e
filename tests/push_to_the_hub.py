"""Run by test_push.py in a process of its own, whose HF_ENDPOINT is the loopback Hub: pushes checkpoints.

Reads a JSON file of jobs (name -> how, folder, repo_id, options) and writes their results beside it. The client waits
seconds between its tries after a broken connection; here it does not.
"""

import json
import logging
import sys
from pathlib import Path

import huggingface_hub
import transformers
from impatient import do_not_wait
from typer.testing import CliRunner

import tcsp_hf
from tcsp_hf.cli.main import app
from tcsp_hf.publish import push

do_not_wait()
logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
huggingface_hub.logging.set_verbosity_debug()


def run(how, folder, repo_id, options):
    if how == "push":
        return push(folder, repo_id, **options).url
    if how in ("model", "save"):
        auto, tokenizer = options.pop("auto"), transformers.AutoTokenizer.from_pretrained(folder)
        model = getattr(transformers, auto).from_pretrained(folder)
        if how == "model":
            return model.push_to_hub(repo_id, tokenizer=tokenizer, **options)
        return model.save_pretrained(f"{folder}-saved", push_to_hub=True, repo_id=repo_id, tokenizer=tokenizer)
    if how == "stock":  # transformers' own, which the code beside a checkpoint uses
        tcsp_hf.modeling_tcsp_bert.TCSPPreTrainedMixin.publisher = None
        return getattr(transformers, options["auto"]).from_pretrained(folder).push_to_hub(repo_id)
    found = CliRunner().invoke(app, ["push", folder, repo_id, *options["words"]])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found.output


JOBS = Path(sys.argv[1])
results = {}
for name, job in json.loads(JOBS.read_text()).items():
    try:
        results[name] = {"url": run(**job)}
    except tcsp_hf.TCSPError as error:
        results[name] = {"error": str(error)}
JOBS.with_name("pushed.json").write_text(json.dumps(results))
