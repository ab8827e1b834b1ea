"""Records: what an output says of its making survives a line of JSON, and generates the same tokens again."""

import dataclasses
from typing import Any

import pytest
from conftest import load_golden

import jaxinfer
from jaxinfer import LLM, BeamSearchParams, EngineConfig, GenerationRecord, SamplingParams
from jaxinfer.checkpoint.directory import fingerprint
from jaxinfer.cli.replay import read_records, replay_records

PATH = load_golden("gqa").path
pytestmark = pytest.mark.usefixtures("few_programs")

SMALL = {"max_num_seqs": 2, "page_size": 8, "num_kv_pages": 32, "max_model_len": 64, "max_num_batched_tokens": 64}
PARAMS = SamplingParams(temperature=1.0, max_tokens=6, ignore_eos=True, logit_bias={7: 1.5, 30: -2})


@pytest.fixture(scope="module")
def outputs():
    """Of two prompts, a text and ids, sampled without a seed."""
    with LLM(PATH, **SMALL) as llm:
        return llm.generate(["one two", [5, 6, 7]], PARAMS, use_tqdm=False)


def test_output_record_has_what_was_used(outputs):
    text, ids = (output.record for output in outputs)
    assert (text.prompt, ids.prompt, ids.prompt_token_ids) == ("one two", None, (5, 6, 7))
    assert text.sampling_params == dataclasses.replace(PARAMS, seed=outputs[0].outputs[0].seed)
    assert text.outputs[0].token_ids == outputs[0].token_ids
    assert text.provenance is ids.provenance
    assert text.provenance.model == str(PATH) and text.provenance.engine == EngineConfig(**SMALL)
    assert text.provenance.versions["jaxinfer"] == jaxinfer.__version__
    assert GenerationRecord.from_json(text.to_json()) == text


def test_replay_of_samples_structured_output_and_a_beam_search_is_the_same():
    with LLM(PATH, **SMALL) as llm:
        params = SamplingParams(
            n=2, temperature=1.0, max_tokens=6, structured={"regex": "[a-z ]+"}, logit_bias={70: 1.0}
        )
        sampled = llm.generate("one two", params)
        searched = llm.beam_search([5, 6, 7], BeamSearchParams(beam_width=2, max_tokens=4, num_return_sequences=2))
    records = [GenerationRecord.from_json(output.record.to_json()) for output in (sampled, searched, sampled)]
    assert [str(replay) for replay in replay_records(records)] == [
        "same, 12 tokens",
        "same, 8 tokens",
        "same, 12 tokens",
    ]


def test_output_without_an_llm_has_no_record(outputs):
    with pytest.raises(ValueError, match="only outputs of an LLM have a record"):
        dataclasses.replace(outputs[0], provenance=None).record  # noqa: B018


def test_provenance_does_not_show_in_outputs(outputs):
    output = outputs[0]
    bare = dataclasses.replace(output, sampling_params=None, provenance=None)
    assert output == bare and repr(output) == repr(bare)
    names = {field.name for field in dataclasses.fields(output)}
    assert output.as_dict().keys() == names - {"sampling_params", "beam_search_params", "provenance"}


def test_fingerprint_tells_checkpoints_apart(tmp_path):
    for file in PATH.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert fingerprint(tmp_path) == fingerprint(PATH) != fingerprint(load_golden("mha").path)
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert fingerprint(tmp_path) != fingerprint(PATH)


def with_output(record: GenerationRecord, **fields: Any) -> GenerationRecord:
    return dataclasses.replace(record, outputs=(dataclasses.replace(record.outputs[0], **fields),))


def test_replay_is_equal_and_says_where_it_is_not(outputs):
    one, two = (output.record for output in outputs)
    tokens = one.outputs[0].token_ids
    other = (tokens[2] + 1) % 97
    elsewhere = dataclasses.replace(
        two.provenance, platform="tpu", fingerprint="0", versions={**two.provenance.versions, "jax": "0.1"}
    )
    cut = dataclasses.replace(one, sampling_params=dataclasses.replace(one.sampling_params, min_tokens=5))
    replays = replay_records(
        [
            one,
            dataclasses.replace(two, provenance=elsewhere),
            with_output(one, token_ids=(*tokens[:2], other, *tokens[3:])),
            with_output(one, token_ids=tokens[:4]),
            with_output(one, token_ids=(*tokens, 7)),
            with_output(cut, token_ids=tokens[:4], finish_reason="abort"),
            with_output(one, token_ids=(), finish_reason=None),
            with_output(one, token_ids=(-1,)),
        ]
    )
    shown = [str(entry) for entry in replays]
    assert shown[:2] == ["same, 6 tokens", "same, 6 tokens"]
    assert shown[2].startswith(f"completion 0 differs at token 2: recorded {other} '")
    assert f", now {tokens[2]} '" in shown[2]
    assert shown[3].startswith(f"completion 0 differs at token 4: recorded the end, now {tokens[4]} '")
    assert shown[4].startswith("completion 0 differs at token 6: recorded 7 '") and shown[4].endswith(", now the end")
    assert shown[5:7] == ["same, 4 tokens", "same, 0 tokens"]
    assert shown[7].startswith("completion 0 differs at token 0: recorded -1, now ")
    found = " ".join(replays[1].warnings)
    assert "platform was tpu, is now cpu" in found and "jax was 0.1, is now" in found and "fingerprint was 0" in found
    assert not any(entry.warnings for number, entry in enumerate(replays) if number != 1)


def test_replay_of_weights_in_memory_needs_a_model(outputs):
    record = outputs[0].record
    nameless = dataclasses.replace(record.provenance, model=None, fingerprint=None)
    records = [record, dataclasses.replace(record, provenance=nameless)]
    with pytest.raises(ValueError, match=r"record 2 has no model, .* --model"):
        replay_records(records)
    named, unnamed = replay_records(records, model=str(PATH))
    assert not named.differences and not unnamed.differences
    assert not named.warnings and not unnamed.warnings


def test_read_records_names_file_and_line(outputs, tmp_path):
    record = outputs[0].record
    file = tmp_path / "records"
    file.write_text(f"{record.to_json()}\n\n{record.to_json()}\n")
    assert read_records(file) == [record] * 2
    file.write_text(f"\n{record.to_json()}\n{{\n")
    with pytest.raises(ValueError, match="records, line 3: not JSON"):
        read_records(file)
    file.write_text("\n")
    with pytest.raises(ValueError, match="holds no records"):
        read_records(file)
    file.write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_records(file)
