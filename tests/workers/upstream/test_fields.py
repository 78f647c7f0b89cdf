"""Header blocks: what the `hpack` library reads is what was written."""

import hpack
from hypothesis import given
from hypothesis import strategies as st

from workers.upstream.fields import FieldEncoder

NAMES = st.sampled_from(
    [":authority", ":path", "authorization", "content-type", "user-agent", "x-request-id", "x" * 300]
)
FIELDS = st.lists(st.tuples(NAMES.map(str.encode), st.binary(max_size=300)), max_size=12)
BEGIN = [(b":method", b"POST"), (b":scheme", b"https")]


@given(st.lists(FIELDS, min_size=1, max_size=4))
def test_any_fields_come_back(blocks: list[list[tuple[bytes, bytes]]]) -> None:
    encoder, decoder = FieldEncoder(), hpack.Decoder(max_header_list_size=1 << 20)
    for fields in blocks:
        read = decoder.decode(encoder.encode(BEGIN + fields), raw=True)
        assert [tuple(field) for field in read] == BEGIN + fields


def test_what_has_no_number_is_written_out() -> None:
    fields = [(b":method", b"GET"), (b":scheme", b"ws"), (b"a", b"")]
    assert [tuple(one) for one in hpack.Decoder().decode(FieldEncoder().encode(fields), raw=True)] == fields


def test_a_length_of_several_bytes() -> None:
    for size in (126, 127, 128, 254, 255, 16510, 16511, 70000):
        field = (b"x-long", b"v" * size)
        decoder = hpack.Decoder(max_header_list_size=1 << 20)
        assert [tuple(one) for one in decoder.decode(FieldEncoder().encode([field]), raw=True)] == [field]


def test_a_secret_is_never_indexed() -> None:
    (field,) = hpack.Decoder().decode(FieldEncoder().encode([(b"authorization", b"Bearer k")]), raw=True)
    assert isinstance(field, hpack.NeverIndexedHeaderTuple)


def test_a_table_that_the_peer_makes_smaller_is_small_enough() -> None:
    decoder = hpack.Decoder()
    decoder.max_allowed_table_size = 0  # as after SETTINGS_HEADER_TABLE_SIZE 0: a block must begin by saying so
    encoder = FieldEncoder()
    encoder.header_table_size = 0
    assert len(decoder.decode(encoder.encode(BEGIN), raw=True)) == 2
    assert len(decoder.decode(encoder.encode(BEGIN), raw=True)) == 2
