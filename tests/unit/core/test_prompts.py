from __future__ import annotations

import torch

from core.prompts import DEFAULT_TEMPLATES, class_weights, prompts_of


def test_the_default_templates_are_the_papers_seven() -> None:
    assert set(DEFAULT_TEMPLATES) == {
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    }
    assert len(DEFAULT_TEMPLATES) == 7


def test_underscores_of_a_name_become_spaces() -> None:
    assert prompts_of("hot_dog_stand", ["a {}."]) == ("a hot dog stand.",)


def test_sentences_follow_the_templates_and_stay_as_they_are() -> None:
    got = prompts_of("fire_ant", ["a {}.", "art of the {}."], ["A small_red {} ant."])
    assert got == ("a fire ant.", "art of the fire ant.", "A small_red {} ant.")


def test_braces_of_a_name_or_a_template_are_text() -> None:
    assert prompts_of("{0} {x}", ["a {} {y}"]) == ("a {0} {x} {y}",)


def test_a_class_may_live_by_its_sentences_alone() -> None:
    assert prompts_of("ant", [], ["An ant."]) == ("An ant.",)


def test_class_weights_average_directions_and_not_lengths() -> None:
    features = torch.tensor([[100.0, 0.0], [0.0, 0.001]])
    half = 0.5**0.5
    torch.testing.assert_close(class_weights([features]), torch.tensor([[half, half]]))


def test_class_weights_are_one_row_a_class_whatever_the_number_of_prompts() -> None:
    got = class_weights([torch.tensor([[0.0, 2.0]]), torch.tensor([[3.0, 4.0], [3.0, 4.0], [3.0, 4.0]])])
    torch.testing.assert_close(got, torch.tensor([[0.0, 1.0], [0.6, 0.8]]))
