"""A small HTTP service around a bundle, with a page where the dial is turned.

    GREENPRUNE_BUNDLE=digits.bundle uvicorn service:app

| request | answer |
|---|---|
| ``GET /`` | the page |
| ``POST /classify``, an image as the body | class, route, score, whether certified, millijoules |
| ``GET /dial`` | the rows of the dial, the policy in force, counts since the start |
| ``PUT /policy``, ``{"max_accuracy_loss": 0.02}`` | turns the dial; the new ``/dial`` |
| ``GET /healthz`` | 200 once the networks are loaded |

Nothing asks who is calling: keep it behind something that does.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from greenprune.errors import GreenpruneError
from greenprune.runtime import AdaptiveSession, Policy

PAGE = Path(__file__).parent / "dial.html"
LARGEST_IMAGE, LARGEST_POLICY = 8 << 20, 1 << 10
"""Bytes of a request's body."""
POLICY_KEYS = ("max_accuracy_loss", "energy_budget_mj", "route")


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """Open the bundle before the first request, close it after the last."""
    with AdaptiveSession(os.environ["GREENPRUNE_BUNDLE"]) as session:
        session.warmup()
        app.state.session = session
        yield


async def page(request: Request) -> Response:
    """The page."""
    return FileResponse(PAGE, media_type="text/html")


async def healthz(request: Request) -> Response:
    """For whatever restarts services."""
    return PlainTextResponse("ok")


async def classify(request: Request) -> Response:
    """Classify the image in the body."""
    session: AdaptiveSession = request.app.state.session
    body = await read_body(request, LARGEST_IMAGE)
    try:
        image = await run_in_threadpool(decode, body, session.get_inputs()[0].shape)
    except Exception:  # Pillow raises many kinds for damaged files
        return refusal(415, "expected a PNG or JPEG image as the body")
    return JSONResponse(await run_in_threadpool(answer, session, image))


async def read_body(request: Request, largest: int) -> bytes:
    """The body, no more than ``largest`` bytes of it."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > largest:
            raise HTTPException(413, f"expected a body of at most {largest} bytes")
    return bytes(body)


def answer(session: AdaptiveSession, image: NDArray[np.uint8]) -> dict[str, Any]:
    """The session's answer to an image of its size and channels."""
    inputs = session.preprocess(image)
    (logits,), info = session.run_with_info(None, {session.get_inputs()[0].name: inputs})
    score = float(info.scores[0])
    return {
        "label": session.class_names[int(logits[0].argmax())],
        "route": info.routes[0],
        "score": None if math.isnan(score) else score,
        "certified": info.certified[0],
        "degraded": info.degraded[0],
        "fault": info.faults[0],
        "energy_mj": info.energies_mj[0],
        "energy_provenance": info.energy_provenance,
    }


def decode(body: bytes, shape: list[int | str]) -> NDArray[np.uint8]:
    """The image at the bundle's size and channels, uint8."""
    _, channels, height, width = shape
    with Image.open(io.BytesIO(body), formats=["PNG", "JPEG"]) as image:
        converted = image.convert("L" if channels == 1 else "RGB")
    return np.asarray(converted.resize((int(width), int(height)), Image.Resampling.BILINEAR))


async def dial(request: Request) -> Response:
    """The dial, and how the service is doing."""
    return JSONResponse(described(request.app.state.session))


async def set_policy(request: Request) -> Response:
    """Turn the dial; calls in flight end under the policy that they began with."""
    session: AdaptiveSession = request.app.state.session
    try:
        asked = json.loads(await read_body(request, LARGEST_POLICY))
    except (ValueError, RecursionError):
        asked = None
    if not isinstance(asked, dict) or set(asked) - set(POLICY_KEYS):
        return refusal(400, f"expected a JSON object with some of {', '.join(POLICY_KEYS)}")
    try:
        await run_in_threadpool(setattr, session, "policy", Policy(**asked))  # may open a network
    except GreenpruneError as error:
        return refusal(409, str(error))
    return JSONResponse(described(session))


def described(session: AdaptiveSession) -> dict[str, Any]:
    policy = {key: getattr(session.policy, key) for key in POLICY_KEYS}
    return {
        "rows": [dataclasses.asdict(row) for row in session.dial],
        "policy": {key: value for key, value in policy.items() if value is not None},
        "threshold": session.threshold,
        "statistics": dataclasses.asdict(session.statistics),
    }


def refusal(status: int, why: str) -> Response:
    return JSONResponse({"error": why}, status_code=status)


def refused(request: Request, error: HTTPException) -> Response:
    """Of an unknown path or method, or a body that is too large."""
    return refusal(error.status_code, error.detail)


def failed(request: Request, error: Exception) -> Response:
    """Of what should not happen; uvicorn logs the traceback."""
    return refusal(500, "the service failed; its log says why")


app = Starlette(
    routes=[
        Route("/", page),
        Route("/healthz", healthz),
        Route("/classify", classify, methods=["POST"]),
        Route("/dial", dial),
        Route("/policy", set_policy, methods=["PUT"]),
    ],
    exception_handlers={HTTPException: refused, Exception: failed},
    lifespan=lifespan,
)
