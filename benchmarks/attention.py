"""Whether the attention map lies on the bones: its energy inside boxes that experts drew around ossification areas.

Energy is the share of a map's sum that falls inside boxes (the energy-based pointing game of Wang H et al.,
Score-CAM, CVPR Workshops 2020, doi 10.1109/CVPRW50498.2020.00020). It says nothing alone, so it stands against

* the boxes' share of the area: what a map without any preference reaches;
* a Gaussian at the centre of the picture: what "look at the middle" reaches;
* the same map with its cells shuffled: what its unevenness alone reaches;
* the map of another radiograph: what a map that is the same for every hand reaches.

All four are maps of the network's grid, enlarged like its own: bilinear between the centres of cells. The boxes are
those of Koitka S et al., PLoS ONE 2018;13(11):e0207496 (doi 10.1371/journal.pone.0207496), MIT licence, on radiographs
of the RSNA training set; where two annotators boxed one, the expert's count. They are measured as drawn and widened by
half a cell on each side, because a map cannot place energy more finely than its cells: on a 7 x 7 grid a finger
joint's box is less than half a cell wide, on 12 x 12 less than one. So nothing here tells which joint a map looks at;
it can tell fingers from wrist, and bones from the ground beside the hand.
"""

import hashlib
import io
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from boneage_hf.data import fingerprint, load_prepared, read_manifest
from boneage_hf.errors import InputError
from boneage_hf.explain import Part, part_of_map, upsample_attention
from boneage_hf.files import write_bytes, write_text
from boneage_hf.hub import checkpoint_revision, load_pipeline
from boneage_hf.pipeline_boneage import BoneAgePipeline
from boneage_hf.prepared import without_decoding
from boneage_hf.radiograph import read
from boneage_hf.sex import SEXES

from .protocol import PROTOCOLS
from .provenance import check_out, public_name, seal
from .statistics import paired_bootstrap
from .systems.base import labels_name, leakage
from .systems.checkpoint import trained_on

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The table of Koitka et al. that ships with this package, and its licence beside it.
BUILTIN_BOXES = Path(__file__).parent / "attention_boxes" / "ossification_boxes.csv"

#: Finger joints (distal and proximal interphalangeal, metacarpophalangeal), carpal area, distal forearm.
REGIONS = ("DIP", "PIP", "MCP", "Wrist", "Radius", "Ulna")

#: All boxes of a radiograph together.
WHOLE_SET = "all"

COLUMNS = ("id", "annotator", "region", "width_px", "height_px", "x_min_px", "y_min_px", "x_max_px", "y_max_px")

#: Of each radiograph those of the first annotator here that boxed it are used; others are left out.
ANNOTATORS = ("eval/expert", "train")

#: Half a cell and none, in cells of the map.
TOLERANCES = (0.0, 0.5)

#: Standard deviation of the centred Gaussian as a share of the picture's side: two of them reach the border. Ours.
GAUSSIAN_SIGMA = 0.25

#: Shuffles per map; the seed of all shuffles and of the bootstrap.
SHUFFLES, DRAWS, SEED = 20, 2000, 0

THIRDS = ("youngest", "middle", "oldest")

#: Of a radiograph that may be among data that the checkpoint has seen, as nothing shows that it is not.
UNKNOWN = "seen or not: unknown"

#: The data set's training part and what else the checkpoint was trained on; known not to be seen; neither is known.
DATA_PARTS = ("training", "unseen", UNKNOWN)

#: What the energy is held against -> column.
RIVALS = {
    "area": "area_share",
    "gaussian": "gaussian_share",
    "shuffled_cells": "shuffled_cells_share",
    "other_map": "other_map_share",
}

Boxes = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class BoxedMap:
    """One radiograph with its attention map and boxes.

    Attributes:
        attention: (h, w), raw values above 0.
        boxes: region -> (k, 4): left, top, right, bottom as shares of the radiograph's width and height.
        size: height and width in px on which energy is measured, those of the stored picture.
        part: of the map that shows the radiograph.
        bone_age_months: reference bone age.
        data_part: one of `DATA_PARTS`: what the checkpoint has seen of the radiograph.
    """

    attention: np.ndarray
    boxes: Boxes
    size: tuple[int, int]
    part: Part
    bone_age_months: float
    data_part: str


