"""The engine's thread: several callers, cancellation, failure, closing."""

import contextlib
import queue
import threading

import pytest
from test_controller import expected_text, make_controller

from jaxinfer.driver import Driver, EngineClosedError
from jaxinfer.sampling_params import SamplingParams


@pytest.fixture
def controller():
    return make_controller()


@pytest.fixture
def driver(controller):
    driver = Driver(controller)
    yield driver
    driver.close()


def submit(driver, controller, prompt, max_tokens=8, **options):
    return driver.submit([controller.prepare(prompt, SamplingParams(max_tokens=max_tokens))], **options)[0]


def delivered(ticket):
    """Outputs that wait in the ticket already."""
    with contextlib.suppress(queue.Empty):
        while True:
            yield ticket.next_output(0)


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


def test_driver_stream_delivers_every_step(driver, controller):
    ticket = submit(driver, controller, [5], 6, stream=True)
    outputs = [ticket.next_output(timeout=30) for _ in range(6)]
    assert "".join(output.delta for output in outputs) == expected_text([5], 6)
    assert outputs[-1].finished


def test_driver_cancelled_request_gets_nothing_more_and_frees_the_engine(driver, controller):
    allowed, step = threading.Semaphore(4), controller.step
    controller.step = lambda: allowed.acquire() and step()
    ticket = submit(driver, controller, [5], 50, stream=True)
    ticket.next_output(timeout=30)
    driver.cancel([ticket])
    allowed.release(100)
    assert submit(driver, controller, [6], 4).next_output(timeout=30).text == expected_text([6], 4)
    assert not any(output.finished for output in delivered(ticket))
    with pytest.raises(queue.Empty):
        ticket.next_output(timeout=0.05)


def test_driver_closed_refuses_and_wakes_those_who_wait(controller):
    driver = Driver(controller)
    release = threading.Event()
    controller.step = lambda: release.wait(10) and []
    ticket = submit(driver, controller, [5])
    closer = threading.Thread(target=driver.close)
    closer.start()
    release.set()
    with pytest.raises(EngineClosedError, match="closed"):
        ticket.next_output(timeout=30)
    closer.join()
    with pytest.raises(EngineClosedError, match="closed"):
        submit(driver, controller, [6])


def test_driver_failing_step_reaches_all_callers_with_its_cause(driver, controller):
    def fail():
        raise MemoryError("no room")

    controller.step = fail
    ticket = submit(driver, controller, [5])
    with pytest.raises(EngineClosedError, match="MemoryError: no room") as caught:
        ticket.next_output(timeout=30)
    assert isinstance(caught.value.__cause__, MemoryError)
    with pytest.raises(EngineClosedError, match="no room"):
        submit(driver, controller, [6])
