"""What each choice of the recipe is worth: arms that differ from a base arm in one choice, trained for about as long.

The base arm is EfficientNet-Lite0 from ImageNet weights, 128 px, with sex, attention, strong augmentation and natural
sampling. Every arm trains on the training split and is measured on the selection half of validation; nothing here
reads the test split or the calibration half.

The budget of about 20 minutes an arm is a fixed number of epochs that is written in the table, beside the minutes it
took. A number derived from a speed measured at the start would change with whatever else the machine does, and with it
the weights: a fixed one gives the same arm again. `EPOCHS` is the whole number nearest to 20 minutes at about 70, 26
and 14 images/s at 128, 224 and 299 px (EfficientNet-Lite0, bf16, two quiet cores) with the 9,458 images of the
reference split: 20, 18 and 23 minutes.

Intervals are over images. What another seed changes is in none of them: an arm that differs from the base arm by less
than 0.3 month with one seed gets a second one, and so does the base arm. The best epoch is chosen on the very images
that the arm is measured on, as in every training here, which flatters an arm of many epochs unless its last epoch is
the best one (`best_epoch` in the table).
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm.auto import tqdm

from boneage_hf import __version__
from boneage_hf.data import fingerprint, load_split, read_manifest
from boneage_hf.errors import InputError
from boneage_hf.evaluation import predict_dataset, predictions_csv, protocol_name
from boneage_hf.files import write_text
from boneage_hf.metrics import error_metrics, match_by_id
from boneage_hf.recipes import Recipe, recipe_from_dict

from .findings import Study
from .provenance import seal
from .results_folder import read_predictions
from .statistics import PairedDifference, paired_bootstrap

#: Image size, px -> epochs of about 20 minutes, see the top of this file.
EPOCHS = {128: 9, 224: 3, 299: 2}

#: Arms that differ from the base arm by less get a second seed, months.
CLOSE_MONTHS = 0.3

SEEDS = (0, 1)

#: Split that arms are measured on: half of validation.
SPLIT = "selection"

TABLE = "ablations.csv"

#: Written into a run folder when its arm is trained and predicted.
FINISHED = "finished.json"

_BASE = Recipe(image_size=128, epochs=EPOCHS[128])


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One training of the table.

    Attributes:
        name: of its files and rows.
        question: what it answers; the two arms of one question share it.
        change: begins its verdict, such as "plain average pooling instead of attention".
        recipe: whole, without the seed.
        random_start: from random weights instead of the given ones.
    """

    name: str
    question: str
    change: str
    recipe: Recipe
    random_start: bool = False


#: The base arm first.
ARMS: tuple[Arm, ...] = (
    Arm(name="base", question="base arm", change="nothing", recipe=_BASE),
    Arm(
        name="average-pooling",
        question="attention against plain average pooling",
        change="plain average pooling instead of attention",
        recipe=dataclasses.replace(_BASE, pooling="average"),
    ),
    Arm(
        name="no-sex",
        question="with and without sex",
        change="leaving out the sex",
        recipe=dataclasses.replace(_BASE, sex_input="none"),
    ),
    Arm(
        name="224px",
        question="128, 224 or 299 px",
        change="224 px instead of 128 and fewer epochs in about the same time",
        recipe=dataclasses.replace(_BASE, image_size=224, epochs=EPOCHS[224]),
    ),
    Arm(
        name="299px",
        question="128, 224 or 299 px",
        change="299 px instead of 128 and fewer epochs in about the same time",
        recipe=dataclasses.replace(_BASE, image_size=299, epochs=EPOCHS[299]),
    ),
    Arm(
        name="reference-augmentation",
        question="reference augmentation against the stronger one",
        change="the reference's augmentation instead of the stronger one",
        recipe=dataclasses.replace(_BASE, augmentation="reference"),
    ),
    # All 20 groups of sex and age band occur in the reference split: 473 of each are as many images per epoch as
    # natural sampling sees (9,460 and 9,458).
    Arm(
        name="balanced-sampling",
        question="balanced against natural sampling",
        change="balanced instead of natural sampling",
        recipe=dataclasses.replace(_BASE, sampling="balanced", per_category=473),
    ),
    Arm(
        name="random-start",
        question="random against ImageNet start",
        change="a start from random instead of ImageNet weights",
        recipe=_BASE,
        random_start=True,
    ),
)

