"""Compare systems on the same images: every pair tested, a rank only where the tests support it."""

import csv
import dataclasses
import hashlib
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from boneage_hf.errors import InputError
from boneage_hf.files import write_text

from .measured import to_csv
from .provenance import check_out, seal
from .results_folder import Result, load_result, matched_errors
from .run import load_test_set
from .statistics import ALPHA, PairedDifference, holm, n_needed, paired_bootstrap, wilcoxon

#: Columns of `comparison.csv`, a row per pair.
COLUMNS = (
    *("better", "other", "difference_months", "difference_low_months", "difference_high_months"),
    *("wilcoxon_p", "holm_p", "distinguishable", "n_needed"),
)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two systems on the same images.

    Attributes:
        better, other: names, `better` with the lower MAE here.
        difference: MAE of `better` - MAE of `other`, with its 95 % bootstrap interval.
        p_value, p_holm: Wilcoxon signed-rank on absolute errors, as it is and corrected for the number of pairs.
        distinguishable: p_holm is below 0.05, the interval leaves out 0, and both point the same way.
        n_needed: images at which this difference would be found (80 % power, level 0.05 over the number of pairs).
    """

    better: str
    other: str
    difference: PairedDifference
    p_value: float
    p_holm: float
    distinguishable: bool
    n_needed: int | None


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One system; `rank` is None unless it is distinguishable from every other one that has not seen the test.

    `predictions_sha256` is that of its prediction file, or "" where errors came from elsewhere.
    """

    system: str
    mae_months: float
    rank: int | None
    leakage: str
    predictions_sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    protocol: str
    n: int
    standings: tuple[Standing, ...]
    pairs: tuple[Pair, ...]

    @property
    def digests(self) -> frozenset[str]:
        """Of the prediction files that are compared."""
        return frozenset(standing.predictions_sha256 for standing in self.standings)

    def __str__(self) -> str:
        """Text for a terminal."""
        lines = [f"protocol {self.protocol}, n = {self.n}", ""]
        width = max(len(standing.system) for standing in self.standings)
        lines.append(f"{'rank':<4}  {'system':<{width}}  MAE in months")
        for standing in self.standings:
            rank = "-" if standing.rank is None else str(standing.rank)
            flag = "" if standing.leakage == "none" else f"  (leakage: {standing.leakage})"
            lines.append(f"{rank:<4}  {standing.system:<{width}}  {standing.mae_months:13.2f}{flag}")
        for pair in self.pairs:
            difference = pair.difference
            lines += [
                "",
                f"{pair.better} - {pair.other}: {difference.difference_months:.2f} months, 95 % "
                f"[{difference.low_months:.2f}, {difference.high_months:.2f}]; Wilcoxon p {p_text(pair.p_value)}, "
                f"with Holm {p_text(pair.p_holm)}",
                f"  {verdict(pair, self.n)}",
            ]
        return "\n".join(lines)


def compare_errors(
    errors: Mapping[str, np.ndarray], *, protocol: str, leakages: Mapping[str, str], draws: int = 2000, seed: int = 0
) -> Comparison:
    """Compare systems by their errors on the same images.

    Args:
        errors: system -> (n,) predicted - reference in months, all in the same order of images; two or more.
        leakages: system -> as `systems.leakage`; one that has seen the test gets no rank.
        draws, seed: of the bootstrap.

    Raises:
        InputError: fewer than two systems, or as `paired_bootstrap`.
    """
    if len(errors) < 2:
        raise InputError("a comparison needs two systems or more; give another result folder.")
    mae = {name: float(np.abs(values).mean()) for name, values in errors.items()}
    names = sorted(errors, key=lambda name: (mae[name], name))
    couples = list(itertools.combinations(names, 2))
    p_values = [wilcoxon(errors[better], errors[other]) for better, other in couples]
    pairs = []
    for (better, other), p_value, p_holm in zip(couples, p_values, holm(p_values), strict=True):
        difference = paired_bootstrap(errors[better], errors[other], draws=draws, seed=seed)
        found = p_holm < ALPHA and difference.high_months < 0 and _rank_sum(errors[better], errors[other]) < 0
        needed = n_needed(errors[better], errors[other], alpha=ALPHA / len(couples))
        pairs.append(
            Pair(
                better=better,
                other=other,
                difference=difference,
                p_value=p_value,
                p_holm=p_holm,
                distinguishable=found,
                n_needed=needed,
            )
        )
    # Who has seen the test is no competitor: the others are ranked among themselves.
    clean = [name for name in names if not leakages[name].startswith("trained on")]
    standings = []
    for name in names:
        own = [pair for pair in pairs if name in (pair.better, pair.other) and {pair.better, pair.other} <= set(clean)]
        apart = bool(own) and all(pair.distinguishable for pair in own)
        rank = clean.index(name) + 1 if apart else None
        standings.append(Standing(system=name, mae_months=mae[name], rank=rank, leakage=leakages[name]))
    n = len(next(iter(errors.values())))
    return Comparison(protocol=protocol, n=n, standings=tuple(standings), pairs=tuple(pairs))


def compare_folders(folders: Sequence[str | Path], data: str | Path) -> Comparison:
    """Compare two or more result folders of one protocol against the user's labels.

    Raises:
        InputError: protocols differ, or a folder or the data set is not in order; the message names which.
    """
    return compare_results([load_result(folder) for folder in folders], data)


