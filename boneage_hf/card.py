"""The model card of a checkpoint, filled from its config and from the metrics.json of an evaluation."""

import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .configuration_boneage import BoneAgeConfig
from .errors import InputError
from .hub import checkpoint_revision, load_pipeline, trained_on_rsna
from .interval_boneage import INTERVAL_ALPHA
from .metrics import CLAIM_OVER_AGE, MISSING, bands_clearly_worse, format_claim, rare_ages
from .recipes import plan_that_repeats
from .summary import layer_table

TEMPLATE = Path(__file__).resolve().parent / "model_card_template.md"

BACKBONES = {"vgg19": "VGG19", "vgg19_bn": "VGG19 with BatchNorm", "efficientnet_lite0": "EfficientNet-Lite0"}
_MEASURES = {
    "mae_months": "mean absolute error (months)",
    "rmse_months": "root mean squared error (months)",
    "median_absolute_error_months": "median absolute error (months)",
    "bias_months": "bias, predicted minus reference (months)",
    "r2": "R2",
    "within_6_months": "share within 6 months",
    "within_12_months": "share within 12 months",
    "within_24_months": "share within 24 months",
}


def render_card(checkpoint: str, *, name: str, metrics_file: Path | None, stress_folder: Path | None = None) -> str:
    """The text of the card.

    Args:
        checkpoint: folder, Hub id or `"default"`.
        name: what a user types to load it.
        metrics_file: a `metrics.json` of `boneage evaluate` for these very weights, or None ("not measured yet").
        stress_folder: a result folder of `boneage-benchmark stress` for these very weights, or None.

    Raises:
        InputError: a file is missing or not what it should be, or belongs to other weights.
    """
    pipe = load_pipeline(checkpoint)
    config, revision = pipe.model.config, checkpoint_revision(pipe)
    results = None if metrics_file is None else _read_metrics(metrics_file, revision=revision)
    stress = None if stress_folder is None else _read_stress(stress_folder, revision=revision)
    provenance, rsna = config.provenance or {}, trained_on_rsna(config)
    source_size = pipe.image_processor.source_size
    data = ModelCardData(
        model_name=f"boneage-hf {name}",
        license="other" if rsna else None,
        license_name="rsna-research-weights" if rsna else None,
        license_link="LICENSE" if rsna else None,
        library_name="transformers",
        # The Hub has no task for one number out of an image; this is the one beneath which such models are looked for.
        pipeline_tag="image-classification",
        base_model=_base_model(provenance),
        datasets=_data_sets(provenance),
        tags=["bone-age", "radiograph", "medical", "hand", "image-regression", "boneage-hf"],
        metrics=["mae"],
        eval_results=None if results is None else _eval_results(results),
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=f"boneage-hf {name}",
        name=name,
        with_code=bool(getattr(config, "auto_map", None)),
        config=config,
        backbone=BACKBONES.get(config.backbone, config.backbone),
        grid=pipe.model.grid,
        values=sum(row.values for row in layer_table(pipe.model)),
        revision=revision,
        source_note=f"{source_size} x {source_size} px with squashed aspect ratio" if source_size else "",
        rsna=rsna,
        single_reading=results is not None and results["protocol"].startswith("reference-"),
        data_note=_DATA_NOTES.get("rsna" if rsna else _data_kind(provenance), _UNKNOWN_DATA),
        sex_note='required: "female" or "male"' if config.uses_sex else "not used",
        results=results,
        flip_note="averaged over the image and its mirror image"
        if results and results["flip_average"]
        else "single view",
        results_rows=_rows({_MEASURES[key]: (results["metrics"], key) for key in _MEASURES} if results else {}),
        group_rows="\n".join(_group_row(part) for part in (results["groups"] if results else [])),
        age_notes=_age_notes(results or {}),
        rare_note=_rare_note(results or {}),
        coverage_rows=_coverage_rows((results or {}).get("interval")),
        stress=stress,
        adjustment_note=_adjustment_note(config),
        provenance={key: provenance.get(key) for key in _PROVENANCE},
        initial_note=_initial_note(provenance.get("initial_weights") or {}),
        teacher_note=_teacher_note(provenance),
        commands="\n".join(_commands(provenance)),
        curve_rows=_curve_rows(provenance),
        cost_note=_cost_note(provenance),
        not_counted=_not_counted(provenance),
        recipe=json.dumps(provenance.get("recipe"), indent=2),
    )
    return str(card)


