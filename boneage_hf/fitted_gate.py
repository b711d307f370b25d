"""`boneage fit-gate`: a checkpoint and its prepared data set in, the checkpoint with a quality gate out.

A few thousand training radiographs go through the backbone, upright and changed (turned, mirrored, cut off); what is
kept are the numbers of a [`boneage_hf.quality.HandGate`]. Its limits come from the calibration half of validation, so
that a stated share of hands is refused. No picture of anything else than a hand is used, and no test image.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from .calibrated_checkpoints import check_split, load_for_change, made_by, save_changed
from .data import fingerprint, load_split
from .errors import InputError
from .hub import checkpoint_revision
from .image_processing_boneage import BoneAgeImageProcessor
from .memory import keep_freed_memory
from .modeling_boneage import BoneAgeModel
from .prepared import prepare_image, without_decoding
from .quality import POSES, HandGate

#: Components of the Gaussian. Ours: the leading directions in which hands differ, age first.
COMPONENTS = 64

#: Cells a side on which pose and cut are seen. Ours: fingers, palm and wrist; all backbones have finer grids.
CELLS = 3

#: Upright training radiographs, and as many others that are changed. Ours: 47 for each component.
IMAGES = 3000

#: Shares of calibration hands above the limits; ours. The first is three tenths of the aim for hands that are refused:
#: a child without an answer is worse than a plot with a warning, and other hands may be farther away.
REFUSED_SHARE, WARNED_SHARE, CUT_OFF_SHARE = 0.003, 0.02, 0.01

#: Least log odds for a turn (99 to 1), and the share of calibration hands that may be above: the RSNA training images
#: hold about one in a thousand that lie on their side.
TURN_LOG_ODDS, TURNED_SHARE = math.log(99), 0.002

#: Share of calibration hands that may be called mirrored. More than are turned: the network was trained on mirrored
#: hands too, so that nothing but the warning comes of it.
MIRRORED_SHARE = 0.005

#: Shares of the picture that a cut takes away: of the top, and of the left or right. Ours: with the margins of RSNA
#: radiographs, finger tips or the outer finger or thumb are then outside.
CUT_TOP, CUT_SIDE = (0.20, 0.35), (0.25, 0.40)

#: Fewest images for the limits. Below 333 none of REFUSED_SHARE is left over, and the limit is the largest distance.
MIN_CALIBRATION = 20

#: L2 penalty of the linear classifiers, on the mean log loss.
PENALTY = 1e-3

#: Changes of training images in turn: 1 to 7 are poses, then cuts of the top, left and right. Mirrored and upright is
#: what right hands are, and the hardest to see.
CHANGES = (1, 4, 2, 8, 4, 3, 9, 5, 4, 6, 10, 7)


@dataclass(frozen=True)
class Pooled:
    """Features of n images: `mean` (n, C) over the whole map, `cells` (n, C, cells, cells) over coarse cells."""

    mean: torch.Tensor
    cells: torch.Tensor


def changed(pixels: np.ndarray, change: int, rng: np.random.Generator) -> np.ndarray:
    """A picture (S, S) in another pose (1 to 7, see `quality.POSES`), or cut off at top, left or right (8, 9, 10)."""
    if change < POSES:
        # The inverse of `quality.to_standard_pose`.
        return np.ascontiguousarray(np.rot90(pixels[:, ::-1] if change >= 4 else pixels, change % 4))
    side = len(pixels)
    cut = round(side * rng.uniform(*(CUT_TOP if change == POSES else CUT_SIDE)))
    rest = (pixels[cut:], pixels[:, cut:], pixels[:, : side - cut])[change - POSES]
    enlarged = Image.fromarray(np.ascontiguousarray(rest)).resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(enlarged)


@torch.inference_mode()
def pool(
    model: BoneAgeModel,
    processor: BoneAgeImageProcessor,
    pictures: Sequence[np.ndarray],
    *,
    bfloat16: bool,
    batch_size: int,
    name: str,
    progress: bool,
) -> Pooled:
    """Prepared pictures (S, S) -> their pooled features, as the pipeline's forward pass makes them."""
    if model.device.type == "cpu":
        keep_freed_memory()
    means, cells = [], []
    with tqdm(total=len(pictures), desc=f"features of {name}", unit="image", disable=not progress) as bar:
        for start in range(0, len(pictures), batch_size):
            batch = torch.from_numpy(np.stack(pictures[start : start + batch_size])).to(model.device)
            values = processor.to_pixel_values(batch).to(model.dtype)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bfloat16):
                maps = model.backbone(values)
            maps = model.feature_norm(maps.to(model.feature_norm.weight.dtype)).float().cpu()
            means.append(maps.mean(dim=(2, 3)))
            cells.append(nn.functional.adaptive_avg_pool2d(maps, CELLS))
            bar.update(len(batch))
    return Pooled(torch.cat(means), torch.cat(cells))


