"""How far predictions move when the same radiograph looks different: 33 settings of seven kinds, on one split.

The kinds and the tests are those of Santomartino SM et al., "Evaluating the Robustness of a Deep Learning Bone Age
Algorithm to Clinical Image Variation Using Computational Stress Testing", Radiol Artif Intell 2024;6(3):e230240 (doi
10.1148/ryai.230240); the settings are ours. Each is applied to the 8-bit grey picture before the image processor, so
polarity, contrast and size are dealt with as in the pipeline; no gate refuses anything.

| kind | settings | what is done |
|---|---|---|
| rotation | -30, -15, -5, 5, 15, 30, 90, 180, 270 deg | counter-clockwise, bilinear; same frame, corners black |
| flip | left-right, top-bottom | mirrored; left-right makes a left hand a right one |
| brightness | -40, -20, -10, 10, 20, 40 % | that share of the 256 grey levels is added, then clipped |
| contrast | x 0.25, 0.5, 0.75, 1.5, 2, 3 | distance from the picture's mean grey level times that, clipped |
| inversion | negative | black becomes white |
| marker | L upper left, R upper right, L lower left, R lower right | a white letter, a tenth of the height |
| resolution | 75, 50, 37.5, 25, 12.5 % | reduced to that share of width and height and enlarged again, bilinear |

A picture stored as a squashed copy is altered as it is stored, so a rotation also shears the hand a little.
"""

import hashlib
import io
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from tqdm.auto import tqdm

from boneage_hf import __version__
from boneage_hf.data import fingerprint, load_split, read_manifest
from boneage_hf.errors import InputError
from boneage_hf.evaluation import git_commit, predict_dataset, protocol_name
from boneage_hf.files import write_bytes, write_text
from boneage_hf.hub import checkpoint_revision, load_pipeline
from boneage_hf.memory import keep_freed_memory
from boneage_hf.metrics import match_by_id
from boneage_hf.pipeline_boneage import BoneAgePipeline

from .provenance import public_name, seal
from .statistics import ALPHA, holm, paired_bootstrap, wilcoxon

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Stands for the paper's "clinically significant error", whose definition its abstract does not give and which may
#: need a chronological age, which RSNA lacks. Two standard deviations of the skeletal age are 18 to 24 months from 8
#: to 15 years (Brush Foundation tables, Greulich & Pyle 1959: 9.0 to 11.9 months each).
SIGNIFICANT_MONTHS = 24

#: Name of the pass without a change in `predictions.csv`.
UNCHANGED = "unchanged"

#: Of the paired bootstrap.
DRAWS, SEED = 2000, 0

_PREDICTIONS, _MANIFEST = "predictions.csv", "manifest.json"

_MARKER_HEIGHT = 0.10  # of the picture's height
_MARKER_MARGIN = 0.04  # of each side
_MARKER_STROKE = 0.18  # of the letter's height
#: Strokes within a box one high and 0.62 wide: no font of the machine changes the picture.
_LETTERS: dict[str, tuple[tuple[tuple[float, float], ...], ...]] = {
    "L": (((0.0, 0.0), (0.0, 1.0), (0.6, 1.0)),),
    "R": (
        ((0.0, 1.0), (0.0, 0.0), (0.42, 0.0), (0.6, 0.14), (0.6, 0.38), (0.42, 0.52), (0.0, 0.52)),
        ((0.28, 0.52), (0.62, 1.0)),
    ),
}
_LETTER_WIDTH = 0.62


@dataclass(frozen=True)
class Setting:
    """One change of a picture.

    Attributes:
        kind: a key of `KINDS`.
        value: what the function of the kind takes.
        label: in tables and plots, unique within the kind.
    """

    kind: str
    value: Any
    label: str

    @property
    def name(self) -> str:
        """Unique among all settings, such as "rotation 15 deg"."""
        return f"{self.kind} {self.label}"

    def __call__(self, picture: Image.Image) -> Image.Image:
        """The changed picture; mode "L" in, mode "L" out, the size only where a quarter turn swaps the sides."""
        return KINDS[self.kind](picture, self.value)


def _rotate(picture: Image.Image, degrees: float) -> Image.Image:
    turns = {
        90: Image.Transpose.ROTATE_90,
        180: Image.Transpose.ROTATE_180,
        270: Image.Transpose.ROTATE_270,
    }
    if degrees in turns:
        return picture.transpose(turns[int(degrees)])
    return picture.rotate(degrees, resample=Image.Resampling.BILINEAR, fillcolor=0)


