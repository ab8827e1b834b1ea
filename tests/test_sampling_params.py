"""What users wish for: SamplingParams refuses every wrong value in words and keeps plain immutable ones."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import pickle
import re
from fractions import Fraction
from types import MappingProxyType

import numpy as np
import pytest

from jaxinfer.sampling_params import BeamSearchParams, SamplingParams, StructuredOutput

SEED = "in 0..9223372036854775807"
PRIORITY = "in -2147483648..2147483647"
# field: (values outside its range, how the range is written, whether None is allowed)
INTEGERS = {
    "n": ((0, -1), ">= 1", False),
    "top_k": ((-2,), ">= -1", False),
    "seed": ((-1, 2**63, np.uint64(2**63)), SEED, True),
    "max_tokens": ((-1,), ">= 0", True),
    "min_tokens": ((-1, 17), "in 0..16", False),
    "logprobs": ((-1, 21), "in 0..20", True),
    "prompt_logprobs": ((-1, 21, np.int32(21)), "in 0..20", True),
    "truncate_prompt_tokens": ((0, -1), ">= 1", True),
    "priority": ((-(2**31) - 1, 2**31), PRIORITY, False),
}
FLOATS = {
    "temperature": ((-0.1, np.float32(-1)), ">= 0"),
    "top_p": ((0, 0.0, -0.5, 1.01, 2), "in (0, 1]"),
    "min_p": ((-0.01, 1.01), "in [0, 1]"),
    "repetition_penalty": ((0, -1.0), "> 0"),
    "presence_penalty": ((-2.1, 2.1), "in [-2, 2]"),
    "frequency_penalty": ((-2.1, 2.1), "in [-2, 2]"),
}
FLAGS = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens")
NO_INTEGERS = (True, np.False_, "1", 1.0, np.float64(1), [1], np.array([1]), math.nan)
NO_NUMBERS = (True, np.True_, None, "1", [1.0], 1j, np.array([0.5]))

WRONG = [
    *((name, value, ValueError, allowed) for name, (values, allowed, _) in INTEGERS.items() for value in values),
    *((name, value, TypeError, "must be an int") for name in INTEGERS for value in NO_INTEGERS),
    *((name, None, TypeError, "must be an int") for name, (_, _, optional) in INTEGERS.items() if not optional),
    *((name, value, ValueError, allowed) for name, (values, allowed) in FLOATS.items() for value in values),
    *(
        (name, value, ValueError, allowed)
        for name, (_, allowed) in FLOATS.items()
        for value in (math.nan, math.inf, -math.inf, np.float32("nan"), np.float32("inf"), 10**400)
    ),
    ("repetition_penalty", 1e-39, ValueError, ">= 1.2e-38"),
    *((name, 1e39, ValueError, "<= 3.4e+38") for name in ("temperature", "repetition_penalty")),
    *((name, value, TypeError, allowed) for name, (_, allowed) in FLOATS.items() for value in NO_NUMBERS),
    *((name, value, TypeError, "must be True or False") for name in FLAGS for value in (0, 1, None, "yes")),
    *(
        (name, value, TypeError, "string")
        for name in ("stop", "bad_words")
        for value in (3, [3], ["a", None], b"a", {"a"})
    ),
    *((name, value, ValueError, "empty string") for name in ("stop", "bad_words") for value in ("", ["a", ""])),
    *(
        (name, value, TypeError, "")
        for name in ("stop_token_ids", "allowed_token_ids")
        for value in (3, "3", b"3", {3}, [True], [1.0], ["3"], [None])
    ),
    *((name, [0, -1], ValueError, ">= 0") for name in ("stop_token_ids", "allowed_token_ids")),
    ("allowed_token_ids", [], ValueError, "at least one token"),
    *(("logit_bias", value, TypeError, "") for value in (3, [(1, 2.0)], {"1": 1.0}, {True: 1.0}, {1: "x"}, {1: True})),
    ("logit_bias", {-1: 1.0}, ValueError, ">= 0"),
    *(("logit_bias", {1: value}, ValueError, "in [-100, 100]") for value in (100.5, -101, math.nan, math.inf)),
]


WRONG_STRUCTURED = [
    ("a+", TypeError, "structured must be a StructuredOutput or a mapping of its fields, got 'a+'"),
    ({}, ValueError, "structured must have exactly one of json, regex, choice, lark, got none"),
    ({"regex": "a", "lark": "b"}, ValueError, "exactly one of json, regex, choice, lark, got regex, lark"),
    ({"regx": "a"}, TypeError, "unknown argument 'regx'; did you mean 'regex'?"),
    ({3: "a"}, TypeError, "unknown argument '3'"),
    ({"regex": 3}, TypeError, "structured.regex must be a string, got 3 of type int"),
    ({"lark": ""}, ValueError, "structured.lark must be a non-empty string, got ''"),
    ({"regex": "\ud800"}, ValueError, "structured.regex must be text that UTF-8 can write"),
    ({"choice": "ab"}, TypeError, "structured.choice must be a sequence of non-empty strings, got 'ab'"),
    ({"choice": []}, ValueError, "structured.choice must be a sequence of at least one non-empty string, got []"),
    ({"choice": ["a", ""]}, ValueError, "structured.choice entry must be a non-empty string, got ''"),
    ({"choice": ["a", 1]}, TypeError, "structured.choice entry must be a string, got 1"),
    ({"json": 3}, TypeError, "structured.json must be a JSON object, as a dict or as its text, got 3 of type int"),
    ({"json": "[1]"}, ValueError, "structured.json must be a JSON object, as a dict or as its text, got '[1]'"),
    ({"json": "{"}, ValueError, "got '{', which is none: Expecting property name"),
    ({"json": {"a": {1}}}, ValueError, "which is none: Object of type set is not JSON serializable"),
    ({"json": '{"minimum": NaN}'}, ValueError, "which is none: Out of range float"),
    ({"json": "[" * 100_000}, ValueError, "which is none: maximum recursion depth"),
]


@pytest.mark.parametrize(("value", "error", "message"), WRONG_STRUCTURED)
def test_sampling_params_structured_wrong_value_names_field_value_and_range(value, error, message) -> None:
    with pytest.raises(error, match=re.escape(message)):
        SamplingParams(structured=value)


def test_sampling_params_structured_mapping_becomes_a_plain_structured_output() -> None:
    schema = {"type": "object"}
    params = SamplingParams(structured=MappingProxyType({"json": schema}))
    assert params.structured == StructuredOutput(json='{"type": "object"}')
    assert SamplingParams(structured=params.structured) == params
    schema["type"] = "array"
    assert params.structured == StructuredOutput(json=' {"type":"object"} ')
    assert StructuredOutput(choice=["a", "b"]).choice == ("a", "b")
    assert StructuredOutput(json={}).json == StructuredOutput(json="{}").json == "{}"
    assert hash(params.structured) == hash(StructuredOutput(json={"type": "object"}))


@pytest.mark.parametrize(("name", "value", "error", "allowed"), WRONG)
def test_sampling_params_wrong_value_names_field_value_and_range(name, value, error, allowed) -> None:
    with pytest.raises(error, match=f"^{name}.* must ") as caught:
        SamplingParams(**{name: value})
    assert allowed in str(caught.value)
    parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    assert any(shown in str(caught.value) for part in (value, *parts, "none") for shown in (str(part), repr(part)))


VALID = {
    "n": 2,
    "top_k": 3,
    "seed": 2**63 - 1,
    "max_tokens": 9,
    "min_tokens": 4,
    "logprobs": 20,
    "prompt_logprobs": 0,
    "truncate_prompt_tokens": 1,
    "priority": -7,
}


@pytest.mark.parametrize("kind", [int, np.int64])
def test_sampling_params_integers_become_int(kind) -> None:
    params = SamplingParams(**{name: kind(value) for name, value in VALID.items()})
    assert params == SamplingParams(**VALID)
    assert all(type(getattr(params, name)) is int for name in VALID)


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float64(0.5), np.float16(0.5), Fraction(1, 2)])
def test_sampling_params_numbers_become_float(value) -> None:
    params = SamplingParams(**dict.fromkeys(FLOATS, value))
    assert params == SamplingParams(**dict.fromkeys(FLOATS, 0.5))
    assert all(type(getattr(params, name)) is float for name in FLOATS)
    assert SamplingParams(temperature=0, top_p=np.int64(1)) == SamplingParams(temperature=0.0, top_p=1.0)


@pytest.mark.parametrize(
    "edge",
    [
        {"temperature": 0},
        {"temperature": 1e9},
        {"top_p": 1},
        {"top_p": 1e-9},
        {"top_k": -1},
        {"min_p": 0},
        {"min_p": 1},
        {"max_tokens": 0},
        {"max_tokens": None, "min_tokens": 10**6},
        {"min_tokens": 16},
        {"presence_penalty": -2, "frequency_penalty": 2},
        {"repetition_penalty": 1e-3},
        {"logit_bias": {0: -100, 1: 100}},
        {"priority": -(2**31)},
        {"stop": (), "stop_token_ids": [], "logit_bias": {}},
    ],
    ids=str,
)
def test_sampling_params_edge_of_range_passes(edge) -> None:
    params = SamplingParams(**edge)
    for name, value in edge.items():
        kept = getattr(params, name)
        assert kept == (tuple(value) if isinstance(value, list) else value)


def test_sampling_params_collections_become_plain_copies() -> None:
    ids, bias = [np.int64(3), 4], {np.int32(1): np.float32(0.5)}
    params = SamplingParams(
        stop=["a", "b"],
        bad_words="c",
        stop_token_ids=ids,
        allowed_token_ids=range(2),
        logit_bias=MappingProxyType(bias),
    )
    ids.append(5)
    bias[2] = np.float32(1)
    assert params.stop == params.stop_strings == ("a", "b") and params.bad_words == ("c",)
    assert params.stop_token_ids == (3, 4) and params.allowed_token_ids == (0, 1)
    assert params.logit_bias == {1: 0.5}
    assert {type(value) for pair in params.logit_bias.items() for value in pair} == {int, float}
    assert type(params.stop_token_ids[0]) is int
    assert SamplingParams(stop="a").stop_strings == ("a",) and SamplingParams().stop_strings == ()


def test_sampling_params_is_frozen_replaceable_and_picklable() -> None:
    params = SamplingParams(stop=["a"], logit_bias={1: 2})
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 0.0
    assert dataclasses.replace(params) == params == pickle.loads(pickle.dumps(params))
    with pytest.raises(ValueError, match="temperature must be >= 0, got -1"):
        dataclasses.replace(params, temperature=-1)


@pytest.mark.parametrize(
    ("kind", "keyword", "hint"),
    [
        (SamplingParams, "temprature", "; did you mean 'temperature'?"),
        (SamplingParams, "max_token", "; did you mean 'max_tokens'?"),
        (SamplingParams, "max_new_tokens", "; did you mean 'max_tokens'?"),
        (SamplingParams, "zzz", ""),
        (BeamSearchParams, "beam_size", "; did you mean 'beam_width'?"),
        (BeamSearchParams, "zzz", ""),
        (StructuredOutput, "regexp", "; did you mean 'regex'?"),
    ],
)
def test_params_unknown_keyword_names_nearest(kind: type, keyword: str, hint: str) -> None:
    good = kind(regex="a") if kind is StructuredOutput else kind()
    for make in (lambda: kind(**{keyword: 1}), lambda: dataclasses.replace(good, **{keyword: 1})):
        with pytest.raises(TypeError) as caught:
            make()
        assert str(caught.value) == f"unknown argument {keyword!r}{hint}"


@pytest.mark.parametrize("good", [SamplingParams(n=2), BeamSearchParams(), StructuredOutput(regex="a")])
def test_params_that_name_the_nearest_keyword_are_plain_dataclasses_otherwise(good) -> None:
    kind = type(good)
    names = [field.name for field in dataclasses.fields(good)]
    signature = inspect.signature(kind)
    assert list(signature.parameters) == names
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in signature.parameters.values())
    assert {name: signature.parameters[name].annotation for name in names} == kind.__annotations__
    for copied in (copy.copy(good), copy.deepcopy(good), pickle.loads(pickle.dumps(good)), dataclasses.replace(good)):
        assert copied == good and type(copied) is kind
    assert not hasattr(good, "__dict__")
    with pytest.raises(TypeError, match="positional"):
        kind(1)


BEAM_INTEGERS = {
    "beam_width": ((0, -1, 33), "in 1..32"),
    "max_tokens": ((0, -1), ">= 1"),
    "num_return_sequences": ((0, -1), ">= 1"),
    "priority": ((-(2**31) - 1, 2**31), PRIORITY),
}
NEVER = "True, False or 'never'"
WRONG_BEAM = [
    *((name, value, ValueError, allowed) for name, (values, allowed) in BEAM_INTEGERS.items() for value in values),
    *((name, value, TypeError, "must be an int") for name in BEAM_INTEGERS for value in (*NO_INTEGERS, None)),
    ("num_return_sequences", 5, ValueError, "num_return_sequences must be <= beam_width = 4"),
    *(
        ("length_penalty", value, ValueError, "in [-50, 50]")
        for value in (math.nan, math.inf, -math.inf, np.float32("nan"), 10**400, 50.5, -51)
    ),
    *(("length_penalty", value, TypeError, "in [-50, 50]") for value in NO_NUMBERS),
    *(("early_stopping", value, ValueError, NEVER) for value in ("", "always", "Never", "True")),
    *(("early_stopping", value, TypeError, NEVER) for value in (None, 0, 1, 1.0, np.True_, ["never"])),
    *(("stop_token_ids", value, TypeError, "") for value in (3, "3", b"3", {3}, [True], [1.0], ["3"], [None])),
    ("stop_token_ids", [0, -1], ValueError, ">= 0"),
    *(
        (name, value, TypeError, "must be True or False")
        for name in ("ignore_eos", "skip_special_tokens")
        for value in (0, 1, None, "yes")
    ),
]


@pytest.mark.parametrize(("name", "value", "error", "allowed"), WRONG_BEAM)
def test_beam_search_params_wrong_value_names_field_value_and_range(name, value, error, allowed) -> None:
    with pytest.raises(error, match=f"^{name}.* must ") as caught:
        BeamSearchParams(**{name: value})
    assert allowed in str(caught.value)
    parts = value if isinstance(value, list) else []
    assert any(shown in str(caught.value) for part in (value, *parts) for shown in (str(part), repr(part)))


@pytest.mark.parametrize(
    "edge",
    [
        {"beam_width": 1},
        {"beam_width": 32, "num_return_sequences": 32},
        {"max_tokens": 1},
        {"length_penalty": -50},
        {"length_penalty": 50},
        {"early_stopping": True},
        {"early_stopping": "never"},
        {"stop_token_ids": ()},
        {"priority": -(2**31)},
    ],
    ids=str,
)
def test_beam_search_params_edge_of_range_passes(edge) -> None:
    params = BeamSearchParams(**edge)
    assert {name: getattr(params, name) for name in edge} == edge


def test_beam_search_params_become_plain_values() -> None:
    params = BeamSearchParams(
        beam_width=np.int64(2), length_penalty=np.float32(0.5), stop_token_ids=[np.int64(3)], priority=np.int32(-1)
    )
    assert params == BeamSearchParams(beam_width=2, length_penalty=0.5, stop_token_ids=(3,), priority=-1)
    assert [type(value) for value in (params.beam_width, params.length_penalty)] == [int, float]
    assert type(params.stop_token_ids) is tuple and type(params.stop_token_ids[0]) is int
    assert params == dataclasses.replace(params) == pickle.loads(pickle.dumps(params))
