"""The engine's thread: several callers, slow readers, cancellation, failures of one request and of all, closing."""

import gc
import random
import threading
import time
import weakref
from concurrent.futures import CancelledError

import pytest
from fake_policies import Panic, Raising, Scripted, partly
from hypothesis import given, settings
from hypothesis import strategies as st
from test_controller import constrained, expected_text, make_controller

from jaxinfer import EngineClosedError, RequestFailedError
from jaxinfer.api.driver import Driver
from jaxinfer.sampling_params import SamplingParams


@pytest.fixture
def controller():
    return make_controller()


@pytest.fixture
def driver(controller):
    driver = Driver(controller)
    yield driver
    driver.close()


def submit(driver, controller, prompt, max_tokens=8, *, stream=False, on_update=None, **params):
    submission = controller.prepare(prompt, SamplingParams(max_tokens=max_tokens, **params))
    return driver.submit([submission], stream=stream, on_update=on_update)[0]


def assert_works(driver, controller):
    assert submit(driver, controller, [6], 4).next_output(timeout=30).text == expected_text([6], 4)


def assert_idle(driver, controller):
    """Another request lets the driver take in what was cancelled before; no page is left behind."""
    assert_works(driver, controller)
    stats = controller._engine.stats()
    assert (stats.num_requests_running, stats.num_requests_waiting, stats.kv_pages_used) == (0, 0, 0)


def in_steps(controller):
    """Lets the controller step only as often as the semaphore is released."""
    allowed, step = threading.Semaphore(0), controller.step
    controller.step = lambda: allowed.acquire() and step()
    return allowed


def test_driver_many_threads_get_their_own_texts(driver, controller):
    texts = {}

    def ask(number):
        texts[number] = submit(driver, controller, [number, 3], 10).next_output(timeout=30).text

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {number: expected_text([number, 3], 10) for number in range(12)}


def test_driver_stream_gives_every_token_once(driver, controller):
    allowed = in_steps(controller)
    ticket, deltas = submit(driver, controller, [5], 6, stream=True), []
    allowed.release()  # the first step only launches
    for _ in range(6):
        allowed.release()
        output = ticket.next_output(timeout=30)
        deltas.append(output.delta)
    assert output.finished and deltas == list(expected_text([5], 6))


def test_driver_slow_reader_gets_the_latest_state_and_all_text_once(driver, controller):
    allowed = in_steps(controller)
    ticket = submit(driver, controller, [5], 20, stream=True)
    allowed.release(8)
    while ticket.num_tokens < 7:
        time.sleep(0.001)
    first = ticket.next_output(timeout=30)
    assert first.delta == first.text == expected_text([5], 7)
    allowed.release(100)
    while ticket.num_tokens < 20:
        time.sleep(0.001)
    last = ticket.next_output(timeout=30)
    assert last.finished
    assert first.delta + last.delta == expected_text([5], 20)
    assert ticket.next_output(timeout=30).finished, "asking once more does not wait for ever"


def test_driver_unread_stream_is_told_once_until_it_looks(driver, controller):
    told = []
    ticket = submit(driver, controller, [5], 20, stream=True, on_update=told.append)
    while ticket.num_tokens < 20:
        time.sleep(0.001)
    assert_works(driver, controller)
    assert told == [ticket]
    assert ticket.take().text == expected_text([5], 20)


def test_driver_cancelled_request_wakes_its_reader_and_frees_the_engine(driver, controller):
    allowed = in_steps(controller)
    ticket = submit(driver, controller, [5], 50, stream=True)
    allowed.release(4)
    assert not ticket.next_output(timeout=30).finished
    timer = threading.Timer(0.05, driver.cancel, [[ticket]])
    timer.start()
    assert isinstance(end_of(ticket), CancelledError)
    timer.join()
    allowed.release(1000)
    assert_idle(driver, controller)


def test_driver_cancelled_before_it_starts_never_runs(driver, controller):
    allowed, prepared = in_steps(controller), controller.prepare([5], SamplingParams(max_tokens=50))
    first = submit(driver, controller, [4])
    second = driver.submit([prepared])[0]
    driver.cancel([second])
    allowed.release(1000)
    first.next_output(timeout=30)
    with pytest.raises(CancelledError):
        second.next_output(timeout=30)
    assert_idle(driver, controller)


def test_driver_closed_refuses_and_wakes_those_who_wait(controller):
    ended = []
    driver = Driver(controller, on_end=lambda: ended.append(threading.current_thread().name))
    release = threading.Event()
    controller.step = lambda: release.wait(10) and []
    ticket = submit(driver, controller, [5])
    closer = threading.Thread(target=driver.close)
    closer.start()
    release.set()
    with pytest.raises(EngineClosedError, match="closed"):
        ticket.next_output(timeout=30)
    closer.join()
    assert ended == ["jaxinfer-engine"]
    assert not driver.is_running
    with pytest.raises(EngineClosedError, match="closed"):
        submit(driver, controller, [6])


@pytest.mark.parametrize("error", [MemoryError("no room"), Panic("no room"), SystemExit("no room")])
def test_driver_failing_step_reaches_all_callers_with_its_cause(driver, controller, error):
    def fail():
        raise error

    controller.step = fail
    tickets = [submit(driver, controller, [number]) for number in range(3)]
    for ticket in tickets:
        with pytest.raises(EngineClosedError, match=f"{type(error).__name__}: no room") as caught:
            ticket.next_output(timeout=30)
        assert caught.value.__cause__ is error
    with pytest.raises(EngineClosedError, match="no room"):
        submit(driver, controller, [6])
    assert not driver.is_running


