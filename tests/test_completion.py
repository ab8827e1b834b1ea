"""Stop strings in growing text."""

from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.completion import StopMatcher


def first_match(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The text before the stop string that is complete first, character by character."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(
    st.text(alphabet="ab", max_size=30),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(1, 5), min_size=30, max_size=30),
)
def test_stop_matcher_equals_reading_character_by_character(text, stops, sizes):
    matcher, released, rest = StopMatcher(stops, include=False), "", text
    for size in sizes:
        if matcher.matched is None:
            released += matcher.push(rest[:size])
            rest = rest[size:]
    assert (released + matcher.finish(), matcher.matched) == first_match(text, stops)


def test_stop_matcher_suspended_ignores_what_ends_there_but_not_what_begins():
    matcher = StopMatcher(["stop"], include=False)
    assert matcher.push("a stop b st", suspended=True) == "a stop b "
    assert matcher.push("op c") == "" and matcher.matched == "stop"


def test_stop_matcher_holds_back_only_what_may_begin_a_stop_string():
    matcher = StopMatcher(["stop"], include=False)
    assert [matcher.push(piece) for piece in ("a s", "t", "e", "sto")] == ["a ", "", "ste", ""]
    assert matcher.finish() == "sto"
