"""Adapters: each predicts through its real interface, says what it was trained on, and refuses what it cannot use."""

import email.parser
import email.policy
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from benchmarks.protocol import PROTOCOLS, TRAINING_PARTS
from benchmarks.systems import KINDS, SystemOptions, build_system, leakage
from benchmarks.systems.base import check_trained_on
from benchmarks.systems.checkpoint import trained_on
from benchmarks.systems.deeplasia_service import DeeplasiaServiceSystem
from benchmarks.systems.transformers_remote import TransformersRemoteSystem, match_histograms
from boneage_hf.data import load_split
from boneage_hf.errors import InputError
from boneage_hf.hub import DEFAULT_CHECKPOINT
from boneage_hf.sex import SEXES


@pytest.fixture(scope="module")
def split(prepared_phantoms: Path) -> datasets.Dataset:
    """Eight drawn hands."""
    return load_split(prepared_phantoms, "validation")


@pytest.fixture
def options(prepared_phantoms: Path) -> SystemOptions:
    return SystemOptions(data=prepared_phantoms, device="cpu")


def test_an_unknown_kind_is_refused_with_the_nearest_and_axnet_with_its_reason(options: SystemOptions) -> None:
    assert set(KINDS) == {"checkpoint", "transformers-remote", "predictions-csv", "deeplasia-service", "constant"}
    with pytest.raises(InputError, match='did you mean "constant"'):
        build_system("constnat", options)
    with pytest.raises(InputError, match="no public weights"):
        build_system("AXNet", options)


# --- what a system has seen ------------------------------------------------------------------------------------------


def test_images_that_a_system_was_trained_on_are_leakage() -> None:
    test, validation = PROTOCOLS["reference-test-1024"], PROTOCOLS["rsna-val-1425"]
    both = ("rsna-training-12611", "rsna-validation-1425")
    assert leakage(both, test) == "trained on rsna-training-12611"
    assert leakage(both, validation) == "trained on rsna-validation-1425"
    assert leakage(both, PROTOCOLS["rsna-test-200-decimal"]) == "none"
    assert leakage(("rsna-reference-train-9458",), test) == "none"
    assert leakage(None, test) == "unknown"


def test_data_of_an_unknown_fingerprint_may_hold_images_of_the_test() -> None:
    assert leakage(("labels 111111111111",), PROTOCOLS["reference-test-1024"]) == "unknown"
    assert leakage(("rsna-reference-train-9458", "other: a hospital"), PROTOCOLS["reference-test-1024"]) == "none"


def test_who_was_trained_on_the_labels_of_the_test_has_seen_it() -> None:
    test = PROTOCOLS["reference-test-1024"]
    seen = trained_on({"train_fingerprint": test.ground_truth_fingerprint})
    assert leakage(seen, test).startswith("trained on labels abb87207f300")
    assert leakage(seen, PROTOCOLS["rsna-val-1425"]) == "unknown"


def test_a_training_part_that_a_user_names_must_be_a_known_one_or_said_to_be_other_data() -> None:
    assert check_trained_on(["rsna-training-12611", "other: Digital Hand Atlas"]) == (
        "rsna-training-12611",
        "other: Digital Hand Atlas",
    )
    with pytest.raises(InputError, match='did you mean "rsna-training-12611"'):
        check_trained_on(["rsna-train-12611"])
    with pytest.raises(InputError, match="no training part"):
        check_trained_on(["other:"])


def test_every_overlap_names_a_known_part() -> None:
    assert {part for protocol in PROTOCOLS.values() for part in protocol.overlaps} <= set(TRAINING_PARTS)


