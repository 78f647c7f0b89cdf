"""Who owns a transport in tests: it keeps what it is told, and minds the order."""


class Owner:
    def __init__(self) -> None:
        self.protocol: str | None = None
        self.data = b""
        self.end: tuple[str, str] | None = None

    def connected(self, protocol: str) -> None:
        assert self.protocol is None
        assert self.end is None
        self.protocol = protocol

    def received(self, data: bytes) -> None:
        assert self.end is None
        self.data += data

    def lost(self, code: str, detail: str) -> None:
        assert self.end is None
        self.end = code, detail

    def crashed(self, error: Exception) -> None:
        raise error
