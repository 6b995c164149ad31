"""What a user would write instead: zero-shot classification and nothing else, behind LitServe or a FastAPI handler.

Both peers (`tests.bench.lit`, `tests.bench.plain`) decode the image of a raw or a multipart body with Pillow, bring it
to the encoder's size, encode it, score it against the class weights of the default templates, and answer with the five
best classes in the shape that `dmn serve` answers in. They keep no memory and learn nothing, know one tenant, check no
limits, deadlines, orientation or colour space, and count nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
import torch
from fastapi import Request
from PIL import Image
from torch import Tensor

from core.encoders.protocol import Encoder, Preprocess
from core.prompts import DEFAULT_TEMPLATES, class_weights, prompts_of
from tests.bench.launch import load
from tests.bench.null import CLASSES

TOP = 5


class ZeroShot:
    """Bytes of an image in, answer out."""

    def __init__(self, name: str) -> None:
        self.encoder: Encoder = load(name, device=torch.device("cpu"))
        with torch.inference_mode():
            texts = [self.encoder.encode_texts(prompts_of(one, DEFAULT_TEMPLATES)) for one in CLASSES]
            self._weights = self.encoder.logit_scale * class_weights(texts).T

    def pixels(self, data: bytes) -> Tensor:
        """Return an image as the encoder's input, (3, s, s)."""
        image = _fitted(Image.open(BytesIO(data)).convert("RGB"), self.encoder.preprocess)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def answers(self, pixels: Tensor) -> list[dict[str, Any]]:
        """Return the answers to a batch of inputs, (n, 3, s, s)."""
        with torch.inference_mode():
            probabilities = (self.encoder.encode_images(pixels) @ self._weights).softmax(-1)
            scores, order = probabilities.topk(TOP)
        return [self._answer(*one) for one in zip(scores.tolist(), order.tolist(), strict=True)]

    def _answer(self, scores: Sequence[float], order: Sequence[int]) -> dict[str, Any]:
        top = [{"label": CLASSES[c], "score": score} for c, score in zip(order, scores, strict=True)]
        prediction = {**top[0], "top": top, "readouts": {"text": top[0]}, "error": None}
        return {"tenant": "default", "model": self.encoder.name, "predictions": [prediction]}


async def body(request: Request) -> bytes:
    """Return the image of a raw or a multipart body."""
    if not request.headers.get("content-type", "").startswith("multipart/"):
        return await request.body()
    async with request.form() as form:
        return await form["images"].read()


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """Return what reads the options that both peers have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--encoder", default="null")
    return parser


def _fitted(image: Image.Image, how: Preprocess) -> Image.Image:
    """Return the middle of an image whose short side has the encoder's size."""
    if image.size == (how.size, how.size):
        return image
    short, method = min(image.size), Image.Resampling[how.interpolation.upper()]
    width, height = (round(side * how.size / short) for side in image.size)
    left, top = (width - how.size) // 2, (height - how.size) // 2
    return image.resize((width, height), method).crop((left, top, left + how.size, top + how.size))