_UNKNOWN_DATA = "images of unknown origin"
_DATA_NOTES = {
    "rsna": "radiographs of the training set of the RSNA 2017 Pediatric Bone Age Challenge",
    "phantom": "drawn phantoms",
}

_PROVENANCE = ("train_n", "train_fingerprint", "selection_n", "epoch", "validation_mae_months")


def _data_kind(provenance: dict[str, Any]) -> str:
    return str((provenance.get("data") or {}).get("kind"))


def _read_metrics(path: Path, *, revision: str) -> dict[str, Any]:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError("The metrics file is missing or not JSON; make it with `boneage evaluate`.") from None
    if not isinstance(results, dict) or "metrics" not in results or "revision" not in results:
        raise InputError("The metrics file is not one that `boneage evaluate` writes.")
    if results["revision"] != revision:
        raise InputError(
            f"The metrics belong to weights {results['revision']}, the checkpoint has {revision}: evaluate it again."
        )
    return results


@dataclass(frozen=True)
class _Stress:
    """Number of images, which ones, their MAE as they are, and a row of the card for each kind of change."""

    n: int
    images: str
    unchanged_mae_months: float
    rows: str


def _read_stress(folder: Path, *, revision: str) -> _Stress:
    """Of each kind of change the setting that costs most."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        with (folder / "stress.csv").open(encoding="utf-8", newline="") as file:
            settings = list(csv.DictReader(file))
        worst: dict[str, dict[str, str]] = {}
        for row in settings:
            best = worst.setdefault(row["kind"], row)
            if float(row["mae_change_months"]) > float(best["mae_change_months"]):
                worst[row["kind"]] = row
        rows = [
            f"| {row['setting']} | {float(row['mae_change_months']):+.2f} | "
            f"{float(row['mae_change_low_months']):+.2f} to {float(row['mae_change_high_months']):+.2f} | "
            f"{100 * float(row['moved_over_12_months']):.0f} % |"
            for row in worst.values()
        ]
        n = int(manifest["n"])
        stress = _Stress(n, str(manifest["images"]), float(settings[0]["unchanged_mae_months"]), "\n".join(rows))
        measured = manifest["revision"]
    except (OSError, ValueError, KeyError, IndexError):
        raise InputError("The stress folder is not one that `boneage-benchmark stress` writes.") from None
    if measured != revision:
        raise InputError(f"The stress test is of weights {measured}, the checkpoint has {revision}: make it again.")
    return stress


def _group_row(part: dict[str, Any]) -> str:
    name = f"{part['group']} months" if part["grouping"] == "age_band_months" else part["group"]
    interval = _interval([part["mae_months_low"], part["mae_months_high"]])
    low, high = part["bias_months_low"], part["bias_months_high"]
    bias = MISSING if low is None or high is None else f"{low:+.2f} to {high:+.2f}"
    return (
        f"| {name} | {part['n']:,} | {_number(part['mae_months'])} | {interval} | {part['bias_months']:+.2f} | "
        f"{bias} |"
    )


def _age_notes(results: dict[str, Any]) -> list[str]:
    """How the error depends on age: its slope, and whether it is the same at all ages."""
    slopes, notes = results.get("error_over_age") or {}, []
    said = []
    for name in ("reference", "predicted"):
        value, interval = slopes.get(f"slope_over_{name}"), slopes.get(f"slope_over_{name}_ci95") or [None, None]
        if value is not None:
            ends = "" if None in interval else f" (95 % {interval[0]:+.3f} to {interval[1]:+.3f})"
            said.append(f"{value:+.3f} months per month of {name} age{ends}")
    if said:
        notes.append(
            f"The error changes by {' and by '.join(said)}. Below 0 the young are read as too old and the old as too "
            "young; over the reference the best possible model is below 0 too, as the readings are themselves off."
        )
    notes.append(f'"{CLAIM_OVER_AGE.capitalize()}": {format_claim(results)}.')
    return notes


def _rare_note(results: dict[str, Any]) -> str:
    """The error at both ends of the age range, and the ages where it is clearly above that of all."""
    groups = results.get("groups")
    if not groups:
        return "The error there was not measured."
    ends = ", ".join(
        f"{name} {_number(mae)} (n = {n:,})" if n else f"{name} not measured (no image)"
        for name, (n, mae) in rare_ages(groups).items()
    )
    note = f"Mean absolute error in months: {ends}, all ages {_number(results['metrics']['mae_months'])}."
    worse = ", ".join(
        f"{band['group']} months ({_number(band['mae_months'])}, n = {band['n']:,})"
        for band in bands_clearly_worse(groups)
    )
    if worse:
        return f"{note} Above that of all ages with the whole 95 % interval: {worse}."
    return f"{note} No 24-month band is above that of all ages with its whole 95 % interval."


#: Measures of the metadata: key of `metrics.json`, type and name on the Hub.
_METADATA_MEASURES = (
    ("mae_months", "mae", "MAE (months)"),
    ("rmse_months", "rmse", "RMSE (months)"),
    ("within_12_months", "within_12_months", "share within 12 months"),
)


#: First word of a protocol -> what its images are; the others are parts of the challenge.
_DATA_NAMES = {"phantom": "drawn phantoms", "table": "radiographs of one place"}


def _eval_results(results: dict[str, Any]) -> list[EvalResult]:
    kind = results["protocol"].partition("-")[0]
    data = _DATA_NAMES.get(kind, "RSNA 2017 Pediatric Bone Age Challenge")
    return [
        EvalResult(
            task_type="image-regression",
            task_name="Bone age from a hand radiograph",
            dataset_type="bone-age",
            dataset_name=f"{data} ({results['protocol']})",
            dataset_split=results["split"],
            metric_type=measure,
            metric_name=title,
            metric_value=round(results["metrics"][key], 2),
        )
        for key, measure, title in _METADATA_MEASURES
        if results["metrics"][key] is not None
    ]


def _base_model(provenance: dict[str, Any]) -> str | None:
    """Hub id of the weights that training began with, also where another checkpoint lies between."""
    initial = provenance.get("initial_weights") or {}
    source = str(initial.get("source", ""))
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source):
        return source
    earlier = initial.get("provenance")
    return _base_model(earlier) if earlier else None


def _teacher_note(provenance: dict[str, Any]) -> str:
    """A sentence for each training that a finished checkpoint's features were further targets of."""
    notes = []
    for stage in _stages(provenance):
        teacher = stage.get("teacher")
        if teacher:
            size = (stage.get("recipe") or {}).get("image_size", MISSING)
            before = teacher.get("provenance") or {}
            began = _first_weights(before)
            terms = ", licence as of these weights" if trained_on_rsna(BoneAgeConfig(provenance=before)) else ""
            notes.append(
                f" In the training at {size} px the features that `{teacher['source']}` (weights "
                f"`{teacher['revision']}`{terms}; begun from {began}) has of the same training images were further "
                "targets, so its losses hold their error as well; the teacher takes no part in an answer."
            )
    return "".join(notes)


