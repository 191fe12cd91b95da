"""Laws of structured output: what a grammar allows and no more, beside requests that have none, and only
after the end of the thinking where there is one.

The model is random and the sampling hot, so nothing but the grammar keeps a text in shape.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from shoal.engine import Engine, EngineSettings, Grammar, SamplingParams, Vocabulary
from tests.engine.conftest import build

EOS, THINK_END = 1, 2
# Ids 32 to 126 are their ASCII character; then some words and pieces; the rest have no text.
TOKENS = [chr(at) if 32 <= at < 127 else "" for at in range(512)]
TOKENS[200:208] = ['{"', '":', '", "', "true", "false", "null", "},{", "abc"]
VOCABULARY = Vocabulary(tuple(TOKENS), "raw")
SETTINGS = EngineSettings(page_size=8, num_pages=256, max_sequences=8, overlap=True)
HOT = SamplingParams(temperature=5.0, max_tokens=120)


def serve(grammar: Grammar, count: int = 6, **wishes: object) -> list[tuple[str, str, tuple[int, ...]]]:
    """Texts of a hot model within a grammar, how each ended, and its ids."""
    engine = Engine(build("deepseek-v3", eos=(EOS,)), SETTINGS, VOCABULARY)
    params = [replace(HOT, grammar=grammar, seed=seed, **wishes) for seed in range(count)]  # type: ignore[arg-type]
    answers = engine.generate([[40, 50, 60]] * count, params)
    assert engine.pool.num_free == 256
    return [("".join(TOKENS[token] for token in done.ids), done.finish, done.ids) for done in answers]


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (Grammar("regex", r"[a-c]{3}-[0-9]{2,4}"), r"[a-c]{3}-[0-9]{2,4}"),
        (Grammar("choice", '["yes", "no", "it \\"depends\\""]'), r'yes|no|it "depends"'),
        (Grammar("ebnf", 'root ::= "x" root "y" | "z"'), r"x*zy*"),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_a_text_follows_its_grammar(grammar: Grammar, pattern: str) -> None:
    texts = serve(grammar)
    assert any(finish == "stop" for _, finish, _ in texts)
    for text, finish, ids in texts:
        if finish == "stop":
            assert re.fullmatch(pattern, text), text
            assert ids[-1] == EOS


def test_a_schema_is_met() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"enum": ["u", "vw"]}, "c": {"const": 7}},
        "required": ["a", "b", "c"],
        "additionalProperties": False,
    }
    for text, finish, _ in serve(Grammar("json_schema", json.dumps(schema)), max_tokens=250):
        if finish == "stop":
            found = json.loads(text)
            assert set(found) == {"a", "b", "c"}
            assert (type(found["a"]), found["c"]) == (bool, 7)
            assert found["b"] in ("u", "vw")


def test_any_object_is_an_object() -> None:
    for text, finish, _ in serve(Grammar("json_object"), max_tokens=200):
        assert text.lstrip().startswith("{")
        assert finish == "length" or isinstance(json.loads(text), dict)


def test_the_grammar_begins_after_the_thinking() -> None:
    """`</think>` is made likely, so that it comes soon; what is before it is free."""
    bias = ((THINK_END, 20.0),)
    ended = 0
    for _, finish, ids in serve(Grammar("regex", "[01]{5}"), think_end_id=THINK_END, logit_bias=bias):
        if THINK_END in ids:
            after = ids[ids.index(THINK_END) + 1 :]
            text = "".join(TOKENS[token] for token in after)
            assert re.fullmatch("[01]{0,5}", text)
            assert finish == "length" or (len(text) == 5 and after[-1] == EOS)
            ended += 1
    assert ended


def test_others_are_left_alone() -> None:
    """Beside a request with a grammar, one without gets what it gets alone."""
    model = build("deepseek-v3", eos=(EOS,))
    free = SamplingParams(seed=3, max_tokens=20)
    (alone,) = Engine(model, SETTINGS, VOCABULARY).generate([[9, 8]], free)
    bound = replace(HOT, grammar=Grammar("regex", "[a-z]{10}"), seed=1)
    beside, _ = Engine(model, SETTINGS, VOCABULARY).generate([[9, 8], [4]], [free, bound])
    assert beside.ids == alone.ids


def test_a_grammar_holds_beside_guesses() -> None:
    """A request with a grammar gets no guesses; its neighbour does, and both get what they get without."""
    model = build("deepseek-v3", eos=(EOS,))
    params = [
        replace(HOT, grammar=Grammar("regex", "[a-z]{12}"), seed=1),
        SamplingParams(seed=3, max_tokens=20),
    ]
    plain = Engine(model, SETTINGS, VOCABULARY).generate([[4], [9, 8]], params)
    settings = replace(SETTINGS, overlap=False, speculate=2)
    guessed = Engine(model, settings, VOCABULARY).generate([[4], [9, 8]], params)
    assert [done.ids for done in guessed] == [done.ids for done in plain]


def test_preemption_keeps_the_place_in_the_grammar() -> None:
    model = build("deepseek-v3", eos=(EOS,))
    bound = replace(HOT, grammar=Grammar("regex", "[a-z]{30}"), max_tokens=50)
    params = [replace(bound, seed=seed) for seed in range(6)]
    prompts = [[seed + 40] * 6 for seed in range(6)]
    roomy = Engine(model, SETTINGS, VOCABULARY).generate(prompts, params)
    engine = Engine(model, replace(SETTINGS, page_size=4, num_pages=20), VOCABULARY)
    assert [done.ids for done in engine.generate(prompts, params)] == [done.ids for done in roomy]
    assert engine.stats().preemptions > 0


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar("json_schema", '{"type": "nonsense"}'), "grammar json_schema is .* cannot be compiled"),
        (Grammar("json_schema", "{"), "grammar json_schema is '{'; it cannot be compiled"),
        (Grammar("regex", "(a"), "grammar regex is .* cannot be compiled"),
        (Grammar("ebnf", "root ::= other"), "grammar ebnf is .* cannot be compiled"),
        (Grammar("choice", "[1, 2]"), "grammar choice is .* a JSON list of strings"),
        (Grammar("choice", "yes"), "grammar choice is .* cannot be compiled"),
    ],
    ids=str,
)
def test_what_is_no_grammar_is_refused(grammar: Grammar, message: str) -> None:
    engine = Engine(build("deepseek-v3", eos=(EOS,)), SETTINGS, VOCABULARY)
    with pytest.raises(ValueError, match=message):
        engine.add([1], replace(HOT, grammar=grammar))
    assert not engine.busy


def test_a_grammar_needs_a_vocabulary_and_an_end() -> None:
    grammar = Grammar("json_object")
    with pytest.raises(ValueError, match="grammar needs a vocabulary"):
        Engine(build("deepseek-v3", eos=(EOS,)), SETTINGS).add([1], replace(HOT, grammar=grammar))
    engine = Engine(build("deepseek-v3"), SETTINGS, VOCABULARY)
    with pytest.raises(ValueError, match="grammar needs a token to end with"):
        engine.add([1], replace(HOT, grammar=grammar))
    with pytest.raises(ValueError, match="min_tokens is 3, but a grammar says when it ends"):
        engine.add([1], replace(HOT, grammar=grammar, min_tokens=3, stop_token_ids=(EOS,)))
    with pytest.raises(ValueError, match="grammar regex has text ''"):
        Grammar("regex")
    wide = Engine(build("deepseek-v3", eos=(EOS,)), SETTINGS, Vocabulary((*TOKENS, "more"), "raw"))
    with pytest.raises(ValueError, match="vocabulary handed in has 513 tokens, the model 512"):
        wide.add([1], replace(HOT, grammar=grammar))


def test_xgrammar_is_not_imported_before_it_is_needed() -> None:
    program = "import sys, shoal.engine; sys.exit('xgrammar' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_blanks_in_json_come_to_an_end() -> None:
    """Of a model that likes nothing better than a blank."""
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": 2}
    for written, _, _ in serve(Grammar("json_schema", json.dumps(schema)), 2, logit_bias=((32, 1000.0),)):
        assert " " * 40 in written
        assert " " * 41 not in written


def test_a_grammar_that_no_token_can_go_on_ends_its_request_alone() -> None:
    """The vocabulary has no u with dots: the text stops there, with an error, and the others go on."""
    engine = Engine(build("deepseek-v3", eos=(EOS,)), SETTINGS, VOCABULARY)
    bad = engine.add([40, 50], replace(HOT, grammar=Grammar("regex", "ab\u00fcc")))
    good = engine.add([40, 50], replace(HOT, grammar=Grammar("regex", "abc")))
    ends = {}
    while engine.busy:
        ends |= {event.request: event for event in engine.step() if event.finish is not None}
    assert ends[bad].finish == "error"
    assert "no token of the vocabulary can go on its grammar" in (ends[bad].error or "")
    assert ends[good].finish == "stop"
    assert engine.pool.num_free == 256