Key = tuple[str, int]  # name of the arm, seed
_Pairs = Mapping[Key, tuple[NDArray[np.float64], NDArray[np.float64]]]  # predicted and reference months of a run


@dataclass(frozen=True)
class Ablations:
    """Outcome: the rows of `ablations.csv` (see [`table_of`]), the manifest, and what was written."""

    table: pd.DataFrame
    manifest: dict[str, Any]
    files: tuple[Path, ...]

    def __str__(self) -> str:
        rows: Any = self.table.itertuples()
        lines = [
            f"{run_name((row.arm, row.seed))}: MAE {row.mae_months:.2f} months [{row.mae_low_months:.2f}, "
            f"{row.mae_high_months:.2f}], {row.epochs} epochs in {row.minutes:.1f} minutes"
            for row in rows
        ]
        lines += [f"{_capital(question)}: {said}" for question, said in self.manifest["verdicts"].items()]
        return "\n".join([*lines, *(f"wrote {path}" for path in self.files)])


def run_name(key: Key) -> str:
    return f"{key[0]}-seed{key[1]}"


def predictions_name(key: Key) -> str:
    """File of a run's predictions in the result folder."""
    return f"predictions-{run_name(key)}.csv"


def changes(arm: Arm, base: Arm) -> str:
    """Fields in which an arm differs from the base arm, such as "image_size=224 epochs=3"; "nothing" for that one."""
    own, others = arm.recipe.to_dict(), base.recipe.to_dict()
    fields = [f"{name}={value}" for name, value in own.items() if value != others[name]]
    return " ".join([*fields, *(["initial_weights=random"] if arm.random_start else [])]) or "nothing"


def ablate(
    dataset: str | Path,
    *,
    initial_weights: str,
    out: Path,
    names: Sequence[str] | None = None,
    seeds: int | None = None,
    mixed_precision: str = "bf16",
    arms: Sequence[Arm] = ARMS,
    progress: bool = True,
) -> Ablations:
    """Train what is not trained yet, measure it, and write `ablations.csv`, a `predictions-ARM-seedN.csv` per run and
    `manifest.json` into `out`.

    Run folders lie below `BONEAGE_RUNS`, named by arm, seed and a hash of recipe, data, initial weights, precision and
    version of the package. So the same call goes on where an earlier one was interrupted, within an epoch too; a
    finished run is not trained again, and what was trained of other data is not taken for it. The folder is written
    after each run, and is enough to go on from: on another machine the runs that it tells of are taken over.

    Args:
        dataset: folder written by `boneage prepare`, or Hub id.
        initial_weights: .safetensors file of ImageNet weights, from which all arms but the random one start.
        names: of the arms to train, the base arm always among them; default: all. Finished runs of other arms are in
            the table too.
        seeds: 1 or 2 for every arm. None: one, and a second one for the arms that differ from the base arm by less
            than `CLOSE_MONTHS`, and for that arm.
        mixed_precision: "no" or "bf16".
        arms: the base arm first.

    Raises:
        InputError: an unknown arm, weights or data that cannot be used, a result folder of something else, or a
            training that failed (its arm is named).
    """
    asked = _asked(arms, names)
    runs = _Trainings(dataset, Path(initial_weights), mixed_precision=mixed_precision, arms=arms, progress=progress)
    runs.check_out(out)
    base, *others = asked
    first, second = SEEDS
    for arm in asked:
        if runs.run(arm, first):
            runs.write(out, complete=False)
    if seeds is None:
        pairs = paired_with(runs.predictions, runs.references)
        gaps = {arm.name: difference(pairs, arm.name, base.name, first).difference_months for arm in others}
        close = [arm for arm in others if abs(gaps[arm.name]) < CLOSE_MONTHS]
        again = [base, *close] if close else []
    else:
        again = asked if seeds > 1 else []
    for arm in again:
        if runs.run(arm, second):
            runs.write(out, complete=False)
    return runs.write(out, complete=True)


