"""`import tcsp_hf` is light, and the Auto classes know the compressed models all the same."""

import subprocess
import sys
from pathlib import Path

import pytest
from common import find, make_small, make_tokenizer

import tcsp_hf


def run(program: str, *arguments: str) -> str:
    """Standard output of a new process."""
    found = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_nothing_heavy_is_imported() -> None:
    program = """
import sys
import transformers
before = set(sys.modules)
import tcsp_hf
print(" ".join(sorted(set(sys.modules) - before)))
"""
    added = run(program).split()
    assert set(added) >= {"tcsp_hf", "tcsp_hf.registration"}
    heavy = ("torch", "datasets", "transformers", "tcsp_hf.modeling", "tcsp_hf.configuration", "tcsp_hf.calibration")
    assert not [name for name in added if name.startswith(heavy)]
    assert not [name for name in added if name.startswith(("tcsp_hf.compression", "tcsp_hf.export", "tcsp_hf.cli"))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A BERT classifier and a T5 encoder, each with a tokenizer."""
    top = tmp_path_factory.mktemp("small")
    for name in ("bert-ForSequenceClassification", "t5-EncoderModel"):
        make_small(find(name)).save_pretrained(top / name)
        make_tokenizer().save_pretrained(top / name)
    return str(top / "bert-ForSequenceClassification"), str(top / "t5-EncoderModel")


ORDERS = {
    "package first": "import tcsp_hf\nimport transformers",
    "transformers first": "import transformers\nimport tcsp_hf",
    "Auto classes first": "import transformers\nfrom transformers import AutoModel, AutoTokenizer\nimport tcsp_hf",
    "models first": "import transformers\nimport transformers.models.bert.modeling_bert\nimport tcsp_hf",
    "between": "from transformers import AutoConfig\nimport tcsp_hf\nimport transformers",
    "modeling utilities next": "import tcsp_hf\nimport transformers.modeling_utils\nimport transformers",
    "pipelines next": "import tcsp_hf\nimport transformers.pipelines\nimport transformers",
}
USES = """
import pickle, sys
bert, t5 = sys.argv[1:]
assert not any(name.startswith("tcsp_hf.modeling") for name in sys.modules), "modeling files before they are needed"
assert type(transformers.AutoConfig.from_pretrained(bert)).__name__ == "TCSPBertConfig"
assert transformers.AutoTokenizer.from_pretrained(t5)("w1")["input_ids"]
assert not any(name.startswith("tcsp_hf.modeling") for name in sys.modules)
model = transformers.AutoModel.from_pretrained(bert)
assert type(model) is tcsp_hf.TCSPBertModel
assert "tcsp_hf.modeling_tcsp_t5" not in sys.modules
assert type(transformers.AutoModel.from_pretrained(t5)) is tcsp_hf.TCSPT5EncoderModel
assert type(pickle.loads(pickle.dumps(model))) is tcsp_hf.TCSPBertModel
assert type(transformers.pipeline("text-classification", model=bert).model) is tcsp_hf.TCSPBertForSequenceClassification
mapping = transformers.AutoModel._model_mapping
own = mapping._extra_content  # all of the mapping would import every model of transformers
assert tcsp_hf.TCSPBertConfig in mapping and tcsp_hf.TCSPBertModel in own.values()
assert (tcsp_hf.TCSPT5Config, (tcsp_hf.TCSPT5Model, tcsp_hf.TCSPT5EncoderModel)) in own.items()
again = pickle.loads(pickle.dumps(transformers.models.auto.modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING))
assert again[tcsp_hf.TCSPBertConfig] is tcsp_hf.TCSPBertForSequenceClassification
tcsp_hf.registration.register()
assert mapping[tcsp_hf.TCSPBertConfig] is tcsp_hf.TCSPBertModel
"""


@pytest.mark.parametrize(
    "order", [pytest.param(order, marks=() if i in (0, 2) else pytest.mark.slow) for i, order in enumerate(ORDERS)]
)
def test_auto_classes_in_any_order(order: str, folders: tuple[str, str]) -> None:
    run(ORDERS[order] + USES, *folders)


def test_pickle_alone(folders: tuple[str, str], tmp_path: Path) -> None:
    """A process that has imported nothing yet reads a model back."""
    import pickle

    path = tmp_path / "model.pickle"
    path.write_bytes(pickle.dumps(make_small(find("bert-Model"))))
    program = "import pickle, sys; print(type(pickle.load(open(sys.argv[1], 'rb'))).__name__)"
    assert run(program, str(path)).strip() == "TCSPBertModel"


def test_names() -> None:
    for name in tcsp_hf.__all__:
        assert getattr(tcsp_hf, name) is not None and name in dir(tcsp_hf)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        tcsp_hf.nonsense  # noqa: B018