def _first_weights(provenance: dict[str, Any]) -> str:
    """What the first of the trainings that led to some weights began with."""
    return _initial_note(_stages(provenance)[0].get("initial_weights") or {})


def _data_sets(provenance: dict[str, Any]) -> list[str] | None:
    """Hub id of the data set of the training, where it came from there."""
    source = (provenance.get("data") or {}).get("hub_id")
    return [source] if source else None


def _rows(measures: dict[str, tuple[dict[str, Any], str]]) -> str:
    return "\n".join(
        f"| {text} | {_number(metrics[key])} | {_interval(metrics[f'{key}_ci95'])} |"
        for text, (metrics, key) in measures.items()
    )


def _coverage_rows(coverage: dict[str, Any] | None) -> str:
    if coverage is None:
        return ""
    groups = {"all": coverage["all"], **coverage.get("by_sex", {})}
    groups |= {f"{name} third of the predictions": part for name, part in coverage["by_predicted_tercile"].items()}
    return "\n".join(
        f"| {name} | {part['n']:,} | {100 * part['coverage']:.1f} % | "
        f"{' to '.join(f'{100 * end:.1f}' for end in part['coverage_ci95'])} % | {part['mean_width_months']:.1f} |"
        for name, part in groups.items()
    )


def _adjustment_note(config: BoneAgeConfig) -> str:
    """What is laid on the network's answer, and from which images."""
    notes, provenance = [], config.provenance or {}
    fitted = provenance.get("interval") or {}
    if config.age_correction is not None:
        gained = fitted.get("age_correction")
        note = "A monotone correction over age was fitted on the selection half of validation"
        if gained:
            before, after = gained["mae_before_months"], gained["mae_after_months"]
            note += f" (MAE by cross-validation {before:.2f} -> {after:.2f} months)"
        notes.append(note + ".")
    local = provenance.get("local_calibration")
    if local:
        notes.append(
            f"Calibrated on {local['n']:,} images of one place (label fingerprint `{local['fingerprint'][:12]}`)"
            + ("." if config.local_calibration is not None else "; the months stayed as they were.")
        )
    elif config.interval is not None and fitted:
        notes.append(
            f"The interval was calibrated on {fitted['n']:,} further images (label fingerprint "
            f"`{fitted['fingerprint'][:12]}`)."
        )
    return " ".join(notes)


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


