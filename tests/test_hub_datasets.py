"""Prepared data sets on a Hub: pushed, loaded whole, by split and streaming, trained and evaluated on, copied."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import load_dataset
from hub_server import HubServer
from make_tiny_checkpoint import CHECKPOINT

from boneage_hf.cli import main
from boneage_hf.data import FEATURES, load_prepared, load_split, read_manifest
from boneage_hf.errors import InputError
from boneage_hf.evaluation import evaluate_checkpoint
from boneage_hf.publishing import push_dataset

HANDS = "clinic/hands"


@pytest.fixture
def pushed(hub: HubServer, prepared_phantoms: Path) -> Path:
    push_dataset(prepared_phantoms, HANDS)
    return prepared_phantoms


@pytest.fixture
def like_rsna(prepared_phantoms: Path, tmp_path: Path) -> Path:
    """Drawn hands whose manifest says that they are the challenge's."""
    folder = tmp_path / "rsna-prepared"
    shutil.copytree(prepared_phantoms, folder)
    manifest = json.loads((folder / "prepared.json").read_text())
    manifest["kind"] = manifest["settings"]["kind"] = "rsna"
    (folder / "prepared.json").write_text(json.dumps(manifest))
    return folder


def test_a_data_set_is_published_as_one_commit_and_stays_private(hub: HubServer, pushed: Path) -> None:
    repository = hub.repository(HANDS, "dataset")
    assert repository.private
    assert repository.messages == ["initial commit", "Upload a prepared bone-age data set"]
    names = {name for name in repository.files() if not name.startswith(".")}
    assert names == {path.relative_to(pushed).as_posix() for path in pushed.rglob("*") if path.is_file()}


def test_load_dataset_reads_it_whole_with_its_features(pushed: Path) -> None:
    loaded, ours = load_dataset(HANDS), load_prepared(pushed)
    assert loaded["train"].features == FEATURES
    assert {name: len(split) for name, split in loaded.items()} == {name: len(split) for name, split in ours.items()}
    for theirs, own in zip(loaded["validation"], ours["validation"], strict=True):
        assert np.array_equal(np.asarray(theirs.pop("image")), np.asarray(own.pop("image")))
        assert theirs == own


def test_load_dataset_reads_one_split(pushed: Path) -> None:
    split = load_dataset(HANDS, split="test")
    assert list(split["id"]) == list(load_split(pushed, "test")["id"])


def test_load_dataset_streams(pushed: Path) -> None:
    streamed = load_dataset(HANDS, split="train", streaming=True)
    assert streamed.features == FEATURES
    assert [row["id"] for row in streamed] == list(load_split(pushed, "train")["id"])
    first = next(iter(streamed))
    assert np.array_equal(np.asarray(first["image"]), np.asarray(load_split(pushed, "train")[0]["image"]))


def test_the_card_has_name_features_splits_counts_and_fingerprints(hub: HubServer, pushed: Path) -> None:
    text = hub.repository(HANDS, "dataset").files()["README.md"].content.decode()
    manifest = read_manifest(pushed)
    metadata: dict[str, Any] = yaml.safe_load(text.split("---")[1])
    assert f"load_dataset('{HANDS}')" in text
    assert [field["name"] for field in metadata["dataset_info"]["features"]] == list(FEATURES)
    examples = {split["name"]: split["num_examples"] for split in metadata["dataset_info"]["splits"]}
    assert examples == {name: split["rows"] for name, split in manifest["splits"].items()}
    assert all(split["fingerprint"] in text for split in manifest["splits"].values())
    assert "Drawn images, not radiographs" in text


def test_the_card_of_the_challenges_images_has_citation_and_terms(
    hub: HubServer, like_rsna: Path, prepared_phantoms: Path
) -> None:
    push_dataset(like_rsna, "clinic/rsna")
    text = hub.repository("clinic/rsna", "dataset").files()["README.md"].content.decode()
    assert "10.1148/radiol.2018180736" in text
    assert "Never re-host it" in text
    assert yaml.safe_load(text.split("---")[1])["license"] == "other"


def test_a_data_set_is_evaluated_on_by_its_id(pushed: Path, tmp_path: Path) -> None:
    arguments = ["--split", "validation", "--out"]
    assert main(["evaluate", str(CHECKPOINT), HANDS, *arguments, str(tmp_path / "theirs")]) == 0
    assert main(["evaluate", str(CHECKPOINT), str(pushed), *arguments, str(tmp_path / "ours")]) == 0
    theirs, ours = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("theirs", "ours"))
    for name in ("metrics", "predictions_sha256", "data_fingerprint", "protocol"):
        assert theirs[name] == ours[name]


