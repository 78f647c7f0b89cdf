"""The chat page, as its user sees it."""

from playwright.sync_api import Locator, Page, expect

TRANSPORTS = ("fetch", "EventSource")


class Chat:
    """Finds things by their roles and names, as people and screen readers do."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.prompt = page.get_by_role("textbox", name="Your message")
        self.send = page.get_by_role("button", name="Send")
        self.stop = page.get_by_role("button", name="Stop")
        self.log = page.get_by_role("log", name="Conversation")
        self.status = page.get_by_role("status")

    def open(self, url: str, transport: str = "fetch") -> "Chat":
        self.page.goto(url)
        self.choose(transport)
        return self

    def choose(self, transport: str) -> None:
        self.page.get_by_role("radio", name=transport).check()

    def ask(self, text: str) -> "Turn":
        """Type a question and press Enter; the turn that it begins."""
        turns = self.log.get_by_role("listitem")
        before = turns.count()
        self.prompt.fill(text)
        self.prompt.press("Enter")
        return Turn(turns.nth(before))

    def expect_no_sideways_scroll(self) -> None:
        width, room = self.page.evaluate(
            "() => [Math.max(document.documentElement.scrollWidth, document.getElementById('scroller').scrollWidth),"
            " document.documentElement.clientWidth]"
        )
        assert width <= room


class Turn:
    """One question and its answer."""

    def __init__(self, item: Locator) -> None:
        self.item = item
        self.question = item.locator(".question .text")
        self.answer = item.locator(".answer > .text")
        self.problem = item.locator(".problem")
        self.stats = item.locator(".stats")
        self.retry = item.get_by_role("button", name="Try again")

    def expect_answer(self, text: str) -> None:
        """It has ended, in good order, and said exactly this."""
        expect(self.stats).to_be_visible()
        expect(self.problem).to_be_hidden()
        assert self.answer.text_content() == text

    def expect_problem(self, *parts: str) -> None:
        """It has ended, and says that something was wrong."""
        expect(self.problem).to_be_visible()
        for part in parts:
            expect(self.problem).to_contain_text(part)
        expect(self.retry).to_be_enabled()
