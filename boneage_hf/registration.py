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
    # So that save_pretrained and push_to_hub of a pipeline write the code that the checkpoint needs elsewhere.
    BoneAgeConfig.register_for_auto_class("AutoConfig")
    BoneAgeModel.register_for_auto_class("AutoModel")
    BoneAgeImageProcessor.register_for_auto_class("AutoImageProcessor")
    if TASK not in PIPELINE_REGISTRY.supported_tasks:
        PIPELINE_REGISTRY.register_pipeline(TASK, pipeline_class=BoneAgePipeline, pt_model=AutoModel, type="image")


_register()
