"""Research on a model while it serves: ready-made interventions; captures and interventions are on LLM itself."""

from jaxinfer.research.interventions import ablate, add, clamp_feature, patch, project_out, scale

__all__ = ["ablate", "add", "clamp_feature", "patch", "project_out", "scale"]
