"""Bone age in months from a child's hand radiograph.

The names below are imported on first use, because torch and transformers take seconds and `boneage --help` should not
wait for them. Using any of them also registers the model with transformers' Auto classes and `pipeline("bone-age")`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "BoneAgeConfig": "configuration_boneage",
    "BoneAgeImageProcessor": "image_processing_boneage",
    "BoneAgeMetric": "evaluate_metric",
    "BoneAgeModel": "modeling_boneage",
    "BoneAgeOutput": "modeling_boneage",
    "BoneAgePipeline": "pipeline_boneage",
    "InputError": "errors",
    "Radiograph": "radiograph",
    "RefusedError": "quality",
    "load_pipeline": "hub",
    "load_split": "data",
    "read": "radiograph",
}
_NEED_REGISTRATION = {"BoneAgeConfig", "BoneAgeImageProcessor", "BoneAgeModel", "BoneAgePipeline", "load_pipeline"}

__all__ = [
    "BoneAgeConfig",
    "BoneAgeImageProcessor",
    "BoneAgeMetric",
    "BoneAgeModel",
    "BoneAgeOutput",
    "BoneAgePipeline",
    "InputError",
    "Radiograph",
    "RefusedError",
    "load_pipeline",
    "load_split",
    "read",
]

if TYPE_CHECKING:
    from .configuration_boneage import BoneAgeConfig
    from .data import load_split
    from .errors import InputError
    from .evaluate_metric import BoneAgeMetric
    from .hub import load_pipeline
    from .image_processing_boneage import BoneAgeImageProcessor
    from .modeling_boneage import BoneAgeModel, BoneAgeOutput
    from .pipeline_boneage import BoneAgePipeline
    from .quality import RefusedError
    from .radiograph import Radiograph, read


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _NEED_REGISTRATION:
        import_module(".registration", __name__)
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
