"""Projects a dense BERT into subspaces, site by site (design of `modeling_tcsp_bert`); all products in float64."""

import math

import torch
from transformers import PreTrainedModel

from .. import modeling_tcsp_bert
from ..configuration_tcsp_bert import TCSPBertConfig
from .subspace import Basis

Tensors = dict[str, torch.Tensor]
MLM_SITE = "mlm_head"


def model_class(head: str) -> type[PreTrainedModel]:
    return getattr(modeling_tcsp_bert, f"TCSPBert{head}")


def config_fields(dense: PreTrainedModel, sizes: dict[str, int]) -> dict[str, object]:
    """Fields of `TCSPBertConfig` beside the stock ones, for these site sizes."""
    config = dense.config
    sites = [size for name, size in sizes.items() if name != MLM_SITE]
    return {
        "hidden_size": sites[-1],
        "source_hidden_size": config.hidden_size,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "site_hidden_sizes": sites,
        "mlm_head_size": sizes.get(MLM_SITE),
        "tie_word_embeddings": False,
    }


def project(dense: PreTrainedModel, config: TCSPBertConfig, bases: dict[str, Basis]) -> Tensors:
    """State dict of the compressed model; bases: site name -> subspace, in the order of the forward pass."""
    source = {name: value.detach().to("cpu", torch.float64) for name, value in dense.state_dict().items()}
    prefix = "bert." if hasattr(dense, "bert") else ""
    result: Tensors = {}
    names = [name for name in bases if name != MLM_SITE]

    def norm(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return source[f"{prefix}{name}.weight"], source[f"{prefix}{name}.bias"]

    def norm_scale(basis: Basis) -> torch.Tensor:
        scale = math.sqrt(basis.gain * config.dense_hidden_size / basis.size)
        return torch.full((basis.size,), scale, dtype=torch.float64)

    def reader(name: str, gamma: torch.Tensor, beta: torch.Tensor, basis: Basis) -> Tensors:
        weight = source[f"{name}.weight"]
        return {
            "weight": weight @ (gamma[:, None] * basis.decoder),
            "bias": source[f"{name}.bias"] + weight @ beta,
        }

    first = bases[names[0]]
    for table in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        # centring each row centres their sum
        key = f"{prefix}embeddings.{table}.weight"
        result[key] = _centred(source[key]) @ first.encoder
    result[f"{prefix}embeddings.norm.weight"] = norm_scale(first)

    gamma, beta = norm("embeddings.LayerNorm")
    here = first
    for i in range(config.num_hidden_layers):
        layer = f"{prefix}encoder.layer.{i}"
        parts = [reader(f"{layer}.attention.self.{p}", gamma, beta, here) for p in ("query", "key", "value")]
        for kind in ("weight", "bias"):
            result[f"{layer}.attention.self.qkv.{kind}"] = torch.cat([part[kind] for part in parts])
        for block, site in (("attention.output", f"layer.{i}.attention"), ("output", f"layer.{i}.output")):
            there = bases[site]
            if block == "output":
                for kind, value in reader(f"{layer}.intermediate.dense", gamma, beta, here).items():
                    result[f"{layer}.intermediate.dense.{kind}"] = value
            writer = _centring_rows(there.encoder)  # (D, k): E'M, transposed
            dense_weight = source[f"{layer}.{block}.dense.weight"]
            result[f"{layer}.{block}.dense.weight"] = writer.T @ dense_weight
            result[f"{layer}.{block}.dense.bias"] = writer.T @ (source[f"{layer}.{block}.dense.bias"] + beta)
            full = here.size == there.size == config.dense_hidden_size
            result[f"{layer}.{block}.residual.weight"] = (
                gamma.clone() if full else writer.T @ (gamma[:, None] * here.decoder)
            )
            result[f"{layer}.{block}.norm.weight"] = norm_scale(there)
            gamma, beta = norm(f"encoder.layer.{i}.{block}.LayerNorm")
            here = there

    result[f"{prefix}lift_map.weight"] = gamma[:, None] * here.decoder
    result[f"{prefix}lift_map.bias"] = beta
    pooler = f"{prefix}pooler.dense"
    if f"{pooler}.weight" in source:
        for kind, value in reader(pooler, gamma, beta, here).items():
            result[f"{pooler}.{kind}"] = value
    _project_heads(dense, source, result, bases, gamma, beta, here)
    return result


def _project_heads(
    dense: PreTrainedModel,
    source: Tensors,
    result: Tensors,
    bases: dict[str, Basis],
    gamma: torch.Tensor,
    beta: torch.Tensor,
    here: Basis,
) -> None:
    """The task heads: those on the pooler's output stay, those on hidden states read the last site."""
    reads_pooler = getattr(dense.base_model, "pooler", None) is not None
    for name in ("classifier", "qa_outputs"):
        if f"{name}.weight" not in source:
            continue
        weight, bias = source[f"{name}.weight"], source[f"{name}.bias"]
        if not reads_pooler:
            bias = bias + weight @ beta
            weight = weight @ (gamma[:, None] * here.decoder)
        result[f"{name}.weight"], result[f"{name}.bias"] = weight, bias
    if "cls.seq_relationship.weight" in source:
        for kind in ("weight", "bias"):
            result[f"cls.seq_relationship.{kind}"] = source[f"cls.seq_relationship.{kind}"]
    if "cls.predictions.decoder.weight" in source:
        head = bases[MLM_SITE]
        transform = "cls.predictions.transform"
        weight = source[f"{transform}.dense.weight"]
        result["cls.predictions.dense.weight"] = weight @ (gamma[:, None] * here.decoder)
        result["cls.predictions.dense.bias"] = source[f"{transform}.dense.bias"] + weight @ beta
        result["cls.predictions.projection.weight"] = head.encoder.T.clone()
        head_gamma, head_beta = source[f"{transform}.LayerNorm.weight"], source[f"{transform}.LayerNorm.bias"]
        decoder = source["cls.predictions.decoder.weight"]
        result["cls.predictions.decoder.weight"] = decoder @ (head_gamma[:, None] * head.decoder)
        result["cls.predictions.decoder.bias"] = source["cls.predictions.decoder.bias"] + decoder @ head_beta


def _centred(rows: torch.Tensor) -> torch.Tensor:
    """Rows x (n, D) -> M x."""
    return rows - rows.mean(dim=1, keepdim=True)


def _centring_rows(encoder: torch.Tensor) -> torch.Tensor:
    """M E (D, k): encodes after subtracting the mean over D."""
    return encoder - encoder.mean(dim=0, keepdim=True)
