"""Text around the engine: stop strings, streaming, end tokens, validation."""

import dataclasses

import pytest
from engine_tools import make_engine
from fake_wrapper import VOCAB_SIZE, continuation

from jaxinfer.config.generation_defaults import GenerationDefaults
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.text.controller import TextGenerationController
from jaxinfer.tokenizer.byte_tokenizer import ByteTokenizer


class AsciiTokenizer(ByteTokenizer):
    """Shows the fake wrapper's 97 ids as printable characters.

    Args:
      broken: a token of whose text it raises `error`.
    """

    def __init__(self, broken=None, error=None):
        super().__init__()
        self._broken, self._error = broken, error
        self.num_decoded = 0

    def decode(self, token_ids, *, skip_special_tokens=True):
        self.num_decoded += 1
        if self._broken in token_ids:
            raise self._error
        return "".join(chr(32 + token_id) for token_id in token_ids)


def constrained(submission, constraint):
    """A prepared submission whose requests get a constraint that is not looked at before they are submitted."""
    requests = tuple(dataclasses.replace(request, constraint=constraint) for request in submission.requests)
    return dataclasses.replace(submission, requests=requests)


def make_controller(*, tokenizer=True, eos=(), seed=0, **engine_fields):
    engine, _ = make_engine(**engine_fields)
    return TextGenerationController(
        engine,
        AsciiTokenizer() if tokenizer is True else tokenizer or None,
        defaults=GenerationDefaults(eos_token_ids=eos),
        vocab_size=VOCAB_SIZE,
        max_model_len=64,
        seed=seed,
    )


def run(controller, prompt, params):
    answer = controller.submit(controller.prepare(prompt, params))
    snapshots = []
    while not answer.is_finished:
        if answer in controller.step():
            snapshots.append(answer.output())
    return snapshots or [answer.output()]


def expected_text(prompt, count):
    return AsciiTokenizer().decode(continuation(prompt, count))


def test_stream_deltas_add_up_to_the_text():
    snapshots = run(make_controller(), [1, 2, 3], SamplingParams(max_tokens=12))
    assert "".join(entry.delta for entry in snapshots) == snapshots[-1].text == expected_text([1, 2, 3], 12)
    assert [entry.finished for entry in snapshots] == [False] * 11 + [True]
    assert snapshots[-1].finish_reason == "length"


@pytest.mark.parametrize("include", [False, True])
def test_stop_string_across_tokens_cuts_text_and_names_itself(include):
    text = expected_text([5], 12)
    stop = text[4:7]
    params = SamplingParams(max_tokens=12, stop=[stop], include_stop_str_in_output=include)
    final = run(make_controller(), [5], params)[-1]
    end = text.index(stop) + len(stop)
    assert final.text == (text[:end] if include else text[: end - len(stop)])
    assert (final.finish_reason, final.outputs[0].stop_reason) == ("stop", stop)
    assert len(final.token_ids) == end


def test_stop_string_frees_the_engine_at_once():
    controller = make_controller()
    run(controller, [5], SamplingParams(max_tokens=50, stop=expected_text([5], 3)[2]))
    assert not controller.has_unfinished()


def test_stop_token_ends_with_its_id_and_stays_out_of_the_text():
    tokens = continuation([5], 8)
    final = run(make_controller(), [5], SamplingParams(max_tokens=8, stop_token_ids=[tokens[3]]))[-1]
    cut = tokens.index(tokens[3])
    assert list(final.token_ids) == tokens[: cut + 1]
    assert final.text == expected_text([5], 8)[:cut]
    assert (final.finish_reason, final.outputs[0].stop_reason) == ("stop", tokens[3])


def test_end_token_of_the_checkpoint_has_no_stop_reason_and_can_be_ignored():
    tokens = continuation([5], 8)
    controller = make_controller(eos=(tokens[2],))
    final = run(controller, [5], SamplingParams(max_tokens=8))[-1]
    assert (final.finish_reason, final.outputs[0].stop_reason, len(final.token_ids)) == ("stop", None, 3)
    assert len(run(controller, [5], SamplingParams(max_tokens=8, ignore_eos=True))[-1].token_ids) == 8


