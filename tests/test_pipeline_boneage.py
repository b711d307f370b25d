"""From files, pictures, data sets and tables to months."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from make_tiny_checkpoint import CHECKPOINT, GOLDEN, tiny_config, tiny_processor
from PIL import Image

from boneage_hf import BoneAgeModel, BoneAgePipeline, InputError, load_pipeline, radiograph
from boneage_hf.pipeline_boneage import predict_batch
from boneage_hf.registration import TASK

HAND = GOLDEN / "hand.png"
CPU = torch.device("cpu")
transformers_pipeline: Any = transformers.pipeline  # typed for the tasks of transformers only
GREY = np.asarray(radiograph.read(HAND).image)
#: The hand in four views that no model confuses.
VIEWS = [GREY, np.ascontiguousarray(GREY[:, ::-1]), np.ascontiguousarray(GREY[::-1]), np.ascontiguousarray(GREY.T)]


@pytest.fixture(scope="module")
def pipe() -> BoneAgePipeline:
    return load_pipeline(CHECKPOINT, device=CPU)


@pytest.fixture(scope="module")
def pipe_without_sex() -> BoneAgePipeline:
    torch.manual_seed(0)
    config = tiny_config()
    config.sex_input = "none"
    return BoneAgePipeline(model=BoneAgeModel(config).eval(), image_processor=tiny_processor(), task=TASK, device=CPU)


def months(answers: Any) -> list[float]:
    return [answer["bone_age_months"] for answer in answers]


def encoded(grey: np.ndarray, image_format: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(grey).save(stream, image_format)
    return stream.getvalue()


# --- what comes out -------------------------------------------------------------------------------------------------


def test_an_answer_has_months_interval_attention_and_sex(pipe: BoneAgePipeline) -> None:
    answer = pipe(HAND, sex="male")
    assert set(answer) == {"bone_age_months", "interval_months", "attention", "sex", "quality"}
    assert isinstance(answer["bone_age_months"], float)
    assert answer["interval_months"] is None  # this checkpoint has no interval
    assert (answer["attention"].shape, answer["attention"].dtype) == ((2, 2), np.float32)
    assert answer["sex"] == "male"


def test_the_answer_is_the_models_own(pipe: BoneAgePipeline) -> None:
    pixel_values = tiny_processor()(GREY, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = BoneAgeModel.from_pretrained(CHECKPOINT)(pixel_values, sex=torch.tensor([0]))
    answer = pipe(HAND, sex="female")
    assert answer["bone_age_months"] == float(output.bone_age_months[0])
    assert np.array_equal(answer["attention"], output.attention[0].numpy())


@pytest.mark.parametrize(("side", "verdict"), [(96, "pass"), (95, "warn")])
def test_a_picture_as_large_as_the_training_copies_is_not_called_small_where_the_network_reads_more(
    side: int, verdict: str
) -> None:
    config, processor = tiny_config(), tiny_processor()
    config.image_size, processor.source_size = 128, 96
    processor.size = {"height": 128, "width": 128}
    larger = BoneAgePipeline(model=BoneAgeModel(config).eval(), image_processor=processor, task=TASK, device=CPU)
    hand = Image.fromarray(GREY).resize((side, side))
    checks = larger(hand, sex="female")["quality"].checks
    assert {check.name: check.verdict for check in checks}["size"] == verdict


def test_sex_matters_to_a_model_that_uses_it(pipe: BoneAgePipeline) -> None:
    assert abs(pipe(HAND, sex="female")["bone_age_months"] - pipe(HAND, sex="male")["bone_age_months"]) > 1


# --- what goes in ---------------------------------------------------------------------------------------------------


def test_a_file_its_bytes_its_picture_and_its_pixels_give_the_same_months(pipe: BoneAgePipeline) -> None:
    opened = Image.open(HAND)
    with HAND.open("rb") as stream:
        inputs = [
            str(HAND),
            HAND,
            HAND.read_bytes(),
            stream,
            io.BytesIO(HAND.read_bytes()),
            radiograph.read(HAND),
            opened,
            opened.convert("RGB"),
            GREY,
            np.repeat(GREY[:, :, None], 3, axis=2),
        ]
        answers = [pipe(image, sex="female") for image in inputs]
    assert len(set(months(answers))) == 1


def test_a_list_gives_a_list_in_its_order(pipe: BoneAgePipeline) -> None:
    answers = pipe(VIEWS, sex="female")
    assert isinstance(answers, list)
    assert months(answers) == [pipe(view, sex="female")["bone_age_months"] for view in VIEWS]
    assert len(set(months(answers))) == len(VIEWS)


def test_a_tuple_is_as_good_as_a_list(pipe: BoneAgePipeline) -> None:
    assert months(pipe(tuple(VIEWS), sex="female")) == months(pipe(VIEWS, sex="female"))


def test_a_list_of_one_gives_a_list_of_one(pipe: BoneAgePipeline) -> None:
    assert months(pipe([HAND], sex="female")) == [pipe(HAND, sex="female")["bone_age_months"]]


@pytest.mark.parametrize("sex", ["female", ["female", "male"][:0], None])
def test_no_images_give_no_answers(pipe: BoneAgePipeline, sex: Any) -> None:
    assert pipe([], sex=sex) == []


def test_one_sex_per_image_may_be_given(pipe: BoneAgePipeline) -> None:
    answers = pipe([HAND, HAND, HAND], sex=["male", "female", "male"])
    assert [answer["sex"] for answer in answers] == ["male", "female", "male"]
    assert months(answers)[0] == months(answers)[2] == pipe(HAND, sex="male")["bone_age_months"]
    assert months(answers)[1] == pipe(HAND, sex="female")["bone_age_months"]


def test_a_dict_brings_image_and_sex_together(pipe: BoneAgePipeline) -> None:
    assert pipe({"image": HAND, "sex": "male"})["bone_age_months"] == pipe(HAND, sex="male")["bone_age_months"]
    answers = pipe([{"image": HAND, "sex": "male"}, {"image": VIEWS[1], "sex": "female"}])
    assert [answer["sex"] for answer in answers] == ["male", "female"]


def test_a_generator_is_answered_one_by_one(pipe: BoneAgePipeline) -> None:
    taken = []

    def images() -> Iterator[np.ndarray]:
        for index, view in enumerate(VIEWS):
            taken.append(index)
            yield view

    answers = pipe(images(), sex="female")
    first = next(iter(answers))
    assert len(taken) < len(VIEWS)
    assert first["bone_age_months"] == pipe(VIEWS[0], sex="female")["bone_age_months"]


def test_a_generator_of_dicts_is_answered_too(pipe: BoneAgePipeline) -> None:
    answers = list(pipe({"image": view, "sex": "male"} for view in VIEWS))
    assert months(answers) == months(pipe(VIEWS, sex="male"))


@pytest.mark.parametrize("batch_size", [2, 3, 4])
def test_batches_give_what_single_images_give(pipe: BoneAgePipeline, batch_size: int) -> None:
    sexes = ["female", "male", "male", "female"]
    singles, batched = pipe(VIEWS, sex=sexes), pipe(VIEWS, sex=sexes, batch_size=batch_size)
    np.testing.assert_allclose(months(batched), months(singles), rtol=0, atol=1e-4)
    for single, one in zip(singles, batched, strict=True):
        np.testing.assert_allclose(one["attention"], single["attention"], rtol=0, atol=1e-5)
        assert one["sex"] == single["sex"]


def dataset(names: list[str], codes: list[int]) -> Dataset:
    features = Features(image=ImageFeature(), sex=ClassLabel(names=names), id=Value("string"))
    rows = {"image": [Image.fromarray(view) for view in VIEWS[: len(codes)]], "sex": codes}
    return Dataset.from_dict({**rows, "id": [str(code) for code in codes]}, features=features)


def test_a_dataset_brings_its_class_labels_of_sex(pipe: BoneAgePipeline) -> None:
    answers = list(pipe(dataset(["female", "male"], [1, 0, 1]), batch_size=2))
    assert [answer["sex"] for answer in answers] == ["male", "female", "male"]
    expected = months(pipe(VIEWS[:3], sex=["male", "female", "male"]))
    np.testing.assert_allclose(months(answers), expected, rtol=0, atol=1e-4)


def test_class_labels_count_by_their_names_and_not_by_their_numbers(pipe: BoneAgePipeline) -> None:
    answers = list(pipe(dataset(["male", "female"], [1, 0])))
    assert [answer["sex"] for answer in answers] == ["female", "male"]


def test_a_dataset_with_sex_in_words_is_answered(pipe: BoneAgePipeline) -> None:
    rows = Dataset.from_dict({"image": [Image.fromarray(GREY)], "sex": ["male"]}, features=None)
    assert months(pipe(rows)) == [pipe(HAND, sex="male")["bone_age_months"]]


def test_a_dataset_with_class_labels_that_are_no_sexes_is_refused(pipe: BoneAgePipeline) -> None:
    with pytest.raises(InputError, match="'F'"):
        list(pipe(dataset(["F", "M"], [0, 1])))


def test_sex_beside_a_dataset_is_refused(pipe: BoneAgePipeline) -> None:
    with pytest.raises(InputError, match="its own sex column"):
        pipe(dataset(["female", "male"], [0]), sex="female")


def test_a_dataset_without_images_is_refused(pipe: BoneAgePipeline) -> None:
    with pytest.raises(InputError, match='no column "image"'):
        pipe(Dataset.from_dict({"picture": [1], "sex": ["male"]}))


# --- mirrored images ------------------------------------------------------------------------------------------------


def test_flip_average_is_the_mean_of_both_views(pipe: BoneAgePipeline) -> None:
    # Stretching and resizing commute with mirroring at these sizes, so the mirrored picture is the other view.
    averaged = pipe(HAND, sex="male", flip_average=True)
    one, other = pipe(VIEWS[:2], sex="male")
    assert averaged["bone_age_months"] == pytest.approx(
        (one["bone_age_months"] + other["bone_age_months"]) / 2, abs=1e-3
    )
    np.testing.assert_allclose(
        averaged["attention"], (one["attention"] + other["attention"][:, ::-1]) / 2, rtol=0, atol=1e-5
    )
    assert abs(one["bone_age_months"] - other["bone_age_months"]) > 0.1


def test_flip_average_does_not_tell_left_from_right(pipe: BoneAgePipeline) -> None:
    one, other = pipe(VIEWS[:2], sex="female", flip_average=True)
    assert one["bone_age_months"] == pytest.approx(other["bone_age_months"], abs=1e-3)


def test_flip_average_may_be_set_once_for_all_calls() -> None:
    always = transformers_pipeline(TASK, model=str(CHECKPOINT), flip_average=True, device=CPU)
    once = load_pipeline(CHECKPOINT, device=CPU)
    assert always(HAND, sex="male")["bone_age_months"] == once(HAND, sex="male", flip_average=True)["bone_age_months"]


def test_a_checkpoint_that_averages_flips_does_so_unless_a_call_says_otherwise(tmp_path: Path) -> None:
    model = BoneAgeModel.from_pretrained(CHECKPOINT)
    model.config.flip_average = True
    model.save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    always = transformers_pipeline(TASK, model=str(tmp_path), device=CPU)
    once = transformers_pipeline(TASK, model=str(CHECKPOINT), device=CPU)
    averaged = once(HAND, sex="male", flip_average=True)["bone_age_months"]
    single = once(HAND, sex="male")["bone_age_months"]
    assert averaged != single
    assert always(HAND, sex="male")["bone_age_months"] == pytest.approx(averaged, abs=1e-4)
    assert always(HAND, sex="male", flip_average=False)["bone_age_months"] == pytest.approx(single, abs=1e-4)


def test_predict_batch_averages_flips_of_a_whole_batch() -> None:
    model = BoneAgeModel.from_pretrained(CHECKPOINT)
    pixel_values = tiny_processor()(VIEWS, return_tensors="pt")["pixel_values"]
    sex = torch.tensor([0, 1, 1, 0])
    with torch.no_grad():
        both = predict_batch(model, pixel_values, sex=sex, flip_average=True)
        plain, mirrored = model(pixel_values, sex=sex), model(pixel_values.flip(-1), sex=sex)
    torch.testing.assert_close(both.bone_age_months, (plain.bone_age_months + mirrored.bone_age_months) / 2)
    torch.testing.assert_close(both.attention, (plain.attention + mirrored.attention.flip(-1)) / 2)


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inputs", [HAND, [HAND], {"image": HAND}, [{"image": HAND}]], ids=lambda value: str(type(value))
)
def test_a_model_that_uses_sex_refuses_to_do_without(pipe: BoneAgePipeline, inputs: Any) -> None:
    with pytest.raises(InputError, match="needs the child's sex"):
        pipe(inputs)


@pytest.mark.parametrize("sex", ["F", "Male", "", "f", "unknown"])
def test_a_sex_that_is_none_of_the_two_is_refused(pipe: BoneAgePipeline, sex: str) -> None:
    with pytest.raises(InputError, match='exactly "female" or "male"'):
        pipe(HAND, sex=sex)


@pytest.mark.parametrize("sex", [0, 1, True, 0.0])
def test_a_number_is_no_sex(pipe: BoneAgePipeline, sex: Any) -> None:
    with pytest.raises(InputError, match='"female" or "male"'):
        pipe(HAND, sex=sex)


def test_a_wrong_sex_in_a_dict_is_refused(pipe: BoneAgePipeline) -> None:
    for sex in ("M", 1, float("nan")):
        with pytest.raises(InputError, match='exactly "female" or "male"'):
            pipe({"image": HAND, "sex": sex})


def test_a_list_of_sexes_must_be_as_long_as_the_list_of_images(pipe: BoneAgePipeline) -> None:
    for images, sexes in (([HAND], ["male", "male"]), ([HAND, HAND], ["male"]), (HAND, ["male"]), ([HAND], [])):
        with pytest.raises(InputError, match="one of them for each image"):
            pipe(images, sex=sexes)


def test_an_empty_sex_in_a_dict_is_not_filled_from_the_argument(pipe: BoneAgePipeline) -> None:
    with pytest.raises(InputError, match="needs the child's sex"):
        pipe({"image": HAND, "sex": None}, sex="male")


def test_a_dict_without_an_image_is_refused(pipe: BoneAgePipeline) -> None:
    with pytest.raises(InputError, match='key "image"'):
        pipe({"picture": HAND, "sex": "male"})


def test_an_unknown_option_is_refused_by_its_name(pipe: BoneAgePipeline) -> None:
    with pytest.raises(InputError, match="no option gender"):
        pipe(HAND, sex="male", gender="male")


def test_an_unknown_option_of_the_constructor_is_refused() -> None:
    with pytest.raises(InputError, match="no option top_k"):
        transformers_pipeline(TASK, model=str(CHECKPOINT), top_k=3)


@pytest.mark.parametrize(
    "url", ["https://example.org/hand.png", "HTTP://example.org/hand.png", "file:///tmp/hand.png"]
)
def test_a_url_is_refused_wherever_a_file_is_meant(pipe: BoneAgePipeline, url: str) -> None:
    for inputs in (url, [url], [HAND, url], {"image": url}, [{"image": url}], (url,)):
        with pytest.raises(InputError, match="URL"):
            pipe(inputs, sex="female") if not isinstance(inputs, dict) else pipe(inputs | {"sex": "female"})


@pytest.mark.parametrize(
    "image",
    [
        (GREY.astype(np.uint16) * 257),
        GREY.astype(np.float32) / 255,
        Image.fromarray(GREY.astype(np.uint16) * 257),
        np.stack([GREY] * 2),
    ],
    ids=["uint16", "float32", "I;16", "two images"],
)
def test_pixels_that_are_not_eight_bit_grey_or_colour_are_refused(pipe: BoneAgePipeline, image: Any) -> None:
    with pytest.raises(InputError, match=r"radiograph\.read"):
        pipe(image, sex="female")


@pytest.mark.parametrize("image", [None, 3, 2.5, object()])
def test_what_is_no_image_at_all_is_refused(pipe: BoneAgePipeline, image: Any) -> None:
    with pytest.raises(InputError, match="path, bytes or a file"):
        pipe(image, sex="female")


def test_a_refusal_does_not_name_the_file(pipe: BoneAgePipeline, tmp_path: Path) -> None:
    path = tmp_path / "doe_jane.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(InputError) as refusal:
        pipe(path, sex="female")
    assert "doe" not in str(refusal.value)


# --- without sex input ----------------------------------------------------------------------------------------------


def test_a_model_without_sex_input_needs_none(pipe_without_sex: BoneAgePipeline) -> None:
    answer = pipe_without_sex(HAND)
    assert answer["sex"] is None
    assert np.isfinite(answer["bone_age_months"])


def test_a_model_without_sex_input_passes_a_given_sex_through(pipe_without_sex: BoneAgePipeline) -> None:
    answers = pipe_without_sex([HAND, HAND], sex=["female", "male"])
    assert [answer["sex"] for answer in answers] == ["female", "male"]
    assert months(answers) == [pipe_without_sex(HAND)["bone_age_months"]] * 2


def test_a_model_without_sex_input_answers_batches_with_and_without_sex(pipe_without_sex: BoneAgePipeline) -> None:
    answers = pipe_without_sex([{"image": HAND, "sex": "male"}, {"image": HAND}], batch_size=2)
    assert [answer["sex"] for answer in answers] == ["male", None]


def test_a_model_without_sex_input_still_refuses_a_wrong_sex(pipe_without_sex: BoneAgePipeline) -> None:
    with pytest.raises(InputError, match='exactly "female" or "male"'):
        pipe_without_sex(HAND, sex="M")


# --- sixteen bits ---------------------------------------------------------------------------------------------------


def test_a_pipeline_in_bfloat16_answers_nearly_the_same(pipe: BoneAgePipeline) -> None:
    half = load_pipeline(CHECKPOINT, dtype=torch.bfloat16, device=CPU)
    assert half.model.dtype == torch.bfloat16
    answer = half(HAND, sex="female")
    assert answer["bone_age_months"] == pytest.approx(pipe(HAND, sex="female")["bone_age_months"], abs=3)
    assert answer["attention"].dtype == np.float32


# --- tables ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def table() -> pd.DataFrame:
    return pd.DataFrame(
        {"id": ["a", "b", "c"], "image": [str(HAND), HAND, GREY], "sex": ["female", "male", "female"]},
        index=[7, 3, 5],
    )


def test_a_table_comes_back_with_months_and_interval(pipe: BoneAgePipeline, table: pd.DataFrame) -> None:
    result = pipe.predict_table(table)
    added = ["predicted_months", "interval_low_months", "interval_high_months"]
    assert list(result.columns) == ["id", "image", "sex", *added]
    assert list(result.index) == [7, 3, 5]
    assert {str(result[name].dtype) for name in added} == {"float64"}
    expected = months(pipe([HAND, HAND, HAND], sex=["female", "male", "female"]))
    np.testing.assert_allclose(result["predicted_months"], expected, rtol=0, atol=1e-4)
    assert result[added[1:]].isna().all(axis=None)


def test_the_table_that_was_given_is_not_changed(pipe: BoneAgePipeline, table: pd.DataFrame) -> None:
    before = table.copy(deep=True)
    pipe.predict_table(table)
    pd.testing.assert_frame_equal(table, before)


def test_columns_of_a_table_may_have_other_names(pipe: BoneAgePipeline, table: pd.DataFrame) -> None:
    renamed = table.rename(columns={"image": "file", "sex": "gender"})
    result = pipe.predict_table(renamed, image_column="file", sex_column="gender", batch_size=1)
    np.testing.assert_allclose(result["predicted_months"], pipe.predict_table(table)["predicted_months"], atol=1e-4)


def test_a_table_may_be_predicted_from_both_views(pipe: BoneAgePipeline, table: pd.DataFrame) -> None:
    result = pipe.predict_table(table, flip_average=True)
    assert result["predicted_months"].iloc[0] == pytest.approx(
        pipe(HAND, sex="female", flip_average=True)["bone_age_months"], abs=1e-4
    )


def test_a_table_without_rows_comes_back_without_rows(pipe: BoneAgePipeline, table: pd.DataFrame) -> None:
    result = pipe.predict_table(table.iloc[:0])
    assert len(result) == 0
    assert str(result["predicted_months"].dtype) == "float64"


@pytest.mark.parametrize("column", ["image", "sex"])
def test_a_missing_column_is_named(pipe: BoneAgePipeline, table: pd.DataFrame, column: str) -> None:
    with pytest.raises(InputError, match=f"no column '{column}'"):
        pipe.predict_table(table.drop(columns=column))


@pytest.mark.parametrize("sex", ["M", None, float("nan"), 1])
def test_a_row_with_a_wrong_sex_is_named_by_its_position(pipe: BoneAgePipeline, table: pd.DataFrame, sex: Any) -> None:
    table["sex"] = pd.Series(["female", sex, "female"], index=table.index, dtype=object)
    with pytest.raises(InputError, match=r"Row 2 of the table: sex must be exactly"):
        pipe.predict_table(table)


@pytest.mark.parametrize("image", ["no/such/file.png", None, "https://example.org/hand.png"])
def test_a_row_with_an_unusable_image_is_named_by_its_position(
    pipe: BoneAgePipeline, table: pd.DataFrame, image: Any
) -> None:
    table["image"] = pd.Series([HAND, HAND, image], index=table.index, dtype=object)
    with pytest.raises(InputError, match=r"^Row 3 of the table: ") as refusal:
        pipe.predict_table(table)
    assert "no/such/file" not in str(refusal.value)


def test_a_table_without_sex_serves_a_model_without_sex_input(
    pipe_without_sex: BoneAgePipeline, table: pd.DataFrame
) -> None:
    result = pipe_without_sex.predict_table(table.drop(columns="sex"), sex_column=None)
    assert result["predicted_months"].notna().all()


def test_a_table_without_sex_does_not_serve_a_model_that_uses_it(pipe: BoneAgePipeline, table: pd.DataFrame) -> None:
    with pytest.raises(InputError, match=r"Row 1 of the table: This model needs the child's sex"):
        pipe.predict_table(table, sex_column=None)
