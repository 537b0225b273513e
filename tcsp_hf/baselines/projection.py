"""Hidden size alone by principal components, without a refit: the paper's way, and with a subspace per site."""

from transformers import PreTrainedModel

from ..calibration import Calibration
from ..compression import compress
from .budget import finished, parameters_to_remove, working_copy


def shared_pca(model: PreTrainedModel, stats: Calibration, removed: float) -> PreTrainedModel:
    """One subspace from the pooled second moments of all sites (Hu et al. 2023, arXiv 2308.16475)."""
    return _pca(model, stats, removed, "shared")


def per_site_pca(model: PreTrainedModel, stats: Calibration, removed: float) -> PreTrainedModel:
    """A subspace for every site of a BERT, for every stack of a T5, from its own second moments."""
    return _pca(model, stats, removed, "per_site")


def _pca(model: PreTrainedModel, stats: Calibration, removed: float, projection: str) -> PreTrainedModel:
    if parameters_to_remove(model, removed) == 0:
        return finished(working_copy(model))
    return compress(model, stats, remove=removed, axes=("hidden",), subspace="pca", projection=projection, refit=False)
