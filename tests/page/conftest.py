"""A browser, and the page in it."""

import os

import pytest
from fake_server import FakeServer

from browser import DEADLINE_MS, launched


@pytest.fixture(scope="module")
def browser():
    with launched() as browser:
        yield browser


@pytest.fixture
def server():
    fake = FakeServer()
    yield fake
    fake.close()


@pytest.fixture
def opened(browser, server):
    """Open the page; what it complains of in the console fails the test."""
    contexts, complaints = [], []

    def open_page(url=server.url, *, allowed=(), **settings):
        context = browser.new_context(**{"viewport": {"width": 1440, "height": 900}} | settings)
        contexts.append(context)
        context.set_default_timeout(DEADLINE_MS)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console",
            lambda message: (
                message.type == "error"
                and not any(part in message.text for part in allowed)
                and complaints.append(message.text)
            ),
        )
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def page(opened):
    """The page, once it knows the model."""
    page = opened()
    page.get_by_text("fake-8b, up to 131,072 tokens").wait_for()
    return page


@pytest.fixture
def shot(request):
    """Keep pictures where HEADINFER_PICTURES names a folder, to be looked at."""
    folder = os.environ.get("HEADINFER_PICTURES")

    def take(page, name: str) -> None:
        if folder:
            page.screenshot(path=os.path.join(folder, f"{name}.png"))

    return take
