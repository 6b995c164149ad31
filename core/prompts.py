"""Class names and sentences -> prompts -> class weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .numerics import unit

DEFAULT_TEMPLATES: tuple[str, ...] = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
"""The seven templates of the paper's general prompt set."""

PLACEHOLDER = "{}"


def prompts_of(name: str, templates: Sequence[str], sentences: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the templates filled with the name, underscores as spaces, and then the class's own sentences."""
    spoken = name.replace("_", " ")
    # Not str.format: a name or a template may hold braces of its own.
    return (*(template.replace(PLACEHOLDER, spoken) for template in templates), *sentences)


def class_weights(features: Sequence[Float[Tensor, "_ d"]]) -> Float[Tensor, "c d"]:
    """Return t_c = u(mean over the prompts of class c of u(E_text(p))), Eq. (1), from the features of each class."""
    return unit(torch.stack([unit(own).mean(0) for own in features]))
