"""Updates: the deltas of several answers for one task."""

import asyncio

import pytest
from held_steps import few_steps

from jaxinfer import LLM, RequestFailedError, SamplingParams
from jaxinfer.serve.http.updates import Updates

LONG = SamplingParams(max_tokens=200, ignore_eos=True, seed=5)


@pytest.fixture(scope="module")
def llm():
    with LLM("demo", max_num_seqs=8, num_kv_pages=128, page_size=16, max_num_batched_tokens=64) as llm:
        yield llm


async def read(updates):
    """All deltas, by the number of the submission."""
    found = {}
    while updates.go_on:
        for number, delta in await updates.next():
            found.setdefault(number, []).append(delta)
    return found


def test_deltas_of_several_answers_add_up_to_what_generate_gives(llm):
    prompts = ["In the beginning", "It was the best of times", "Call me"]
    params = SamplingParams(max_tokens=24, temperature=1, seed=3, logprobs=1, n=2)

    async def ask():
        with Updates(llm, [llm.prepare(prompt, params) for prompt in prompts]) as updates:
            return await read(updates)

    found = asyncio.run(ask())
    for number, output in enumerate(llm.generate(prompts, params, use_tqdm=False)):
        for completion in output.outputs:
            deltas = [one for delta in found[number] for one in delta.outputs if one.index == completion.index]
            assert "".join(one.text for one in deltas) == completion.text
            assert [token_id for one in deltas for token_id in one.token_ids] == list(completion.token_ids)
            assert [entry for one in deltas for entry in one.logprobs] == list(completion.logprobs)
            assert deltas[-1].finish_reason == completion.finish_reason
        assert found[number][-1].finished and found[number][-1].prompt_token_ids == output.prompt_token_ids


def test_waking_ends_the_wait_with_nothing(llm):
    async def ask():
        with Updates(llm, [llm.prepare("Hi", LONG)]) as updates:
            waiting = asyncio.ensure_future(updates.next())
            await asyncio.sleep(0)
            updates.wake()
            return await asyncio.wait_for(waiting, 60)

    with few_steps(llm, 0):
        assert asyncio.run(ask()) == []


def test_answer_that_fails_ends_the_others(llm):
    def fail(*arguments, **keywords):
        raise ValueError("no text")

    async def ask():
        submissions = [llm.prepare(prompt, LONG) for prompt in ("a", "b")]
        with Updates(llm, submissions) as updates:
            tickets = list(updates._open.values())
            while tickets[1].answer is None:
                await updates.next()
            tickets[1].answer.completions[0]._read_text = fail
            with pytest.raises(RequestFailedError, match="no text"):
                await read(updates)
        return tickets

    with few_steps(llm, 100):
        first, second = asyncio.run(ask())
    assert first.is_cancelled and second.is_cancelled


def test_leaving_aborts_what_runs(llm):
    async def ask():
        with Updates(llm, [llm.prepare("a", LONG)]) as updates:
            await updates.next()

    with few_steps(llm):
        asyncio.run(ask())
        while llm.stats().num_requests_running:
            pass
