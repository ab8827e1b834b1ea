"""`jaxinfer replay`: generates recorded outputs again and compares them token by token.

Owns: reading a file of records, loading the LLMs that they need, the comparison.
Does not know: how tokens are generated, how results are printed.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxinfer.api.llm import LLM
from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.outputs import CompletionRecord, GenerationRecord, RequestOutput
from jaxinfer.sampling_params import SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """The first token at which a replayed completion differs from the recorded one; `str()` of it is a sentence.

    Args:
      index: which of the record's completions differs.
      position: index of the token in the completion.
      recorded, replayed: the two tokens as shown to people (id and text), or "the end" of the shorter completion.
    """

    index: int
    position: int
    recorded: str
    replayed: str

    def __str__(self) -> str:
        return (
            f"completion {self.index} differs at token {self.position}: recorded {self.recorded}, now {self.replayed}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """The result of replaying one record; `str()` of it is a sentence.

    Args:
      num_tokens: number of recorded tokens of all completions.
      differences: one for each completion that differs.
      warnings: versions, devices and model files that have changed since the record was made, in words.
    """

    num_tokens: int
    differences: tuple[Difference, ...]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        return "; ".join(map(str, self.differences)) or f"same, {self.num_tokens} tokens"


@dataclass(frozen=True, slots=True)
class _Setup:
    """The arguments of the LLM that a record needs; records with the same arguments share one LLM."""

    model: str
    tokenizer: str | None
    engine: EngineConfig


def read_records(file: Path) -> list[GenerationRecord]:
    """Reads the records in a file, which has one per line; empty lines are skipped.

    Raises:
      OSError: the file cannot be read.
      ValueError: a line is not a record (the message names file and line), or the file has no records.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records += [GenerationRecord.from_json(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from error
    if not records:
        raise ValueError(f"{file} holds no records; jaxinfer generate --record {file} adds some")
    return records


def replay_records(
    records: Sequence[GenerationRecord], *, model: str | None = None, tokenizer: str | None = None
) -> list[Replay]:
    """Generates again from the recorded token ids, parameters and seeds, and compares the tokens by id.

    Records with the same model and settings are generated together, with one LLM. A completion that was recorded before
    its end (it was aborted, or is from the middle of a stream) is generated and compared only as far as it was
    recorded.

    Args:
      records: the records, of any models and settings.
      model, tokenizer: used for all records instead of the recorded ones.

    Returns:
      One Replay per record, in order.

    Raises:
      ValueError: a record names no model and none is given.
      As LLM and LLM.generate.
    """
    groups: dict[_Setup, list[int]] = {}
    for number, record in enumerate(records):
        groups.setdefault(_setup(number, record, model, tokenizer), []).append(number)
    replays: dict[int, Replay] = {}
    for setup, numbers in groups.items():
        replays |= zip(numbers, _replay_group(setup, [records[number] for number in numbers]), strict=True)
    return [replays[number] for number in range(len(records))]


def _setup(number: int, record: GenerationRecord, model: str | None, tokenizer: str | None) -> _Setup:
    provenance = record.provenance
    named = model or provenance.model
    if named is None:
        raise ValueError(f"record {number + 1} has no model, its weights were in memory; name one with --model")
    tokenizer = tokenizer or provenance.tokenizer
    if tokenizer is not None and tokenizer.startswith("<"):
        raise ValueError(
            f"record {number + 1} was made with a tokenizer object, {tokenizer}; name a tokenizer with --tokenizer"
        )
    return _Setup(named, tokenizer, provenance.engine)


def _replay_group(setup: _Setup, records: Sequence[GenerationRecord]) -> list[Replay]:
    with LLM(setup.model, tokenizer=setup.tokenizer, **dataclasses.asdict(setup.engine)) as llm:
        replays: dict[int, Replay] = {}
        for run, params in _runs(llm, records):
            outputs = run([records[number].prompt_token_ids for number in params], list(params.values()))
            for number, output in zip(params, outputs, strict=True):
                replays[number] = _compare(records[number], output, llm)
        return [replays[number] for number in range(len(records))]


def _runs(llm: LLM, records: Sequence[GenerationRecord]) -> list[tuple[Callable[..., Any], dict[int, Any]]]:
    """Splits the records into samples and beam searches.

    Returns:
      For each kind the LLM's method that generates it, and the parameters of its records by index.
    """
    sampled, searched = {}, {}
    for number, record in enumerate(records):
        if record.sampling_params is not None:
            sampled[number] = _bounded(record, record.sampling_params)
        else:
            searched[number] = record.beam_search_params
    return [(llm.generate, sampled), (llm.beam_search, searched)]


def _bounded(record: GenerationRecord, params: SamplingParams) -> SamplingParams:
    """The recorded parameters; if a completion was recorded before its end, limited to as many tokens as it has."""
    if all(output.has_ended for output in record.outputs):
        return params
    limit = max(len(output.token_ids) for output in record.outputs)
    return dataclasses.replace(params, max_tokens=limit, min_tokens=min(params.min_tokens, limit))


def _compare(record: GenerationRecord, output: RequestOutput, llm: LLM) -> Replay:
    pairs = zip(record.outputs, output.record.outputs, strict=True)
    found = [_first_difference(recorded, replayed, llm) for recorded, replayed in pairs]
    return Replay(
        num_tokens=sum(len(recorded.token_ids) for recorded in record.outputs),
        differences=tuple(difference for difference in found if difference is not None),
        warnings=record.provenance.changes(output.record.provenance),
    )


def _first_difference(recorded: CompletionRecord, replayed: CompletionRecord, llm: LLM) -> Difference | None:
    length = None if recorded.has_ended else len(recorded.token_ids)
    pairs = itertools.zip_longest(recorded.token_ids, replayed.token_ids[:length])
    for position, (before, now) in enumerate(pairs):
        if before != now:
            return Difference(
                index=recorded.index,
                position=position,
                recorded=_shown(before, llm),
                replayed=_shown(now, llm),
            )
    return None


def _shown(token_id: int | None, llm: LLM) -> str:
    if token_id is None:
        return "the end"
    if llm.tokenizer is None or not 0 <= token_id < llm.model_config.vocab_size:
        return str(token_id)
    return f"{token_id} {llm.tokenizer.token_text(token_id)!r}"
