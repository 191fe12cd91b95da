"""Laws of the rewards: what counts as right, exactly, and what does not."""

from __future__ import annotations

import pytest

from shoal.stages import rewards
from shoal.stages.judge import Judge


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("12", 1),
        ("<think>13</think>12", 1),
        ("<think>12</think>13", 0),
        ("<answer>7</answer> no, <answer>the sum is 12.</answer> 9", 1),
        ("12.0", 1),
        ("0012", 1),
        ("1,2", 1),
        ("-12", 0),
        ("", 0),
        ("twelve", 0),
    ],
)
def test_number_is_exact(text: str, right: int) -> None:
    assert rewards.number(text, {"answer": 12}) == right


def test_numbers_too_long_for_floats_are_told_apart() -> None:
    assert rewards.number("123456789012345678901", {"answer": "123456789012345678901"}) == 1
    assert rewards.number("123456789012345678902", {"answer": "123456789012345678901"}) == 0


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("(3 + 5) * 2", 1),
        ("(3+5)*2 = 16", 1),
        ("16", 0),  # a number is no expression
        ("3*5+2", 0),
        ("(3+5)*(1+1)", 0),  # 1 is not there
        ("(3+5)*2*3/3", 0),  # 3 is there once
        ("2/(3-3)", 0),
        ("__import__('os').getpid()", 0),
        ("2**4", 0),
        ("(" * 500, 0),
    ],
)
def test_countdown_takes_the_given_numbers_only(text: str, right: int) -> None:
    assert rewards.countdown(text, {"numbers": [3, 5, 2, 7], "target": 16}) == right


def test_countdown_divides_exactly() -> None:
    assert rewards.countdown("6 / (1 - 3 / 4)", {"numbers": [1, 3, 4, 6], "target": 24}) == 1


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("<think>a</think><answer>b</answer>", 1),
        ("<think>\na\n</think>\n\n<answer>b</answer>\n", 1),
        ("a</think><answer>b</answer>", 1),  # the prompt ended in <think>
        ("<think>a</think>b", 0),
        ("<think>a<think>c</think></think><answer>b</answer>", 0),
        ("x<think>a</think><answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer>x", 0),
        ("<think></think><answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0),
    ],
)
def test_layout_is_all_or_nothing(text: str, right: int) -> None:
    assert rewards.layout(text, {}) == right


def test_language_is_a_share_of_words() -> None:
    assert rewards.language("先算 then add</think>12", {"language": "zh"}) == 0.5
    assert rewards.language("one two three 四</think>五五五", {"language": "en"}) == 0.75
    assert rewards.language("12 + 13</think>25", {"language": "en"}) == 1
    with pytest.raises(ValueError, match="language is 'fr'"):
        rewards.language("a", {"language": "fr"})


def test_brevity_falls_to_zero() -> None:
    problem = {"max_characters": 10}
    assert [rewards.brevity("x" * n, problem) for n in (0, 5, 10, 20)] == [1, 0.5, 0, 0]


def test_code_is_judged_by_its_tests() -> None:
    problem = {"tests": "assert add(1, 2) == 3"}
    good = "<think>easy</think>\n```python\ndef add(a, b):\n    return a + b\n```"
    with Judge({"code": 1.0}) as judge:
        scores = judge.score([good, good.replace("+", "-"), "add them"], [problem] * 3)
    assert [score.total for score in scores] == [1, 0, 0]
    assert not judge.faults


def test_math_is_judged_as_mathematics_under_our_own_clock() -> None:
    pytest.importorskip("math_verify", reason="the extra rl is not there")
    problem = {"answer": r"\frac{1}{2}"}
    # The second would have sympy count to a number of 10^9 digits.
    answers = ["<think>hm</think>$0.5$", r"$\frac{2}{4}$", "$0.25$", "nothing"]
    with Judge({"math": 1.0}, seconds=20) as judge:
        assert [score.total for score in judge.score(answers, [problem] * 4)] == [1, 1, 0, 0]
    with Judge({"math": 1.0}, seconds=2) as judge:
        (score,) = judge.score(["$9^{9^{9^{9}}}$"], [{"answer": "9^{9^{9^{9}}}+1"}])
        assert score.total in (0.0, 1.0)
