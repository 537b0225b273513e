"""Projects a dense BERT into subspaces, site by site (design of `modeling_tcsp_bert`); all products in float64."""

import math

import torch
from transformers import PreTrainedModel

from .. import modeling_tcsp_bert
from .least_squares import NormalEquations, ridge
from .plan import Sizes
from .refit_bert import RefitResult
from .subspace import Basis
from .weights import DenseWeights, Tensors

MLM_SITE = "mlm_head"


def model_class(head: str) -> type[PreTrainedModel]:
    return getattr(modeling_tcsp_bert, f"TCSPBert{head}")


def config_fields(dense: PreTrainedModel, widths: dict[str, int], sizes: Sizes) -> dict[str, object]:
    """Fields of `TCSPBertConfig` beside the stock ones, for these site widths and, where cut, layer sizes."""
    config = dense.config
    sites = [size for name, size in widths.items() if name != MLM_SITE]
    head = config.hidden_size // config.num_attention_heads
    layers: dict[str, object] = {}
    for name, chosen, whole in (
        ("layer_intermediate_sizes", sizes.filters, config.intermediate_size),
        ("layer_attention_heads", sizes.heads, config.num_attention_heads),
        ("layer_qk_head_sizes", sizes.qk, head),
        ("layer_vo_head_sizes", sizes.vo, head),
    ):
        if any(size != whole for size in chosen):
            layers[name] = list(chosen)
    return {
        **layers,
        "hidden_size": sites[-1],
        "source_hidden_size": config.hidden_size,
        "head_dim": head,
        "site_hidden_sizes": sites,
        "mlm_head_size": widths.get(MLM_SITE),
        "tie_word_embeddings": MLM_SITE not in widths,  # a masked-LM head put on an encoder later is tied
    }


