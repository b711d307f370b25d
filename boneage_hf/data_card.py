"""What a prepared data set says of itself: the manifest (prepared.json) and the data card (README.md) made from it."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pandas as pd
from datasets import Features, SplitDict, SplitInfo
from datasets.info import DatasetInfo, DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCardData

from . import __version__
from .label_tables import CHALLENGE_PARTS, PROBLEMS, ChallengePart, is_labelled
from .sex import Sex
from .splits import AGE_BAND_MONTHS, MAX_BONE_AGE_MONTHS, age_band, age_band_name, fingerprint

SPLITS = ("train", "validation", "test")

SPLIT_RULES: Mapping[str, str] = MappingProxyType(
    {
        "reference": (
            "Rule `reference`: all rows with an unambiguous id, sex and age, before any image is left out, are "
            f"grouped by sex and {AGE_BAND_MONTHS}-month age band; 1024/12611 of them (test), 2129/12611 (validation) "
            "and half of validation (calibration), rounded, are shared out over the groups by the largest remainder, "
            "and each group is taken in the order of SHA-256 of `seed:id`."
        ),
        "official": (
            "Rule `official`: the parts of the challenge (train is its training set); the first half of validation in "
            "the order of SHA-256 of `seed:id` is for calibration."
        ),
    }
)


CITATION = (
    "Halabi SS, Prevedello LM, Kalpathy-Cramer J, et al. The RSNA Pediatric Bone Age Machine Learning Challenge. "
    "Radiology 2019;290(2):498-503. doi 10.1148/radiol.2018180736"
)

_RSNA_TERMS = (
    "Non-commercial research only, under the terms of the RSNA Pediatric Bone Age Challenge. This folder was built "
    "from its user's own copy of the challenge data. **Never re-host it**: do not upload or pass on images or labels; "
    "others build the same splits from their own copy (the fingerprints below tell whether they did)."
)
_PHANTOM_TERMS = (
    "**Drawn images, not radiographs.** Every image is drawn by `boneage_hf.phantom`: a schematic hand whose "
    "ossification grows with age. No patient, no measurement: they are for tests and for a first run without data, "
    "and a result on them says nothing about children."
)

#: Kind of data set -> what must be met before everyone may see it; drawn hands have no such terms.
PUBLICATION_TERMS: Mapping[str, str] = MappingProxyType(
    {
        "rsna": (
            "The RSNA challenge gives its images and labels for non-commercial research and does not allow to re-host "
            "them, so a public copy needs the permission of the RSNA."
        ),
        "table": (
            "These are radiographs of patients: to show them to everyone needs the consent or the waiver that your "
            "ethics committee asks for, and pixels without names burnt in."
        ),
    }
)

#: Kind of data set -> licence of its images and labels, as its card names it; a table's own terms are its owner's.
LICENCES: Mapping[str, str] = MappingProxyType(
    {"phantom": "apache-2.0", "rsna": "rsna-bone-age-challenge-non-commercial"}
)

_TABLE_TERMS = (
    "**Radiographs of patients**, prepared from a table of their owner's own. Who may see them, and for what, is for "
    "the owner and the ethics committee to say: do not pass them on without both."
)

# So many ids of left-out rows are listed in the card; prepared.json has all of them.
_LISTED_IDS = 20


_TITLES = {
    "phantom": "Drawn hand phantoms with bone ages",
    "rsna": "RSNA paediatric bone age, prepared",
    "table": "Hand radiographs with bone ages, prepared",
}
#: What a table of one's own is the only part of; nothing was published of it to compare with.
_OWN_PART = ChallengePart(
    name="table", id_column="", age_column="", sex_column="", sex_codes=MappingProxyType({}), folders=(), rows=0
)


@dataclass(frozen=True)
class PreparedRow:
    """One row that is written; ``source`` is its place in the label table."""

    id: str
    bone_age_months: float
    sex: Sex
    split: str
    calibration: bool
    source: int


def manifest_of(
    table: pd.DataFrame,
    problems: Sequence[str | None],
    rows: Sequence[PreparedRow],
    left_out: Mapping[str, Sequence[str]],
    files: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
    key: str,
) -> dict[str, Any]:
    """Content of ``prepared.json``: settings, counts, ages and fingerprints of the source, the splits and the whole.

    Args:
        table: the label table.
        problems: one per row of ``table``, None where there is none.
        rows: what was written.
        left_out: kind of problem -> names of the rows.
        files: name of a shard -> ``split``, ``rows``, ``bytes``.
        settings: ``kind`` ("rsna", "phantom" or "table"), ``size``, ``split``, ``seed``.
        key: hash of source and settings, by which a second run knows the folder.
    """
    source, warnings = _source_parts(table, problems, compare=settings["kind"] == "rsna")
    of_split = {name: [row for row in rows if row.split == name] for name in SPLITS}
    splits = {name: _summary(of_split[name]) for name in SPLITS if of_split[name]}
    warnings += [f"The split {name} is empty." for name in SPLITS if name not in splits]
    return {
        "format": 1,
        "package_version": __version__,
        "kind": settings["kind"],
        "key": key,
        "settings": dict(settings),
        "split_rule": SPLIT_RULES[settings["split"]],
        "source": source,
        "splits": splits,
        "whole": _summary(rows),
        "left_out": {kind: list(ids) for kind, ids in left_out.items()},
        "warnings": warnings,
        "files": dict(files),
    }


def _summary(rows: Sequence[PreparedRow]) -> dict[str, Any]:
    months = [row.bone_age_months for row in rows]
    bands = [age_band(age) for age in months]
    return {
        "rows": len(rows),
        "female": sum(row.sex == "female" for row in rows),
        "male": sum(row.sex == "male" for row in rows),
        "mean_months": statistics.fmean(months),
        "sd_months": statistics.stdev(months) if len(months) > 1 else None,
        "calibration": sum(row.calibration for row in rows),
        "fingerprint": fingerprint([row.id for row in rows], months),
        "age_bands": {
            age_band_name(band): bands.count(band) for band in range(int(MAX_BONE_AGE_MONTHS) // AGE_BAND_MONTHS)
        },
    }


def _source_parts(
    table: pd.DataFrame, problems: Sequence[str | None], *, compare: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """The labelled rows of each part of the source, and where they differ from the published part."""
    parts: list[dict[str, Any]] = []
    warnings: list[str] = []
    for part in (*CHALLENGE_PARTS, _OWN_PART):
        labelled = [
            row for row, problem in enumerate(problems) if table["part"][row] == part.name and is_labelled(problem)
        ]
        if not labelled:
            continue
        sexes = [table["sex"][row] for row in labelled]
        found = fingerprint(
            [table["id"][row] for row in labelled], [float(table["bone_age_months"][row]) for row in labelled]
        )
        version = next((name for name, value in part.fingerprints.items() if value == found), None)
        entry = {
            "name": part.name,
            "rows": len(labelled),
            "female": sexes.count("female"),
            "male": sexes.count("male"),
            "fingerprint": found,
            "version": version,
        }
        parts.append(entry)
        if not compare:
            continue
        counts = (("rows", "rows", part.rows), ("female", "girls", part.female), ("male", "boys", part.male))
        for what, name, published in counts:
            if published is not None and entry[what] != published:
                warnings.append(f"The {part.name} table has {entry[what]} {name}, the published one {published}.")
        if version is None:
            warnings.append(f"The labels of the {part.name} table are not those that were published (fingerprint).")
    return parts, warnings


def render(manifest: Mapping[str, Any], *, features: Features, name: str = "THIS_FOLDER") -> str:
    """README.md of a prepared data set.

    Args:
        manifest: content of ``prepared.json``.
        features: the Features of the shards.
        name: what a user types to load it.
    """
    return f"---\n{_metadata(manifest, features)}\n---\n\n{_body(manifest, name)}"


def _metadata(manifest: Mapping[str, Any], features: Features) -> str:
    files: Mapping[str, Mapping[str, Any]] = manifest["files"]
    splits = SplitDict(
        {
            name: SplitInfo(
                name=name,
                num_bytes=sum(file["bytes"] for file in files.values() if file["split"] == name),
                num_examples=summary["rows"],
            )
            for name, summary in manifest["splits"].items()
        }
    )
    kind = manifest["kind"]
    phantom = kind == "phantom"
    data = DatasetCardData(
        pretty_name=_TITLES[kind],
        license="other" if kind == "rsna" else LICENCES.get(kind),
        task_categories=["image-classification"],
        tags=["bone-age", "radiograph", "hand", "regression", *(["synthetic"] if phantom else ["medical"])],
    )
    if kind == "rsna":
        data["license_name"] = LICENCES[kind]
    info = DatasetInfo(features=features, splits=splits, dataset_size=sum(file["bytes"] for file in files.values()))
    DatasetInfosDict({"default": info}).to_dataset_card_data(data)
    data_files = [{"split": name, "path": f"data/{name}-*.parquet"} for name in manifest["splits"]]
    MetadataConfigs({"default": {"data_files": data_files}}).to_dataset_card_data(data)
    return data.to_yaml()


def _body(manifest: Mapping[str, Any], name: str) -> str:
    kind = manifest["kind"]
    settings = manifest["settings"]
    size = settings["size"]
    stored = (
        "Images are stored as they were."
        if size is None
        else (
            f"Images with a side above {size} px are reduced to a longer side of {size} px (PIL bilinear, aspect "
            "ratio kept, 8-bit grey JPEG, quality 95)."
        )
    )
    fields = [
        ["`image`", "the radiograph, 8-bit grey"],
        ["`id`", "id of the source table (string)"],
        ["`sex`", "`female` (0) or `male` (1)"],
        ["`bone_age_months`", "bone age in months (float32)"],
        ["`calibration`", "true for the half of `validation` that is reserved for calibrating intervals"],
    ]
    sections = [
        f"# {_TITLES[kind]}",
        {"phantom": _PHANTOM_TERMS, "rsna": _RSNA_TERMS, "table": _TABLE_TERMS}[kind],
        f"```python\nfrom datasets import load_dataset\n\nload_dataset('{name}')  # or split='train'\n```",
        "## Fields\n\n" + _table(["field", "content"], fields),
        f"{stored} Every other 8-bit grey PNG or JPEG file is kept byte for byte, unless it carries text or EXIF "
        "metadata: then its pixels are stored again without loss and without them.",
        "## Splits\n\n" + manifest["split_rule"],
        _table(
            ["split", "rows", "female", "male", "mean (months)", "SD (months)", "for calibration"],
            [_summary_row(name, row) for name, row in manifest["splits"].items()]
            + [_summary_row("all", manifest["whole"])],
        ),
        f"Seed {settings['seed']}. SD is the sample standard deviation. Rows per age band, in months "
        "(lower bound included):",
        _table(
            ["split", *manifest["whole"]["age_bands"]],
            [
                [name, *row["age_bands"].values()]
                for name, row in [*manifest["splits"].items(), ("all", manifest["whole"])]
            ],
        ),
        "## Fingerprints of the labels\n\nSHA-256 over the lines `id,months` (two decimals, a line feed after each, "
        "sorted by id as numbers).",
        _table(
            ["rows of", "rows", "fingerprint", "known as"],
            [
                [f"source: {part['name']}", part["rows"], f"`{part['fingerprint']}`", part["version"] or "-"]
                for part in manifest["source"]
            ]
            + [
                [name, row["rows"], f"`{row['fingerprint']}`", ""]
                for name, row in [*manifest["splits"].items(), ("all", manifest["whole"])]
            ],
        ),
    ]
    if manifest["warnings"]:
        sections.append("## Warnings\n\n" + "\n".join(f"* {warning}" for warning in manifest["warnings"]))
    sections.append("## Left out\n\n" + _left_out(manifest["left_out"]))
    if kind == "rsna":
        sections.append("## Citation\n\n" + CITATION)
    sections.append(
        f"Written by boneage-hf {manifest['package_version']}; `prepared.json` says the same for machines."
    )
    return "\n\n".join(sections) + "\n"


def _summary_row(name: str, summary: Mapping[str, Any]) -> list[object]:
    sd = summary["sd_months"]
    return [
        name,
        summary["rows"],
        summary["female"],
        summary["male"],
        f"{summary['mean_months']:.2f}",
        "-" if sd is None else f"{sd:.2f}",
        summary["calibration"],
    ]


def _left_out(left_out: Mapping[str, Sequence[str]]) -> str:
    if not left_out:
        return "No row and no image of the source was left out."
    lines = []
    for kind, ids in left_out.items():
        more = f", and {len(ids) - _LISTED_IDS} more (see prepared.json)" if len(ids) > _LISTED_IDS else ""
        lines.append(f"* {len(ids)}: {PROBLEMS[kind]} ({', '.join(ids[:_LISTED_IDS])}{more})")
    return "\n".join(lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)
