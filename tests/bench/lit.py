"""The peer behind LitServe: `python -m tests.bench.lit --port PORT [--batch 16] [--wait-ms 1]`.

`tests.bench.zeroshot` says what it does; images are decoded and encoded in its worker, in batches.
"""

# No `from __future__ import annotations` here: LitServe takes the annotation of `decode_request` as it stands.
import json
from typing import Annotated, Any

import litserve
import torch
from fastapi import Depends, Response
from torch import Tensor

from tests.bench.zeroshot import ZeroShot, arguments, body


class Classify(litserve.LitAPI):
    """One model in one worker, which decodes and encodes; whole batches, or one image at a time."""

    def __init__(self, encoder: str, **options: Any) -> None:
        super().__init__(**options)
        self._encoder = encoder

    def setup(self, device: str) -> None:  # noqa: ARG002 - the CPU
        self.model = ZeroShot(self._encoder)

    def decode_request(self, request: Annotated[bytes, Depends(body)]) -> Tensor:
        return self.model.pixels(request)

    def batch(self, inputs: list[Tensor]) -> Tensor:
        return torch.stack(inputs)

    def predict(self, x: Tensor) -> list[dict[str, Any]]:
        return self.model.answers(x if x.ndim == 4 else x[None])

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output: dict[str, Any] | list[dict[str, Any]]) -> Response:
        answer = output[0] if isinstance(output, list) else output
        return Response(json.dumps(answer), media_type="application/json")


def serve(encoder: str, port: int, *, batch: int, wait_ms: float) -> None:
    """Serve on a port with one worker and LitServe's fast queue."""
    api = Classify(encoder, max_batch_size=batch, batch_timeout=wait_ms / 1000, api_path="/classify")
    server = litserve.LitServer(api, accelerator="cpu", devices=1, workers_per_device=1, fast_queue=True)
    quiet = {"generate_client_file": False, "log_level": "error", "access_log": False}
    server.run(host="127.0.0.1", port=port, num_api_servers=1, **quiet)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--batch", type=int, default=16, help="images a batch at most")
    parser.add_argument("--wait-ms", type=float, default=1.0, help="how long a batch waits for more")
    options = parser.parse_args()
    serve(options.encoder, options.port, batch=options.batch, wait_ms=options.wait_ms)
