"""How often the quality gate refuses hands, and how often it lets through what is no hand; counted, with exact bounds.

Hands are the images of a split, each answered as a file would be, and again turned by a quarter or half, mirrored and
cut off. Non-hands are the counted pictures of `benchmarks.non_hands`; the gate is fitted to none of them, but the
share of hands that it may refuse was raised from 0.1 to 0.3 % after a first count of these same pictures, so they are
no untouched test of it. The 11 photographs are counted in grey and in colour, and as originals of both kinds. Two
hands side by side and close-ups, made from the split itself, stand apart, because the gate is not fitted to tell them.
Intervals are those of Clopper and Pearson (Biometrika 1934;26(4):404-413) for independent images, which views of one
original are not.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from scipy.stats import binomtest
from tqdm.auto import tqdm

from boneage_hf.data import fingerprint, load_split
from boneage_hf.errors import InputError
from boneage_hf.files import write_text
from boneage_hf.fitted_gate import changed
from boneage_hf.hub import checkpoint_revision, load_pipeline
from boneage_hf.memory import keep_freed_memory
from boneage_hf.pipeline_boneage import BoneAgePipeline
from boneage_hf.prepared import without_decoding
from boneage_hf.quality import Quality, RefusedError
from boneage_hf.radiograph import read
from boneage_hf.sex import SEXES

from .non_hands import kinds
from .provenance import check_out, public_name, seal

#: Seed of the changes of hands.
SEED = 1

#: Aims: at most this share of hands refused, at least this share of non-hands.
HANDS_REFUSED, NON_HANDS_REFUSED = 0.01, 0.99

HANDS, ALL_NON_HANDS = "hands", "all non-hands"

COLUMNS = (
    *("kind", "n", "originals", "refused", "refused_share", "refused_low", "refused_high"),
    *("warned", "warned_low", "warned_high", "right_pose", "right_pose_low", "right_pose_high"),
)


@dataclass(frozen=True)
class GateTest:
    """Outcome: `table` has the COLUMNS, a row per kind."""

    table: pd.DataFrame
    manifest: dict[str, Any]
    files: tuple[Path, ...]

    def __str__(self) -> str:
        lines = []
        rows: Any = self.table.itertuples()
        for row in rows:
            line = f"{row.kind}: {row.refused} of {row.n} refused, 95 % [{_percent(row.refused_low)}, "
            line += f"{_percent(row.refused_high)}]; {row.warned} more warned of"
            if not pd.isna(row.right_pose):
                line += f"; pose right {int(row.right_pose)} of {row.n}"
            lines.append(line)
        return "\n".join([*lines, *self.manifest["verdicts"], *(f"wrote {path}" for path in self.files)])


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def exact_interval(k: int, n: int) -> tuple[float, float]:
    """95 % interval of Clopper and Pearson for k of n; (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    interval = binomtest(k, n).proportion_ci(0.95, method="exact")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class _Outcome:
    """Of one image: what the gate said, and whether the pose is the one that was given to it (None: not asked)."""

    quality: Quality
    right_pose: bool | None = None


_FILES = ("gate.csv", "gate.json", "manifest.json")


def gate_of_checkpoint(
    checkpoint: str, dataset: str | Path, *, out: Path, split: str = "test", changed_images: int = 256
) -> GateTest:
    """Measure a checkpoint's gate; write `gate.csv`, `gate.json` and `manifest.json` into the folder `out`.

    Args:
        checkpoint: folder, Hub id or `"default"`, with a gate.
        dataset: folder written by `boneage prepare`.
        split: whose images are the hands.
        changed_images: of the first so many images of the split each change is counted; all are counted upright.

    Raises:
        InputError: the checkpoint has no gate, the extra benchmark is missing, an image cannot be read, the results
            cannot be written, or `out` holds something else.
    """
    check_out(out, _FILES, task="gate")
    pipe = load_pipeline(checkpoint)
    if pipe.model.gate is None:
        raise InputError("This checkpoint has no quality gate: make one with boneage fit-gate.")
    if pipe.model.device.type == "cpu":
        keep_freed_memory()
    revision = checkpoint_revision(pipe)
    check_out(out, _FILES, task="gate", revision=revision, split=split)
    rows = without_decoding(load_split(dataset, split))
    outcomes: dict[str, tuple[list[_Outcome], int]] = {}
    for name, pictures, originals in _cases(rows, min(changed_images, len(rows))):
        found = []
        for picture, sex, pose in tqdm(pictures, desc=name, unit="image"):
            found.append(_answered(pipe, picture, sex, pose))
        outcomes[name] = found, len(found) if originals is None else originals
    whole = [outcome for kind in kinds() for outcome in outcomes[kind.name][0]]
    outcomes[ALL_NON_HANDS] = whole, sum(outcomes[kind.name][1] for kind in kinds())
    table = pd.DataFrame([_row(name, *found) for name, found in outcomes.items()], columns=list(COLUMNS))
    text = table.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    manifest = {
        "task": "gate",
        "table_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "checkpoint": public_name(checkpoint),
        "revision": revision,
        "gate": pipe.model.config.gate,
        "gate_provenance": (pipe.model.config.provenance or {}).get("gate"),
        "split": split,
        "n": len(rows),
        "data_fingerprint": fingerprint(rows["id"], rows["bone_age_months"]),
        "changed_images": min(changed_images, len(rows)),
        "non_hands": {kind.name: kind.note for kind in kinds()},
        "checks": {name: _reasons(found) for name, (found, _) in outcomes.items()},
        "verdicts": _verdicts(outcomes),
        **seal(),
    }
    records = table.astype(object).where(table.notna(), None).to_dict(orient="records")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "gate.csv", text)
        write_text(out / "gate.json", json.dumps(records, indent=2) + "\n")
        write_text(out / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"The results cannot be written ({error.strerror}); give another --out.") from None
    return GateTest(table, manifest, tuple(out / name for name in _FILES))


