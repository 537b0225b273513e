"""Cards for the checkpoints that a `Trainer` writes."""

import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..configuration_tcsp import TCSPConfig
from .card import CARD_FILE, write_card
from .results import CardResults, Evaluation

logger = logging.getLogger("tcsp_hf")


class ModelCardCallback(TrainerCallback):
    """Writes a card beside every checkpoint of a compressed model that has none, with the scores so far.

    Args:
        dataset: the Hub's name of the evaluation data; without it the scores are left out of the card.
        split, config, task: as in `Evaluation`.
        results: anything else that the card shows.
    """

    def __init__(
        self,
        dataset: str | None = None,
        *,
        task: str = "text-classification",
        split: str = "validation",
        config: str | None = None,
        results: CardResults | None = None,
    ) -> None:
        self.dataset, self.task, self.split, self.config = dataset, task, split, config
        self.results = results or CardResults()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the newest scores; times and rates are none."""
        if self.dataset is None:
            return
        scores = []
        for name, value in (metrics or {}).items():
            metric = name.removeprefix("eval_")
            speed = metric.endswith(("runtime", "_per_second", "_time")) or metric == "epoch"
            if isinstance(value, (int, float)) and not speed:
                scores.append(Evaluation(self.task, self.dataset, self.split, metric, float(value), config=self.config))
        self.results = self.results.merge(CardResults(evaluations=tuple(scores)))

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Beside the checkpoint just written; a card that is there stays.

        Where none can be written a warning says so: the training goes on.
        """
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if not state.is_world_process_zero or not folder.is_dir() or (folder / CARD_FILE).exists():
            return
        if isinstance(getattr(model, "config", None), TCSPConfig) and (folder / "config.json").is_file():
            try:
                write_card(folder, self.results)
            except Exception as error:  # whatever it is, hours of training are worth more than a card
                logger.warning("No model card was written to %s: %s", folder, error)
