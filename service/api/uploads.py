"""Bodies -> images: multipart, raw, base64 in JSON, and zips of folders."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from service.api.schemas.classify import ClassifyIn
from service.errors import InvalidRequest, TooManyImages, UnsupportedBody
from service.images.errors import ImageFault, ImageUnreadable
from service.settings import Settings
from service.tenants.shots import LabelledImage

from .zip_uploads import ZIP_SIGNATURE, ZIP_TYPES, Upload, unzip

Images = list[bytes | ImageFault]

_MULTIPART = "multipart/form-data"


async def read_images(request: Request, settings: Settings) -> Images:
    """Return the images of a classify call, in order.

    Raises:
        UnsupportedBody: the content type is none that the route takes.
        InvalidRequest: the body is malformed or holds no image.
        TooManyImages: it holds too many.
    """
    kind = _kind(request)
    if kind == _MULTIPART:
        async with _form(request, settings) as form:
            return await _files(form, settings)
    if kind.startswith("image/"):
        return [await request.body()]
    if kind == "application/json":
        return await asyncio.to_thread(_from_json, await request.body(), settings)
    raise UnsupportedBody(
        f"The content type {kind[:100]!r} is not taken here. Send multipart/form-data with `images`, a raw image/* "
        "body, or application/json with base64."
    )


async def read_shots(request: Request, settings: Settings) -> Upload:
    """Return the labelled images of an upload: multipart `label` and `images`, or a zip of folders named by class.

    Raises:
        UnsupportedBody, InvalidRequest, TooManyImages, LimitExceeded: as for `read_images`.
    """
    kind = _kind(request)
    if kind in ZIP_TYPES:
        return await unzip(await request.body(), settings)
    if kind != _MULTIPART:
        raise UnsupportedBody("Send multipart/form-data with `label` and `images`, or an application/zip body.")
    async with _form(request, settings) as form:
        images = await _files(form, settings)
        labels = form.getlist("label")
    if not labels and len(images) == 1 and isinstance(images[0], bytes) and images[0].startswith(ZIP_SIGNATURE):
        return await unzip(images[0], settings)
    if len(labels) != 1 or not isinstance(labels[0], str):
        raise InvalidRequest("An upload has one text field `label`, the class that its images show.")
    return Upload(labelled=[LabelledImage(label=labels[0], image=image) for image in images])


def _kind(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


@asynccontextmanager
async def _form(request: Request, settings: Settings) -> AsyncIterator[FormData]:
    """Parse a multipart body, which has to be whole and whose text has to be UTF-8; its files go with the context."""
    most = settings.max_images
    parser = _Parser(request.headers, request.stream(), max_files=most, max_fields=most)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            raise TooManyImages(f"The call holds more than the {most} images that are allowed.") from error
        raise InvalidRequest(f"The multipart body cannot be read: {error.message.rstrip('.')}.") from error
    except (UnicodeError, KeyError) as error:
        raise InvalidRequest("The multipart body has no boundary, or names a charset that there is not.") from error
    try:
        if not parser.whole:
            raise InvalidRequest("The multipart body is cut off: its closing boundary is missing.")
        yield form
    finally:
        await form.close()
        parser.close()


class _Parser(MultiPartParser):
    """Starlette's parser, which alone would take a body that is cut off, and guess what text that is no UTF-8 means."""

    whole = False

    def close(self) -> None:
        """Close the file of a part that was cut off; no form knows of it."""
        for file in self._files_to_close_on_error:
            file.close()

    def on_headers_finished(self) -> None:
        self._charset = "utf-8"  # whatever the header says: a label must not depend on it
        super().on_headers_finished()

    def on_part_end(self) -> None:
        part = self._current_part
        if part.file is None:
            try:
                bytes(part.data).decode()
            except UnicodeDecodeError as error:
                raise MultiPartException("A text field is not UTF-8.") from error
        super().on_part_end()

    def on_end(self) -> None:
        self.whole = True
        super().on_end()


async def _files(form: FormData, settings: Settings) -> Images:
    parts = form.getlist("images")
    if not parts:
        raise InvalidRequest("The multipart body has no part named `images`.")
    _check_count(len(parts), settings)
    if not all(isinstance(part, UploadFile) for part in parts):
        raise InvalidRequest("Each part named `images` must be a file: give it a file name.")
    return [await part.read() for part in parts if isinstance(part, UploadFile)]


def _from_json(body: bytes, settings: Settings) -> Images:
    try:
        call = ClassifyIn.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "body"
        raise InvalidRequest(f"{place}: {first['msg']}.") from error
    if not call.images:
        raise InvalidRequest("The body names no images.")
    _check_count(len(call.images), settings)
    return [_from_base64(image.data) for image in call.images]


def _from_base64(data: str) -> bytes | ImageFault:
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        return ImageUnreadable("The image's `data` is not valid base64.")


def _check_count(images: int, settings: Settings) -> None:
    if images > settings.max_images:
        raise TooManyImages(f"The call holds {images} images; at most {settings.max_images} are allowed.")
