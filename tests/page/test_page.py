"""The page in a browser, against a server whose every answer the test decides."""

import re

import pytest

from headinfer.cli.progress import seconds_left

MIB = 2**20
SLOTS = [
    {
        "id": "1", "state": "running", "queue_position": None, "tokens": 40960,
        "gpu_bytes": 512 * MIB, "cpu_bytes": 1536 * MIB, "disk_bytes": 0, "completion_tokens": 0,
        "prompt_progress": {"total": 131072, "cache": 0, "processed": 40960, "time_ms": 1},
    },
    {
        "id": "2", "state": "waiting", "queue_position": 2, "tokens": 0, "gpu_bytes": 0,
        "cpu_bytes": 0, "disk_bytes": 0, "completion_tokens": 0, "prompt_progress": None,
    },
    {
        "id": "3", "state": "kept", "queue_position": None, "tokens": 1, "gpu_bytes": 0,
        "cpu_bytes": 3 * 1024 * MIB, "disk_bytes": 256 * MIB, "completion_tokens": 0,
        "prompt_progress": None,
    },
    {
        "id": "4", "state": "saved", "queue_position": None, "tokens": 2048, "gpu_bytes": 0,
        "cpu_bytes": 0, "disk_bytes": 512, "completion_tokens": 0, "prompt_progress": None,
    },
]  # fmt: skip


