"""What a report says of measured systems: ranking, each system, ages, stress, attention, speed and cost."""

from collections.abc import Mapping, Sequence
from decimal import Decimal
from functools import partial
from typing import Any

from boneage_hf.metrics import permutation_p_text

from . import pictures
from .compare import Comparison, p_text, verdict
from .findings import Findings, Study
from .measured import MeasuredResult
from .pictures import Costed, Ranked
from .registry import PublishedResult, find
from .rendering import MISSING, Picture, Section, Table
from .results_folder import Result
from .statistics import ALPHA, ENOUGH_FOR_P95

#: Network of `speed` -> the published row whose error it stands beside, how many of the network that system has at
#: least, and whether that is a lower bound. Deeplasia has three EfficientNets of 512 px or more, and B0 is the
#: smallest of them; ianpan's three networks are timed together.
_PEERS = (
    ("EfficientNet-B0, 512 px (Deeplasia's kind)", "Deeplasia", "rsna-test-200", 3, True),
    ("three ConvNeXtV2-tiny, 512 px (ianpan's kind)", "ianpan/bone-age", "rsna-test-200", 1, True),
    (
        "VGG19 with attention, 384 px (the reference)",
        "VGG19+Attention (reference project)",
        "own-split-1024",
        1,
        False,
    ),
)

_GROUPS = {"all": "all", "sex": "sex", "age_band_months": "months"}


def names_of(findings: Findings, measured: Sequence[MeasuredResult]) -> dict[str, str]:
    """Folder of a run -> the name under which a report shows it: that of its measured row, or the system's own."""
    rows = {row.predictions_sha256: row.system for row in measured}
    names = {run.folder: rows.get(run.metrics["predictions_sha256"], run.system) for run in findings.runs}
    shown = list(names.values())
    return {folder: name if shown.count(name) == 1 else f"{name} ({folder})" for folder, name in names.items()}


def rank_text(comparison: Comparison | None, digest: str, *, leakage: str | None = None) -> str:
    """The rank that the paired tests support, or why there is none.

    Args:
        leakage: of the run; tells runs with the same predictions apart. Without it none of these has a rank.
    """
    if comparison is None:
        return MISSING
    same = [one for one in comparison.standings if one.predictions_sha256 == digest]
    standing = min(same, key=lambda one: (one.leakage != leakage, one.rank is not None))
    if standing.rank is not None:
        return str(standing.rank)
    if standing.leakage.startswith("trained on"):
        return "none: has seen the test"
    return f"none: not distinguishable at n = {comparison.n:,}"


def measured_sections(
    findings: Findings, measured: Sequence[MeasuredResult], published: Sequence[PublishedResult]
) -> list[Section]:
    """Every section that rests on result folders; none where there is no folder."""
    names = names_of(findings, measured)
    sections = []
    if findings.runs:
        sections += [_ranking_section(findings, names), *_pair_sections(findings, names)]
        sections += [_system_section(run, names[run.folder], findings) for run in findings.runs]
        sections += _age_sections(findings, names)
    sections += _stress_sections(findings, names)
    sections += _attention_sections(findings, names)
    sections += _gate_sections(findings, names)
    sections += _ablation_sections(findings)
    sections += _speed_sections(findings)
    sections += _cost_sections(findings, names, published)
    return sections


# --- accuracy and ranking -------------------------------------------------------------------------------------------


def _ranking_section(findings: Findings, names: Mapping[str, str]) -> Section:
    groups: dict[str, list[Ranked]] = {}
    for protocol, runs in findings.by_protocol().items():
        comparison = findings.comparison(protocol)
        lines = []
        for run in sorted(runs, key=lambda run: run.metrics["metrics"]["mae_months"]):
            rank = rank_text(comparison, run.metrics["predictions_sha256"], leakage=run.leakage)
            flag = "" if run.leakage == "none" else f"; leakage: {run.leakage}"
            flag += "; images seen: unknown" if images_unknown(run) else ""
            low, high = run.metrics["metrics"]["mae_months_ci95"]
            words = "not tested" if rank == MISSING else rank if rank.startswith("none") else f"rank {rank}"
            lines.append(
                Ranked(
                    name=names[run.folder],
                    mae=run.metrics["metrics"]["mae_months"],
                    low=low,
                    high=high,
                    rank=words.replace("none: ", "no rank: ") + flag,
                )
            )
        groups[protocol.name] = lines
    alt = "MAE in months with 95 % bootstrap interval and rank of each measured system: " + "; ".join(
        f"{one.name} {one.mae:.2f} [{one.low:.2f}, {one.high:.2f}], {one.rank}"
        for lines in groups.values()
        for one in lines
    )
    return Section(
        "Ranking of measured systems",
        (
            "A rank is given only where the paired tests tell a system apart from every other one under its protocol: "
            f"Wilcoxon signed-rank on absolute errors below {ALPHA} after Holm's correction, a bootstrap interval of "
            f"the "
            "MAE difference that leaves out 0, and both pointing the same way. Overlapping bars are no test.",
        ),
        pictures=(Picture("ranking", alt, partial(pictures.draw_ranking, groups)),),
    )


