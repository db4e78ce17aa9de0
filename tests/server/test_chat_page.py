"""The chat page in a real browser: type, stream, stop, reload, begin again; keys and errors."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import MODEL, LiveServer, serving
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from infinilm import LLM

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

needs_browser = pytest.mark.skipif(
    BROWSER is None or DRIVER is None, reason="no chromium and chromedriver on the PATH; the page is a browser's"
)


class Page:
    """The page as its user sees it."""

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver = driver
        self.url = url
        driver.get("about:blank")  # a page that is left keeps its conversation: leave first, then forget
        driver.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": url, "storageTypes": "all"})
        driver.get_log("browser")  # what it complained of before
        self.open()

    def open(self) -> None:
        self.driver.get(self.url)

    def element(self, name: str) -> WebElement:
        return self.driver.find_element(By.ID, name)

    def turns(self) -> list[str]:
        return [it.text for it in self.driver.find_elements(By.CSS_SELECTOR, ".turn .text")]

    def figures(self) -> list[str]:
        return [it.text for it in self.driver.find_elements(By.CSS_SELECTOR, ".turn .figures")]

    def is_busy(self) -> bool:
        return bool(self.driver.find_elements(By.CSS_SELECTOR, ".turn.busy"))

    def ask(self, text: str) -> None:
        self.element("prompt").send_keys(text, Keys.ENTER)

    def wait(self, condition: Callable[[], Any]) -> Any:
        ignored = [StaleElementReferenceException]
        waiting = WebDriverWait(self.driver, 30, poll_frequency=0.02, ignored_exceptions=ignored)
        return waiting.until(lambda _: condition())

    def complaints(self) -> list[str]:
        """Return what the browser's console holds: what the policy forbade, what the script failed on."""
        return [it["message"] for it in self.driver.get_log("browser") if "status of 401" not in it["message"]]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER or ""
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path_factory.mktemp('browser')}",
        "--window-size=1000,800",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    running = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield running
    running.quit()


@pytest.fixture
def page(driver: webdriver.Chrome, demo: LiveServer) -> Iterator[Page]:
    shown = Page(driver, demo.url)
    yield shown
    assert shown.complaints() == []


@needs_browser
def test_question_is_answered(page: Page) -> None:
    page.wait(lambda: page.element("model").text == MODEL)
    assert page.driver.title == f"{MODEL} · infinilm"
    assert not page.element("send").is_enabled()
    page.ask("seven plus eight")
    page.wait(lambda: page.turns() == ["seven plus eight", "fifteen"] and not page.is_busy())
    assert re.fullmatch(r"[\d.]+ tokens/s · 2 tokens · first after \d+\.\d\d s", page.figures()[0])
    page.ask("three minus nine")
    page.wait(lambda: page.turns()[2:] == ["three minus nine", "minus six"])
    assert page.element("prompt").get_property("value") == ""


@needs_browser
def test_conversation_outlives_a_reload_and_ends_with_new_chat(page: Page) -> None:
    page.ask("seven plus eight")
    page.wait(lambda: page.turns() == ["seven plus eight", "fifteen"] and not page.is_busy())
    figures = page.figures()
    page.open()
    page.wait(lambda: page.turns() == ["seven plus eight", "fifteen"])
    assert page.figures() == figures
    page.element("new").click()
    page.wait(lambda: page.turns() == [] and page.element("empty").is_displayed())
    page.open()
    assert page.turns() == []


@pytest.fixture
def talkative(driver: webdriver.Chrome, tiny: Path) -> Iterator[tuple[Page, LiveServer]]:
    """A page whose model talks until it is stopped: it says no end-of-sequence token by itself."""
    llm = LLM(tiny, kv_cache_memory=2**21, generation_config="vllm")
    with serving(llm) as live:
        yield Page(driver, live.url), live


@needs_browser
def test_answer_comes_in_pieces_and_stops_when_told(talkative: tuple[Page, LiveServer]) -> None:
    page, live = talkative
    with live.pausing(after=20):
        page.ask("hello")
        page.wait(lambda: "tokens" in "".join(page.figures()))
        assert page.is_busy()
        assert page.element("stop").is_displayed()
        assert not page.element("send").is_displayed()
        page.element("stop").click()
        page.wait(lambda: not page.is_busy())
        live.wait_for_requests(0)
    assert page.figures()[0].endswith("stopped")
    stats = live.wait_until_idle()
    assert stats.num_generation_tokens < 30
    assert stats.num_finished["abort"] == 1
    kept = page.turns()
    page.open()
    page.wait(lambda: page.turns() == kept)
    assert page.complaints() == []


