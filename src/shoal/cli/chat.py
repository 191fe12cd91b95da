"""`shoal chat`: a conversation in the terminal, or, with `raw`, text that is continued.

The engine's prefix cache keeps what was said, so a turn costs its new tokens only. Ctrl-C ends an answer,
Ctrl-D the conversation.
"""

from __future__ import annotations

from collections.abc import Iterator

from shoal.cli.view import say
from shoal.data.text import TextStream, Tokenizer
from shoal.engine.engine import Engine
from shoal.engine.sequence import SamplingParams


def talk(
    engine: Engine, tokenizer: Tokenizer, params: SamplingParams, system: str | None, *, raw: bool
) -> None:
    if raw and system is not None:
        raise ValueError("--system needs turns, and --raw has none; leave one out")
    history = [{"role": "system", "content": system}] if system else []
    say("Ctrl-C ends an answer, Ctrl-D the conversation.")
    for line in _lines():
        if raw:
            prompt = tokenizer.encode(line, bos=tokenizer.bos_id is not None)
        else:
            prompt = tokenizer.chat([*history, {"role": "user", "content": line}])
        try:
            answer = _answer(engine, tokenizer, prompt, params)
        except ValueError as error:  # too long for the context: say so, and let the user go on
            say(f"shoal: {error}")
            continue
        if not raw:
            history += [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]


def _lines() -> Iterator[str]:
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line:
            yield line


def _answer(engine: Engine, tokenizer: Tokenizer, prompt: list[int], params: SamplingParams) -> str:
    """Print an answer as it comes, and return it; Ctrl-C keeps what there is."""
    request = engine.add(prompt, params)
    stream, text, finish = TextStream(tokenizer), "", None
    try:
        while finish is None:
            for event in engine.step():
                if event.request != request:
                    continue  # the end of an answer that Ctrl-C ended
                if event.token is None:
                    raise FloatingPointError(event.error)
                finish = event.finish
                piece = stream.push([event.token])
                text += piece
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        engine.cancel(request)
    text += (rest := stream.flush())
    print(rest)
    return text
