"""The one way from a file to months: read, prepare, predict. Python, command line, Space and benchmark all call it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Pipeline

from .errors import InputError
from .image_processing_boneage import BoneAgeImageProcessor
from .interval_boneage import interval_months
from .modeling_boneage import BoneAgeModel, BoneAgeOutput
from .quality import GateReading, Quality, RefusedError, inspect, judge, refuse, to_standard_pose
from .radiograph import Radiograph, colour_share, has_phantom_mark, read
from .sex import SEX_INDEX, SEXES, Sex, parse_sex


def predict_batch(
    model: BoneAgeModel,
    pixel_values: torch.Tensor,
    *,
    sex: torch.Tensor | None,
    flip_average: bool | None = None,
    output_features: bool = False,
) -> BoneAgeOutput:
    """The forward pass that every prediction of this package goes through.

    Args:
        model: in evaluation mode.
        pixel_values: (B, 3, S, S) from the image processor.
        sex: (B,) integers, 0 female and 1 male, or None for a model that does not use sex.
        flip_average: average bone age and attention with those of the mirrored image (mirrored back); None does what
            the checkpoint's config says.
        output_features: also return the feature maps of the image as it stands.

    Returns:
        `bone_age_months` (B,), `attention` (B, h, w) and, if asked for, `features` (B, C, h, w).
    """
    output: BoneAgeOutput = model(pixel_values=pixel_values, sex=sex, output_features=output_features)
    if not (model.config.flip_average if flip_average is None else flip_average):
        return output
    mirrored = model(pixel_values=pixel_values.flip(-1), sex=sex)
    return BoneAgeOutput(
        bone_age_months=(output.bone_age_months + mirrored.bone_age_months) / 2,
        attention=(output.attention + mirrored.attention.flip(-1)) / 2,
        features=output.features,
    )


class BoneAgePipeline(Pipeline):
    """Bone age in months from hand radiographs.

    ```python
    pipe = pipeline("bone-age", model=..., trust_remote_code=True)
    pipe("hand.png", sex="female")
    pipe(["a.png", "b.dcm"], sex=["female", "male"], batch_size=8)
    pipe([{"image": "a.png", "sex": "female"}])
    ```

    An image is a file (path, bytes or binary file object; PNG, JPEG, TIFF or DICOM), a `Radiograph`, an 8-bit PIL
    image or a uint8 array (H, W) or (H, W, 3). Each answer is a dict with

    * `bone_age_months` (`float`), `interval_months` (`[low, high]`, or `None` where the checkpoint has none;
      90 %, see `interval_boneage.py` for what that means),
    * `attention` (`np.ndarray` (h, w), float32, raw values in (0, 1)) and `sex` (`str`, or `None` if not given),
    * `quality` (`Quality`: the checks that the image passed, warnings, and what was put right; `None` if turned off).
      The attention belongs to the image as `quality.put_right` gives it.

    Options of a call: `sex` (`"female"` or `"male"`, or one per image), `flip_average` (`bool`; by
    default what the checkpoint's config says), `check_quality` (`bool`, default `True`), `batch_size`.
    """

    model: BoneAgeModel
    image_processor: BoneAgeImageProcessor

    _load_processor = False  # type: ignore[assignment]
    _load_image_processor = True  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]
    _load_tokenizer = False  # type: ignore[assignment]

    def _sanitize_parameters(
        self,
        sex: str | None = None,
        flip_average: bool | None = None,
        check_quality: bool | None = None,
        **unknown: Any,
    ) -> tuple[dict, dict, dict]:
        if unknown:
            raise InputError(
                f"The bone-age pipeline has no option {', '.join(sorted(unknown))}; it has sex, flip_average, "
                "check_quality and batch_size."
            )
        preprocess: dict[str, Any] = {} if sex is None else {"sex": sex}
        if check_quality is not None:
            preprocess["check_quality"] = check_quality
        forward = {} if flip_average is None else {"flip_average": flip_average}
        return preprocess, forward, {}

    def __call__(self, inputs: Any, *, sex: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """One answer for one image; a list for a list or tuple; an iterator for a data set or generator.

        Raises:
            InputError: an image cannot be read, or sex is missing where the model needs it or is not one of the two.
            RefusedError: an InputError with all checks in `quality`: the quality gate refuses an image.
        """
        if hasattr(inputs, "features") and hasattr(inputs, "column_names"):
            if sex is not None:
                raise InputError("A data set brings its own sex column; leave the argument sex out.")
            if "image" not in inputs.column_names:
                raise InputError('The data set has no column "image"; rename its column of images with rename_column.')
            return super().__call__(_rows(inputs), **kwargs)
        if isinstance(inputs, tuple):
            inputs = list(inputs)
        if sex is None or isinstance(sex, str):
            if isinstance(inputs, list) and not inputs:
                return []
            return super().__call__(inputs, **({} if sex is None else {"sex": parse_sex(sex)}), **kwargs)
        if not isinstance(inputs, list) or not isinstance(sex, Sequence) or len(sex) != len(inputs):
            raise InputError('sex must be "female" or "male", or a list with one of them for each image of a list.')
        pairs = [{"image": image, "sex": parse_sex(value)} for image, value in zip(inputs, sex, strict=True)]
        return super().__call__(pairs, **kwargs) if pairs else []

    def preprocess(  # type: ignore[override]
        self, image: Any, sex: str | None = None, check_quality: bool = True
    ) -> dict[str, Any]:
        """One image -> `pixel_values` (1, 3, S, S), `sex` (1,; -1 if not known) and what is `known` of it."""
        if isinstance(image, _Row):
            try:
                row = {"image": image.image, "sex": image.sex} if image.sex else image.image
                answer = self.preprocess(row, check_quality=check_quality)
                return answer | {"known": replace(answer["known"], row=image.number)}
            except InputError as error:
                raise _in_row(image.number, error) from None
        if isinstance(image, Mapping):
            if "image" not in image:
                raise InputError('An input given as a dict needs the key "image" (and "sex").')
            sex = image.get("sex", sex)
            image = image["image"]
        if sex is not None:
            sex = parse_sex(sex)
        elif self.model.config.uses_sex:
            raise InputError('This model needs the child\'s sex: pass sex="female" or sex="male".')
        if not isinstance(image, Radiograph | Image.Image | np.ndarray):
            image = read(image)
        radiograph = image if isinstance(image, Radiograph) else None
        if radiograph is not None:
            image = radiograph.image
        prepared, inverted = self.image_processor.prepare_and_tell(image)
        quality = None
        if check_quality:
            # A network that reads enlarged copies has never seen more detail than the copies have.
            reads, copies = self.model.config.image_size, self.image_processor.source_size
            detail = reads if copies is None else min(reads, copies)
            quality = _inspected(image, radiograph, inverted=inverted, image_size=detail)
            refuse(quality)
        # -1 stands for "not given" so that a batch collates; only a model that does not use sex ever sees it.
        return {
            "pixel_values": self.image_processor.to_pixel_values(torch.from_numpy(prepared)[None]),
            "sex": torch.tensor([-1 if sex is None else SEX_INDEX[sex]]),
            "known": _Known(quality),
        }

    def _forward(self, model_inputs: Any, flip_average: bool | None = None) -> Any:  # type: ignore[override]
        pixel_values, sex = model_inputs["pixel_values"].to(self.model.dtype), model_inputs["sex"]
        known = model_inputs["known"] if isinstance(model_inputs["known"], list) else [model_inputs["known"]]
        gate = self.model.gate if any(item.quality is not None for item in known) else None

        def predict(part: torch.Tensor | slice) -> BoneAgeOutput:
            return predict_batch(
                self.model,
                pixel_values[part],
                sex=sex[part] if self.model.config.uses_sex else None,
                flip_average=flip_average,
                output_features=gate is not None,
            )

        output: Any = predict(slice(None))
        if gate is not None:
            before = gate.distance(output.features)  # (B,)
            poses = gate.poses_of(gate.pose_scores(gate.cells(output.features)), before)  # (B,)
            turned = poses.nonzero()[:, 0]
            if len(turned):
                pixel_values = pixel_values.clone()
                for index in turned:
                    pixel_values[index] = to_standard_pose(pixel_values[index], int(poses[index]))
                again: Any = predict(turned)
                # A turn must bring the hand nearer to upright hands; what is no hand may look turned in any pose.
                better = gate.distance(again.features) < before[turned]
                better |= poses[turned] % 4 == 0
                poses[turned[~better]] = 0
                for name in ("bone_age_months", "attention", "features"):
                    output[name][turned[better]] = again[name][better]
            cut_off, distance = gate.cut_off_score(gate.cells(output.features)), gate.distance(output.features)
            known = [
                replace(item, reading=GateReading(float(distance[i]), int(poses[i]), float(cut_off[i])))
                for i, item in enumerate(known)
            ]
        return {
            "bone_age_months": output.bone_age_months,
            "attention": output.attention,
            "sex": sex,
            "known": known,
        }

    def postprocess(self, model_outputs: Any) -> dict[str, Any]:  # type: ignore[override]
        # Of a batch the pipeline's iterator has taken the one that belongs to this image.
        known = model_outputs["known"][0] if isinstance(model_outputs["known"], list) else model_outputs["known"]
        quality = None if known.quality is None else judge(known.quality, self.model.config.gate, known.reading)
        if quality is not None:
            try:
                refuse(quality)
            except InputError as error:
                raise error if known.row is None else _in_row(known.row, error) from None
        sex = int(model_outputs["sex"][0])
        months = float(model_outputs["bone_age_months"][0])
        interval = self.model.config.interval
        return {
            "bone_age_months": months,
            "interval_months": None if interval is None else [float(end) for end in interval_months(months, interval)],
            "attention": model_outputs["attention"][0].float().numpy(),
            "sex": None if sex < 0 else SEXES[sex],
            "quality": quality,
        }

    def predict_table(
        self,
        table: Any,
        *,
        image_column: str = "image",
        sex_column: str | None = "sex",
        batch_size: int = 16,
        flip_average: bool | None = None,
        check_quality: bool = True,
    ) -> Any:
        """A pandas table in, the same out with `predicted_months`, `interval_low_months`, `interval_high_months`.

        Args:
            table: `pandas.DataFrame`, one row per radiograph; not changed.
            image_column: column of files, PIL images or arrays.
            sex_column: column of `"female"` / `"male"`; None only for a model that does not use sex.

        Raises:
            InputError: a column is missing, or a row's image or sex cannot be used (the row is named by its position),
                also if the quality gate refuses the image (RefusedError).
        """
        missing = [name for name in (image_column, sex_column) if name is not None and name not in table.columns]
        if missing:
            raise InputError(
                f"The table has no column {', '.join(map(repr, missing))}; name it by image_column or sex_column."
            )
        rows = [_Row(number, image) for number, image in enumerate(table[image_column], start=1)]
        if sex_column is not None:
            for position, value in enumerate(table[sex_column]):
                try:
                    rows[position] = replace(rows[position], sex=parse_sex(value))
                except InputError as error:
                    raise InputError(f"Row {position + 1} of the table: {error}") from None
        answers = self(rows, batch_size=batch_size, flip_average=flip_average, check_quality=check_quality)
        intervals = [answer["interval_months"] or [np.nan, np.nan] for answer in answers]
        result = table.copy()
        # As float64 so that a table without rows has columns of numbers too.
        result["predicted_months"] = np.array([answer["bone_age_months"] for answer in answers], dtype=np.float64)
        result["interval_low_months"] = np.array([low for low, _ in intervals], dtype=np.float64)
        result["interval_high_months"] = np.array([high for _, high in intervals], dtype=np.float64)
        return result


@dataclass(frozen=True)
class _Known:
    """What is known of one image beside its tensors: its quality so far, what the gate read, its row (from 1)."""

    quality: Quality | None
    reading: GateReading | None = None
    row: int | None = None


def _in_row(number: int, error: InputError) -> InputError:
    message = f"Row {number} of the table: {error}"
    return RefusedError(message, error.quality) if isinstance(error, RefusedError) else InputError(message)


def _inspected(
    image: Image.Image | np.ndarray, radiograph: Radiograph | None, *, inverted: bool, image_size: int
) -> Quality:
    picture = image if isinstance(image, Image.Image) else Image.fromarray(np.squeeze(image))
    if radiograph is not None:
        share, drawn = radiograph.colour_share, radiograph.drawn_phantom
    else:
        share, drawn = colour_share(picture) or 0.0, has_phantom_mark(picture)
    grey = picture.convert("L")
    return inspect(grey, image_size=image_size, colour_share=share, inverted=inverted, drawn_phantom=drawn)


@dataclass(frozen=True)
class _Row:
    """One row of a table, with its number (from 1) for messages."""

    number: int
    image: Any
    sex: Sex | None = None


def _rows(dataset: Any) -> Iterator[dict[str, Any]]:
    """Rows of a `datasets.Dataset` as pipeline inputs; class labels of sex become their names."""
    names = getattr(dataset.features.get("sex"), "names", None)
    for row in dataset:
        sex = row.get("sex")
        item = {"image": row["image"]}
        if sex is not None:
            item["sex"] = names[sex] if names is not None else sex
        yield item