def _pair_sections(findings: Findings, names: Mapping[str, str]) -> list[Section]:
    sections = []
    for protocol, runs in findings.by_protocol().items():
        if len(runs) < 2:
            continue
        comparison = findings.comparison(protocol)
        heading = f"Paired tests under {protocol.name}"
        if comparison is None:
            sections.append(
                Section(
                    heading,
                    (
                        "Not made: they need the labels. Give the prepared data set with --data, or commit the folder "
                        "of "
                        "`boneage-benchmark compare --out`.",
                    ),
                )
            )
            continue
        shown = _shown(comparison, runs, names)
        columns = ("Lower MAE", "Other", "MAE difference", "Wilcoxon p", "with Holm", "Images needed", "Verdict")
        rows = tuple(
            (
                shown[pair.better],
                shown[pair.other],
                f"{pair.difference.difference_months:.2f} "
                f"[{pair.difference.low_months:.2f}, {pair.difference.high_months:.2f}]",
                p_text(pair.p_value).removeprefix("= "),
                p_text(pair.p_holm).removeprefix("= "),
                MISSING if pair.n_needed is None else f"{pair.n_needed:,}",
                verdict(pair, comparison.n, better=shown[pair.better]),
            )
            for pair in comparison.pairs
        )
        paragraph = (
            f"On the same {comparison.n:,} images. In brackets: 95 % paired bootstrap interval in months. Images "
            "needed: for a difference of this size to be found with 80 % power at a level of "
            f"{ALPHA} over the number of pairs, {len(comparison.pairs)}."
        )
        table = Table(f"Pairs under {protocol.name}", columns, rows, frozenset(columns[2:6]))
        sections.append(Section(heading, (paragraph,), table))
    return sections


def _shown(comparison: Comparison, runs: Sequence[Result], names: Mapping[str, str]) -> dict[str, str]:
    """System as a comparison names it -> as the report does."""
    left, shown = list(runs), {}
    for one in comparison.standings:
        same = [run for run in left if run.metrics["predictions_sha256"] == one.predictions_sha256]
        # Of runs with the same predictions the one that is said to have seen the same.
        found = min(same, key=lambda run: run.leakage != one.leakage)
        shown[one.system] = names[found.folder]
        left = [run for run in left if run is not found]
    return shown


def images_unknown(run: Result) -> bool:
    """Whether predictions were made elsewhere, from copies of the images that nobody can check."""
    system = run.manifest["system"]
    return system.get("reads_images") is False and system.get("adapter") != "ConstantSystem"


def _system_section(run: Result, name: str, findings: Findings) -> Section:
    metrics = run.metrics
    trained = metrics.get("trained_on")
    paragraphs = [
        f"Folder {run.folder}, revision {run.manifest['system']['revision']}, protocol {run.protocol.name}, n = "
        f"{metrics['n']:,}. Trained on: {'not known' if trained is None else ', '.join(trained) or 'nothing'}. "
        f"Leakage: {run.leakage}. Preprocessing: {run.manifest['system']['preprocessing']}.",
        "Which copies of the images its predictions were made from is not known, so a difference from other systems "
        "may come from the copies alone."
        if images_unknown(run)
        else "",
        *_age_claim(metrics),
        _coverage(metrics.get("interval"), run.manifest["system"].get("interval")),
    ]
    columns = ("Group", "n", "MAE", "RMSE", "Median absolute error", "Bias", "Within 12 months")
    measures = ("mae_months", "rmse_months", "median_absolute_error_months", "bias_months", "within_12_months")
    rows = tuple(
        (
            row["group"] if row["grouping"] != "age_band_months" else f"{row['group']} months",
            f"{row['n']:,}",
            *(_with_interval(row, measure) for measure in measures),
        )
        for row in metrics["groups"]
    )
    table = Table(f"{name} by sex and reference bone age", columns, rows, frozenset(columns[1:]))
    svg = (findings.pictures or {}).get(run.folder)
    drawn: tuple[Picture, ...] = ()
    if svg is not None:
        alt = f"Density of predicted against reference bone age and Bland-Altman plot of {name}"
        drawn = (Picture(f"agreement-{run.folder}", alt, partial(str, svg)),)
    return Section(f"System {name}", tuple(paragraph for paragraph in paragraphs if paragraph), table, pictures=drawn)