def _asked(arms: Sequence[Arm], names: Sequence[str] | None) -> list[Arm]:
    known = [arm.name for arm in arms]
    for name in names or ():
        if name not in known:
            raise InputError(f"There is no arm {name!r}; the arms are {', '.join(known)}.")
    return [arm for arm in arms if names is None or arm.name in names or arm is arms[0]]


class _Trainings:
    """The data and settings that all runs of a call share, and what the finished runs found."""

    def __init__(
        self,
        dataset: str | Path,
        initial_weights: Path,
        *,
        mixed_precision: str,
        arms: Sequence[Arm],
        progress: bool,
    ) -> None:
        if not initial_weights.is_file() or initial_weights.suffix != ".safetensors":
            raise InputError(
                "--initial-weights takes a .safetensors file of ImageNet weights: make one with boneage convert-lite0."
            )
        with initial_weights.open("rb") as file:
            weights_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self.dataset, self.initial_weights, self.mixed_precision = dataset, initial_weights, mixed_precision
        self.arms, self.progress = arms, progress
        self.rows = load_split(dataset, SPLIT)
        if len(self.rows) < 2:
            raise InputError(
                f"The selection half of validation has {len(self.rows)} image; intervals need two or more."
            )
        train, prepared = load_split(dataset, "train"), read_manifest(dataset)
        months = [float(value) for value in self.rows["bone_age_months"]]
        ids = [str(row_id) for row_id in self.rows["id"]]
        self.references = pd.DataFrame({"id": ids, "reference_months": months})
        self.subject: dict[str, Any] = {
            "task": "ablations",
            "protocol": protocol_name(prepared, SPLIT, len(ids)),
            "split": SPLIT,
            "n": len(ids),
            "data": {"kind": prepared["kind"], **prepared["settings"]},
            "data_fingerprint": fingerprint(ids, months),
            "train_n": len(train),
            "train_fingerprint": fingerprint(train["id"], [float(value) for value in train["bone_age_months"]]),
            "initial_weights_sha256": weights_sha256,
            "mixed_precision": mixed_precision,
            "package_version": __version__,
        }
        self.runs: dict[Key, dict[str, Any]] = {}
        self.predictions: dict[Key, pd.DataFrame] = {}
        for arm in arms:
            for seed in SEEDS:
                if (self.folder(arm, seed) / FINISHED).is_file():
                    self._read(arm, seed)

    def folder(self, arm: Arm, seed: int) -> Path:
        from boneage_hf.training import runs_folder

        made_of = [self.subject, arm.random_start, dataclasses.replace(arm.recipe, seed=seed).to_dict()]
        digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
        return runs_folder() / "ablations" / f"{run_name((arm.name, seed))}-{digest[:12]}"

    def check_out(self, out: Path) -> None:
        """Raises `InputError` if the result folder is about something else."""
        path = out / "manifest.json"
        if not path.is_file():
            if out.is_dir() and any(out.iterdir()):
                raise InputError("--out holds files that are no ablations; name another folder.")
            return
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            content = None
        if not isinstance(content, dict) or any(content.get(key) != value for key, value in self.subject.items()):
            raise InputError(
                "--out holds results of other data, initial weights, precision or version; name another folder."
            )
        self._take_over(out, content)

    def _take_over(self, out: Path, manifest: dict[str, Any]) -> None:
        """Runs that another machine finished are known by the result folder alone: theirs need no run folder here."""
        for arm in self.arms:
            if manifest.get("arms", {}).get(arm.name) != json.loads(json.dumps(dataclasses.asdict(arm))):
                continue
            for seed in SEEDS:
                key = arm.name, seed
                known = manifest.get("runs", {}).get(run_name(key))
                path = out / predictions_name(key)
                if key in self.runs or known is None:
                    continue
                if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != known.get(
                    "predictions_sha256"
                ):
                    raise InputError(f"--out: {path.name} is not what {run_name(key)} wrote; name another folder.")
                self.runs[key], self.predictions[key] = known, read_predictions(path, "--out")

    def run(self, arm: Arm, seed: int) -> bool:
        """Train and predict, or go on with it; False if the run is finished already.

        Raises:
            InputError: as of [`boneage_hf.training.train`], with the arm's name.
        """
        if (arm.name, seed) in self.runs:
            return False
        # Here and not above: a report that only prints the table needs none of it.
        from boneage_hf.hub import load_pipeline
        from boneage_hf.training import METRICS_FILE, RUN_FILE, train

        if self.progress:
            tqdm.write(f"{run_name((arm.name, seed))}: {changes(arm, self.arms[0])}")
        folder = self.folder(arm, seed)
        begun = (folder / RUN_FILE).is_file()
        weights = "random" if arm.random_start else str(self.initial_weights)
        try:
            result = train(
                self.dataset,
                folder,
                dataclasses.replace(arm.recipe, seed=seed),
                initial_weights=None if begun else weights,
                resume=begun,
                mixed_precision=self.mixed_precision,
                progress_bar=self.progress,
            )
        except InputError as error:
            raise InputError(f"Arm {run_name((arm.name, seed))}: {error}") from None
        pipe = load_pipeline(result.checkpoint)
        table = predict_dataset(pipe, self.rows, flip_average=False, progress=self.progress)
        epochs = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
        text = predictions_csv(table)
        finished = {
            "best_epoch": result.epoch,
            "images": round(sum(row["images_per_second"] * row["seconds"] for row in epochs)),
            "seconds": sum(row["seconds"] for row in epochs),
            "initial_weights": (pipe.model.config.provenance or {}).get("initial_weights"),
            "predictions_sha256": hashlib.sha256(text.encode()).hexdigest(),
            **seal(),
        }
        write_text(folder / "predictions.csv", text)
        write_text(folder / FINISHED, json.dumps(finished, indent=2) + "\n")
        self._read(arm, seed)
        return True

    def _read(self, arm: Arm, seed: int) -> None:
        key, folder = (arm.name, seed), self.folder(arm, seed)
        try:
            self.runs[key] = json.loads((folder / FINISHED).read_text(encoding="utf-8"))
        except ValueError:
            raise InputError(f"Run {folder.name}: {FINISHED} cannot be read as JSON; delete that file.") from None
        self.predictions[key] = read_predictions(folder / "predictions.csv", f"run {folder.name}")

    def write(self, out: Path, *, complete: bool) -> Ablations:
        table = table_of(self.arms, self.runs, self.predictions, self.references)
        shown = [(str(arm), int(seed)) for arm, seed in zip(table["arm"], table["seed"], strict=True)]
        text = table.to_csv(index=False, float_format="%.6g", lineterminator="\n")
        manifest = {
            **self.subject,
            "complete": complete,
            "arms": {arm.name: dataclasses.asdict(arm) for arm in self.arms},
            "runs": {run_name(key): self.runs[key] for key in shown},
            "verdicts": _verdicts(self.arms[1:], table),
            "table_sha256": hashlib.sha256(text.encode()).hexdigest(),
            **seal(),
        }
        content = {predictions_name(key): predictions_csv(self.predictions[key]) for key in shown}
        content |= {TABLE: text, "manifest.json": json.dumps(manifest, indent=2) + "\n"}
        try:
            for name, written in content.items():
                write_text(out / name, written)
        except OSError as error:
            raise InputError(f"The results cannot be written ({error.strerror}); give another --out.") from None
        return Ablations(table, manifest, tuple(out / name for name in content))


