"""LLM, the main class of the Python API: loads a model and generates with it.

Owns: loading and closing a model; turning the arguments of each call into submissions for the driver, and waiting for
their outputs.
Does not know: how tokens are computed, scheduled or turned into text.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from jaxinfer.api.arguments import as_prompts, checked, one_each, score_params
from jaxinfer.api.driver import Ticket
from jaxinfer.api.loaded_replicas import LoadedReplicas
from jaxinfer.api.output_stream import OutputStream
from jaxinfer.api.provenance import find_provenance
from jaxinfer.api.research_methods import ResearchMethods
from jaxinfer.api.runner import Runner
from jaxinfer.api.scoring import Perplexity, Window, check_windows, sliding_windows
from jaxinfer.api.served_weights import ServedWeights
from jaxinfer.api.shared_engine import SharedEngine, opened
from jaxinfer.checkpoint import directory as checkpoint_directory
from jaxinfer.checkpoint.directory import DEMO
from jaxinfer.checkpoint.store import MemoryStore, SafetensorsStore, TensorStore
from jaxinfer.config.engine_config import EngineConfig
from jaxinfer.config.generation_defaults import GenerationDefaults
from jaxinfer.config.model_config import ModelConfig
from jaxinfer.engine.stats import EngineStats
from jaxinfer.models.registry import parse_model_config
from jaxinfer.outputs import RequestOutput
from jaxinfer.records.provenance import Provenance
from jaxinfer.sampling_params import BeamSearchParams, SamplingParams
from jaxinfer.sandbox.template_sandbox import TemplateSandbox
from jaxinfer.text.chat_template import ChatRenderer, ChatTemplates, as_conversations, read_chat_templates
from jaxinfer.text.controller import TextGenerationController
from jaxinfer.text.preparation import Prompt, Submission
from jaxinfer.tokenizer.byte_tokenizer import ByteTokenizer
from jaxinfer.tokenizer.load import load_tokenizer
from jaxinfer.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jaxinfer.serve import BackgroundServer

logger = logging.getLogger("jaxinfer")


class LLM(ResearchMethods):
    """A loaded model that generates text; several threads may use it at the same time.

    Args:
      model: a checkpoint directory in Hugging Face format, a hub id "owner/name", or "demo" for the bundled model.
      tokenizer: None takes the checkpoint's own. Otherwise a directory or hub id with a tokenizer.json or
        tokenizer.model, a Tokenizer object, or "byte" for one token per byte. If there is none at all, the LLM takes
        and returns token ids only.
      **engine: fields of EngineConfig: dtype, quantization, max_model_len, max_num_seqs, max_num_batched_tokens,
        page_size, num_kv_pages, gpu_memory_utilization, enable_prefix_caching, enable_chunked_prefill, run_ahead,
        steps_per_launch, attention_backend (or the name of an attention function of yours), sliding_window,
        sink_tokens, draft_model, num_draft_tokens, seed, xla_options, max_research_bytes and the parallel sizes.

    Raises:
      FileNotFoundError: no such checkpoint.
      TypeError: an unknown keyword, in which case the message names the nearest one, or a model that is neither a
        string nor a path.
      ValueError: a setting outside its range, or a checkpoint that is broken, incomplete or of an unknown family.

    Example:
      with LLM("path/to/checkpoint", max_num_seqs=16) as llm:
          print(llm.generate("In the beginning", SamplingParams(max_tokens=32)))
    """

    def __init__(self, model: str | Path = DEMO, *, tokenizer: str | Path | Tokenizer | None = None, **engine: Any):
        config = EngineConfig(**engine)
        with opened(config, model=model, tokenizer=tokenizer) as shared:
            path = checkpoint_directory.resolve(model)
            if shared is not None:
                shared.require_same_checkpoint(checkpoint_directory.fingerprint(path))
            fields = checkpoint_directory.read_json(path / "config.json")
            self._config_fields, self._directory = fields, path
            self._start(
                parse_model_config(fields),
                SafetensorsStore(checkpoint_directory.weight_files(path)),
                load_tokenizer(path) if tokenizer is None else _find_tokenizer(tokenizer),
                checkpoint_directory.generation_defaults(path, fields),
                config,
                shared,
                template_sources=(tokenizer, path),
                named=functools.partial(find_provenance, config, model=model, tokenizer=tokenizer, directory=path),
            )

    @classmethod
    def from_params(
        cls,
        config: Mapping[str, Any],
        params: Mapping[str, Any],
        tokenizer: str | Path | Tokenizer | None = None,
        **engine: Any,
    ) -> LLM:
        """Makes an LLM from weights that are already in memory.

        Args:
          config: the fields of a Hugging Face config.json.
          params: maps each tensor name of the checkpoint to its array. The names may be nested at their dots:
            {"model": {"norm": {"weight": array}}} is the same as {"model.norm.weight": array}.
          tokenizer: as LLM's, except that None means no tokenizer.
          **engine: as LLM's.

        Raises:
          As LLM; TypeError also for a config or params that are no mapping.
        """
        for name, value in {"config": config, "params": params}.items():
            if not isinstance(value, Mapping):
                raise TypeError(f"{name} must be a mapping, got {type(value).__name__}")
        llm = cls.__new__(cls)
        eos_token_ids = checkpoint_directory.end_token_ids("config: eos_token_id", config.get("eos_token_id"))
        settings = EngineConfig(**engine)
        store = MemoryStore(_flat(params))
        with opened(settings, model=None, tokenizer=tokenizer) as shared:
            if shared is not None:
                shared.require_same_checkpoint(store.fingerprint())
            llm._config_fields, llm._directory = config, None
            llm._start(
                parse_model_config(config),
                store,
                None if tokenizer is None else _find_tokenizer(tokenizer),
                GenerationDefaults(eos_token_ids=eos_token_ids),
                settings,
                shared,
                template_sources=(tokenizer,),
                named=functools.partial(find_provenance, settings, model=None, tokenizer=tokenizer, directory=None),
            )
        return llm

    def _start(
        self,
        model_config: ModelConfig,
        store: TensorStore,
        tokenizer: Tokenizer | None,
        defaults: GenerationDefaults,
        config: EngineConfig,
        shared: SharedEngine | None,
        *,
        template_sources: Sequence[str | Path | Tokenizer | None],
        named: Callable[[], Provenance],
    ) -> None:
        _show_log_lines()
        self.config = config
        self.model_config = model_config
        self.tokenizer = tokenizer
        loaded = LoadedReplicas(model_config, store, config, shared)
        self._replicas, self._loaded = loaded.engines, loaded.engines[0]
        self.max_model_len = self._loaded.max_model_len
        self._longest_request = loaded.longest_request
        provenance = named()  # asks JAX for its devices, so it must come after LoadedReplicas, which starts JAX
        self.name = provenance.model
        """The model as it was named; None for weights that were in memory."""
        controllers = [
            TextGenerationController(
                replica.engine,
                tokenizer,
                defaults=defaults,
                vocab_size=model_config.vocab_size,
                max_model_len=self.max_model_len,
                seed=config.seed,
                provenance=provenance,
            )
            for replica in loaded.engines
        ]
        self._controller = controllers[0]  # prepares the requests of all replicas
        self._runner = loaded.make_runner(controllers, provenance)
        self._weights = ServedWeights(loaded.engines, self._runner)
        self._server: BackgroundServer | None = None
        self._template_sources = template_sources
        self._template_sandbox = TemplateSandbox()
        # The driver's thread must end with its LLM, also when the LLM is garbage-collected or Python exits.
        self._finalizer = weakref.finalize(self, _shut_down, self._runner, self._template_sandbox)

    @overload
    def generate(
        self,
        prompts: str,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> RequestOutput: ...

    @overload
    def generate(
        self,
        prompts: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> Any: ...

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> RequestOutput | list[RequestOutput]:
        """Generates text for one prompt, or for many that are batched together, and waits for all of it.

        Args:
          prompts: a string, a list of token ids, or a list of either.
          sampling_params: one SamplingParams for all prompts, or a list with one for each. None takes default_params,
            the checkpoint's own sampling settings.
          use_tqdm: show a progress bar if prompts is a list of prompts.

        Returns:
          A RequestOutput if prompts is one prompt; a list of them, in the order of the prompts, if it is a list.

        Raises:
          TypeError, ValueError: a prompt or its parameters are wrong; no request was started.
          EngineClosedError: the LLM is closed.
          RequestFailedError: the tokenizer or constraint of one of the requests raised an exception. All requests of
            this call are cancelled; the LLM stays usable.
        """
        prompt_list, is_single = as_prompts(prompts)
        params = self._params_for(prompt_list, sampling_params)
        submissions = [
            self._controller.prepare(prompt, entry) for prompt, entry in zip(prompt_list, params, strict=True)
        ]
        self._controller.check_captures(submissions)
        outputs = self._runner.run(submissions, show_bar=use_tqdm and not is_single)
        return outputs[0] if is_single else outputs

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams | Sequence[BeamSearchParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> Any:
        """Searches for the most likely continuations of one prompt or of many, batched with all other requests.

        Args:
          prompts: a string, a list of token ids, or a list of either.
          params: one BeamSearchParams for all prompts, or a list with one for each; None is BeamSearchParams().
          use_tqdm: show a progress bar if prompts is a list of prompts.

        Returns:
          A RequestOutput if prompts is one prompt; a list of them, in the order of the prompts, if it is a list. Its
          `outputs` are the texts found, highest score first.

        Raises:
          TypeError, ValueError: a prompt or its parameters are wrong, or beam_width exceeds max_num_seqs; no search
            was started.
          EngineClosedError: the LLM is closed.
          RequestFailedError: as generate.

        Example:
          llm.beam_search("In the beginning", BeamSearchParams(beam_width=4, num_return_sequences=2)).outputs
        """
        prompt_list, is_single = as_prompts(prompts)
        entries = one_each("params", prompt_list, BeamSearchParams() if params is None else params, BeamSearchParams)
        submissions = [
            self.prepare_beam_search(prompt, entry) for prompt, entry in zip(prompt_list, entries, strict=True)
        ]
        outputs = self._runner.run(submissions, show_bar=use_tqdm and not is_single)
        return outputs[0] if is_single else outputs

    def score(
        self, prompts: Prompt | Sequence[Prompt], *, prompt_logprobs: int = 0, use_tqdm: bool = True
    ) -> RequestOutput | list[RequestOutput]:
        """Returns the log-probability of every token of a prompt given the tokens before it; generates nothing.

        Args:
          prompts: a string, a list of token ids, or a list of either.
          prompt_logprobs: at each position, how many of the most likely tokens to report beside the prompt's own
            token, 0 .. 20.
          use_tqdm: show a progress bar if prompts is a list of prompts.

        Returns:
          A RequestOutput if prompts is one prompt; a list of them, in the order of the prompts, if it is a list. Its
          `prompt_logprobs` has one entry per prompt token; the first is None, since nothing precedes that token.

        Raises:
          As generate.

        Example:
          out = llm.score("In the beginning")
          [entry[token].logprob for token, entry in zip(out.prompt_token_ids[1:], out.prompt_logprobs[1:])]
        """
        return self.generate(prompts, score_params(prompt_logprobs), use_tqdm=use_tqdm)

    def perplexity(self, text: Prompt, *, window: int | None = None, stride: int | None = None) -> Perplexity:
        """Measures how well the model predicts a text of any length, by scoring overlapping windows of it.

        Args:
          text: a string, or token ids.
          window: tokens that are scored together, 2 .. max_model_len - 1; None takes as many as the KV pages hold.
          stride: tokens between the starts of two windows, 1 .. window - 1. A smaller stride gives each token more
            context and takes longer. None is half a window.

        Raises:
          TypeError, ValueError: the text has less than two tokens, or a number is outside its range.
          EngineClosedError: the LLM is closed.
        """
        window = self._longest_request - 1 if window is None else window
        window, stride = check_windows(window, stride, max_model_len=self.max_model_len)
        token_ids = self._controller.encode(text)
        if len(token_ids) < 2:
            raise ValueError(f"a text of at least 2 tokens has a perplexity, got {len(token_ids)}")
        logprob = 0.0
        windows = list(sliding_windows(len(token_ids), window=window, stride=stride))
        for start in range(0, len(windows), self.config.max_num_seqs):  # so that few outputs are in memory at once
            batch = windows[start : start + self.config.max_num_seqs]
            outputs: Any = self.score([token_ids[entry.start : entry.end] for entry in batch], use_tqdm=False)
            logprob += sum(_logprob(output, entry) for output, entry in zip(outputs, batch, strict=True))
        num_bytes = len(text.encode()) if isinstance(text, str) else None
        return Perplexity(num_tokens=len(token_ids) - 1, logprob=logprob, num_bytes=num_bytes)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Generates the next message of one conversation, or of many that are batched together.

        The checkpoint's chat template renders the messages into the prompt. The template writes the special tokens
        itself, so the tokenizer adds none around the text. A special token's name inside a message ("<|im_end|>") is
        encoded as that token, as in transformers: remove such names from text you do not trust. The template gets a
        copy of the messages and runs in a process of its own, within limits of size, time and memory
        (template_sandbox.SandboxLimits).

        Args:
          messages: a conversation, which is a list of {"role": ..., "content": ...}, or a list of conversations. Other
            entries of a message (tool_calls, name, ...) are passed to the template, except those that are None.
            "content" may be a list of parts like {"type": "text", "text": ...}: a template that reads parts gets the
            list, any other gets the texts joined into one string.
          sampling_params: one SamplingParams for all conversations, or a list with one for each; beware that
            SamplingParams() stops after 16 tokens. None takes the checkpoint's own sampling settings and generates up
            to the end token or the end of the context.
          use_tqdm: show a progress bar if messages is a list of conversations.
          add_generation_prompt: end the prompt with the opening of an assistant message.
          continue_final_message: leave the last message open at the end of the prompt, so that the output continues
            it; needs add_generation_prompt=False.
          tools: JSON schemas of functions that the model may call. If the template ignores them, a warning is logged.
          chat_template: a template in Jinja, or the name of one of the checkpoint's templates. None takes the
            checkpoint's: "tool_use" if there is one and tools are given, otherwise "default".
          chat_template_kwargs: further variables of the template, by name, such as documents or enable_thinking.

        Returns:
          A RequestOutput for one conversation, a list in the same order for a list; its `prompt` is the rendered text.

        Raises:
          TypeError, ValueError: messages or parameters are wrong, there is no template, or the template is broken,
            refuses the messages or exceeds a limit; no request was started.
          EngineClosedError: the LLM is closed.
          RequestFailedError: as generate.

        Source: transformers 5, apply_chat_template, whose text it reproduces. Deviation: transformers passes a list of
          parts even to a template that can only use strings.

        Example:
          llm.chat([{"role": "user", "content": "What is a river?"}], SamplingParams(max_tokens=64)).text
        """
        conversations, is_single = as_conversations(messages)
        params = self._params_for(conversations, self._chat_params if sampling_params is None else sampling_params)
        prompts = [
            self._chat_renderer.render(
                conversation,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                chat_template=chat_template,
                chat_template_kwargs=chat_template_kwargs,
            )
            for conversation in conversations
        ]
        submissions = [
            self._prepare_chat(prompt, entry, is_default=sampling_params is None)
            for prompt, entry in zip(prompts, params, strict=True)
        ]
        self._controller.check_captures(submissions)
        outputs = self._runner.run(submissions, show_bar=use_tqdm and not is_single)
        return outputs[0] if is_single else outputs

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> OutputStream:
        """Generates for one prompt and gives out the text while it grows.

        Args:
          prompt: a string or a list of token ids.
          sampling_params: None takes default_params, the checkpoint's own sampling settings.

        Returns:
          An iterator of RequestOutput. `text` is all text so far and `delta` what is new since the previous output,
          usually one token's text, more if the caller reads slowly. Closing the iterator aborts the request.

        Raises:
          TypeError, ValueError: at the call, as generate.
        """
        return self._stream(self.prepare(prompt, sampling_params))

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        **template: Any,
    ) -> OutputStream:
        """Generates the next message of one conversation and gives out the text while it grows.

        Args:
          messages, sampling_params: as chat's, for one conversation.
          **template: chat's add_generation_prompt, continue_final_message, tools, chat_template, chat_template_kwargs.

        Returns:
          As stream.

        Raises:
          TypeError, ValueError: at the call, as chat.
        """
        return self._stream(self.prepare_chat(messages, sampling_params, **template))

    def prepare(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        add_special_tokens: bool = True,
        ends_with_pages: bool = False,
    ) -> Submission:
        """Makes a validated request for start.

        Args:
          prompt, sampling_params: as stream's.
          add_special_tokens: let the tokenizer put its special tokens around a text; False for a rendered chat.
          ends_with_pages: without max_tokens, a request that would not fit all KV pages at max_model_len ends when it
            fills them; otherwise it is refused.

        Raises:
          As stream.
        """
        prompts, is_single = as_prompts(prompt)
        if prompts and not is_single:
            raise TypeError("stream takes one prompt (a string or token ids), got a list of prompts")
        return self._controller.prepare(
            prompts[0] if prompts else (),
            self._params_or_default(sampling_params),
            add_special_tokens=add_special_tokens,
            ends_at=self._longest_request if ends_with_pages else None,
        )

    def prepare_beam_search(self, prompt: Prompt, params: BeamSearchParams | None = None) -> Submission:
        """Makes a validated beam search for start; arguments and errors as beam_search's, for one prompt."""
        params = BeamSearchParams() if params is None else checked("params", params, BeamSearchParams)
        return self._controller.prepare_beam_search(prompt, params)

    def prepare_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        **template: Any,
    ) -> Submission:
        """Makes a validated request for start; arguments and errors as stream_chat's."""
        return self.check_chat(messages, sampling_params, **template)()

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **template: Any) -> str:
        """The prompt that a conversation becomes; arguments and errors as stream_chat's.

        Example:
          llm.render_chat([{"role": "user", "content": "What is a river?"}])
        """
        return self._chat_renderer.render(messages, **template)

    @property
    def chat_templates(self) -> ChatTemplates:
        """The chat templates of the checkpoint.

        Raises:
          ValueError: a file cannot be read; the message names it.
        """
        return find_chat_templates(*self._template_sources)

    def check_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        **template: Any,
    ) -> Callable[[], Submission]:
        """Checks a request for one conversation without rendering its template; arguments as stream_chat's.

        Returns:
          A function that renders the template and returns the validated request for start. Any thread may call it. It
          raises ValueError if the template fails or the rendered prompt is too long.

        Raises:
          TypeError, ValueError: messages or sampling_params are wrong, or there is no template.
        """
        conversations, is_single = as_conversations(messages)
        if not is_single:
            raise TypeError(f"stream_chat takes one conversation, got a list of {len(conversations)}")
        params = self._params_or_default(self._chat_params if sampling_params is None else sampling_params)
        render = self._chat_renderer.check(conversations[0], **template)
        return lambda: self._prepare_chat(render(), params, is_default=sampling_params is None)

    def start(
        self, submission: Submission, *, stream: bool = True, on_update: Callable[[Ticket], None] | None = None
    ) -> Ticket:
        """Starts a prepared request; its outputs are read from the returned ticket while it runs.

        Args:
          submission: from prepare, prepare_chat or prepare_beam_search.
          stream: also give out unfinished outputs; without it only the finished one.
          on_update: called with the ticket when ticket.take may have a new output. It usually runs on the engine's
            thread and must not block. Without it, wait with ticket.next_output.

        Raises:
          EngineClosedError: the LLM is closed.
        """
        return self._runner.start(submission, stream=stream, on_update=on_update)

    def cancel(self, ticket: Ticket) -> None:
        """Ends the ticket's request if it still runs; a thread that waits for its output gets a CancelledError."""
        self._runner.cancel(ticket)

    @property
    def default_params(self) -> SamplingParams:
        """Sampling settings of the checkpoint's generation_config, used by calls that give no SamplingParams."""
        return self._controller.default_params

    @property
    def is_running(self) -> bool:
        """Whether the engine runs: False once the LLM was closed or its engine stopped on an error.

        It is True while the LLM sleeps, although that refuses requests.
        """
        return self._runner.is_running

    def warmup(self, *, background: bool = False) -> None:
        """Compiles every program that a request can need, so that no request waits for the compiler.

        Args:
          background: if True, returns as soon as there are programs enough for every request, on a GPU at most 24 at
            the default settings, and compiles the others in background threads. Until a step's own program is ready,
            a larger one runs in its stead, which takes longer and gives the same tokens, as far as rounding allows.
            Where several processes hold a model together, nothing is left to the background, since every process has
            to compile the same programs in the same order.
        """
        self._runner.warmup(background=background)

    def stats(self) -> EngineStats:
        """Returns how many requests run and wait, how many KV pages are used, and counts of all work so far."""
        return self._runner.stats()

    def follow(self) -> None:
        """Takes part in what process 0 computes until that closes this LLM; for the other processes of a run.

        A process that follows makes no calls of its own; process 0 may then use all methods, streams and threads too.

        Raises:
          ValueError: this process leads the run, or runs alone.
          ProcessLostError: another process was lost or failed.

        Example:
          jaxinfer.distributed.initialize()
          with LLM("path/to/checkpoint", tensor_parallel_size=16) as llm:
              serve(llm) if jax.process_index() == 0 else llm.follow()
        """
        self._runner.follow()

    def serve(self, **settings: Any) -> BackgroundServer:
        """Serves this LLM over HTTP from a thread of its own, in a notebook for example; needs the extra [serve].

        Calling it again replaces the server, and close ends it.

        Args:
          **settings: fields of ServeConfig, such as port and api_key. There is no access log unless it is asked for.

        Returns:
          The server. It has `url` and `close`, and is a context manager.

        Raises:
          TypeError, ValueError: a setting is unknown or wrong.
          OSError: the address is taken, or is not this machine's.
          ImportError: the extra is not installed.

        Example:
          with llm.serve(port=8000) as server:
              openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        """
        # The one import that points up: the server is made of LLMs, and this method is a shorter way to write that.
        from jaxinfer.serve import BackgroundServer, ServeConfig

        settings = {"access_log": False, **settings}
        if self._server is not None:
            self._server.close()
        self._server = BackgroundServer(self, ServeConfig(**settings))
        return self._server

    def close(self) -> None:
        """Ends running requests and frees device memory; afterwards only close may be called, which does nothing."""
        if self._server is not None:
            self._server.close(drain_timeout=0)
        self._finalizer()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @functools.cached_property
    def _chat_renderer(self) -> ChatRenderer:
        return ChatRenderer(self.chat_templates, self._template_sandbox)

    @property
    def _chat_params(self) -> SamplingParams:
        """default_params without a token limit: SamplingParams' 16 tokens would cut a message short."""
        return dataclasses.replace(self.default_params, max_tokens=None)

    def _prepare_chat(self, prompt: str, params: SamplingParams, *, is_default: bool) -> Submission:
        """The submission of a rendered conversation.

        With the default parameters the reply also ends when the request fills all KV pages, if that is before
        max_model_len; otherwise an LLM with few pages would refuse the request as too long.
        """
        ends_at = self._longest_request if is_default else None
        return self._controller.prepare(prompt, params, add_special_tokens=False, ends_at=ends_at)

    def _stream(self, submission: Submission) -> OutputStream:
        ticket = self.start(submission)
        return OutputStream(ticket, lambda: self.cancel(ticket))

    def _params_or_default(self, params: SamplingParams | None) -> SamplingParams:
        return self.default_params if params is None else checked("sampling_params", params, SamplingParams)

    def _params_for(
        self, prompts: Sequence[Any], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[SamplingParams]:
        return one_each(
            "sampling_params", prompts, self._controller.default_params if params is None else params, SamplingParams
        )


def _logprob(output: RequestOutput, window: Window) -> float:
    """Sum of the log-probabilities of a window's tokens from window.first on; those before are context only."""
    pairs = zip(output.prompt_token_ids, output.prompt_logprobs or (), strict=True)
    counted = itertools.islice(pairs, window.first - window.start, None)
    return sum(found[token_id].logprob for token_id, found in counted if found is not None)


def find_chat_templates(*sources: str | Path | Tokenizer | None) -> ChatTemplates:
    """The chat templates that an LLM would have, found without loading it.

    Args:
      sources: the LLM's arguments tokenizer and model, in this order of precedence.

    Raises:
      FileNotFoundError: no such directory or hub id.
      ValueError: a file cannot be read; the message names it.
    """
    named = [source for source in sources if isinstance(source, (str, Path)) and source != "byte"]
    return read_chat_templates([checkpoint_directory.resolve(source) for source in named])


def _find_tokenizer(tokenizer: str | Path | Tokenizer) -> Tokenizer:
    if tokenizer == "byte":
        return ByteTokenizer()
    if not isinstance(tokenizer, (str, Path)):
        missing = [name for name in vars(Tokenizer) if name[0] != "_" and not hasattr(tokenizer, name)]
        if missing:
            raise TypeError(
                f"tokenizer must be a name, a folder or an object like jaxinfer's Tokenizer, got "
                f"{type(tokenizer).__name__} without {', '.join(missing)}"
            )
        return tokenizer
    found = load_tokenizer(checkpoint_directory.resolve(tokenizer, name="tokenizer"))
    if found is None:
        raise FileNotFoundError(f"{tokenizer} has neither tokenizer.json nor tokenizer.model")
    return found


def _flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _shut_down(runner: Runner, sandbox: TemplateSandbox) -> None:
    runner.close()
    sandbox.close()


def _show_log_lines() -> None:
    """Prints jaxinfer's log lines to standard error unless the user has set up logging."""
    if not logger.hasHandlers():
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("jaxinfer: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
