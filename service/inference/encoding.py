"""Encoding of a batch; a batch that fails is halved until the faulty image stands alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from core.errors import InvalidFeature
from core.numerics import checked_unit
from service.errors import Internal, ServiceError
from service.telemetry import logs


def encode_each(encode: Callable[[Tensor], Tensor], images: Sequence[Tensor]) -> list[Tensor | ServiceError]:
    """Return the features of every image, or its own error.

    A batch that does not fit the device is halved; one that fails otherwise is halved too, until the guilty image
    stands alone. Its neighbours never hear of it.
    """
    try:
        features, sizes = encode(torch.cat(list(images))), [len(pixels) for pixels in images]
        with suppress(InvalidFeature):
            return list(torch.split(checked_unit(features), sizes))
        return [_usable(own) for own in torch.split(features, sizes)]
    except Exception as error:  # noqa: BLE001 - whatever it is, it must not reach the neighbours
        if len(images) > 1:
            logs.event(logs.BATCH_HALVED, images=len(images), reason=type(error).__name__)
            middle = len(images) // 2
            return encode_each(encode, images[:middle]) + encode_each(encode, images[middle:])
        return _alone(encode, images[0], error)


def _usable(features: Tensor) -> Tensor | ServiceError:
    """Return an image's features if each is a direction; what a memory takes in, it keeps."""
    try:
        return checked_unit(features)
    except InvalidFeature as error:
        logs.event(logs.BATCH_FAILED, level=logging.ERROR, error=error)
        return Internal("The encoder gave no usable feature for this image.")


def _alone(encode: Callable[[Tensor], Tensor], views: Tensor, error: Exception) -> list[Tensor | ServiceError]:
    """Encode the views of one image in halves if there is too little room for all, else blame the image."""
    if isinstance(error, torch.OutOfMemoryError) and len(views) > 1:
        parts = [encode_each(encode, [half])[0] for half in views.chunk(2)]
        failed = next((part for part in parts if isinstance(part, ServiceError)), None)
        return [failed or torch.cat([part for part in parts if isinstance(part, Tensor)])]
    logs.event(logs.BATCH_FAILED, level=logging.ERROR, error=error)
    return [Internal("The encoder failed on this image.")]
