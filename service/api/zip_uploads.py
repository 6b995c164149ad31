"""ZIP uploads: one folder a class, checked before anything is decoded."""

from __future__ import annotations

import asyncio
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import PurePosixPath

from service.errors import InvalidRequest, LimitExceeded, ServiceError, TooManyImages
from service.settings import Settings
from service.tenants.shots import LabelledImage

ZIP_TYPES = ("application/zip", "application/x-zip-compressed")
ZIP_SIGNATURE = b"PK\x03\x04"
_LEFT_OVER = ("__MACOSX", ".DS_Store", "Thumbs.db")


@dataclass(frozen=True, kw_only=True, slots=True)
class Upload:
    """Labelled images of one call; `zipped` ones may be more than a call's usual number."""

    labelled: list[LabelledImage]
    zipped: bool = False


async def unzip(body: bytes, settings: Settings) -> Upload:
    """Return the labelled images of a ZIP; InvalidRequest if it is none or holds no files in folders."""
    labelled = await asyncio.to_thread(_unzip, body, settings)
    if not labelled:
        raise InvalidRequest("The zip holds no files in folders; put each class's images into a folder of its name.")
    return Upload(labelled=labelled, zipped=True)


def _unzip(body: bytes, settings: Settings) -> list[LabelledImage]:
    try:
        with zipfile.ZipFile(BytesIO(body)) as archive:
            entries = _entries(archive.infolist(), settings)
            return [_entry(archive, label, info, settings) for label, info in entries]
    except ServiceError:
        raise
    except Exception as error:
        # Whatever a hostile archive makes of the parsers of its many formats.
        raise InvalidRequest(f"The zip cannot be read ({type(error).__name__}).") from error


def _entries(infos: Sequence[zipfile.ZipInfo], settings: Settings) -> list[tuple[str, zipfile.ZipInfo]]:
    """Return the label and entry of every file, by what the archive's directory says, before any is unpacked."""
    files = [
        info for info in infos if not info.is_dir() and not set(PurePosixPath(info.filename).parts) & set(_LEFT_OVER)
    ]
    if len(files) > settings.max_zip_images:
        raise TooManyImages(f"The zip holds {len(files)} files; at most {settings.max_zip_images} are allowed.")
    total = sum(info.file_size for info in files)
    if total > settings.max_zip_bytes:
        raise LimitExceeded(f"The zip unpacks to {total} bytes; at most {settings.max_zip_bytes} are allowed.")
    out = []
    for info in files:
        if info.file_size > settings.max_zip_ratio * max(1, info.compress_size):
            raise LimitExceeded(f"A file in the zip unpacks to over {settings.max_zip_ratio:g} times its size.")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            # The others' headers may ask for gigabytes before a byte is unpacked.
            raise InvalidRequest("The zip is packed in an uncommon way; use the usual one (deflate), or none.")
        path = PurePosixPath(info.filename)
        if path.is_absolute() or ".." in path.parts or "\\" in info.filename:
            raise InvalidRequest("The zip holds a path that leads out of it.")
        if len(path.parts) < 2:  # noqa: PLR2004 - a folder and a file
            raise InvalidRequest("Each file of the zip must lie in a folder named by its class.")
        out.append((path.parts[-2], info))
    return out


def _entry(archive: zipfile.ZipFile, label: str, info: zipfile.ZipInfo, settings: Settings) -> LabelledImage:
    with archive.open(info) as file:
        # One byte more than allowed is enough for the darkroom to refuse it; the directory may have lied.
        return LabelledImage(label=label, image=file.read(settings.max_image_bytes + 1))
