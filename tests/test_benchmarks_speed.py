import hashlib
import json
from pathlib import Path

import pytest

from benchmarks.cli import main
from benchmarks.findings import load_findings
from benchmarks.speed import SOURCES, TrainingSpeed, training_speed
from boneage_hf.errors import InputError
from boneage_hf.recipes import Recipe

TINY = Recipe(backbone="tiny", image_size=64, batch_size=8)


@pytest.fixture(scope="module")
def measured() -> TrainingSpeed:
    return training_speed(TINY, steps=2, mixed_precision="no")


def test_every_source_of_images_has_a_speed(measured: TrainingSpeed) -> None:
    assert min(measured.from_disk, measured.from_memory, measured.ready) > 0


def test_the_text_gives_the_share_of_the_speed_from_memory(measured: TrainingSpeed) -> None:
    assert f"disk against memory {measured.from_disk / measured.from_memory:.1%}" in str(measured)


def test_no_step_is_refused() -> None:
    with pytest.raises(InputError, match="1 or more"):
        training_speed(TINY, steps=0)


def test_the_command_prints_and_keeps_the_speeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = ["--set", "backbone=tiny", "--set", "image_size=64", "--set", "batch_size=8", "--out", str(tmp_path)]
    assert main(["speed", "--training", "--steps", "1", "--mixed-precision", "no", *fields]) == 0
    assert "tiny, 64 px, batch 8, median of 1 steps:" in capsys.readouterr().out
    table = (tmp_path / "training.csv").read_bytes()
    assert table.decode().splitlines()[0] == "images_from,images_per_second"
    manifest = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["task"], manifest["recipe"]["backbone"]) == ("training-speed", "tiny")
    assert manifest["table_sha256"] == hashlib.sha256(table).hexdigest()
    assert list(load_findings([tmp_path]).training[0].table["images_from"]) == list(SOURCES)