def _age_claim(metrics: Mapping[str, Any]) -> list[str]:
    said = []
    limits, claim, slopes = (metrics.get(key) for key in ("bland_altman", "equal_over_age", "error_over_age"))
    if limits:
        said.append(
            f"Bland-Altman: bias {limits['bias_months']:+.2f} months (-/+ {limits['bias_margin_months']:.2f}), limits "
            f"of "
            f"agreement {limits['lower_limit_months']:+.1f} to {limits['upper_limit_months']:+.1f} months (each -/+ "
            f"{limits['limit_margin_months']:.1f}); -/+ is half of the 95 % interval."
        )
    if slopes and slopes.get("slope_over_reference") is not None:
        found = {name: _slope(slopes, f"slope_over_{name}") for name in ("reference", "predicted")}
        said.append(
            f"Regression to the mean: per month of reference age the error changes by {found['reference']} months, "
            f"per month of predicted age by {found['predicted']}. Over the reference a slope below 0 reads the young "
            "too old and the old too young, but the error of a single reading alone makes it negative, for the best "
            "possible system too; over the prediction 0 is what a calibrated system has."
        )
    if claim:
        said.append(
            f'"{claim["claim"].capitalize()}": {claim["verdict"]} (permutation test over 24-month bands, p '
            f"{permutation_p_text(claim)}; the MAEs of the bands differ by up to {claim['spread_months']:.1f} months)."
        )
    return said


def _slope(slopes: Mapping[str, Any], key: str) -> str:
    value, ends = slopes.get(key), slopes.get(f"{key}_ci95") or (None, None)
    if value is None:
        return MISSING
    return f"{value:+.3f}" if None in ends else f"{value:+.3f} [{ends[0]:+.3f}, {ends[1]:+.3f}]"


def _coverage(interval: Mapping[str, Any] | None, made_with: Mapping[str, Any] | None) -> str:
    if not interval:
        return "It gives no interval, so there is no coverage."

    def said(found: Mapping[str, Any]) -> str:
        low, high = found["coverage_ci95"]
        width = f"mean width {found['mean_width_months']:.1f} months"
        return f"{100 * found['coverage']:.1f} % [{100 * low:.1f}, {100 * high:.1f}], {width}"

    parts = [
        *((f"{sex}", found) for sex, found in interval.get("by_sex", {}).items()),
        *((f"{third} third of the predictions", found) for third, found in interval["by_predicted_tercile"].items()),
        *((f"{third} third of the references", found) for third, found in interval["by_reference_tercile"].items()),
    ]
    rest = "; ".join(f"{name} {said(found)}" for name, found in parts)
    level = f"{100 * (1 - made_with['alpha']):.0f} % " if made_with and "alpha" in made_with else ""
    return f"Its {level}intervals hold the reference in {said(interval['all'])}. By group: {rest}."


def _with_interval(row: Mapping[str, Any], measure: str) -> str:
    value, low, high = (row.get(f"{measure}{end}") for end in ("", "_low", "_high"))
    if value is None:
        return MISSING
    scale, suffix, digits = (100, " %", 1) if measure.startswith("within") else (1, "", 2)
    text = f"{scale * value:.{digits}f}{suffix}"
    return text if low is None or high is None else f"{text} [{scale * low:.{digits}f}, {scale * high:.{digits}f}]"