@needs_browser
def test_reload_in_the_middle_keeps_what_was_said_and_ends_the_request(talkative: tuple[Page, LiveServer]) -> None:
    page, live = talkative
    with live.pausing(after=20):
        page.ask("hello")
        page.wait(lambda: "tokens" in "".join(page.figures()))
        page.open()
        live.wait_for_requests(0)
        assert page.turns()[0] == "hello"
    live.wait_until_idle()


@needs_browser
def test_key_is_asked_for_and_kept_for_the_session(driver: webdriver.Chrome, tiny: Path) -> None:
    with serving(LLM(tiny, kv_cache_memory=2**21), api_keys=("open sesame",)) as live:
        page = Page(driver, live.url)
        page.wait(lambda: page.element("key").is_displayed())
        page.element("secret").send_keys("wrong", Keys.ENTER)
        page.wait(lambda: page.element("problem").text == "The server does not know this key.")
        page.element("secret").clear()
        page.element("secret").send_keys("open sesame", Keys.ENTER)
        page.wait(lambda: page.element("model").text == MODEL)
        assert not page.element("key").is_displayed()
        page.open()
        page.wait(lambda: page.element("model").text == MODEL)
        page.driver.execute_script("sessionStorage.clear()")


@needs_browser
def test_refusal_is_shown_and_the_question_is_not_lost(driver: webdriver.Chrome, tiny: Path) -> None:
    with serving(LLM(tiny, kv_cache_memory=2**21), limits={"max_prompt_tokens": 30}) as live:
        page = Page(driver, live.url)
        page.ask("much too long for this server")
        page.wait(lambda: "this server's limit is 30" in page.element("problem").text)
        assert page.turns() == []
        assert page.element("prompt").get_property("value") == "much too long for this server"
    page.ask("")
    page.wait(lambda: page.element("problem").text == "The server cannot be reached.")


@needs_browser
def test_text_is_text(page: Page) -> None:
    """What looks like markup stays what it is."""
    page.ask("<b onclick=alert(1)>one</b> plus one")
    page.wait(lambda: len(page.turns()) == 2 and not page.is_busy())
    assert page.turns()[0] == "<b onclick=alert(1)>one</b> plus one"
    assert page.driver.find_elements(By.CSS_SELECTOR, ".turn b") == []


@needs_browser
@pytest.mark.parametrize(("width", "scheme"), [(1000, "light"), (1000, "dark"), (360, "light")])
def test_page_fits_and_can_be_read(page: Page, width: int, scheme: str) -> None:
    """Nothing is wider than the window, and text stands out from what is behind it (WCAG's 4.5 to 1)."""
    page.driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    metrics = {"width": width, "height": 700, "deviceScaleFactor": 1, "mobile": width < 500}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    page.ask("seven plus eight " * 10)
    page.wait(lambda: len(page.turns()) == 2 and not page.is_busy())
    assert page.driver.execute_script("return document.documentElement.scrollWidth") <= width
    for selector in ("h1", "#model", ".turn.user .text", ".turn.assistant .text", ".figures", "#new"):
        assert page.driver.execute_script(CONTRAST, selector) >= 4.5, selector
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


CONTRAST = """
const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
const luminance = (color) => rgb(color).slice(0, 3).map((it) => it / 255)
  .map((it) => it <= 0.04045 ? it / 12.92 : ((it + 0.055) / 1.055) ** 2.4)
  .reduce((sum, it, at) => sum + it * [0.2126, 0.7152, 0.0722][at], 0);
let element = document.querySelector(arguments[0]);
const ink = luminance(getComputedStyle(element).color);
while (rgb(getComputedStyle(element).backgroundColor)[3] === 0) element = element.parentElement;
const paper = luminance(getComputedStyle(element).backgroundColor);
return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
"""


def test_page_asks_nobody_else(demo: LiveServer) -> None:
    """No address but its own; a policy that names its script and style by their hashes and forbids the rest."""
    response = httpx.get(demo.url)
    addresses = set(re.findall(r"https?://[^\s'\"<>)]+", response.text))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=\"(?!data:)", response.text)
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert policy.count("'sha256-") == 2
