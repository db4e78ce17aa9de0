"""Errors as a client of OpenAI's API reads them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from infinilm_hookspecs import RequestError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable",
    504: "timeout_error",
}
_OPTION = re.compile(r"SamplingParams: (\w+)=")


class ApiError(HTTPException):
    """A refusal with its HTTP status; `param` is the field at fault, `code` a word a program may look at."""

    def __init__(
        self,
        status_code: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status_code, message, headers)
        self.param = param
        self.code = code


def error_body(status_code: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return an error in OpenAI's shape."""
    kind = _TYPES.get(status_code, "server_error" if status_code >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def as_api_error(err: Exception) -> ApiError:
    """Return what a client is told of an error. What nobody meant for clients is not told: it is in the log."""
    if isinstance(err, ApiError):
        return err
    if isinstance(err, RequestError):
        option = _OPTION.match(str(err))
        return ApiError(400, str(err), param=option[1] if option else None)
    return ApiError(500, "the server failed on this request; its log says more, under the request's id")


def error_response(err: ApiError) -> JSONResponse:
    """Return an error as a response."""
    return JSONResponse(error_body(err.status_code, err.detail, err.param, err.code), err.status_code, err.headers)


def add_error_handlers(app: FastAPI) -> None:
    """Have every error of a route answered in OpenAI's shape."""
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(RequestError, _answer_request_error)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)


async def _answer_http_exception(request: Request, err: Exception) -> JSONResponse:
    assert isinstance(err, HTTPException)
    if isinstance(err, ApiError):
        return error_response(err)
    where = f"{request.method} {request.url.path}"
    message = {404: f"there is no {where}", 405: f"{where} is not allowed"}.get(err.status_code, err.detail)
    return error_response(ApiError(err.status_code, message, headers=err.headers))


async def _answer_request_error(request: Request, err: Exception) -> JSONResponse:
    assert isinstance(err, RequestError)
    return error_response(as_api_error(err))


async def _answer_validation_error(request: Request, err: Exception) -> JSONResponse:
    assert isinstance(err, RequestValidationError)
    return error_response(_describe_validation(err.errors(), err.body))


def _describe_validation(problems: Sequence[Any], body: Any) -> ApiError:
    """Return one problem of a body by the name of its field: of a union's, that of the member that came furthest."""
    problem = max(problems, key=lambda it: (it["type"] == "extra_forbidden", len(it["loc"])))
    name = _path(problem["loc"][1:], body) or None
    if problem["type"] == "extra_forbidden":
        return ApiError(
            400, f"{name} is not supported by this server; leave it out", param=name, code="unknown_parameter"
        )
    if problem["type"] == "missing":
        where = f"{name} is required" if name else "a JSON body is required, with Content-Type: application/json"
        return ApiError(400, where, param=name, code="missing_required_parameter")
    given = repr(problem.get("input"))
    shown = given if len(given) <= 80 else given[:77] + "..."
    return ApiError(400, f"{name or 'the body'}: {problem['msg']}, not {shown}", param=name, code="invalid_value")


def _path(location: Sequence[str | int], body: Any) -> str:
    """Return where in the body a problem is, without the names of models that pydantic tried on the way."""
    found: list[str] = []
    for at, part in enumerate(location):
        is_last = at == len(location) - 1
        if isinstance(body, dict) and (part in body or is_last):
            body = body.get(part)
        elif isinstance(body, list) and isinstance(part, int) and part < len(body):
            body = body[part]
        else:
            continue
        found.append(str(part))
    return ".".join(found)