def ask(page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def drop(page, *files: tuple[str, bytes]) -> None:
    page.evaluate(
        """(files) => {
            const transfer = new DataTransfer();
            for (const [name, bytes] of files)
                transfer.items.add(new File([new Uint8Array(bytes)], name));
            const target = document.querySelector("main");
            for (const kind of ["dragenter", "dragover", "drop"])
                target.dispatchEvent(new DragEvent(kind, {
                    dataTransfer: transfer, bubbles: true, cancelable: true,
                }));
        }""",
        [(name, list(data)) for name, data in files],
    )


def problem(page) -> str:
    page.get_by_role("alert").wait_for()
    return page.get_by_role("alert").inner_text()


def answered(page, count: int = 1):
    """Wait for so many whole answers, and return the newest."""
    answers = page.locator("article.assistant:not([aria-busy])")
    answers.nth(count - 1).wait_for()
    return answers.nth(count - 1)


def test_a_conversation_is_streamed_and_sent_along(page, server, shot):
    ask(page, "What is hidden?")
    server.send({"role": "assistant", "content": ""})
    server.send({"content": " "})
    server.send({"content": " A let"})
    page.get_by_text("A let").wait_for()
    assert page.get_by_role("button", name="Stop").is_visible()
    server.send({"content": "ter.\n\nIn a box."})
    page.get_by_text("In a box.").wait_for()
    shot(page, "answering-wide")
    server.end()
    answer = answered(page)
    assert answer.locator(".text").inner_text() == "A letter.\n\nIn a box."
    took = "2,048 tokens read in 1:05, 1,024 were in the cache. 3 tokens answered, 4.0/s."
    assert took in answer.inner_text()
    ask(page, "By whom?")
    server.send({"content": "Nobody"})
    server.end("length")
    assert "ends at its limit" in answered(page, 2).inner_text()
    first, second = server.asked
    assert first["messages"] == [{"role": "user", "content": "What is hidden?"}]
    assert first["stream"] is True
    assert first["return_progress"] is True
    assert first["model"] == "fake-8b"
    assert second["messages"] == [
        {"role": "user", "content": "What is hidden?"},
        {"role": "assistant", "content": "  A letter.\n\nIn a box."},
        {"role": "user", "content": "By whom?"},
    ]


MARKUP = "<img src=x onerror=\"document.title='taken'\"><b>bold</b>&amp;<script>1</script>"


def test_what_a_model_says_is_never_markup(page, server):
    ask(page, MARKUP)
    server.send({"reasoning_content": MARKUP})
    server.send({"content": MARKUP[:9]})
    server.send({"content": MARKUP[9:]})
    server.end()
    assert answered(page).locator("> .text").text_content() == MARKUP
    assert page.locator(".thought .text").text_content() == MARKUP
    assert page.locator("article.user .text").text_content() == MARKUP
    assert page.locator("#said img, #said b, #said script").count() == 0
    assert page.title() == "HeadInfer"
    ask(page, "again")
    server.fail(MARKUP)
    server.cut()
    assert problem(page) == MARKUP


def test_thoughts_are_apart_and_not_sent_back(page, server):
    ask(page, "Why?")
    server.send({"reasoning_content": "Let me "})
    server.send({"reasoning_content": "see."})
    page.locator("details.thought").wait_for()
    server.send({"content": "Because."})
    server.end()
    answered(page)
    page.get_by_text("Thoughts").click()
    assert page.get_by_text("Let me see.").is_visible()
    ask(page, "And?")
    server.send({"content": "So."})
    server.end()
    answered(page, 2)
    assert server.asked[1]["messages"][1] == {"role": "assistant", "content": "Because."}


def test_reading_shows_how_far_it_is_and_what_is_left(page, server, shot):
    ask(page, "Read!")
    server.send(queue_position=2)
    page.get_by_text("Waiting behind 2 others").first.wait_for()
    server.send(queue_position=0)
    page.get_by_text("Waiting, next in turn").first.wait_for()
    server.progress(1024, 9216, 60_000, cache=1024)
    page.get_by_text("Reading, 11%").first.wait_for()
    assert page.locator("#reading-left").inner_text() == "since 0:00"
    server.progress(3072, 9216, 70_000, cache=1024)
    page.get_by_text("about 0:30 left").wait_for()
    assert (
        page.locator("#reading-detail").inner_text() == "3,072 of 9,216 tokens, 1,024 of them known"
    )
    bar = page.get_by_role("progressbar", name="Reading, 33%")
    assert bar.evaluate("bar => bar.value / bar.max") == pytest.approx(1 / 3)
    assert page.title() == "33% read · HeadInfer"
    shot(page, "reading-wide")
    server.progress(3072, 9216, 75_000, cache=1024)  # told again, while a chunk takes its time
    page.get_by_text("about 0:25 left").wait_for()
    server.send({"content": "Done"})
    page.get_by_text("Done").wait_for()
    assert not page.locator("#reading").is_visible()
    assert page.title() == "HeadInfer"
    server.end()
    answered(page)


@pytest.mark.parametrize("square", [0.0, 5.0, 40.0])
def test_the_time_left_is_that_of_the_command_line(page, square):
    total, cached = 2**17, 2**15

    def elapsed(tokens: int) -> float:
        return 2 * tokens / total + square * (tokens / total) ** 2

    def left(points: list[tuple[int, float]], cached: int) -> float:
        return page.evaluate(
            """async ([points, cached, total]) => {
                const estimate = await import("/page/estimate.js");
                return estimate.secondsLeft(points, cached, total);
            }""",
            [points, cached, total],
        )

    points = [(tokens, elapsed(tokens) + tokens % 3 * 0.01) for tokens in range(4096, 40_000, 4096)]
    assert left(points, 0) == pytest.approx(seconds_left(points, total))
    known = [(tokens, elapsed(tokens) - elapsed(cached)) for tokens in range(36_864, 60_000, 4096)]
    assert left(known, cached) == pytest.approx(elapsed(total) - elapsed(known[-1][0]))
    assert left([], cached) is None


def test_files_come_before_the_message(page, server, shot):
    drop(page, ("one.txt", b"First.\n"), ("zwei.txt", "Zwölf\n\n".encode()))
    page.get_by_text("one.txt").wait_for()
    page.get_by_text("zwei.txt").wait_for()
    assert "6 characters" in page.get_by_role("list", name="Files").inner_text()
    page.set_input_files("#picker", {"name": "three.txt", "mimeType": "", "buffer": b"Third"})
    page.get_by_text("three.txt").wait_for()
    shot(page, "files-wide")
    page.get_by_role("button", name="Leave out three.txt").click()
    ask(page, "Which?")
    server.send({"content": "Both."})
    server.end()
    answered(page)
    assert server.asked[0]["messages"][0]["content"] == "First.\nZwölf\n\nWhich?"
    said = page.locator("article.user").inner_text()
    assert "one.txt, 6 characters" in said
    assert "First." not in said
    assert page.locator(".file").count() == 0


def test_files_that_are_no_text_are_left_out(page):
    drop(page, ("photo.jpg", b"\xff\xd8\xff"))
    assert problem(page) == "photo.jpg is not UTF-8 text, so it was left out."
    drop(page, ("empty.txt", b" \n"))
    page.get_by_text("empty.txt is empty, so it was left out.").wait_for()
    assert page.locator(".file").count() == 0


def test_stopping_the_reading_gives_the_message_back(page, server):
    drop(page, ("book.txt", b"Once"))
    page.get_by_text("book.txt").wait_for()
    ask(page, "Who?")
    server.progress(1024, 9216, 1000)
    page.get_by_text("Reading, 11%").first.wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("What was read stays in the cache").wait_for()
    assert not page.get_by_role("alert").is_visible()  # it is no error
    assert server.gone.wait(30)
    assert page.get_by_label("Message", exact=True).input_value() == "Who?"
    assert page.locator("article").count() == 0
    page.get_by_role("button", name="Send").click()
    server.send({"content": "He."})
    server.end()
    answered(page)
    assert server.asked[0]["messages"] == server.asked[1]["messages"]
    assert server.asked[0]["messages"][0]["content"] == "Once\n\nWho?"


def test_escape_stops_an_answer_which_stays(page, server):
    ask(page, "Count!")
    server.send({"content": "One, two"})
    page.get_by_text("One, two").wait_for()
    page.keyboard.press("Escape")
    assert server.gone.wait(30)
    assert "It ends here, unfinished." in answered(page).inner_text()
    ask(page, "Go on!")
    server.send({"content": "three"})
    server.end()
    answered(page, 2)
    assert [message["content"] for message in server.asked[1]["messages"]] == [
        "Count!", "One, two", "Go on!",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("status", "message"),
    [(400, "a cache of 128 GiB is needed, and 24 GiB are there"), (429, "64 requests wait")],
)
def test_a_refusal_is_told_and_the_message_is_not_lost(opened, server, shot, status, message):
    page = opened(allowed=(f"status of {status}",))
    page.locator("#send:enabled").wait_for()
    server.refusal = (status, message)
    ask(page, "Read all!")
    assert problem(page) == message
    shot(page, f"refused-{status}-wide")
    assert page.get_by_label("Message", exact=True).input_value() == "Read all!"
    page.get_by_role("button", name="Send").click()
    server.send({"content": "All."})
    server.end()
    answered(page)
    assert not page.get_by_role("alert").is_visible()


def test_an_error_in_a_stream_is_told_and_what_was_said_stays(page, server):
    ask(page, "Say!")
    server.send({"content": "Half"})
    page.get_by_text("Half").wait_for()
    server.fail("the server is stopping; ask again later")
    server.cut()
    assert problem(page) == "the server is stopping; ask again later"
    assert "unfinished" in answered(page).inner_text()


def test_a_connection_that_ends_is_told(page, server):
    ask(page, "Say!")
    server.progress(0, 1000, 0)
    server.cut()
    assert "The connection ended before the answer did." in problem(page)
    assert page.get_by_label("Message", exact=True).input_value() == "Say!"


def test_a_server_that_wants_a_key_is_given_one(opened, server, shot):
    server.key = "secret"
    page = opened(allowed=("status of 401",))
    field = page.get_by_label("API key")
    field.wait_for()
    assert page.evaluate("document.activeElement.id") == "key"
    shot(page, "key-wide")
    field.fill("wrong")
    page.keyboard.press("Enter")
    assert problem(page) == "The server does not know this API key."
    field.fill("secret")
    page.keyboard.press("Enter")
    page.get_by_text("fake-8b").wait_for()
    assert not field.is_visible()
    assert not page.get_by_role("alert").is_visible()
    ask(page, "Who?")
    server.send({"content": "I."})
    server.end()
    answered(page)
    page.reload()
    page.get_by_text("fake-8b").wait_for()  # the tab still knows the key


def test_a_model_that_is_loading_is_waited_for(opened, server):
    server.loading = True
    page = opened(allowed=("status of 503",))
    page.get_by_text("The model is loading …").wait_for()
    assert page.get_by_role("button", name="Send").is_disabled()
    server.loading = False
    page.get_by_text("fake-8b").wait_for()
    assert page.get_by_role("button", name="Send").is_enabled()


def test_where_the_cache_is_follows_the_server(opened, server, shot):
    page = opened(allowed=("status of 500",))
    page.get_by_text("Nothing is held yet.").wait_for()
    server.slots = SLOTS
    page.get_by_text("Kept in memory").wait_for()
    places = re.sub(r"\s+", " ", page.locator("#places").inner_text())
    assert places == "GPU memory 512 MiB CPU memory 4.5 GiB Disk 256 MiB"
    told = [re.sub(r"\s+", " ", text) for text in page.locator("#slots li").all_inner_texts()]
    assert told == [
        "Running 40,960 tokens reading, 40,960 of 131,072 GPU memory 512 MiB · CPU memory 1.5 GiB",
        "Waiting 0 tokens behind 2 others",
        "Kept in memory 1 token CPU memory 3.0 GiB · Disk 256 MiB",
        "Kept on disk 2,048 tokens Disk 512 B",
    ]
    shot(page, "cache-wide")
    server.slots = [SLOTS[3]]
    page.locator("#slots li").nth(1).wait_for(state="detached")
    assert page.locator("#places").inner_text().startswith("GPU memory")
    server.slots = None
    page.locator("#cache.stale").wait_for()


def test_settings_are_sent_and_wrong_ones_are_not(page, server):
    page.get_by_text("Settings").click()
    page.get_by_label("What the system says").fill("Be brief.")
    page.get_by_label("Tokens at most").fill("0")
    ask(page, "Who?")
    assert problem(page).startswith("Tokens at most:")
    assert server.asked == []
    page.get_by_label("Tokens at most").fill("12")
    page.get_by_label("Temperature").fill("0.5")
    ask(page, "Who?")
    server.send({"content": "I."})
    server.end()
    answered(page)
    (body,) = server.asked
    assert (body["max_tokens"], body["temperature"]) == (12, 0.5)
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}


