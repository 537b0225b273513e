"""`tcsp inspect`."""

from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from transformers import AutoConfig

from ..architectures import dense_hidden_size
from ..calibration import Calibration
from ..compression.compress import width_table
from ..compression.subspace import spectrum
from ..configuration_tcsp import TCSPConfig
from ..errors import TCSPError
from ..loading import UNREADABLE, find_source, model_class
from .common import JsonOption, ModelArgument, print_json, print_table


def inspect_command(
    model: ModelArgument,
    stats: Annotated[
        Path | None, typer.Option(help="Statistics of a dense model: adds the energy that each width keeps.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Of a compressed model: sizes, kept energy per site, where it comes from. Of a dense one: what a width saves.

    Reads the configuration only; no weights are loaded.
    """
    model = find_source(model)
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except UNREADABLE as error:
        raise TCSPError(f"The configuration of {model!r} cannot be read: {error}") from error
    if isinstance(config, TCSPConfig):
        if stats is not None:
            raise TCSPError(f"--stats are of a dense model, but {model!r} is compressed: leave them out.")
        _inspect_compressed(model, config, as_json)
    else:
        _inspect_dense(model, config, stats, as_json)


def _inspect_compressed(model: str, config: TCSPConfig, as_json: bool) -> None:
    projection = config.projection
    if as_json:
        print_json({"model": model, "model_type": config.model_type, "projection": projection})
        return
    widths = config.site_widths()
    kept = {site["name"]: site["kept_energy"] for site in projection["sites"]} if projection else {}
    rows = [[name, str(width), f"{kept[name]:.4f}" if name in kept else "-"] for name, width in widths.items()]
    print_table(f"{model} ({config.model_type})", ["site", "width", "kept energy"], rows)
    if projection is None:
        print_table("Provenance", ["", "value"], [["projection", "none: not made by compression"]])
        return
    calibration = projection["calibration"]
    facts = [
        ["source model", str(projection["source_model"])],
        ["source revision", str(projection["source_revision"])],
        ["source hidden size", str(projection["source_hidden_size"])],
        ["projection", f"{projection['kind']}, {projection['subspace']}"],
        ["removed, embeddings apart", f"{projection.get('removed', 0.0):.1%}"],
        ["calibration", f"{calibration['sequences']:,} sequences, {calibration['tokens']:,} tokens"],
        ["data fingerprint", str(calibration["data_fingerprint"])],
        ["method version", str(projection["method_version"])],
    ]
    print_table("Provenance", ["", "value"], facts)


def _inspect_dense(model: str, config: Any, stats: Path | None, as_json: bool) -> None:
    architectures = getattr(config, "architectures", None) or []
    found_class = model_class(transformers, architectures[0]) if architectures else None
    if found_class is None:
        raise TCSPError(f"The checkpoint {model!r} names no transformers class (architectures: {architectures}).")
    try:
        with torch.device("meta"):
            dense = found_class(config)
        table = width_table(dense)
    except TCSPError:
        raise
    except (*UNREADABLE, RuntimeError) as error:  # the last of sizes below zero
        raise TCSPError(
            f"The configuration of {model!r} describes no model ({type(error).__name__}: {error}): its config.json is "
            "damaged, download or save it again."
        ) from error
    energies: dict[int, tuple[float, float]] = {}
    if stats is not None:
        found = Calibration.load(stats)
        if found.hidden_size != dense_hidden_size(dense):
            raise TCSPError(
                f"--stats {stats} are of a model with hidden size {found.hidden_size}, but {model!r} has "
                f"{dense_hidden_size(dense)}: give statistics of this model."
            )
        shares = []
        for site in found.sites.values():
            values = spectrum("pca", site.second_moment, None, 1.0).values
            shares.append(values.cumsum(0) / values.sum())
        kept = torch.stack(shares)
        energies = {
            row.hidden_size: (
                float(kept[:, row.hidden_size - 1].min()),
                float(kept[:, row.hidden_size - 1].mean()),
            )
            for row in table
        }
    if as_json:
        print_json(
            {
                "model": model,
                "hidden_size": config.hidden_size,
                "widths": [
                    {
                        "hidden_size": row.hidden_size,
                        "removed": row.removed,
                        "parameters": row.total,
                        "non_embedding_parameters": row.non_embedding,
                        **(
                            {"kept_energy_min": e[0], "kept_energy_mean": e[1]}
                            if (e := energies.get(row.hidden_size))
                            else {}
                        ),
                    }
                    for row in table
                ],
            }
        )
        return
    columns = ["hidden size", "removed", "parameters", "without embeddings"]
    if energies:
        columns += ["kept energy, worst site", "mean"]
    rows = [
        [
            str(row.hidden_size),
            f"{row.removed:.1%}",
            f"{row.total:,}",
            f"{row.non_embedding:,}",
            *(f"{value:.4f}" for value in energies.get(row.hidden_size, ())),
        ]
        for row in table
    ]
    note = "removed: of the parameters without embeddings; residual maps are counted"
    print_table(f"{model}: hidden size {config.hidden_size}", columns, rows, note)
