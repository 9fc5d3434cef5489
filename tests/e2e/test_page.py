"""The page of `mimco serve` in a real browser, as a person uses it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mimco_deploy.serving.encoders import load_encoder
from mimco_deploy.serving.update import update_index
from tests.e2e.browser import MARKS, WAIT_S, opened, until
from tests.helpers import gallery
from tests.unit.serving.http.conftest import COUNT, Place, make_place

TOKEN = "a token of enough letters"
pytestmark = MARKS


def start(place: Place, **environment: str) -> tuple[subprocess.Popen[str], str]:
    workspace = str(place.index.parent)
    process = subprocess.Popen(
        [sys.executable, "-m", "mimco_deploy", "--workspace", workspace, "serve", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **environment},
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def stop(process: subprocess.Popen[str]) -> int:
    with process:
        process.send_signal(signal.SIGTERM)
        return process.wait(30)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("page").resolve())


@pytest.fixture(scope="module")
def address(own: Place) -> Iterator[str]:
    process, address = start(own)
    yield address
    assert stop(process) == 0


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    with opened(browser, address) as page:
        yield page


def names(page: Any) -> list[str]:
    return [str(name) for name in page.locator("#hits .name").all_inner_texts()]


def search_with(page: Any, *pictures: Path) -> None:
    page.set_input_files("#files", [str(picture) for picture in pictures])
    page.wait_for_selector("#hits .line")


def test_it_opens_with_the_pictures_of_the_index_and_shows_more(page: Any) -> None:
    page.wait_for_selector("#hits li")
    first = len(names(page))
    assert 0 < first <= COUNT + 1
    page.click("#more")
    until(page, f"document.querySelectorAll('#hits li').length > {first}")
    drawn = "[...document.querySelectorAll('#hits img')].slice(0, 4).every(i => i.complete && i.naturalWidth > 0)"
    until(page, drawn)


def test_a_chosen_picture_is_searched_and_more_like_this_goes_on_and_back(page: Any, own: Place) -> None:
    search_with(page, own.picture(5))
    assert names(page)[0] == "0005.png"
    assert page.locator("#hits .line").first.inner_text().split() == ["clear", "match", "1.000"]
    second = names(page)[1]
    page.locator("#hits li").nth(1).hover()
    page.locator("#hits li").nth(1).locator("a.like").click()
    until(page, f"document.querySelector('#hits .name').innerText === {second!r}")
    page.go_back()
    until(page, "document.querySelector('#hits .name').innerText === '0005.png'")


def test_a_dropped_and_a_pasted_picture_are_searched(page: Any, own: Place) -> None:
    content = list(own.picture(9).read_bytes())
    give = """([kind, content]) => {
      const transfer = new DataTransfer();
      transfer.items.add(new File([new Uint8Array(content)], "x.png", { type: "image/png" }));
      const options = { bubbles: true, cancelable: true };
      document.body.dispatchEvent(kind === "drop"
        ? new DragEvent("drop", { ...options, dataTransfer: transfer })
        : new ClipboardEvent("paste", { ...options, clipboardData: transfer }));
    }"""
    for kind in ("drop", "paste"):
        page.evaluate(give, [kind, content])
        until(page, "document.querySelector('#hits .line + .name')?.innerText === '0009.png'")
        page.goto(page.url.partition("#")[0])
        page.reload()


def test_an_uploaded_picture_outlives_the_page_but_not_the_browser(browser: Any, page: Any, own: Place) -> None:
    search_with(page, own.picture(5), own.picture(7))
    hits, address = names(page), page.url
    page.reload()
    until(page, f"document.querySelectorAll('#hits .line').length === {len(hits)}")
    assert names(page) == hits
    page.locator("#parts [data-role=remove]").nth(1).click()
    until(page, "document.querySelector('#hits .line + .name')?.innerText === '0005.png'")
    other = browser.new_context()
    elsewhere = other.new_page()
    elsewhere.goto(address)
    elsewhere.wait_for_selector("#nothing:visible")
    assert "not kept any more" in elsewhere.inner_text("#nothing")
    elsewhere.set_input_files("#files", [str(own.picture(5))])
    until(elsewhere, "document.querySelector('#hits .line + .name')?.innerText === '0005.png'")
    assert not elsewhere.is_visible("#nothing")
    other.close()


def test_an_upload_of_another_tab_is_found_and_one_that_is_lost_is_told_once(
    browser: Any, address: str, own: Place
) -> None:
    context = browser.new_context()
    first, second = context.new_page(), context.new_page()
    first.goto(address)
    search_with(first, own.picture(5), own.picture(7))
    second.goto(address)
    second.wait_for_selector("#hits li")
    second.evaluate("hash => { location.hash = hash; }", first.url.partition("#")[2])
    until(second, f"document.querySelectorAll('#hits .line').length === {len(names(first))}")
    assert names(second) == names(first)
    part = first.url.partition("part=")[2].partition("&")[0]
    second.evaluate("hash => { location.hash = hash; }", f"part={part}&part=u0-0_-1")
    told = "document.querySelector('#nothing').innerText.includes('not kept any more')"
    until(second, f"{told} && !document.querySelector('#hits .line')")  # half a query is no query
    second.click("#tab-index")
    second.click("#tab-search")
    until(second, told)
    assert second.locator("#hits .line").count() == 0, "nor later"
    assert "u0-0" in second.url, "and its address stays"
    second.click("#clear")
    until(second, f"!{told}")
    assert "u0-0" not in second.url
    context.close()


def test_a_browser_that_keeps_nothing_and_does_not_say_so_is_not_waited_for(
    browser: Any, page: Any, own: Place
) -> None:
    search_with(page, own.picture(5))
    context = browser.new_context()
    context.add_init_script("IDBFactory.prototype.open = () => ({});")
    silent = context.new_page()
    silent.goto(page.url)
    silent.wait_for_selector("#nothing:visible", timeout=WAIT_S * 1e3)
    search_with(silent, own.picture(5))
    assert names(silent)[0] == "0005.png"
    context.close()


def test_a_picture_that_is_too_large_is_not_sent(page: Any, own: Place, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    large.write_bytes(own.picture(5).read_bytes() + bytes(33 * 2**20))
    page.wait_for_selector("#hits li")
    page.set_input_files("#files", [str(large)])
    page.wait_for_selector("#failure:visible")
    assert page.inner_text("#failure") == "This picture has 34.6 MB; the service takes 33.6 MB at once."
    page.click("#clear")
    search_with(page, own.picture(5))
    assert not page.is_visible("#failure")


def test_a_filter_narrows_and_a_wrong_one_is_explained(page: Any, own: Place) -> None:
    search_with(page, own.picture(5))
    page.keyboard.press("/")
    page.wait_for_selector("#where:visible")
    page.fill("#where", "name glob '000*'")
    page.click("#filter-form button[type=submit]")
    until(page, "[...document.querySelectorAll('#hits .name')].every(n => n.innerText.startsWith('000'))")
    assert len(names(page)) == 10


def test_going_back_leaves_no_condition_that_was_not_applied(page: Any, own: Place) -> None:
    page.wait_for_selector("#hits li")
    search_with(page, own.picture(5))
    page.fill("#where", "name = 'unapplied'")
    page.go_back()
    until(page, "document.querySelector('#where').value === ''")


def test_a_search_that_fails_leaves_no_pictures_of_another(browser: Any, address: str, tmp_path: Path) -> None:
    page = browser.new_context().new_page()  # the browser logs the refusal as an error
    page.goto(address)
    page.wait_for_selector("#more:visible")
    (tmp_path / "none.png").write_bytes(b"no picture")
    page.set_input_files("#files", [str(tmp_path / "none.png")])
    page.wait_for_selector("#failure:visible")
    until(page, "document.querySelector('#more').hidden")
    assert names(page) == []
    assert page.is_visible("#failure")
    page.click("#clear")
    page.wait_for_selector("#hits li")
    page.context.close()


def test_an_empty_index_is_told_from_filters_that_leave_nothing(page: Any, own: Place) -> None:
    page.route("**/v1/search", lambda route: route.fulfill(json={"hits": [], "searched": 0, "timings_ms": {}}))
    page.set_input_files("#files", [str(own.picture(5))])
    page.wait_for_selector("#nothing:visible")
    assert page.inner_text("#nothing") == "The index holds no picture."


def test_any_confidence_of_the_address_is_shown(page: Any, address: str) -> None:
    page.goto(f"{address}#confidence=0.7")
    page.reload()
    until(page, "document.querySelector('#confidence').value === '0.7'")


def test_a_crop_that_is_removed_by_a_key_leaves_the_focus_near(page: Any, own: Place) -> None:
    search_with(page, own.picture(5))
    page.click("#crop")
    until(page, "document.activeElement.id === 'crop-box'")
    page.keyboard.press("Delete")
    until(page, "document.querySelector('#crop-box').hidden && document.activeElement.id === 'crop'")


def test_a_wrong_condition_is_explained(browser: Any, address: str) -> None:
    page = browser.new_context().new_page()  # the browser logs the refusal as an error
    page.goto(address)
    page.keyboard.press("/")
    page.fill("#where", "nonsense = 1")
    page.click("#filter-form button[type=submit]")
    page.wait_for_selector("#where-error:visible")
    assert "no such column" in page.inner_text("#where-error")
    page.context.close()


def test_the_detail_shows_both_pictures_and_walks_by_keys(page: Any, own: Place) -> None:
    search_with(page, own.picture(5))
    page.locator("#hits li a").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_selector("#detail[open]")
    assert page.inner_text("#detail-name") == names(page)[1]
    assert page.is_visible("#query-picture")
    page.keyboard.press("ArrowRight")
    until(page, f"document.querySelector('#detail-name').innerText === {names(page)[2]!r}")
    until(page, "document.querySelector('#facts').innerText.includes('32')")
    page.keyboard.press("Escape")
    assert not page.is_visible("#detail")


def test_problems_duplicates_and_the_map_are_shown(page: Any) -> None:
    page.click("#tab-problems")
    page.wait_for_selector("#problem-rows tr")
    assert "broken.jpg" in page.inner_text("#problem-rows")
    page.click("#tab-duplicates")
    page.wait_for_selector("#groups li")
    assert "same.png" in page.inner_text("#groups")
    page.click("#tab-map")
    page.wait_for_selector("#points:visible")
    drawn = """(() => {
      const canvas = document.querySelector("#points");
      const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
      return new Set(new Uint32Array(pixels.buffer)).size > 1;
    })()"""
    until(page, drawn)


def test_an_update_is_started_and_followed(page: Any, own: Place) -> None:
    gallery(own.photos / "new", 3, first=200)
    page.click("#tab-index")
    page.wait_for_selector("#numbers li")
    before = int(page.inner_text("#numbers li:first-child strong").replace(",", ""))
    page.click("#update")
    until(page, f"document.querySelector('#numbers li strong').innerText.replace(',', '') === '{before + 3}'")
    assert "3" in page.inner_text("#job-text")


def test_what_another_process_indexed_is_shown_at_the_next_visit(page: Any, own: Place, tmp_path: Path) -> None:
    page.click("#tab-map")
    until(page, "document.querySelector('#status').textContent.includes('on the map')")
    on_map = page.inner_text("#status")
    page.click("#tab-index")
    page.wait_for_selector("#numbers li")
    before = int(page.inner_text("#numbers li:first-child strong").replace(",", ""))
    page.click("#tab-search")
    gallery(tmp_path / "more", 2, first=300)
    update_index(own.index, [tmp_path / "more"], load_encoder(own.encoder))
    page.click("#tab-index")
    until(page, f"document.querySelector('#numbers li strong').innerText.replace(',', '') === '{before + 2}'")
    until(page, f"[...document.querySelector('#root').options].some(o => o.value === {str(tmp_path / 'more')!r})")
    page.click("#tab-map")
    until(page, f"!['', {on_map!r}].includes(document.querySelector('#status').textContent)")
    until(page, "document.querySelector('#status').textContent.includes('on the map')")


JOB = {
    "id": "0" * 16, "state": "running", "done": 0, "total": 0, "images_per_s": 0, "waiting": 0, "doing": "walk",
    "started": "2024-05-31T18:30:00+00:00", "report": None, "error": None,
}  # fmt: skip


def answer_posts(page: Any, job: dict[str, Any]) -> None:
    """As if the service had begun this job."""
    posted = lambda route: route.fulfill(json=job) if route.request.method == "POST" else route.continue_()  # noqa: E731
    page.route("**/v1/jobs", posted)


def test_an_update_of_which_the_service_knows_nothing_more_can_be_started_again(browser: Any, address: str) -> None:
    page = browser.new_context().new_page()  # the browser logs the refusal as an error
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(f"{address}#view=index")
    page.wait_for_selector("#numbers li")
    answer_posts(page, JOB)
    page.click("#update")
    page.wait_for_selector("#failure:visible")
    assert "cannot be followed" in page.inner_text("#failure")
    page.wait_for_selector("#update:visible")
    assert not page.is_visible("#cancel")
    assert not page.is_visible("#job")
    assert wrong == []
    page.context.close()


def test_an_update_says_that_a_folder_could_not_be_read(page: Any) -> None:
    page.click("#tab-index")
    page.wait_for_selector("#numbers li")
    answer_posts(page, {**JOB, "state": "done", "report": {"unchanged": 5, "unreachable": 1}})
    page.click("#update")
    until(page, "document.querySelector('#job-text').textContent === 'Done · unchanged 5 · 1 folder could not be read'")


def test_it_fits_a_phone_and_the_dark(browser: Any, address: str, own: Place) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme="dark", has_touch=True)
    page = context.new_page()
    page.goto(address)
    search_with(page, own.picture(5))
    for tab in ("search", "map", "duplicates", "problems", "index"):
        page.click(f"#tab-{tab}")
        page.wait_for_selector(f"#{tab}:visible")
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 360, tab
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)")
    assert max(dark) < 80
    context.close()


def test_with_a_token_it_asks_for_it_once(browser: Any, own: Place) -> None:
    process, address = start(own, MIMCO_TOKEN=TOKEN)
    context = browser.new_context()
    try:
        page = context.new_page()
        page.goto(address)
        page.wait_for_selector("#sign-in[open]")
        page.fill("#token", TOKEN)
        page.click("#token-form button[type=submit]")
        page.wait_for_selector("#hits li")
        until(page, "document.querySelector('#hits img')?.naturalWidth > 0")
        page.reload()
        page.wait_for_selector("#hits li")
        assert not page.is_visible("#sign-in")
        other = browser.new_context()
        linked = other.new_page()
        linked.goto(f"{address}#token={TOKEN.replace(' ', '%20')}")
        linked.wait_for_selector("#hits li")
        assert TOKEN.split()[0] not in linked.url.partition("#")[2]
        other.close()
    finally:
        context.close()
        stop(process)