@dataclass(frozen=True)
class AttentionTest:
    """Outcome: `table` has the columns of `attention.csv`, see [`measure`]."""

    table: pd.DataFrame
    manifest: dict[str, Any]
    files: tuple[Path, ...]

    def __str__(self) -> str:
        found = self.table.query("region == 'all' and third == 'all'")
        lines = [
            f"{row.part}, n = {row.n}, boxes widened by {row.tolerance_cells:g} cell: energy {row.energy:.3f}, area "
            f"{row.area_share:.3f}, Gaussian {row.gaussian_share:.3f}, shuffled cells {row.shuffled_cells_share:.3f}, "
            f"other map {row.other_map_share:.3f}"
            for row in found.itertuples()
        ]
        return "\n".join([*lines, self.manifest["verdict"], *(f"wrote {path}" for path in self.files)])


def load_boxes(path: str | Path = "builtin") -> dict[str, Boxes]:
    """Boxes per radiograph id, as shares of its width and height.

    Args:
        path: CSV with the columns `COLUMNS`, pixels of the stated original size, or "builtin".

    Returns:
        id -> region -> (k, 4): left, top, right, bottom in [0, 1].

    Raises:
        InputError: the file cannot be read, lacks a column, or a box is empty or leaves its picture.
    """
    source = BUILTIN_BOXES if str(path) == "builtin" else Path(path)
    try:
        table = pd.read_csv(source, dtype={"id": str, "annotator": str, "region": str})
    except (OSError, ValueError):
        raise InputError(
            'The table of boxes cannot be read; give a CSV, or "builtin" for the one that ships.'
        ) from None
    missing = [column for column in COLUMNS if column not in table.columns]
    if missing:
        raise InputError(f"The table of boxes lacks the column {', '.join(missing)}; it needs {', '.join(COLUMNS)}.")
    unknown = sorted(set(table["region"]) - set(REGIONS))
    if unknown:
        raise InputError(f"The table of boxes has the unknown region {unknown[0]}; known are {', '.join(REGIONS)}.")
    pixels = table[list(COLUMNS[3:])].apply(pd.to_numeric, errors="coerce")
    width, height = pixels["width_px"], pixels["height_px"]
    inside = (pixels["x_min_px"] >= 0) & (pixels["x_max_px"] <= width) & (pixels["x_min_px"] < pixels["x_max_px"])
    inside &= (pixels["y_min_px"] >= 0) & (pixels["y_max_px"] <= height) & (pixels["y_min_px"] < pixels["y_max_px"])
    if not inside.all():
        line = int(np.flatnonzero(~inside)[0]) + 2
        raise InputError(f"Line {line} of the table of boxes is no box within its picture; correct or remove it.")
    shares = pd.DataFrame(
        {
            "left": pixels["x_min_px"] / width,
            "top": pixels["y_min_px"] / height,
            "right": pixels["x_max_px"] / width,
            "bottom": pixels["y_max_px"] / height,
        }
    )
    found: dict[str, Boxes] = {}
    for annotator in ANNOTATORS:
        for row_id, rows in table[table["annotator"] == annotator].groupby("id", sort=False):
            found.setdefault(
                str(row_id), {str(name): shares.loc[part.index].to_numpy() for name, part in rows.groupby("region")}
            )
    if not found:
        raise InputError(f"The table of boxes has no row whose annotator is {' or '.join(ANNOTATORS)}.")
    return found


