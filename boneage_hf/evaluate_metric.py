"""The error measures of `metrics.py` as a metric of the `evaluate` library (works offline)."""

from collections.abc import Sequence
from typing import Any

import evaluate
from datasets import Features, Value
from evaluate.utils.file_utils import add_start_docstrings

from .metrics import DEFINITIONS, error_metrics

_INPUTS = """
Args:
    predictions: n predicted bone ages in months.
    references: n reference bone ages in months, in the same order.
    n_resamples: bootstrap samples for the intervals, 2000 unless told.
    seed: of the bootstrap, 0 unless told.
Returns:
    a dict with `n`, every measure above and `<measure>_ci95`.
Raises:
    boneage_hf.errors.InputError: for empty or non-finite values, or for predictions in years.
Examples:
    >>> BoneAgeMetric().compute(predictions=[120.0, 131.0], references=[126.0, 129.0])["mae_months"]
    4.0
"""


@add_start_docstrings("Errors of predicted bone ages in months.\n", DEFINITIONS, _INPUTS)
class BoneAgeMetric(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DEFINITIONS,
            citation="",
            inputs_description=_INPUTS,
            features=Features({"predictions": Value("float64"), "references": Value("float64")}),
        )

    def _compute(
        self, predictions: Sequence[float], references: Sequence[float], *, n_resamples: int = 2000, seed: int = 0
    ) -> dict[str, Any]:
        return error_metrics(predictions, references, n_resamples=n_resamples, seed=seed)
