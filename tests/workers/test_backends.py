"""The paced backends, without a socket and without waiting."""

import itertools

import pytest

from forkd.boot import Unfit
from forkd.settings import PROVIDERS, Settings, default_backends
from forkd.settings import MockBackend as MockSettings
from forkd.settings import OpenAiBackend as OpenAiSettings
from forkd.settings import PythonBackend as PythonSettings
from forkd.settings import TypingBackend as TypingSettings
from workers.backends import registry
from workers.backends.mock import MockBackend
from workers.backends.typing import TypingBackend
from workers.request import HandoffData

NOTHING = HandoffData()


def test_mock_says_its_text_word_by_word() -> None:
    steps = list(MockBackend("mock", "one two  three", 0.05).steps(HandoffData(prompt="ignored")))
    assert steps == [(0.0, "one "), (0.05, "two "), (0.05, "three"), (0.05, "")]


def test_streams_do_not_disturb_each_other() -> None:
    backend = MockBackend("mock", "one two", 0)
    first, second = backend.steps(NOTHING), backend.steps(NOTHING)
    next(first)
    assert [text for _, text in first] == ["two", ""]
    assert [text for _, text in second] == ["one ", "two", ""]


@pytest.mark.parametrize("text", ["", "   "])
def test_mock_with_nothing_to_say_ends_at_once(text: str) -> None:
    assert list(MockBackend("mock", text, 1).steps(NOTHING)) == [(0.0, "")]


@pytest.mark.parametrize(
    "prompt", ["Hello, you! How are you?", "a", "  spaces  first", "\n\nlines\n", "ünïcödé 😀😀😀😀😀"]
)
def test_typing_types_the_prompt_back(prompt: str) -> None:
    steps = list(TypingBackend("typing", "text", 0.03, 0.5).steps(HandoffData(prompt=prompt)))
    assert "".join(text for _, text in steps) == prompt.rstrip()
    assert steps[0][0] == 0
    assert all(len(text.strip()) <= 4 for _, text in steps)
    for (_, before), (delay, _) in itertools.pairwise(steps):
        longest = 4 if before[-1] in ".!?" else 1
        assert 0.015 * longest <= delay <= 0.045 * longest


def test_typing_without_a_prompt_types_its_text() -> None:
    backend = TypingBackend("typing", "its text", 0.03, 0.0)
    assert [text for _, text in backend.steps(NOTHING)] == ["its", " text"]
    assert [delay for delay, _ in backend.steps(NOTHING)] == [0.0, 0.03]
    assert list(backend.steps(HandoffData(prompt=""))) == list(backend.steps(NOTHING))


def test_the_registry_builds_what_it_can() -> None:
    settings = Settings(
        backends={
            "quick": MockSettings(token_delay_ms=10, text="a b"),
            "other": TypingSettings(text="c"),
            "paid": OpenAiSettings(),
        }
    )
    built = registry.build(settings)
    assert [(name, type(backend).__name__) for name, backend in built.items()] == [
        ("quick", "MockBackend"),
        ("other", "TypingBackend"),
        ("paid", "OpenAiBackend"),
    ]
    assert [backend.name for backend in built.values()] == ["quick", "other", "paid"]
    assert built["paid"].costs_money
    quick = built["quick"]
    assert isinstance(quick, MockBackend)
    assert list(quick.steps(NOTHING)) == [(0.0, "a "), (0.01, "b"), (0.01, "")]
    assert not quick.costs_money


def test_every_provider_has_a_backend() -> None:
    assert set(registry.FACTORIES) == set(PROVIDERS.values())
    built = registry.build(Settings())
    assert list(built) == list(default_backends())


def test_all_handlers_that_cannot_be_imported_are_told() -> None:
    settings = Settings(
        backends={
            "a": PythonSettings(target="no_such:f"),
            "b": MockSettings(),
            "c": PythonSettings(target="json:dumps"),
        }
    )
    with pytest.raises(Unfit) as raised:
        registry.build(settings)
    first, second = raised.value.faults
    assert first.startswith("backends.a.target: there is no module no_such")
    assert second == "backends.c.target: json:dumps is no generator: there is no yield in it"


def test_typing_takes_no_time_for_a_prompt_of_spaces() -> None:
    """A prompt is a user's; a pattern that tries every split of its spaces would hold up a worker for minutes."""
    steps = list(TypingBackend("typing", "unused", 0.0, 0.0).steps(HandoffData(prompt="a" + " " * 1_000_000)))
    assert [text for _, text in steps] == ["a"]
