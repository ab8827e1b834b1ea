"""Which programs a model's steps take, and which of those that are compiled a step runs.

Owns: the list of all programs, the short list that suffices for every step, and what may run in a program's stead.
Does not know: what the programs compute, how they are compiled.

While programs are compiled in the background, a step for which the best program is missing runs a larger one: with
more rows of padding, with log-probabilities that nobody asked for, or the sampler that serves every mixture of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxinfer.sampling_params import MAX_LOGPROBS
from jaxinfer.wrappers.chains import NO_CHAINS, ChainRule
from jaxinfer.wrappers.in_flight import copy_sizes
from jaxinfer.wrappers.programs import ProgramCache, ProgramKey
from jaxinfer.wrappers.step_batch import SamplerVariant
from jaxinfer.wrappers.step_shapes import PREFILL_BLOCK, StepShape, StepShapes

_NUM_TOPS = (None, MAX_LOGPROBS)
"""How many of the most likely tokens samplers report, for requests without and with log-probabilities."""


class ProgramChoice:
    """The choice among the programs of one model.

    Args:
      programs: the compiled programs.
      shapes: the shapes of steps.
      chains: which steps are launched together.
    """

    def __init__(self, programs: ProgramCache, shapes: StepShapes, chains: ChainRule = NO_CHAINS):
        self._programs = programs
        self._shapes = shapes
        self._chains = chains
        self._all_shapes = shapes.all_shapes()
        self._copy_sizes = copy_sizes(shapes.max_chunks)

    def all_programs(self) -> list[ProgramKey]:
        """Every program that serving can take, save the samplers of wide beam searches."""
        wanted: list[ProgramKey] = [("edit",), ("allow",), *(("forward", shape) for shape in self._all_shapes)]
        wanted += [("copy", size) for size in self._copy_sizes]
        wanted += [_score(shape) for shape in self._all_shapes if shape.scored]
        for num_logits in sorted({shape.num_logits for shape in self._all_shapes}):
            wanted += [("sample_edited", num_logits, num_top) for num_top in _NUM_TOPS]
            for variant in SamplerVariant:
                wanted += [("sample", num_logits, variant, num_top) for num_top in _NUM_TOPS]
        decoding = [shape for shape in self._all_shapes if not shape.num_prefill]
        in_chains = [shape for shape in decoding if self._chains.covers(shape.num_decode)]
        return wanted + [self._chain(shape, variant) for shape in in_chains for variant in SamplerVariant]

    def covering_programs(self) -> list[ProgramKey]:
        """A few programs with which every step can run."""
        shapes = self._shapes.covering_shapes()
        wanted: list[ProgramKey] = [("edit",), ("allow",), ("copy", self._copy_sizes[-1])]
        wanted += [("forward", shape) for shape in shapes]
        wanted += dict.fromkeys(key for shape in shapes for key in _stand_ins(shape))
        most = max(shape.num_logits for shape in shapes)
        return wanted + [
            ("sample", most, variant, None) for variant in (SamplerVariant.GREEDY, SamplerVariant.UNFILTERED)
        ]

    def shape(self, needed: StepShape) -> StepShape:
        """The shape to run a step with: the needed one or, if its program is missing, the smallest that is ready."""
        if self._programs.is_complete:
            return needed
        ready = [
            shape
            for shape in self._all_shapes
            if shape.holds(needed) and self._programs.are_ready([("forward", shape), *_stand_ins(shape)])
        ]
        _, shape = self._programs.first_ready([("forward", shape) for shape in (needed, *ready)])
        return shape

    def has_chain(self, shape: StepShape, variant: SamplerVariant) -> bool:
        """Whether the program for chains of a shape is compiled; if not, the background begins to compile it."""
        key = self._chain(shape, variant)
        if self._programs.are_ready([key]):
            return True
        self._programs.compile_next(key)
        return False

    def compile_ahead(
        self,
        shape: StepShape,
        coming: Callable[[], Sequence[StepShape]],
        variant: SamplerVariant,
        num_top: int | None,
        *,
        is_edited: bool,
    ) -> None:
        """Begins to compile what follows a step whose forward program is about to be compiled.

        That is the step's sampler. Where the cache may work ahead, it is also the programs of the steps that are
        coming, whose samplers are taken to be like its own.

        Args:
          shape: the step's shape.
          coming: tells the shapes of those steps; called only if it matters.
          variant, num_top, is_edited: as in sampler.
        """
        forward: ProgramKey = ("forward", shape)
        if self._programs.are_ready([forward]) or not self._programs.may_compile_beside:
            return

        def sampler(of: StepShape) -> ProgramKey:
            return self.sampler(of.num_logits, variant, num_top, is_edited=is_edited)

        shapes = coming() if self._programs.may_work_ahead else ()
        following = [key for after in shapes for key in (("forward", after), sampler(after))]
        self._programs.compile_next(sampler(shape), *(key for key in following if key != forward))

    def _chain(self, shape: StepShape, variant: SamplerVariant) -> ProgramKey:
        return ("chain", shape, self._chains.length, variant)

    def copy_size(self, num_copies: int) -> int:
        """For how many page copies to take the program."""
        sizes = [size for size in copy_sizes(num_copies) if size >= num_copies]
        sizes += [size for size in self._copy_sizes if size > sizes[0]]
        _, size = self._programs.first_ready([("copy", size) for size in sizes])
        return size

    def sampler(self, num_logits: int, variant: SamplerVariant, num_top: int | None, *, is_edited: bool) -> ProgramKey:
        """The sampler of a step.

        Args:
          num_logits: rows of the step's shape.
          variant: the sampler that suffices for all rows.
          num_top: how many of the most likely tokens to report; None for no log-probabilities.
          is_edited: whether a row has edited logits.
        """
        num_tops = list(dict.fromkeys((num_top, MAX_LOGPROBS))) if num_top in _NUM_TOPS else [num_top]
        if is_edited:
            return self._programs.first_ready([("sample_edited", num_logits, number) for number in num_tops])
        variants = dict.fromkeys((variant, SamplerVariant.FULL))
        return self._programs.first_ready(
            [("sample", num_logits, variant, number) for variant in variants for number in num_tops]
        )


def _stand_ins(shape: StepShape) -> Sequence[ProgramKey]:
    """The programs that can sample and score any step of a shape."""
    samplers = [
        ("sample", shape.num_logits, SamplerVariant.FULL, MAX_LOGPROBS),
        ("sample_edited", shape.num_logits, MAX_LOGPROBS),
    ]
    return [*samplers, _score(shape)] if shape.scored else samplers


def _score(shape: StepShape) -> ProgramKey:
    return ("score", shape.num_prefill * PREFILL_BLOCK, MAX_LOGPROBS)
