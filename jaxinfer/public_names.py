"""The public names of jaxinfer; `jaxinfer` imports them from here when the first of them is used.

Owns: the list of public names.
Does not know: what they are.
"""

from jaxinfer import distributed
from jaxinfer.api.async_llm import AsyncLLM
from jaxinfer.api.experiments import logprob_fn
from jaxinfer.api.generate import generate
from jaxinfer.api.llm import LLM
from jaxinfer.config import EngineConfig, ModelConfig
from jaxinfer.engine.dynamic_engine import DynamicEngine
from jaxinfer.engine.stats import EngineStats
from jaxinfer.errors import EngineClosedError, ProcessLostError, RequestFailedError
from jaxinfer.interventions import BoundIntervention, Intervention, intervention
from jaxinfer.kernels.paged_attention import register_attention
from jaxinfer.logits_functions import LogitsFunction, logits_processor, sampler
from jaxinfer.models.registry import ModelFamily, register_model
from jaxinfer.outputs import CompletionOutput, GenerationRecord, Logprob, RequestOutput
from jaxinfer.request import Request, TokenEvent
from jaxinfer.research.logit_lens import LogitLens
from jaxinfer.research.table import Table
from jaxinfer.sampling_params import BeamSearchParams, SamplingParams
from jaxinfer.sites import Site, Sites

__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchParams",
    "BoundIntervention",
    "CompletionOutput",
    "DynamicEngine",
    "EngineClosedError",
    "EngineConfig",
    "EngineStats",
    "GenerationRecord",
    "Intervention",
    "LogitLens",
    "LogitsFunction",
    "Logprob",
    "ModelConfig",
    "ModelFamily",
    "ProcessLostError",
    "Request",
    "RequestFailedError",
    "RequestOutput",
    "SamplingParams",
    "Site",
    "Sites",
    "Table",
    "TokenEvent",
    "distributed",
    "generate",
    "intervention",
    "logits_processor",
    "logprob_fn",
    "register_attention",
    "register_model",
    "sampler",
]
