"""EleutherAI's lm-evaluation-harness, model local-completions (pip install 'lm-eval[api]')."""

from __future__ import annotations

import json

import pytest

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]
QUESTIONS = [
    {"question": "In the beginning God created the", "choices": [" heaven", " camel", " bread"], "answer": 0},
    {"question": "And God said, Let there be", "choices": [" light", " a sword", " Moses"], "answer": 0},
    {"question": "And the LORD spake unto", "choices": [" the sea", " Moses", " bread"], "answer": 1},
]


@pytest.fixture
def task(tmp_path) -> dict:
    """A task of multiple choice whose questions are a file here."""
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, QUESTIONS)))
    return {
        "task": "questions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }


@pytest.mark.parametrize("batch_size", [1, 4])
def test_loglikelihoods_equal_score(served, url, task, monkeypatch, tmp_path, batch_size):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity", reason="needs the extra lm-eval[api]")
    llm = served[0]
    # It tokenizes by /tokenizer_info and /tokenize, since the server has them.
    settings = {"model": "demo", "base_url": f"{url}/completions", "batch_size": batch_size, "max_retries": 1}
    found = lm_eval.simple_evaluate(
        model="local-completions", model_args=settings, tasks=[task], bootstrap_iters=0, log_samples=True
    )
    samples = sorted(found["samples"]["questions"], key=lambda sample: sample["doc_id"])
    assert len(samples) == len(QUESTIONS)
    num_right = 0
    for sample, asked in zip(samples, QUESTIONS, strict=True):
        context, sums = llm.tokenizer.encode_plain(asked["question"]), []
        for choice, (loglikelihood, is_greedy) in zip(asked["choices"], sample["filtered_resps"], strict=True):
            token_ids = llm.tokenizer.encode_plain(asked["question"] + choice)
            scored = llm.score(token_ids, prompt_logprobs=1).prompt_logprobs[len(context) :]
            entries = [entry[i] for entry, i in zip(scored, token_ids[len(context) :], strict=True)]
            sums.append(sum(entry.logprob for entry in entries))
            # A batch adds up in another order than a single text.
            assert float(loglikelihood) == pytest.approx(sums[-1], abs=1e-4)
            assert str(is_greedy) == str(all(entry.rank == 1 for entry in entries))
        num_right += sums.index(max(sums)) == asked["answer"]
    assert found["results"]["questions"]["acc,none"] == pytest.approx(num_right / len(QUESTIONS))
