"""`Calibration`: the second moments of every site, summed in float64; they add up over shards and ranks."""

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import TCSPError
from ..files import check_output_folder, new_folder
from ..modes import own_defaults
from .fingerprint import DataFingerprint
from .sample import TokenSample

FORMAT_VERSION = 1
_TENSORS, _SUMMARY = "calibration.safetensors", "calibration.json"


@dataclass
class SiteStatistics:
    """Sums over the tokens that passed one site.

    Attributes:
        tokens: number of tokens, padding excluded.
        moment_sum: (D, D) float64, sum of `n n'` over tokens (n: normalised stream).
        fisher_sum: (D, D) float64, sum of `g g'` over tokens (g: gradient of the sampled output log-likelihood with
            respect to n), or None when it was not asked for.
        query_fisher_sum: (H, d, d) float64 where a layer's attention writes into the site: sum of the outer products
            of the gradient with respect to each head's query; None elsewhere.
        common_sum: () float64, sum over sequences of `|sum of g over its tokens|² / tokens`, or None without gradients.
    """

    tokens: int
    moment_sum: torch.Tensor
    fisher_sum: torch.Tensor | None = None
    query_fisher_sum: torch.Tensor | None = None
    common_sum: torch.Tensor | None = None

    @property
    def coherence(self) -> float:
        """Share, in [0, 1], of the gradient that all tokens of a sequence have in common: 1 when g is the same at
        every token, 1 / length when only one token has any. 0 without gradients."""
        energy = 0.0 if self.fisher_sum is None else float(self.fisher_sum.trace())
        if self.common_sum is None or energy <= 0.0:
            return 0.0
        return min(1.0, float(self.common_sum) / energy)

    @property
    def second_moment(self) -> torch.Tensor:
        """Sigma (D, D) float64: mean of `n n'` over tokens."""
        return self.moment_sum / self.tokens

    @property
    def fisher(self) -> torch.Tensor:
        """Gamma (D, D) float64: mean of `g g'` over tokens.

        Raises:
            TCSPError: calibrated with `fisher=False`.
        """
        if self.fisher_sum is None:
            raise TCSPError("These statistics hold no gradients: calibrate with fisher=True, or use subspace='pca'.")
        return self.fisher_sum / self.tokens


def _place(site: str) -> tuple[int, float, str]:
    """Sorts names of sites as the forward pass does."""
    head, *rest = site.split(".")
    layer = float(rest[0]) if rest and rest[0].isdigit() else math.inf
    return {"layer": 1, "decoder": 1, "mlm_head": 2}.get(head, 0), layer, rest[-1] if rest else ""


