from __future__ import annotations

from dataclasses import fields

import torch

from core.readout.projection import Projection, project_query, project_slots, project_text


def _offsets() -> Projection:
    return Projection(
        query=torch.tensor([[2.0, 2.0], [0.0, 4.0]]),
        key=torch.tensor([[1.0, 0.0], [2.0, 0.0]]),
        value=torch.tensor([[0.0, 1.0], [0.0, 2.0]]),
        output=torch.tensor([[0.5, 0.0], [0.0, 0.5]]),
        text=torch.tensor([[2.0, 4.0], [0.0, 0.0]]),
    )


def test_zeros_are_five_matrices_of_zeros() -> None:
    zeros = Projection.zeros(3, 2)
    names = {field.name for field in fields(zeros)}
    assert names == {"query", "key", "value", "output", "text"}
    assert all(torch.equal(getattr(zeros, name), torch.zeros(3, 2)) for name in names)


def test_text_is_moved_by_its_class_offset_and_normalised() -> None:
    got = project_text(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), _offsets())
    torch.testing.assert_close(got, torch.tensor([[0.6, 0.8], [0.0, 1.0]]))


def test_a_query_is_moved_by_the_mean_of_all_offsets() -> None:
    got = project_query(torch.tensor([[2.0, 1.0]]), _offsets())  # mean offset: (1, 3)
    torch.testing.assert_close(got, torch.tensor([[0.6, 0.8]]))


def test_a_slot_is_moved_by_the_offset_of_its_class() -> None:
    keys = torch.tensor([[[2.0, 4.0]], [[1.0, 4.0]]])
    got = project_slots(keys, _offsets().key)
    torch.testing.assert_close(got, torch.tensor([[[0.6, 0.8]], [[0.6, 0.8]]]))


def test_without_offsets_slots_are_normalised_alone() -> None:
    got = project_slots(torch.tensor([[[3.0, 4.0], [0.0, 0.0]]]), None)
    torch.testing.assert_close(got, torch.tensor([[[0.6, 0.8], [0.0, 0.0]]]))


def test_without_offsets_text_and_query_stay_as_they_are() -> None:
    features = torch.tensor([[0.6, 0.8]])
    assert project_text(features, None) is features
    assert project_query(features, None) is features


def test_the_offsets_of_some_classes_keep_every_query_offset() -> None:
    """Eq. (7) takes the mean over all classes, whichever are read."""
    offsets = _offsets()
    some = offsets.of(torch.tensor([1]))
    assert torch.equal(some.query, offsets.query)
    for name in ("key", "value", "output", "text"):
        assert torch.equal(getattr(some, name), getattr(offsets, name)[1:])


def test_the_offsets_of_some_classes_come_in_their_order() -> None:
    offsets = _offsets()
    turned = offsets.of(torch.tensor([1, 0]))
    assert torch.equal(turned.key, offsets.key.flip(0))