def compare_results(results: Sequence[Result], data: str | Path) -> Comparison:
    """As [`compare_folders`], of folders that were read."""
    for result in results[1:]:
        if result.protocol != results[0].protocol:
            raise InputError(
                f"{results[0].folder} is under {results[0].protocol.name} and {result.folder} under "
                f"{result.protocol.name}; numbers of unequal protocols are not compared."
            )
    if not results:
        raise InputError("a comparison needs two systems or more; give result folders.")
    check_same_images(results)
    references = load_test_set(results[0].protocol, data).references
    named = dict(zip(_names(results), results, strict=True))
    found = compare_errors(
        {name: matched_errors(result, references) for name, result in named.items()},
        protocol=results[0].protocol.name,
        leakages={name: result.leakage for name, result in named.items()},
    )
    standings = tuple(
        dataclasses.replace(standing, predictions_sha256=named[standing.system].metrics["predictions_sha256"])
        for standing in found.standings
    )
    return dataclasses.replace(found, standings=standings)


def check_same_images(results: Sequence[Result]) -> None:
    """Raises `InputError` where two runs that read images read differently prepared ones.

    Equal ids and labels may stand for other pixels: copies of another size, or made by another program.
    """
    seen: Result | None = None
    for result in results:
        if result.manifest["system"].get("reads_images") is False:
            continue
        if seen is not None and _images_key(result) != _images_key(seen):
            raise InputError(
                f"{seen.folder} and {result.folder} read images that were prepared from other files or at another "
                "size; run both on one prepared data set."
            )
        seen = seen or result


def _images_key(result: Result) -> object:
    data = result.manifest.get("data")
    return data.get("key") if isinstance(data, dict) else None


def check_comparison_out(out: Path) -> None:
    """Raises `InputError` if the folder holds something that is no comparison, or cannot be written."""
    check_out(out, ("comparison.csv", "manifest.json"), task="comparison")


def write_comparison(comparison: Comparison, out: Path) -> tuple[Path, Path]:
    """Write `comparison.csv`, a row per pair, and `manifest.json` with the standings: figures only, no label.

    Raises:
        InputError: the folder holds something else or cannot be written.
    """
    check_comparison_out(out)
    rows = [
        {
            "better": pair.better,
            "other": pair.other,
            "difference_months": pair.difference.difference_months,
            "difference_low_months": pair.difference.low_months,
            "difference_high_months": pair.difference.high_months,
            "wilcoxon_p": pair.p_value,
            "holm_p": pair.p_holm,
            "distinguishable": "true" if pair.distinguishable else "false",
            "n_needed": pair.n_needed,
        }
        for pair in comparison.pairs
    ]
    table = to_csv(COLUMNS, rows)
    manifest = {
        "task": "comparison",
        "protocol": comparison.protocol,
        "n": comparison.n,
        "standings": [dataclasses.asdict(standing) for standing in comparison.standings],
        "table_sha256": hashlib.sha256(table.encode()).hexdigest(),
        **seal(),
    }
    files = (out / "comparison.csv", out / "manifest.json")
    try:
        write_text(files[0], table)
        write_text(files[1], json.dumps(manifest, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"the comparison cannot be written ({error.strerror}); give another --out.") from None
    return files


def comparison_of(manifest: Mapping[str, Any], table: str) -> Comparison:
    """The comparison that [`write_comparison`] wrote, from the content of its two files.

    Raises:
        InputError: a field or a column is missing or no number.
    """
    rows = list(csv.DictReader(io.StringIO(table)))
    try:
        n = int(manifest["n"])
        standings = tuple(Standing(**fields) for fields in manifest["standings"])
        pairs = tuple(
            Pair(
                better=row["better"],
                other=row["other"],
                difference=PairedDifference(
                    n=n,
                    difference_months=float(row["difference_months"]),
                    low_months=float(row["difference_low_months"]),
                    high_months=float(row["difference_high_months"]),
                ),
                p_value=float(row["wilcoxon_p"]),
                p_holm=float(row["holm_p"]),
                distinguishable=row["distinguishable"] == "true",
                n_needed=int(row["n_needed"]) if row["n_needed"] else None,
            )
            for row in rows
        )
        found = Comparison(protocol=manifest["protocol"], n=n, standings=standings, pairs=pairs)
    except (KeyError, TypeError, ValueError):
        raise InputError("the comparison is damaged; compare again.") from None
    names = {standing.system for standing in standings}
    if {name for pair in pairs for name in (pair.better, pair.other)} != names:
        raise InputError("the pairs of the comparison are not those of its systems; compare again.")
    return found


def _names(results: Sequence[Result]) -> list[str]:
    """The systems' names, with their folders where that alone tells them apart."""
    systems = [result.system for result in results]
    names = [
        result.system if systems.count(result.system) == 1 else f"{result.system} ({result.folder})"
        for result in results
    ]
    if len(set(names)) < len(names):
        raise InputError("a result folder is named twice; compare different ones.")
    return names


def _rank_sum(a: np.ndarray, b: np.ndarray) -> float:
    """Sum of Wilcoxon's signed ranks of |a| - |b|: its sign is the direction in which that test points."""
    gained = np.round(np.abs(a) - np.abs(b), 9)
    gained = gained[gained != 0]
    return float((np.sign(gained) * scipy.stats.rankdata(np.abs(gained))).sum())


def verdict(pair: Pair, n: int, *, better: str | None = None) -> str:
    """Which of a pair is better, or at how many images that would be known; `better` names it otherwise."""
    if pair.distinguishable:
        return f"{better or pair.better} is better"
    needed = "no difference was observed" if pair.n_needed is None else f"n needed for this mean: {pair.n_needed}"
    return f"not distinguishable at n = {n} ({needed})"


def p_text(value: float) -> str:
    """ "= 0.0123", or "< 0.0001"."""
    return "< 0.0001" if value < 1e-4 else f"= {value:.4f}"
