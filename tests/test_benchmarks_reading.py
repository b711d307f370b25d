from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.reading import check_copies, check_polarity
from boneage_hf import phantom
from boneage_hf.data import prepare_phantoms
from boneage_hf.errors import InputError
from boneage_hf.hub import load_pipeline

TINY = Path(__file__).parent / "checkpoints" / "tiny"


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms") / "prepared"
    prepare_phantoms(30, folder, seed=1, size=128)
    return folder


@pytest.fixture(scope="module")
def challenge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three drawn hands in the challenge's layout as 299 px copies, two of them also at full size."""
    folder = tmp_path_factory.mktemp("challenge")
    copies, originals = folder / "boneage-training-dataset", folder / "originals"
    copies.mkdir()
    originals.mkdir()
    lines = ["id,boneage,male"]
    for number, months in enumerate((60, 120, 160), start=1):
        hand = phantom.draw(months, "male", seed=number, size=600)
        hand.convert("L").resize((299, 299), Image.Resampling.BILINEAR).save(copies / f"{number}.jpg", quality=92)
        if number < 3:
            phantom.save_png(hand, originals / f"{number}.png")
        lines.append(f"{number},{months},True")
    (folder / "boneage-training-dataset.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_no_drawn_hand_is_decided_like_its_negative_or_called_light(phantoms: Path) -> None:
    check = check_polarity(phantoms, split="train", sheets=None)
    assert (check.violations, check.light_ids) == (0, ())
    assert check.n > 10


def test_the_sheets_hold_fifty_radiographs_each(phantoms: Path, tmp_path: Path) -> None:
    check = check_polarity(phantoms, split="train", sheets=tmp_path / "sheets", judged=5)
    assert [path.name for path in check.sheets] == ["polarity-1.png"]
    with Image.open(check.sheets[0]) as sheet:
        frame = np.asarray(sheet)[2, 2]
    assert tuple(frame) == (0, 130, 0)


def test_the_text_counts_violations_and_light_radiographs(phantoms: Path) -> None:
    text = str(check_polarity(phantoms, split="train", sheets=None))
    assert text.splitlines()[0].startswith("0 of ")
    assert text.splitlines()[1].endswith("were called light: none")


def test_originals_are_compared_with_the_copies_of_the_same_id(challenge: Path) -> None:
    pipe = load_pipeline(TINY)
    check = check_copies(pipe, challenge, challenge / "originals")
    files = [
        (challenge / "originals" / f"{number}.png", challenge / "boneage-training-dataset" / f"{number}.jpg")
        for number in (1, 2)
    ]
    expected = sorted(
        abs(pipe(str(a), sex="male")["bone_age_months"] - pipe(str(b), sex="male")["bone_age_months"])
        for a, b in files
    )
    assert check.differences_months == pytest.approx(expected)
    assert str(check).startswith("2 pairs: median absolute difference")


def test_originals_without_copies_are_refused(challenge: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="same id"):
        check_copies(load_pipeline(TINY), challenge, tmp_path)
