"""Sequences that wait: they leave in order, those taken out cost little and leave nothing behind."""

import sys
import weakref

import pytest
from engine_tools import assert_own_texts, finish, make_engine, request
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.engine.sequence import SequenceState
from jaxinfer.engine.waiting import WaitingQueue


class CountedPriority(int):
    """A priority that counts how often any two are compared."""

    num_comparisons = 0

    def __eq__(self, other):
        CountedPriority.num_comparisons += 1
        return int(self) == int(other)

    def __lt__(self, other):
        CountedPriority.num_comparisons += 1
        return int(self) < int(other)

    __hash__ = int.__hash__


def sequence(order):
    entry = request("-".join(map(str, order)), [1])
    return SequenceState(request=entry, order=order, token_ids=[1], max_total_len=9)


def comparisons_of_aborting(count):
    """How many comparisons it takes to abort so many waiting requests, the newest of every pair first."""
    engine, _ = make_engine()
    for number in range(count):
        engine.add_request(request(number, [1], priority=CountedPriority(number % 7)))
    before = CountedPriority.num_comparisons
    for number in range(count):
        assert engine.abort(str(number ^ 1))
        assert engine.stats().num_requests_waiting == count - number - 1
    return CountedPriority.num_comparisons - before


def test_waiting_aborts_cost_in_proportion_to_their_number():
    assert comparisons_of_aborting(512) <= 3 * 8 * max(comparisons_of_aborting(64), 64)


def test_waiting_aborted_sequence_is_freed_at_once():
    engine, _ = make_engine(max_num_seqs=1)
    requests = [request(number, [number + 1], 3) for number in range(4)]
    for entry in requests:
        engine.add_request(entry)
    aborted = weakref.ref(engine._sequences["2"])
    engine.abort("2")
    assert aborted() is None
    assert_own_texts(finish(engine), [entry for entry in requests if entry.request_id != "2"])


def test_waiting_orders_of_those_taken_out_do_not_pile_up():
    queue = WaitingQueue()
    queue.push(sequence((0, 0)))
    for number in range(1, 1000):
        passing = sequence((0, number))
        queue.push(passing)
        queue.remove(passing)
    assert len(queue) == 1 and len(queue._orders) < 20


@pytest.mark.parametrize("count", [0, 2, 9])
def test_waiting_first_are_the_smallest_in_order(count):
    queue = WaitingQueue()
    entries = [sequence((number * 5 % 7, number)) for number in range(7)]
    for entry in entries:
        queue.push(entry)
    queue.remove(entries[0])
    expected = sorted(entries[1:], key=lambda entry: entry.order)[:count]
    assert queue.first(count) == expected


def test_waiting_first_are_found_once_after_one_came_back():
    queue = WaitingQueue()
    entries = [sequence((0, number)) for number in range(5)]
    for entry in (*entries, entries[1], entries[1]):
        if entry in queue:
            queue.remove(entry)
        queue.push(entry)
    assert queue.first(3) == entries[:3] and queue.first(9) == entries


def comparisons_of_first(count):
    queue = WaitingQueue()
    for number in range(count):
        queue.push(sequence((CountedPriority(number % 7), number)))
    before = CountedPriority.num_comparisons
    assert len(queue.first(8)) == 8
    return CountedPriority.num_comparisons - before


def test_waiting_first_cost_nothing_for_the_others():
    assert comparisons_of_first(4096) <= 2 * comparisons_of_first(64)


def calls_of_a_step(num_waiting, **fields):
    """How many functions a decode step calls beside requests that wait for a slot or, where slots are free, pages."""
    engine, _ = make_engine(max_model_len=256, num_kv_pages=34, **fields)
    for number in range(2):
        engine.add_request(request(number, [number + 1], 100, priority=-1))
    for number in range(num_waiting):
        engine.add_request(request(f"w{number}", [number % 90, number // 90, *range(198)], 50))
    for _ in range(20):
        engine.step()
    assert engine.stats().num_requests_waiting == num_waiting - (fields.get("max_num_seqs", 4) > 2)
    calls = []
    sys.setprofile(lambda frame, event, argument: calls.append(event) if event in ("call", "c_call") else None)
    try:
        engine.step()
    finally:
        sys.setprofile(None)
    return len(calls)


@pytest.mark.parametrize("fields", [{"max_num_seqs": 2}, {}, {"pipeline_parallel_size": 2}], ids=str)
def test_waiting_requests_cost_a_step_no_more_if_they_are_many(fields):
    assert calls_of_a_step(1000, **fields) == calls_of_a_step(12, **fields)


@given(st.lists(st.tuples(st.sampled_from(["push", "pop", "remove", "again"]), st.integers(0, 99)), max_size=60))
def test_waiting_any_operations_equal_a_sorted_list(operations):
    queue, plain, gone = WaitingQueue(), [], []
    for number, (what, value) in enumerate(operations):
        if what == "push" or not plain:
            entry = sequence((value % 3, number))
        elif what == "again" and gone:  # a preempted sequence comes back with the order it had
            entry = gone.pop(value % len(gone))
        elif what == "remove":
            entry = plain.pop(value % len(plain))
            queue.remove(entry)
            gone.append(entry)
            assert entry not in queue
            continue
        else:
            gone.append(plain.pop(0))
            assert queue.pop() is gone[-1]
            continue
        queue.push(entry)
        plain = sorted([*plain, entry], key=lambda found: found.order)
        assert entry in queue
        assert len(queue) == len(plain) == len(list(queue))
    assert [queue.pop() for _ in range(len(plain))] == plain and not queue


def test_waiting_followers_are_taken_out_without_a_search():
    """Samples that wait for their leader; a search would look at all that are older."""
    engine, _ = make_engine(max_num_batched_tokens=16)
    requests = [request(number, range(40), 2) for number in range(100)]
    for entry in requests:
        engine.add_request(entry, prefix_source=None if entry is requests[0] else "0")
    engine.step()
    followers = engine._scheduler._waiting._followers[engine._sequences["0"]]
    assert isinstance(followers, dict) and len(followers) == 99
    for entry in reversed(requests[2:]):
        engine.abort(entry.request_id)
    assert engine.stats().num_requests_waiting == len(followers) == 1
    assert_own_texts(finish(engine), requests[:2])
