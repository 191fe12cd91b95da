"""Text to tokens and back: with the server's edge, the only place where text exists.

`Tokenizer` wraps a checkpoint's tokenizer.json. Two laws. Raw text is only text: what spells a control token
in it is encoded as the characters it is, unless the caller says that it is markup; in a chat, only the
template and the assistant write control tokens. And decoding goes by bytes, so a stream, however it is cut,
says what the whole says, and no part of a character ever leaves it.

Training a tokenizer is left to tokenizer.py, the layout of conversations to chat.py, documents in bulk to
shard.py.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from shoal.data.atomic import write_atomically
from shoal.data.chat import ChatTemplate, JsonText, Message
from shoal.data.spelling import Spelling

# A code point that Unicode reserves for a program's own use. Put inside what spells a control token, it keeps
# that from being read as one; the normalizer of `Tokenizer._markup` takes it out again.
GUARD = "\ufdd0"

BATCH_CHARACTERS = 1 << 20  # of text encoded at a time; the encodings take some 100 bytes a token


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer.json, and what its checkpoint says about it.

    A control token is an added token that is marked special or written as a tag: DeepSeek marks neither
    <｜User｜> nor <think>.
    """

    definition: str = field(repr=False)  # the text of tokenizer.json
    bos_token: str | None
    eos_token: str
    pad_token: str | None = None
    chat_template: str | None = field(default=None, repr=False)
    adds_bos: bool = False  # the checkpoint wants a raw prompt to start with BOS

    def __post_init__(self) -> None:
        for token in (self.bos_token, self.eos_token, self.pad_token):
            if token is not None and self._plain.token_to_id(token) is None:
                raise ValueError(
                    f"{token!r} is not in the vocabulary; name one that is in tokenizer_config.json"
                )

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """From tokenizer.json and tokenizer_config.json, read as transformers reads them."""
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if not Path(folder, name).is_file():
                raise ValueError(f"{folder} has no {name}; save the tokenizer there with transformers 5")
        definition = _read_json(Path(folder, "tokenizer.json"))
        config = _read_json(Path(folder, "tokenizer_config.json"))
        bos, eos, pad = (_content(config.get(name)) for name in ("bos_token", "eos_token", "pad_token"))
        if eos is None:
            raise ValueError(
                f"{folder}/tokenizer_config.json has no eos_token; name the one that ends a text"
            )
        adds_bos = config.get("add_bos_token")
        if adds_bos is None:
            adds_bos = _build(definition).encode("").tokens[:1] == [bos]
        text = Path(folder, "tokenizer.json").read_text("utf-8")
        return cls(text, bos, eos, pad, _read_chat_template(Path(folder), config), adds_bos)

    def save(self, folder: str | Path) -> None:
        """Write the two files. Transformers' AutoTokenizer reads them, and gives the same ids."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "pad_token": self.pad_token,
            "add_bos_token": self.adds_bos,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "chat_template": self.chat_template,
        }
        config = {name: value for name, value in config.items() if value is not None}
        with write_atomically(Path(folder, "tokenizer.json")) as file:
            file.write(self.definition.encode())
        with write_atomically(Path(folder, "tokenizer_config.json")) as file:
            file.write(json.dumps(config, ensure_ascii=False, indent=2).encode())

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; the model's embedding may have rows beyond it."""
        return max(self.spelling.bytes_of) + 1

    @cached_property
    def bos_id(self) -> int | None:
        return None if self.bos_token is None else self._id(self.bos_token)

    @cached_property
    def eos_id(self) -> int:
        return self._id(self.eos_token)

    @cached_property
    def pad_id(self) -> int:
        return self._id(self.pad_token or self.eos_token)

    def find_id(self, token: str) -> int | None:
        """The id of a token by its name in the vocabulary; None where it has no such token."""
        return self._plain.token_to_id(token)

    def spelled_tokens(self) -> dict[int, str]:
        """Every id that is no added token, as the vocabulary spells it."""
        added = {token["id"] for token in self._added_tokens}
        vocabulary: dict[str, int] = json.loads(self.definition)["model"]["vocab"]
        return {token_id: token for token, token_id in vocabulary.items() if token_id not in added}

    @cached_property
    def spelling(self) -> Spelling:
        return Spelling.of(json.loads(self.definition))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Those marked special, which are not part of an answer."""
        return frozenset(token["id"] for token in self._added_tokens if token["special"])

    def encode(
        self, text: str, *, bos: bool = False, eos: bool = False, parse_special: bool = False
    ) -> list[int]:
        """With `parse_special` the text is markup, and control tokens in it are read as such."""
        tokens = self._markup if parse_special else self._plain
        try:
            return self._frame(tokens.encode(text, add_special_tokens=False).ids, bos, eos)
        except TypeError as error:
            raise ValueError(
                "the text has half a surrogate pair, which is no character; remove it"
            ) from error

    def encode_many(
        self, texts: Iterable[str], *, bos: bool = False, eos: bool = False
    ) -> Iterator[list[int]]:
        """`encode` of each text, in order, on all cores. Holds a megabyte of text, or one text, at a time."""
        for batch in _batches(texts):
            for encoding in self._plain.encode_batch_fast(batch, add_special_tokens=False):
                yield self._frame(encoding.ids, bos, eos)

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of `ids`, U+FFFD where it is not UTF-8. An id outside the vocabulary says nothing."""
        stream = TextStream(self, skip_special=skip_special)
        return stream.push(ids) + stream.flush()

    def chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        thinking: bool | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
        **settings: Any,
    ) -> list[int]:
        """The ids of a conversation. `thinking` asks for reasoning or none, where the template can;
        `settings` are what else it reads. The arguments of an assistant's tool calls are JSON text, and stay
        as they are.
        """
        text = self.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            thinking=thinking,
            tools=tools,
            **settings,
        )
        return self.encode(text, parse_special=True)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        thinking: bool | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
        **settings: Any,
    ) -> str:
        """`chat` before it is encoded: markup, in which what the user spelled of it is guarded."""
        switch = "enable_thinking" if "enable_thinking" in self._template.settings else "thinking"
        return self._template.render(
            [
                _spell_calls(message) if message.get("role") == "assistant" else self._disarm(message)
                for message in messages
            ],
            add_generation_prompt=add_generation_prompt,
            bos_token=self.bos_token,
            eos_token=self.eos_token,
            tools=self._disarm(tools),
            **{**settings, switch: thinking},
        )

    def _disarm(self, value: Any) -> Any:
        """The same JSON, with a GUARD in whatever spells a control token."""
        if isinstance(value, str):
            return self._control_tokens.sub(lambda found: found[0][0] + GUARD + found[0][1:], value)
        if isinstance(value, Mapping):
            return {self._disarm(name): self._disarm(part) for name, part in value.items()}
        return [self._disarm(part) for part in value] if isinstance(value, Sequence) else value

    def _frame(self, ids: list[int], bos: bool, eos: bool) -> list[int]:
        if bos and self.bos_id is None:
            raise ValueError("this tokenizer has no BOS; encode without it")
        before = [self.bos_id] if self.bos_id is not None and bos and ids[:1] != [self.bos_id] else []
        after = [self.eos_id] if eos and ids[-1:] != [self.eos_id] else []
        return before + ids + after

    def _id(self, token: str) -> int:
        token_id = self._plain.token_to_id(token)
        assert token_id is not None
        return token_id

    @property
    def template_settings(self) -> set[str]:
        """The names that the chat template reads."""
        return self._template.settings

    @cached_property
    def _template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise ValueError("this tokenizer has no chat template, so its model knows no turns; give it text")
        return ChatTemplate(self.chat_template)

    @cached_property
    def _added_tokens(self) -> list[dict[str, Any]]:
        return json.loads(self.definition)["added_tokens"]

    @cached_property
    def _control_tokens(self) -> re.Pattern[str]:
        names = [token["content"] for token in self._added_tokens if _is_control(token)]
        return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """Reads every control token as the characters it is."""
        definition = json.loads(self.definition)
        for token in definition["added_tokens"]:
            token["special"] = _is_control(token)
        plain = _build(definition)
        plain.encode_special_tokens = True
        return plain

    @cached_property
    def _markup(self) -> tokenizers.Tokenizer:
        """Reads control tokens as such: before the normalizer, which then removes each GUARD."""
        definition = json.loads(self.definition)
        for token in definition["added_tokens"]:
            token["normalized"] = token["normalized"] and not _is_control(token)
        remove = {"type": "Replace", "pattern": {"String": GUARD}, "content": ""}
        steps = [remove, definition["normalizer"]] if definition["normalizer"] else [remove]
        definition["normalizer"] = {"type": "Sequence", "normalizers": steps}
        return _build(definition)


