"""Lets the tests' LLMs of equal settings share programs: each is traced once, and JAX lowers and compiles it once.

That is for the tests alone: a user who has changed the code of a layer expects the next LLM to run it. A test that
patches code which is traced must therefore give its LLM settings that no other test has.
"""

import functools
import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax

from jaxinfer.models.registry import find_family
from jaxinfer.request import MAX_LOGPROBS
from jaxinfer.wrappers import assembly, decoder_wrapper
from jaxinfer.wrappers.decoder_wrapper import DecoderWrapper
from jaxinfer.wrappers.step_batch import SamplerVariant
from jaxinfer.wrappers.step_programs import StepPrograms
from jaxinfer.wrappers.step_shapes import StepShape, StepShapes

PROGRAMS = (
    "forward",
    "chain",
    "tapped",
    "place",
    "sample_by",
    "sample",
    "sample_edited",
    "score",
    "edit",
    "allow",
    "logits",
    "copy",
)


def share_programs() -> Callable[[], None]:
    """Replaces the makers of abstract models and of StepPrograms by ones that remember what they made.

    Returns:
      What makes them, and JAX, forget it; open LLMs keep what they have.
    """
    make_model, models, programs = assembly.abstract_model, {}, {}

    def abstract_model(model_config, layout):
        key = find_family(model_config.architecture).build, model_config, layout
        if key not in models:
            models[key] = make_model(model_config, layout)
        return models[key]

    def step_programs(model, *, shapes, **others):
        key = id(model), repr(vars(shapes)), *others.values()
        if key not in programs:
            programs[key] = made = StepPrograms(model, shapes=shapes, **others)
            for name in PROGRAMS:
                setattr(made, name, functools.cache(getattr(made, name)))
        return programs[key]

    def forget() -> None:
        models.clear()
        programs.clear()
        jax.clear_caches()
        gc.collect()

    assembly.abstract_model, decoder_wrapper.StepPrograms = abstract_model, step_programs
    return forget


def take_few_programs(set_attribute: Callable[[type, str, Any], None]) -> None:
    """Pads every step to the largest shape and samples it by the most general sampler, so that little is compiled."""
    smallest, fastest = StepShapes.shape, DecoderWrapper._sampler

    def largest(self, *, num_logits: int, scored: bool = False, **_) -> StepShape:
        largest = {"num_decode": self.max_decode, "num_prefill": self.max_prefill, "num_logits": num_logits}
        return smallest(self, **largest, scored=scored)

    def general(self, batch, num_logits: int):
        num_top = max(batch.num_top or 0, MAX_LOGPROBS)
        return fastest(self, replace(batch, variant=SamplerVariant.FULL, num_top=num_top), num_logits)

    set_attribute(StepShapes, "shape", largest)
    set_attribute(DecoderWrapper, "_sampler", general)