def test_what_is_wrong_with_a_setting_is_in_sight_in_a_narrow_window(opened, server, shot):
    page = opened(viewport={"width": 360, "height": 740}, color_scheme="dark")
    page.locator("#send:enabled").wait_for()
    page.get_by_text("Settings").click()
    page.get_by_label("Tokens at most").fill("0")
    ask(page, "Who?")
    problem(page)
    shot(page, "setting-narrow")
    in_sight = """(element) => {
        const { top, bottom } = element.getBoundingClientRect();
        return top >= 0 && bottom <= innerHeight;
    }"""
    assert page.get_by_role("alert").evaluate(in_sight)
    assert page.get_by_label("Tokens at most").evaluate(in_sight)


def test_in_a_narrow_window_one_panel_is_open_at_a_time(opened, server, shot):
    server.slots = SLOTS
    page = opened(viewport={"width": 360, "height": 740})
    page.locator("#send:enabled").wait_for()
    ask(page, "Who?")
    server.send({"content": "He."})
    server.end()
    answered(page)
    page.get_by_text("Settings").click()
    page.get_by_text("KV cache").click()
    page.locator("#slots li").nth(3).wait_for()
    page.locator("#settings:not([open])").wait_for()
    shot(page, "panels-narrow-cache")
    page.get_by_text("Settings").click()
    page.locator("#cache:not([open])").wait_for()
    shot(page, "panels-narrow-settings")
    seen = page.locator("article.assistant").evaluate(
        """(article) => {
            const { top, bottom } = article.getBoundingClientRect();
            const ask = document.querySelector("#ask").getBoundingClientRect();
            return Math.min(bottom, ask.top) - Math.max(top, 0);
        }"""
    )
    assert seen > 20


