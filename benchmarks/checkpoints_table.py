"""The table of the shipped checkpoints in README.md, from their `metrics.json`, their files and a measured speed."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from boneage_hf.card import BACKBONES
from boneage_hf.configuration_boneage import BoneAgeConfig
from boneage_hf.errors import InputError
from boneage_hf.files import write_text
from boneage_hf.hub import DEFAULT_CHECKPOINT, checkpoint_revision, load_pipeline, trained_on_rsna

RESULTS = Path(__file__).parent / "results"
CLONE = Path(__file__).parent.parent
NOT_MEASURED = "not measured"

#: What stands around the table in README.md.
START = "<!-- boneage-benchmark checkpoints --write README.md -->"
END = "<!-- end of checkpoints -->"

_HEADER = (
    *("checkpoint", "protocol", "n", "MAE (months)", "95 % interval", "RMSE", "within 12 months"),
    *("size", "CPU latency", "licence", "revision"),
)


@dataclass(frozen=True)
class Latency:
    """Median milliseconds from file to months on a CPU, and of what."""

    milliseconds: float
    what: str
    threads: int

    def __str__(self) -> str:
        return f"{self.milliseconds:.0f} ms ({self.what.removeprefix('file to months, ')}, {self.threads} threads)"


def shipped_checkpoints() -> list[Path]:
    """Folders with measured results: in the package, then, in a clone, in `checkpoints/` of the repository."""
    places = [DEFAULT_CHECKPOINT.parent]
    if (CLONE / "pyproject.toml").is_file():  # beside an installed package lies what others have installed
        places.append(CLONE / "checkpoints")
    return [path.parent for place in places for path in sorted(place.glob("*/metrics.json"))]


def checkpoints_text(folders: list[Path] | None = None, *, results: Path = RESULTS) -> str:
    """Table and the sentence under it, as README.md holds them.

    Args:
        folders: checkpoint folders with a `metrics.json`; by default [`shipped_checkpoints`].
        results: folder of result folders, where a `speed.csv` of these very weights gives the latency.

    Raises:
        InputError: a metrics.json is of other weights.
    """
    rows, notes = [_HEADER, ("---",) * len(_HEADER)], []
    for folder in shipped_checkpoints() if folders is None else folders:
        measured = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        pipe = load_pipeline(folder, device="cpu")
        if measured["revision"] != checkpoint_revision(pipe):
            raise InputError(f"The metrics.json of {folder.name} belongs to other weights: evaluate it again.")
        rows.append(_row(folder, pipe.model.config, measured, latency_of(measured["revision"], results)))
        notes.append(_note(folder.name, measured))
    return "\n".join(["\n".join(f"| {' | '.join(row)} |" for row in rows), "", *notes])


def _row(folder: Path, config: BoneAgeConfig, measured: dict[str, Any], latency: Latency | None) -> tuple[str, ...]:
    metrics = measured["metrics"]
    low, high = metrics["mae_months_ci95"]
    parts = [BACKBONES.get(config.backbone, config.backbone), config.pooling]
    parts += ["sex"] if config.uses_sex else []
    size = (folder / "model.safetensors").stat().st_size / 1e6
    return (
        f"`{folder.name}`: {', '.join([*parts, f'{config.image_size} px'])}",
        f"`{measured['protocol']}`",
        f"{measured['n']:,}",
        f"{metrics['mae_months']:.2f}",
        f"{low:.2f} to {high:.2f}",
        f"{metrics['rmse_months']:.2f}",
        f"{100 * metrics['within_12_months']:.1f} %",
        f"{size:.1f} MB",
        NOT_MEASURED if latency is None else str(latency),
        "research, non-commercial" if trained_on_rsna(config) else "not stated",
        f"`{measured['revision']}`",
    )


def _note(name: str, measured: dict[str, Any]) -> str:
    by_sex = {part["group"]: part["mae_months"] for part in measured["groups"] if part["grouping"] == "sex"}
    text = f"`{name}` by sex: girls {by_sex['female']:.2f}, boys {by_sex['male']:.2f} months."
    if measured.get("interval"):
        held = measured["interval"]["all"]
        text += (
            f" Its 90 % interval held {100 * held['coverage']:.1f} % of the readings at a mean width of "
            f"{held['mean_width_months']:.1f} months."
        )
    return text


def latency_of(revision: str, results: Path = RESULTS) -> Latency | None:
    """What `boneage-benchmark speed CHECKPOINT --out DIR` measured of these weights, if such a folder lies in
    `results`: from an original's size to months, else the first kind of file that was timed."""
    for table in sorted(results.glob("*/speed.csv")):
        manifest = json.loads((table.parent / "manifest.json").read_text(encoding="utf-8"))
        names = {one["checkpoint"] for one in manifest["checkpoints"] if one["revision"] == revision}
        with table.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if row["system"] in names and row["what"].startswith("file to months"):
                    return Latency(float(row["median_ms"]), row["what"], int(row["threads"]))
    return None


def write_into(document: Path) -> None:
    """Replace what stands between the two marks of a document, whole or not at all.

    Raises:
        InputError: the document has no such marks.
    """
    text = document.read_text(encoding="utf-8")
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise InputError(f"{document.name} has no place for the table: put {START} and {END} around it.")
    write_text(document, f"{before}{START}\n{checkpoints_text()}\n{END}{after}")
