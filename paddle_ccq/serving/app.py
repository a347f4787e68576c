# SPDX-License-Identifier: Apache-2.0
"""The routes: the OpenAI API under /v1, and what operators ask for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST

from ..version import __version__
from . import errors, schema
from .answers import Answer, ChatAnswer, CompletionAnswer
from .edge import Api
from .gate import Gate
from .protocol import DEFAULT_COMPLETION_TOKENS, ChatRequest, Common, CompletionRequest
from .service import Service, unavailable


def create_app(service: Service) -> FastAPI:
    """The application of one service."""
    app = Api(service.settings.allow_origins, title="paddle-ccq", version=__version__)
    app.add_middleware(Gate, service=service, takes=app.takes)
    errors.install(app)
    schema.install(app, service.settings.name)
    _add_operations(app, service)

    @app.get("/v1/models", response_model=schema.ModelList, responses=schema.errors(401, 503))
    async def models() -> dict[str, Any]:
        """The one model that is served; a server that is loading answers 503."""
        return {"object": "list", "data": [describe(service)]}

    @app.get(
        "/v1/models/{name:path}",
        response_model=schema.Model,
        responses=schema.errors(401, 404, 503),
    )
    async def model(name: str) -> dict[str, Any]:
        """The served model; 404 for every other name."""
        service.check_model(name)
        return describe(service)

    @app.post("/v1/completions", responses=schema.answers(schema.Completion))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue one prompt or several; 400 names a field that is wrong or has no effect here."""
        service.check_model(body.model)
        given, begin = body.prompt, body.add_special_tokens is not False
        if isinstance(given, str) or isinstance(given[0], int):
            given = [given]
        prompts = [
            await service.encode(prompt, begin, "prompt") if isinstance(prompt, str) else prompt
            for prompt in given
        ]
        budget = service.token_budget(
            prompts, body.max_tokens, DEFAULT_COMPLETION_TOKENS, "prompt", "max_tokens"
        )
        return await answer(service, request, body, prompts, budget, CompletionAnswer)

    @app.post("/v1/chat/completions", responses=schema.answers(schema.ChatCompletion))
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer messages in the model's chat template; 400 names a field that is wrong."""
        service.check_model(body.model)
        messages = [message.plain() for message in body.messages]
        prompt = await service.encode_chat(messages, body.add_special_tokens)
        asked, name = body.max_completion_tokens, "max_completion_tokens"
        if asked is None:
            asked, name = body.max_tokens, "max_tokens"
        budget = service.token_budget([prompt], asked, None, "messages", name)
        return await answer(service, request, body, [prompt], budget, ChatAnswer)

    return app


async def answer(
    service: Service,
    request: Request,
    body: Common,
    prompts: Sequence[Sequence[int]],
    budget: int,
    kind: type[Answer],
) -> Response:
    """Generate, and answer whole or in a stream."""
    n = body.n or 1
    params = body.sampling(budget, body.wanted_logprobs(), service.defaults)
    generation = service.submit(request, prompts, params, n)
    made = kind(service, body, prompts)
    if not body.stream:
        return JSONResponse(await made.whole(generation))
    options = body.stream_options
    events = made.events(generation, options is not None and bool(options.include_usage))
    # Proxies that collect answers would take the point out of a stream.
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


def describe(service: Service) -> dict[str, Any]:
    """The served model as /v1/models lists it, in OpenAI's form with vLLM's max_model_len."""
    return {
        "id": service.settings.name,
        "object": "model",
        "created": service.created,
        "owned_by": "paddle-ccq",
        "max_model_len": service.settings.max_length,
    }


def _add_operations(app: FastAPI, service: Service) -> None:
    async def health() -> dict[str, str]:
        """200 when requests are taken, 503 while loading or draining."""
        if service.state != "ready":
            raise unavailable(service.state)
        return {"status": "ok"}

    for path in ("/health", "/ping"):
        app.get(path, responses=schema.errors(503))(health)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counts, times and the queue for Prometheus, by the names that FastDeploy has."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)
