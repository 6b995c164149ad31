"""What core may refuse.

CoreError
├── InvalidFeature      a feature is non-finite, zero, or of the wrong size
├── InvalidStream       a stream file lacks an array or holds a wrong one
├── InvalidImage        a picture cannot be turned into views
├── UnfitShots          the shots are too few or too unequal to be trained on
├── IncompatibleMemory  a memory belongs to another fingerprint or format
└── EncoderUnavailable  an encoder's weights cannot be had or do not fit
"""

import textwrap


class CoreError(Exception):
    """Base of every error that core raises on purpose."""


class InvalidFeature(CoreError, ValueError):
    """A feature is non-finite, zero, or of the wrong size."""


class InvalidStream(CoreError, ValueError):
    """A stream file lacks an array, or holds one that does not fit the others."""


class InvalidImage(CoreError, ValueError):
    """A picture cannot be turned into views of the encoder's size."""


class UnfitShots(CoreError, ValueError):
    """The shots are too few, or too unequal in number, to be trained on."""


class IncompatibleMemory(CoreError):
    """A memory belongs to another fingerprint or to an unknown format."""


class EncoderUnavailable(CoreError):
    """An encoder cannot be had; the message says what was asked for, why it failed and what to do."""


def reason(error: BaseException) -> str:
    """Return what an error of a library says, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]).rstrip(".") or type(error).__name__
    return textwrap.shorten(text, 240, placeholder="...")
