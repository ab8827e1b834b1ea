"""Text that arrives token by token equals the text of all tokens."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizer_tools import ALL, token_lists, tokenizer_named, whole

from jaxinfer.tokenizer.byte_tokenizer import ByteTokenizer
from jaxinfer.tokenizer.detokenizer import MAX_HELD, MAX_WINDOW, IncrementalDetokenizer
from jaxinfer.tokenizer.tokenizer import Tokenizer


def stream(tokenizer: Tokenizer, prompt: list[int], output: list[int], *, skip: bool, size: int = 1) -> list[str]:
    """What push and finish return when the output comes in groups of `size` tokens; checks `text` on the way."""
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip_special_tokens=skip)
    deltas = [detokenizer.push(output[i : i + size]) for i in range(0, len(output), size)]
    assert detokenizer.text == "".join(deltas)
    deltas.append(detokenizer.finish())
    assert detokenizer.text == "".join(deltas)
    assert detokenizer.finish() == ""
    return deltas


def is_rewritten(tokenizer: Tokenizer, prompt: list[int], output: list[int], *, skip: bool) -> bool:
    """Whether a later token changes whole characters that an earlier prefix had (ByteFallback's malformed runs)."""
    text = tokenizer.decode(prompt + output, skip_special_tokens=skip)
    ends = range(len(prompt), len(prompt) + len(output))
    prefixes = (tokenizer.decode((prompt + output)[:end], skip_special_tokens=skip) for end in ends)
    return not all(text.startswith(prefix.rstrip("\ufffd")) for prefix in prefixes)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=40, deadline=None)
@given(data=st.data(), skip=st.booleans(), size=st.integers(1, 4))
def test_incremental_random_tokens_equal_whole_decode(name: str, data: st.DataObject, skip: bool, size: int) -> None:
    tokenizer = tokenizer_named(name)
    prompt = data.draw(token_lists(tokenizer.vocab_size, 40))
    output = data.draw(token_lists(tokenizer.vocab_size, 60))
    assume(not tokenizer.decode(prompt, skip_special_tokens=skip).endswith("\ufffd"))
    assume(not is_rewritten(tokenizer, prompt, output, skip=skip))
    assert "".join(stream(tokenizer, prompt, output, skip=skip, size=size)) == whole(
        tokenizer, prompt, output, skip=skip
    )


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=30, deadline=None)
@given(prompt=st.text(max_size=8), output=st.text(max_size=80))
@example(prompt="", output=" leading space")
@example(prompt="a", output=" leading space")
@example(prompt="", output="🙂" * 100)
@example(prompt="\ufffd", output="\ufffd" * 100)
def test_incremental_text_arrives_whole_and_in_time(name: str, prompt: str, output: str) -> None:
    tokenizer = tokenizer_named(name)
    ids = tokenizer.encode_plain(output)
    deltas = stream(tokenizer, tokenizer.encode(prompt), ids, skip=True)
    assert "".join(deltas) == whole(tokenizer, tokenizer.encode(prompt), ids, skip=True)
    if "\ufffd" not in output:
        assert "\ufffd" not in "".join(deltas)
        assert deltas[-1] == ""


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=40, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_incremental_any_prompt_never_takes_text_back(name: str, data: st.DataObject, skip: bool) -> None:
    tokenizer = tokenizer_named(name)
    prompt, output = (data.draw(token_lists(tokenizer.vocab_size, 20)) for _ in range(2))
    stream(tokenizer, prompt, output, skip=skip)  # checks that the deltas make the text


@pytest.mark.parametrize("name", ALL)
def test_incremental_cut_off_character_appears_at_finish(name: str) -> None:
    tokenizer = tokenizer_named(name)
    cut_off = tokenizer.encode_plain("a日本")[:-1]
    deltas = stream(tokenizer, tokenizer.encode("x"), cut_off, skip=True)
    assert "\ufffd" not in "".join(deltas[:-1])
    assert set(deltas[-1]) == {"\ufffd"}
    if name != "metaspace":  # ByteFallback writes one for each byte
        assert deltas[-1] == "\ufffd"


@pytest.mark.parametrize("name", ALL)
def test_incremental_prompt_ends_in_half_a_character_output_begins_behind_it(name: str) -> None:
    tokenizer = tokenizer_named(name)
    ids = tokenizer.encode_plain("x日y")
    assert "".join(stream(tokenizer, ids[:-3], ids[-3:], skip=True)) == "y"


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("letter", ["日", "🦄"])
def test_incremental_prompt_is_one_long_run_of_bytes_nothing_is_lost(name: str, letter: str) -> None:
    """A window that began inside a character would make ByteFallback call the whole run malformed."""
    tokenizer = tokenizer_named(name)
    for num_letters in range(20, 60):
        prompt, output = tokenizer.encode(letter * num_letters), tokenizer.encode_plain("x" + letter)[-5:]
        assert "".join(stream(tokenizer, prompt, output, skip=True)) == whole(tokenizer, prompt, output, skip=True)


def test_incremental_malformed_byte_run_keeps_what_was_given_out() -> None:
    tokenizer = tokenizer_named("metaspace")
    prompt, day = tokenizer.encode("x"), tokenizer.encode_plain("日")[1:]
    lone, letter = 3 + 0xFF, tokenizer.encode_plain("xy")[-1]
    assert tokenizer.decode([*prompt, *day, lone, letter]) == "x" + 4 * "\ufffd" + "y"
    assert stream(tokenizer, prompt, [*day, lone, letter], skip=True) == ["", "", "日", "", "\ufffdy", ""]
    assert stream(tokenizer, prompt, [*day, *day], skip=True) == ["", "", "日", "", "", "日", ""]
    assert stream(tokenizer, prompt, [*day, lone], skip=True) == ["", "", "日", "", "\ufffd"]


def test_incremental_replacement_characters_are_not_held_for_ever() -> None:
    deltas = stream(ByteTokenizer(), [], [0xFF] * 500, skip=True)
    assert all(delta == "\ufffd" for delta in deltas[3:-1])
    assert deltas[-1] == 3 * "\ufffd"


class Overlapping(ByteTokenizer):
    """Every token is the end of one character and the beginning of the next."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return (b"\xbd\xa0\xe4" * len(token_ids)).decode(errors="replace")


def test_incremental_tokens_that_all_end_inside_a_character_still_give_text() -> None:
    deltas = stream(Overlapping(), [0], [0] * 300, skip=True)
    assert deltas[1:] == [*["你"] * 299, "\ufffd"]


@pytest.mark.parametrize("name", ALL)
def test_incremental_cost_does_not_grow_with_the_text(name: str) -> None:
    """Without a table of fixed texts, the longest window that is ever decoded stays at MAX_WINDOW."""
    tokenizer, lens = tokenizer_named(name), []

    class Counting(ByteTokenizer):
        special_token_ids = tokenizer.special_token_ids

        def __init__(self) -> None:
            self.fixed_texts = None

        def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
            lens.append(len(token_ids))
            return tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    text = "The fisher's 日本語 🙂🙂 naïve   house ⵣⴰⵎ\n" * 20
    ids = tokenizer.encode_plain(text) + [3 + 0xF0] * 200
    detokenizer = IncrementalDetokenizer(Counting(), ids, skip_special_tokens=True)
    for token_id in ids:
        detokenizer.push([token_id])
    assert max(lens) <= MAX_WINDOW + MAX_HELD
    assert sum(lens) < 400 * len(ids)
