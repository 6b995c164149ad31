"""The peer that is a plain FastAPI handler without batching: `python -m tests.bench.plain --port PORT`.

It does all of its work on the event loop: on one core nothing is faster. `tests.bench.zeroshot` says what it does.
"""

from __future__ import annotations

import json
from typing import Annotated

import uvicorn
from fastapi import Depends, FastAPI, Response

from tests.bench.zeroshot import ZeroShot, arguments, body


def create_app(model: ZeroShot) -> FastAPI:
    """Return the application."""
    app = FastAPI()

    @app.post("/classify")
    async def classify(data: Annotated[bytes, Depends(body)]) -> Response:
        (answer,) = model.answers(model.pixels(data)[None])
        return Response(json.dumps(answer), media_type="application/json")

    @app.get("/health")
    async def health() -> str:
        return "ok"

    return app


if __name__ == "__main__":
    options = arguments(__doc__).parse_args()
    app = create_app(ZeroShot(options.encoder))
    uvicorn.run(app, host="127.0.0.1", port=options.port, access_log=False, log_level="error")
