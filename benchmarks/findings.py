"""Result folders of every kind, told apart by their manifest, checked, and gathered for the report."""

import hashlib
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from boneage_hf.data import load_split
from boneage_hf.errors import InputError
from boneage_hf.splits import fingerprint

from .compare import Comparison, check_same_images, compare_results, comparison_of
from .measured import MeasuredResult
from .protocol import Protocol
from .results_folder import Result, check_rows, first_difference, load_result, recompute

#: Kind of folder (`task` of its manifest; a run has none) -> its table.
TABLES = {
    "comparison": "comparison.csv",
    "stress": "stress.csv",
    "attention": "attention.csv",
    "gate": "gate.csv",
    "ablations": "ablations.csv",
    "speed": "speed.csv",
    "training-speed": "training.csv",
}

#: Columns that each table needs, and those of them that hold shares from 0 to 1.
_COLUMNS: dict[str, tuple[str, ...]] = {
    "stress": ("kind", "setting", "n", "unchanged_mae_months", "mae_months", "mae_change_holm_p"),
    "attention": ("part", "third", "region", "tolerance_cells", "n"),
    "gate": ("kind", "n", "originals", "refused", "warned"),
    "ablations": (
        *("question", "arm", "changes", "seed", "epochs", "best_epoch", "image_size", "minutes", "core_hours"),
        *("images_per_second", "n", "mae_low_months", "mae_months", "mae_high_months", "verdict"),
    ),
    "speed": ("system", "what", "image_size", "batch", "precision", "threads", "median_ms", "p95_ms"),
    "training-speed": ("images_from", "images_per_second"),
}
_SHARES: dict[str, tuple[str, ...]] = {
    "stress": ("moved_over_6_months", "moved_over_12_months", "unchanged_significant_errors", "significant_errors"),
    "attention": ("energy", "area_share", "gaussian_share", "shuffled_cells_share", "other_map_share"),
    "gate": ("refused_share",),
    "ablations": (),
    "speed": (),
    "training-speed": (),
}
#: Entries of the manifest without which a table would be misread.
_ENTRIES: dict[str, tuple[str, ...]] = {
    "stress": ("revision", "protocol", "split", "images", "unchanged_mae_months"),  # which images were changed
    "speed": ("checkpoints", "hardware", "peak_gflop_per_second", "peaks_found"),  # what a share of the peak is of
}
#: (lower, value, upper) columns that must rise.
_ORDERED: dict[str, tuple[str, ...]] = {
    "stress": ("mae_change_low_months", "mae_change_months", "mae_change_high_months"),
    "attention": ("energy_low", "energy", "energy_high"),
    "gate": ("refused_low", "refused_share", "refused_high"),
    "ablations": ("difference_low_months", "difference_months", "difference_high_months"),
    "speed": ("median_ms", "p95_ms"),
    "training-speed": (),
}


