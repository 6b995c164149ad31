from __future__ import annotations

import copy
from typing import Any

import open_clip
import pytest
import torch
from torch import nn

from core.encoders import openclip
from core.encoders.towers.simplify import ClassTokenBlock, features_of, make_leaner
from core.numerics import unit

VISION: dict[str, Any] = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}


def vision(seed: int = 0, **settings: Any) -> nn.Module:
    """Return a small vision tower of open_clip's, of which no weight is zero or one."""
    torch.manual_seed(seed)
    with openclip._quiet():
        tower: nn.Module = open_clip.model._build_vision_tower(16, {**VISION, **settings})
    with torch.no_grad():
        for value in (*tower.parameters(), *tower.buffers()):
            if value.is_floating_point():
                value.add_(torch.rand_like(value) * 0.1)
    return tower.eval().requires_grad_(requires_grad=False)


def inputs(n: int = 3, size: int = 32) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def leaner(tower: nn.Module) -> nn.Module:
    changed = copy.deepcopy(tower)
    make_leaner(changed, inputs())
    return changed


def count(tower: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in tower.modules())


@pytest.mark.parametrize(
    "settings", [{}, {"ls_init_value": 0.1}, {"final_ln_after_pool": True}, {"no_ln_pre": True}, {"patch_dropout": 0.5}]
)
def test_the_class_token_alone_goes_through_the_last_block_and_features_stay(settings: dict[str, Any]) -> None:
    tower = vision(**settings)
    changed = leaner(tower)
    assert count(changed, ClassTokenBlock) == 1
    torch.testing.assert_close(unit(changed(inputs(5))), unit(tower(inputs(5))), rtol=0, atol=1e-6)


@pytest.mark.parametrize("settings", [{"pool_type": "avg"}, {"attentional_pool": True}])
def test_where_other_tokens_are_read_the_last_block_stays(settings: dict[str, Any]) -> None:
    tower = vision(**settings)
    assert count(leaner(tower), ClassTokenBlock) == 0


def test_batch_norms_go_into_their_convolutions_and_features_stay() -> None:
    tower = vision(layers=[1, 1, 1, 1], width=8, image_size=64)
    make_leaner(changed := copy.deepcopy(tower), inputs(size=64))
    assert count(tower, nn.BatchNorm2d) > 0
    assert count(changed, nn.BatchNorm2d) == 0
    torch.testing.assert_close(unit(changed(inputs(5, 64))), unit(tower(inputs(5, 64))), rtol=0, atol=1e-5)


def test_a_leaner_tower_keeps_nothing_of_what_it_computes() -> None:
    make_leaner(changed := vision(layers=[1, 1, 1, 1], width=8, image_size=64), inputs(size=64))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in changed.modules())


class TwoReaders(nn.Module):
    """Reads a convolution past its batch norm, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 16), nn.BatchNorm2d(8)
        self.norm.running_mean = torch.linspace(-1, 1, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.conv(x)
        return (made.relu() + self.norm(made)).mean((2, 3))


def test_what_would_change_the_features_is_put_back() -> None:
    torch.manual_seed(0)
    tower = TwoReaders().eval()
    make_leaner(changed := copy.deepcopy(tower), inputs())
    assert isinstance(changed.norm, nn.BatchNorm2d)
    torch.testing.assert_close(changed(inputs()), tower(inputs()))


def test_tokens_beside_the_features_are_left_behind() -> None:
    tower = vision(output_tokens=True)
    assert features_of(leaner(tower), inputs()).shape == (3, 16)
