"""Tasks for MTEB (`pip install mteb`) from data at hand, so that its own evaluator runs without a network."""

import importlib
from typing import Any

from ..data import load_squad_sample
from ..data.sources import load_data
from ..errors import TCSPError

TASKS = ("squad-sample", "stsb")


def require_mteb() -> Any:
    """The library.

    Raises:
        TCSPError: it is not installed.
    """
    try:
        return importlib.import_module("mteb")
    except ImportError as error:
        raise TCSPError("This needs mteb: pip install mteb.") from error


def local_task(name: str) -> Any:
    """An MTEB task: `squad-sample`, a retrieval of 600 paragraphs by 1,000 questions that the package carries, or
    `stsb`, the labelled pairs of GLUE's STS-B, validation split, from the Hub or from the folder `TCSP_DATA_DIR`.

    Raises:
        TCSPError: there is no such task, or mteb is not installed.
    """
    if name not in TASKS:
        raise TCSPError(f"There is no task {name!r}; allowed: {', '.join(TASKS)}.")
    require_mteb()
    return _retrieval() if name == "squad-sample" else _similarity()


def _metadata(**fields: Any) -> Any:
    from mteb.abstasks.task_metadata import TaskMetadata

    return TaskMetadata(eval_langs=["eng-Latn"], category="t2t", modalities=["text"], **fields)


def _retrieval() -> Any:
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval

    class SquadSampleRetrieval(AbsTaskRetrieval):
        metadata = _metadata(
            name="SquadSampleRetrieval",
            description="Questions of SQuAD v1.1 about paragraphs of 48 articles.",
            dataset={"path": "rajpurkar/squad", "revision": "main"},
            type="Retrieval",
            eval_splits=["validation"],
            main_score="ndcg_at_10",
        )

        def load_data(self, *args: Any, **kwargs: Any) -> None:
            sample = load_squad_sample()
            corpus = [{"id": f"p{i}", "title": "", "text": text} for i, text in enumerate(sample.paragraphs)]
            queries = [{"id": f"q{i}", "text": text} for i, text in enumerate(sample.questions)]
            relevant = {f"q{i}": {f"p{answer}": 1} for i, answer in enumerate(sample.answers_in)}
            split = {
                "corpus": Dataset.from_list(corpus),
                "queries": Dataset.from_list(queries),
                "relevant_docs": relevant,
                "top_ranked": None,
            }
            self.dataset: Any = {"default": {"validation": split}}
            self.data_loaded = True

    return SquadSampleRetrieval()


def _similarity() -> Any:
    from datasets import DatasetDict
    from mteb.abstasks.sts import AbsTaskSTS

    class LocalSTSBenchmark(AbsTaskSTS):
        min_score, max_score = 0, 5
        metadata = _metadata(
            name="LocalSTSBenchmark",
            description="STS-B as GLUE has it, labelled pairs.",
            dataset={"path": "nyu-mll/glue", "revision": "main"},
            type="STS",
            eval_splits=["validation"],
            main_score="cosine_spearman",
        )

        def load_data(self, *args: Any, **kwargs: Any) -> None:
            pairs = load_data("stsb", "validation").rename_column("label", "score")
            self.dataset: Any = DatasetDict({"validation": pairs})
            self.data_loaded = True

    return LocalSTSBenchmark()


def evaluate(model: Any, task: Any, batch_size: int = 64) -> dict[str, float]:
    """MTEB's scores of a SentenceTransformer on a task; nothing is cached.

    Raises:
        TCSPError: mteb is not installed.
    """
    mteb = require_mteb()
    found = mteb.evaluate(
        model, task, cache=None, co2_tracker=False, show_progress_bar=False, encode_kwargs={"batch_size": batch_size}
    )
    (scores,) = found.task_results[0].scores["validation"]
    return {name: float(value) for name, value in scores.items() if isinstance(value, (int, float))}
