"""Speed of a checkpoint: what is counted is counted right, every setting has a row, and nothing names the machine."""

import json
import resource
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from make_tiny_checkpoint import CHECKPOINT
from torch import nn

from benchmarks import latency
from benchmarks.cli import main
from benchmarks.findings import load_study
from benchmarks.latency import COLUMNS, Speed, cold_start, gflop_per_image, measure_speed, measured_peak, timed
from boneage_hf.errors import InputError


@pytest.fixture(scope="module")
def speed(tmp_path_factory: pytest.TempPathFactory) -> Speed:
    out = tmp_path_factory.mktemp("speed") / "out"
    return measure_speed([str(CHECKPOINT)], out=out, repeats=3, batches=(1, 2), peers=False, progress=False)


def test_every_batch_precision_and_number_of_threads_has_a_row(speed: Speed) -> None:
    network = speed.table[speed.table["what"] == "network"]
    threads = {1, torch.get_num_threads()}
    assert len(network) == 2 * 2 * len(threads)
    assert set(network["batch"]) == {1, 2}
    assert set(network["precision"]) == {"fp32", "bf16"}
    assert set(network["threads"]) == threads


def test_files_are_read_from_bytes_to_months_in_two_sizes(speed: Speed) -> None:
    files = speed.table[speed.table["what"].str.startswith("file to months")]
    assert list(files["what"].unique()) == ["file to months, PNG 1500 x 2000", "file to months, PNG 299 x 299"]
    medians = files.groupby("what", sort=False)["median_ms"].min()
    assert medians.iloc[0] > medians.iloc[1]


def test_files_are_read_with_batch_precision_and_threads_changed_one_at_a_time(speed: Speed) -> None:
    files = speed.table[speed.table["what"] == "file to months, PNG 299 x 299"]
    threads = torch.get_num_threads()
    ways = {tuple(row) for row in files[["batch", "precision", "threads"]].itertuples(index=False)}
    assert ways == {(1, "fp32", threads), (1, "bf16", threads), (1, "fp32", 1), (2, "fp32", threads)}


def test_a_95th_percentile_is_given_for_twenty_calls_or_more_only(speed: Speed, tmp_path: Path) -> None:
    assert speed.table["p95_ms"].isna().all()
    more = measure_speed(
        [str(CHECKPOINT)], out=tmp_path / "out", repeats=20, batches=(1,), peers=False, progress=False
    ).table
    assert (more["median_ms"] <= more["p95_ms"]).all()


def test_the_share_of_the_peak_is_that_of_the_better_of_matrix_products_and_convolutions(speed: Speed) -> None:
    network = speed.table[speed.table["what"] == "network"]
    for row in network.to_dict(orient="records"):
        name = f"{row['precision']}, {row['threads']} threads"
        peak = speed.manifest["peak_gflop_per_second"][name]
        assert peak == max(speed.manifest["peaks_found"][name].values())
        assert row["share_of_peak"] == pytest.approx(row["gflop_per_image"] / row["median_ms"] * 1000 / peak)


def test_medians_agree_with_the_rate(speed: Speed) -> None:
    assert (speed.table["images_per_second"] * speed.table["median_ms"]).tolist() == pytest.approx(
        [1000.0] * len(speed.table)
    )


def test_the_written_table_is_the_measured_one(speed: Speed) -> None:
    written = pd.read_csv(speed.files[0])
    assert list(written.columns) == list(COLUMNS)
    assert len(load_study(speed.files[0].parent, "speed").table) == len(written)
    assert written["median_ms"].tolist() == pytest.approx(speed.table["median_ms"].tolist(), rel=1e-3)


def test_the_manifest_names_revision_peak_memory_and_cold_start_and_no_path(speed: Speed) -> None:
    manifest = json.loads(speed.files[1].read_text())
    (one,) = manifest["checkpoints"]
    assert one["checkpoint"] == "tiny"
    assert len(one["revision"]) == 12
    assert one["cold_start"]["seconds"] > 0
    assert one["cold_start"]["peak_memory_mb"] > 50
    assert str(CHECKPOINT.parent) not in speed.files[1].read_text()


def test_the_peak_memory_of_a_cold_start_is_not_that_of_the_process_that_measures_it() -> None:
    filler = np.ones(200 * 1024**2 // 8)  # the measuring process then holds 200 MB more than the fresh one can need
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert cold_start(str(CHECKPOINT))["peak_memory_mb"] < own - filler.nbytes / 1024**2 / 2


def test_the_number_of_threads_is_put_back(speed: Speed) -> None:
    before = torch.get_num_threads()
    measured_peak(torch.float32, threads=1)
    assert torch.get_num_threads() == before


def test_operations_are_those_of_a_count_by_hand() -> None:
    network = nn.Conv2d(3, 8, kernel_size=3, padding=1, bias=False)
    counted = gflop_per_image(lambda: network(torch.zeros(1, 3, 10, 10)))
    assert counted == pytest.approx(2 * 8 * 3 * 3 * 3 * 10 * 10 / 1e9)


def test_calls_of_over_a_second_are_repeated_less(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 100, 2))
    monkeypatch.setattr(latency.time, "perf_counter", lambda: float(next(clock)))
    assert timed(lambda: None, repeats=20) == [2.0] * 4


@pytest.mark.slow
def test_the_networks_of_peers_have_the_published_number_of_weights() -> None:
    counts = {
        name: sum(value.numel() for value in network.parameters()) for name, network, _ in latency.peer_networks()
    }
    b0, b4, convnext, vgg = counts.values()
    # Tan & Le, table 2, less the classifier (1,280 or 1,792 channels to 1,000 classes): 5.3 and 19 million.
    assert b0 == pytest.approx(5.3e6 - 1281e3, rel=0.02)
    assert b4 == pytest.approx(19.3e6 - 1793e3, rel=0.02)
    assert convnext == pytest.approx(3 * 27.9e6, rel=0.02)  # ConvNeXtV2-tiny, 28.6 million with its classifier
    assert vgg == 20_589_601 - 2 * 512  # the statistics of BatchNorm are buffers


@pytest.mark.slow
def test_the_networks_of_peers_take_an_image() -> None:
    """Counting weights alone did not show that EfficientNet's last layers were of two widths."""
    for name, network, size in latency.peer_networks():
        side = size if "VGG" in name else 64
        with torch.inference_mode():
            output = network(torch.zeros(1, 3, side, side))
        assert output is not None, name


@pytest.mark.parametrize(
    ("repeats", "batches", "message"), [(2, (1,), "3 or more"), (3, (), "1 or more"), (3, (0,), "1 or more")]
)
def test_impossible_numbers_are_refused(repeats: int, batches: tuple[int, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        measure_speed([str(CHECKPOINT)], out=tmp_path, repeats=repeats, batches=batches)


def test_checkpoints_are_named_once_each(tmp_path: Path) -> None:
    for checkpoints in ([], [str(CHECKPOINT), str(CHECKPOINT)]):
        with pytest.raises(InputError, match="each once"):
            measure_speed(checkpoints, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["speed", str(CHECKPOINT), "--out", str(tmp_path / "out"), "--repeats", "3", "--no-peers"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "cold start to the first answer" in printed
    assert (tmp_path / "out" / "speed.csv").is_file()


@pytest.mark.parametrize("arguments", [["speed"], ["speed", "default"], ["speed", "default", "--training"]])
def test_speed_is_either_of_training_or_of_a_checkpoint(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")
