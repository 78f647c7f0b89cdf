"""A program's stderr, cut into lines for the log."""

from workers.stderr import LINE_BYTES, LINES_PER_SEC, Lines


def test_lines_come_whole_however_they_were_cut() -> None:
    lines = Lines()
    assert lines.feed(b"one\ntw", 1.0) == ["one"]
    assert lines.feed(b"o", 1.0) == []
    assert lines.feed(b"\n\n \nthree", 1.0) == ["two"]
    assert lines.close() == ["three"]
    assert lines.close() == []


def test_a_line_is_one_line_of_the_log_whatever_is_in_it() -> None:
    lines = Lines()
    told = lines.feed("a\rb\x1b[31m\tc\u2028é\x85".encode() + b"\xff\n", 1.0)
    assert told == ["a\\rb\\x1b[31m\tc\\u2028é\\x85\\xff"]


def test_a_long_line_is_cut_once_and_its_rest_forgotten() -> None:
    lines = Lines()
    told = []
    for _ in range(5):
        told += lines.feed(b"x" * LINE_BYTES, 1.0)
    assert told == ["x" * LINE_BYTES + " …"]
    assert lines.feed(b"still the same\nnext\n", 1.0) == ["next"]


def test_more_lines_than_a_log_has_room_for_are_counted() -> None:
    lines = Lines()
    assert len(lines.feed(b"x\n" * 1000, 5.0)) == LINES_PER_SEC
    assert lines.feed(b"y\n", 5.9) == []
    assert lines.feed(b"z\n", 6.0) == [f"({1001 - LINES_PER_SEC} more lines in a second were left out)", "z"]
    assert len(lines.feed(b"x\n" * 60, 6.1)) == LINES_PER_SEC - 1
    assert lines.close() == ["(11 more lines in a second were left out)"]