@pytest.mark.parametrize("error", [ValueError("deaf"), Panic("deaf"), SystemExit("deaf")])
def test_driver_reader_that_cannot_be_told_of_the_end_leaves_the_others_to_hear_of_it(controller, error):
    ended, release = threading.Event(), threading.Event()
    driver = Driver(controller, on_end=ended.set)
    controller.step = lambda: release.wait(10) and []

    def raise_on_update(ticket):
        raise error

    tickets = [
        submit(driver, controller, [5], on_update=raise_on_update if number != 1 else None) for number in range(3)
    ]
    release.set()
    driver.close()
    assert ended.is_set()
    for ticket in tickets:
        with pytest.raises(EngineClosedError, match="closed"):
            ticket.next_output(timeout=30)


@pytest.mark.parametrize("error", [ValueError("odd"), Panic("odd")])
def test_driver_submission_that_raises_fails_alone(driver, controller, error):
    good = [controller.prepare([number, 3], SamplingParams(max_tokens=10)) for number in range(2)]
    bad = constrained(controller.prepare([9], SamplingParams(max_tokens=10, n=3)), Raising("start", error))
    first, second, third = driver.submit([good[0], bad, good[1]])
    with pytest.raises(RequestFailedError, match=f"{type(error).__name__}: odd") as caught:
        second.next_output(timeout=30)
    assert caught.value.__cause__ is error
    assert first.next_output(timeout=30).text == expected_text([0, 3], 10)
    assert third.next_output(timeout=30).text == expected_text([1, 3], 10)
    assert_idle(driver, controller)


def test_driver_reader_that_cannot_be_told_loses_only_its_own_request(driver, controller, caplog):
    def raise_on_update(ticket):
        raise ValueError("no such loop")

    ticket = submit(driver, controller, [5], 50, stream=True, on_update=raise_on_update)
    beside = submit(driver, controller, [7], 20)
    assert beside.next_output(timeout=30).text == expected_text([7], 20)
    with pytest.raises(RequestFailedError, match="no such loop"):
        ticket.take()
    assert "no such loop" in caplog.text
    assert_idle(driver, controller)


def test_driver_closed_on_its_own_thread_ends_after_the_step(controller):
    """Where the garbage collector happens to end an LLM."""
    ended = threading.Event()
    driver = Driver(controller, on_end=ended.set)
    ticket = submit(driver, controller, [5], 50, stream=True, on_update=lambda ticket: driver.close())
    assert ended.wait(30)
    with pytest.raises(EngineClosedError, match="closed"):
        ticket.next_output(timeout=30)


def test_driver_is_collected_once_closed_and_its_tickets_are_gone(controller):
    driver = Driver(controller)
    ticket = submit(driver, controller, [5])
    ticket.next_output(timeout=30)
    driver.close()
    died = weakref.ref(driver)
    del driver
    gc.collect()
    assert died() is None


KINDS = ["plain", "stop", "start", "allowed", "advance", "cancelled", "deaf", "samples"]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.sampled_from(KINDS), min_size=1, max_size=8), st.booleans(), st.booleans())
def test_driver_any_history_lets_nobody_wait_for_ever(seed, kinds, drafting, closes_early):
    """Whatever requests do and whenever the driver closes, each ticket ends with its own text or its own error."""
    rng = random.Random(seed)
    controller = make_controller(num_kv_pages=20, drafter=Scripted(partly) if drafting else None)
    driver, tickets = Driver(controller), []

    def deaf(ticket):
        raise ValueError("deaf")

    for number, kind in enumerate(kinds):
        stop = expected_text([number], 12)[7:9] if kind == "stop" else None
        params = SamplingParams(max_tokens=12, n=2 if kind == "samples" else 1, stop=stop)
        submission = controller.prepare([number], params)
        if kind in ("start", "allowed", "advance"):
            after = 0 if kind == "start" else rng.randint(0, 4)
            submission = constrained(submission, Raising(kind, Panic("broken"), after=after))
        on_update = deaf if kind == "deaf" else None
        tickets += driver.submit([submission], stream=rng.random() < 0.5, on_update=on_update)
        if kind == "cancelled":
            driver.cancel(tickets[-1:])
    if not closes_early:
        for ticket in tickets:
            end_of(ticket)
        assert_idle(driver, controller)
    driver.close()
    for number, (kind, ticket) in enumerate(zip(kinds, tickets, strict=True)):
        end = end_of(ticket)
        if kind == "cancelled":
            assert isinstance(end, CancelledError)
        elif isinstance(end, EngineClosedError):
            assert closes_early
        elif kind in ("start", "allowed", "advance", "deaf"):
            assert isinstance(end, RequestFailedError)
        else:
            expected = expected_text([number], 12)
            assert end.text == (expected[: expected.index(expected[7:9])] if kind == "stop" else expected)


def end_of(ticket):
    """The finished output, or the error."""
    try:
        while not (output := ticket.next_output(timeout=30)).finished:
            pass
    except (RequestFailedError, EngineClosedError, CancelledError) as error:
        return error
    return output
