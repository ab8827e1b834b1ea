"""JsonRecord: what is written comes back equal, and a wrong line is refused with the name of what is wrong."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from jaxinfer import EngineConfig, GenerationRecord, SamplingParams
from jaxinfer.outputs import CompletionRecord
from jaxinfer.records.codec import JsonRecord
from jaxinfer.records.provenance import Provenance

PROVENANCE = Provenance(
    model="somewhere",
    fingerprint="ab",
    tokenizer=None,
    engine=EngineConfig(max_num_seqs=2, page_size=8, max_num_batched_tokens=64),
    versions={"python": "3.11", "jax": "0.10.0"},
    platform="cpu",
    device_kind="cpu",
    mesh=(1, 1),
)


def make_record(**fields: Any) -> GenerationRecord:
    output = CompletionRecord(index=0, token_ids=(4, 5), text="\u2028 \ud800\n", finish_reason="stop", seed=3)
    values = {"provenance": PROVENANCE, "prompt": "é\n", "prompt_token_ids": (1, 2), "outputs": (output,)}
    return GenerationRecord(**{**values, "sampling_params": SamplingParams(), **fields})


FULL = SamplingParams(
    temperature=0.1,
    seed=2**63 - 1,
    max_tokens=None,
    stop="\n",
    stop_token_ids=[1, 2],
    logit_bias={5: 1, 70: -0.25},
    bad_words=["a", "é"],
    allowed_token_ids=range(5),
)


@pytest.mark.parametrize("params", [SamplingParams(), FULL], ids=["defaults", "all kinds of fields"])
def test_record_survives_a_line_of_json(params):
    record = make_record(sampling_params=params)
    line = record.to_json()
    assert line.isascii() and "\n" not in line
    assert GenerationRecord.from_json(line) == record
    assert Provenance.from_json(PROVENANCE.to_json()) == PROVENANCE


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    words: Sequence[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer(JsonRecord):
    inner: Inner | None = None
    either: str | Sequence[int] | None = None
    mapping: Mapping[str, Any] | None = None


@pytest.mark.parametrize(
    "value",
    [
        Outer(),
        Outer(inner=Inner(words=("a", "b")), either="x", mapping={"1": {"type": ["object"]}}),
        Outer(inner=Inner(words=()), either=(1, 2)),
    ],
)
def test_json_record_rebuilds_fields_of_any_plain_type(value):
    assert Outer.from_json(value.to_json()) == value


def changed(path: str, value: Any) -> str:
    """A record's line with one field, by its dotted name, replaced; ... takes it out."""
    fields = json.loads(make_record().to_json())
    *parents, name = path.split(".")
    place = fields
    for parent in parents:
        place = place[int(parent)] if isinstance(place, list) else place[parent]
    place[name] = value
    if value is ...:
        del place[name]
    return json.dumps(fields)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", r"expected a JSON object, got \[1\]"),
        ("{}", "unknown format version None, this version of jaxinfer reads 1"),
        (changed("format", 2), "unknown format version 2"),
        (changed("outputs", ...), "missing field 'outputs' of GenerationRecord"),
        (changed("provenance.platform", ...), "missing field 'platform' of Provenance"),
        (changed("outputs.0.seed", ...), "missing field 'seed' of CompletionRecord"),
        (changed("sampling_params.temprature", 1), "unknown field 'temprature' of SamplingParams"),
        (changed("sampling_params.top_p", 3), r"top_p must be in \(0, 1\], got 3"),
        (changed("sampling_params.logit_bias", {"x": 1}), "logit_bias key must be an int"),
        (changed("provenance.engine.page_size", 9), "page_size must be a power of two, got 9"),
        (changed("provenance.engine.data_parallel_size", 0), "data_parallel_size must be >= 1, got 0"),
        (changed("provenance.engine", None), "engine must be jaxinfer.config.engine_config.EngineConfig, got None"),
        (changed("prompt_token_ids", "abc"), r"prompt_token_ids must be tuple\[int, ...\], got 'abc'"),
        (changed("outputs.0.token_ids", [1, True]), "token_ids entry must be int, got True"),
        (changed("outputs.0.finish_reason", "done"), "finish_reason must be"),
        (changed("outputs", []), "expected one output for each of n=1, got 0"),
    ],
)
def test_from_json_says_what_is_wrong_with_a_line(line, message):
    with pytest.raises(ValueError, match=message):
        GenerationRecord.from_json(line)


def test_from_json_takes_defaults_for_settings_that_a_line_lacks():
    assert GenerationRecord.from_json(changed("sampling_params.min_p", ...)) == make_record()
