"""What several orders say together, by hand."""

from __future__ import annotations

import pytest
import torch

from core.evaluation.metrics import Marks
from service.evaluation.aggregate import Course, tail, together


def course(text: str, fused: str, writes: dict[str, int] | None = None) -> Course:
    """Return a course in which a `+` is a right answer and a `-` a wrong one."""

    def told(answers: str) -> Marks:
        predicted = torch.tensor([0 if answer == "+" else 1 for answer in answers])
        return Marks(predicted=predicted, confidence=torch.full((len(answers),), 0.5))

    labels = torch.zeros(len(text), dtype=torch.long)
    branches = {"text": told(text), "more": None, "fused": told(fused)}
    return Course(branches=branches, labels=labels, writes=writes or {}, seconds=0.5)


def test_orders_are_averaged_and_the_worst_stands_beside() -> None:
    told = together([course("++--", "+++-"), course("+---", "+---")], "iid")
    assert told["accuracy"] == {"text": 37.5, "more": None, "fused": 50.0}
    assert told["worst"]["accuracy"] == {"text": 25.0, "more": None, "fused": 25.0}
    assert told["gain"] == {"mean": 12.5, "worst": 0.0, "standard_error": 12.5}
    assert told["images_per_second"] == 8.0


def test_the_worst_calibration_is_the_highest() -> None:
    told = together([course("++", "++"), course("+-", "+-")], "iid")
    assert told["worst"]["ece"]["text"] == 50.0
    assert told["ece"]["text"] == 25.0


def test_writes_that_only_some_orders_have_count_as_none_in_the_others() -> None:
    told = together([course("+", "+", {"filled": 4}), course("+", "+", {"filled": 1, "rejected": 3})], "runs")
    assert told["writes"] == {"filled": 2.5, "rejected": 1.5}


def test_the_first_images_are_those_of_every_order() -> None:
    late = "-" * 100 + "+" * 60
    told = together([course(late, "+" * 160), course("+" * 160, late)], "iid")
    assert told["first"] == {"images": 100, "accuracy": {"text": 50.0, "more": None, "fused": 50.0}}


def test_the_worst_tenth_holds_one_order_of_ten_and_two_of_eleven() -> None:
    assert tail([5.0, 1.0, 3.0]) == 1.0
    assert tail([float(n) for n in range(10)]) == 0.0
    assert tail([float(n) for n in range(11)]) == pytest.approx(0.5)
