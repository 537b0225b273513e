"""`TCSPTrainer` and `TCSPSeq2SeqTrainer`: calibrate, compress, fine-tune, as one `train()`.

The dense model is replaced before transformers' own `train()` begins, since its optimizer is made there. Resuming
builds the compressed model from the checkpoint's configuration and never calibrates again.
"""

import itertools
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Seq2SeqTrainer, Trainer, enable_full_determinism, set_seed

from ..architectures import family_of
from ..calibration import Calibration, calibrate
from ..calibration.fingerprint import model_fingerprint
from ..compression import Search, compress, removed_fraction
from ..compression.body import compress_body, has_body, new_head
from ..compression.request import check_request
from ..errors import TCSPError
from ..loading import load_model
from ..pooling import pooling_of_model
from ..ranks import on_every_rank, on_first_rank, rank_and_size, unwrap
from .arguments import TCSPTrainingArguments
from .checkpoint import Record, check_resumable, checkpoint_to_resume, load_targets, save_targets
from .distillation import Distiller, Silenced
from .sampler import EpochLengthSampler, EpochOfSampler
from .sites import Batch, SiteSums, SiteTargets

logger = logging.getLogger("tcsp_hf")
_INPUTS = ("input_ids", "inputs_embeds")
_ROW_NAMES = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "decoder_input_ids",
    "decoder_attention_mask",
    "labels",
)