def _interval(interval: list[float | None]) -> str:
    low, high = interval
    return MISSING if low is None or high is None else f"{_number(low)} to {_number(high)}"


def _stages(provenance: dict[str, Any]) -> list[dict[str, Any]]:
    """Provenance of each training that led to these weights, the first one first."""
    before = (provenance.get("initial_weights") or {}).get("provenance")
    return [*(_stages(before) if before else []), provenance]


def _curve_rows(provenance: dict[str, Any]) -> str:
    """A row for each epoch of each training whose curve is known."""
    return "\n".join(
        f"| {(stage.get('recipe') or {}).get('image_size', MISSING)} | {row['epoch']} | {row['loss']:.4f} | "
        f"{row['validation_mae_months']:.2f} | {row['minutes']:.1f} |"
        for stage in _stages(provenance)
        for row in (stage.get("cost") or {}).get("learning_curve", [])
    )


def _cost_note(provenance: dict[str, Any]) -> str:
    """Core-hours by training and machine, or that they are not known."""
    notes = []
    for stage in _stages(provenance):
        size, cost = (stage.get("recipe") or {}).get("image_size", MISSING), stage.get("cost")
        if cost is None:
            notes.append(f"{MISSING} at {size} px (not recorded)")
            continue
        machine = cost["hardware"]
        where = machine["accelerator"] or machine["processor"] or machine["machine"]
        notes.append(f"{cost['core_hours']:.1f} at {size} px ({where}, {machine['torch_threads']} threads)")
    return "; ".join(notes)


def _not_counted(provenance: dict[str, Any]) -> str:
    """What the core-hours leave out: all that is done once, or after the steps of an epoch."""
    stages = _stages(provenance)
    left_out = ["validation"]
    if any((stage.get("recipe") or {}).get("cached_views") for stage in stages):
        left_out.append("the one pass of the training images through a frozen backbone whose features were kept")
    if any(stage.get("teacher") for stage in stages):
        left_out.append("the teacher's one pass over the training images")
    return ", ".join(left_out)


def _commands(provenance: dict[str, Any]) -> list[str]:
    """The command lines that make such a checkpoint again, one after the other; none where its recipe has no name.
    What was fitted with settings for which the command line has no option is left out."""
    plan = plan_that_repeats(provenance)
    if plan is None:
        return []
    precision, steps = provenance.get("mixed_precision", "no"), provenance.get("accumulation", 1)
    lines = [
        f"boneage train DATASET RUN --recipe {plan} --initial-weights {_plan_start(provenance)} "
        f"--mixed-precision {precision}" + ("" if steps == 1 else f" --accumulation {steps}")
    ]
    checkpoint = "RUN/checkpoint"
    interval, gate = provenance.get("interval"), provenance.get("gate")
    if interval and interval.get("alpha") == INTERVAL_ALPHA:
        options = " --correct-age" if interval.get("age_correction") else ""
        options += " --flip-average" if interval.get("flip_average") else ""
        lines.append(f"boneage fit-interval {checkpoint} DATASET INTERVAL{options}")
        checkpoint = "INTERVAL"
    if gate and gate.get("seed") == 0:
        lines.append(f"boneage fit-gate {checkpoint} DATASET GATED --images {gate['n']}")
    return lines


def _plan_start(provenance: dict[str, Any]) -> str:
    """What --initial-weights takes to begin as the first training did."""
    source = str((_stages(provenance)[0].get("initial_weights") or {}).get("source", ""))
    return "lite0-imagenet.safetensors" if source.startswith("efficientnet-lite0") else source or "WEIGHTS"


def _initial_note(initial: dict[str, Any]) -> str:
    if not initial:
        return MISSING
    before = initial.get("provenance")
    if before is not None:  # a checkpoint of this package: what it was, and what it started from in turn
        recipe = before.get("recipe") or {}
        trained = f"{recipe.get('epochs', MISSING)} epochs at {recipe.get('image_size', MISSING)} px"
        return f"a training of {trained} before this one, from {_initial_note(before.get('initial_weights') or {})}"
    parts = [f"`{initial['source']}`"]
    if initial.get("licence"):
        parts.append(f"licence {initial['licence']}")
    if initial.get("sha256"):
        parts.append(f"sha256 `{initial['sha256'][:12]}`")
    return ", ".join(parts)
