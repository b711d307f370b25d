"""`boneage fit-interval` and `boneage calibrate`: a checkpoint and labelled images in, a new checkpoint out.

The images are predicted by the one evaluation loop; what was fitted is in the new config, where it came from in its
provenance, and the weights are the old ones.
"""

import copy
import datetime
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from . import __version__
from .calibration import (
    MIN_SLOPE_IMAGES,
    AgeCorrectionFit,
    CrossValidation,
    LocalCalibrationFit,
    fit_age_correction,
    fit_local_calibration,
)
from .data import SPLIT_NAMES, fingerprint, load_prepared, load_split
from .errors import InputError
from .evaluation import git_commit, predict_dataset
from .hub import check_output, checkpoint_revision, load_pipeline, resolve_checkpoint, save_checkpoint, storage_dtype
from .interval_boneage import fit_interval, fit_interval_shape, interval_months
from .pipeline_boneage import BoneAgePipeline


@dataclass(frozen=True, kw_only=True)
class FittedInterval:
    """What [`fit_interval_of_checkpoint`] found.

    Attributes:
        interval: as in the new config.
        n: calibration images.
        mean_width_months: on the calibration images.
        age_correction: the fit over age, or None if it was not asked for.
        revision: of the new checkpoint.
    """

    interval: dict[str, Any]
    n: int
    mean_width_months: float
    age_correction: AgeCorrectionFit | None
    revision: str

    def __str__(self) -> str:
        lines = []
        if self.age_correction is not None:
            kept = "kept" if self.age_correction.correction is not None else "nothing gained, months stay as they are"
            lines.append(f"correction over age: {self.age_correction.gained}: {kept}")
        lines.append(
            f"{100 * (1 - self.interval['alpha']):g} % interval from {self.n} calibration images: mean width "
            f"{self.mean_width_months:.1f} months there; measure its coverage on the test split"
        )
        return "\n".join([*lines, f"revision {self.revision}"])


