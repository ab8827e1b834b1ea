"""Trains the bundled model: `python -m jaxinfer.demo.train --text FILE` (needs the extra `[train]`).

The text is the output of `bible -f "gen1:1-rev22:21"` (Debian's package bible-kjv). The model is the engine's own Flax
module; in training, every sequence is one row with a single KV page.

Owns: the model's size, its optimisation with optax, checkpoints to resume from, the held-out measurement, the export.
Does not know: how to generate.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray
from safetensors.flax import save_file

from jaxinfer.checkpoint.exporter import export_parameters
from jaxinfer.communication.mesh import make_mesh
from jaxinfer.config.model_config import ModelConfig
from jaxinfer.demo import corpus
from jaxinfer.models import llama
from jaxinfer.models.decoder import TransformerDecoder
from jaxinfer.models.layout import Layout
from jaxinfer.models.registry import parse_model_config
from jaxinfer.wrappers.whole_texts import run_whole_texts, token_logprobs, whole_texts

logger = logging.getLogger("jaxinfer.demo")

SEQUENCE_LEN = 512
BATCH_SIZE = 4
NUM_EPOCHS = 9
PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.1
DROPOUT = 0.1
STEPS_PER_CHECKPOINT = 200
SEED = 0

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": corpus.VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": SEQUENCE_LEN,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
GENERATION_CONFIG = {"bos_token_id": 1, "eos_token_id": 2, "do_sample": True, "temperature": 0.8, "top_p": 0.9}
TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
}


def initial_parameters(graph: nnx.State, key: PRNGKeyArray) -> nnx.State:
    """The parameters before training.

    Norms are 1, embeddings have standard deviation 0.02, and linear layers variance 1 / inputs (less for those whose
    output is added to the residual stream).
    """

    def drawn(path: Any, value: jax.ShapeDtypeStruct, number: int) -> Array:
        name = jax.tree_util.keystr(path)
        if "norm" in name:
            return jnp.ones(value.shape, value.dtype)
        scale = 0.02 if "embedding" in name else value.shape[-1] ** -0.5
        if "out" in name or "down" in name:
            scale *= (2 * CONFIG["num_hidden_layers"]) ** -0.5
        return scale * jax.random.normal(jax.random.fold_in(key, number), value.shape, value.dtype)

    leaves, structure = jax.tree_util.tree_flatten_with_path(graph)
    return jax.tree.unflatten(structure, [drawn(path, value, i) for i, (path, value) in enumerate(leaves)])


def token_losses(
    model: TransformerDecoder,
    token_ids: Int[Array, "R L"],
    dropout_key: PRNGKeyArray | None = None,
    *,
    config: ModelConfig,
    layout: Layout,
) -> Float[Array, " T"]:
    """The negative log-probability in nats of every token but each row's first; runs inside a shard_map.

    Args:
      model: the engine's module.
      token_ids: int32[R, Q + 1].
      dropout_key: key for the dropout of the embeddings in training; None for no dropout.
      config, layout: those that the model was built from.
    """
    batch = whole_texts(token_ids.shape[0], token_ids.shape[1] - 1)
    x = model.embed(token_ids[:, :-1].ravel(), batch.positions)
    if dropout_key is not None:
        x = jnp.where(jax.random.bernoulli(dropout_key, 1 - DROPOUT, x.shape), x / (1 - DROPOUT), 0)
    x = run_whole_texts(model, x, batch, config=config, layout=layout)
    return -token_logprobs(model.head.logits(model.final_norm(x)), token_ids[:, 1:].ravel())


class Trainer:
    """The training of the model: its parameters, the optimizer's state and the current step.

    Args:
      num_steps: steps of the whole training, for the learning rate's schedule.
    """

    def __init__(self, num_steps: int):
        mesh = make_mesh()
        layout = Layout(
            num_stages=1,
            num_shards=1,
            dtype=jnp.dtype(jnp.float32),
            max_model_len=SEQUENCE_LEN,
            attention_backend="reference",  # unlike the fast backends, it can be differentiated
        )
        config = parse_model_config(CONFIG)
        graph, abstract = nnx.split(nnx.eval_shape(lambda: TransformerDecoder(config, layout)))
        self.step = 0
        self.parameters = initial_parameters(abstract, jax.random.key(SEED))
        decayed = jax.tree_util.tree_map_with_path(
            lambda path, _: "norm" not in jax.tree_util.keystr(path), self.parameters
        )
        schedule = optax.warmup_cosine_decay_schedule(0, PEAK_LEARNING_RATE, WARMUP_STEPS, num_steps)
        optimizer = optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(schedule, b2=0.95, weight_decay=WEIGHT_DECAY, mask=decayed),
        )
        self.optimizer_state = optimizer.init(self.parameters)

        def sharded(function: Any) -> Any:
            replicated = PartitionSpec()
            return jax.shard_map(function, mesh=mesh, in_specs=replicated, out_specs=replicated, check_vma=False)

        def losses_of(parameters: nnx.State, ids: Array, key: PRNGKeyArray | None = None) -> Array:
            return token_losses(nnx.merge(graph, parameters), ids, key, config=config, layout=layout)

        @jax.jit
        def update(parameters: nnx.State, optimizer_state: Any, token_ids: Array, step: Array) -> Any:
            key = jax.random.fold_in(jax.random.key(SEED + 1), step)
            losses = sharded(losses_of)
            loss, gradients = jax.value_and_grad(lambda p: losses(p, token_ids, key).mean())(parameters)
            updates, optimizer_state = optimizer.update(gradients, optimizer_state, parameters)
            return optax.apply_updates(parameters, updates), optimizer_state, loss

        self._update = update
        self._losses = jax.jit(sharded(losses_of))

    def train(self, token_ids: np.ndarray) -> float:
        """Makes one optimizer step on a batch int32[R, Q + 1]; returns its mean loss in nats per token."""
        self.parameters, self.optimizer_state, loss = self._update(
            self.parameters, self.optimizer_state, token_ids, self.step
        )
        self.step += 1
        return float(loss)

    def mean_loss(self, stream: np.ndarray) -> float:
        """The mean loss of a text in nats per token, in windows of SEQUENCE_LEN tokens without overlap.

        Windows at the end that fill no batch of BATCH_SIZE are left out.
        """
        windows = _windows(stream)
        windows = windows[: len(windows) // BATCH_SIZE * BATCH_SIZE].reshape(-1, BATCH_SIZE, SEQUENCE_LEN + 1)
        return float(np.mean([self._losses(self.parameters, batch) for batch in windows]))

    def save(self, file: Path) -> None:
        """Writes everything that is needed to resume training."""
        leaves = jax.tree.leaves((self.parameters, self.optimizer_state))
        partial = file.with_suffix(".partial.npz")
        np.savez(partial, *map(np.asarray, leaves), step=self.step)
        partial.replace(file)

    def restore(self, file: Path) -> None:
        """Restores what save wrote."""
        structure = jax.tree.structure((self.parameters, self.optimizer_state))
        with np.load(file) as saved:
            leaves = [jnp.asarray(saved[f"arr_{i}"]) for i in range(structure.num_leaves)]
            self.step = int(saved["step"])
        self.parameters, self.optimizer_state = jax.tree.unflatten(structure, leaves)

    def round_parameters(self) -> None:
        """Rounds the parameters to bfloat16, as they will be stored."""
        self.parameters = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), self.parameters)

    def export(self, directory: Path) -> None:
        """Writes config.json, generation_config.json, tokenizer_config.json and model.safetensors (bfloat16)."""
        tensors = export_parameters(self.parameters, family=llama.FAMILY, num_layers=CONFIG["num_hidden_layers"])
        stored = {name: jnp.asarray(tensor, jnp.bfloat16) for name, tensor in tensors.items()}
        save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
        (directory / "model.safetensors").chmod(0o644)  # safetensors writes files that only their owner can read
        for name, fields in {
            "config.json": CONFIG,
            "generation_config.json": GENERATION_CONFIG,
            "tokenizer_config.json": TOKENIZER_CONFIG,
        }.items():
            (directory / name).write_text(json.dumps(fields, indent=2) + "\n")


def _windows(stream: np.ndarray) -> np.ndarray:
    """The text as windows, int32[W, SEQUENCE_LEN + 1]; the last token of a window is also the first of the next."""
    starts = np.arange(0, len(stream) - SEQUENCE_LEN, SEQUENCE_LEN)
    return stream[starts[:, None] + np.arange(SEQUENCE_LEN + 1)]


def batches(stream: np.ndarray, epoch: int) -> Iterator[np.ndarray]:
    """One epoch of batches int32[BATCH_SIZE, SEQUENCE_LEN + 1]; windows differ in offset and order between epochs."""
    random = np.random.default_rng((SEED, epoch))
    windows = _windows(stream[random.integers(SEQUENCE_LEN) :])
    order = random.permutation(len(windows))
    num_batches = (len(stream) // SEQUENCE_LEN - 2) // BATCH_SIZE  # the same for every offset
    for batch in order[: num_batches * BATCH_SIZE].reshape(num_batches, BATCH_SIZE):
        yield windows[batch]


def main(
    text: Annotated[Path, typer.Option(help='output of `bible -f "gen1:1-rev22:21"`')],
    out: Annotated[Path, typer.Option(help="folder for the checkpoint; an interrupted training there goes on")],
    num_epochs: Annotated[int, typer.Option(help="passes over the training text")] = NUM_EPOCHS,
) -> None:
    """Trains, measures on the held-out chapters, and writes a checkpoint that jaxinfer loads."""
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    out.mkdir(parents=True, exist_ok=True)
    training_text, held_out_text = corpus.split(corpus.read_chapters(text))
    tokenizer = corpus.train_tokenizer(training_text, out / "tokenizer.model")
    stream = corpus.token_stream(tokenizer, training_text)
    held_out = corpus.token_stream(tokenizer, held_out_text)
    steps_per_epoch = sum(1 for _ in batches(stream, 0))
    trainer = Trainer(num_steps=num_epochs * steps_per_epoch)
    saved = out / "training.npz"
    if saved.exists():
        trainer.restore(saved)
    logger.info(
        "%d parameters, %d training tokens, %d held out, %d steps an epoch, beginning at step %d",
        sum(leaf.size for leaf in jax.tree.leaves(trainer.parameters)),
        len(stream),
        len(held_out),
        steps_per_epoch,
        trainer.step,
    )
    started = time.monotonic()
    for epoch in range(trainer.step // steps_per_epoch, num_epochs):
        for number, batch in enumerate(batches(stream, epoch)):
            if epoch * steps_per_epoch + number < trainer.step:
                continue
            loss = trainer.train(batch)
            if trainer.step % STEPS_PER_CHECKPOINT == 0:
                trainer.save(saved)
                logger.info("step %d, loss %.3f, %.0f s", trainer.step, loss, time.monotonic() - started)
        held_out_loss = trainer.mean_loss(held_out)
        logger.info("epoch %d, held-out perplexity %.2f per token", epoch + 1, np.exp(held_out_loss))
    trainer.save(saved)
    trainer.round_parameters()
    loss = trainer.mean_loss(held_out)
    num_bytes = sum(len(chapter.encode()) for chapter in held_out_text)
    bits = loss / np.log(2) * len(held_out) / num_bytes
    logger.info("bfloat16: held-out perplexity %.2f per token, %.3f bits per byte", np.exp(loss), bits)
    trainer.export(out)


if __name__ == "__main__":
    typer.run(main)
