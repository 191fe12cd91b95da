"""`shoal chat`: a conversation in the terminal, or, with `raw`, text that is continued.

What a model thinks is shown dimmed while it comes, the last lines of it, and folded to one line when it ends;
`/think` unfolds it. Where output is no terminal the text is printed as it is. The engine's prefix cache keeps
what was said, so a turn costs its new tokens only. Ctrl-C ends an answer, Ctrl-D the conversation.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.live import Live
from rich.text import Text

from shoal.cli.view import say
from shoal.data.text import TextStream, Tokenizer
from shoal.engine.engine import Engine
from shoal.engine.sequence import SamplingParams
from shoal.server.parsers import THINK, Delta, ReplyParser

LINES = 6  # of thinking, while it comes
UNFOLD = "/think"


def talk(
    engine: Engine, tokenizer: Tokenizer, params: SamplingParams, system: str | None, *, raw: bool
) -> None:
    if raw and system is not None:
        raise ValueError("--system needs turns, and --raw has none; leave one out")
    history = [{"role": "system", "content": system}] if system else []
    say("Ctrl-C ends an answer, Ctrl-D the conversation.")
    thought = ""
    for line in _lines():
        if line == UNFOLD and not raw:
            Console(highlight=False).print(Text(thought or "nothing was thought", style="dim italic"))
            continue
        if raw:
            prompt = tokenizer.encode(line, bos=tokenizer.bos_id is not None)
        else:
            prompt = tokenizer.chat([*history, {"role": "user", "content": line}])
        opened = not raw and tokenizer.decode(prompt).rstrip().endswith(THINK)
        screen = Screen(Console(highlight=False), reasons=not raw, opened=opened)
        try:
            answer = _answer(engine, tokenizer, prompt, params, screen)
        except ValueError as error:  # too long for the context: say so, and let the user go on
            say(f"shoal: {error}")
            continue
        thought = screen.thought
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


class Screen:
    """An answer as it is shown. `thought` is what the model thought, when it is over."""

    def __init__(self, console: Console, *, reasons: bool, opened: bool) -> None:
        self.console, self.thought = console, ""
        self._parser = ReplyParser(reasons=reasons, opened=opened) if console.is_terminal else None
        self._live: Live | None = None

    def show(self, piece: str) -> None:
        if self._parser is None:
            self.console.file.write(piece)
            self.console.file.flush()
        else:
            self._show(self._parser.push(piece))

    def end(self) -> None:
        if self._parser is not None:
            self._show(self._parser.flush())
            self._fold()
        self.console.file.write("\n")
        self.console.file.flush()

    def _show(self, delta: Delta) -> None:
        if delta.reasoning:
            self.thought += delta.reasoning
            if self._live is None:
                self._live = Live(console=self.console, transient=True, refresh_per_second=8)
                self._live.start()
            self._live.update(Text("\n".join(self._last_lines()), style="dim italic"))
        if delta.content:
            self._fold()
            self.console.file.write(delta.content)
            self.console.file.flush()

    def _fold(self) -> None:
        """Thinking is over: one line stands for it."""
        if self._live is None:
            return
        self._live.stop()
        self._live = None
        words = len(self.thought.split())
        told = f"thought for {words} word{'s' if words != 1 else ''}; {UNFOLD} shows them"
        self.console.print(Text(told, style="dim italic"))

    def _last_lines(self) -> list[str]:
        """What fits: long lines are cut as the terminal would."""
        width = max(1, self.console.width)
        lines = [
            line[at : at + width]
            for line in self.thought.splitlines() or [""]
            for at in range(0, max(1, len(line)), width)
        ]
        return lines[-LINES:]


def _answer(
    engine: Engine, tokenizer: Tokenizer, prompt: list[int], params: SamplingParams, screen: Screen
) -> str:
    """Show an answer as it comes, and return it; Ctrl-C keeps what there is."""
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
                screen.show(piece)
    except KeyboardInterrupt:
        engine.cancel(request)
    text += (rest := stream.flush())
    screen.show(rest)
    screen.end()
    return text