@dataclass
class Calibration:
    """Statistics of a dense model on sampled inputs; any hidden size can be cut from them later without data.

    Attributes:
        model_fingerprint: of the dense model (see `fingerprint.model_fingerprint`).
        source_model: its name or path; `model_type` and `hidden_size` (D) as in its configuration.
        objective: which output the gradients belong to, e.g. `"classification"`.
        seed: of the draws from the model's output distribution.
        sequences: number of sequences seen.
        data_fingerprint: order-free hash of them.
        sites: name -> `SiteStatistics`, in the order of the forward pass.
        sample: a bounded sample of the sequences themselves, which the refit reads.
    """

    model_fingerprint: str
    source_model: str
    model_type: str
    hidden_size: int
    objective: str
    seed: int
    sequences: int = 0
    data_fingerprint: str = field(default_factory=lambda: str(DataFingerprint()))
    sites: dict[str, SiteStatistics] = field(default_factory=dict)
    sample: TokenSample = field(default_factory=lambda: TokenSample(0))

    @property
    def tokens(self) -> int:
        """Number of tokens at the site that saw the fewest."""
        return min((site.tokens for site in self.sites.values()), default=0)

    def summary(self) -> dict[str, Any]:
        """What a compressed model's configuration records of its calibration."""
        return {
            "sequences": self.sequences,
            "tokens": self.tokens,
            "data_fingerprint": self.data_fingerprint,
            "model_fingerprint": self.model_fingerprint,
            "seed": self.seed,
        }

    @classmethod
    def join(cls, parts: Iterable["Calibration"]) -> "Calibration":
        """Statistics of different sites (`calibrate(..., sites=)`) over the same data, in one.

        Raises:
            TCSPError: no parts, a site in two of them, or parts of different models, objectives, seeds or data.
        """
        parts = list(parts)
        if not parts:
            raise TCSPError("Calibration.join was given no statistics.")
        first = parts[0]
        sites: dict[str, SiteStatistics] = {}
        for part in parts:
            for name in ("model_fingerprint", "objective", "seed", "hidden_size", "data_fingerprint"):
                mine, theirs = getattr(first, name), getattr(part, name)
                if mine != theirs:
                    raise TCSPError(f"Statistics with different {name} cannot be joined: {mine!r} and {theirs!r}.")
            twice = sites.keys() & part.sites.keys()
            if twice:
                raise TCSPError(f"The site {min(twice)!r} is in two of the statistics: join those of different sites.")
            sites.update(part.sites)
        return replace(first, sites=dict(sorted(sites.items(), key=lambda item: _place(item[0]))))

    @classmethod
    def merge(cls, parts: Iterable["Calibration"]) -> "Calibration":
        """Statistics of the union of the parts' data.

        Raises:
            TCSPError: no parts, or parts of different models, objectives, seeds or sites.
        """
        parts = list(parts)
        if not parts:
            raise TCSPError("Calibration.merge was given no statistics.")
        first = parts[0]
        for other in parts[1:]:
            for name in ("model_fingerprint", "objective", "seed", "hidden_size"):
                mine, theirs = getattr(first, name), getattr(other, name)
                if mine != theirs:
                    raise TCSPError(f"Statistics with different {name} cannot be merged: {mine!r} and {theirs!r}.")
            if list(first.sites) != list(other.sites):
                raise TCSPError("Statistics of different sites cannot be merged.")
        data = DataFingerprint()
        for part in parts:
            data.merge(DataFingerprint(part.data_fingerprint))
        sites: dict[str, SiteStatistics] = {}
        for name in first.sites:
            entries = [part.sites[name] for part in parts]
            fishers = [entry.fisher_sum for entry in entries if entry.fisher_sum is not None]
            if fishers and len(fishers) != len(entries):
                raise TCSPError("Statistics with and without gradients cannot be merged.")
            moment_sum = torch.stack([entry.moment_sum for entry in entries]).sum(0)
            fisher_sum = torch.stack(fishers).sum(0) if fishers else None
            queries = [entry.query_fisher_sum for entry in entries if entry.query_fisher_sum is not None]
            query_sum = torch.stack(queries).sum(0) if len(queries) == len(entries) else None
            tokens = sum(entry.tokens for entry in entries)
            commons = [entry.common_sum for entry in entries if entry.common_sum is not None]
            common = torch.stack(commons).sum(0) if len(commons) == len(entries) else None
            sites[name] = SiteStatistics(tokens, moment_sum, fisher_sum, query_sum, common)
        return cls(
            model_fingerprint=first.model_fingerprint,
            source_model=first.source_model,
            model_type=first.model_type,
            hidden_size=first.hidden_size,
            objective=first.objective,
            seed=first.seed,
            sequences=sum(part.sequences for part in parts),
            data_fingerprint=str(data),
            sites=sites,
            sample=TokenSample.merge(part.sample for part in parts),
        )

    @own_defaults()
    def save(self, folder: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write `calibration.safetensors` (upper triangles) and `calibration.json` into a new folder, whole or not
        at all.

        Raises:
            TCSPError: `folder` exists and is not empty, and `overwrite` is False or it holds more than statistics.
        """
        check_statistics_folder(folder, overwrite)
        rows, columns = torch.triu_indices(self.hidden_size, self.hidden_size)
        tensors: dict[str, torch.Tensor] = {}
        for name, site in self.sites.items():
            tensors[f"{name}.moment_sum"] = site.moment_sum[rows, columns].contiguous()
            if site.fisher_sum is not None:
                tensors[f"{name}.fisher_sum"] = site.fisher_sum[rows, columns].contiguous()
            if site.query_fisher_sum is not None:
                tensors[f"{name}.query_fisher_sum"] = site.query_fisher_sum.contiguous()
            if site.common_sum is not None:
                tensors[f"{name}.common_sum"] = site.common_sum
        tensors.update(self.sample.tensors())
        with new_folder(folder, overwrite) as staging:
            save_file(tensors, staging / _TENSORS)
            summary = {
                "format_version": FORMAT_VERSION,
                "model_fingerprint": self.model_fingerprint,
                "source_model": self.source_model,
                "model_type": self.model_type,
                "hidden_size": self.hidden_size,
                "objective": self.objective,
                "seed": self.seed,
                "sequences": self.sequences,
                "data_fingerprint": self.data_fingerprint,
                "tokens": {name: site.tokens for name, site in self.sites.items()},
                "sha256": _sha256(staging / _TENSORS),
            }
            (staging / _SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")

    @classmethod
    @own_defaults()
    def load(cls, folder: str | os.PathLike[str]) -> "Calibration":
        """Read what `save` wrote; every number is checked.

        Raises:
            TCSPError: a file is missing, truncated, altered, or from a newer version.
        """
        path = Path(folder)
        for name in (_SUMMARY, _TENSORS):
            if not (path / name).is_file():
                raise TCSPError(f"{path} holds no statistics: {name} is missing. Run calibrate and save first.")
        summary = _read_summary(path / _SUMMARY)
        if _sha256(path / _TENSORS) != summary["sha256"]:
            raise TCSPError(f"{path / _TENSORS} was truncated or altered: its checksum is not the recorded one.")
        try:
            tensors = load_file(path / _TENSORS)
        except (SafetensorError, OSError, ValueError) as error:
            raise TCSPError(f"{path / _TENSORS} cannot be read: {error}") from error
        size = summary["hidden_size"]
        sites: dict[str, SiteStatistics] = {}
        for name, tokens in summary["tokens"].items():
            moment = _full(tensors.get(f"{name}.moment_sum"), size, f"{name}.moment_sum")
            fisher_name = f"{name}.fisher_sum"
            fisher = _full(tensors[fisher_name], size, fisher_name) if fisher_name in tensors else None
            query, common = tensors.get(f"{name}.query_fisher_sum"), tensors.get(f"{name}.common_sum")
            if query is not None:
                _check_numbers(query, f"{name}.query_fisher_sum", query.dim() == 3 and query.shape[1] == query.shape[2])
            if common is not None:
                _check_numbers(common, f"{name}.common_sum", common.dim() == 0 and float(common) >= 0.0)
            sites[name] = SiteStatistics(tokens, moment, fisher, query, common)
        fields = {
            name: summary[name]
            for name in (
                "model_fingerprint",
                "source_model",
                "model_type",
                "hidden_size",
                "objective",
                "seed",
                "sequences",
                "data_fingerprint",
            )
        }
        return cls(**fields, sites=sites, sample=TokenSample.from_tensors(tensors))


def check_statistics_folder(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Refuse, before any long work, a folder that `Calibration.save` could not write.

    Raises:
        TCSPError: see `check_output_folder`; or the folder holds more than the statistics that would be replaced.
    """
    folder = check_output_folder(path, overwrite)
    others = sorted({found.name for found in folder.iterdir()} - {_TENSORS, _SUMMARY}) if folder.is_dir() else []
    if others:
        raise TCSPError(
            f"The folder {folder} holds {others[0]!r}, which is no part of statistics and would go: name another one."
        )


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise TCSPError(f"{path} cannot be read: {error}") from error
    if not isinstance(summary, dict):
        raise TCSPError(f"{path} is not a JSON object.")
    version = summary.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise TCSPError(
            f"{path} has format_version {version}; this version of tcsp_hf reads up to {FORMAT_VERSION}: install a "
            "newer tcsp_hf."
        )
    kinds: dict[str, type] = {
        "format_version": int,
        "model_fingerprint": str,
        "source_model": str,
        "model_type": str,
        "hidden_size": int,
        "objective": str,
        "seed": int,
        "sequences": int,
        "data_fingerprint": str,
        "tokens": dict,
        "sha256": str,
    }
    for name, kind in kinds.items():
        value = summary.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TCSPError(f"{path}: {name} is {value!r}; it must be of type {kind.__name__}.")
    if not 1 <= summary["hidden_size"] <= 1 << 16:
        raise TCSPError(f"{path}: hidden_size is {summary['hidden_size']}; allowed: 1 to {1 << 16}.")
    for name, tokens in summary["tokens"].items():
        if not isinstance(tokens, int) or isinstance(tokens, bool) or not 1 <= tokens < 1 << 60:
            raise TCSPError(f"{path}: tokens[{name!r}] is {tokens!r}; it must be a positive integer.")
    if not summary["tokens"] or not 1 <= summary["sequences"] < 1 << 60:
        raise TCSPError(f"{path} describes no data.")
    try:
        int(summary["data_fingerprint"], 16)
    except ValueError as error:  # (a number too long to be one, too)
        raise TCSPError(f"{path}: data_fingerprint is no hexadecimal number.") from error
    return summary


def _full(triangle: torch.Tensor | None, size: int, name: str) -> torch.Tensor:
    """Symmetric (size, size) matrix from its upper triangle."""
    expected = size * (size + 1) // 2
    if triangle is None or triangle.dtype != torch.float64 or triangle.shape != (expected,):
        found = "nothing" if triangle is None else f"{triangle.dtype} {tuple(triangle.shape)}"
        raise TCSPError(f"{name} must hold {expected} float64 values (upper triangle); found {found}.")
    if not math.isfinite(float(triangle.sum())):
        raise TCSPError(f"{name} holds a NaN or an infinity.")
    rows, columns = torch.triu_indices(size, size)
    full = torch.zeros(size, size, dtype=torch.float64)
    full[rows, columns] = triangle
    full[columns, rows] = triangle
    return full


def _check_numbers(tensor: torch.Tensor, name: str, shaped: bool) -> None:
    if tensor.dtype != torch.float64 or not shaped or not math.isfinite(float(tensor.sum())):
        raise TCSPError(
            f"{name} is damaged ({tensor.dtype} {tuple(tensor.shape)}, or a number that is not finite or negative): "
            "calibrate again."
        )


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