def test_a_conversation_is_saved_and_opened_again(page, server, shot):
    server.acts = {
        "save": {"n_saved": 3072},
        "restore": {
            "n_restored": 3072,
            "id_slot": "def2",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": MARKUP},
                {"role": "assistant", "content": "He."},
            ],
        },
    }
    save = page.get_by_role("button", name="Save")
    save.wait_for()
    assert save.is_disabled()
    ask(page, "Who?")
    server.send({"content": "He."})
    server.end()
    answered(page)
    said = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "He."}]
    server.sessions = [
        {"filename": "my book", "tokens": 3072, "disk_bytes": 3 * MIB, "conversation": True}
    ]
    page.get_by_label("Name").fill("my book")
    save.click()
    page.get_by_text("Saved: 3,072 tokens.").wait_for()
    assert server.acted == [("/slots/abc1?action=save", {"filename": "my book", "messages": said})]
    page.get_by_role("button", name="Replace").wait_for()
    page.get_by_role("button", name="New conversation").click()
    page.get_by_role("button", name="Open my book").click()
    page.get_by_text("my book: 3,072 tokens are in the cache.").wait_for()
    shot(page, "opened-wide")
    assert page.locator("article.user .text").text_content() == MARKUP
    assert page.get_by_label("What the system says").input_value() == "Be brief."
    ask(page, "And?")
    server.send({"content": "She."})
    server.end()
    answered(page, 2)
    restored = server.acts["restore"]["messages"]
    assert server.asked[-1]["messages"] == [*restored, {"role": "user", "content": "And?"}]


