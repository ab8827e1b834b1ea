"""Research on a model while it serves: ready-made interventions and attention; the rest is on LLM itself."""

from jaxinfer.research.attention import masked_attention
from jaxinfer.research.interventions import ablate, add, clamp_feature, patch, project_out, scale

__all__ = [
    "ablate",
    "add",
    "clamp_feature",
    "masked_attention",
    "patch",
    "project_out",
    "scale",
]
