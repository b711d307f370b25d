"""Run one system under one protocol: predict what is not predicted yet, measure, write one result folder."""

import datetime
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from boneage_hf.data import load_split, read_manifest
from boneage_hf.errors import InputError
from boneage_hf.evaluation import predictions_csv, summarise
from boneage_hf.files import write_text
from boneage_hf.metrics import match_by_id
from boneage_hf.metrics import over_age as over_age  # taken from here by what reads results
from boneage_hf.sex import SEXES
from boneage_hf.splits import fingerprint

from .protocol import PROTOCOLS, Protocol
from .systems.base import System, leakage

#: Images per part that is kept while a run lasts: at most this many predictions are lost when it stops.
PART = 32

_AGREEMENT = "agreement.svg"
_PREDICTED = ["id", "predicted_months"]
_INTERVAL = ["interval_low_months", "interval_high_months"]


@dataclass(frozen=True)
class TestSet:
    """The images of a protocol in the user's copy, checked against its fingerprint.

    Attributes:
        images: split with the columns `id`, `image`, `sex`, `bone_age_months`.
        references: `id`, `reference_months`, `sex`, in the same order.
        digest: fingerprint of ids and reference ages.
        manifest: prepared.json.
    """

    images: Any
    references: pd.DataFrame
    digest: str
    manifest: Mapping[str, Any]

    __test__ = False  # for pytest, which takes the name for a test


def choose_device(device: str | None) -> str | None:
    """The device of this process: as told, or under a launcher its own, or None to choose.

    Raises:
        InputError: what was told is no device, or none that this machine and this torch can compute on.
    """
    if device is None:
        return None if int(os.environ.get("WORLD_SIZE", "1")) == 1 else str(_processes().device)
    try:
        # A torch built without an accelerator says so by an assertion. "meta" holds no numbers to compute with.
        usable = torch.empty(0, device=device).device.type != "meta"
    except (RuntimeError, AssertionError):
        usable = False
    if not usable:
        raise InputError(f'--device "{device}" cannot be used here; leave it out, or give cpu or one such as cuda:0.')
    return device


def _processes() -> PartialState:
    """This process among those of a launcher; on a machine of CPUs accelerate must be told that the CPU is meant."""
    return PartialState(cpu=not torch.accelerator.is_available())


def load_test_set(protocol: Protocol, data: str | Path) -> TestSet:
    """The images and labels of a protocol from a data set that `boneage prepare` wrote.

    Raises:
        InputError: the protocol cannot be run (its images or its labels are not known), the data set holds other
            images or another version of the labels (the message says which where it knows), or the protocol tells
            another number of images.
    """
    if protocol.prepared_split is None or protocol.ground_truth_fingerprint is None:
        near = [name for name in PROTOCOLS if name.startswith(f"{protocol.name}-")]
        cure = f"name {' or '.join(near)}" if near else "its rows stay cited"
        raise InputError(f"{protocol.name} cannot be run, for its images or labels are not known exactly; {cure}.")
    manifest = read_manifest(data)
    images = load_split(data, protocol.prepared_split)
    columns = images.select_columns(["id", "sex", "bone_age_months"])
    references = pd.DataFrame(
        {
            "id": [str(row_id) for row_id in columns["id"]],
            "reference_months": np.asarray(columns["bone_age_months"], dtype=np.float64),
            "sex": [SEXES[code] for code in columns["sex"]],
        }
    )
    digest = fingerprint(references["id"].tolist(), references["reference_months"].tolist())
    if digest != protocol.ground_truth_fingerprint:
        others = [name for name, other in PROTOCOLS.items() if other.ground_truth_fingerprint == digest]
        cure = f"they are those of {others[0]}: name it" if others else "prepare the data set that it describes"
        raise InputError(
            f"the {len(references)} images and labels of the split {protocol.prepared_split} are not those of "
            f"{protocol.name}; {cure}."
        )
    if protocol.n is not None and protocol.n != len(references):
        raise InputError(
            f"{protocol.name} says n is {protocol.n}, its split has {len(references)} images; correct n in its file."
        )
    return TestSet(images, references, digest, manifest)


