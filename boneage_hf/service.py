"""One model for many requests: one at a time, each timed by stage; what the Space's page and endpoints both call."""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from .batch import AGE_TOLERANCE_MONTHS, BatchItem, BatchRow, TableRow, predict_batch
from .errors import InputError
from .explain import colour_attention, part_of_map
from .pipeline_boneage import BoneAgePipeline
from .quality import Quality, put_right
from .radiograph import Prefill, Radiograph, read
from .sex import Sex

#: Largest side of the pictures in the page, px; they are for looking, the model gets the whole radiograph.
DISPLAY_SIDE = 1000

#: Share of the attention map in the overlay that reports and the endpoint show.
OPACITY = 0.45

#: Stands on an answer for which the quality gate was turned off.
UNCHECKED = (
    "Read without the quality check, as asked: rely on neither bone age nor interval unless a person has seen that "
    "this is one upright hand."
)

NO_SEX = "Choose the child's sex first: girls' and boys' bones mature at different ages."


@dataclass(frozen=True)
class Reading:
    """One answer with its pictures.

    Args:
        answer: of the pipeline.
        seen: mode "L", the radiograph as the network saw it (turned, mirrored, inverted where the gate put it right),
            at most DISPLAY_SIDE px.
        corrections: what was put right, in words; without the gate too.
        colours: mode "RGB", the attention map over the same part, same size.
        seconds: by stage: `gate` (everything of the pipeline around the network: preparing the pixels and, where the
            pipeline has them, the checks), `network`, `drawing`.
    """

    answer: dict[str, Any]
    seen: Image.Image
    corrections: tuple[str, ...]
    colours: Image.Image
    seconds: dict[str, float]

    def overlay(self) -> Image.Image:
        """Mode "RGB": the map over the radiograph."""
        return Image.blend(self.seen.convert("RGB"), self.colours, OPACITY)


def model_name(pipe: BoneAgePipeline) -> str:
    """Hub id, or the name of the checkpoint folder (never its path), with backbone and input size."""
    source = str(pipe.model.name_or_path)
    name = Path(source).name if Path(source).exists() else source
    return f"{name} ({pipe.model.config.backbone}, {pipe.model.config.image_size} px)"


class Reader:
    """A pipeline that answers one request at a time, whoever asks."""

    def __init__(self, pipe: BoneAgePipeline) -> None:
        self.pipe = pipe
        self._turn = threading.Lock()

    @property
    def needs_sex(self) -> bool:
        return bool(self.pipe.model.config.uses_sex)

    def answer(self, radiograph: Radiograph, sex: Sex | None, *, check_quality: bool = True) -> Reading:
        """
        Raises:
            InputError: the sex is missing where the model needs it, or the pipeline refuses the radiograph.
        """
        if sex is None and self.needs_sex:
            raise InputError(NO_SEX)
        with self._turn:
            clock = _NetworkClock(self.pipe.model)
            began = time.perf_counter()
            with clock:
                answer = self.pipe(radiograph, sex=sex, check_quality=check_quality)
            ended = time.perf_counter()
        processor: Any = self.pipe.image_processor
        quality: Quality | None = answer["quality"]
        if quality is None:  # the image processor inverts dark bones all the same
            quality = Quality((), inverted=processor.prepare_and_tell(radiograph.image)[1])
        seen = put_right(display(radiograph.image), quality)
        part = part_of_map(seen.size, size=processor.size, resize_mode=processor.resize_mode)
        colours = colour_attention(answer["attention"], seen.height, seen.width, part=part)
        seconds = {
            "gate": ended - began - clock.seconds,
            "network": clock.seconds,
            "drawing": time.perf_counter() - ended,
        }
        return Reading(answer, seen, quality.corrections, colours, seconds)

    def rows(
        self, items: Sequence[BatchItem], *, table: Mapping[str, TableRow] | None, sex: Sex | None
    ) -> Iterator[BatchRow]:
        """As `batch.predict_batch`; between two rows others have their turn."""
        rows = predict_batch(self.pipe, items, table=table, sex=sex)
        while True:
            with self._turn:
                row = next(rows, None)
            if row is None:
                return
            yield row


class _NetworkClock:
    """Seconds that the network takes of what runs within it."""

    def __init__(self, model: Any) -> None:
        self.seconds = 0.0
        self._model = model

    def __enter__(self) -> "_NetworkClock":
        self._hooks = [
            self._model.register_forward_pre_hook(self._begin),
            self._model.register_forward_hook(self._end),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _begin(self, *call: Any) -> None:
        self._began = time.perf_counter()

    def _end(self, *call: Any) -> None:
        self.seconds += time.perf_counter() - self._began


def timed_read(content: bytes) -> tuple[Radiograph, float]:
    """A radiograph and the seconds that reading it took.

    Raises:
        InputError: as `radiograph.read`.
    """
    began = time.perf_counter()
    radiograph = read(content)
    return radiograph, time.perf_counter() - began


def display(image: Image.Image) -> Image.Image:
    """A copy with no side above DISPLAY_SIDE."""
    shown = image.copy()
    shown.thumbnail((DISPLAY_SIDE, DISPLAY_SIDE), Image.Resampling.HAMMING, reducing_gap=None)
    return shown


def contradictions(
    prefill: Prefill,
    *,
    sex: Sex | None,
    chronological_age_months: float | None,
    hand: Literal["left", "right"] | None = None,
) -> list[str]:
    """What a DICOM header says otherwise than the reader: a sentence each."""
    found = []
    if sex is not None and prefill.sex not in (None, sex):
        found.append(f"The DICOM header says {prefill.sex}, but {sex} was chosen: check which is right.")
    age, header_age = chronological_age_months, prefill.chronological_age_months
    if age is not None and header_age is not None and abs(age - header_age) > AGE_TOLERANCE_MONTHS:
        found.append("The DICOM header gives another chronological age than the one typed: check which is right.")
    if hand is not None and prefill.laterality not in (None, hand):
        found.append(
            f"The DICOM header says {prefill.laterality} hand, but the {hand} hand was chosen: check which it is."
        )
    return found


def not_taken(prefill: Prefill) -> list[str]:
    """A sentence on what a DICOM header says in vain; none where there is nothing of that."""
    if not prefill.unusable:
        return []
    names = ", ".join(prefill.unusable)
    return [f"Not taken from the DICOM header, because what it says is impossible or unclear: {names}."]
