"""The user's door: LLM.

Owns: a model's life from loading to closing; turning arguments into submissions, and these into outputs.
Does not know: how anything is computed.
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
from typing import Any, overload

from jaxinfer.api.arguments import as_prompts, checked, one_each, score_params
from jaxinfer.api.driver import Driver, Ticket
from jaxinfer.api.loaded_engine import LoadedEngine
from jaxinfer.api.output_stream import OutputStream, wait_for
from jaxinfer.api.provenance import find_provenance
from jaxinfer.api.scoring import Perplexity, Window, check_windows, sliding_windows
from jaxinfer.checkpoint import directory as checkpoint_directory
from jaxinfer.checkpoint.directory import DEMO
from jaxinfer.checkpoint.store import MemoryStore, SafetensorsStore, TensorStore
from jaxinfer.config import EngineConfig, GenerationDefaults, ModelConfig
from jaxinfer.engine.dynamic_engine import EngineStats
from jaxinfer.models.registry import parse_model_config
from jaxinfer.outputs import RequestOutput
from jaxinfer.records.record import Provenance
from jaxinfer.sampling_params import BeamSearchParams, SamplingParams
from jaxinfer.sandbox.template_sandbox import TemplateSandbox
from jaxinfer.text.chat_template import ChatRenderer, ChatTemplates, as_conversations, read_chat_templates
from jaxinfer.text.controller import TextGenerationController
from jaxinfer.text.preparation import Prompt, Submission
from jaxinfer.tokenizer.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

logger = logging.getLogger("jaxinfer")


class LLM:
    """A model, ready to generate; safe to use from several threads.

    Args:
      model: "demo", the bundled model; a checkpoint directory in Hugging Face format; or a hub id "owner/name".
      tokenizer: a directory with a tokenizer.json or tokenizer.model, a Tokenizer, or "byte"; None takes the
        checkpoint's own. Without any the LLM works on token ids.
      **engine: fields of EngineConfig: dtype, max_model_len, max_num_seqs, max_num_batched_tokens, page_size,
        num_kv_pages, gpu_memory_utilization, enable_prefix_caching, enable_chunked_prefill, run_ahead,
        attention_backend, draft_model, num_draft_tokens, seed and the parallel sizes.

    Raises:
      FileNotFoundError: no such checkpoint.
      TypeError: an unknown keyword; the message names the nearest one.
      ValueError: a setting outside its range, or a checkpoint that is broken, incomplete or of an unknown family.

    Example:
      with LLM("path/to/checkpoint", max_num_seqs=16) as llm:
          print(llm.generate("In the beginning", SamplingParams(max_tokens=32)))
    """

    def __init__(self, model: str | Path = DEMO, *, tokenizer: str | Path | Tokenizer | None = None, **engine: Any):
        config = EngineConfig.from_keywords(engine)
        path = checkpoint_directory.resolve(model)
        fields = checkpoint_directory.read_json(path / "config.json")
        model_config = parse_model_config(fields)
        self._start(
            model_config,
            SafetensorsStore(checkpoint_directory.weight_files(path)),
            load_tokenizer(path) if tokenizer is None else _find_tokenizer(tokenizer),
            checkpoint_directory.generation_defaults(path, fields),
            config,
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
        """An LLM from weights that are already in memory.

        Args:
          config: the fields of a Hugging Face config.json.
          params: checkpoint tensor name -> array, or the same nested by the parts of the names.
          tokenizer, **engine: as LLM's.

        Raises:
          As LLM.
        """
        llm = cls.__new__(cls)
        eos = config.get("eos_token_id")
        engine_config = EngineConfig.from_keywords(engine)
        llm._start(
            parse_model_config(config),
            MemoryStore(_flat(params)),
            None if tokenizer is None else _find_tokenizer(tokenizer),
            GenerationDefaults(eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)),
            engine_config,
            template_sources=(tokenizer,),
            named=functools.partial(find_provenance, engine_config, model=None, tokenizer=tokenizer, directory=None),
        )
        return llm

    def _start(
        self,
        model_config: ModelConfig,
        store: TensorStore,
        tokenizer: Tokenizer | None,
        defaults: GenerationDefaults,
        config: EngineConfig,
        *,
        template_sources: Sequence[str | Path | Tokenizer | None],
        named: Callable[[], Provenance],
    ) -> None:
        _show_log_lines()
        self.config = config
        self.model_config = model_config
        self.tokenizer = tokenizer
        self._loaded = LoadedEngine(model_config, store, config)
        self.max_model_len = self._loaded.max_model_len
        self._controller = TextGenerationController(
            self._loaded.engine,
            tokenizer,
            defaults=defaults,
            vocab_size=model_config.vocab_size,
            max_model_len=self.max_model_len,
            seed=config.seed,
            provenance=named(),  # asks JAX for its devices, which only the line above may start
        )
        self._driver = Driver(self._controller, on_end=self._loaded.close)
        self._template_sources = template_sources
        self._template_sandbox = TemplateSandbox()
        # At garbage collection and at exit: the driver's thread must not outlive its LLM.
        self._finalizer = weakref.finalize(self, _shut_down, self._driver, self._template_sandbox)

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
        """Generates for one prompt or many, in flight together.

        Args:
          prompts: a string, a list of token ids, or a list of either.
          sampling_params: for all prompts, or one each; None samples as the checkpoint says.
          use_tqdm: show a progress bar for several prompts.

        Returns:
          One RequestOutput for one prompt, a list in the same order for a list.

        Raises:
          TypeError, ValueError: a prompt or its parameters are wrong; nothing was started.
          EngineClosedError: the LLM is closed.
          RequestFailedError: the tokenizer or constraint of one of the requests raised; the LLM goes on.
        """
        prompt_list, is_single = as_prompts(prompts)
        params = self._params_for(prompt_list, sampling_params)
        submissions = [
            self._controller.prepare(prompt, entry) for prompt, entry in zip(prompt_list, params, strict=True)
        ]
        outputs = self._run(submissions, show_bar=use_tqdm and not is_single)
        return outputs[0] if is_single else outputs

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams | Sequence[BeamSearchParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> Any:
        """Looks for the most likely texts of one prompt or many, in flight together and beside other requests.

        Args:
          prompts: a string, a list of token ids, or a list of either.
          params: for all prompts, or one each; None is BeamSearchParams().
          use_tqdm: show a progress bar for several prompts.

        Returns:
          One RequestOutput for one prompt, a list in the same order for a list. outputs are the texts found, the one
          with the highest score first.

        Raises:
          TypeError, ValueError: a prompt or its parameters are wrong, or there are more beams than max_num_seqs;
            nothing was started.
          EngineClosedError: the LLM is closed.

        Example:
          llm.beam_search("In the beginning", BeamSearchParams(beam_width=4, num_return_sequences=2)).outputs
        """
        prompt_list, is_single = as_prompts(prompts)
        entries = one_each("params", prompt_list, BeamSearchParams() if params is None else params, BeamSearchParams)
        submissions = [
            self.prepare_beam_search(prompt, entry) for prompt, entry in zip(prompt_list, entries, strict=True)
        ]
        outputs = self._run(submissions, show_bar=use_tqdm and not is_single)
        return outputs[0] if is_single else outputs

    def score(
        self, prompts: Prompt | Sequence[Prompt], *, prompt_logprobs: int = 0, use_tqdm: bool = True
    ) -> RequestOutput | list[RequestOutput]:
        """The log-probability of every token of a prompt, given those before it; nothing is generated.

        Args:
          prompts: a string, a list of token ids, or a list of either.
          prompt_logprobs: 0 .. 20, the most likely tokens to report beside each.
          use_tqdm: show a progress bar for several prompts.

        Returns:
          One RequestOutput for one prompt, a list in the same order for a list; prompt_logprobs has one entry a token,
          the first None.

        Raises:
          As generate.

        Example:
          [entry[token].logprob for token, entry in zip(out.prompt_token_ids[1:], out.prompt_logprobs[1:])]
        """
        return self.generate(prompts, score_params(prompt_logprobs), use_tqdm=use_tqdm)

    def perplexity(self, text: Prompt, *, window: int | None = None, stride: int | None = None) -> Perplexity:
        """How well the model predicts a text of any length, through a sliding window.

        Args:
          text: a string, or token ids.
          window: tokens that see each other, 2 .. max_model_len - 1; None takes as many as there can be.
          stride: tokens by which windows follow each other, 1 .. window - 1; smaller is closer to unlimited context and
            takes longer. None is half a window.

        Raises:
          TypeError, ValueError: the text has less than two tokens, or a number is outside its range.
          EngineClosedError: the LLM is closed.
        """
        window, stride = check_windows(window, stride, max_model_len=self.max_model_len)
        token_ids = self._controller.encode(text)
        if len(token_ids) < 2:
            raise ValueError(f"a text of at least 2 tokens has a perplexity, got {len(token_ids)}")
        logprob = 0.0
        windows = list(sliding_windows(len(token_ids), window=window, stride=stride))
        for start in range(0, len(windows), self.config.max_num_seqs):  # what is held stays small
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
        """Generates the next message of one conversation or many, in flight together.

        The checkpoint's chat template makes the prompt, special tokens included; none is added when the text is
        encoded. A special token's name within a message is encoded as that token, as transformers does: take it out of
        text you do not trust. The template works on a copy of the messages, in a process of its own, within limits of
        size, time and memory (template_sandbox.SandboxLimits).

        Args:
          messages: a conversation, which is a list of {"role", "content"}, or a list of conversations. What else a
            message holds (tool_calls, name, ...) is the template's; entries that are None do not reach it. A content
            may be a list of parts like {"type": "text", "text": ...}: a template that reads parts gets them, any other
            gets their texts as one string.
          sampling_params: for all conversations, or one each, taken as they are (SamplingParams() ends after 16
            tokens); None samples as the checkpoint says, up to the end token or the end of the context.
          use_tqdm: show a progress bar for several conversations.
          add_generation_prompt: end the prompt with the beginning of an assistant's message.
          continue_final_message: end the prompt within the last message, which the output then continues; takes
            add_generation_prompt=False.
          tools: JSON schemas of functions that the model may call; a log line says so if the template ignores them.
          chat_template: a template in Jinja, or the name of one of the checkpoint's; None takes the checkpoint's (of
            several, "tool_use" if there are tools, else "default").
          chat_template_kwargs: more variables of the template, by name, such as documents or enable_thinking.

        Returns:
          One RequestOutput for one conversation, a list in the same order for a list; prompt is the rendered text.

        Raises:
          TypeError, ValueError: messages or parameters are wrong, there is no template, or it is broken, refuses the
            messages or exceeds a limit; nothing was started.
          EngineClosedError: the LLM is closed.

        Source: transformers 5, apply_chat_template, whose text it reproduces. Deviation: to a template that takes
          strings only, transformers gives the list of parts, which it cannot use.

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
        outputs = self._run(submissions, show_bar=use_tqdm and not is_single)
        return outputs[0] if is_single else outputs

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> OutputStream:
        """Generates for one prompt, an output after every new token.

        Args:
          prompt: a string or a list of token ids.
          sampling_params: None samples as the checkpoint says.

        Returns:
          An iterator of RequestOutput: text grows, delta is what is new. Closing it aborts the request.

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
        """Generates the next message of one conversation, an output after every new token.

        Args:
          messages, sampling_params: as chat's, for one conversation.
          **template: chat's add_generation_prompt, continue_final_message, tools, chat_template, chat_template_kwargs.

        Returns:
          As stream.

        Raises:
          TypeError, ValueError: at the call, as chat.
        """
        return self._stream(self.prepare_chat(messages, sampling_params, **template))

    def prepare(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Submission:
        """A validated request for one prompt, for start; arguments and errors as stream's."""
        prompts, is_single = as_prompts(prompt)
        if prompts and not is_single:
            raise TypeError("stream takes one prompt (a string or token ids), got a list of prompts")
        return self._controller.prepare(prompt, self._params_or_default(sampling_params))

    def prepare_beam_search(self, prompt: Prompt, params: BeamSearchParams | None = None) -> Submission:
        """A validated beam search for one prompt, for start; arguments and errors as beam_search's."""
        params = BeamSearchParams() if params is None else checked("params", params, BeamSearchParams)
        return self._controller.prepare_beam_search(prompt, params)

    def prepare_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        **template: Any,
    ) -> Submission:
        """A validated request for one conversation, for start; arguments and errors as stream_chat's."""
        return self.check_chat(messages, sampling_params, **template)()

    def check_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        **template: Any,
    ) -> Callable[[], Submission]:
        """Checks a request for one conversation, as far as that needs no rendering; arguments as stream_chat's.

        Returns:
          What renders the template and makes the validated request, for start. It may be called in any thread and
          raises what only the template and the length of its text can bring about.
        """
        conversations, is_single = as_conversations(messages)
        if not is_single:
            raise TypeError(f"stream_chat takes one conversation, got a list of {len(conversations)}")
        params = self._params_or_default(self._chat_params if sampling_params is None else sampling_params)
        render = self._chat_renderer.check(conversations[0], **template)
        return lambda: self._prepare_chat(render(), params, is_default=sampling_params is None)

    def start(self, submission: Submission, *, on_news: Callable[[Ticket], None] | None = None) -> Ticket:
        """Starts a prepared request, whose outputs the ticket gives out while it runs.

        Args:
          submission: from prepare or prepare_chat.
          on_news: called on the engine's thread, which it must not block, when ticket.take may have a new output; None
            lets ticket.next_output wait for it.

        Raises:
          EngineClosedError: the LLM is closed.
        """
        return self._driver.submit([submission], stream=True, on_news=on_news)[0]

    def cancel(self, ticket: Ticket) -> None:
        """Ends the request of a ticket if it still runs; whoever waits for its output gets a CancelledError."""
        self._driver.cancel([ticket])

    @property
    def default_params(self) -> SamplingParams:
        """The checkpoint's own way of sampling, used where no SamplingParams are given."""
        return self._controller.default_params

    @property
    def is_running(self) -> bool:
        """Whether requests are taken: the LLM was not closed, and its engine has not died of an error."""
        return self._driver.is_running

    def warmup(self) -> None:
        """Compiles every program that serving can need, so that no request waits for the compiler."""
        self._loaded.warmup()

    def stats(self) -> EngineStats:
        """Queue, pages, cache hits, preemptions, drafts, tokens, steps and compilations so far."""
        return self._loaded.stats()

    def close(self) -> None:
        """Ends running requests and frees device memory; a closed LLM can only be closed again."""
        self._finalizer()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @functools.cached_property
    def _chat_renderer(self) -> ChatRenderer:
        return ChatRenderer(find_chat_templates(*self._template_sources), self._template_sandbox)

    @property
    def _chat_params(self) -> SamplingParams:
        """A message ends by itself: a limit of tokens that nobody asked for would cut it."""
        return dataclasses.replace(self.default_params, max_tokens=None)

    def _prepare_chat(self, prompt: str, params: SamplingParams, *, is_default: bool) -> Submission:
        """A rendered conversation; one whose length nobody chose also ends where the KV pages do."""
        ends_at = self._loaded.longest_request if is_default else None
        return self._controller.prepare(prompt, params, add_special_tokens=False, ends_at=ends_at)

    def _stream(self, submission: Submission) -> OutputStream:
        ticket = self.start(submission)
        return OutputStream(ticket, lambda: self.cancel(ticket))

    def _params_or_default(self, params: SamplingParams | None) -> SamplingParams:
        return self.default_params if params is None else checked("sampling_params", params, SamplingParams)

    def _run(self, submissions: Sequence[Submission], *, show_bar: bool) -> list[RequestOutput]:
        tickets = self._driver.submit(submissions)
        try:
            return wait_for(tickets, show_bar=show_bar)
        except BaseException:  # Ctrl-C ends these requests and leaves the engine to the others
            self._driver.cancel(tickets)
            raise

    def _params_for(
        self, prompts: Sequence[Any], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[SamplingParams]:
        return one_each(
            "sampling_params", prompts, self._controller.default_params if params is None else params, SamplingParams
        )


def _logprob(output: RequestOutput, window: Window) -> float:
    """Sum of the log-probabilities of the tokens of a window that count."""
    pairs = zip(output.prompt_token_ids, output.prompt_logprobs or (), strict=True)
    counted = itertools.islice(pairs, window.first - window.start, None)
    return sum(found[token_id].logprob for token_id, found in counted if found is not None)


def find_chat_templates(*sources: str | Path | Tokenizer | None) -> ChatTemplates:
    """The chat templates of an LLM, without loading it.

    Args:
      sources: its tokenizer and its model, as LLM takes them.

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
        return tokenizer
    found = load_tokenizer(checkpoint_directory.resolve(tokenizer))
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


def _shut_down(driver: Driver, sandbox: TemplateSandbox) -> None:
    driver.close()
    sandbox.close()


def _show_log_lines() -> None:
    """Shows jaxinfer's own start-up lines unless the user has set up logging."""
    if not logger.hasHandlers():
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("jaxinfer: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