_Pictures = Iterator[tuple[Any, str, int | None]]


def _cases(rows: Any, count: int) -> Iterator[tuple[str, _Pictures, int | None]]:
    """Name, pictures (with sex, and the pose to be found or None) and number of originals (None: each its own)."""
    yield HANDS, ((row["image"]["bytes"], SEXES[row["sex"]], 0) for row in rows), None
    for name, of in (
        ("hands turned by a quarter or half", (1, 2, 3)),
        ("hands mirrored", (4,)),
        ("hands cut off", (8, 9, 10)),
    ):
        yield name, _changed_hands(rows, count, of), None
    pairs = count // 2
    yield (
        "two hands",
        _altered(rows, range(pairs), lambda image, index: _beside(image, _grey(rows, pairs + index))),
        None,
    )
    yield "close-up of a hand", _altered(rows, range(pairs), _close_up), None
    for kind in kinds():
        yield kind.name, ((picture, "female", None) for picture in kind.pictures("counted")), kind.originals["counted"]


def _grey(rows: Any, index: int) -> Image.Image:
    return read(rows[index]["image"]["bytes"]).image


def _altered(rows: Any, indices: range, alter: Callable[[Image.Image, int], Image.Image]) -> _Pictures:
    for index in indices:
        yield alter(_grey(rows, index), index), SEXES[rows[index]["sex"]], None


def _changed_hands(rows: Any, count: int, of: tuple[int, ...]) -> _Pictures:
    for index in range(count):
        change = of[index % len(of)]
        grey = np.asarray(_grey(rows, index))
        if change >= 8:  # the cut is made on a square, as in the fit
            side = min(grey.shape)
            grey = np.asarray(Image.fromarray(grey).resize((side, side), Image.Resampling.BILINEAR))
        picture = Image.fromarray(changed(grey, change, np.random.default_rng([SEED, index])))
        yield picture, SEXES[rows[index]["sex"]], change if change < 8 else None


def _beside(left: Image.Image, right: Image.Image) -> Image.Image:
    height = min(left.height, right.height)
    both = Image.new("L", (left.width + right.width, height))
    both.paste(left.resize((left.width, height)).transpose(Image.Transpose.FLIP_LEFT_RIGHT), (0, 0))
    both.paste(right.resize((right.width, height)), (left.width, 0))
    return both


def _close_up(image: Image.Image, index: int) -> Image.Image:
    rng = np.random.default_rng([SEED, index])
    share = rng.uniform(0.25, 0.4)
    width, height = (max(64, round(side * share)) for side in image.size)
    left, top = int(rng.uniform(0.2, 0.5) * image.width), int(rng.uniform(0.15, 0.5) * image.height)
    return image.crop((left, top, left + width, top + height))


def _answered(pipe: BoneAgePipeline, picture: Any, sex: str, pose: int | None) -> _Outcome:
    try:
        quality = pipe(picture, sex=sex)["quality"]
    except RefusedError as error:
        quality = error.quality
    if pose is None:
        return _Outcome(quality)
    found = quality.rotation_degrees // 90 + 4 * quality.mirrored
    return _Outcome(quality, right_pose=found == pose)


def _row(name: str, found: list[_Outcome], originals: int) -> dict[str, Any]:
    n = len(found)
    refused = sum(outcome.quality.verdict == "refuse" for outcome in found)
    warned = sum(outcome.quality.verdict == "warn" for outcome in found)
    asked = [outcome.right_pose for outcome in found if outcome.right_pose is not None]
    row: dict[str, Any] = {"kind": name, "n": n, "originals": originals, "refused": refused, "warned": warned}
    row["refused_share"] = refused / n if n else None
    row["refused_low"], row["refused_high"] = exact_interval(refused, n)
    row["warned_low"], row["warned_high"] = exact_interval(warned, n)
    row["right_pose"] = sum(asked) if asked else None
    row["right_pose_low"], row["right_pose_high"] = exact_interval(sum(asked), n) if asked else (None, None)
    return row


def _reasons(found: list[_Outcome]) -> dict[str, dict[str, int]]:
    """How often each check refused and warned; several may of one image."""
    counts: dict[str, Counter[str]] = {"refuse": Counter(), "warn": Counter()}
    for outcome in found:
        for check in outcome.quality.checks:
            if check.verdict != "pass":
                counts[check.verdict][check.name] += 1
    return {verdict: dict(counter.most_common()) for verdict, counter in counts.items()}


def _verdicts(outcomes: dict[str, tuple[list[_Outcome], int]]) -> list[str]:
    lines = []
    for name, aim, wanted in ((HANDS, HANDS_REFUSED, "at most"), (ALL_NON_HANDS, NON_HANDS_REFUSED, "at least")):
        found = [outcome.quality.verdict == "refuse" for outcome in outcomes[name][0]]
        share = sum(found) / len(found)
        met = share <= aim if wanted == "at most" else share >= aim
        lines.append(f"{name}: {_percent(share)} refused, aim {wanted} {_percent(aim)}: {'met' if met else 'not met'}")
    return lines