def test_max_tokens_zero_is_one_finished_empty_output():
    snapshots = run(make_controller(), [5], SamplingParams(max_tokens=0))
    assert len(snapshots) == 1
    assert (snapshots[0].text, snapshots[0].token_ids, snapshots[0].finish_reason) == ("", (), "length")


def test_max_tokens_none_goes_on_to_max_model_len():
    final = run(make_controller(), [5] * 50, SamplingParams(max_tokens=None))[-1]
    assert (len(final.token_ids), final.finish_reason) == (14, "length")


def test_truncate_prompt_tokens_keeps_the_last():
    final = run(make_controller(), list(range(60)), SamplingParams(max_tokens=2, truncate_prompt_tokens=4))[-1]
    assert final.prompt_token_ids == (56, 57, 58, 59)


def test_seeds_given_ones_stay_and_missing_ones_follow_the_llms_seed():
    seeds = [
        [run(controller, [1], SamplingParams(max_tokens=1))[-1].outputs[0].seed for _ in range(3)]
        for controller in (make_controller(seed=1), make_controller(seed=1), make_controller(seed=2))
    ]
    assert seeds[0] == seeds[1] != seeds[2]
    assert len(set(seeds[0] + seeds[2])) == 6
    assert run(make_controller(), [1], SamplingParams(max_tokens=1, seed=77))[-1].outputs[0].seed == 77


def test_abort_keeps_the_text_so_far():
    controller = make_controller()
    answer = controller.submit(controller.prepare([5], SamplingParams(max_tokens=30)))
    for _ in range(6):
        controller.step()
    controller.abort(answer)
    output = answer.output()
    assert output.finish_reason == "abort"
    assert output.text == expected_text([5], len(output.token_ids))
    assert not controller.has_unfinished()


BAD = [
    ("", SamplingParams(), ValueError, "empty"),
    ([], SamplingParams(), ValueError, "empty"),
    ([1, 97], SamplingParams(), ValueError, r"token 1 is 97, expected an id in 0\.\.96"),
    ([-1], SamplingParams(), ValueError, "-1"),
    ([True], SamplingParams(), TypeError, "True"),
    ([1.5], SamplingParams(), TypeError, "1.5"),
    (7, SamplingParams(), TypeError, "int"),
    ([1] * 64, SamplingParams(), ValueError, "prompt has 64 tokens"),
]


@pytest.mark.parametrize(("prompt", "params", "error", "message"), BAD)
def test_prepare_bad_input_is_refused_and_nothing_is_queued(prompt, params, error, message):
    controller = make_controller()
    with pytest.raises(error, match=message):
        controller.prepare(prompt, params)
    assert not controller.has_unfinished()


@pytest.mark.parametrize(
    ("prompt", "params"),
    [
        ("text", SamplingParams()),
        ([1], SamplingParams(stop="x")),
        ([1], SamplingParams(bad_words=["x"])),
        ([1], SamplingParams(structured={"regex": "x"})),
    ],
)
def test_prepare_without_tokenizer_names_it(prompt, params):
    with pytest.raises(ValueError, match="tokenizer"):
        make_controller(tokenizer=False).prepare(prompt, params)


def test_without_tokenizer_ids_go_in_and_come_out():
    final = run(make_controller(tokenizer=False), [5], SamplingParams(max_tokens=4))[-1]
    assert (final.text, final.delta, list(final.token_ids)) == (None, None, continuation([5], 4))
    assert str(final) == str(continuation([5], 4))


def test_many_requests_each_get_their_own_text():
    controller = make_controller(num_kv_pages=20)
    prompts = [[i, i + 1] for i in range(9)]
    answers = [controller.submit(controller.prepare(prompt, SamplingParams(max_tokens=10))) for prompt in prompts]
    while controller.has_unfinished():
        controller.step()
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.output().text == expected_text(prompt, 10)
