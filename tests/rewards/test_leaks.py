"""Leak detectors, counted by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlt.config.reward import LeakConfig
from megatron_rlt.rewards.leaks import EPISTEMIC_MARKERS, leak_metrics, words_of
from megatron_rlt.types import FormatFlag, LeakMetrics
from tests.rewards.evidence import reward_of

SOLUTION = "The sum of both is 12, so (x) = 12."


def metrics_of(
    explanation: str, solution: str = SOLUTION, answer: str | None = "12", closing_share: float = 0.2
) -> LeakMetrics:
    return leak_metrics(explanation, solution, answer=answer, ngram=4, closing_share=closing_share)


def test_words_lose_their_edges_but_signs_stay() -> None:
    assert words_of("So, (x) = $12$.  **Let’s** go!") == ["so", "x", "=", "12", "let's", "go"]


def test_overlap_by_hand() -> None:
    """The solution has 10 words, so 7 n-grams; "the sum of both is" holds the first two of them."""
    assert metrics_of("We want the sum of both is clear").solution_overlap == pytest.approx(2 / 7)
    assert metrics_of(SOLUTION).solution_overlap == 1.0
    assert metrics_of("of both is the sum").solution_overlap == 0.0


def test_a_solution_shorter_than_an_n_gram_is_one_n_gram() -> None:
    assert metrics_of("then x = 5 follows", solution="x = 5").solution_overlap == 1.0
    assert metrics_of("then x = 6 follows", solution="x = 5").solution_overlap == 0.0
    assert metrics_of("anything", solution=" ").solution_overlap == 0.0


def test_an_answer_is_stated_unless_it_stands_only_at_the_end() -> None:
    """10 words: the last 2 are the conclusion."""
    assert metrics_of("12 is it and now to the reasons for it").states_the_answer == 1.0
    assert metrics_of("we add one and two and three so get 12.").states_the_answer == 0.0
    assert metrics_of("we add one and two and three so get 12.", closing_share=0.0).states_the_answer == 1.0
    assert metrics_of("we add 121 and 1 2 and so on we").states_the_answer == 0.0
    assert metrics_of("it is one half of it and so on we", answer="One half!").states_the_answer == 1.0
    assert metrics_of("12 is it", answer=None).states_the_answer == 0.0


def test_repetition_by_hand() -> None:
    """a b c d a b c d: n-grams abcd bcda cdab dabc abcd, one of five again."""
    assert metrics_of("a b c d a b c d").repetition == pytest.approx(1 / 5)
    assert metrics_of("a a a a a a a").repetition == pytest.approx(3 / 4)
    assert metrics_of("a b c").repetition == 0.0


def test_epistemic_markers_by_hand() -> None:
    """10 words; "wait", "let me check", "maybe": three markers."""
    assert metrics_of("Wait, let me check: maybe 3 is 4 or 5?").epistemic_per_100_words == pytest.approx(30.0)
    assert metrics_of("no wait").epistemic_per_100_words == pytest.approx(50.0)  # one phrase, not a phrase and a word
    assert metrics_of("awaiting checks").epistemic_per_100_words == 0.0
    assert metrics_of("").epistemic_per_100_words == 0.0


@pytest.mark.parametrize(
    ("explanation", "solution", "answer", "expected"),
    [
        # 4 characters, no n-gram twice; the 5-character explanation holds all of it and states the answer in front.
        ("答案是七么", "答案是七", "七", (1.0, 1.0, 0.0)),
        # 8 characters 3 times: 24 characters, 21 n-grams, of them 8 different.
        ("所以一共七个苹果。" * 3, "所以一共七个苹果", "七", (1.0, 1.0, 1 - 8 / 21)),
        ("三たす四は七です。", "答えは七です", "七", (1 / 3, 1.0, 0.0)),  # は七です is one of three n-grams
        ("ดังนั้นคำตอบคือเจ็ด", "คำตอบคือเจ็ด", "สอง", (1.0, 0.0, 0.0)),
        (
            "設 x=7，故答案為 7。",
            "答案為 7",
            "7",
            (1.0, 0.0, 0.0),
        ),  # 設 x=7 故 答 案 為 7: the last of 7 words is the end
        ("the sum 是 7 now", "sum 是 7 now", "12", (1.0, 0.0, 0.0)),
    ],
)
def test_characters_are_words_where_a_script_has_no_spaces(
    explanation: str, solution: str, answer: str, expected: tuple[float, float, float]
) -> None:
    metrics = metrics_of(explanation, solution=solution, answer=answer)
    assert (metrics.solution_overlap, metrics.states_the_answer, metrics.repetition) == pytest.approx(expected)


def test_a_sentence_mark_is_no_word_and_spaced_scripts_keep_their_words() -> None:
    assert words_of("（三）加四，等于七！") == ["三", "加", "四", "等", "于", "七"]
    assert words_of("그래서 답은 7이다. Поэтому ответ 7") == ["그래서", "답은", "7이다", "поэтому", "ответ", "7"]
    assert words_of("x²是9") == ["x²", "是", "9"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (r"so \boxed{7}, \(7\), $7$ and \[7\].", ["so", "7", "7", "7", "and", "7"]),
        (r"\boxed{\frac{1}{2}} is \frac{1}{2}", ["frac{1}{2", "is", "frac{1}{2"]),
        (
            "\u0633\u0628\u0639\u0629\u060c \u0633\u0628\u0639\u0629.",
            ["\u0633\u0628\u0639\u0629"] * 2,
        ),  # Arabic, a comma behind
        ("\u0938\u093e\u0924\u0964 \u0938\u093e\u0924", ["\u0938\u093e\u0924"] * 2),  # Hindi, a full stop behind
        ("seven\u2014so \u00absept\u00bb \u00bfsiete?", ["seven", "so", "sept", "siete"]),
        ("e\u0301t\u00e9 \u00e9te\u0301 \uff17", ["\u00e9t\u00e9", "\u00e9t\u00e9", "7"]),
    ],
)
def test_one_word_is_one_word_in_every_mark_up_and_script(text: str, words: list[str]) -> None:
    assert words_of(text) == words


def test_an_answer_in_a_box_of_the_explanation_is_stated() -> None:
    assert metrics_of(r"It is \boxed{12}, and now to the reasons for it").states_the_answer == 1.0


def test_every_marker_can_be_found() -> None:
    for marker in EPISTEMIC_MARKERS:
        assert metrics_of(marker).epistemic_per_100_words == pytest.approx(100 / len(marker.split())), marker


WEIGHTS = LeakConfig(solution_overlap=-2.0, states_the_answer=-1.0, repetition=-4.0, epistemic_per_100_words=0.01)


def test_leaks_add_their_weighted_sum_to_penalty_and_reward_and_to_no_other_term() -> None:
    """-2 * 0.5 - 1 * 1 - 4 * 0.25 + 0.01 * 10 = -2.9, beside -0.25 for a truncated explanation."""
    truncated, leaks = frozenset({FormatFlag.TRUNCATED}), LeakMetrics(0.5, 1.0, 0.25, 10.0)
    plain, found = reward_of(flags=truncated), reward_of({"leaks": WEIGHTS}, flags=truncated, leaks=leaks)
    assert (plain.terms["penalty"], found.terms["penalty"]) == (-0.25, pytest.approx(-3.15))
    assert found.total == pytest.approx(plain.total - 2.9, abs=1e-12)
    assert {name for name in plain.terms if plain.terms[name] != found.terms[name]} == {"penalty"}


def test_without_weights_leaks_change_no_bit() -> None:
    assert reward_of(leaks=LeakMetrics(0.5, 1.0, 0.25, 10.0)).total == reward_of().total


@settings(deadline=None)
@given(st.text(max_size=100), st.text(max_size=50), st.text(max_size=5), st.floats(0, 1))
def test_every_metric_stays_in_its_range(explanation: str, solution: str, answer: str, closing_share: float) -> None:
    metrics = metrics_of(explanation, solution, answer, closing_share)
    assert 0 <= metrics.solution_overlap <= 1
    assert metrics.states_the_answer in (0.0, 1.0)
    assert 0 <= metrics.repetition < 1
    assert 0 <= metrics.epistemic_per_100_words <= 100
