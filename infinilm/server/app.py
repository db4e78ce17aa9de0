"""The app: every route of the server, over one `AsyncLLM`."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from pydantic_core import from_json
from starlette.responses import Response

from infinilm import __version__
from infinilm.async_llm import AsyncLLM
from infinilm.plugins.report import Status
from infinilm.server.chat import Chat
from infinilm.server.completions import Continuation
from infinilm.server.errors import ApiError, add_error_handlers
from infinilm.server.middleware import Admission, Authentication, Tracing
from infinilm.server.page import chat_page
from infinilm.server.protocol import ChatRequest, CompletionRequest
from infinilm.server.responses import (
    ChatCompletion,
    Completion,
    ErrorResponse,
    Health,
    ModelCard,
    ModelList,
    PluginVersion,
    Version,
)
from infinilm.server.service import Service
from infinilm.server.settings import Settings
from infinilm.server.streaming import ClientGoneError, EventStream, unless_disconnected, within
from infinilm.server.trace import Trace

_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorResponse} for status in ("4XX", 500, 503, 504)}
_EVENT = {
    "type": "object",
    "properties": {"data": {"type": "string", "description": "A chunk or an error as JSON, or [DONE]."}},
    "required": ["data"],
}
_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": _EVENT}}, "description": "An answer, or the events of one."}
}
_CLIENT_CLOSED_REQUEST = 499


class _StrictRequest(Request):
    """Takes JSON as the standard has it: no NaN, no half of a surrogate pair, no nesting without end."""

    async def json(self) -> Any:
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as err:
            raise ApiError(400, f"the body is not JSON: {err}", code="invalid_json") from err


class _StrictRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handling(request: Request) -> Response:
            return await handler(_StrictRequest(request.scope, request.receive))

        return handling


def create_app(engine: AsyncLLM, settings: Settings) -> FastAPI:
    """Return the ASGI app that serves `engine`. Closing the engine is the caller's."""
    service = Service(engine, settings)
    app = FastAPI(title="infinilm", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    add_error_handlers(app)
    app.include_router(_models(service))
    app.include_router(_operations(service))
    app.include_router(_generation(service))
    app.add_middleware(Admission, limits=settings.limits, guarded_paths=frozenset({_CHAT, _COMPLETIONS}))
    app.add_middleware(Authentication, api_keys=settings.api_keys)
    app.add_middleware(Tracing, metrics=service.metrics)  # the last one added is the outermost
    return app


def _generation(service: Service) -> APIRouter:
    router = APIRouter(route_class=_StrictRoute)

    @router.post(_CHAT, response_model=ChatCompletion, responses=_ERRORS | _STREAMED)
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        return await _answer(service, request, body.stream, Chat.prepare(service, body, _trace(request)))

    @router.post(_COMPLETIONS, response_model=Completion, responses=_ERRORS | _STREAMED)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue prompts."""
        return await _answer(service, request, body.stream, Continuation.prepare(service, body, _trace(request)))

    return router


async def _answer(
    service: Service, request: Request, is_streamed: bool | None, preparing: Coroutine[Any, Any, Chat | Continuation]
) -> Response:
    """Return the answer whole, or as the stream it will be. Ends the work of a client that left."""
    timeout = service.settings.limits.request_timeout
    job = await preparing
    if is_streamed:
        return EventStream(job.stream(), timeout=timeout)
    try:
        answer = await unless_disconnected(request.receive, within(timeout, job.complete()))
    except ClientGoneError:
        return Response(status_code=_CLIENT_CLOSED_REQUEST)
    return _json(answer)


def _models(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models", responses=_ERRORS)
    async def list_models() -> ModelList:
        """List the names of the model."""
        return ModelList(data=[_card(service, name) for name in service.settings.served_model_names])

    @router.get("/v1/models/{name:path}", responses=_ERRORS)
    async def retrieve_model(name: str) -> ModelCard:
        """Describe the model by one of its names."""
        service.check_model(name)
        return _card(service, name)

    return router


def _operations(service: Service) -> APIRouter:
    router = APIRouter()
    engine = service.engine

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        return chat_page()

    @router.get("/health", response_model=Health, responses={503: {"model": Health}})
    async def health() -> Response:
        """Say whether the server serves, and why not."""
        reason = engine.health()
        if reason is None:
            return _json(Health(status="ok"))
        return _json(Health(status="unavailable", reason=reason), 503)

    @router.get("/metrics", response_class=Response, responses=_ERRORS | {200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Give the metrics in Prometheus' text format."""
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/version", responses=_ERRORS)
    async def version() -> Version:
        """Say what runs: versions of infinilm, of the weights and of every active plugin."""
        records = engine.llm.plugin_manager.records
        plugins = [
            PluginVersion(name=it.name, origin=it.origin, distribution=it.distribution, version=it.version)
            for it in records
            if it.status is Status.ACTIVE
        ]
        return Version(
            version=__version__,
            model=service.settings.served_model_names[0],
            weight_version=engine.stats().weight_version,
            plugins=plugins,
        )

    return router


def _card(service: Service, name: str) -> ModelCard:
    llm = service.engine.llm
    root = service.settings.served_model_names[0]
    return ModelCard(id=name, created=service.started, root=root, max_model_len=llm.engine.max_model_len)


def _json(model: BaseModel, status_code: int = 200) -> Response:
    return Response(model.model_dump_json(), status_code, media_type="application/json")


def _trace(request: Request) -> Trace:
    trace = request.state.trace
    assert isinstance(trace, Trace)
    return trace
