"""What is asked of an upstream, whatever protocol carries it."""


class HttpRequest:
    """A POST. What the connection adds (host, content-length, the pseudo-fields) is not among the headers."""

    __slots__ = ("body", "headers", "path")

    def __init__(self, path: str, headers: tuple[tuple[str, str], ...], body: bytes) -> None:
        self.path = path
        """Behind the path of the backend's `api_base`, with the query: "/chat/completions"."""
        self.headers = headers
        """Names in lower case (RFC 9113, 8.2.1)."""
        self.body = body