def _verdicts(arms: Sequence[Arm], table: pd.DataFrame) -> dict[str, str]:
    """Question -> the verdict on each of its arms."""
    measured = dict(zip(table["arm"], table["verdict"], strict=True))
    found: dict[str, list[str]] = {}
    for arm in arms:
        found.setdefault(arm.question, []).append(measured.get(arm.name, f"{arm.name} not measured yet."))
    return {question: " ".join(sentences) for question, sentences in found.items()}


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


# --- figures --------------------------------------------------------------------------------------------------------


def paired_with(predictions: Mapping[Key, pd.DataFrame], references: pd.DataFrame) -> _Pairs:
    """Run -> predicted and reference months, (n,) each, in the order of `references`.

    Raises:
        InputError: the predictions of a run do not pair one to one with the references.
    """
    found: dict[Key, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
    for key, table in predictions.items():
        try:
            matched = match_by_id(table, references)
        except InputError as error:
            raise InputError(f"{predictions_name(key)}: {error}") from None
        predicted, reference = matched["predicted_months"], matched["reference_months"]
        found[key] = predicted.to_numpy(np.float64), reference.to_numpy(np.float64)
    return found


def difference(pairs: _Pairs, arm: str, base: str, *seeds: int) -> PairedDifference:
    """MAE of an arm - MAE of the base arm, each image's error averaged over the seeds, by paired bootstrap."""

    def sizes(name: str) -> NDArray[np.float64]:
        errors = [np.abs(predicted - reference) for predicted, reference in (pairs[name, seed] for seed in seeds)]
        return np.asarray(np.mean(errors, axis=0), dtype=np.float64)

    return paired_bootstrap(sizes(arm), sizes(base))


def table_of(
    arms: Sequence[Arm],
    runs: Mapping[Key, Mapping[str, Any]],
    predictions: Mapping[Key, pd.DataFrame],
    references: pd.DataFrame,
) -> pd.DataFrame:
    """A row per finished run, in the order of the arms.

    Args:
        arms: the base arm first.
        runs: what `finished.json` holds of each run.
        predictions: `id`, `predicted_months` of each run.
        references: `id`, `reference_months`.

    Returns:
        Columns `question`, `arm`, `changes` (see [`changes`]), `seed`, `epochs`, `best_epoch` (from 1), `image_size`
        (px), `minutes` (of training steps, without validation), `core_hours` (those minutes times torch's threads),
        `images_per_second`, `n`; `mae_months`, `difference_months` (to the base arm with the same seed), each with
        `_low_` and `_high_` for the ends of its 95 % bootstrap interval over images; `verdict` (over all seeds that
        the arm and the base arm have).
    """
    base = arms[0]
    pairs = paired_with(predictions, references)
    rows = []
    for arm in arms:
        seeds = [seed for seed in SEEDS if (arm.name, seed) in runs and (base.name, seed) in runs]
        said = verdict(arm, base, pairs, seeds)
        for seed in seeds:
            run, (predicted, reference) = runs[arm.name, seed], pairs[arm.name, seed]
            measures = error_metrics(predicted, reference)
            low, high = measures["mae_months_ci95"]
            found = difference(pairs, arm.name, base.name, seed)
            minutes = run["seconds"] / 60
            rows.append(
                {
                    "question": arm.question,
                    "arm": arm.name,
                    "changes": changes(arm, base),
                    "seed": seed,
                    "epochs": arm.recipe.epochs,
                    "best_epoch": run["best_epoch"],
                    "image_size": arm.recipe.image_size,
                    "minutes": minutes,
                    "core_hours": minutes / 60 * run["hardware"]["torch_threads"],
                    "images_per_second": run["images"] / run["seconds"],
                    "n": len(reference),
                    "mae_months": measures["mae_months"],
                    "mae_low_months": low,
                    "mae_high_months": high,
                    "difference_months": found.difference_months,
                    "difference_low_months": found.low_months,
                    "difference_high_months": found.high_months,
                    "verdict": said,
                }
            )
    return pd.DataFrame(rows)


def verdict(arm: Arm, base: Arm, pairs: _Pairs, seeds: Sequence[int]) -> str:
    """One sentence. An arm is told apart where the interval leaves out 0 and all seeds point the same way."""
    if arm is base or not seeds:
        return "The others are held against it."
    found = difference(pairs, arm.name, base.name, *seeds)
    signs = {math.copysign(1, difference(pairs, arm.name, base.name, seed).difference_months) for seed in seeds}
    change = _capital(arm.change)
    number = "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
    interval = f"95 % {found.low_months:+.2f} to {found.high_months:+.2f}, {number}, n = {found.n:,}"
    if len(signs) > 1:
        return f"{change}: not told apart, {found.difference_months:+.2f} months ({interval}); the seeds disagree."
    if found.low_months <= 0 <= found.high_months:
        return f"{change}: not told apart, {found.difference_months:+.2f} months ({interval})."
    moved = "raises" if found.difference_months > 0 else "lowers"
    return f"{change} {moved} the MAE by {abs(found.difference_months):.2f} months ({interval})."


# --- check ----------------------------------------------------------------------------------------------------------


def read_ablations(folder: Path, manifest: Mapping[str, Any]) -> dict[Key, pd.DataFrame]:
    """Predictions of a result folder's runs.

    Raises:
        InputError: they are not those that the manifest is about.
    """
    where = f"result folder {folder.name}"
    found: dict[Key, pd.DataFrame] = {}
    for name, run in manifest["runs"].items():
        arm, _, seed = name.rpartition("-seed")
        path = folder / predictions_name((arm, int(seed)))
        table = read_predictions(path, where)
        if hashlib.sha256(path.read_bytes()).hexdigest() != run["predictions_sha256"]:
            raise InputError(f"{where}: {path.name} is not the one that manifest.json is about; run again.")
        if len(table) != manifest["n"]:
            raise InputError(f"{where}: {path.name} has {len(table)} rows instead of {manifest['n']}; run again.")
        found[arm, int(seed)] = table
    return found


def check_ablations(folder: Path, manifest: Mapping[str, Any], table: pd.DataFrame) -> None:
    """Raises `InputError` if table, predictions and manifest are of different runs, or an interval cannot be."""
    where = f"result folder {folder.name}"
    read_ablations(folder, manifest)
    rows = [run_name((row["arm"], row["seed"])) for row in table.to_dict(orient="records")]
    if rows != list(manifest["runs"]):
        raise InputError(f"{where}: {TABLE} and manifest.json are of different runs; run again.")
    ends = table[["mae_low_months", "mae_months", "mae_high_months"]].to_numpy(np.float64)
    if not (np.diff(ends, axis=1) >= -1e-6).all():
        raise InputError(f"{where}: {TABLE} has an MAE outside of its interval; run again.")


def recompute_ablations(folder: Path, study: Study, data: str | Path) -> None:
    """Measure the arms again from their predictions and the user's labels.

    Raises:
        InputError: the labels are not those that they were measured on, or a figure or verdict differs.
    """
    where, manifest, table = f"result folder {folder.name}", study.manifest, study.table
    rows = load_split(data, str(manifest["split"])).select_columns(["id", "bone_age_months"])
    ids, months = [str(row_id) for row_id in rows["id"]], [float(value) for value in rows["bone_age_months"]]
    if fingerprint(ids, months) != manifest["data_fingerprint"]:
        raise InputError(
            f"{where}: it is about other images or labels than this data set's; name the one it was run on."
        )
    arms = [
        Arm(
            name=arm["name"],
            question=arm["question"],
            change=arm["change"],
            recipe=recipe_from_dict(arm["recipe"]),
            random_start=arm["random_start"],
        )
        for arm in manifest["arms"].values()
    ]
    predictions = read_ablations(folder, manifest)
    runs = {key: manifest["runs"][run_name(key)] for key in predictions}
    again = table_of(arms, runs, predictions, pd.DataFrame({"id": ids, "reference_months": months}))
    for column in again.columns:
        for old, new in zip(table[column], again[column], strict=True):
            same = old == new if isinstance(new, str) else math.isclose(old, new, rel_tol=1e-4, abs_tol=1e-4)
            if not same:
                raise InputError(f"{where}: {column} is {old} in {TABLE} and {new} from its predictions; run again.")
