"""The methods of LLM that research and training need.

Owns: sites, forks, sweeps, the logit lens, traces, and the weights' methods, as the base class of LLM.
Does not know: how any of it is done (experiments.py, served_weights.py and research/ do).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jaxinfer.api import experiments
from jaxinfer.api.arguments import checked
from jaxinfer.api.loaded_engine import LoadedEngine
from jaxinfer.api.runner import Runner
from jaxinfer.api.served_weights import Pause, ServedWeights
from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.config.validation import require_int
from jaxinfer.engine.step_log import StepLog
from jaxinfer.outputs import RequestOutput
from jaxinfer.research.logit_lens import LogitLens
from jaxinfer.research.sweep import Reduction
from jaxinfer.research.table import Table
from jaxinfer.research.trace import Trace
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.sites import Sites
from jaxinfer.text.controller import TextGenerationController
from jaxinfer.text.preparation import Prompt
from jaxinfer.wrappers.decoder_wrapper import DecoderWrapper

if TYPE_CHECKING:
    from jaxinfer.api.llm import LLM


class ResearchMethods:
    """Base of LLM, which sets the attributes below."""

    config: EngineConfig
    _replicas: Sequence[LoadedEngine]
    _loaded: LoadedEngine
    _controller: TextGenerationController
    _runner: Runner
    _weights: ServedWeights
    _config_fields: Mapping[str, Any]
    _directory: Path | None

    def fork(
        self,
        output: RequestOutput,
        *,
        at: int,
        n: int = 1,
        index: int = 0,
        sampling_params: SamplingParams | None = None,
    ) -> RequestOutput:
        """Goes on from the middle of a generated text, with n samples.

        Keys and values of the text that are still in the prefix cache are used again, and shared by the n samples;
        `num_cached_tokens` says how many (full pages only). Other tokens are computed again. With the parameters and
        the seed of the original, the fork gives what followed there, penalties and structured output included. Only a
        stop string that begins in the kept text is not noticed.

        Args:
          output: of generate, chat, beam_search or fork.
          at: how many of the text's tokens to keep; a negative number counts from the end, -2 keeps all but two.
          n: samples, in place of sampling_params.n.
          index: which of the output's samples to fork, 0 for the first.
          sampling_params: None takes those of the output, with another seed and what is left of max_tokens, at least 1.

        Returns:
          A RequestOutput whose prompt is the text up to the fork, and whose outputs are what follows.

        Raises:
          TypeError: output is not a RequestOutput.
          IndexError: the output has no such text, or the text not so many tokens.
          ValueError: as generate.
          EngineClosedError, RequestFailedError: as generate.

        Example:
          out = llm.generate("In the beginning", SamplingParams(max_tokens=32))
          for completion in llm.fork(out, at=12, n=8).outputs:
              print(completion.text)
        """
        if not isinstance(output, RequestOutput):
            raise TypeError(f"fork needs the RequestOutput of a generation, got {type(output).__name__}")
        at, index = require_int("at", at, -(2**31)), require_int("index", index, 0)
        params = self._params_of_fork(output, at, index) if sampling_params is None else sampling_params
        params = dataclasses.replace(checked("sampling_params", params, SamplingParams), n=n)
        submission = self._controller.prepare_fork(output, params, at=at, index=index)
        self._controller.check_captures([submission])
        return self._runner.run([submission], show_bar=False)[0]

    def sweep(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        reductions: Mapping[str, Reduction] | None = None,
        use_tqdm: bool = True,
        **fields: Any,
    ) -> Table:
        """Generates for all combinations of some settings, batched together, and returns a tidy table.

        Args:
          prompts: a string, a list of token ids, or a list of either.
          reductions: for captured values, name of a column -> (site, function). The function gets the site's values of
            a sample, float32[tokens, dims], and returns what the column has.
          use_tqdm: show a progress bar.
          **fields: fields of SamplingParams. A field that has a list (range, array) of values is varied; any other is
            the same for all. intervention=[..] varies the interventions of a request: each entry is None, one of them,
            or a list of several. Instead of a list, a mapping may give the values names for the table; fields that
            are lists themselves (stop, capture) need one to be varied.

        Returns:
          A row for each sample: prompt, settings, sample, seed, text, num_tokens, finish_reason, logprob (of the whole
          text), mean_logprob (of a token) and the reductions. `plot()` draws it, `to_pandas()` hands it on.

        Raises:
          TypeError: an unknown field.
          Others as generate.

        Example:
          table = llm.sweep("In the beginning", temperature=[0.5, 1.0], seed=range(8), max_tokens=32)
          table.plot("logprob")
        """
        return experiments.sweep(self._llm, prompts, fields, reductions=reductions or {}, use_tqdm=use_tqdm)

    def logit_lens(self, prompt: Prompt, *, layers: Sequence[int] | None = None, num_top: int = 5) -> LogitLens:
        """Shows what the model would predict after each token of a prompt if it ended after each of its layers.

        Args:
          prompt: a string or token ids.
          layers: numbers of layers; None for all.
          num_top: how many of the most likely tokens to report at each place.

        Returns:
          A LogitLens: arrays, a table, `plot()`, and a table with colours in notebooks.

        Raises:
          TypeError, ValueError: as generate, there is no such layer, or several processes hold the model.
        """
        return experiments.logit_lens(self._llm, prompt, layers=layers, num_top=num_top)

    @contextlib.contextmanager
    def trace(self) -> Iterator[Trace]:
        """Watches the engine: every step that is launched inside the with block, of all callers.

        Yields:
          A Trace, which grows while the block runs: `plot()` draws it, `plot_pipeline()` the stages, `save(file)`
          writes a file for ui.perfetto.dev, `table` has a row for each step.

        Raises:
          ValueError: the engine is being traced already.

        Example:
          with llm.trace() as trace:
              llm.generate(prompts)
          trace.plot()
        """
        engines = [loaded.engine for loaded in self._replicas]
        if any(engine.log is not None for engine in engines):
            raise ValueError("the engine is being traced already; end that trace first")
        logs = [StepLog() for _ in engines]
        for engine, log in zip(engines, logs, strict=True):
            engine.log = log
        try:
            yield Trace(logs, num_stages=self.config.pipeline_parallel_size)
        finally:
            for engine in engines:
                engine.log = None

    def sites(self) -> Sites:
        """The places inside the model whose values can be captured and changed; print it for names and shapes.

        Raises:
          ValueError: the LLM has none, since several processes hold its model.

        Example:
          out = llm.generate("In the beginning", SamplingParams(capture=["layers.3.residual"]))
          out.captures["layers.3.residual"].shape  # tokens, hidden size
        """
        return self._loaded.engine.sites

    @property
    def decoder(self) -> DecoderWrapper:
        """The wrapper that runs the first replica's steps, for research code that needs its mesh and layout.

        Raises:
          ValueError: several processes hold the model.
        """
        return self._loaded.decoder

    @property
    def params(self) -> dict[str, Any]:
        """The weights as nested dicts of jax.Array, sharded over the mesh.

        The names are those of the modules: params["layers"]["0"]["mlp"]["down"]["weight"] is [stages, out, in], with
        the layers of all pipeline stages stacked. They are the very arrays that steps read, so do not donate them;
        sleep and close delete them. But matrices of linear layers on CPUs are copies, as steps read them transposed.

        Raises:
          ValueError: several processes hold the model, or the LLM sleeps.
          EngineClosedError: the LLM is closed.
        """
        return self._weights.params

    @property
    def weights_version(self) -> int:
        """How often update_weights has replaced the weights; outputs carry the number with which they were made."""
        return self._weights.version

    def update_weights(
        self, tree: Mapping[str, Any], *, only: Callable[[str], bool] | None = None, pause: Pause = "wait"
    ) -> int:
        """Replaces weights in place, between requests; nothing is compiled anew, and the prefix cache is flushed.

        Args:
          tree: nested dicts like params, with arrays of the same shapes, dtypes and shardings (or numpy arrays). They
            are copied, so for a moment the devices hold the old weights, the new ones and the copies. With
            quantization, a matrix may also be given in floats (and without its scales), which are rounded as LLM does.
          only: tells by dotted name, such as "layers.0.mlp.down.weight", which weights are replaced; the tree may then
            lack the others. None replaces all.
          pause: "wait" lets running requests finish first, "abort" ends them with finish reason "abort". Requests that
            come meanwhile wait and get the new weights.

        Returns:
          The new weights_version.

        Raises:
          TypeError, ValueError: the tree does not fit, or has NaN or infinity in it; nothing was replaced.
          EngineClosedError: the LLM is closed.
        """
        return self._weights.update(tree, only=only, pause=pause)

    def sleep(self, *, pause: Pause = "wait") -> None:
        """Frees the devices for something else; the weights stay in the host's memory, compiled programs are kept.

        Requests are refused with EngineClosedError until wake_up. Arrays of params that you still hold are deleted.

        Args:
          pause: what happens to running requests, as update_weights'.
        """
        self._weights.sleep(pause=pause)

    def wake_up(self) -> None:
        """Brings the weights back to the devices, with an empty KV cache, and takes requests again."""
        self._weights.wake_up()

    def save_weights(self, directory: str | Path) -> None:
        """Writes the weights to a new directory with Orbax, as they lie on the mesh, for load_weights.

        Raises:
          FileExistsError: the directory exists.
        """
        self._weights.save(directory)

    def load_weights(self, directory: str | Path, *, pause: Pause = "wait") -> int:
        """Replaces the weights by those that save_weights has written, of the same model and parallel sizes.

        Args:
          directory: from save_weights.
          pause: as update_weights'.

        Returns:
          The new weights_version.

        Raises:
          FileNotFoundError: there is no such directory.
          ValueError: it holds weights of another shape.
        """
        return self._weights.load(directory, pause=pause)

    def export(self, directory: str | Path) -> None:
        """Writes a checkpoint in Hugging Face's format, which LLM and transformers can load, whatever the mesh.

        Beside config.json and the weights it has the tokenizer's and the other small files of the checkpoint that this
        LLM was loaded from.

        Args:
          directory: a new directory.

        Raises:
          FileExistsError: it exists.
          ValueError: several processes hold the model.
        """
        self._weights.export(directory, self._config_fields, source=self._directory)

    def _params_of_fork(self, output: RequestOutput, at: int, index: int) -> SamplingParams:
        """The parameters of the forked generation, for what is left of it, with a seed that is still to be derived."""
        params = output.sampling_params
        if params is None:
            return self._controller.default_params
        length = len(output.outputs[index].token_ids) if 0 <= index < len(output.outputs) else 0
        num_kept = at if at >= 0 else max(length + at, 0)
        return dataclasses.replace(
            params,
            max_tokens=None if params.max_tokens is None else max(params.max_tokens - num_kept, 1),
            min_tokens=max(params.min_tokens - num_kept, 0),
            seed=None,
        )

    @property
    def _llm(self) -> LLM:
        return cast("LLM", self)