def test_a_revision_of_a_data_set_is_read_by_its_name(hub: HubServer, pushed: Path) -> None:
    push_dataset(pushed, HANDS, revision="second", message="Second")
    assert read_manifest(f"{HANDS}@second") == read_manifest(HANDS)
    with pytest.raises(InputError, match="no branch, tag or commit third"):
        read_manifest(f"{HANDS}@third")


def training(dataset: str, out: Path, *more: str) -> list[str]:
    changes = ["image_size=64", "epochs=1", "batch_size=16", "backbone=tiny"]
    return [
        *("train", dataset, str(out), "--recipe", "quick", "--initial-weights", "random"),
        *(word for change in changes for word in ("--set", change)),
        *more,
    ]


def test_a_data_set_is_trained_on_by_its_id_and_the_checkpoint_says_so(
    hub: HubServer, pushed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BONEAGE_RUNS", str(tmp_path / "runs"))
    assert main(training(HANDS, tmp_path / "theirs")) == 0
    assert main(training(str(pushed), tmp_path / "ours")) == 0
    theirs, ours = (tmp_path / name / "checkpoint" / "model.safetensors" for name in ("theirs", "ours"))
    assert theirs.read_bytes() == ours.read_bytes()
    config = json.loads((tmp_path / "theirs" / "checkpoint" / "config.json").read_text())
    data = config["provenance"]["data"]
    assert (data["hub_id"], data["commit"]) == (HANDS, hub.repository(HANDS, "dataset").branches["main"])


def test_training_pushes_its_best_checkpoint_at_the_end(
    hub: HubServer, pushed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from boneage_hf.hub import checkpoint_revision, load_pipeline

    monkeypatch.setenv("BONEAGE_RUNS", str(tmp_path / "runs"))
    assert main(training(HANDS, tmp_path / "run", "--push-to-hub", "clinic/trained")) == 0
    assert f"revision {hub.repository('clinic/trained').branches['main']}" in capsys.readouterr().out
    theirs = load_pipeline("clinic/trained")
    assert checkpoint_revision(theirs) == checkpoint_revision(load_pipeline(tmp_path / "run" / "checkpoint"))
    card = hub.repository("clinic/trained").files()["README.md"].content.decode()
    assert re.search(r"Protocol `phantom-selection-\d+`", card)
    assert "These images chose the epoch" in card
    assert hub.repository("clinic/trained").private
    assert yaml.safe_load(card.split("---")[1])["datasets"] == [HANDS]
    assert torch.isfinite(next(theirs.model.parameters())).all()


def test_a_training_that_could_not_push_does_not_begin(
    hub: HubServer, prepared_phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BONEAGE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    assert main(training(str(prepared_phantoms), tmp_path / "run", "--push-to-hub", "clinic/trained")) == 2
    assert main(training(str(prepared_phantoms), tmp_path / "run", "--push-to-hub", "no-owner")) == 2
    assert not (tmp_path / "run").exists()


def test_a_push_that_fails_after_the_training_names_the_checkpoint_and_the_command(
    hub: HubServer, pushed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BONEAGE_RUNS", str(tmp_path / "runs"))
    with hub.fault("POST", "/commit/", status=500):
        assert main(training(str(pushed), tmp_path / "run", "--push-to-hub", "clinic/trained")) == 2
    told = capsys.readouterr()
    assert "in trouble" in told.err
    assert f"boneage push model {tmp_path / 'run' / 'checkpoint'} clinic/trained --metrics" in told.out
    assert (tmp_path / "run" / "checkpoint" / "model.safetensors").is_file()


# --- copied by boneage prepare --------------------------------------------------------------------------------------


def test_prepare_copies_a_prepared_data_set_of_the_hub(pushed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["prepare", HANDS, str(out)]) == 0
    for path in pushed.rglob("*"):
        if path.is_file() and path.name != "README.md":
            assert (out / path.relative_to(pushed)).read_bytes() == path.read_bytes()
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_second_copy_finds_it_done_and_a_damaged_one_is_made_whole(
    pushed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for damage in (False, False, True):
        if damage:
            next((out / "data").glob("train-*")).write_bytes(b"cut")
        assert main(["prepare", HANDS, str(out)]) == 0
        load_prepared(out)
    assert capsys.readouterr().out.count("Already prepared") == 1


@pytest.mark.parametrize(
    "option", [("--size", "300"), ("--seed", "1"), ("--split", "official"), ("--size", "original")]
)
def test_a_copy_with_other_settings_is_refused(
    pushed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: tuple[str, str]
) -> None:
    assert main(["prepare", HANDS, str(tmp_path / "out"), *option]) == 2
    assert "was prepared with" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_labels_that_are_not_those_of_the_manifest_are_refused(
    hub: HubServer, pushed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = hub.repository(HANDS, "dataset")
    files = dict(repository.files())
    manifest = json.loads(files["prepared.json"].content)
    manifest["splits"]["test"]["fingerprint"] = "0" * 64
    files["prepared.json"] = type(files["prepared.json"])(json.dumps(manifest).encode(), False)
    repository.commit("main", files, "tampered")
    assert main(["prepare", HANDS, str(tmp_path / "out")]) == 2
    assert "not those of its manifest" in capsys.readouterr().err
    assert list(tmp_path.glob("*out*")) == []


def test_a_copy_does_not_touch_a_folder_of_something_else(pushed: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert main(["prepare", HANDS, str(tmp_path / "out")]) == 2
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


def test_a_data_set_that_is_not_there_is_one_sentence(
    hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (
        ["prepare", "clinic/nothing"],
        ["evaluate", str(CHECKPOINT), "clinic/nothing", "--split", "test"],
    ):
        out = ["--out", str(tmp_path / "out")] if arguments[0] == "evaluate" else [str(tmp_path / "out")]
        assert main([*arguments, *out]) == 2
        assert "no data set clinic/nothing" in capsys.readouterr().err


def test_a_data_set_that_was_not_prepared_is_one_sentence(hub: HubServer, pushed: Path, tmp_path: Path) -> None:
    repository = hub.repository(HANDS, "dataset")
    repository.commit("main", {n: b for n, b in repository.files().items() if n != "prepared.json"}, "without")
    with pytest.raises(InputError, match="boneage prepare"):
        evaluate_checkpoint(str(CHECKPOINT), HANDS, split="test", out=tmp_path / "out")


# --- who may see it -------------------------------------------------------------------------------------------------


def test_drawn_hands_may_be_public(hub: HubServer, prepared_phantoms: Path) -> None:
    push_dataset(prepared_phantoms, HANDS, public=True)
    assert not hub.repository(HANDS, "dataset").private
    steps = [one for one in hub.requests if re.search(r"/commit/|settings", one)]
    assert [step.split("/")[-1] for step in steps] == ["main", "settings"]


def test_the_challenges_images_are_not_public_before_their_terms_are_accepted(
    hub: HubServer, like_rsna: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", "dataset", str(like_rsna), HANDS, "--public"]) == 2
    told = capsys.readouterr().err
    assert "does not allow to re-host" in told
    assert "--accept-terms" in told
    assert hub.requests == []
    assert main(["push", "dataset", str(like_rsna), HANDS, "--public", "--accept-terms"]) == 0
    assert "does not allow to re-host" in capsys.readouterr().out
    assert not hub.repository(HANDS, "dataset").private


def test_a_public_repository_gets_no_private_data(hub: HubServer, prepared_phantoms: Path, like_rsna: Path) -> None:
    push_dataset(prepared_phantoms, HANDS, public=True)
    with pytest.raises(InputError, match="is public"):
        push_dataset(like_rsna, HANDS)
    assert len(hub.repository(HANDS, "dataset").messages) == 2


def test_a_dry_run_of_a_data_set_lists_shards_and_sends_nothing(
    hub: HubServer, prepared_phantoms: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", "dataset", str(prepared_phantoms), HANDS, "--dry-run"]) == 0
    told = capsys.readouterr().out
    for name, file in read_manifest(prepared_phantoms)["files"].items():
        assert f"{file['bytes']:,}  {name}" in told
    assert hub.requests == []


def test_a_damaged_data_set_is_not_pushed(hub: HubServer, prepared_phantoms: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(prepared_phantoms, tmp_path / "damaged"))
    next((folder / "data").iterdir()).write_bytes(b"cut")
    with pytest.raises(InputError, match="damaged"):
        push_dataset(folder, HANDS)
    assert hub.requests == []


def test_older_shards_go_with_the_same_commit(hub: HubServer, pushed: Path) -> None:
    repository = hub.repository(HANDS, "dataset")
    files = dict(repository.files())
    files["data/train-00000-of-00002.parquet"] = next(blob for name, blob in files.items() if "train" in name)
    repository.commit("main", files, "an older split")
    push_dataset(pushed, HANDS, message="Again")
    assert "data/train-00000-of-00002.parquet" not in repository.files()
    assert repository.messages[-1] == "Again"


@pytest.mark.parametrize("path", ["^/lfs/", "/commit/"])
def test_a_push_of_data_that_fails_publishes_nothing(
    hub: HubServer, prepared_phantoms: Path, capsys: pytest.CaptureFixture[str], path: str
) -> None:
    with hub.fault("*", path, status=500):
        assert main(["push", "dataset", str(prepared_phantoms), HANDS, "--public"]) == 2
    assert "in trouble" in capsys.readouterr().err
    repository = hub.repository(HANDS, "dataset")
    assert repository.private
    assert set(repository.files()) == {".gitattributes"}
