"""Makes transformers' Auto classes and `pipeline("bone-age")` know this package's classes; imported for its effect."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_boneage import BoneAgeConfig
from .image_processing_boneage import BoneAgeImageProcessor
from .modeling_boneage import BoneAgeModel
from .pipeline_boneage import BoneAgePipeline

TASK = "bone-age"


def _register() -> None:
    AutoConfig.register(BoneAgeConfig.model_type, BoneAgeConfig, exist_ok=True)
    AutoModel.register(BoneAgeConfig, BoneAgeModel, exist_ok=True)
    AutoImageProcessor.register(BoneAgeConfig, BoneAgeImageProcessor, exist_ok=True)
    if TASK not in PIPELINE_REGISTRY.supported_tasks:
        PIPELINE_REGISTRY.register_pipeline(TASK, pipeline_class=BoneAgePipeline, pt_model=AutoModel, type="image")


_register()