def run_system(
    system: System, *, protocol: Protocol, data: str | Path, out: str | Path, progress: bool = True
) -> dict[str, Any]:
    """Predict the images of a protocol and write `predictions.csv`, `metrics.json`, `manifest.json` and a picture.

    A run that was stopped goes on where it was: predictions are kept in parts below `out` until all are there. Under
    `accelerate launch` or `torchrun` every process predicts its share. A finished run of the same system on the same
    images is read, not repeated.

    Args:
        system: what predicts.
        data: folder written by `boneage prepare`.
        out: a new folder, or that of the same run.

    Returns:
        The content of `metrics.json`.

    Raises:
        InputError: the data are not those of the protocol, the folder holds something else or the same run of a
            system that was said to have seen other data, or the system's predictions are missing, repeated, not
            finite, or in years. No result is written then.
    """
    out, started = Path(out), time.perf_counter()
    state = _processes()
    test = load_test_set(protocol, data)
    key = _key(system, protocol, test)
    finished = _finished(out, key, trained_on=system.trained_on)
    if finished is not None:
        if state.is_main_process:
            _draw_agreement(out, test, system)
        return finished
    # Nobody may finish before everybody has looked whether the run was finished before.
    state.wait_for_everyone()
    parts = out / ".parts" / key
    done_before = len(list(parts.glob("*.csv")))
    if system.resumable:
        _predict_parts(system, test, parts, state, progress=progress)
        state.wait_for_everyone()
    if not state.is_main_process:
        state.wait_for_everyone()
        return _read_json(out / "metrics.json")
    try:
        table = _collect(test, parts) if system.resumable else _predict_checked(system, test.images)
        summary = measure(table, test, system=system, protocol=protocol)
    except InputError:
        # Predictions that cannot be measured are of no use to a second try.
        _remove_parts(out)
        raise
    manifest = _manifest(system, protocol, test, summary, key)
    manifest["seconds"] = round(time.perf_counter() - started, 3)
    manifest["resumed_parts"] = done_before
    manifest["processes"] = state.num_processes
    predictions = predictions_csv(table)
    try:
        write_text(out / "predictions.csv", predictions)
        write_text(out / "metrics.json", json.dumps(summary, indent=2) + "\n")
        write_text(out / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"the results cannot be written ({error.strerror}); give another --out.") from None
    _draw_agreement(out, test, system)
    _remove_parts(out)
    state.wait_for_everyone()
    return summary


def _draw_agreement(out: Path, test: TestSet, system: System) -> None:
    """Write `agreement.svg`, which needs the labels, unless it is there."""
    from .pictures import draw_agreement

    if (out / _AGREEMENT).exists() or len(test.references) < 2:
        return
    matched = match_by_id(pd.read_csv(out / "predictions.csv", dtype={"id": str}), test.references)
    predicted, reference = (matched[f"{name}_months"].to_numpy(np.float64) for name in ("predicted", "reference"))
    svg = draw_agreement(predicted, reference, title=f"{system.name} {system.revision}"[:80])
    try:
        write_text(out / _AGREEMENT, svg)
    except OSError as error:
        raise InputError(f"the picture cannot be written ({error.strerror}); give another --out.") from None


def measure(table: pd.DataFrame, test: TestSet, *, system: System, protocol: Protocol) -> dict[str, Any]:
    """All that is measured of predictions: `boneage_hf.evaluation.summarise` and what a comparison asks beyond it.

    Args:
        table: `id`, `predicted_months`, optionally the interval.

    Returns:
        What `boneage evaluate` writes, and `system`, `trained_on`, `leakage`, `ground_truth_fingerprint`.

    Raises:
        InputError: predictions and images do not match one to one, or are in years.
    """
    matched = match_by_id(table, test.references)
    if set(_INTERVAL) <= set(table.columns):
        ends = table[["id", *_INTERVAL]].assign(id=table["id"].astype(str))
        matched = matched.merge(ends, on="id", how="left", validate="one_to_one")
    # As in the file, so that whoever has file and labels finds the same numbers.
    matched["predicted_months"] = matched["predicted_months"].round(4)
    summary = summarise(
        matched,
        checkpoint=system.name,
        revision=system.revision,
        protocol=protocol.name,
        split=str(protocol.prepared_split),
        flip_average=system.flip_average,
    )
    summary |= {
        "system": system.name,
        "trained_on": _listed(system.trained_on),
        "leakage": leakage(system.trained_on, protocol),
        "ground_truth_fingerprint": test.digest,
    }
    return summary


