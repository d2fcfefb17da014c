"""Controls: always of another question, the same tokens, and the same again for the same seed."""

from __future__ import annotations

import pytest
import torch

from megatron_rlt.rewards.control import empty_explanation, other_questions, shuffled


def test_every_question_gets_an_explanation_of_another_one() -> None:
    questions = ["a", "b", "b", "c", "a", "d"]  # two of them twice
    drawn = {tuple(other_questions(questions, seed=seed)) for seed in range(20)}
    assert len(drawn) == 5  # 1 to 5 places ahead, and all of them come
    for others in drawn:
        assert all(questions[other] != question for other, question in zip(others, questions, strict=True))
    # One place ahead: index 1 would get itself (2), so the next after it.
    assert (1, 3, 3, 4, 5, 0) in drawn


def test_equal_seeds_give_equal_controls() -> None:
    questions = [str(number) for number in range(50)]
    ids = torch.arange(100)
    assert other_questions(questions, seed=3) == other_questions(questions, seed=3)
    assert torch.equal(shuffled(ids, seed=3), shuffled(ids, seed=3))
    assert not torch.equal(shuffled(ids, seed=3), shuffled(ids, seed=4))


def test_shuffled_tokens_are_the_same_tokens() -> None:
    ids = torch.tensor([7, 7, 1, 9, 4])
    assert sorted(shuffled(ids, seed=0).tolist()) == [1, 4, 7, 7, 9]
    assert any(shuffled(ids, seed=seed).tolist() != ids.tolist() for seed in range(3))
    assert shuffled(ids[:1], seed=0).tolist() == [7]
    assert shuffled(ids[:0], seed=0).tolist() == empty_explanation(ids).tolist() == []


@pytest.mark.parametrize("questions", [["a"], ["a", "a"]])
def test_without_a_second_question_there_is_no_other_one(questions: list[str]) -> None:
    with pytest.raises(ValueError, match=f"two different questions, and all {len(questions)} rows ask the same one"):
        other_questions(questions, seed=0)
