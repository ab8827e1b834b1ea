"""Requests go where their beginning is known, unless that replica has too much to do."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.api.routing import Router, RoutingRule

RULE = RoutingRule(max_difference=4, max_ratio=1.5, min_match=0.5)


def router(num_replicas=3, num_remembered=8):
    return Router(num_replicas, num_remembered=num_remembered, rule=RULE)


def pages(*names):
    return [str(name).encode() for name in names]


def test_choose_unknown_prompt_goes_to_the_least_busy():
    assert router().choose(pages("a"), loads=[3, 1, 2], cached=[0, 0, 0]) == 1


def test_choose_known_beginning_goes_to_the_replica_that_has_most_of_it():
    assert router().choose(pages(*"abcd"), loads=[4, 0, 1], cached=[3, 0, 2]) == 0


def test_choose_too_short_a_match_does_not_count():
    assert router().choose(pages(*"abcd"), loads=[2, 0, 1], cached=[1, 0, 0]) == 1


@pytest.mark.parametrize(("loads", "chosen"), [([5, 0, 1], 1), ([4, 0, 0], 0), ([20, 16, 17], 0), ([30, 16, 17], 1)])
def test_choose_known_beginning_gives_way_to_an_imbalance(loads, chosen):
    assert router().choose(pages("a", "b"), loads=loads, cached=[2, 0, 0]) == chosen


def test_choose_recent_prompts_are_remembered_before_their_pages_are_cached():
    found = router()
    first = found.choose(pages(*"abcd"), loads=[0, 0, 0], cached=[0, 0, 0])
    loads = [0, 0, 0]
    loads[first] = 3
    assert found.choose(pages(*"abce"), loads=loads, cached=[0, 0, 0]) == first
    for number in range(8 * 3):  # one after the other, until the first is forgotten
        found.choose(pages(number), loads=[0, 0, 0], cached=[0, 0, 0])
        found.choose(pages(number, 1), loads=[int(i != first) for i in range(3)], cached=[0, 0, 0])
    assert found.choose(pages(*"abcd"), loads=loads, cached=[0, 0, 0]) != first


def test_choose_equal_replicas_take_turns_at_random():
    found = router()
    counts = Counter(found.choose(pages(number), loads=[0, 0, 0], cached=[0, 0, 0]) for number in range(300))
    assert min(counts.values()) > 60


def test_choose_replicas_that_take_nothing_get_nothing():
    assert router().choose(pages("a"), loads=[None, 9, None], cached=[1, 0, 0]) == 1
    with pytest.raises(ValueError, match="no replica takes requests"):
        router().choose(pages("a"), loads=[None, None, None], cached=[0, 0, 0])


@given(st.lists(st.lists(st.sampled_from("abc"), max_size=4), max_size=60), st.integers(1, 5))
def test_router_remembers_exactly_the_last_prompts(prompts, num_remembered):
    found = router(1, num_remembered)
    for prompt in prompts:
        found.choose(pages(*prompt), loads=[0], cached=[0])
    kept = prompts[-num_remembered:]
    assert found._pages[0] == Counter(page for prompt in kept for page in pages(*prompt))