def project(dense: PreTrainedModel, bases: dict[str, Basis]) -> Tensors:
    """State dict of the compressed model; bases: site name -> subspace, in the order of the forward pass."""
    source = DenseWeights(dense)
    prefix = "bert." if hasattr(dense, "bert") else ""
    result = Tensors(dense)
    names = [name for name in bases if name != MLM_SITE]

    def norm(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return source[f"{prefix}{name}.weight"], source[f"{prefix}{name}.bias"]

    def norm_scale(basis: Basis) -> torch.Tensor:
        scale = math.sqrt(basis.gain * dense.config.hidden_size / basis.size)
        return torch.full((basis.size,), scale, dtype=torch.float64)

    def reader(name: str, gamma: torch.Tensor, beta: torch.Tensor, basis: Basis) -> dict[str, torch.Tensor]:
        weight = source[f"{name}.weight"]
        return {
            "weight": weight @ (gamma[:, None] * basis.decoder),
            "bias": source[f"{name}.bias"] + weight @ beta,
        }

    first = bases[names[0]]
    for table in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        # centring each row centres their sum
        key = f"{prefix}embeddings.{table}.weight"
        result[key] = source.table(key, first.encoder, centred=True)
    result[f"{prefix}embeddings.norm.weight"] = norm_scale(first)

    gamma, beta = norm("embeddings.LayerNorm")
    here = first
    for i in range(dense.config.num_hidden_layers):
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
            full = here.size == there.size == dense.config.hidden_size
            result[f"{layer}.{block}.residual.weight"] = (
                gamma.clone() if full else writer.T @ (gamma[:, None] * here.decoder)
            )
            result[f"{layer}.{block}.norm.weight"] = norm_scale(there)
            gamma, beta = norm(f"encoder.layer.{i}.{block}.LayerNorm")
            here = there

    result.update(project_heads(dense, source, bases, (gamma[:, None] * here.decoder, beta)))
    return result


def assemble(dense: PreTrainedModel, bases: dict[str, Basis], made: RefitResult) -> Tensors:
    """State dict of a refit model: the solved blocks, and the heads that read them.

    A classifier on the pooler is solved again as well, to reproduce the dense logits from the pooled features.
    """
    source = DenseWeights(dense)
    tensors = made.tensors
    tensors.update(project_heads(dense, source, bases, made.reader))
    if "classifier.weight" in source and "bert.pooler.dense.weight" in source:
        tensors["classifier.weight"], tensors["classifier.bias"] = _refit_classifier(dense, source, tensors, made)
    made.carried.close()
    made.target.close()
    return tensors


def _refit_classifier(
    dense: PreTrainedModel, source: DenseWeights, tensors: Tensors, made: RefitResult
) -> tuple[torch.Tensor, torch.Tensor]:
    norm = f"bert.encoder.layer.{dense.config.num_hidden_layers - 1}.output.LayerNorm"
    gamma, beta = source[f"{norm}.weight"], source[f"{norm}.bias"]
    weight, bias = source["classifier.weight"], source["classifier.bias"]
    pooler = "bert.pooler.dense"
    pooler_weight, pooler_bias = (tensors[f"{pooler}.{kind}"].double() for kind in ("weight", "bias"))
    equations = NormalEquations.zeros(weight.shape[1], weight.shape[0], torch.device("cpu"))
    for group in made.sample.groups:
        first = slice(None, None, group.length)
        hidden = made.target.read(group.rows)[first].double() * gamma + beta
        wanted = torch.tanh(hidden @ source[f"{pooler}.weight"].T + source[f"{pooler}.bias"]) @ weight.T + bias
        carried = made.carried.read(group.rows)[first].double()
        pooled = torch.tanh(carried @ pooler_weight.T + pooler_bias)
        ones = torch.ones(len(pooled), dtype=torch.float64)
        equations.add([pooled], wanted, ones, made.sample.held_out[group.rows][first])
    solution = ridge(equations, torch.cat([weight.T, bias[None]]))
    return solution[:-1].T.contiguous(), solution[-1].contiguous()


def project_heads(
    dense: PreTrainedModel, source: DenseWeights, bases: dict[str, Basis], last: tuple[torch.Tensor, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Everything after the last site; last: (weight (D, k), offset (D,)), hidden state ~ weight @ z + offset.

    What reads the pooler's output stays as it is, what reads hidden states reads the last site.
    """
    prefix = "bert." if hasattr(dense, "bert") else ""
    result = {f"{prefix}lift_map.weight": last[0], f"{prefix}lift_map.bias": last[1]}

    def read_last(name: str, target: str) -> None:
        weight = source[f"{name}.weight"]
        result[f"{target}.weight"] = weight @ last[0]
        result[f"{target}.bias"] = source[f"{name}.bias"] + weight @ last[1]

    pooled = f"{prefix}pooler.dense.weight" in source
    if pooled:
        read_last(f"{prefix}pooler.dense", f"{prefix}pooler.dense")
    for name in ("classifier", "qa_outputs", "cls.seq_relationship"):
        if f"{name}.weight" not in source:
            continue
        if pooled:
            result[f"{name}.weight"], result[f"{name}.bias"] = source[f"{name}.weight"], source[f"{name}.bias"]
        else:
            read_last(name, name)
    if "cls.predictions.decoder.weight" in source:
        head = bases[MLM_SITE]
        transform = "cls.predictions.transform"
        read_last(f"{transform}.dense", "cls.predictions.dense")
        result["cls.predictions.projection.weight"] = head.encoder.T.clone()
        head_gamma, head_beta = source[f"{transform}.LayerNorm.weight"], source[f"{transform}.LayerNorm.bias"]
        decoder = "cls.predictions.decoder"
        reading = torch.cat([head_gamma[:, None] * head.decoder, head_beta[:, None]], dim=1)
        read = source.table(f"{decoder}.weight", reading, torch.float64)
        result[f"{decoder}.weight"] = read[:, :-1]
        result[f"{decoder}.bias"] = source[f"{decoder}.bias"] + read[:, -1]
    return result


def _centring_rows(encoder: torch.Tensor) -> torch.Tensor:
    """M E (D, k): encodes after subtracting the mean over D."""
    return encoder - encoder.mean(dim=0, keepdim=True)