def test_without_a_folder_there_is_nothing_to_save_to(opened, server):
    server.sessions = None
    page = opened()
    with page.expect_response("**/sessions"):
        page.reload()
    page.locator("#send:enabled").wait_for()
    assert not page.get_by_role("button", name="Save").is_visible()


def test_a_new_conversation_forgets_the_old_one(page, server):
    for number in (1, 2):
        ask(page, f"Question {number}")
        server.send({"content": "Answer."})
        server.end()
        answered(page)
        page.get_by_role("button", name="New conversation").click()
        assert page.locator("article").count() == 0
    assert [len(body["messages"]) for body in server.asked] == [1, 1]


def test_keys_alone_are_enough(page, server):
    message = page.get_by_label("Message", exact=True)
    message.focus()
    page.keyboard.type("One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    seen = []
    for _ in range(4):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.innerText.trim()"))
    assert seen[:3] == ["Add files", "Send", "Settings"]
    page.get_by_role("button", name="Send").press("Enter")
    server.send({"content": "Three"})
    server.end()
    answered(page)
    assert server.asked[0]["messages"][0]["content"] == "One\ntwo"
    assert page.evaluate("document.activeElement.id") == "message"


def test_a_screen_reader_hears_of_all_that_happens(page, server):
    for role, name in [
        ("heading", "HeadInfer"), ("log", "Conversation"), ("textbox", "Message"),
        ("button", "Send"), ("button", "Add files"), ("button", "New conversation"),
    ]:  # fmt: skip
        assert page.get_by_role(role, name=name, exact=True).count() == 1, name
    status = page.get_by_role("status")
    ask(page, "Read!")
    server.progress(0, 1000, 0)
    server.send({"content": "Well"})
    page.locator("article[aria-busy=true]").wait_for()
    assert status.text_content() == "Answering"
    server.end()
    answered(page)
    page.wait_for_function("document.querySelector('#status').textContent.includes('complete')")


WIDER = """() => [...document.querySelectorAll("body *")]
    .filter((each) => each.getBoundingClientRect().right > innerWidth + 1)
    .filter((each) => !each.closest(".unseen"))
    .map((each) => each.outerHTML.slice(0, 80))"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 800, 1400])
def test_nothing_is_wider_than_the_window(opened, server, shot, width, scheme):
    page = opened(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.locator("#send:enabled").wait_for()
    drop(page, ("a-name-without-any-end-" * 6 + ".txt", b"text"))
    page.locator(".file").wait_for()
    shot(page, f"file-{width}-{scheme}")
    assert page.evaluate(WIDER) == []
    ask(page, "Pneumono" * 40)
    server.progress(3072, 131072, 1000)
    server.progress(4096, 131072, 2000)
    page.get_by_text("left").first.wait_for()
    server.slots = SLOTS  # which take a further line above
    page.locator("#cache-total", has_text="GPU memory").wait_for(state="attached")
    below = page.locator("#reading-detail").bounding_box()
    box = page.locator("#ask").bounding_box()
    assert below["y"] + below["height"] <= box["y"] + 1  # nothing of it is covered
    shot(page, f"reading-{width}-{scheme}")
    server.send({"content": "Donau" * 80 + "\n" + "word " * 300})
    server.end()
    answered(page)
    shot(page, f"answered-{width}-{scheme}")
    page.get_by_text("KV cache").click()
    page.locator("#slots li").nth(3).wait_for()
    shot(page, f"slots-{width}-{scheme}")
    assert page.evaluate(WIDER) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground, ink = page.evaluate(
        "['backgroundColor', 'color'].map((name) => getComputedStyle(document.body)[name])"
    )
    dark = [sum(map(int, re.findall(r"\d+", colour)[:3])) < 380 for colour in (ground, ink)]
    assert dark == [scheme == "dark", scheme == "light"]


def test_the_page_asks_nobody_else(opened, server):
    page = opened()
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    page.reload()
    page.get_by_text("fake-8b").wait_for()
    ask(page, "Who?")
    server.send({"content": "I."})
    server.end()
    answered(page)
    assert len(requests) > 6
    assert [url for url in requests if not url.startswith((server.url, "data:"))] == []
