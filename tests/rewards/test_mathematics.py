"""Equality of mathematics by math-verify in its own process, which any answer may bring down."""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Iterator

import pytest

from megatron_rlt.rewards.mathematics import MathJudge


@pytest.fixture(scope="module")
def judge() -> Iterator[MathJudge]:
    with MathJudge(timeout_seconds=20.0) as judge:
        yield judge


@pytest.mark.parametrize(
    ("answer", "reference", "outcome"),
    [
        ("0.5", r"\frac{1}{2}", "equal"),
        (r"\boxed{\frac12}", r"\boxed{0.5}", "equal"),
        ("sqrt(2)/2", r"\frac{1}{\sqrt{2}}", "equal"),
        (r"(x+1)^2", "x^2+2x+1", "equal"),
        ("3, 1, 2", r"\{1,2,3\}", "equal"),
        ("1,000", "1000", "equal"),
        ("x = 5", "5", "equal"),
        (r"\text{Evelyn}", "Evelyn", "equal"),
        ("The total is 4 cm", "4", "equal"),
        ("0.333", r"\frac13", "different"),
        ("(1, 2)", "(2, 1)", "different"),
        (r"x^2 + 1", "x^2 - 1", "different"),
        ("I do not know", "5", "unreadable answer"),
        (r"\boxed{\frac{1}{}", "5", "unreadable answer"),
        ("", "5", "unreadable answer"),
        ("5", "no number in here", "unreadable reference"),
        ("0", r"0.\overline{3}", "different"),  # and not zero, which math-verify makes of it in dollar signs
        ("32348", r"\$32,\!348", "equal"),
    ],
)
def test_outcomes_by_example(judge: MathJudge, answer: str, reference: str, outcome: str) -> None:
    assert judge.compare(answer, reference).outcome == outcome


def test_the_answer_comes_back_as_it_was_read(judge: MathJudge) -> None:
    assert judge.compare("First $3$, then $x = 4$.", "5").answer == "x = 4"


def test_line_breaks_and_control_characters_stay_in_their_request(judge: MathJudge) -> None:
    assert judge.compare('one\n\x00\u2028 "$7$"\n', "7").outcome == "equal"
    assert judge.compare("8", "8").outcome == "equal"


def test_an_endless_comparison_times_out_and_the_next_one_works() -> None:
    """Without a limit it takes minutes; starting twice and 0.2 s of work take about 1 s of processor time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with MathJudge(timeout_seconds=0.2) as judge:
        assert judge.compare(r"(x+y+z+1)^{200}", r"(x+y+z+1)^{100}(x+y+z+1)^{99}").outcome == "timed out"
        assert judge.compare("1", "1").outcome == "equal"
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 5.0


def test_it_works_outside_the_main_thread() -> None:
    """Where math-verify's own time-outs raise."""
    outcomes: list[str] = []

    def compare() -> None:
        with MathJudge(timeout_seconds=0.2) as judge:
            outcomes.append(judge.compare(r"9^{9^{9^9}}", "5").outcome)
            outcomes.append(judge.compare("5", "5").outcome)

    thread = threading.Thread(target=compare)
    thread.start()
    thread.join(timeout=60)
    assert outcomes == ["timed out", "equal"]


def test_a_process_that_was_killed_costs_one_comparison() -> None:
    with MathJudge(timeout_seconds=20.0) as judge:
        judge.compare("1", "1")
        process = judge._process
        assert process is not None
        os.kill(process.pid, signal.SIGTERM)  # meant for the ranks; this process must not listen
        assert judge.compare("1", "1").outcome == "equal"
        process.kill()
        process.wait()
        assert judge.compare("1", "1").outcome == "crashed"
        assert judge.compare("1", "1").outcome == "equal"


def test_closing_ends_the_process() -> None:
    judge = MathJudge(timeout_seconds=20.0)
    judge.close()
    judge.compare("1", "1")
    process = judge._process
    assert process is not None
    judge.close()
    assert process.returncode == 0


def test_a_process_that_cannot_start_is_no_verdict() -> None:
    judge = MathJudge(timeout_seconds=20.0)
    judge._command = [*judge._command[:-1], "soon"]
    with pytest.raises(RuntimeError, match="math-verify ended with status 1"):
        judge.compare("1", "1")