@dataclass(frozen=True, kw_only=True)
class Study:
    """A test of stress, attention or the gate, ablations, or times: the folder's name, manifest and table."""

    folder: str
    manifest: Mapping[str, Any]
    table: pd.DataFrame


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What was measured, by kind. `pictures` holds `agreement.svg` of the runs that have one, by their folder."""

    runs: tuple[Result, ...] = ()
    pictures: Mapping[str, str] | None = None
    comparisons: tuple[Comparison, ...] = ()
    stress: tuple[Study, ...] = ()
    attention: tuple[Study, ...] = ()
    gate: tuple[Study, ...] = ()
    ablations: tuple[Study, ...] = ()
    speed: tuple[Study, ...] = ()
    training: tuple[Study, ...] = ()

    def by_protocol(self) -> dict[Protocol, list[Result]]:
        """Runs that may be compared."""
        groups: dict[Protocol, list[Result]] = {}
        for run in self.runs:
            groups.setdefault(run.protocol, []).append(run)
        return groups

    def comparison(self, protocol: Protocol) -> Comparison | None:
        """Of exactly the runs under a protocol, or None: a rank among others is no rank among these."""
        # Two runs may have the same predictions, so their number counts too.
        digests = sorted(run.metrics["predictions_sha256"] for run in self.by_protocol().get(protocol, ()))
        found = (one for one in self.comparisons if one.protocol == protocol.name)
        return next((one for one in found if sorted(s.predictions_sha256 for s in one.standings) == digests), None)


def kind_of(folder: Path) -> str:
    """ "run", "report" or a key of `TABLES`.

    Raises:
        InputError: the folder has no readable manifest, or one of an unknown kind.
    """
    manifest = read_manifest(folder)
    kind = manifest.get("task", "run")
    if kind not in (*TABLES, "run", "report"):
        raise InputError(
            f"result folder {folder.name}: this version knows no results of the kind {kind!r}; update it."
        )
    return str(kind)


def is_comparison(folder: Path) -> bool:
    """Whether a folder holds what `compare --out` wrote; a folder that is not in order does not."""
    try:
        return kind_of(folder) == "comparison"
    except InputError:
        return False


def load_findings(folders: Iterable[str | Path], *, data: str | Path | None = None) -> Findings:
    """Read and check result folders; those of reports are passed over.

    Args:
        data: prepared data set with the labels. Given, runs under one protocol are compared where no folder of
            `compare --out` holds the comparison of just these.

    Raises:
        InputError: a folder is not in order; two have one name, by which reports tell them apart; or runs under one
            protocol do not compare: another protocol of that name, or differently prepared images. The message
            names the folder.
    """
    runs: list[Result] = []
    pictures: dict[str, str] = {}
    comparisons: list[Comparison] = []
    studies: dict[str, list[Study]] = {kind: [] for kind in TABLES}
    seen: set[str] = set()
    for folder in map(Path, folders):
        kind = kind_of(folder)
        if kind == "report":
            continue
        if folder.resolve().name in seen:
            raise InputError(
                f"two result folders are named {folder.resolve().name}; name each once, and rename one where they are "
                "not the same."
            )
        seen.add(folder.resolve().name)
        if kind == "run":
            runs.append(load_result(folder))
            if (folder / "agreement.svg").is_file():
                pictures[folder.name] = (folder / "agreement.svg").read_text(encoding="utf-8")
        elif kind == "comparison":
            comparisons.append(_comparison(folder))
        else:
            studies[kind].append(load_study(folder, kind))
    found = Findings(
        runs=tuple(runs),
        pictures=pictures,
        comparisons=tuple(comparisons),
        stress=tuple(studies["stress"]),
        attention=tuple(studies["attention"]),
        gate=tuple(studies["gate"]),
        ablations=tuple(studies["ablations"]),
        speed=tuple(studies["speed"]),
        training=tuple(studies["training-speed"]),
    )
    _check_protocols(found.runs)
    for group in found.by_protocol().values():
        check_same_images(group)
    if data is None:
        return found
    added = [
        compare_results(group, data)
        for protocol, group in found.by_protocol().items()
        if len(group) > 1 and found.comparison(protocol) is None
    ]
    return Findings(**{**vars(found), "comparisons": (*found.comparisons, *added)})


def _check_protocols(runs: Sequence[Result]) -> None:
    by_name: dict[str, Result] = {}
    for run in runs:
        first = by_name.setdefault(run.protocol.name, run)
        if run.protocol != first.protocol:
            raise InputError(
                f"{first.folder} and {run.folder} are under two protocols of the name {run.protocol.name}; give one "
                "of them a name of its own and run again."
            )


def load_study(folder: Path, kind: str) -> Study:
    """Read a folder of `stress`, `attention`, `gate`, `ablations` or `speed`.

    Raises:
        InputError: the table is not the one that was written, lacks a column, or holds what cannot be.
    """
    where, name = f"result folder {folder.name}", TABLES[kind]
    manifest, text = read_manifest(folder), _table_text(folder, kind)
    if manifest.get("complete") is False:
        raise InputError(f"{where} is not complete; run the same command again, which goes on where it stopped.")
    lacking = [entry for entry in _ENTRIES.get(kind, ()) if entry not in manifest]
    if lacking:
        raise InputError(f"{where}: manifest.json does not tell {lacking[0]}; run again.")
    try:
        table = pd.read_csv(io.StringIO(text))
        numbers = table.reindex(columns=[*_SHARES[kind], *_ORDERED[kind]]).to_numpy(dtype=np.float64)
    except ValueError:  # pandas' own errors are ValueErrors too
        raise InputError(f"{where}: {name} cannot be read as a table of numbers; run again.") from None
    missing = [c for c in (*_COLUMNS[kind], *_SHARES[kind], *_ORDERED[kind]) if c not in table.columns]
    if missing or table.empty:
        raise InputError(f"{where}: {name} {'is empty' if not missing else f'lacks {missing[0]}'}; run again.")
    shares, ordered = np.split(numbers, [len(_SHARES[kind])], axis=1)
    if not ((shares >= 0) & (shares <= 1)).all():
        raise InputError(f"{where}: {name} has a share that is not between 0 and 1; run again.")
    rises = np.diff(ordered, axis=1)
    # Of few calls there is no 95th percentile.
    unknown = np.isnan(numbers[:, -1:]) if kind == "speed" else False
    if not ((rises >= -1e-6) | unknown).all():
        raise InputError(f"{where}: {name} has values that do not rise ({', '.join(_ORDERED[kind])}); run again.")
    if kind == "stress":
        digest = hashlib.sha256((folder / "predictions.csv").read_bytes()).hexdigest()
        if digest != manifest.get("predictions_sha256") or manifest.get("settings") != list(table["setting"]):
            raise InputError(
                f"{where}: stress.csv, predictions.csv and manifest.json are of different runs; run again."
            )
    if hashlib.sha256(text.encode()).hexdigest() != manifest.get("table_sha256"):
        raise InputError(f"{where}: {name} is not the one that manifest.json is about; run again.")
    if kind == "ablations":
        from .ablations import check_ablations

        check_ablations(folder, manifest, table)
    return Study(folder=folder.name, manifest=manifest, table=table)


def check_findings(
    folders: Sequence[Path], *, rows: Sequence[MeasuredResult] = (), data: str | Path | None = None
) -> Findings:
    """Check result folders and that measured rows are theirs; with a prepared data set, measure them again too.

    Raises:
        InputError: naming the folder or the row.
    """
    found = load_findings(folders)
    check_rows(rows, found.runs)
    known = {run.metrics["predictions_sha256"] for run in found.runs}
    for comparison in found.comparisons:
        if known and not comparison.digests <= known:
            raise InputError(f"the comparison under {comparison.protocol} is of other predictions; compare again.")
    for folder in folders:
        if kind_of(folder) == "report":
            check_report(folder)
    if data is not None:
        for run in found.runs:
            recompute(run, data)
        for folder in folders:
            if kind_of(folder) == "stress":
                recompute_stress(folder, data)
            elif kind_of(folder) == "ablations":
                from .ablations import recompute_ablations

                recompute_ablations(folder, load_study(folder, "ablations"), data)
        for comparison in found.comparisons:
            recompute_comparison(comparison, found.runs, data)
    return found


def recompute_comparison(comparison: Comparison, runs: Sequence[Result], data: str | Path) -> None:
    """Make the paired tests again from the predictions and the user's labels.

    Raises:
        InputError: a run of the comparison is not among `runs`, or a figure differs.
    """
    left = sorted(runs, key=lambda run: run.folder)
    compared = []
    for digest, leakage in sorted((one.predictions_sha256, one.leakage) for one in comparison.standings):
        same = [run for run in left if run.metrics["predictions_sha256"] == digest]
        if not same:
            raise InputError(
                f"the comparison under {comparison.protocol} cannot be made again without its runs: name them too."
            )
        # Of runs with the same predictions the one that is said to have seen the same.
        compared.append(min(same, key=lambda run: run.leakage != leakage))
        left = [run for run in left if run is not compared[-1]]
    again = compare_results(compared, data)
    # Figures alone: which names tell runs apart may depend on the order of the folders.
    found = first_difference(_figures(comparison), _figures(again), tolerance=1e-4)
    if found is not None:
        name, old, new = found
        raise InputError(
            f"the comparison under {comparison.protocol}: {name} is {old} in its folder and {new} from the "
            "predictions; compare again."
        )


def _figures(comparison: Comparison) -> dict[str, Any]:
    standings = [(one.predictions_sha256, one.mae_months, one.rank, one.leakage) for one in comparison.standings]
    digests = {one.system: one.predictions_sha256 for one in comparison.standings}
    pairs = [
        {**asdict(pair), "better": digests[pair.better], "other": digests[pair.other]} for pair in comparison.pairs
    ]
    return {"n": comparison.n, "standings": standings, "pairs": pairs}


def check_report(folder: Path) -> None:
    """Raises `InputError` if a file of a rendered report is missing or is not the one that its manifest lists."""
    for name, digest in dict(read_manifest(folder).get("files") or {}).items():
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise InputError(f"report {folder.name}: {name} is not the one that was written; write the report again.")


def recompute_stress(folder: Path, data: str | Path) -> None:
    """Measure a stress test again from its predictions and the user's labels.

    Raises:
        InputError: the labels are not those that it was measured on, or a figure differs from stress.csv.
    """
    from .stress import SETTINGS, measure, read_stress_predictions

    where, study = f"result folder {folder.name}", load_study(folder, "stress")
    predictions = read_stress_predictions(folder)
    rows = load_split(data, str(study.manifest["split"])).select_columns(["id", "bone_age_months"])
    known = {str(row_id): float(value) for row_id, value in zip(rows["id"], rows["bone_age_months"], strict=True)}
    predicted = set(predictions["id"])
    ids = [row_id for row_id in known if row_id in predicted]
    months = [known[row_id] for row_id in ids]
    if fingerprint(ids, months) != study.manifest["data_fingerprint"]:
        raise InputError(
            f"{where}: it is about other images or labels than this data set's; name the one it was run on."
        )
    by_name = {setting.name: setting for setting in SETTINGS}
    settings = tuple(by_name[name] for name in study.manifest["settings"])
    references = pd.DataFrame({"id": ids, "reference_months": months})
    again = measure(predictions, references, settings=settings)
    for column in again.columns:
        for old, new in zip(study.table[column], again[column], strict=True):
            same = old == new if isinstance(new, str) else math.isclose(old, new, rel_tol=1e-4, abs_tol=1e-4)
            if not same:
                raise InputError(
                    f"{where}: {column} is {old} in stress.csv and {new} from its predictions; run again."
                )


def _comparison(folder: Path) -> Comparison:
    try:
        found = comparison_of(read_manifest(folder), _table_text(folder, "comparison"))
    except InputError as error:
        raise InputError(f"result folder {folder.name}: {error}") from None
    digest = hashlib.sha256((folder / TABLES["comparison"]).read_bytes()).hexdigest()
    if digest != read_manifest(folder).get("table_sha256"):
        raise InputError(f"result folder {folder.name}: comparison.csv is not that of manifest.json; compare again.")
    return found


def read_manifest(folder: Path) -> Mapping[str, Any]:
    """manifest.json of a result folder; raises `InputError` where there is none or it is no table of fields."""
    try:
        content = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except OSError:
        raise InputError(
            f"result folder {folder.name} has no manifest.json; give a folder that `boneage-benchmark` finished."
        ) from None
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise InputError(f"result folder {folder.name}: manifest.json cannot be read as JSON; run again.")
    return content


def _table_text(folder: Path, kind: str) -> str:
    try:
        return (folder / TABLES[kind]).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        raise InputError(f"result folder {folder.name} has no readable {TABLES[kind]}; run again.") from None
