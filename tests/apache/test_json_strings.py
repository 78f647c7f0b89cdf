"""The module's JSON strings, under the address and undefined-behaviour sanitizers, against Python's idea of them."""

import codecs
import json
import random
import struct
import subprocess
from pathlib import Path

import pytest
from harness import ROOT


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program around `apache/json.c`."""
    program = tmp_path_factory.mktemp("json") / "driver"
    sources = [ROOT / "apache" / "json.c", Path(__file__).with_name("json_driver.c")]
    flags = ["-Wall", "-Wextra", "-Werror", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run(["gcc", *flags, *map(str, sources), "-o", str(program)], check=True)
    return program


def run(driver: Path, records: list[bytes]) -> list[bytes]:
    sent = b"".join(struct.pack("=I", len(record)) + record for record in records)
    out = subprocess.run([str(driver)], input=sent, capture_output=True, check=True).stdout
    answers = []
    while out:
        (size,) = struct.unpack_from("=I", out)
        answers.append(out[4 : 4 + size])
        out = out[4 + size :]
    return answers


def one_per_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("one_per_byte", one_per_byte)

EDGES = [
    b"",
    b"plain",
    bytes(range(256)),
    b'"\\/\b\f\n\r\t\x00\x7f',
    "é€\U0001f600\ue000\uffff\U0010ffff".encode(),
    b"\xc0\x80 \xe0\x80\x80 \xf0\x80\x80\x80",  # overlong
    b"\xed\xa0\x80\xed\xbf\xbf",  # surrogates
    b"\xf4\x90\x80\x80\xf5\x80\x80\x80",  # beyond U+10FFFF
    b"\xc3",
    b"\xe2\x82",
    b"\xf0\x9f\x98",
    b"\x80\xbf",
]


def test_json_strings(driver: Path) -> None:
    rng = random.Random(7)
    pieces = [bytes([rng.randrange(256)]) for _ in range(200)] + [
        chr(c).encode() for c in (0x22, 0xE9, 0x20AC, 0x1F600)
    ]
    records = EDGES + [b"".join(rng.choices(pieces, k=rng.randrange(40))) for _ in range(5000)]
    for record, answer in zip(records, run(driver, records), strict=True):
        assert b"\n" not in answer
        assert json.loads(answer.decode("utf-8", "strict")) == record.decode("utf-8", "one_per_byte")
