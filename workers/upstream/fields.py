"""Header blocks of requests (HPACK, RFC 7541), made without a memory of those before.

Theory of operation. The `hpack` library's encoder looks every field up in its dynamic table and tries Huffman's code on
it, which takes longer than all else that sending a request does, to save some two hundred bytes beside a body of
kilobytes. Here every field is a literal without indexing (6.2.2), its name by number where the static table has it
(appendix A), so that the block is put together by looking up and joining. The dynamic table is never used: the first
block sets its size to 0 (6.3), and no size that the upstream allows is ever too small for that.

Answers are still taken apart by the library: what their encoders may do is not ours to choose.
"""

from collections.abc import Iterable
from typing import Final

_POST: Final = b"\x83"  # 6.1: the static table's 3rd entry is :method POST
_SCHEMES: Final = {b"http": b"\x86", b"https": b"\x87"}
_NO_TABLE: Final = b"\x20"
_NEVER_INDEXED: Final = 0x10
"""6.2.3: for what no proxy on the way may keep in a table, where its length could be found out by guessing."""
_STATIC: Final = {
    b":authority": 1,
    b":path": 4,
    b"accept": 19,
    b"accept-encoding": 16,
    b"authorization": 23,
    b"content-length": 28,
    b"content-type": 31,
    b"user-agent": 58,
}


def _integer(value: int, prefix_bits: int, pattern: int = 0) -> bytes:
    """5.1: `pattern` are the bits above the prefix."""
    most = (1 << prefix_bits) - 1
    if value < most:
        return bytes((pattern | value,))
    encoded = bytearray((pattern | most,))
    value -= most
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


_NAMES: Final = {
    name: _integer(number, 4, _NEVER_INDEXED if name == b"authorization" else 0) for name, number in _STATIC.items()
}


class FieldEncoder:
    """Stands in for `hpack.Encoder` in h2, which calls `encode` and sets `header_table_size`."""

    def __init__(self) -> None:
        self.header_table_size = 4096
        self._begun = False

    def encode(self, fields: Iterable[tuple[bytes, bytes]]) -> bytes:
        """The block of a request. Names are in lower case."""
        pieces = []
        if not self._begun:
            self._begun = True
            pieces.append(_NO_TABLE)
        for name, value in fields:
            if name == b":method" and value == b"POST":
                pieces.append(_POST)
            elif name == b":scheme" and value in _SCHEMES:
                pieces.append(_SCHEMES[value])
            else:
                size = len(value)
                length = bytes((size,)) if size < 127 else _integer(size, 7)
                pieces += (_NAMES.get(name) or b"\0" + _integer(len(name), 7) + name, length, value)
        return b"".join(pieces)