def _age_sections(findings: Findings, names: Mapping[str, str]) -> list[Section]:
    groups = {
        protocol.name: {
            names[run.folder]: run for run in runs if run.manifest["system"].get("adapter") != "ConstantSystem"
        }
        for protocol, runs in findings.by_protocol().items()
    }
    groups = {protocol: runs for protocol, runs in groups.items() if runs}
    if not groups:
        return []
    alt = (
        "MAE and bias with 95 % intervals by 24-month band of the reference age; figures in the tables of the systems"
    )
    return [
        Section(
            "By age",
            ("Few children are in the bands at both ends: see n. The constant prediction is left out.",),
            pictures=(Picture("age", alt, partial(pictures.draw_age, groups)),),
        )
    ]


# --- stress, attention ----------------------------------------------------------------------------------------------


def _study_names(studies: Sequence[Study], findings: Findings, names: Mapping[str, str]) -> dict[str, Study]:
    """Name of the measured system with the revision of a study, or the checkpoint's own -> study."""
    by_revision = {run.manifest["system"]["revision"]: names[run.folder] for run in findings.runs}
    named: dict[str, Study] = {}
    for study in studies:
        revision = study.manifest["revision"]
        name = by_revision.get(revision, f"{study.manifest['checkpoint']} @ {revision}")
        named[name if name not in named else f"{name} ({study.folder})"] = study
    return named


def _stress_sections(findings: Findings, names: Mapping[str, str]) -> list[Section]:
    if not findings.stress:
        return []
    named = _study_names(findings.stress, findings, names)
    alt = "Heat map: change of the MAE and share of predictions moved by more than 12 months, by setting and system"
    sections = [
        Section(
            "Stress test",
            (
                "The same radiographs turned, mirrored, darkened, marked, made coarser: seven kinds after "
                "Santomartino et al., Radiol Artif Intell 2024, https://doi.org/10.1148/ryai.230240, with settings of "
                "this project. n.s.: the absolute errors do not change significantly (Wilcoxon signed-rank, Holm over "
                "the settings). The intervals and that test can differ: an interval is of the mean change, not "
                "corrected for the number of settings, and moved by a few large errors, while the test goes by what "
                "happens to most images and may point to smaller errors where the mean grows. A change of the MAE can "
                "hide moves that cancel: read the shares beside it. No quality gate takes part, which in the pipeline "
                "refuses or puts right some of these pictures.",
            ),
            pictures=(Picture("stress", alt, partial(pictures.draw_stress, named)),),
            upright=True,
        )
    ]
    columns = ("Setting", "MAE change", "p with Holm", "Moved > 6", "Moved > 12", "Errors > 24, before", "after")
    for name, study in named.items():
        rows = tuple(
            (
                row["setting"],
                f"{row['mae_change_months']:+.2f} [{row['mae_change_low_months']:+.2f}, "
                f"{row['mae_change_high_months']:+.2f}]",
                p_text(row["mae_change_holm_p"]).removeprefix("= "),
                *(f"{100 * row[key]:.1f} %" for key in ("moved_over_6_months", "moved_over_12_months")),
                *(f"{100 * row[key]:.1f} %" for key in ("unchanged_significant_errors", "significant_errors")),
            )
            for row in study.table.to_dict(orient="records")
        )
        manifest, changed = study.manifest, int((study.table["mae_change_holm_p"] < ALPHA).sum())
        moved = (study.table["mae_change_low_months"] > 0) | (study.table["mae_change_high_months"] < 0)
        paragraph = (
            f"Folder {study.folder}, revision {manifest['revision']}, {manifest['protocol']}, split "
            f"{manifest['split']}, images: {manifest['images']}; MAE of these images unchanged "
            f"{manifest['unchanged_mae_months']:.2f} months. Of {len(study.table)} settings {int(moved.sum())} have "
            f"an interval of the MAE change that leaves out 0, and {changed} change the absolute errors significantly "
            "(Wilcoxon with Holm)."
        )
        table = Table(f"{name} under {len(rows)} settings; months", columns, rows, frozenset(columns[1:]))
        sections.append(Section(f"Stress test of {name}", (paragraph,), table))
    return sections