def box_mask(boxes: np.ndarray, size: tuple[int, int], *, margin: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    """The pixels whose centre lies in at least one box.

    Args:
        boxes: (k, 4): left, top, right, bottom as shares of width and height.
        size: height and width in px.
        margin: by how much each box is widened on each side: shares of width and of height.

    Returns:
        (height, width) bool.
    """
    height, width = size
    left, top, right, bottom = boxes.T[:, :, None]  # (k, 1) each
    x, y = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    columns = (x >= left - margin[0]) & (x < right + margin[0])  # (k, width)
    rows = (y >= top - margin[1]) & (y < bottom + margin[1])  # (k, height)
    return np.asarray((rows[:, :, None] & columns[:, None, :]).any(axis=0))


def energy_shares(maps: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Share of each map's sum that lies inside each mask.

    Args:
        maps: (m, height, width), not negative, none all zero.
        masks: (k, height, width) bool.

    Returns:
        (k, m) in [0, 1].
    """
    values = np.asarray(maps, dtype=np.float32).reshape(len(maps), -1)  # (m, pixels)
    inside = np.asarray(masks, dtype=np.float32).reshape(len(masks), -1)  # (k, pixels)
    return np.asarray(inside @ values.T / values.sum(axis=1), dtype=np.float64)


def centred_gaussian(height: int, width: int) -> np.ndarray:
    """(height, width): a Gaussian at the centre of the picture, at the centres of a map's cells."""
    y, x = (np.arange(height) + 0.5) / height - 0.5, (np.arange(width) + 0.5) / width - 0.5
    return np.asarray(np.exp(-(y[:, None] ** 2 + x[None, :] ** 2) / (2 * GAUSSIAN_SIGMA**2)))


def _cell(item: BoxedMap) -> tuple[float, float]:
    """Width and height of a cell as shares of the radiograph's."""
    left, top, right, bottom = item.part
    rows, columns = item.attention.shape
    return 1 / (columns * (right - left)), 1 / (rows * (bottom - top))


def shares_of(
    item: BoxedMap, other: np.ndarray, *, generator: np.random.Generator, tolerances: Sequence[float] = TOLERANCES
) -> Iterator[dict[str, Any]]:
    """Energy and what it is held against for one radiograph, by tolerance and region.

    Args:
        other: (h, w), the map of another radiograph.

    Yields:
        `tolerance_cells`, `region`, `energy` and the columns of `RIVALS`, all shares in [0, 1].
    """
    rows, columns = item.attention.shape
    shuffled = [generator.permutation(item.attention.ravel()).reshape(rows, columns) for _ in range(SHUFFLES)]
    grids = [item.attention, centred_gaussian(rows, columns), other, *shuffled]
    maps = np.stack([upsample_attention(grid, *item.size, part=item.part) for grid in grids])
    cell_width, cell_height = _cell(item)
    regions = {WHOLE_SET: np.concatenate(list(item.boxes.values())), **item.boxes}
    groups = [(tolerance, region) for tolerance in tolerances for region in regions]
    masks = np.stack(
        [
            box_mask(regions[region], item.size, margin=(tolerance * cell_width, tolerance * cell_height))
            for tolerance, region in groups
        ]
    )
    for (tolerance, region), mask, shares in zip(groups, masks, energy_shares(maps, masks), strict=True):
        boxes = regions[region]
        yield {
            "tolerance_cells": tolerance,
            "region": region,
            "energy": shares[0],
            "area_share": mask.mean(),
            "gaussian_share": shares[1],
            "other_map_share": shares[2],
            "shuffled_cells_share": shares[3:].mean(),
            "box_width_cells": float(np.median(boxes[:, 2] - boxes[:, 0])) / cell_width,
            "box_height_cells": float(np.median(boxes[:, 3] - boxes[:, 1])) / cell_height,
        }


def measure(items: Sequence[BoxedMap], *, seed: int = SEED, draws: int = DRAWS) -> pd.DataFrame:
    """Mean shares over groups of radiographs, with paired bootstrap intervals.

    Returns:
        One row per `part` ("all" and `DATA_PARTS`), `third` of the bone age over all items
        ("all", "youngest", "middle", "oldest"), `region` and `tolerance_cells` with images: `n`, mean `energy` with
        `energy_low`, `energy_high`, the means of the four rivals, and for each rival `over_<rival>`, the mean
        difference energy - rival with `_low`, `_high`; medians of the boxes' sides in cells.

    Raises:
        InputError: there are fewer than three items.
    """
    if len(items) < 3:
        raise InputError(f"{len(items)} radiographs with boxes are too few for thirds of the age; give three or more.")
    generator = np.random.default_rng(seed)
    # Each radiograph gets the map of another one, every map once.
    cycle = generator.permutation(len(items))
    following = dict(zip(cycle.tolist(), np.roll(cycle, 1).tolist(), strict=True))
    months = np.array([item.bone_age_months for item in items])
    third = np.searchsorted(third_edges(months), months, side="right")
    records = []
    for index, item in enumerate(items):
        known = {
            "index": index,
            "part": item.data_part,
            "third": THIRDS[third[index]],
        }
        other = items[following[index]].attention
        records += [known | shares for shares in shares_of(item, other, generator=generator)]
    return _grouped(pd.DataFrame(records), seed=seed, draws=draws)


def third_edges(months: np.ndarray) -> tuple[float, float]:
    """The two ages in months between the thirds; a child of exactly that age is in the older third."""
    low, high = np.quantile(months, [1 / 3, 2 / 3])
    return float(low), float(high)


def _grouped(records: pd.DataFrame, *, seed: int, draws: int) -> pd.DataFrame:
    rows = []
    for part in ("all", *DATA_PARTS):
        for third in ("all", *THIRDS):
            chosen = records[(part == "all") | (records["part"] == part)]
            chosen = chosen[(third == "all") | (chosen["third"] == third)]
            for (tolerance, region), group in chosen.groupby(["tolerance_cells", "region"], sort=False):
                energy = group["energy"].to_numpy()
                # Its fields say months, which is what systems' errors are; these are shares.
                own = paired_bootstrap(energy, np.zeros(len(energy)), draws=draws, seed=seed)
                row: dict[str, Any] = {
                    "part": part,
                    "third": third,
                    "region": region,
                    "tolerance_cells": tolerance,
                    "n": len(group),
                    "energy": own.difference_months,
                    "energy_low": own.low_months,
                    "energy_high": own.high_months,
                }
                row |= {column: group[column].mean() for column in RIVALS.values()}
                for rival, column in RIVALS.items():
                    over = paired_bootstrap(energy, group[column].to_numpy(), draws=draws, seed=seed)
                    row |= {f"over_{rival}": over.difference_months}
                    row |= {f"over_{rival}_low": over.low_months, f"over_{rival}_high": over.high_months}
                row |= {side: group[side].median() for side in ("box_width_cells", "box_height_cells")}
                rows.append(row)
    return pd.DataFrame(rows)


def verdict(table: pd.DataFrame) -> str:
    """One sentence on the reference's claim that its map finds the relevant bones in older children.

    It counts as borne out where, in the oldest third of the radiographs that were not trained on and with half a cell
    of tolerance, the energy in all boxes exceeds each of the four rivals with its whole 95 % interval.
    """
    rows = table.query("part == 'unseen' and third == 'oldest' and region == 'all' and tolerance_cells == 0.5")
    if rows.empty:
        return "No radiograph of the oldest third is known to be unseen, so the claim cannot be tested here."
    row = rows.iloc[0]
    names = {
        "area": "the boxes' share of the area",
        "gaussian": "a centred Gaussian",
        "shuffled_cells": "its own cells shuffled",
        "other_map": "the map of another radiograph",
    }
    found = [
        f"{'more than' if row[f'over_{rival}_low'] > 0 else 'less than' if row[f'over_{rival}_high'] < 0 else 'like'} "
        f"{name} ({100 * row[f'over_{rival}']:+.1f} points [{100 * row[f'over_{rival}_low']:+.1f}, "
        f"{100 * row[f'over_{rival}_high']:+.1f}])"
        for rival, name in names.items()
    ]
    borne_out = all(row[f"over_{rival}_low"] > 0 for rival in names)
    return (
        f"The claim that the map finds the relevant bones in older children is {'' if borne_out else 'not '}borne out "
        f"by this checkpoint: in the {row['n']} unseen radiographs of the oldest third {100 * row['energy']:.1f} % of "
        f"its energy lies within half a cell of the bones' boxes, {', '.join(found)}."
    )


def box_cells(items: Sequence[BoxedMap]) -> dict[str, float]:
    """Region -> median of its boxes' larger side in cells of the map: below 1 a map cannot show it alone."""
    sides: dict[str, list[float]] = {}
    for item in items:
        rows, columns = item.attention.shape
        left, top, right, bottom = item.part
        for region, boxes in item.boxes.items():
            across = (boxes[:, 2] - boxes[:, 0]) * (right - left) * columns
            down = (boxes[:, 3] - boxes[:, 1]) * (bottom - top) * rows
            sides.setdefault(region, []).extend(np.maximum(across, down).tolist())
    return {region: round(float(np.median(values)), 2) for region, values in sides.items() if values}


_FILES = ("attention.csv", "attention.png", "manifest.json")


def attention_of_checkpoint(
    checkpoint: str, dataset: str | Path, *, out: Path, boxes: str | Path = "builtin", progress: bool = True
) -> AttentionTest:
    """Predict every boxed radiograph of a prepared data set; write `attention.csv`, `attention.png`, `manifest.json`.

    Args:
        checkpoint: folder, Hub id or `"default"`.
        dataset: folder written by `boneage prepare`; radiographs are matched to boxes by id in all its splits.
        boxes: as `load_boxes` takes them.

    Raises:
        InputError: the boxes, the data or the checkpoint cannot be used, no radiograph has boxes, or `out` holds
            something else or cannot be written.
    """
    check_out(out, _FILES, task="attention")
    by_id = load_boxes(boxes)
    prepared = read_manifest(dataset)
    rows = list(_boxed_rows(load_prepared(dataset), by_id))
    if not rows:
        raise InputError("No radiograph of this data set has boxes: ids do not match; give the table of its boxes.")
    pipe = load_pipeline(checkpoint)
    revision = checkpoint_revision(pipe)
    check_out(out, _FILES, task="attention", revision=revision)
    seen = trained_on(pipe.model.config.provenance)
    parts = data_parts(seen, prepared["splits"])
    items = [
        _boxed_map(pipe, row, by_id[row["id"]], data_part=parts.get(row["split"], UNKNOWN))
        for row in tqdm(rows, desc="attention", disable=not progress)
    ]
    table = measure(items)
    source = BUILTIN_BOXES if str(boxes) == "builtin" else Path(boxes)
    months = np.array([item.bone_age_months for item in items])
    counts = pd.Series([row["split"] for row in rows]).value_counts()
    text = table.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    manifest = {
        "task": "attention",
        "table_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "checkpoint": public_name(checkpoint),
        "revision": revision,
        "n": len(items),
        "n_by_split": {str(name): int(count) for name, count in counts.items()},
        "trained_on_this_training_part": _trained_on(seen, prepared["splits"]),
        "grid": list(items[0].attention.shape),
        "box_cells": box_cells(items),
        "third_edges_months": list(third_edges(months)),
        "data_fingerprint": fingerprint([row["id"] for row in rows], months.tolist()),
        "boxes_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "gaussian_sigma": GAUSSIAN_SIGMA,
        "shuffles": SHUFFLES,
        "bootstrap": {"draws": DRAWS, "seed": SEED},
        "verdict": verdict(table),
        **seal(),
    }
    try:
        write_text(out / "attention.csv", text)
        write_bytes(out / "attention.png", _png(draw(items, table)))
        write_text(out / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"The results cannot be written ({error.strerror}); give another --out.") from None
    return AttentionTest(table, manifest, tuple(out / name for name in _FILES))


def _boxed_rows(splits: Mapping[str, Any], by_id: Mapping[str, Boxes]) -> Iterator[dict[str, Any]]:
    for name, split in splits.items():
        undecoded = without_decoding(split)
        places = [place for place, row_id in enumerate(undecoded["id"]) if row_id in by_id]
        for row in undecoded.select(places):
            yield row | {"split": name}


def _boxed_map(pipe: BoneAgePipeline, row: Mapping[str, Any], boxes: Boxes, *, data_part: str) -> BoxedMap:
    try:
        radiograph = read(row["image"]["bytes"])
        answer = pipe(radiograph, sex=SEXES[row["sex"]], check_quality=False)
    except InputError as error:
        raise InputError(f"Image of row {row['id']}: {error}") from None
    processor = pipe.image_processor
    width, height = radiograph.image.size
    return BoxedMap(
        attention=answer["attention"],
        boxes=boxes,
        size=(height, width),
        part=part_of_map((width, height), size=processor.size, resize_mode=processor.resize_mode),
        bone_age_months=float(row["bone_age_months"]),
        data_part=data_part,
    )


def data_parts(seen: Sequence[str] | None, splits: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Split of a prepared data set -> which of `DATA_PARTS` its radiographs are to a checkpoint.

    Args:
        seen: what the checkpoint, its initial weights and its teacher were trained on, as `trained_on` of a system.
        splits: those of prepared.json, which share no image; each with the `fingerprint` of its labels.
    """
    names = {split: labels_name(str(content["fingerprint"])) for split, content in splits.items()}
    by_labels = {protocol.ground_truth_fingerprint: protocol for protocol in PROTOCOLS.values()}
    parts = {}
    for split, name in names.items():
        if split == "train" or (seen is not None and name in seen):
            parts[split] = "training"
            continue
        # Other splits of this data set are known to be disjoint; of other data a protocol of these labels knows it.
        rest = None if seen is None else [part for part in seen if part not in names.values()]
        protocol = by_labels.get(str(splits[split]["fingerprint"]))
        found = "none" if rest == [] else "unknown" if protocol is None else leakage(rest, protocol)
        parts[split] = {"none": "unseen", "unknown": UNKNOWN}.get(found, "training")
    return parts


def _trained_on(seen: Sequence[str] | None, splits: Mapping[str, Mapping[str, Any]]) -> bool | None:
    """Whether the data set's training part is among what a checkpoint has seen; None where that is not known."""
    own = splits.get("train", {}).get("fingerprint")
    return True if seen is not None and own is not None and labels_name(str(own)) in seen else None


def draw(items: Sequence[BoxedMap], table: pd.DataFrame) -> "Figure":
    """Aggregates only: the mean map by third with the regions' mean places, and energy against its rivals.

    Maps differ in range, so each counts with its own sum before the mean.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    figure = Figure(figsize=(11, 7.6), layout="constrained")
    panels: Any = figure.subfigures(2, 1, height_ratios=(1, 1.15))  # an array, whatever its stub says
    upper, lower = panels
    months = np.array([item.bone_age_months for item in items])
    third = np.searchsorted(third_edges(months), months, side="right")
    shares = np.stack([item.attention / item.attention.sum() for item in items])  # (n, h, w)
    means = [shares[third == index].mean(axis=0) for index in range(len(THIRDS))]
    top = max(float(mean.max()) for mean in means)
    axes = upper.subplots(1, len(THIRDS))
    for index, (axis, mean) in enumerate(zip(axes, means, strict=True)):
        shown = axis.imshow(mean, cmap="cividis", vmin=0, vmax=top, extent=(0, 1, 1, 0), interpolation="nearest")
        members = [item for item, place in zip(items, third, strict=True) if place == index]
        for region in REGIONS:
            drawn = [item.boxes[region].mean(axis=0) for item in members if region in item.boxes]
            if drawn:
                left, head, right, foot = np.mean(drawn, axis=0)
                box = Rectangle((left, head), right - left, foot - head, fill=False, edgecolor="white", linewidth=1.2)
                axis.add_patch(box)
                # The forearm's and the wrist's boxes overlap: their names stand apart.
                x, side = (left - 0.01, "right") if region == "Ulna" else (right + 0.01, "left")
                y = foot - 0.01 if region == "Radius" else (head + foot) / 2
                axis.text(x, y, region, color="white", fontsize=7, ha=side, va="center")
        span = f"{months[third == index].min():.0f} to {months[third == index].max():.0f} months"
        axis.set(title=f"{THIRDS[index]}, {span}, n = {len(members)}", xticks=[], yticks=[])
    upper.colorbar(shown, ax=axes, label="mean share of the map's energy per cell", fraction=0.02)
    upper.suptitle("Mean attention map by age third; boxes: mean place and size of a region's box", fontsize=10)
    draw_shares(lower, table)
    return figure


#: Okabe & Ito, Color Universal Design (2008), with a marker each for print without colour.
_MARKS = {
    "energy": ("attention map", "o", "#000000"),
    "area_share": ("boxes' share of the area", "s", "#0072B2"),
    "gaussian_share": ("centred Gaussian", "^", "#E69F00"),
    "shuffled_cells_share": ("cells shuffled", "D", "#009E73"),
    "other_map_share": ("another radiograph's map", "v", "#CC79A7"),
}


def draw_shares(figure: Any, table: pd.DataFrame) -> None:
    """Shares by region of unseen radiographs, left, and of all boxes by part and third, right; half a cell."""
    half = table[table["tolerance_cells"] == 0.5]
    unseen = half.query("part == 'unseen' and third == 'all'")
    if unseen.empty:
        unseen = half.query("part == 'all' and third == 'all'")
    groups = half.query("region == 'all' and (part != 'all' or third == 'all')")
    left, right = figure.subplots(1, 2, sharey=False)
    names = {f"{row.region}": row for row in unseen.itertuples()}
    _draw_marks(left, names, f"by region, {unseen['part'].iloc[0]} radiographs")
    by_part = {f"{textwrap.fill(str(row.part), 9)}\n{row.third}": row for row in groups.itertuples()}
    _draw_marks(right, by_part, "all boxes, by part and age third")
    left.set_ylabel("share inside boxes widened by half a cell")
    left.legend(fontsize=8, facecolor="white", framealpha=1, edgecolor="none")


def _draw_marks(axis: Any, rows: Mapping[str, Any], title: str) -> None:
    for offset, (column, (label, mark, colour)) in enumerate(_MARKS.items()):
        places = np.arange(len(rows)) + 0.14 * (offset - (len(_MARKS) - 1) / 2)
        values = np.array([getattr(row, column) for row in rows.values()])
        ends = None
        if column == "energy":
            ends = [
                values - np.array([row.energy_low for row in rows.values()]),
                np.array([row.energy_high for row in rows.values()]) - values,
            ]
        axis.errorbar(places, values, yerr=ends, fmt=mark, color=colour, label=label, markersize=5, capsize=2)
    axis.set_xticks(range(len(rows)), list(rows), fontsize=8)
    axis.set(title=title, ylim=(0, None))
    axis.grid(axis="y", color="#d0d0d0", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
