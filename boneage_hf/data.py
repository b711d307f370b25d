"""Radiographs and their bone ages as a ``datasets.DatasetDict``: built once with :func:`prepare`, loaded with
:func:`load_prepared` and :func:`load_split`.

A prepared data set is a folder of parquet shards with the image bytes inside, a data card (README.md) and a manifest
(prepared.json). ``datasets.load_dataset(folder)`` reads it too. Its Features are :data:`FEATURES`.
"""

import difflib
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from tqdm import tqdm

from .data_card import LICENCES, SPLIT_RULES, SPLITS, PreparedRow, manifest_of, render
from .errors import InputError
from .files import write_bytes
from .hub_access import download, is_hub_id, split_id
from .label_tables import PROBLEMS, is_labelled, read_challenge
from .own_table import TableColumns, read_own_table
from .radiograph import Radiograph, read
from .sex import SEX_INDEX, SEXES, Sex
from .splits import REFERENCE_SEED, Assignment, calibration_half, fingerprint, id_order, reference_split
from .stored_image import Spool, StoredImage, content_hash, store

__all__ = [
    "DEFAULT_SIZE",
    "FEATURES",
    "SPLIT_NAMES",
    "DataProblemsError",
    "PrepareReport",
    "fingerprint",
    "load_prepared",
    "load_split",
    "prepare",
    "prepare_phantoms",
    "prepare_table",
    "read_manifest",
    "reference_split",
]

SplitRule = Literal["reference", "official"]

#: Features of every prepared data set.
FEATURES = Features(
    {
        "image": datasets.Image(),
        "id": Value("string"),
        "sex": ClassLabel(names=list(SEXES)),
        "bone_age_months": Value("float32"),
        "calibration": Value("bool"),
    }
)

#: What :func:`load_split` can load: the splits, and validation in its two disjoint halves.
SPLIT_NAMES = ("train", "validation", "selection", "calibration", "test")

#: Longer side of a stored image, pixels.
DEFAULT_SIZE = 512

_MANIFEST = "prepared.json"
_PLAN = ".plan.json"
_SHARD_ROWS = 1_000
_ROW_GROUP_ROWS = 100

# Part of the challenge -> split of the rule "official".
_PARTS = {"training": "train", "validation": "validation", "test": "test"}


class DataProblemsError(InputError):
    """Rows or images of the source cannot be used. ``problems`` maps the kind of problem to the ids of the rows."""

    def __init__(self, problems: Mapping[str, Sequence[str]]) -> None:
        self.problems = problems
        lines = [
            f"  {len(ids)} x {PROBLEMS[kind]} (id {', '.join(ids[:5])}{', ...' if len(ids) > 5 else ''})"
            for kind, ids in problems.items()
        ]
        count = sum(len(ids) for ids in problems.values())
        super().__init__(
            f"{count} rows or images of the source cannot be used and nothing was written; correct them, or leave "
            "them out with skip_bad (--skip-bad), which records them in the data card:\n" + "\n".join(lines)
        )


