"""lm-eval over our Engine: a checkpoint's scores on evaluation sets, comparable with anybody's.

`EngineLM` is what lm-eval asks: log-likelihoods of continuations, of whole texts, and answers up to a stop.
All requests of a kind go to the engine at once, and it batches them. The law: each number is the one that
lm-eval's `hf` model gives on the same checkpoint, within the rounding of the two forward passes. One thing
differs: raw text is only text here (data/text.py), so a question that spells a control token does not write
one. lm-eval comes with the extra `eval`; the rest of Shoal does without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from shoal.data.text import StopStrings, TextStream, Tokenizer
from shoal.engine import Engine, SamplingParams
from shoal.engine.events import Completion, Event, complete

Progress = Callable[[str, int, int], None]  # what is done, how many of them, of how many
Pair = tuple[Any, list[int], list[int]]  # unused, context, continuation

KNOWN = {"until", "do_sample", "temperature", "top_p", "top_k", "max_gen_toks"}
MOST = 256  # tokens of an answer, where a task does not say: lm-eval's own


@dataclass(frozen=True)
class Score:
    task: str
    metric: str
    value: float
    error: float  # standard error of the mean; nan of one sample
    samples: int
    shots: int


class EngineLM(TemplateLM):
    """`chat`: prompts are markup, written by the checkpoint's chat template."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, *, chat: bool, progress: Progress) -> None:
        super().__init__()
        if chat and tokenizer.chat_template is None:
            raise ValueError(
                "--chat is asked for, but this checkpoint has no chat template: it is a base model; "
                "leave it out"
            )
        self.engine, self.text, self.chat, self.progress = engine, tokenizer, chat, progress
        self.max_length = engine.admission.longest - 1  # lm-eval scores texts of one token more
        self.cut = 0  # texts that were longer, and lost their beginning

    @property
    def eot_token_id(self) -> int:
        return self.text.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.text.eos_id if self.text.bos_id is None else self.text.bos_id

    @property
    def tokenizer_name(self) -> str:
        return "shoal"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.text.chat_template if self.chat else None

    def apply_chat_template(
        self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        return self.text.render(chat_history, add_generation_prompt=add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        bos = self.text.adds_bos and add_special_tokens is not False
        return self.text.encode(string, bos=bos, parse_special=self.chat)

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **kwargs: Any) -> list[tuple[float, bool]]:
        asked = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"an answer of {len(continuation)} tokens is longer than the context of {self.max_length}"
                )
            asked.append(self._fit(context + continuation, self.max_length + 1))
        params = SamplingParams(max_tokens=0, prompt_logprobs=1)
        done = self._serve("log-likelihoods", asked, [params] * len(asked), [()] * len(asked))
        return [
            _judge(completion, ids, len(continuation))
            for (completion, _), ids, (_, _, continuation) in zip(done, asked, requests, strict=True)
        ]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows: list[Pair] = []
        counts = []
        for request in requests:
            rolled = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own: list[Pair] = [(None, *make_disjoint_window(window)) for window in rolled]
            windows += own
            counts.append(len(own))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        prompts, params, stops = [], [], []
        for request in requests:
            arguments: Any = request.args
            prompt, wish = arguments
            most = int(wish.get("max_gen_toks", MOST))
            room = self.max_length - most
            if room < 1:
                raise ValueError(
                    f"an answer of {most} tokens leaves no room for a question in a context of "
                    f"{self.max_length}; take a model with a longer one"
                )
            prompts.append(self._fit(self.tok_encode(prompt), room))
            params.append(_sampling(wish, most))
            until = wish.get("until") or ()
            stops.append((until,) if isinstance(until, str) else tuple(until))
        return [text for _, text in self._serve("answers", prompts, params, stops)]

    def _fit(self, ids: list[int], most: int) -> list[int]:
        self.cut += len(ids) > most
        return ids[-most:]

    def _serve(
        self,
        what: str,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
        stops: Sequence[Sequence[str]],
    ) -> list[tuple[Completion, str]]:
        """Every request to its end, or to the first of its stop strings; in their order."""
        engine = self.engine
        readers = {
            engine.add(ids, wish): _Reader(TextStream(self.text), StopStrings(stop))
            for ids, wish, stop in zip(prompts, params, stops, strict=True)
        }
        ended = 0
        self.progress(what, 0, len(readers))
        while engine.busy:
            for event in engine.step():
                if event.error is not None:
                    raise FloatingPointError(event.error)
                reader = readers[event.request]
                if reader.ended:
                    continue
                reader.read(event)
                if reader.stopped and event.finish is None:
                    engine.cancel(event.request)
                if reader.ended:
                    ended += 1
                    self.progress(what, ended, len(readers))
        return [(complete(reader.events), reader.text) for reader in readers.values()]


class _Reader:
    """One request's events and text, up to its stop."""

    def __init__(self, stream: TextStream, stops: StopStrings) -> None:
        self._stream, self._stops = stream, stops
        self.events: list[Event] = []
        self.text, self.ended = "", False

    @property
    def stopped(self) -> bool:
        return self._stops.stopped is not None

    def read(self, event: Event) -> None:
        if event.token is not None and event.finish != "stop":
            self.text += self._stops.push(self._stream.push([event.token]))
        if self.stopped or event.finish is not None:
            self.ended = True
            if not self.stopped:
                self.text += self._stops.push(self._stream.flush())
                self.text += "" if self.stopped else self._stops.flush()
            event = event if event.finish is not None else event._replace(finish="stop")
        self.events.append(event)


def _judge(completion: Completion, ids: list[int], count: int) -> tuple[float, bool]:
    """The log-probability of the last `count` ids, and whether each is the best where it stands."""
    assert completion.prompt_logprobs is not None and completion.prompt_tops is not None
    tops = completion.prompt_tops[-count:]
    greedy = all(top[0][0] == token for top, token in zip(tops, ids[-count:], strict=True))
    return math.fsum(completion.prompt_logprobs[-count:]), greedy


def _sampling(wish: dict[str, Any], most: int) -> SamplingParams:
    unknown = sorted(set(wish) - KNOWN)
    if unknown:
        raise ValueError(f"a task asks for {unknown[0]} of its answers; known are {', '.join(sorted(KNOWN))}")
    temperature = float(wish.get("temperature", 0.0)) if wish.get("do_sample") else 0.0
    if temperature == 0.0:
        return SamplingParams(0.0, max_tokens=most)
    return SamplingParams(temperature, wish.get("top_p", 1.0), wish.get("top_k"), max_tokens=most)


def run(
    model: EngineLM, tasks: dict[str, ConfigurableTask], *, limit: int | None = None
) -> tuple[list[Score], dict[str, Any]]:
    """The scores of each task, and lm-eval's samples of it: what was asked, answered and counted."""
    assert limit is None or limit > 0
    chat = model.chat
    told: Any = evaluate(model, dict(tasks), limit=limit, apply_chat_template=chat, fewshot_as_multiturn=chat)
    assert told is not None
    scores = []
    for name, task in tasks.items():
        for key, value in told["results"][name].items():
            metric, _, rest = key.partition(",")
            if not rest or metric.endswith("_stderr"):
                continue
            error = told["results"][name].get(f"{metric}_stderr,{rest}")
            scores.append(
                Score(
                    task=name,
                    metric=metric,
                    value=float(value),
                    error=error if isinstance(error, float) else math.nan,
                    samples=told["n-samples"][name]["effective"],
                    shots=task.config.num_fewshot or 0,
                )
            )
    return scores, told["samples"]