def _attention_sections(findings: Findings, names: Mapping[str, str]) -> list[Section]:
    if not findings.attention:
        return []
    named = _study_names(findings.attention, findings, names)
    sections = [
        Section(
            "Attention",
            (
                "What share of the attention map lies inside boxes that experts drew around the ossification areas "
                "(Koitka et al., https://doi.org/10.1371/journal.pone.0207496), widened by half a cell of the map, "
                "against the boxes' share of the area, a centred Gaussian, the map's own cells shuffled and the map "
                "of another radiograph. Where boxes are smaller than a cell, as those of finger joints are, nothing "
                "here tells which of them a map looks at.",
            ),
        )
    ]
    columns = ("Part", "Third of the age", "Region", "n", "Energy", "Area", "Gaussian", "Shuffled", "Other map")
    for name, study in named.items():
        # By region of what is known to be unseen; of all where nothing is.
        known = "unseen" if (study.table["part"] == "unseen").any() else "all"
        half = study.table.query(
            f"tolerance_cells == 0.5 and (region == 'all' or (part == '{known}' and third == 'all'))"
        )
        rows = tuple(
            (
                *(str(row[key]) for key in ("part", "third", "region")),
                f"{row['n']:,}",
                f"{100 * row['energy']:.1f} % [{100 * row['energy_low']:.1f}, {100 * row['energy_high']:.1f}]",
                *(
                    f"{100 * row[key]:.1f} %"
                    for key in ("area_share", "gaussian_share", "shuffled_cells_share", "other_map_share")
                ),
            )
            for row in half.to_dict(orient="records")
        )
        manifest = study.manifest
        seen = manifest.get("trained_on_this_training_part")
        paragraphs = (
            manifest["verdict"],
            f"Folder {study.folder}, revision {manifest['revision']}, {manifest['n']:,} radiographs, map of "
            f"{' x '.join(str(side) for side in manifest['grid'])} cells; training part seen in training: "
            f"{'not known' if seen is None else 'yes' if seen else 'no'}." + _box_cells(manifest.get("box_cells")),
        )
        table = Table(f"{name}: energy inside boxes, half a cell of tolerance", columns, rows, frozenset(columns[3:]))
        alt = f"Share of the energy of {name} inside experts' boxes against four rivals, by region and by age third"
        drawn = Picture(f"attention-{study.folder}", alt, partial(pictures.draw_attention, name, study))
        sections.append(Section(f"Attention of {name}", paragraphs, table, pictures=(drawn,)))
    return sections


def _box_cells(cells: Mapping[str, float] | None) -> str:
    if not cells:
        return ""
    said = ", ".join(f"{region} {value:.2f}" for region, value in cells.items())
    return f" Cells that the larger side of a region's box spans in the middle: {said}."


# --- quality gate ---------------------------------------------------------------------------------------------------


def _gate_sections(findings: Findings, names: Mapping[str, str]) -> list[Section]:
    if not findings.gate:
        return []
    sections = [
        Section(
            "Quality gate",
            (
                "What the quality gate refuses to answer: images of the test split as they are and changed, and "
                "pictures that are no hand. Intervals are those of Clopper and Pearson; views of one original are not "
                "independent, so the number of originals stands beside them.",
            ),
        )
    ]
    columns = ("Pictures", "n", "Originals", "Refused", "95 % exact interval", "Only warned of")
    for name, study in _study_names(findings.gate, findings, names).items():
        rows = tuple(
            (
                str(row["kind"]),
                *(f"{row[key]:,}" for key in ("n", "originals")),
                f"{row['refused']:,} ({100 * row['refused_share']:.1f} %)",
                f"{100 * row['refused_low']:.1f} to {100 * row['refused_high']:.1f} %",
                f"{row['warned']:,}",
            )
            for row in study.table.to_dict(orient="records")
        )
        paragraph = " ".join(f"{verdict[0].upper()}{verdict[1:]}." for verdict in study.manifest["verdicts"])
        table = Table(f"Refused by {name}", columns, rows, frozenset((*columns[1:4], columns[5])))
        sections.append(Section(f"Quality gate of {name}", (paragraph,), table))
    return sections


# --- ablations ------------------------------------------------------------------------------------------------------


