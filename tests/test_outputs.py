"""What comes back for a prompt."""

import dataclasses

from jaxinfer.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput


def make_output(text: str | None) -> RequestOutput:
    sample = CompletionOutput(
        index=0,
        text=text,
        token_ids=(5, 6),
        delta=text,
        logprobs=({5: Logprob(logprob=-1.0, rank=1, decoded_token=None)},),
        cumulative_logprob=-1.0,
        finish_reason="stop",
        stop_reason=6,
        seed=0,
    )
    return RequestOutput(
        request_id="0",
        prompt="a",
        prompt_token_ids=(1,),
        outputs=(sample, dataclasses.replace(sample, index=1, text="other")),
        finished=True,
        num_cached_tokens=0,
        metrics=RequestMetrics(arrival_time=0.0),
    )


def test_request_output_properties_are_those_of_first_sample() -> None:
    output = make_output("hello")
    for name in ("text", "token_ids", "logprobs", "finish_reason", "delta"):
        assert getattr(output, name) == getattr(output.outputs[0], name)
    assert str(output) == "hello" and str(make_output(None)) == "[5, 6]"
    assert output == dataclasses.replace(output, metrics=RequestMetrics(arrival_time=9.0))
