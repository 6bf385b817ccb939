"""The page of a real server in a browser: a question about a file, and another one."""

import pytest

from browser import DEADLINE_MS, launched
from headinfer.demo.document import make_document


@pytest.fixture
def page(server):
    with launched() as browser:
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.set_default_timeout(DEADLINE_MS)
        page.goto(server.url)
        page.locator("#send:enabled").wait_for()
        yield page


def test_two_questions_about_a_file(page, generate, tmp_path):
    document = make_document(3000)
    book = tmp_path / "book.txt"
    book.write_text(document.text)
    first, second = document.facts[:2]
    page.set_input_files("#picker", book)
    page.get_by_text("book.txt").wait_for()
    page.get_by_label("Temperature").evaluate("field => field.value = 0")
    answers = page.locator("article.assistant:not([aria-busy])")
    for number, fact in enumerate((first, second)):
        page.get_by_label("Message", exact=True).fill(fact.question)
        page.keyboard.press("Enter")
        answers.nth(number).wait_for()
        assert fact.answer in answers.nth(number).inner_text()
    said = answers.first.locator(".text").inner_text()
    options = ("--no-do-sample", "-n", 64)
    assert said == generate("-f", book, "-p", first.question, *options).strip()
    assert "were in the cache" not in answers.first.inner_text()
    assert "were in the cache" in answers.nth(1).inner_text()
    page.locator("#slots li.kept").first.wait_for()
    assert page.locator(".place").nth(1).inner_text().split() != ["CPU", "memory", "0", "B"]
