"""What can be wrong with an image."""

from __future__ import annotations

from typing import ClassVar


class ImageFault(Exception):
    """Why one image cannot be used; the message is for the person who sent it."""

    slug: ClassVar[str]
    status: ClassVar[int]


class UnsupportedMediaType(ImageFault):
    """The image has a format that is known, and not accepted here."""

    slug = "unsupported-media-type"
    status = 415


class ImageUnreadable(ImageFault):
    """The bytes are no picture, or a broken one."""

    slug = "image-unreadable"
    status = 422


class ImageTooLarge(ImageFault):
    """The image has more bytes or pixels than allowed."""

    slug = "image-too-large"
    status = 413


class Heavy(Exception):
    """Decoding an image takes `cost` bytes of memory, more than it may take now. Nothing was decoded."""

    def __init__(self, cost: int) -> None:
        super().__init__(cost)
        self.cost = cost
