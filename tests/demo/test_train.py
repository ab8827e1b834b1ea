"""Training of the bundled model, on a toy scale: it learns, resumes exactly, and exports what the loader reads."""

from __future__ import annotations

import numpy as np
import pytest

from jaxinfer import LLM, SamplingParams
from jaxinfer.demo import train

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}


@pytest.fixture(autouse=True)
def tiny(monkeypatch) -> None:
    monkeypatch.setattr(train, "CONFIG", train.CONFIG | SIZES | HEADS)
    monkeypatch.setattr(train, "SEQUENCE_LEN", 16)
    monkeypatch.setattr(train, "BATCH_SIZE", 2)
    monkeypatch.setattr(train, "WARMUP_STEPS", 4)
    monkeypatch.setattr(train, "PEAK_LEARNING_RATE", 2e-2)


def counting_stream() -> np.ndarray:
    """3, 4, ... 18, 3, 4, ...: every token follows from the one before."""
    return (3 + np.arange(400) % 16).astype(np.int32)


def test_batches_cover_an_epoch_and_overlap_by_one_token() -> None:
    stream = np.arange(400, dtype=np.int32)
    epochs = [np.concatenate(list(train.batches(stream, epoch))) for epoch in range(2)]
    for windows in epochs:
        assert windows.shape == (22, 17)
        assert (np.diff(windows, axis=1) == 1).all()
        assert len(set(windows[:, 0].tolist())) == 22
    assert not np.array_equal(*epochs)
    np.testing.assert_array_equal(np.concatenate(list(train.batches(stream, 0))), epochs[0])


def test_trainer_learns_resumes_exactly_and_exports(tmp_path) -> None:
    stream = counting_stream()
    steps = [batch for epoch in range(16) for batch in train.batches(stream, epoch)]
    trainer = train.Trainer(num_steps=len(steps))
    before = trainer.mean_loss(stream)
    assert before == pytest.approx(np.log(32), abs=0.5)  # an untrained model knows nothing
    for number, batch in enumerate(steps):
        if number == 40:
            trainer.save(tmp_path / "training.npz")
        trainer.train(batch)
    loss = trainer.mean_loss(stream)
    assert loss < 0.3 * before

    resumed = train.Trainer(num_steps=len(steps))
    resumed.restore(tmp_path / "training.npz")
    for batch in steps[resumed.step :]:
        resumed.train(batch)
    assert resumed.mean_loss(stream) == loss

    trainer.round_parameters()
    trainer.export(tmp_path)
    with LLM(tmp_path, dtype="float32", max_model_len=16, page_size=8, num_kv_pages=8, max_num_seqs=1) as llm:
        output = llm.generate(stream[:4].tolist(), SamplingParams(temperature=0, max_tokens=8))
    assert list(output.token_ids) == stream[4:12].tolist()