@dataclass(frozen=True)
class PrepareReport:
    """What :func:`prepare` did. ``str(report)`` is the text for a person.

    ``splits`` maps each split to its ``rows``, ``female``, ``male``, ``mean_months``, ``sd_months``, ``calibration``
    (rows), ``fingerprint`` and ``age_bands``; ``left_out`` maps a kind of problem to row ids.
    """

    folder: Path
    already_prepared: bool
    splits: Mapping[str, Mapping[str, Any]]
    left_out: Mapping[str, Sequence[str]]
    warnings: Sequence[str]

    def __str__(self) -> str:
        lines = [f"{'Already prepared' if self.already_prepared else 'Prepared'}: {self.folder}"]
        for name, summary in self.splits.items():
            sd = summary["sd_months"]
            lines.append(
                f"  {name:<10} {summary['rows']:>6} rows ({summary['female']} female, {summary['male']} male), "
                f"{summary['mean_months']:.2f}{'' if sd is None else f' +- {sd:.2f}'} months"
                + (f", {summary['calibration']} of them for calibration" if summary["calibration"] else "")
            )
        lines += [f"  left out: {len(ids)} x {PROBLEMS[kind]}" for kind, ids in self.left_out.items()]
        lines += [f"  warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


# --- prepare ---------------------------------------------------------------------------------------------------------


def prepare(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    size: int | None = DEFAULT_SIZE,
    skip_bad: bool = False,
    split: SplitRule = "reference",
    seed: int = REFERENCE_SEED,
    progress: bool = True,
) -> PrepareReport:
    """Build a prepared data set from the user's own copy of the RSNA challenge data.

    Every row and every image is checked before anything is written. A run that was interrupted goes on where it
    stopped; a finished folder is left as it is.

    Args:
        source: folder in the layout of the challenge or its Kaggle copy, see
            :func:`boneage_hf.label_tables.read_challenge`.
        out: folder to write; new, empty, or begun by a call with the same source and settings. The size of a source
            file in bytes, not its date, tells whether it is still the same.
        size: images whose longer side is above this are reduced to it (PIL bilinear, aspect ratio kept, grey JPEG of
            quality 95); other 8-bit grey PNG and JPEG files are kept byte for byte (without loss but as a new PNG if
            they hold text or EXIF metadata). ``None`` reduces nothing.
        skip_bad: leave rows and images out that cannot be used, and record them, instead of refusing them. Of
            identical images with the same age and sex the first id stays; where they disagree all are left out.
        split: "reference" (from the training set alone) or "official" (the parts of the challenge); see
            :data:`boneage_hf.data_card.SPLIT_RULES`.
        seed: of the split.
        progress: show a progress bar if standard error is a terminal.

    Raises:
        DataProblemsError: if rows or images cannot be used and ``skip_bad`` is False; it lists all of them.
        InputError: for a source without the tables, an output folder that holds something else, or a bad setting.
    """
    if split not in SPLIT_RULES:
        raise InputError(f"split must be one of {', '.join(SPLIT_RULES)}, not {split!r}.")
    _check_settings(size, seed)
    parts = ("training",) if split == "reference" else tuple(_PARTS)
    table = read_challenge(source, parts=parts)
    if split == "official" and "validation" not in set(table["part"]):
        raise InputError(
            "The official split needs the challenge's validation set, and its table is not in the source folder; add "
            'it (header "Image ID,male,Bone Age (months)") or use the split "reference".'
        )
    settings = {"kind": "rsna", "size": size, "split": split, "seed": seed}
    key = _plan_key(table, Path(source), settings)
    return _prepare_table(table, Path(out), settings, key=key, skip_bad=skip_bad, progress=progress)


def prepare_phantoms(
    n: int,
    out: str | os.PathLike[str],
    *,
    seed: int = REFERENCE_SEED,
    size: int = DEFAULT_SIZE,
    progress: bool = True,
) -> PrepareReport:
    """Draw ``n`` hand phantoms and store them as a prepared data set with the reference split.

    Ages are evenly spread over 6 to 216 months, girls and boys alternate. The images are PNG files that carry the mark
    of :mod:`boneage_hf.phantom`.

    Args:
        n: how many, at least 2.
        out: folder to write, as in :func:`prepare`.
        seed: of the drawings and the split.
        size: side of the images in pixels.
        progress: show a progress bar if standard error is a terminal.

    Raises:
        InputError: for an output folder that holds something else, or a bad setting.
    """
    from .phantom import draw, save_png

    if isinstance(n, bool) or not isinstance(n, int) or n < 2:
        raise InputError(f"The number of phantoms must be a whole number from 2 on, not {n!r}.")
    _check_settings(size, seed)
    months = [float(age) for age in np.linspace(6.0, 216.0, n).round(2)]
    table = pd.DataFrame(
        {
            "id": [f"phantom-{number:05d}" for number in range(n)],
            "bone_age_months": months,
            "sex": [SEXES[number % 2] for number in range(n)],
            "path": None,
            "part": "training",
            "problem": None,
        },
        dtype=object,
    )
    settings = {"kind": "phantom", "size": size, "split": "reference", "seed": seed, "n": n}
    key = _plan_key(table, Path(), settings)
    done = _finished(Path(out), key, settings, skip_bad=False)
    if done is not None:
        return done
    with tempfile.TemporaryDirectory(prefix="boneage-phantoms-") as folder:
        table["path"] = pd.Series([Path(folder, f"{row_id}.png") for row_id in table["id"]], dtype=object)
        for number in tqdm(range(n), "drawing", unit=" images", disable=_hide(progress)):
            image = draw(months[number], table["sex"][number], seed=seed + number, size=size)
            save_png(image, table["path"][number])
        return _prepare_table(table, Path(out), settings, key=key, skip_bad=False, progress=progress)


def prepare_table(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    columns: TableColumns,
    *,
    size: int | None = DEFAULT_SIZE,
    skip_bad: bool = False,
    seed: int = REFERENCE_SEED,
    progress: bool = True,
) -> PrepareReport:
    """Build a prepared data set from a table of one's own, with the checks and the split rule of :func:`prepare`.

    Radiographs may be any file that :func:`boneage_hf.radiograph.read` reads, DICOM included. Of a file only its
    pixels are kept: neither its name nor anything of its header.

    Args:
        source: CSV or parquet file, or Hub id of a data set; see :func:`boneage_hf.own_table.read_own_table`.
        columns: how to read it.

    Others and errors as of :func:`prepare`.
    """
    _check_settings(size, seed)
    settings = {"kind": "table", "size": size, "split": "reference", "seed": seed}
    name = os.fspath(source)
    if is_hub_id(name):
        repo_id, _ = split_id(name)
        commit = local_folder(name, ["README.md"]).name
        settings |= {"hub_id": repo_id, "commit": commit}
        name = f"{repo_id}@{commit}"
    with tempfile.TemporaryDirectory(prefix="boneage-table-") as scratch:
        table = read_own_table(name, columns, scratch=Path(scratch))
        # Images that lie inside the table are in the scratch folder, whose name is another one in each run.
        base = Path(scratch) if any(_below(path, Path(scratch)) for path in table["path"]) else Path(name).parent
        key = _plan_key(table, base, settings)
        return _prepare_table(table, Path(out), settings, key=key, skip_bad=skip_bad, progress=progress)


def _below(path: Path | None, folder: Path) -> bool:
    return path is not None and path.is_relative_to(folder)


def is_prepared_on_hub(source: str | os.PathLike[str]) -> bool:
    """Whether a source is the Hub id of a data set that :func:`prepare` built.

    Raises:
        InputError: if the Hub has no such data set or cannot be reached.
    """
    return is_hub_id(os.fspath(source)) and (local_folder(source, [_MANIFEST, "README.md"]) / _MANIFEST).is_file()


def copy_from_hub(
    source: str, out: str | os.PathLike[str], asked: Mapping[str, Any] = MappingProxyType({})
) -> PrepareReport:
    """Copy a prepared data set of the Hub into a folder, whole or not at all, and check its labels.

    Args:
        source: Hub id.
        out: folder to write; new, empty, or holding this very data set.
        asked: settings that it must have been prepared with, as in its manifest.

    Raises:
        InputError: it was prepared with other settings, its labels are not those of its manifest, ``out`` holds
            something else, or the Hub is in the way.
    """
    manifest = read_manifest(source)
    settings = manifest["settings"]
    differences = [f"{name} {settings.get(name)!r}" for name, value in asked.items() if settings.get(name) != value]
    if differences:
        raise InputError(
            f"{source} was prepared with {', '.join(differences)}, which a copy cannot change: leave that option out."
        )
    target = Path(out)
    done = _finished(target, manifest["key"], settings, skip_bad=True)
    if done is not None:
        return done
    folder = local_folder(source)
    check_whole(folder, manifest)
    for name, summary in manifest["splits"].items():
        shards = [folder / file for file, facts in manifest["files"].items() if facts["split"] == name]
        labels = pa.concat_tables([pq.read_table(shard, columns=["id", "bone_age_months"]) for shard in shards])
        months = labels["bone_age_months"].to_numpy().astype(np.float64)
        if fingerprint(labels["id"].to_pylist(), months) != summary["fingerprint"]:
            raise InputError(f"The labels of {source} are not those of its manifest: ask its owner to push it again.")
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for name in (*manifest["files"], "README.md", _MANIFEST):
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, temporary / name)
        if target.is_dir():
            shutil.rmtree(target)  # empty, or the damaged rest of this very data set
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _report(target, manifest, already_prepared=False)