def fit_interval_of_checkpoint(
    checkpoint: str,
    dataset: str | Path,
    out: Path,
    *,
    correct_age: bool = False,
    flip_average: bool | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> FittedInterval:
    """Write a checkpoint with a 90 % interval, and with a correction over age if that is asked for and wins.

    In this order: the correction is fitted on the selection half of validation; edges and spread of the interval on
    the same half, predicted again with the correction; the quantiles on the calibration half, which has had no say in
    anything before. An interval that the checkpoint has is replaced.

    Args:
        checkpoint: folder, Hub id or `"default"`.
        dataset: folder written by `boneage prepare`, the one the weights were trained on.
        out: folder of the new checkpoint.
        correct_age: try a correction over age.
        flip_average: fit to answers that are averaged with those of the mirrored image, or that are not; the new
            checkpoint answers so from then on. None: as the checkpoint answers already.

    Raises:
        InputError: the output is the checkpoint itself or holds something else; the checkpoint is calibrated locally,
            or has a correction already and shall get one; the data set is split otherwise than that of the training;
            too few images.
    """
    pipe = load_for_change(checkpoint, out)
    config = pipe.model.config
    if correct_age and config.age_correction is not None:
        raise InputError("This checkpoint has a correction over age already; start from the one without it.")
    revision = checkpoint_revision(pipe)
    if flip_average is not None:
        config.flip_average = flip_average

    def predicted(split: str) -> pd.DataFrame:
        rows = load_split(dataset, split)
        return predict_dataset(pipe, rows, batch_size=batch_size, progress=progress)

    config.interval = None
    selection = predicted("selection")
    check_split(config.provenance, selection["id"].tolist(), selection["reference_months"].tolist())
    provenance: dict[str, Any] = {
        "base_revision": revision,
        "spread_n": len(selection),
        "spread_fingerprint": _fingerprint(selection),
    }
    correction = fit_age_correction(*_columns(selection)) if correct_age else None
    if correction is not None:
        provenance["age_correction"] = {
            "kept": correction.correction is not None,
            "fingerprint": _fingerprint(selection),
            **asdict(correction.gained),
        }
        if correction.correction is not None:
            config.age_correction = correction.correction
            selection = predicted("selection")
    shape = fit_interval_shape(*_columns(selection))
    calibration = predicted("calibration")
    interval = fit_interval(*_columns(calibration), shape=shape)
    low, high = interval_months(calibration["predicted_months"].to_numpy(), interval)
    provenance |= {"alpha": interval["alpha"], "n": len(calibration), "fingerprint": _fingerprint(calibration)}
    provenance |= {"flip_average": config.flip_average, **made_by()}
    config.interval = interval
    save_changed(pipe, out, {"interval": provenance})
    return FittedInterval(
        interval=interval,
        n=len(calibration),
        mean_width_months=float((high - low).mean()),
        age_correction=correction,
        revision=checkpoint_revision(pipe),
    )


@dataclass(frozen=True, kw_only=True)
class CalibratedCheckpoint:
    """What [`calibrate_checkpoint`] found: the fit, and the revision of the new checkpoint."""

    fit: LocalCalibrationFit
    revision: str

    def __str__(self) -> str:
        fit = self.fit
        lines = [f"{fit.n} images: " + ", ".join(f"{count} {sex}" for sex, count in fit.n_by_sex.items())]
        place = ""
        if fit.calibration is not None and fit.slope_used:
            place = f" at a prediction of {fit.calibration['centre_months']:.1f} months"
        for name, offset in fit.offsets_months.items():
            shrunk = f", keeping {100 * fit.kept_difference[name]:.0f} % of its difference from the common offset"
            lines.append(
                f"offset {name}: {offset:+.2f} months{place} (measured {fit.measured_offsets_months[name]:+.2f}"
                f"{shrunk if len(fit.offsets_months) > 1 else ''})"
            )
        alone = fit.calibration is not None and not fit.slope_used
        lines.append(f"offset alone: {_verdict(fit.offset_gained, used=alone)}")
        if fit.slope is None or fit.slope_gained is None:
            lines.append(f"slope: not fitted, that takes {MIN_SLOPE_IMAGES} images")
        else:
            lines.append(f"slope {fit.slope:.3f} and offset: {_verdict(fit.slope_gained, used=fit.slope_used)}")
        if fit.calibration is None:
            lines.append("nothing was gained: the months stay as they are, the interval is the local one")
        low, high = fit.interval_width_ci95_months
        lines.append(f"90 % interval: mean width {fit.interval_width_months:.1f} months, 95 % [{low:.1f}, {high:.1f}]")
        low, high = (100 * end for end in fit.coverage_ci95)
        lines.append(
            f"from {fit.n} images its true coverage is only known to lie between {low:.0f} and {high:.0f} % (95 %)"
        )
        return "\n".join([*lines, f"revision {self.revision}"])


def _verdict(gained: CrossValidation, *, used: bool) -> str:
    return f"{gained}: {'used' if used else 'not used'}"


def calibrate_checkpoint(
    checkpoint: str,
    dataset: str | Path,
    out: Path,
    *,
    split: str | None = None,
    flip_average: bool | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> CalibratedCheckpoint:
    """Write a checkpoint that is calibrated on a hospital's own labelled images; see
    [`boneage_hf.calibration.fit_local_calibration`].

    Images that had a part in the checkpoint, or in one that it was made from or taught by, are known by the
    fingerprint of their labels: the whole training split, either half of validation. A part of one of these cannot be
    recognised, nor can one among other images: keep them out.

    The images are predicted as they lie, without the quality gate: a sideways or mirrored hand, which the gate would
    put right in use, and a picture that it would refuse shift the offsets and widen the interval. Give upright hands.

    Args:
        checkpoint: folder, Hub id or `"default"`.
        dataset: folder written by `boneage prepare` from these images.
        out: folder of the new checkpoint.
        split: part of the data set to use; all of its images if None.
        flip_average: fit to answers that are averaged with those of the mirrored image, or that are not; the new
            checkpoint answers so from then on. None: as the checkpoint answers already.

    Raises:
        InputError: the output is the checkpoint itself or holds something else; the checkpoint is calibrated locally
            already; the images are those that it was trained on, chosen by or fitted to; too few images; a number of
            the fit makes no sense.
    """
    pipe = load_for_change(checkpoint, out)
    config = pipe.model.config
    revision = checkpoint_revision(pipe)
    shape, config.interval = config.interval, None
    if flip_average is not None:
        config.flip_average = flip_average
    names = [split] if split is not None else [name for name in SPLIT_NAMES if name in load_prepared(dataset)]
    _check_unseen(config.provenance, dataset, names)  # before minutes are spent on predictions
    tables = [
        predict_dataset(pipe, load_split(dataset, name), batch_size=batch_size, progress=progress) for name in names
    ]
    table = pd.concat(tables, ignore_index=True)
    fit = fit_local_calibration(*_columns(table), sex=table["sex"].tolist(), uses_sex=config.uses_sex, shape=shape)
    config.local_calibration, config.interval = fit.calibration, fit.interval
    provenance = {
        "base_revision": revision,
        "n": fit.n,
        "n_by_sex": fit.n_by_sex,
        "fingerprint": _fingerprint(table),
        "alpha": fit.interval["alpha"],
        "used": {"offsets": fit.calibration is not None, "slope": fit.slope_used},
        "measured_offsets_months": fit.measured_offsets_months,
        "offsets_months": fit.offsets_months,
        "offset_gained": asdict(fit.offset_gained),
        "slope_gained": None if fit.slope_gained is None else asdict(fit.slope_gained),
        "interval_width_months": fit.interval_width_months,
        "interval_width_ci95_months": list(fit.interval_width_ci95_months),
        "coverage_ci95": list(fit.coverage_ci95),
        "flip_average": config.flip_average,
        **made_by(),
    }
    save_changed(pipe, out, {"local_calibration": provenance})
    return CalibratedCheckpoint(fit=fit, revision=checkpoint_revision(pipe))


def load_for_change(checkpoint: str, out: Path) -> BoneAgePipeline:
    """The pipeline; refuses an output that cannot be written before minutes are spent on predictions."""
    source = resolve_checkpoint(checkpoint)
    if Path(source).is_dir() and out.resolve() == Path(source).resolve():
        raise InputError("The output is the checkpoint itself, which would be lost: name another folder.")
    check_output(out)
    pipe = load_pipeline(checkpoint)
    if pipe.model.config.local_calibration is not None or "local_calibration" in (pipe.model.config.provenance or {}):
        raise InputError("This checkpoint is calibrated on local images already; start from the one before that.")
    return pipe


def save_changed(pipe: BoneAgePipeline, out: Path, provenance: dict[str, Any]) -> None:
    """Write the new checkpoint as the old one was, with this added to its provenance."""
    config = pipe.model.config
    config.provenance = {**copy.deepcopy(config.provenance or {}), **provenance}
    save_checkpoint(
        pipe.model,
        pipe.image_processor,
        out,
        dtype=storage_dtype(pipe.model),
        with_code=bool(getattr(config, "auto_map", None)),
    )


def _columns(table: pd.DataFrame) -> tuple[Any, Any]:
    return table["predicted_months"].to_numpy(), table["reference_months"].to_numpy()


def _fingerprint(table: pd.DataFrame) -> str:
    return fingerprint(table["id"].tolist(), table["reference_months"].tolist())


def made_by() -> dict[str, Any]:
    """Package version, commit and date for a provenance."""
    return {"package_version": __version__, "commit": git_commit(), "date": datetime.date.today().isoformat()}


def check_split(provenance: dict[str, Any] | None, ids: Sequence[str], bone_age_months: Sequence[float]) -> None:
    """Refuse a data set whose selection half (ids and labels) is not the one that the training used."""
    trained_with = (provenance or {}).get("selection_fingerprint")
    if trained_with is not None and trained_with != fingerprint(ids, bone_age_months):
        raise InputError(
            "This data set is split otherwise than the one that the weights were trained with, so its calibration "
            "half may hold training images: prepare the same images with the same --split and --seed, or use "
            "`boneage calibrate` for images from elsewhere."
        )


def _check_unseen(provenance: dict[str, Any] | None, dataset: str | Path, names: Sequence[str]) -> None:
    seen = dict(reversed(list(_seen(provenance or {}))))  # of two uses of the same images the first one is told
    for name in names:
        rows = load_split(dataset, name).select_columns(["id", "bone_age_months", "calibration"]).to_pandas()
        reserved = rows["calibration"]
        for part in (rows, rows[~reserved], rows[reserved]):
            use = seen.get(fingerprint(part["id"].tolist(), part["bone_age_months"].tolist()))
            if use is not None:
                raise InputError(
                    f"The split {name} holds the images that {use}, so their errors are not those of new images: "
                    "calibrate on images that had no part in this checkpoint."
                )


def _seen(provenance: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Label fingerprint and use of all images that had a part in a checkpoint or in those that it comes from."""
    interval = provenance.get("interval") or {}
    found = [
        (provenance.get("train_fingerprint"), "the weights were trained on"),
        (provenance.get("selection_fingerprint"), "the weights were chosen by"),
        (interval.get("spread_fingerprint"), "an interval was fitted to"),
        (interval.get("fingerprint"), "an interval was fitted to"),
    ]
    yield from ((labels, use) for labels, use in found if labels is not None)
    for other in (provenance.get("initial_weights"), provenance.get("teacher")):
        if isinstance(other, dict) and other.get("provenance"):
            yield from _seen(other["provenance"])