def _flip(picture: Image.Image, axis: str) -> Image.Image:
    return ImageOps.mirror(picture) if axis == "left-right" else ImageOps.flip(picture)


def _brighten(picture: Image.Image, share: float) -> Image.Image:
    return picture.point(np.clip(np.arange(256) + round(share * 256), 0, 255).tolist())


def _change_contrast(picture: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Contrast(picture).enhance(factor)


def _invert(picture: Image.Image, _: None) -> Image.Image:
    return ImageOps.invert(picture)


def _mark(picture: Image.Image, marker: tuple[str, str, str]) -> Image.Image:
    letter, down, across = marker
    width, height = picture.size
    size = _MARKER_HEIGHT * height
    left = _MARKER_MARGIN * width if across == "left" else (1 - _MARKER_MARGIN) * width - _LETTER_WIDTH * size
    top = _MARKER_MARGIN * height if down == "upper" else (1 - _MARKER_MARGIN) * height - size
    marked = picture.copy()
    draw = ImageDraw.Draw(marked)
    for stroke in _LETTERS[letter]:
        points = [(left + x * size, top + y * size) for x, y in stroke]
        draw.line(points, fill=255, width=max(1, round(_MARKER_STROKE * size)), joint="curve")
    return marked


def _reduce(picture: Image.Image, share: float) -> Image.Image:
    small = tuple(max(1, round(side * share)) for side in picture.size)
    reduced = picture.resize((small[0], small[1]), Image.Resampling.BILINEAR)
    return reduced.resize(picture.size, Image.Resampling.BILINEAR)


#: Kind -> function of a picture of mode "L" and a setting's value; the order of the tables.
KINDS: Mapping[str, Callable[[Image.Image, Any], Image.Image]] = {
    "rotation": _rotate,
    "flip": _flip,
    "brightness": _brighten,
    "contrast": _change_contrast,
    "inversion": _invert,
    "marker": _mark,
    "resolution": _reduce,
}

SETTINGS: tuple[Setting, ...] = (
    *(Setting("rotation", degrees, f"{degrees} deg") for degrees in (-30, -15, -5, 5, 15, 30, 90, 180, 270)),
    *(Setting("flip", axis, axis) for axis in ("left-right", "top-bottom")),
    *(Setting("brightness", percent / 100, f"{percent:+d} %") for percent in (-40, -20, -10, 10, 20, 40)),
    *(Setting("contrast", factor, f"x {factor:g}") for factor in (0.25, 0.5, 0.75, 1.5, 2.0, 3.0)),
    Setting("inversion", None, "negative"),
    *(
        Setting("marker", (letter, down, across), f"{letter} {down} {across}")
        for letter, down, across in (
            ("L", "upper", "left"),
            ("R", "upper", "right"),
            ("L", "lower", "left"),
            ("R", "lower", "right"),
        )
    ),
    *(Setting("resolution", percent / 100, f"{percent:g} %") for percent in (75, 50, 37.5, 25, 12.5)),
)


@dataclass(frozen=True)
class StressTest:
    """Outcome of a stress test.

    Attributes:
        table: one row per setting, the columns of `stress.csv`; see [`measure`].
        manifest: what the figures rest on.
        files: what was written.
    """

    table: pd.DataFrame
    manifest: dict[str, Any]
    files: tuple[Path, ...]

    def __str__(self) -> str:
        changed = self.table["mae_change_holm_p"] < ALPHA
        worst = self.table.iloc[int(self.table["mae_change_months"].to_numpy().argmax())]
        lines = [
            f"MAE {self.manifest['unchanged_mae_months']:.2f} months on {self.manifest['n']} unchanged images",
            f"{int(changed.sum())} of {len(self.table)} settings change the absolute errors (Wilcoxon, Holm, {ALPHA})",
            f"worst: {worst['setting']}, MAE {worst['mae_change_months']:+.2f} months "
            f"[{worst['mae_change_low_months']:+.2f}, {worst['mae_change_high_months']:+.2f}]",
        ]
        return "\n".join([*lines, *(f"wrote {path}" for path in self.files)])


def stress_checkpoint(
    checkpoint: str,
    dataset: str | Path,
    *,
    out: Path,
    split: str = "test",
    limit: int | None = None,
    batch_size: int = 32,
    settings: tuple[Setting, ...] = SETTINGS,
    progress: bool = True,
) -> StressTest:
    """Predict a split unchanged and under every setting; write `predictions.csv`, `stress.csv`, `stress.png` and
    `manifest.json` into `out`.

    After each setting the predictions so far are on disk; the same call goes on from there. `predictions.csv` has the
    columns `id, setting, predicted_months` and no label.

    Args:
        checkpoint: folder, Hub id or `"default"`.
        dataset: folder written by `boneage prepare`.
        limit: only so many images, evenly spaced in the order of the split: its first ones need not be like the rest.

    Raises:
        InputError: the data or the checkpoint cannot be used, `limit` is below 2, or `out` holds a stress test of
            something else.
    """
    if limit is not None and limit < 2:
        raise InputError(f"--limit must be 2 or more for a test of differences, not {limit}.")
    rows, prepared = load_split(dataset, split), read_manifest(dataset)
    whole, places = len(rows), evenly_spaced(len(rows), limit)
    rows = rows if len(places) == whole else rows.select(places)
    if len(rows) < 2:
        raise InputError(f"The split {split} has {len(rows)} image; a stress test needs two or more.")
    pipe = load_pipeline(checkpoint)
    keep_freed_memory()
    ids, months = list(rows["id"]), [float(value) for value in rows["bone_age_months"]]
    subject = {
        "task": "stress",
        "checkpoint": public_name(checkpoint),
        "revision": checkpoint_revision(pipe),
        "protocol": protocol_name(prepared, split, len(rows)),
        "split": split,
        "n": len(rows),
        "images": f"all {whole:,}"
        if len(rows) == whole
        else f"{len(rows):,} of {whole:,}, evenly spaced in the order of the split",
        "data_fingerprint": fingerprint(ids, months),
        "settings": [setting.name for setting in settings],
        "package_version": __version__,
    }
    begun = _begun(out, subject)
    seconds = _predict_settings(pipe, rows, settings, begun=begun, out=out, batch_size=batch_size, progress=progress)
    predictions = read_stress_predictions(out)
    references = pd.DataFrame({"id": ids, "reference_months": months})
    table = measure(predictions, references, settings=settings)
    text = table.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    manifest = {
        **subject,
        "complete": True,
        "table_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "unchanged_mae_months": float(table["unchanged_mae_months"].iloc[0]),
        "predictions_sha256": hashlib.sha256((out / _PREDICTIONS).read_bytes()).hexdigest(),
        "predictions_commit": begun["predictions_commit"],
        **seal(),
        "seconds": seconds,
    }
    write_text(out / "stress.csv", text)
    write_bytes(out / "stress.png", _png(heat_map(table, settings=settings)))
    write_text(out / _MANIFEST, json.dumps(manifest, indent=2) + "\n")
    files = tuple(out / name for name in (_PREDICTIONS, "stress.csv", "stress.png", _MANIFEST))
    return StressTest(table, manifest, files)


def evenly_spaced(n: int, limit: int | None) -> list[int]:
    """Places of `limit` of n images, from the first on and as far apart as they can be; all where there is no limit or
    a larger one."""
    if limit is None or limit >= n:
        return list(range(n))
    return [place * n // limit for place in range(limit)]


def _begun(out: Path, subject: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of an earlier call with the same subject, or a new one.

    Raises:
        InputError: the folder holds a test of something else, or cannot be written.
    """
    manifest = out / _MANIFEST
    try:
        if not manifest.is_file():
            if (out / _PREDICTIONS).exists():
                raise InputError("The folder holds predictions of something else; name another one with --out.")
            begun = {**subject, "complete": False, "predictions_commit": git_commit(), "seconds": {}}
            write_text(manifest, json.dumps(begun, indent=2) + "\n")
            return begun
        content = json.loads(manifest.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"The results cannot be written ({error.strerror}); give another --out.") from None
    except ValueError:
        content = None
    if not isinstance(content, dict) or any(content.get(key) != value for key, value in subject.items()):
        raise InputError(
            "The folder holds a stress test of another checkpoint, split or version; name another one with --out."
        )
    return content


def _predict_settings(
    pipe: BoneAgePipeline,
    rows: Any,
    settings: Sequence[Setting],
    *,
    begun: Mapping[str, Any],
    out: Path,
    batch_size: int,
    progress: bool,
) -> dict[str, float]:
    """Add the predictions that `out` lacks, setting by setting; seconds per setting.

    On a CPU as many settings run side by side as torch has threads, each with one: reading and altering pictures does
    not split over threads, so this keeps all cores busy (`predict_dataset` itself is that of every evaluation).
    """
    seconds = dict(begun["seconds"])
    ids = list(rows["id"])
    done = read_stress_predictions(out)
    parts = {name: part for name, part in done.groupby("setting", sort=False) if list(part["id"]) == ids}
    passes: list[tuple[str, Setting | None]] = [(UNCHANGED, None), *((setting.name, setting) for setting in settings)]
    missing = [(name, setting) for name, setting in passes if name not in parts]

    def predict(setting: Setting | None) -> tuple[pd.DataFrame, float]:
        start = time.perf_counter()
        table = predict_dataset(pipe, rows, batch_size=batch_size, progress=False, alter=setting)
        return table, round(time.perf_counter() - start, 1)

    workers = torch.get_num_threads() if pipe.device.type == "cpu" else 1
    with (
        tqdm(
            total=len(passes), initial=len(passes) - len(missing), desc="stress", unit="setting", disable=not progress
        ) as bar,
        _one_thread_each(workers) as pool,
    ):
        futures = [pool.submit(predict, setting) for _, setting in missing]
        try:
            for (name, _), future in zip(missing, futures, strict=True):
                table, seconds[name] = future.result()
                parts[name] = table.assign(setting=name)[["id", "setting", "predicted_months"]]
                # The rows first: seconds without rows would be of a setting that is then done again.
                ordered = pd.concat([parts[done_name] for done_name, _ in passes if done_name in parts])
                text = ordered.to_csv(index=False, float_format="%.4f", lineterminator="\n")
                write_text(out / _PREDICTIONS, text)
                write_text(
                    out / _MANIFEST, json.dumps({**begun, "complete": False, "seconds": seconds}, indent=2) + "\n"
                )
                bar.update()
        finally:
            for future in futures:
                future.cancel()
    return seconds


@contextmanager
def _one_thread_each(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool whose workers run torch on one thread each; torch's number of threads is put back at the end."""
    before = torch.get_num_threads()
    if workers > 1:
        torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def read_stress_predictions(out: Path) -> pd.DataFrame:
    """`id`, `setting`, `predicted_months` as far as they are in the folder; raises `InputError` if damaged."""
    path = out / _PREDICTIONS
    if not path.is_file():
        return pd.DataFrame({"id": [], "setting": [], "predicted_months": []})
    try:
        return pd.read_csv(path, dtype={"id": str, "setting": str, "predicted_months": float})
    except ValueError:
        raise InputError("predictions.csv in the output folder is damaged; delete it and run again.") from None


def measure(
    predictions: pd.DataFrame, references: pd.DataFrame, *, settings: Sequence[Setting] = SETTINGS
) -> pd.DataFrame:
    """What each setting does to the predictions.

    Args:
        predictions: columns `id`, `setting` (a setting's name or `UNCHANGED`), `predicted_months`.
        references: columns `id`, `reference_months`; the images that count.

    Returns:
        One row per setting: `kind`, `setting`, `n`; `unchanged_mae_months`, `mae_months`, `mae_change_months` with the
        95 % interval of the paired bootstrap over images (`_low_`, `_high_`); `mae_change_p` of the Wilcoxon
        signed-rank test on absolute errors and `mae_change_holm_p`, corrected over the settings;
        `mean_move_months` (signed) and the shares of predictions moved by more than 6 and 12 months; shares of errors
        above `SIGNIFICANT_MONTHS` before and after, with `significant_p` of McNemar's exact test and its Holm
        correction.

    Raises:
        InputError: a setting lacks predictions, or they do not pair one to one with the references.
    """
    by_setting = {str(name): part.drop(columns="setting") for name, part in predictions.groupby("setting")}
    missing = [name for name in (UNCHANGED, *(setting.name for setting in settings)) if name not in by_setting]
    if missing:
        raise InputError(f'There are no predictions for "{missing[0]}"; run the stress test again to its end.')
    reference = references["reference_months"].to_numpy(dtype=np.float64)

    def predicted(name: str) -> np.ndarray:
        return match_by_id(by_setting[name], references)["predicted_months"].to_numpy(dtype=np.float64)

    before = predicted(UNCHANGED)
    error_before = np.abs(before - reference)
    rows = []
    for setting in settings:
        after = predicted(setting.name)
        error = np.abs(after - reference)
        change = paired_bootstrap(error, error_before, draws=DRAWS, seed=SEED)
        rows.append(
            {
                "kind": setting.kind,
                "setting": setting.name,
                "n": len(reference),
                "unchanged_mae_months": error_before.mean(),
                "mae_months": error.mean(),
                "mae_change_months": change.difference_months,
                "mae_change_low_months": change.low_months,
                "mae_change_high_months": change.high_months,
                "mae_change_p": wilcoxon(error, error_before),
                "mean_move_months": (after - before).mean(),
                "moved_over_6_months": (np.abs(after - before) > 6).mean(),
                "moved_over_12_months": (np.abs(after - before) > 12).mean(),
                "unchanged_significant_errors": (error_before > SIGNIFICANT_MONTHS).mean(),
                "significant_errors": (error > SIGNIFICANT_MONTHS).mean(),
                "significant_p": mcnemar(error_before > SIGNIFICANT_MONTHS, error > SIGNIFICANT_MONTHS),
            }
        )
    table = pd.DataFrame(rows)
    for column in ("mae_change", "significant"):
        corrected = holm(table[f"{column}_p"].tolist())
        table.insert(list(table.columns).index(f"{column}_p") + 1, f"{column}_holm_p", corrected)
    return table


def mcnemar(before: np.ndarray, after: np.ndarray) -> float:
    """Two-sided p of McNemar's exact test (McNemar 1947; binomial over the pairs that differ); 1 where none does.

    Args:
        before, after: (n,) bool, paired.
    """
    from scipy.stats import binomtest

    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    return float(binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0


def heat_map(table: pd.DataFrame, *, settings: Sequence[Setting] = SETTINGS) -> "Figure":
    """Two maps of the settings, a row per kind: change of the MAE, and share of predictions moved by over 12 months.

    Numbers stand in the cells; "n.s." where the change of the absolute errors is not significant after Holm.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize, SymLogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    kinds = [kind for kind in KINDS if any(setting.kind == kind for setting in settings)]
    columns = max(sum(setting.kind == kind for setting in settings) for kind in kinds)
    figure = Figure(figsize=(1.5 + 1.25 * max(columns, 4), 1.2 + 1.3 * len(kinds)), layout="constrained")
    changes, p_values, moved = (
        dict(zip(table["setting"], table[column], strict=True))
        for column in ("mae_change_months", "mae_change_holm_p", "moved_over_12_months")
    )
    largest = max(1.0, float(table["mae_change_months"].abs().max()))
    # Most changes are small and a few are huge; the middle colour is no change.
    panels = (
        (changes, "change of the MAE (months)", "PuOr_r", SymLogNorm(1.0, vmin=-largest, vmax=largest)),
        (moved, "share of predictions moved by more than 12 months", "Blues", Normalize(0, 1)),
    )
    for axis, (values, title, colours, norm) in zip(figure.subplots(2, 1), panels, strict=True):
        for row, kind in enumerate(kinds):
            for place, setting in enumerate(setting for setting in settings if setting.kind == kind):
                value = float(values[setting.name])
                colour = colormaps[colours](norm(value))
                axis.add_patch(Rectangle((place, row), 1, 1, facecolor=colour, edgecolor="white", linewidth=1.5))
                text = f"{value:+.2f}" if values is changes else f"{100 * value:.1f} %"
                text += " n.s." if values is changes and p_values[setting.name] >= ALPHA else ""
                ink = "white" if luminance(colour) < DARK else "black"
                axis.text(place + 0.5, row + 0.36, setting.label, ha="center", va="center", fontsize=7, color=ink)
                axis.text(
                    place + 0.5, row + 0.68, text, ha="center", va="center", fontsize=8, color=ink, weight="bold"
                )
        axis.set(xlim=(0, columns), ylim=(len(kinds), 0), xticks=[], title=title)
        axis.set_yticks(np.arange(len(kinds)) + 0.5, kinds)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        figure.colorbar(ScalarMappable(norm, colours), ax=axis, fraction=0.02, pad=0.01, format="%g")
    return figure


#: Relative luminance at which black and white text have the same contrast: (L + 0.05)^2 = 1.05 * 0.05 (WCAG 2).
DARK = 0.179


def luminance(colour: tuple[float, ...]) -> float:
    """Relative luminance of an sRGB colour (ITU-R BT.709 weights), 0 black to 1 white."""
    linear = np.asarray(colour[:3]) ** 2.2
    return float(linear @ [0.2126, 0.7152, 0.0722])


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