def _ablation_sections(findings: Findings) -> list[Section]:
    columns = (
        *("Arm", "Changed", "Seed", "Epochs", "Best epoch", "px", "Minutes", "Core-hours", "Images/s", "MAE"),
        "Difference to the base arm",
    )
    sections = []
    for study in findings.ablations:
        records = study.table.to_dict(orient="records")
        base = next(iter(study.manifest["arms"]))
        recipe = study.manifest["arms"][base]["recipe"]
        source = study.manifest["runs"][f"{base}-seed0"]["initial_weights"]["source"]
        rows = tuple(
            (
                str(row["arm"]),
                str(row["changes"]),
                *(str(row[key]) for key in ("seed", "epochs", "best_epoch", "image_size")),
                *(f"{row['minutes']:.1f}", f"{row['core_hours']:.2f}", f"{row['images_per_second']:.1f}"),
                f"{row['mae_months']:.2f} [{row['mae_low_months']:.2f}, {row['mae_high_months']:.2f}]",
                MISSING
                if row["arm"] == base
                else f"{row['difference_months']:+.2f} [{row['difference_low_months']:+.2f}, "
                f"{row['difference_high_months']:+.2f}]",
            )
            for row in records
        )
        last = sum(row["best_epoch"] == row["epochs"] for row in records)
        own = [row["mae_months"] for row in records if row["arm"] == base]
        noise = (
            f"another seed alone moves the MAE of the base arm by {abs(own[1] - own[0]):.2f} months, and is in no "
            "interval."
            if len(own) > 1
            else "what another seed changes is in no interval."
        )
        paragraphs = (
            "What each choice of the recipe is worth when every arm trains for about as long. The base arm is "
            f"{recipe['backbone']} from the weights {source}, with {recipe['pooling']} pooling, sex, "
            f"{recipe['augmentation']} augmentation and {recipe['sampling']} sampling at {recipe['image_size']} px. "
            "Trainings this short rank choices for short trainings; a long one may rank them otherwise.",
            f"Measured on the {study.manifest['n']:,} images of the selection half of validation, never on a test "
            "split. Of each run its best epoch on these very images is kept, which flatters runs of many epochs where "
            f"it is not the last one; it is the last in {last} of {len(records)}. In brackets: 95 % bootstrap "
            "intervals over images, paired for differences, each for one comparison and not corrected for their "
            f"number; {noise}",
            f"Folder {study.folder}, {study.manifest['protocol']}, precision {study.manifest['mixed_precision']}, on "
            f"{_machine(study.manifest)}.",
        )
        verdicts = tuple(
            f"{question[0].upper()}{question[1:]}: {said}" for question, said in study.manifest["verdicts"].items()
        )
        table = Table("One choice changed at a time; months", columns, rows, frozenset(columns[2:]))
        sections.append(Section("Ablations", paragraphs, table, verdicts))
    return sections


# --- speed, cost ----------------------------------------------------------------------------------------------------


def _speed_sections(findings: Findings) -> list[Section]:
    sections = []
    columns = (
        *("System", "What", "px", "Batch", "Precision", "Threads", "Calls", "Median", "95th percentile"),
        *("Images/s", "GFLOP", "Share of peak"),
    )
    for study in findings.speed:
        rows = tuple(
            (
                str(row["system"]),
                str(row["what"]),
                *(str(row[key]) for key in ("image_size", "batch", "precision", "threads", "repeats")),
                f"{row['median_ms']:.1f}",
                f"{row['p95_ms']:.1f}" if row["repeats"] >= ENOUGH_FOR_P95 else MISSING,
                f"{row['images_per_second']:.1f}",
                MISSING if row["gflop_per_image"] != row["gflop_per_image"] else f"{row['gflop_per_image']:.2f}",
                MISSING if row["share_of_peak"] != row["share_of_peak"] else f"{100 * row['share_of_peak']:.0f} %",
            )
            for row in study.table.to_dict(orient="records")
        )
        manifest = study.manifest
        starts = "; ".join(
            f"{one['checkpoint']} (revision {one['revision']}) {one['cold_start']['seconds']:.1f} s, "
            f"at most {one['cold_start']['peak_memory_mb']:,.0f} MB"
            for one in manifest["checkpoints"]
        )
        peaks = "; ".join(f"{what} {value:,.0f}" for what, value in manifest["peak_gflop_per_second"].items())
        paragraphs = (
            f"On {_machine(manifest)}. From the first import to the first answer: {starts}. The peak of "
            f"a matrix product or convolution, in GFLOP/s: {peaks}.",
            f"Times in milliseconds per image; of fewer than {ENOUGH_FOR_P95} calls there is no 95th percentile. The "
            "networks of peers are stand-ins with random weights, without their preprocessing: lower bounds.",
        )
        table = Table(f"Speed, folder {study.folder}", columns, rows, frozenset((*columns[2:4], *columns[5:])))
        sections.append(Section("Speed", paragraphs, table))
    for study in findings.training:
        recipe = study.manifest["recipe"]
        rates = {row["images_from"]: row["images_per_second"] for row in study.table.to_dict(orient="records")}
        said = ", ".join(f"{name.replace('_', ' ')} {rate:.1f}" for name, rate in rates.items())
        sections.append(
            Section(
                "Speed of training",
                (
                    f"Images per second of whole training steps by where the images come from: {said}. "
                    f"{recipe['backbone']}, {recipe['image_size']} px, batch {recipe['batch_size']}, precision "
                    f"{study.manifest['mixed_precision']}, on {_machine(study.manifest)}.",
                ),
            )
        )
    return sections


