"""What is asked of an upstream, whatever protocol carries it."""

from typing import NamedTuple


class HttpRequest(NamedTuple):
    """A POST. What the connection adds (host, content-length, the pseudo-fields) is not among the headers."""

    path: str
    """Behind the path of the backend's `api_base`, with the query: "/chat/completions"."""
    headers: tuple[tuple[str, str], ...]
    """Names in lower case (RFC 9113, 8.2.1)."""
    body: bytes