def _key(system: System, protocol: Protocol, test: TestSet) -> str:
    """Names all that decides the outcome of a run."""
    identity = [type(system).__name__, system.name, system.revision, system.preprocessing, system.flip_average]
    content = json.dumps([identity, asdict(protocol), test.digest, test.manifest.get("key")], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _listed(trained_on: Sequence[str] | None) -> list[str] | None:
    return None if trained_on is None else list(trained_on)


def _finished(out: Path, key: str, *, trained_on: Sequence[str] | None) -> dict[str, Any] | None:
    """The metrics of the finished run in `out`, or None; what the system has seen is no part of the key, as it changes
    no prediction, but it decides the leakage and with it the rank."""
    if out.exists() and not out.is_dir():
        raise InputError("--out is a file; name a folder.")
    if (out / "manifest.json").is_file():
        manifest = _read_json(out / "manifest.json")
        if manifest.get("run_key") != key:
            raise InputError("--out holds the results of another run; name another folder.")
        system = manifest.get("system")
        said = system.get("trained_on") if isinstance(system, dict) else None
        if said != _listed(trained_on):
            raise InputError(
                f"--out holds this run of a system trained on {_spoken(said)}, now it is {_spoken(trained_on)}; name "
                "another folder, or delete this one."
            )
        return _read_json(out / "metrics.json")
    strangers = (
        {path.name for path in out.iterdir()} - {".parts", "predictions.csv", "metrics.json", _AGREEMENT}
        if out.exists()
        else set()
    )
    if strangers:
        raise InputError("--out holds files that are no results of a run; name another folder.")
    return None


def _spoken(trained_on: Sequence[str] | None) -> str:
    return "unknown data" if trained_on is None else ", ".join(trained_on) or "nothing"


def _predict_parts(system: System, test: TestSet, parts: Path, state: PartialState, *, progress: bool) -> None:
    starts = range(0, len(test.images), PART)
    own = starts[state.process_index :: state.num_processes]
    sizes = {start: min(PART, len(test.images) - start) for start in own}
    shown = progress and state.is_main_process
    with tqdm(total=sum(sizes.values()), desc="predict", unit="image", disable=not shown) as bar:
        for start, size in sizes.items():
            path = parts / f"{start:06d}.csv"
            if not path.exists():
                part = test.images.select(range(start, start + size))
                table = _predict_checked(system, part)
                try:
                    # repr of a float is the float: what is resumed is what was predicted.
                    write_text(path, table.to_csv(index=False, lineterminator="\n"))
                except OSError as error:
                    raise InputError(
                        f"the results cannot be written ({error.strerror}); give another --out."
                    ) from None
            bar.update(size)


def _predict_checked(system: System, images: Any) -> pd.DataFrame:
    table = system.predict(images)
    missing = [column for column in _PREDICTED if column not in table.columns]
    if missing:
        raise InputError(
            f"{system.name} gave a table without the column {missing[0]}; it needs {', '.join(_PREDICTED)}."
        )
    columns = [*_PREDICTED, *(column for column in _INTERVAL if column in table.columns)]
    table = table[columns].assign(id=table["id"].astype(str)).reset_index(drop=True)
    if sorted(table["id"]) != sorted(str(row_id) for row_id in images["id"]):
        raise InputError(
            f"{system.name} gave {len(table)} predictions for {len(images)} images, or others than were asked for; it "
            "must give exactly one per image."
        )
    for column in columns[1:]:
        values = pd.to_numeric(table[column], errors="coerce").to_numpy(dtype=np.float64)
        if not np.isfinite(values).all():
            first = table["id"][int(np.flatnonzero(~np.isfinite(values))[0])]
            raise InputError(
                f"{system.name} gave {column} that is missing, NaN or infinite, first for image {first}; find out "
                "why: a score over the rest would pass for one over all."
            )
        table[column] = values
    return table


def _collect(test: TestSet, parts: Path) -> pd.DataFrame:
    read = [pd.read_csv(path, dtype=str) for path in sorted(parts.glob("*.csv"))]
    table = pd.concat(read, ignore_index=True).set_index("id").astype(np.float64)
    return table.loc[test.references["id"].tolist()].reset_index()


def _remove_parts(out: Path) -> None:
    shutil.rmtree(out / ".parts", ignore_errors=True)
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()


def _manifest(
    system: System, protocol: Protocol, test: TestSet, summary: Mapping[str, Any], key: str
) -> dict[str, Any]:
    return {
        "format": 1,
        "run_key": key,
        "system": {
            "name": system.name,
            "adapter": type(system).__name__,
            "revision": system.revision,
            "trained_on": summary["trained_on"],
            "leakage": summary["leakage"],
            "preprocessing": system.preprocessing,
            "uses_sex": system.uses_sex,
            "interval": system.interval,
            "reads_images": system.reads_images,
            "flip_average": system.flip_average,
        },
        "protocol": asdict(protocol) | {"overlaps": list(protocol.overlaps)},
        "ground_truth_fingerprint": test.digest,
        "data": {"kind": test.manifest["kind"], "settings": test.manifest["settings"], "key": test.manifest["key"]},
        "predictions_sha256": summary["predictions_sha256"],
        "commit": summary["commit"],
        "package_version": summary["package_version"],
        "versions": summary["versions"],
        "hardware": hardware(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def hardware() -> dict[str, Any]:
    """Processor, cores, threads and accelerators of this machine."""
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    except OSError:  # not Linux
        pass
    accelerators = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerators": accelerators,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{path.name} of the result folder cannot be read; delete the folder and run again.")
    return content