def fit_gate(hands: Pooled, others: Pooled, changes: Sequence[int] | np.ndarray, calibration: Pooled) -> HandGate:
    """Fit all numbers of a gate.

    Args:
        hands: upright training images.
        others: changed training images, and `changes` what was done to each (1 to 10).
        calibration: upright images that had no part in the fit; they give the limits.

    Returns:
        The gate, its tensors rounded to what float16 can store; its limits are those of the rounded tensors.

    Raises:
        InputError: fewer than MIN_CALIBRATION images for the limits, or fewer hands than twice the components.
    """
    n, channels = hands.mean.shape
    components = min(COMPONENTS, channels // 2)
    if n < 2 * components or len(calibration.mean) < MIN_CALIBRATION:
        raise InputError(
            f"A gate needs at least {2 * components} training and {MIN_CALIBRATION} calibration images, not {n} and "
            f"{len(calibration.mean)}: prepare more."
        )
    mean = hands.mean.double()
    covariance = torch.cov(mean.T)
    values, vectors = torch.linalg.eigh(covariance)  # rising
    gate = HandGate(
        {
            "components": components,
            "cells": hands.cells.shape[-1],
            "residual_variance": float(torch.clamp(values[:-components].mean(), min=1e-6 * float(values.mean()))),
            "refuse_above": 1.0,
            "warn_above": 1.0,
            "turn_above": 0.0,
            "mirror_above": 0.0,
            "cut_off_above": 0.0,
        },
        channels,
    )
    _store(gate.center, mean.mean(0))
    _store(gate.basis, vectors[:, -components:].flip(1).T)
    _store(gate.scale, values[-components:].flip(0).clamp_min(1e-9).sqrt())

    upright, turned = gate.cells(hands.cells), gate.cells(others.cells)
    what = torch.as_tensor(changes)
    is_pose = what < POSES
    weight, bias = _classifier(
        torch.cat([upright, turned[is_pose]]), torch.cat([torch.zeros(n, dtype=torch.long), what[is_pose]]), POSES
    )
    _store(gate.pose_weight, weight)
    _store(gate.pose_bias, bias)
    # A cut is told from whole hands in the pose that the gate sees it in.
    weight, bias = _classifier(
        torch.cat([upright, turned[~is_pose]]),
        torch.cat([torch.zeros(n, dtype=torch.long), torch.ones(int((~is_pose).sum()), dtype=torch.long)]),
        2,
    )
    _store(gate.cut_off_weight, weight[1:] - weight[:1])
    _store(gate.cut_off_bias, bias[1:] - bias[:1])

    distance = gate.distance(calibration.mean[:, :, None, None])
    cells = gate.cells(calibration.cells)
    scores = gate.pose_scores(cells)
    gate.settings |= {
        "refuse_above": _upper(distance, REFUSED_SHARE),
        "warn_above": _upper(distance, WARNED_SHARE),
        "turn_above": max(TURN_LOG_ODDS, _upper(gate.turn_odds(scores)[:, 1:].max(1).values, TURNED_SHARE)),
        "mirror_above": max(0.0, _upper(scores[:, 4] - scores[:, 0], MIRRORED_SHARE)),
        "cut_off_above": _upper(gate.cut_off_score(cells), CUT_OFF_SHARE),
    }
    return gate


def _store(buffer: torch.Tensor, values: torch.Tensor) -> None:
    buffer.copy_(values.to(torch.float16))


def _classifier(inputs: torch.Tensor, labels: torch.Tensor, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Multinomial logistic regression with an L2 penalty, classes weighted alike: weight (classes, d), bias."""
    share = torch.bincount(labels, minlength=classes).clamp_min(1).double()
    inputs = inputs.double()
    # In units of the inputs' own spread, so that the penalty treats them alike.
    spread = inputs.std(0).clamp_min(1e-6)
    weight = torch.zeros(classes, inputs.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        scores = nn.functional.linear(inputs / spread, weight, bias)
        value = nn.functional.cross_entropy(scores, labels, weight=1 / share) + PENALTY * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach() / spread, bias.detach()


def _upper(values: torch.Tensor, share: float) -> float:
    """The split-conformal upper quantile: a further exchangeable value is above with a probability of at most `share`;
    the largest value where n is too small for that."""
    ordered = values.double().sort().values
    return float(ordered[min(len(ordered), math.ceil((len(ordered) + 1) * (1 - share))) - 1])


@dataclass(frozen=True, kw_only=True)
class FittedGate:
    """What [`fit_gate_of_checkpoint`] found.

    Attributes:
        gate: as in the new config.
        n, n_changed, n_calibration: training images, upright and changed, and calibration images.
        turned: calibration images that the gate would turn or mirror.
        found: of the calibration images, changed: name of the change -> (recognised, of).
        revision: of the new checkpoint.
    """

    gate: dict[str, Any]
    n: int
    n_changed: int
    n_calibration: int
    turned: int
    found: dict[str, tuple[int, int]]
    revision: str

    def __str__(self) -> str:
        lines = [
            f"gate from {self.n} training images and {self.n_changed} others that were turned, mirrored or cut off; "
            f"limits from {self.n_calibration} calibration images",
            f"distance: warns above {self.gate['warn_above']:.3f}, refuses above {self.gate['refuse_above']:.3f}",
            f"{self.turned} of {self.n_calibration} calibration images would be turned or mirrored as they are",
            *(f"{name}: {right} of {of} calibration images recognised" for name, (right, of) in self.found.items()),
            "measure it on the test split: boneage-benchmark gate",
        ]
        return "\n".join([*lines, f"revision {self.revision}"])


def fit_gate_of_checkpoint(
    checkpoint: str,
    dataset: str | Path,
    out: Path,
    *,
    images: int = IMAGES,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = True,
) -> FittedGate:
    """Write a checkpoint with a quality gate; one that it has is replaced. Answers stay as they are.

    Args:
        checkpoint: folder, Hub id or `"default"`.
        dataset: folder written by `boneage prepare`, the one the weights were trained on.
        out: folder of the new checkpoint.
        images: upright training images, and as many others that are changed; all of a smaller training part.
        seed: of which images, and of the changes.

    Raises:
        InputError: the output is the checkpoint itself or holds something else; the data set is split otherwise than
            that of the training; too few images.
    """
    pipe = load_for_change(checkpoint, out)
    model, processor = pipe.model.eval(), pipe.image_processor
    revision = checkpoint_revision(pipe)
    selection = load_split(dataset, "selection")
    check_split(model.config.provenance, selection["id"], selection["bone_age_months"])
    model.drop_gate()
    rng = np.random.default_rng(seed)
    train, held_out = load_split(dataset, "train"), load_split(dataset, "calibration")
    order = rng.permutation(len(train))
    count = min(images, len(train) // 2)

    def pooled(rows: Any, changes: np.ndarray | None, name: str) -> Pooled:
        undecoded = without_decoding(rows)
        pictures = [
            prepare_image(image["bytes"], processor, row_id=row_id)
            for row_id, image in zip(undecoded["id"], undecoded["image"], strict=True)
        ]
        if changes is not None:
            pictures = [changed(picture, int(change), rng) for picture, change in zip(pictures, changes, strict=True)]
        # bfloat16 is right for what is fitted; limits belong to the precision of answers.
        bfloat16 = rows is not held_out or changes is not None
        return pool(model, processor, pictures, bfloat16=bfloat16, batch_size=batch_size, name=name, progress=progress)

    hands, others = train.select(order[:count]), train.select(order[count : 2 * count])
    # In turn, so that each change is seen on as many images.
    changes, test_changes = (np.resize(CHANGES, n) for n in (count, len(held_out)))
    calibration = pooled(held_out, None, "calibration")
    gate = fit_gate(pooled(hands, None, "hands"), pooled(others, changes, "changed hands"), changes, calibration)
    turned = _poses(gate, calibration)
    found = _recognised(gate, pooled(held_out, test_changes, "changed calibration"), test_changes)

    model.config.gate, model.gate = gate.settings, gate.to(model.device)
    provenance = {
        "base_revision": revision,
        "n": count,
        "n_changed": count,
        "seed": seed,
        "fingerprint": _fingerprint(hands),
        "changed_fingerprint": _fingerprint(others),
        "calibration_n": len(held_out),
        "calibration_fingerprint": _fingerprint(held_out),
        "refused_share": REFUSED_SHARE,
        "warned_share": WARNED_SHARE,
        "turned_calibration": int((turned > 0).sum()),
        **made_by(),
    }
    save_changed(pipe, out, {"gate": provenance})
    return FittedGate(
        gate=gate.settings,
        n=count,
        n_changed=count,
        n_calibration=len(held_out),
        turned=int((turned > 0).sum()),
        found=found,
        revision=checkpoint_revision(pipe),
    )


def _fingerprint(rows: Any) -> str:
    return fingerprint(rows["id"], rows["bone_age_months"])


def _poses(gate: HandGate, pooled: Pooled) -> torch.Tensor:
    distance = gate.distance(pooled.mean[:, :, None, None])
    return gate.poses_of(gate.pose_scores(gate.cells(pooled.cells)), distance)


def _recognised(gate: HandGate, pooled: Pooled, changes: np.ndarray) -> dict[str, tuple[int, int]]:
    poses, cut = _poses(gate, pooled).numpy(), gate.cut_off_score(gate.cells(pooled.cells)).numpy()
    groups = {
        "turned by a quarter or half": ((changes >= 1) & (changes <= 3), poses == changes),
        "mirrored, upright": (changes == 4, poses == 4),
        "mirrored and turned": ((changes >= 5) & (changes < POSES), poses == changes),
        "cut off": (changes >= POSES, cut > gate.settings["cut_off_above"]),
    }
    return {name: (int((right & who).sum()), int(who.sum())) for name, (who, right) in groups.items()}
