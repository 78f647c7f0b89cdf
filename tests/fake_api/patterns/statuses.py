"""Answers that are errors, or that point elsewhere."""

import json
from typing import Final

from tests.fake_api.exchange import Exchange

__all__ = ["redirect", "status", "status_without_body"]

_KINDS: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}


async def status(
    ask: Exchange,
    *,
    code: int = 500,
    retry_after: int | float | str = "",
    retry_after_ms: int | float | str = "",
    body: str = "json",
) -> None:
    """An error with the API's JSON, a page (`body=html`), or nothing (`body=none`). Its message quotes the request's
    key, as some do: it must come to no client and no log.
    """
    fields = [("retry-after", str(retry_after)), ("retry-after-ms", str(retry_after_ms))]
    key = ask.seen.headers.get("authorization", "").removeprefix("Bearer ") or ask.seen.headers.get("x-api-key", "")
    said = json.dumps(ask.dialect.error(code, _KINDS.get(code, "api_error"), f"Said by the fake API of key {key}"))
    html = "<!doctype html><title>Error</title>"
    content = {"json": ("application/json", said), "html": ("text/html", html), "none": ("text/plain", "")}[body]
    await ask.whole(code, content[0], content[1].encode(), [(name, value) for name, value in fields if value])


async def status_without_body(ask: Exchange, *, code: int = 204) -> None:
    """A head and no body, such as 204."""
    await ask.head(code, [])
    await ask.end()


async def redirect(ask: Exchange, *, code: int = 302, to: str = "") -> None:
    """To another path of this API, or to the URL given."""
    await ask.whole(code, "text/plain", b"over there", [("location", to or f"{ask.api.base}/elsewhere")])
