"""Stop strings in growing text."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxinfer.request import Request, TokenEvent, TokenLogprobs
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.text.completion import GrowingCompletion, StopMatcher
from jaxinfer.tokenizer.byte_tokenizer import ByteTokenizer


def first_match(text: str, stops: list[str], num_suspended: int) -> tuple[str, str | None]:
    """The text before the stop string that is complete first, character by character; none ends in suspended text."""
    for end in range(num_suspended + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(
    st.text(alphabet="ab", max_size=30),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(1, 5), min_size=30, max_size=30),
    st.integers(0, 4),
)
@example("abb", ["a", "ab"], [1] * 30, 1)  # "a" is held back while suspended, and no match afterwards
def test_stop_matcher_equals_reading_character_by_character(text, stops, sizes, num_suspended):
    matcher, released, rest = StopMatcher(stops, include=False), "", text
    for number, size in enumerate(sizes):
        if matcher.matched is None:
            released += matcher.push(rest[:size], suspended=number < num_suspended)
            rest = rest[size:]
    expected = first_match(text, stops, sum(sizes[:num_suspended]))
    assert (released + matcher.finish(), matcher.matched) == expected


def test_stop_matcher_suspended_ignores_what_ends_there_but_not_what_begins():
    matcher = StopMatcher(["stop"], include=False)
    assert matcher.push("a stop b st", suspended=True) == "a stop b "
    assert matcher.push("op c") == "" and matcher.matched == "stop"


def test_stop_matcher_holds_back_only_what_may_begin_a_stop_string():
    matcher = StopMatcher(["stop"], include=False)
    assert [matcher.push(piece) for piece in ("a s", "t", "e", "sto")] == ["a ", "", "ste", ""]
    assert matcher.finish() == "sto"


class CountingTokenizer(ByteTokenizer):
    """Counts what it is asked."""

    def __init__(self):
        super().__init__()
        self.num_decoded = self.num_named = 0

    def decode(self, token_ids, *, skip_special_tokens=True):
        self.num_decoded += 1
        return super().decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id):
        self.num_named += 1
        return chr(token_id)


TEXT = "a text of some tokens, none of them the end" * 4


def grown(tokenizer, *, reads, read=GrowingCompletion.output, **fields):
    """A completion of TEXT's bytes, and what was read after the tokens whose numbers are in `reads`."""
    request = Request(request_id="a", prompt_token_ids=(97,), max_tokens=len(TEXT))
    completion = GrowingCompletion(
        0, request, SamplingParams(max_tokens=len(TEXT), **fields), tokenizer=tokenizer, eos_token_ids=frozenset()
    )
    top = TokenLogprobs(logprob=-1.0, rank=2, top_ids=(98, 99), top_logprobs=(-0.5, -2.0))
    outputs = []
    for number, token_id in enumerate(TEXT.encode()):
        completion.push(
            TokenEvent(
                request_id="a",
                token_id=token_id,
                logprobs=top,
                finish_reason="length" if number == len(TEXT) - 1 else None,
                num_cached_tokens=0,
            )
        )
        if number in reads:
            outputs.append(read(completion))
    return completion, outputs


@pytest.mark.parametrize("stop", [None, "no such end"])
def test_completion_read_often_or_late_is_the_same_and_converts_each_position_once(stop):
    often, late = CountingTokenizer(), CountingTokenizer()
    _, outputs = grown(often, reads=range(len(TEXT)), stop=stop, logprobs=2)
    completion, _ = grown(late, reads=(), stop=stop, logprobs=2)
    last = completion.output()
    assert last.text == last.delta == TEXT == outputs[-1].text == "".join(output.delta for output in outputs)
    assert (last.token_ids, last.logprobs, last.finish_reason) == (
        outputs[-1].token_ids,
        outputs[-1].logprobs,
        outputs[-1].finish_reason,
    )
    assert last.cumulative_logprob == outputs[-1].cumulative_logprob == -len(TEXT)
    assert often.num_named == late.num_named == 3 * len(TEXT)
    assert often.num_decoded == late.num_decoded
    assert all(len(output.logprobs) == len(output.token_ids) == i for i, output in enumerate(outputs, start=1))


@pytest.mark.parametrize("stop", [None, "no such end", "of some tokens, none of them the end!"])
@pytest.mark.parametrize("reads", [range(len(TEXT)), range(2, len(TEXT), 7), ()])
def test_deltas_of_a_completion_add_up_to_its_output(reads, stop):
    completion, deltas = grown(CountingTokenizer(), reads=reads, read=GrowingCompletion.delta, stop=stop, logprobs=2)
    deltas += [delta] if (delta := completion.delta()) is not None else []
    assert completion.delta() is None
    output = completion.output()
    assert output.delta == ""
    assert "".join(delta.text for delta in deltas) == output.text == TEXT
    assert (
        [token_id for delta in deltas for token_id in delta.token_ids] == list(output.token_ids) == list(TEXT.encode())
    )
    assert [found for delta in deltas for found in delta.logprobs] == list(output.logprobs)
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]


def test_delta_behind_an_output_has_only_what_is_new():
    completion, (output,) = grown(CountingTokenizer(), reads=[9])
    assert output.text + completion.delta().text == TEXT


def test_completion_without_stop_strings_leaves_its_text_to_the_reader():
    tokenizer = CountingTokenizer()
    grown(tokenizer, reads=(), logprobs=2)
    assert tokenizer.num_decoded == tokenizer.num_named == 0