def _check_settings(size: int | None, seed: int) -> None:
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 32):
        raise InputError(
            f"size must be a whole number of pixels from 32 on, or None for the original size, not {size!r}."
        )
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InputError(f"seed must be a whole number, not {seed!r}.")


def _hide(progress: bool) -> bool | None:
    # tqdm's None means: show it on a terminal only.
    return None if progress else True


def _prepare_table(
    table: pd.DataFrame, out: Path, settings: Mapping[str, Any], *, key: str, skip_bad: bool, progress: bool
) -> PrepareReport:
    done = _finished(out, key, settings, skip_bad=skip_bad)
    if done is not None:
        return done
    plan = _plan(out, key, settings)
    nearest = next(folder for folder in (out.resolve(), *out.resolve().parents) if folder.is_dir())
    if not os.access(nearest, os.W_OK):
        raise InputError(f"{nearest} cannot be written to; give an output folder that can.")
    with Spool(nearest) as spool:
        found = plan if plan is not None else _check_images(table, spool, settings, progress=progress)
        problems = [found.get(row, problem) for row, problem in enumerate(table["problem"])]
        left_out = _group(table, problems)
        if left_out and not skip_bad:
            raise DataProblemsError(left_out)
        rows = _assign(table, problems, settings)
        if not rows:
            raise InputError("No usable row is left, so there is nothing to write; check the source folder.")

        out.mkdir(parents=True, exist_ok=True)
        plan_text = json.dumps({"key": key, "settings": dict(settings), "image_problems": found})
        write_bytes(out / _PLAN, plan_text.encode())
        (out / "data").mkdir(exist_ok=True)
        files = _write_shards(table, rows, spool, out, settings, progress=progress)
    manifest = manifest_of(table, problems, rows, left_out, files, settings, key)
    write_bytes(out / "README.md", render(manifest, features=FEATURES).encode())
    write_bytes(out / _MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    (out / _PLAN).unlink()
    return _report(out, manifest, already_prepared=False)


def _plan_key(table: pd.DataFrame, source: Path, settings: Mapping[str, Any]) -> str:
    """Hash of everything that decides what is written, short of the pixels."""
    rows = []
    for path, *label in zip(
        *(table[column] for column in ("path", "id", "bone_age_months", "sex", "part", "problem")), strict=True
    ):
        file = None if path is None else [Path(os.path.relpath(path, source)).as_posix(), path.stat().st_size]
        rows.append([*map(str, label), file])
    return hashlib.sha256(json.dumps([dict(settings), rows]).encode()).hexdigest()


def _finished(out: Path, key: str, settings: Mapping[str, Any], *, skip_bad: bool) -> PrepareReport | None:
    """The report if ``out`` already holds this very data set, complete; None if there is something left to do."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a folder to write the data set to.")
    if (out / _PLAN).is_file():
        return None
    if not (out / _MANIFEST).is_file():
        # Hidden files (.DS_Store, what an interrupted first write left) are in nobody's way.
        if out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
            raise InputError(f"{out} is not empty and holds no prepared data set; give a new or an empty folder.")
        return None
    manifest = _read_json(out / _MANIFEST)
    _refuse_another(out, manifest, key, settings)
    if manifest["left_out"] and not skip_bad:
        raise DataProblemsError(manifest["left_out"])
    damaged = _damaged(out, manifest)
    for name in damaged:
        (out / name).unlink(missing_ok=True)
    return None if damaged else _report(out, manifest, already_prepared=True)


def _plan(out: Path, key: str, settings: Mapping[str, Any]) -> dict[int, str] | None:
    """Row -> image problem as an interrupted run with the same source and settings found it; None without one."""
    if not (out / _PLAN).is_file():
        return None
    plan = _read_json(out / _PLAN)
    _refuse_another(out, plan, key, settings)
    return {int(row): problem for row, problem in plan["image_problems"].items()}


def _refuse_another(out: Path, begun: Mapping[str, Any], key: str, settings: Mapping[str, Any]) -> None:
    if begun.get("key") == key:
        return
    other = begun.get("settings", {})
    differences = [
        f"{name} {other.get(name)!r} instead of {settings.get(name)!r}"
        for name in sorted({*other, *settings})
        if other.get(name) != settings.get(name)
    ]
    raise InputError(
        f"{out} holds a data set made with {', '.join(differences) or 'other source files'}; give another output "
        "folder, or delete this one first."
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged; delete the folder and prepare the data set again.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged; delete the folder and prepare the data set again.")
    return content


def _damaged(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Names of the shards that are missing or not as long as the manifest says."""
    files: Mapping[str, Mapping[str, Any]] = manifest["files"]
    return [
        name
        for name, file in files.items()
        if not (folder / name).is_file() or (folder / name).stat().st_size != file["bytes"]
    ]


def _group(table: pd.DataFrame, problems: Sequence[str | None]) -> dict[str, list[str]]:
    """Kind of problem -> ids ("training row 17" where there is none), kinds in the order of PROBLEMS."""
    rows_of_part = table.groupby("part").cumcount() + 1
    names = [
        row_id or f"{part} row {row}"
        for row_id, part, row in zip(table["id"], table["part"], rows_of_part, strict=True)
    ]
    return {
        kind: sorted((name for name, problem in zip(names, problems, strict=True) if problem == kind), key=id_order)
        for kind in PROBLEMS
        if kind in problems
    }


def _assign(table: pd.DataFrame, problems: Sequence[str | None], settings: Mapping[str, Any]) -> list[PreparedRow]:
    """Split all labelled rows, whether or not their image can be used, then keep the usable ones, in order of id."""
    labelled = [row for row, problem in enumerate(problems) if is_labelled(problem)]
    ids = [str(table["id"][row]) for row in labelled]
    months = [float(table["bone_age_months"][row]) for row in labelled]
    sexes: list[Sex] = [table["sex"][row] for row in labelled]
    if settings["split"] == "reference":
        assignments = reference_split(ids, months, sexes, seed=settings["seed"])
    else:
        splits = [_PARTS[table["part"][row]] for row in labelled]
        validation = [row_id for row_id, name in zip(ids, splits, strict=True) if name == "validation"]
        calibration = calibration_half(validation, seed=settings["seed"])
        assignments = [
            Assignment(name, name == "validation" and row_id in calibration)
            for row_id, name in zip(ids, splits, strict=True)
        ]
    rows = [
        PreparedRow(row_id, age, sex, assignment.split, assignment.calibration, source)
        for row_id, age, sex, assignment, source in zip(ids, months, sexes, assignments, labelled, strict=True)
        if problems[source] is None
    ]
    return sorted(rows, key=lambda row: id_order(row.id))


# --- images and shards -----------------------------------------------------------------------------------------------


def _check_images(table: pd.DataFrame, spool: Spool, settings: Mapping[str, Any], *, progress: bool) -> dict[int, str]:
    """Decode every image that has a good label, once; returns row -> problem and fills the spool."""

    def check(row: int) -> tuple[int, str | None, StoredImage | None]:
        try:
            content = table["path"][row].read_bytes()
            radiograph = read(content)
        except (InputError, OSError):
            return row, None, None
        return row, content_hash(radiograph.image), _store(content, radiograph, settings)

    found: dict[int, str] = {}
    same: dict[str, list[int]] = defaultdict(list)
    rows = [row for row, problem in enumerate(table["problem"]) if problem is None]
    with (
        ThreadPoolExecutor(max_workers=os.cpu_count()) as pool,
        tqdm(total=len(rows), desc="checking", unit=" images", disable=_hide(progress)) as bar,
    ):
        # In batches, so that no more than a few decoded images wait for the spool.
        for start in range(0, len(rows), 64):
            for row, pixels, stored in pool.map(check, rows[start : start + 64]):
                bar.update()
                if pixels is None or stored is None:
                    found[row] = "unreadable"
                else:
                    same[pixels].append(row)
                    spool.put(row, stored)
    for group in same.values():
        if len(group) > 1:
            labels = {(table["bone_age_months"][row], table["sex"][row], table["part"][row]) for row in group}
            kept = min(group, key=lambda row: id_order(str(table["id"][row]))) if len(labels) == 1 else None
            found.update({row: "same_image" for row in group if row != kept})
    return found


def _store(content: bytes, radiograph: Radiograph, settings: Mapping[str, Any]) -> StoredImage:
    # The text in a phantom's file is the mark that tells it from a radiograph.
    return store(content, radiograph, size=settings["size"], keep_text=settings["kind"] == "phantom")


def _write_shards(
    table: pd.DataFrame,
    rows: Sequence[PreparedRow],
    spool: Spool,
    out: Path,
    settings: Mapping[str, Any],
    *,
    progress: bool,
) -> dict[str, dict[str, Any]]:
    """Write the shards that are not there yet; returns all of them: relative name -> split, rows, bytes."""
    files: dict[str, dict[str, Any]] = {}
    with tqdm(total=len(rows), desc="writing", unit=" images", disable=_hide(progress)) as bar:
        for split in SPLITS:
            of_split = [row for row in rows if row.split == split]
            count = -(-len(of_split) // _SHARD_ROWS)
            bounds = [len(of_split) * number // count for number in range(count + 1)] if count else []
            shards = [of_split[start:stop] for start, stop in itertools.pairwise(bounds)]
            for number, shard in enumerate(shards):
                path = out / "data" / f"{split}-{number:05d}-of-{len(shards):05d}.parquet"
                if not path.is_file():
                    _write_shard(table, shard, spool, path, settings)
                bar.update(len(shard))
                name = path.relative_to(out).as_posix()
                files[name] = {"split": split, "rows": len(shard), "bytes": path.stat().st_size}
    return files


def _write_shard(
    table: pd.DataFrame, rows: Sequence[PreparedRow], spool: Spool, path: Path, settings: Mapping[str, Any]
) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    # arrow_schema carries the Features in its metadata, so that image bytes load as images and sex as a ClassLabel.
    with pq.ParquetWriter(temporary, FEATURES.arrow_schema) as writer:
        for start in range(0, len(rows), _ROW_GROUP_ROWS):
            group = rows[start : start + _ROW_GROUP_ROWS]
            records = []
            for row in group:
                stored = _image_of(table["path"][row.source], row, spool, settings)
                records.append(
                    {
                        "image": {"bytes": stored.content, "path": f"{row.id}{stored.suffix}"},
                        "id": row.id,
                        "sex": SEX_INDEX[row.sex],
                        "bone_age_months": row.bone_age_months,
                        "calibration": row.calibration,
                    }
                )
            writer.write_table(pa.Table.from_pylist(records, schema=FEATURES.arrow_schema))
    temporary.replace(path)


def _image_of(path: Path, row: PreparedRow, spool: Spool, settings: Mapping[str, Any]) -> StoredImage:
    stored = spool.get(row.source, path)
    if stored is None:
        content = path.read_bytes()
        stored = _store(content, read(content), settings)
    return stored


def _report(out: Path, manifest: Mapping[str, Any], *, already_prepared: bool) -> PrepareReport:
    return PrepareReport(
        folder=out,
        already_prepared=already_prepared,
        splits=manifest["splits"],
        left_out=manifest["left_out"],
        warnings=tuple(manifest["warnings"]),
    )


# --- loading ---------------------------------------------------------------------------------------------------------


def local_folder(source: str | os.PathLike[str], files: Sequence[str] | None = None) -> Path:
    """The folder of a prepared data set; that of a Hub id is downloaded into the Hub's cache first.

    Args:
        source: folder, or a Hub id, with its revision if need be: ``"owner/name@main"``.
        files: names of those to download, all by default.

    Raises:
        InputError: if the Hub has no such data set or cannot be reached.
    """
    name = os.fspath(source)
    if not is_hub_id(name):
        return Path(name)
    repo_id, revision = split_id(name)
    return download(repo_id, list(files or (_MANIFEST, "README.md", "data/*")), kind="dataset", revision=revision)


def read_manifest(source: str | os.PathLike[str]) -> dict[str, Any]:
    """What prepared.json of a prepared data set says, see :func:`boneage_hf.data_card.manifest_of`.

    Args:
        source: folder or Hub id.

    Raises:
        InputError: if there is no prepared data set, or an unfinished one.
    """
    if is_hub_id(os.fspath(source)):
        manifest = local_folder(source, [_MANIFEST]) / _MANIFEST
        if not manifest.is_file():
            raise InputError(
                f"{source} is no prepared data set on the Hub: run `boneage prepare {source} OUT` and give OUT."
            )
        return _read_json(manifest)
    path = Path(source)
    if not path.is_dir():
        raise InputError(f"There is no folder {path}; run `boneage prepare SOURCE {path}` first.")
    if (path / _PLAN).exists():
        raise InputError(f"{path} is only partly prepared; run the same `boneage prepare` again to finish it.")
    if not (path / _MANIFEST).is_file():
        raise InputError(f"{path} is no prepared data set; run `boneage prepare SOURCE OUT` and give OUT.")
    return _read_json(path / _MANIFEST)


def licence_of(manifest: Mapping[str, Any]) -> str | None:
    """Licence of a data set's images and labels, as its card names it; None for a table of one's own.

    Args:
        manifest: as :func:`read_manifest` returns it.
    """
    return LICENCES.get(manifest["kind"])


def hub_source(source: str | os.PathLike[str]) -> dict[str, str]:
    """Id and commit of a data set of the Hub, for the provenance of what is made from it; empty for a folder."""
    name = os.fspath(source)
    return {"hub_id": split_id(name)[0], "commit": local_folder(name).name} if is_hub_id(name) else {}


def check_whole(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse a folder that lacks a shard or a part of one.

    Raises:
        InputError: with the cure.
    """
    if _damaged(folder, manifest):
        raise InputError(f"{folder} is damaged (a shard is missing or cut); run the same `boneage prepare` again.")


def load_prepared(source: str | os.PathLike[str]) -> DatasetDict:
    """Load a prepared data set: the splits "train", "validation" and "test" (without those that are empty).

    Args:
        source: folder or Hub id.

    Raises:
        InputError: if there is no prepared data set, or one that is unfinished or damaged.
    """
    manifest = read_manifest(source)
    path = local_folder(source)
    check_whole(path, manifest)
    with _quiet_datasets():
        loaded = datasets.load_dataset(str(path.resolve()))
    return loaded


def load_split(data: str | os.PathLike[str] | DatasetDict, name: str) -> Dataset:
    """One split of a prepared data set.

    Args:
        data: folder, Hub id, or what :func:`load_prepared` returned.
        name: "train", "validation", "test"; or "calibration" (the half of validation that is reserved for it) or
            "selection" (the other half, for choosing an epoch or a model).

    Raises:
        InputError: if there is no such split, or no row in it.
    """
    if name not in SPLIT_NAMES:
        close = difflib.get_close_matches(name, SPLIT_NAMES, n=1)
        hint = f' (did you mean "{close[0]}"?)' if close else ""
        raise InputError(f"There is no split {name!r}{hint}; the splits are {', '.join(SPLIT_NAMES)}.")
    loaded = data if isinstance(data, DatasetDict) else load_prepared(data)
    halves = name in ("selection", "calibration")
    whole = "validation" if halves else name
    if whole not in loaded:
        raise InputError(f"This data set has no split {whole}; it has {', '.join(loaded)}.")
    split: Dataset = loaded[whole]
    if halves:
        reserved = np.asarray(split.select_columns(["calibration"])[:]["calibration"], dtype=bool)
        with _quiet_datasets():
            split = split.select(np.flatnonzero(reserved == (name == "calibration")))
        if len(split) == 0:
            raise InputError(f"No row of validation is for {name}; the data set is too small, prepare a larger one.")
    return split


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Without the progress bars and the chatter of ``datasets``, which are put back afterwards."""
    bars = datasets.are_progress_bars_disabled()
    verbosity = datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()