def _plain(model: Any) -> Any:
    """The model inside PEFT's wrapper, if there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_compressed(model: Any) -> bool:
    return str(getattr(_plain(model).config, "model_type", "")).startswith("tcsp_")


class _CompressingTrainer(Trainer):
    """What both trainers add to transformers'."""

    args: TCSPTrainingArguments

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *more: Any,
        teacher: PreTrainedModel | None = None,
        calibration: Calibration | None = None,
        search: Search | None = None,
        **kwargs: Any,
    ) -> None:
        """As transformers' trainer.

        Args:
            model: dense (it is compressed when training starts) or compressed (it is fine-tuned).
            args: `TCSPTrainingArguments`, or the sequence-to-sequence ones.
            teacher: the dense model to learn from; where `model` is dense and its head is not new (see
                `compression.body.new_head`), `model` itself. Giving `model` says that its head was trained.
            calibration: statistics of `model` from elsewhere; collected on the training data when None.
            search: see `compress`; for several budgets with the same `calibration`.

        Raises:
            TCSPError: other arguments than ours, a dense model without a budget or one that cannot be compressed, an
                optimizer of a dense model, or evaluation asked for without data.
        """
        if not isinstance(args, TCSPTrainingArguments):
            raise TCSPError(f"args is a {type(args).__name__}; it must be TCSPTrainingArguments.")
        if args.eval_strategy != "no" and _argument("eval_dataset", 2, more, kwargs) is None:
            raise TCSPError(f"eval_strategy is {str(args.eval_strategy)!r}, but there is no eval_dataset: give one.")
        self.teacher = teacher
        self.calibration = calibration
        self.search = search
        self._distiller: Distiller | None = None
        self._record: Record | None = None
        self._checkpoint: Path | None = None
        self._starting = False
        self._silenced: Silenced | None = None
        super().__init__(model, args, *more, **kwargs)
        self._made_dense = not is_compressed(self.model)
        self._made_head = new_head(_plain(self.model)) if self._made_dense else None
        if self._made_dense:
            family_of(_plain(self.model))
            if args.remove is None and args.hidden_size is None and self.model_init is None:
                raise TCSPError("The model is dense, so a budget is needed: give remove= or hidden_size=.")
            if args.remove is not None or args.hidden_size is not None:
                check_request(_plain(self.model), remove=args.remove, hidden_size=args.hidden_size, axes=args.axes)
            if hasattr(self.model, "get_base_model"):
                raise TCSPError("A dense model with adapters was given: compress the model first, then wrap it.")
            self._check_no_optimizer()
        self.model_accepts_loss_kwargs = False  # its losses are means over a batch: steps that add up must be averaged
        if teacher is not None and is_compressed(teacher):
            raise TCSPError("teacher is a compressed model; it must be the dense one.")
        if args.n_gpu > 1 and args.distillation and args.hidden_weight:
            raise TCSPError("Hidden states cannot be compared under DataParallel: start with torchrun or accelerate.")
        if _reentrant(args) and args.distillation and args.hidden_weight:
            raise TCSPError(
                "use_reentrant=True was given, under which hidden states carry no gradient: take use_reentrant=False "
                "in the checkpointing arguments, or hidden_weight=0."
            )

    # Training -------------------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """As transformers' `train`; a dense model is calibrated on the training data and compressed first.

        Raises:
            TCSPError: no usable training data, no labels and no teacher, or a checkpoint that is dense, of another
                model or of another budget. Nothing was trained then.
        """
        if trial is not None:
            self._hp_search_setup(trial)  # a search may be over the budget
        self._checkpoint = checkpoint_to_resume(resume_from_checkpoint, str(self.args.output_dir))
        if self.model_init is None and not is_compressed(self.model):
            self._check_no_optimizer()
        self._check_data()
        self._check_lessons()
        self._starting = True
        try:
            if self.model_init is None:
                self._take(self._start(self.model))
            checkpoint = None if self._checkpoint is None else str(self._checkpoint)
            return super().train(checkpoint, trial, ignore_keys_for_eval)
        finally:
            unwrap(self)
            self._starting = False
            if self._silenced is not None:
                self._silenced.restore()
                self._silenced = None

    def calibrate(self) -> Calibration | None:
        """Statistics of the dense model on the training data, which `compress()` and `train()` go on from.

        Of the model below the head where that is new.

        Returns:
            None on ranks other than the first.

        Raises:
            TCSPError: no usable data, or the model is compressed.
        """
        if is_compressed(self.model):
            raise TCSPError("The model is compressed already.")
        self._check_data()
        dense: Any = self._as_it_is(self.model)
        if self.place_model_on_device:
            self._move_model_to_device(dense, self.args.device)
        return self._statistics(self._cut(dense))

    def compress(self) -> Any:
        """Calibrate and compress the dense model without training; `train()` afterwards only trains.

        Raises:
            TCSPError: no usable data, or the budget cannot be met.
        """
        if is_compressed(self.model):
            raise TCSPError("The model is compressed already.")
        self._check_no_optimizer()
        self._check_data()
        self.teacher = self._teacher_of(_plain(self.model))
        self._take(self._compressed(self.model))
        return _plain(self.model).eval()

    def call_model_init(self, trial: Any = None) -> Any:
        """As transformers'; when a training starts, the new model is compressed."""
        model = super().call_model_init(trial)
        return self._start(model) if self._starting else model

    def _start(self, model: Any) -> Any:
        """The model to train: `model` itself where that is compressed, otherwise a compressed one."""
        if is_compressed(model):
            budget = self.args.remove is not None or self.args.hidden_size is not None
            if budget and self._record is None:
                logger.warning("The model is compressed already: remove and hidden_size have no effect.")
            small, teacher = model, self.teacher
        else:
            teacher = self._teacher_of(model)
            small = self._compressed(model)
            if self.model_init is None:
                self.teacher = teacher  # a second call of train() goes on learning from it
        self._prepare_distiller(small, teacher)
        if not self._drops_out:
            self._silenced = Silenced(_plain(small))
        # every run goes on from the same random state, whether it calibrated or resumed
        (enable_full_determinism if self.args.full_determinism else set_seed)(self.args.seed)
        return small

    def _teacher_of(self, dense: Any) -> Any:
        """The model to learn from; None where a dense model's head is new and no other teacher was given."""
        if self.teacher is not None:
            return self.teacher
        head = new_head(_plain(dense))
        if head is None:
            return dense
        if self.args.distillation:
            logger.warning(
                "The dense model's %s was never trained (its bias is zero), so its outputs teach nothing: the labels "
                "alone do. Fine-tuning the dense model first keeps more; or give teacher=.",
                head,
            )
        return None

    @property
    def _drops_out(self) -> bool:
        """Whether the model's dropout is on while it is trained; see `TCSPTrainingArguments.dropout`."""
        if self.args.dropout is not None:
            return self.args.dropout
        return self._distiller is None

    def _take(self, model: Any) -> None:
        """Put another model in the place of the one that the trainer was made with."""
        if model is self.model:
            return
        if self.place_model_on_device:
            self._move_model_to_device(model, self.args.device)
        model.config.use_cache = self.args.use_cache
        self.model = self.model_wrapped = self.callback_handler.model = model
        self._signature_columns = None

    # Compression ----------------------------------------------------------------------------------------------------

    def _compressed(self, dense: Any) -> Any:
        budget = self.args.budget
        if self.args.remove is None and self.args.hidden_size is None:
            raise TCSPError("The model is dense, so a budget is needed: give remove= or hidden_size=.")
        if self._checkpoint is not None:
            candidates = [dense, dense.base_model] if new_head(dense) and has_body(dense) else [dense]
            known = [model_fingerprint(model) for model in candidates]
            self._record = check_resumable(self._checkpoint, budget, known)
            return load_model(str(self._checkpoint), "auto", str(self.args.device))
        dense = self._as_it_is(dense)
        if self.place_model_on_device:
            self._move_model_to_device(dense, self.args.device)
        cut = self._cut(dense)
        stats = self._statistics(cut)
        progress = False if self.args.disable_tqdm else None

        def make() -> PreTrainedModel:
            assert stats is not None  # the first rank holds them
            small = (compress if cut is dense else compress_body)(
                dense,
                stats,
                remove=self.args.remove,
                hidden_size=self.args.hidden_size,
                axes=self.args.axes,
                search=self.search,
                progress=progress,
            )
            return small.cpu() if rank_and_size()[1] > 1 else small

        small: Any = on_first_rank(make)
        small.doubt = None  # training starts from it, however far it is from the dense model
        if self.place_model_on_device:
            self._move_model_to_device(small, self.args.device)
        self._record = Record(budget, model_fingerprint(cut))
        logger.info("Compressed: %.1f %% of the parameters removed.", 100 * removed_fraction(dense, small))
        return small

    @staticmethod
    def _as_it_is(dense: Any) -> Any:
        """The model without the autocast that an evaluation in half precision put around its forward pass."""
        own = vars(dense).pop("_original_forward", None)  # accelerate's name; its unwrap_model takes decorators off too
        if own is not None:
            vars(dense).pop("forward", None)
            if dense.forward != own:  # it was another one's before
                dense.forward = own
        return dense

    def _cut(self, dense: Any) -> Any:
        """What is calibrated and compressed: the dense model, or the one below its head where that is new."""
        if self.teacher is dense or new_head(dense) is None or not has_body(dense):
            return dense
        return dense if self._is_of(dense, self.calibration) else dense.base_model

    @staticmethod
    def _is_of(dense: Any, stats: Calibration | None) -> bool:
        """Whether these are statistics of this model, as the first rank has both."""
        return on_first_rank(lambda: stats is not None and stats.model_fingerprint == model_fingerprint(dense))

    def _statistics(self, dense: Any) -> Calibration | None:
        """Statistics of a dense model on the training data; None on ranks other than the first."""
        if self._is_of(dense, self.calibration):
            return self.calibration

        def shard() -> Calibration | None:
            rows = self._calibration_rows()
            if not rows:
                return None  # fewer sequences than ranks
            flat = all(_is_flat(row) for row in rows)
            plain = [{name: row[name] for name in _ROW_NAMES if name in row} for row in rows] if flat else []
            return calibrate(
                dense,
                plain if flat else self._loader(rows),
                tokenizer=self.processing_class,
                pooling=self.args.pooling,
                seed=self.args.seed,
                progress=False if self.args.disable_tqdm or rank_and_size()[0] else None,
            )

        parts = [part for part in on_every_rank(shard) if part is not None]
        self.calibration = Calibration.merge(parts) if len(parts) > 1 else parts[0] if parts else None
        return self.calibration

    def _calibration_rows(self) -> list[Any]:
        """This rank's share of the sequences to calibrate on."""
        rank, size = rank_and_size()
        data: Any = self.train_dataset
        if hasattr(data, "__len__"):
            generator = torch.Generator().manual_seed(self.args.seed)
            chosen = torch.randperm(len(data), generator=generator)[: self.args.calibration_samples].tolist()
            return [data[i] for i in chosen[rank::size]]
        return list(itertools.islice(data, rank, self.args.calibration_samples, size))

    def _loader(self, rows: list[Any]) -> DataLoader[Any]:
        known = all(isinstance(row, Mapping) and "input_ids" in row for row in rows)
        rows = sorted(rows, key=lambda row: len(row["input_ids"])) if known else rows
        return DataLoader(rows, batch_size=32, collate_fn=self._collator())  # type: ignore[arg-type]

    def _collator(self) -> Any:
        return self._get_collator_with_removed_columns(self.data_collator, description="calibration")

    # Distillation ---------------------------------------------------------------------------------------------------

    def _prepare_distiller(self, small: Any, teacher: Any) -> None:
        self._distiller = None
        self.__dict__.pop("loss_is_scaled_for_ga", None)  # the class's: transformers decides where it is None
        self._note_training(_plain(small), 0.0 if teacher is None else self.args.distillation)
        if teacher is None or not self.args.distillation:
            return
        teacher = _plain(teacher)
        family_of(teacher)
        if self.args.place_model_on_device is not False:
            teacher.to(self.args.device)
        distiller = Distiller(
            teacher=teacher,
            targets=None,
            temperature=self.args.temperature,
            hidden_weight=self.args.hidden_weight,
            pooling=pooling_of_model(teacher, self.args.pooling),
            label_names=tuple(self.label_names),
            autocast=self.accelerator.autocast,
        )
        if self.args.hidden_weight:
            targets = None if self._checkpoint is None else load_targets(self._checkpoint)
            if targets is None:
                sums = on_every_rank(lambda: self._site_sums(distiller, _plain(small)))
                targets = on_first_rank(lambda: SiteTargets.solve(sums))
            distiller.targets = targets.to(self.args.device)
        self._distiller = distiller
        if getattr(self, "loss_is_scaled_for_ga", None) is None:
            self.loss_is_scaled_for_ga = False  # a mean over the batch, whatever the labels' part comes from

    @staticmethod
    def _note_training(small: Any, share: float) -> None:
        """In the model's provenance, for its card: the losses that stand there are of the cut alone."""
        options = (getattr(small.config, "projection", None) or {}).get("options")
        if options is not None:
            labels = "" if share == 1.0 else " and labels where there are any"
            options["trained"] = f"the dense model's outputs ({share:g}){labels}" if share else "labels alone"

    def _site_sums(self, distiller: Distiller, small: Any) -> SiteSums:
        rows = self._calibration_rows()

        def batches() -> Iterator[Batch]:
            # in the order that they were drawn: sorted by length, the first ones would be short
            for start in range(0, len(rows), 32):
                batch = self._prepare_inputs(self._collator()(rows[start : start + 32]))
                yield distiller.without_labels(distiller.complete(batch))

        return SiteSums.collect(distiller.teacher, small.to(self.args.device), batches())

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Of the labels and the dense model together while training; as transformers' otherwise."""
        distiller = self._distiller
        if distiller is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        share = self.args.distillation
        small = _plain(self.accelerator.unwrap_model(model))
        labelled = any(inputs.get(name) is not None for name in self.label_names)
        # (a loss of the user's own may need no labels; what a T5's teacher writes in their place is for itself)
        own = labelled or (self.compute_loss_func is not None and not distiller.writes)
        inputs = distiller.complete(inputs)
        with distiller.recording(small) as carried:
            if own and share < 1.0:
                count = self._get_num_items_in_batch([inputs], self.args.device)  # losses are means over a batch
                loss, outputs = super().compute_loss(model, dict(inputs), True, count)
            else:
                loss, outputs = None, model(**distiller.without_labels(inputs))
        learnt = distiller.loss(small, inputs, outputs, carried)
        loss = learnt if loss is None else (1.0 - share) * loss + share * learnt
        return (loss, outputs) if return_outputs else loss

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """As transformers', without residual maps: the norms' weights are part of them, and those do not decay."""
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith(".residual.weight")]

    # Data and checkpoints -------------------------------------------------------------------------------------------

    def _check_no_optimizer(self) -> None:
        """Raise TCSPError where there is an optimizer already, which would go on training the dense model."""
        if self.optimizer is not None:
            raise TCSPError(
                "There is an optimizer of the dense model, but training makes a new, compressed model: choose it by "
                "optim= in the arguments (or give optimizer_cls_and_kwargs to TCSPTrainer), or call compress() before "
                "an optimizer is made."
            )

    def _check_data(self) -> None:
        """Refuse data that the model could not read, before any work.

        Raises:
            TCSPError: no data, or columns that the model cannot read.
        """
        data = self.train_dataset
        if data is None:
            raise TCSPError("There is no train_dataset: give one.")
        if iter(data) is iter(data):
            raise TCSPError(
                "train_dataset can be read only once (its __iter__ gives the same iterator again), but its first rows "
                "are read before the training, to check and calibrate: let __iter__ start anew."
            )
        self._first_batch("train_dataset", data)
        evaluated = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        for name, data in evaluated.items():
            if data is not None and self.args.eval_strategy != "no":
                self._first_batch(f"eval_dataset {name}".strip(), data)

    def _check_lessons(self) -> None:
        """Raise TCSPError where the data has no labels and there is no teacher, nor a loss of the user's own."""
        if self.compute_loss_func is not None or type(self).compute_loss is not _CompressingTrainer.compute_loss:
            return
        batch = self._first_batch("train_dataset", self.train_dataset)
        labelled = any(batch.get(name) is not None for name in self.label_names)
        if self.model_init is not None:  # makes another one like the first
            dense, head = self._made_dense, self._made_head
        else:
            dense = not is_compressed(self.model)
            head = new_head(_plain(self.model)) if dense else None
        own = head is None and dense
        taught = self.args.distillation > 0 and (self.teacher is not None or own)
        if not labelled and not taught:
            new = "" if head is None else f" (the bias of its {head} is zero, as that of one that was never trained)"
            raise TCSPError(
                f"train_dataset has no labels ({', '.join(self.label_names) or 'the model takes none'}), and there is "
                f"no dense model to learn from{new}: give labels, or teacher= and distillation above 0."
            )

    def _first_batch(self, where: str, data: Any) -> Mapping[str, Any]:
        row = next(iter(data), None)
        if row is None:
            raise TCSPError(f"{where} is empty.")
        try:
            batch = self._collator()([row])
        except Exception as error:
            if isinstance(row, Mapping) and any(name in row for name in _INPUTS):
                raise
            raise self._no_inputs(where, row) from error
        if not any(name in batch for name in _INPUTS):
            raise self._no_inputs(where, row)
        return batch

    @staticmethod
    def _no_inputs(where: str, row: Any) -> TCSPError:
        found = ", ".join(row) if isinstance(row, Mapping) else type(row).__name__
        return TCSPError(
            f"{where} gives no input_ids to the model; its columns: {found}. Tokenise it first, or give a "
            "data_collator that does (with remove_unused_columns=False)."
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler: Any = super()._get_train_sampler(train_dataset)
        if self.args.train_sampling_strategy != "group_by_length" or sampler is None:
            return sampler
        made = EpochLengthSampler(sampler.batch_size, lengths=sampler.lengths, seed=self._data_seed)
        self.add_callback(EpochOfSampler(made))
        return made

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if not self.args.should_save:
            return
        if self._record is not None:
            self._record.save(Path(output_dir))
        if self._distiller is not None and self._distiller.targets is not None:
            save_targets(Path(output_dir), self._distiller.targets)


def _argument(name: str, position: int, more: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An argument of transformers' trainer that may have been given by position (after model and args)."""
    return kwargs.get(name, more[position] if len(more) > position else None)


def _reentrant(args: TCSPTrainingArguments) -> bool:
    names = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")  # the new name, and the old one
    return any(bool((getattr(args, name, None) or {}).get("use_reentrant")) for name in names)


def _is_flat(row: Any) -> bool:
    ids = row.get("input_ids") if isinstance(row, Mapping) else None
    return ids is not None and len(ids) > 0 and not hasattr(ids[0], "__len__") and getattr(ids, "ndim", 1) == 1


class TCSPTrainer(_CompressingTrainer):
    """transformers' `Trainer` for compressed models.

    Given a dense model, `train()` calibrates it on the training data, compresses it to the budget of the arguments,
    and fine-tunes the result (`trainer.model`) with the dense model as teacher; given a compressed model it fine-tunes
    only. Everything else is `Trainer`'s.
    """


class TCSPSeq2SeqTrainer(_CompressingTrainer, Seq2SeqTrainer):
    """`TCSPTrainer` over transformers' `Seq2SeqTrainer`, for models that write text."""