class TextStream:
    """The text of tokens as they come. A character waits until it is whole; `flush` ends the text.

    Special tokens say nothing if `skip_special`, but for those `shown`.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special: bool = True, shown: frozenset[int] = frozenset()
    ) -> None:
        self._spelling = tokenizer.spelling
        self._skipped = tokenizer.special_ids - shown if skip_special else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = True

    def push(self, ids: Iterable[int]) -> str:
        spell = self._spelling.bytes_of
        return self._decode(b"".join(spell.get(i, b"") for i in ids if i not in self._skipped))

    def flush(self) -> str:
        return self._decode(b"", final=True)

    def _decode(self, data: bytes, final: bool = False) -> str:
        text = self._decoder.decode(data, final)
        if self._at_start and text:
            self._at_start = False
            return text.removeprefix(" ") if self._spelling.drops_first_space else text
        return text


class StopStrings:
    """Text up to the first stop string, as it comes: what may yet become one is held back until `flush`.

    The stop that ends first wins, the longest of those that end together. So the outcome is that of the whole
    text, however it is cut. Once `stopped` names the stop, nothing more comes out.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("a stop string is empty, and every text contains that; leave it out")
        self._stops = tuple(stops)
        self._held = ""
        self.stopped: str | None = None

    def push(self, text: str) -> str:
        if self.stopped is not None:
            return ""
        if not self._stops:
            return text
        self._held += text
        starts = {stop: start for stop in self._stops if (start := self._held.find(stop)) >= 0}
        if starts:
            self.stopped = min(starts, key=lambda stop: (starts[stop] + len(stop), starts[stop]))
            out, self._held = self._held[: starts[self.stopped]], ""
        else:
            keep = len(self._held) - self._count_unfinished()
            out, self._held = self._held[:keep], self._held[keep:]
        return out

    def flush(self) -> str:
        out, self._held = self._held, ""
        return out

    def _count_unfinished(self) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        longest = max(map(len, self._stops), default=1) - 1
        ends = (self._held[-length:] for length in range(min(longest, len(self._held)), 0, -1))
        return next((len(end) for end in ends if any(stop.startswith(end) for stop in self._stops)), 0)


def _build(definition: dict[str, Any]) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(definition))
    except Exception as error:  # the library has no narrower one
        version = tokenizers.__version__
        raise ValueError(
            f"tokenizers {version} cannot read this tokenizer.json: {error}; update it"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch it again") from error


def _spell_calls(message: Message) -> Message:
    """The same message; the arguments of its calls, where they are text, are not quoted by a template."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    return {**message, "tool_calls": [{**call, "function": _spell_call(call["function"])} for call in calls]}


def _spell_call(function: Mapping[str, Any]) -> Mapping[str, Any]:
    arguments = function.get("arguments")
    return {**function, "arguments": JsonText(arguments)} if isinstance(arguments, str) else function


def _is_control(token: dict[str, Any]) -> bool:
    return token["special"] or (token["content"].startswith("<") and token["content"].endswith(">"))


def _content(token: str | dict[str, Any] | None) -> str | None:
    """Older files write a token as the fields of an AddedToken."""
    return token["content"] if isinstance(token, dict) else token


def _read_chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text("utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, with names
        return next((each["template"] for each in template if each["name"] == "default"), None)
    return template


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    yield batch
