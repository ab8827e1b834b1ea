"""The settings of the engine and the numbers of a model; the classes that users write are imported from here."""

from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.config.generation_defaults import GenerationDefaults
from jaxinfer.config.model_config import ModelConfig, RopeConfig

__all__ = ["EngineConfig", "GenerationDefaults", "ModelConfig", "RopeConfig"]