def test_the_packaged_checkpoint_has_not_seen_the_reference_test() -> None:
    config = json.loads((DEFAULT_CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    seen = trained_on(config["provenance"])
    assert seen == ("rsna-reference-train-9458",)
    assert leakage(seen, PROTOCOLS["reference-test-1024"]) == "none"


def test_a_checkpoint_has_seen_what_its_initial_weights_have_seen() -> None:
    whole = {"train_fingerprint": TRAINING_PARTS["rsna-training-12611"]}
    own = {"train_fingerprint": "1" * 64, "initial_weights": {"provenance": whole}}
    assert trained_on(own) == ("labels 111111111111", "rsna-training-12611", "rsna-validation-1425")
    assert trained_on(None) is None
    assert trained_on({"initial_weights": {"provenance": whole}}) is None


def test_a_checkpoint_has_seen_what_its_teacher_has_seen() -> None:
    reference = {"train_fingerprint": TRAINING_PARTS["rsna-reference-train-9458"]}
    whole = {"train_fingerprint": TRAINING_PARTS["rsna-training-12611"]}
    taught = trained_on({**reference, "teacher": {"provenance": whole}})
    assert leakage(taught, PROTOCOLS["reference-test-1024"]) == "trained on rsna-training-12611"
    assert trained_on({**reference, "teacher": {"provenance": None}}) is None


def test_a_checkpoint_has_seen_the_images_of_its_local_calibration() -> None:
    reference = {"train_fingerprint": TRAINING_PARTS["rsna-reference-train-9458"]}
    test = PROTOCOLS["reference-test-1024"]
    own = {**reference, "local_calibration": {"fingerprint": test.ground_truth_fingerprint}}
    assert leakage(trained_on(own), test).startswith("trained on labels")


# --- constant --------------------------------------------------------------------------------------------------------


def test_the_constant_is_the_training_mean_of_the_sex(
    options: SystemOptions, split: datasets.Dataset, prepared_phantoms: Path
) -> None:
    found = build_system("constant", options).predict(split)
    months: dict[int, list[float]] = {0: [], 1: []}
    for row in load_split(prepared_phantoms, "train").select_columns(["sex", "bone_age_months"]):
        months[row["sex"]].append(row["bone_age_months"])
    expected = [sum(months[sex]) / len(months[sex]) for sex in split["sex"]]
    assert found["predicted_months"].tolist() == pytest.approx(expected)
    assert found["id"].tolist() == split["id"]


def test_the_constant_takes_no_argument(options: SystemOptions) -> None:
    with pytest.raises(InputError, match="takes nothing"):
        build_system("constant:mean", options)


# --- a table of predictions ------------------------------------------------------------------------------------------


def table_of(
    split: datasets.Dataset, folder: Path, change: Callable[[pd.DataFrame], Any] = lambda table: table
) -> str:
    """Truth + 6 months under foreign column names, in reverse order."""
    truth = np.asarray(split["bone_age_months"], dtype=float)
    table = pd.DataFrame({"Image": split["id"], "BA": truth + 6, "GT": truth}).iloc[::-1]
    change(table).to_csv(folder / "theirs.csv", index=False)
    return f"predictions-csv:{folder / 'theirs.csv'}"


@pytest.fixture
def theirs(options: SystemOptions) -> SystemOptions:
    return replace(options, id_column="Image", prediction_column="BA", truth_column="GT")


def test_predictions_are_matched_by_id_under_any_column_names(
    theirs: SystemOptions, split: datasets.Dataset, tmp_path: Path
) -> None:
    system = build_system(table_of(split, tmp_path), theirs)
    found = system.predict(split)
    assert found["id"].tolist() == split["id"]
    assert found["predicted_months"].to_numpy() == pytest.approx(np.asarray(split["bone_age_months"]) + 6)
    assert (system.name, system.trained_on) == ("theirs", None)


def test_declared_years_become_months(theirs: SystemOptions, split: datasets.Dataset, tmp_path: Path) -> None:
    def to_years(table: pd.DataFrame) -> pd.DataFrame:
        return table.assign(BA=table["BA"] / 12, GT=table["GT"] / 12)

    found = build_system(table_of(split, tmp_path, to_years), replace(theirs, unit="years")).predict(split)
    assert found["predicted_months"].to_numpy() == pytest.approx(np.asarray(split["bone_age_months"]) + 6)
    with pytest.raises(InputError, match="years and not months; declare --unit years"):
        build_system(table_of(split, tmp_path, to_years), theirs)
    with pytest.raises(InputError, match="months and not years"):
        build_system(table_of(split, tmp_path), replace(theirs, unit="years"))


def test_one_odd_value_does_not_hide_that_the_others_are_years(theirs: SystemOptions, tmp_path: Path) -> None:
    table = pd.DataFrame({"Image": range(20), "BA": [100.0, *[8.5] * 19]})
    table.to_csv(tmp_path / "theirs.csv", index=False)
    with pytest.raises(InputError, match="years and not months; declare --unit years"):
        build_system(f"predictions-csv:{tmp_path / 'theirs.csv'}", replace(theirs, truth_column=None))


def test_ages_of_infants_among_those_of_others_are_months(theirs: SystemOptions, tmp_path: Path) -> None:
    table = pd.DataFrame({"Image": range(20), "BA": [*[18.0] * 15, *[60.0] * 5]})
    table.to_csv(tmp_path / "theirs.csv", index=False)
    build_system(f"predictions-csv:{tmp_path / 'theirs.csv'}", replace(theirs, truth_column=None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: pd.concat([t, t.iloc[:1]]), "repeats the id"),
        (lambda t: t.assign(BA=[None, *t["BA"][1:]]), "1 of 8 values"),
        (lambda t: t.assign(BA=["NaN", *t["BA"][1:]]), "1 of 8 values"),
        (lambda t: t.assign(BA=["-3", *t["BA"][1:]]), "negative"),
        (lambda t: t.assign(Image=["", *t["Image"][1:]]), "no id"),
        (lambda t: t.rename(columns={"BA": "BAM"}), 'no column "BA"'),
        (lambda t: t.iloc[:0], "no row"),
        (lambda t: t.iloc[1:], "1 of 8 images have no prediction"),
        (lambda t: pd.concat([t, t.iloc[:1].assign(Image="x")]), "of no image"),
        (lambda t: t.assign(GT=t["GT"] + 3), "differs from the data set's in 8 of 8"),
    ],
)
def test_a_bad_table_is_refused(
    theirs: SystemOptions, split: datasets.Dataset, tmp_path: Path, change: Callable[..., Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        build_system(table_of(split, tmp_path, change), theirs).predict(split)


def test_a_file_that_is_not_there_is_refused(theirs: SystemOptions, tmp_path: Path) -> None:
    for spec in ("predictions-csv", f"predictions-csv:{tmp_path / 'none.csv'}"):
        with pytest.raises(InputError, match="file"):
            build_system(spec, theirs)


# --- Deeplasia's service ---------------------------------------------------------------------------------------------


class Service(ThreadingHTTPServer):
    """Answers like the service: months are the mean grey level, 10 more for boys. `troubles` come first."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict[str, str]] = []
        self.troubles: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Service

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.answer(200 if self.path == "/ping" else 404, {})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
        parts = {part.get_param("name", header="content-disposition"): part for part in message.iter_parts()}
        fields = {str(name): part.get_content().strip() for name, part in parts.items() if name != "file"}
        image = parts["file"].get_payload(decode=True)
        self.server.requests.append(fields)
        trouble = self.server.troubles.pop(0) if self.server.troubles else ""
        if trouble == "slow":
            time.sleep(0.6)
        if trouble.isdecimal():
            self.answer(int(trouble), {"detail": "trouble"})
            return
        assert isinstance(image, bytes)
        months = float(np.asarray(Image.open(io.BytesIO(image))).mean()) + 10 * (fields.get("sex") == "male")
        answers: dict[str, object] = {
            "no age": {},
            "text": "hello",
            "nan": {"bone_age": "nan", "used_sex": fields["sex"]},
        }
        other = "male" if fields["sex"] == "female" else "female"
        answers["other sex"] = {"bone_age": months, "sex_predicted": True, "used_sex": other}
        good = {"bone_age": months, "sex_predicted": False, "used_sex": fields["sex"]}
        self.answer(200, answers.get(trouble, good))


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def test_the_service_gets_every_image_with_its_sex(
    service: Service, split: datasets.Dataset, options: SystemOptions
) -> None:
    found = build_system(f"deeplasia-service:{service.url}", options).predict(split)
    sexes = [SEXES[code] for code in split["sex"]]
    settings = {"use_mask": "True", "use_invChecker": "True", "mask_crop": "1.15"}
    assert service.requests == [{"sex": sex, **settings} for sex in sexes]
    expected = [
        np.asarray(image.convert("L")).mean() + 10 * (sex == "male")
        for image, sex in zip(split["image"], sexes, strict=True)
    ]
    assert found["predicted_months"].to_numpy() == pytest.approx(np.array(expected))


def test_a_failure_that_may_pass_is_tried_again(service: Service, split: datasets.Dataset) -> None:
    service.troubles = ["500", "slow"]
    system = DeeplasiaServiceSystem(service.url, timeout_seconds=0.3, pauses=(0.0, 0.0))
    assert len(system.predict(split.select([0]))) == 1
    assert len(service.requests) == 3


@pytest.mark.parametrize(
    ("troubles", "tries", "message"),
    [
        (["400"], 1, "refused it .HTTP 400"),
        (["500"] * 3, 3, "HTTP 500.*tried 3 times"),
        (["slow"] * 3, 3, "did not answer in 0.3 s"),
        (["no age"], 1, "without a bone_age"),
        (["text"], 1, "without a bone_age"),
        (["nan"], 1, "no number"),
        (["other sex"], 1, "did not use the sex"),
    ],
)
def test_a_service_in_trouble_is_named_with_its_image(
    service: Service, split: datasets.Dataset, troubles: list[str], tries: int, message: str
) -> None:
    service.troubles = list(troubles)
    system = DeeplasiaServiceSystem(service.url, timeout_seconds=0.3, pauses=(0.0, 0.0))
    with pytest.raises(InputError, match=message) as refused:
        system.predict(split.select([0]))
    assert f"image {split['id'][0]}" in str(refused.value)
    assert len(service.requests) == tries


def test_a_service_that_is_not_there_is_refused(service: Service) -> None:
    url = service.url
    service.server_close()
    with pytest.raises(InputError, match="cannot be reached"):
        DeeplasiaServiceSystem(url, timeout_seconds=0.3, pauses=(0.0,)).ping()
    with pytest.raises(InputError, match="http://"):
        DeeplasiaServiceSystem("ftp://here")


# --- a model with code of its own ------------------------------------------------------------------------------------

STAND_IN = """
import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel


class StandInConfig(PretrainedConfig):
    model_type = "boneage_stand_in_{kind}"


class StandIn(PreTrainedModel):
    config_class = StandInConfig

    def __init__(self, config):
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.post_init()

    def preprocess(self, image):
        assert image.dtype == np.uint8 and image.ndim == 2
        return image.astype(np.float32)

    def forward(self, x, {second}):
        assert x.ndim == 4 and x.shape[:2] == (1, 1)
        {body}
"""
CROP_BODY = """height, width = img_shape[0].tolist()
        return torch.tensor([[width * 0.25, height * 0.25, width * 0.75, height * 0.75]])"""
AGE_BODY = "return x.mean(dim=(1, 2, 3)) * self.weight + 20 * female"


def stand_in(folder: Path, kind: str) -> None:
    """A folder that `AutoModel` loads with its own code, with the interface of ianpan's models."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    second, body = ("img_shape", CROP_BODY) if kind == "crop" else ("female", AGE_BODY)
    code = STAND_IN.format(kind=kind, second=second, body=body)
    (folder / "modeling.py").write_text(code, encoding="utf-8")
    config = {"model_type": f"boneage_stand_in_{kind}", "architectures": ["StandIn"]}
    config |= {"auto_map": {"AutoConfig": "modeling.StandInConfig", "AutoModel": "modeling.StandIn"}}  # type: ignore[dict-item]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({"weight": torch.ones(1)}, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("remote")
    stand_in(base / "age", "age")
    stand_in(base / "age-crop", "crop")
    Image.fromarray(np.arange(256, dtype=np.uint8).repeat(64).reshape(128, 128)).save(base / "age" / "ref_img.png")
    return base / "age"


def middle(image: Image.Image) -> np.ndarray:
    grey = np.asarray(image.convert("L"))
    height, width = grey.shape
    return grey[round(height * 0.25) : round(height * 0.75), round(width * 0.25) : round(width * 0.75)]


def test_a_remote_model_reads_the_cropped_image_and_the_sex(
    remote: Path, options: SystemOptions, split: datasets.Dataset
) -> None:
    allowed = replace(options, trust_remote_code=True, histogram_matching=False)
    system = build_system(f"transformers-remote:{remote}", allowed)
    female = [SEXES[code] == "female" for code in split["sex"]]
    expected = [middle(image).mean() + 20 * girl for image, girl in zip(split["image"], female, strict=True)]
    assert system.predict(split)["predicted_months"].to_numpy() == pytest.approx(np.array(expected), rel=1e-5)
    assert "no histogram match" in system.preprocessing
    assert system.trained_on is None


def test_histogram_matching_is_part_of_the_system(
    remote: Path, options: SystemOptions, split: datasets.Dataset
) -> None:
    allowed = replace(options, trust_remote_code=True)
    matched = build_system(f"transformers-remote:{remote}", allowed)
    plain = build_system(f"transformers-remote:{remote}", replace(allowed, histogram_matching=False))
    assert matched.revision != plain.revision
    assert not np.allclose(matched.predict(split)["predicted_months"], plain.predict(split)["predicted_months"])


def test_code_of_others_runs_only_when_it_is_allowed(remote: Path, options: SystemOptions) -> None:
    with pytest.raises(InputError, match="--trust-remote-code"):
        build_system(f"transformers-remote:{remote}", options)


def test_a_remote_model_that_cannot_be_had_is_refused(options: SystemOptions, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a folder nor a model"):
        build_system(f"transformers-remote:{tmp_path / 'none'}", replace(options, trust_remote_code=True))


def test_an_empty_crop_is_refused_and_names_the_image(split: datasets.Dataset) -> None:
    import torch

    class Nowhere(torch.nn.Module):
        def preprocess(self, image: np.ndarray) -> np.ndarray:
            return image

        def forward(self, x: torch.Tensor, img_shape: torch.Tensor) -> torch.Tensor:
            return torch.tensor([5.0, 5.0, 5.0, 9.0])

    system = TransformersRemoteSystem(Nowhere(), Nowhere(), name="x", revision="1", trained_on=())
    with pytest.raises(InputError, match=f"row {split['id'][0]}.*box is empty"):
        system.predict(split)


def test_matched_grey_levels_have_the_distribution_of_the_reference() -> None:
    generator = np.random.default_rng(0)
    image = generator.integers(0, 60, (40, 50)).astype(np.uint8)
    reference = (generator.integers(0, 120, (30, 30)) + 100).astype(np.uint8)
    wanted = np.sort(reference.ravel())
    slow = np.empty_like(image)
    for index, level in np.ndenumerate(image):
        share = (image <= level).mean()
        levels = np.unique(wanted)
        slow[index] = np.interp(share, [(wanted <= other).mean() for other in levels], levels)
    assert (match_histograms(image, reference) == slow).all()


@pytest.mark.parametrize("kind", ["checkpoint", "constant", "deeplasia-service"])
def test_who_knows_what_it_was_trained_on_is_not_told(options: SystemOptions, kind: str) -> None:
    with pytest.raises(InputError, match=f'"{kind}" itself knows what it was trained on; leave out --trained-on'):
        build_system(kind, replace(options, trained_on=("rsna-training-12611",)))


def test_the_model_whose_card_says_what_it_was_trained_on_is_not_told(options: SystemOptions) -> None:
    told = replace(options, trained_on=("other: a hospital",), trust_remote_code=True)
    with pytest.raises(InputError, match="leave out --trained-on"):
        build_system("transformers-remote", told)


@pytest.mark.parametrize("line", ["import no_such_package", "def late():\n    pass\n\nimport no_such_package.part"])
def test_a_package_that_remote_code_lacks_is_named(
    remote: Path, options: SystemOptions, tmp_path: Path, line: str
) -> None:
    stand_in(tmp_path / "age", "age")
    code = tmp_path / "age" / "modeling.py"
    code.write_text(f"{line}\n{code.read_text(encoding='utf-8')}", encoding="utf-8")
    with pytest.raises(InputError, match="needs the package no_such_package; install it"):
        build_system(f"transformers-remote:{tmp_path / 'age'}", replace(options, trust_remote_code=True))


def test_an_address_that_is_no_url_is_refused(options: SystemOptions) -> None:
    with pytest.raises(InputError, match="no URL; write it as http://localhost:8080"):
        build_system("deeplasia-service:http://[::1", options)
