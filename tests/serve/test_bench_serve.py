"""`bench serve`, with the smallest sizes; no time decides anything here."""

import pytest

from jaxinfer.bench import serving

SIZES = {"num_streams": 2, "prompt_len": 4, "output_len": 3, "seed": 0}


def test_runs_of_all_kinds_take_turns(served):
    llm, server = served
    result = serving.measure(llm, **SIZES, repeats=2, beside=server.url, beside_model="demo")
    rates = (result.generate_tokens_per_s, result.served_tokens_per_s, result.beside_tokens_per_s)
    assert all(len(rate) == 2 and min(rate) > 0 for rate in (*rates, result.server_us_per_token))
    assert 0 < result.chunks_per_token <= 1
    text = serving.render(result)
    assert "the other server" in text and f"{result.ratio:.3f} of LLM.generate" in text


def test_without_another_server_none_is_shown(served):
    result = serving.measure(served[0], **SIZES, repeats=1)
    assert result.beside_tokens_per_s == () and "other server" not in serving.render(result)


@pytest.mark.parametrize(
    ("address", "name", "error", "message"),
    [
        ("127.0.0.1:80", "demo", ValueError, "expected an address such as"),
        (None, "unknown", ConnectionError, "gave no whole streams.*model_not_found"),
        ("http://127.0.0.1:1", "demo", ConnectionError, "gave no whole streams.*Refused"),
    ],
)
def test_wrong_other_servers_are_named(served, address, name, error, message):
    llm, server = served
    with pytest.raises(error, match=message):
        serving.measure(llm, **SIZES, repeats=1, beside=address or server.url, beside_model=name)