def _machine(manifest: Mapping[str, Any]) -> str:
    machine = manifest["hardware"]
    return (
        f"{machine['processor'] or machine['machine']}, {machine['cores']} cores, {machine['torch_threads']} threads"
    )


def _cost_sections(
    findings: Findings, names: Mapping[str, str], published: Sequence[PublishedResult]
) -> list[Section]:
    costed: list[tuple[Costed, str, str]] = []  # with the protocol of the MAE and the status in words
    for study in findings.speed:
        network = study.table[(study.table["what"] == "network") & (study.table["batch"] == 1)]
        network = network[(network["precision"] == "fp32") & (network["threads"] == network["threads"].max())]
        cost = {row["system"]: (row["gflop_per_image"], row["median_ms"]) for row in network.to_dict(orient="records")}
        revisions = {one["revision"]: one["checkpoint"] for one in study.manifest["checkpoints"]}
        for run in findings.runs:
            checkpoint = revisions.get(run.manifest["system"]["revision"])
            if checkpoint in cost:
                # Both views of an image pass through the network.
                passes = 2 if run.metrics["flip_average"] else 1
                gflop, milliseconds = (passes * value for value in cost[checkpoint])
                own = Costed(
                    name=names[run.folder],
                    mae=run.metrics["metrics"]["mae_months"],
                    gflop=gflop,
                    milliseconds=milliseconds,
                )
                twice = ", twice the network: image and mirror image" if passes == 2 else ""
                costed.append((own, run.protocol.name, f"measured{twice}"))
        for network_name, system, protocol, count, at_least in _PEERS:
            mae = find(published, system, protocol).mae_months if published else None
            if network_name in cost and isinstance(mae, Decimal):
                gflop, milliseconds = (count * value for value in cost[network_name])
                peer = Costed(
                    name=system, mae=float(mae), gflop=gflop, milliseconds=milliseconds, cited=True, at_least=at_least
                )
                costed.append((peer, protocol, "cited MAE"))
    if not any(not one.cited for one, _, _ in costed):
        return []
    columns = ("System", "Protocol of the MAE", "MAE", "GFLOP", "CPU milliseconds", "Status")
    rows = tuple(
        (
            one.name,
            protocol,
            f"{one.mae:.2f}",
            f"{'at least ' if one.at_least else ''}{one.gflop:.2f}",
            f"{'at least ' if one.at_least else ''}{one.milliseconds:.1f}",
            status,
        )
        for one, protocol, status in costed
    )
    alt = "MAE against GFLOP and against CPU milliseconds per image: " + "; ".join(
        f"{row[0]} {row[2]} months at {row[3]} GFLOP, {row[4]} ms, {row[5]}" for row in rows
    )
    return [
        Section(
            "Cost",
            (
                "Error against compute of the network alone, batch 1, fp32, all threads. Cited errors are from other "
                "test "
                "sets and compare with nothing here; their compute was measured in the same run on stand-ins. "
                "Deeplasia "
                "has three EfficientNets of 512 px or more, so it costs at least three times B0.",
            ),
            Table("Error and cost", columns, rows, frozenset(columns[2:5])),
            pictures=(Picture("cost", alt, partial(pictures.draw_cost, [one for one, _, _ in costed])),),
        )
    ]
