"""Checks of reading and preparing on the user's own radiographs: polarity, and originals against their copies."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from boneage_hf.data import load_split
from boneage_hf.errors import InputError
from boneage_hf.image_processing_boneage import BoneAgeImageProcessor, has_light_background
from boneage_hf.label_tables import read_challenge
from boneage_hf.pipeline_boneage import BoneAgePipeline
from boneage_hf.radiograph import read

_TILE, _COLUMNS, _ROWS = 150, 10, 5
_FRAMES = {False: (0, 130, 0), True: (220, 0, 0)}


@dataclass(frozen=True)
class PolarityCheck:
    """`violations` of `n` radiographs got the same decision as their negative; `light` were called light.

    For pictures of at most 299 px the rule is odd by construction, so violations show a broken rule, not a wrong one;
    whether it is right is for the eye, on the contact sheets.
    """

    n: int
    violations: int
    light_ids: tuple[str, ...]
    sheets: tuple[Path, ...]
    judged: int
    judged_light: int

    def __str__(self) -> str:
        lines = [
            f"{self.violations} of {self.n} radiographs were decided like their negative",
            f"{len(self.light_ids)} of {self.n} were called light: {', '.join(self.light_ids) or 'none'}",
        ]
        if self.sheets:
            lines.append(
                f"{self.judged_light} of {self.judged} on the sheets were called light; count the wrong frames"
            )
        return "\n".join([*lines, *(f"wrote {path}" for path in self.sheets)])


def check_polarity(dataset: str | Path, *, split: str, sheets: Path | None, judged: int = 300) -> PolarityCheck:
    """Decide every radiograph of a split and its negative; write contact sheets of some to judge by eye.

    Args:
        dataset: folder written by `boneage prepare`.
        sheets: folder for the sheets, which show patients' radiographs: keep it where the data are. None for none.
        judged: how many radiographs, drawn with seed 0, the sheets show as the model gets them; red: called light.
    """
    rows = load_split(dataset, split)
    pictures = [(row["id"], np.asarray(row["image"].convert("L"))) for row in tqdm(rows, desc="read", unit="image")]
    decisions = {name: has_light_background(grey) for name, grey in pictures}
    violations = sum(has_light_background(255 - grey) == decisions[name] for name, grey in pictures)
    order = np.random.default_rng(0).permutation(len(pictures))[: judged if sheets is not None else 0]
    chosen = [(*pictures[index], decisions[pictures[index][0]]) for index in order]
    processor = BoneAgeImageProcessor(size={"height": _TILE, "width": _TILE}, source_size=299)
    return PolarityCheck(
        n=len(pictures),
        violations=violations,
        light_ids=tuple(name for name, decision in decisions.items() if decision),
        sheets=() if sheets is None else tuple(_write_sheets(chosen, sheets, processor)),
        judged=len(chosen),
        judged_light=sum(light for _, _, light in chosen),
    )


def _write_sheets(
    pictures: Sequence[tuple[str, np.ndarray, bool]], folder: Path, processor: BoneAgeImageProcessor
) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    cell = _TILE + 8
    paths: list[Path] = []
    for start in range(0, len(pictures), _COLUMNS * _ROWS):
        sheet = Image.new("RGB", (_COLUMNS * cell, _ROWS * cell))
        draw = ImageDraw.Draw(sheet)
        for position, (name, grey, light) in enumerate(pictures[start : start + _COLUMNS * _ROWS]):
            x, y = position % _COLUMNS * cell, position // _COLUMNS * cell
            draw.rectangle((x, y, x + cell - 1, y + cell - 1), fill=_FRAMES[light])
            sheet.paste(Image.fromarray(processor.prepare(grey)), (x + 4, y + 4))
            draw.text((x + 6, y + 5), name, fill=(255, 255, 0))
        paths.append(folder / f"polarity-{len(paths) + 1}.png")
        sheet.save(paths[-1])
    return paths


@dataclass(frozen=True)
class CopyCheck:
    """Absolute differences in months between predictions for originals and for their 299 px copies, sorted."""

    differences_months: tuple[float, ...]

    def __str__(self) -> str:
        differences = self.differences_months
        return (
            f"{len(differences)} pairs: median absolute difference {statistics.median(differences):.2f} months, "
            f"largest {differences[-1]:.2f}"
        )


def check_copies(pipe: BoneAgePipeline, challenge: Path, originals: Path) -> CopyCheck:
    """Predict radiographs at full resolution and their copies in the training folder of the challenge.

    Args:
        challenge: folder in the layout of the challenge, with the copies and the sexes.
        originals: folder of `ID.png`.

    Raises:
        InputError: no original has a copy.
    """
    table: Any = read_challenge(challenge)
    copies = table[table["path"].notna()].set_index("id")
    pairs = [(path, path.stem) for path in sorted(originals.glob("*.png")) if path.stem in copies.index]
    if not pairs:
        raise InputError("No original has a copy with the same id; name a folder of ID.png beside the challenge's.")
    differences = []
    for path, row_id in pairs:
        row = copies.loc[row_id]
        sex = row["sex"] if pipe.model.config.uses_sex else None
        months = [
            pipe(read(Path(file)), sex=sex, check_quality=False)["bone_age_months"] for file in (path, row["path"])
        ]
        differences.append(abs(months[0] - months[1]))
    return CopyCheck(tuple(sorted(differences)))
