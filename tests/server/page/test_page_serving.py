"""The page against the real server, while the shipped model runs requests."""

import json
import urllib.request
from contextlib import contextmanager
from time import sleep

import pytest
from browser import Keys

import moefit
from moefit.engine.api import EngineSettings
from moefit.engine.engine import Engine
from moefit.server.middleware import ServerSettings
from moefit.server.run import HttpServer, bind, url_of
from moefit.server.service import Service

KEY = "sesame"
PROMPT = "def main():\n    "


@contextmanager
def collect_stats(engine, **settings):
    bound = bind("127.0.0.1", 0)
    running = HttpServer(Service(engine, ServerSettings(name="reference", **settings)), bound)
    running.start()
    try:
        yield url_of(bound, "127.0.0.1") + "/"
    finally:
        running.stop()


@pytest.fixture(scope="module")
def engine():
    with moefit.load("reference", memory="16GiB") as served:
        one = Engine(served, EngineSettings())
        one.start()
        yield one
        one.close()


@pytest.fixture(scope="module")
def url(engine):
    with collect_stats(engine) as address:
        yield address


@pytest.fixture
def page(tab, engine, url):
    """A page of a model with half of its experts in memory; checks the console afterwards."""
    ledger = engine.served.budget
    engine.set_memory((ledger.min_bytes + ledger.all_resident_bytes) // 2)
    engine.set_mode("exact")
    tab.console()  # of pages before this one
    tab.open(url)
    yield tab
    assert [line for line in tab.console() if "status of 400" not in line] == []
    assert [asked for asked in tab.requests() if not asked.startswith(url)] == []


def ask(url, path, body):
    request = urllib.request.Request(
        url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def answer(tab) -> str:
    """Return the generated text, without the prompt."""
    return tab.text("try-answer").removeprefix(PROMPT)


@pytest.fixture
def slower(engine):
    """Steps of at least 20 ms, so that a long answer outlasts what a test does on the page."""
    hook = engine.served.model.register_forward_pre_hook(lambda *_: sleep(0.02))
    yield
    hook.remove()


def test_memory_changes_during_stream(page, engine, url, slower):
    tab = page
    tab.script("document.getElementById('try-prompt').value = arguments[0]", PROMPT)
    tab.write("try-tokens", "1500")
    tab.click("try-run")
    room = sum(one.slot_table.num_slots for one in engine.served.blocks.values())
    tab.until(lambda: tab.text("map-count") == str(room))
    picture, ledger = tab.map_picture(), tab.text("parts")
    bar = tab.script("return document.querySelector('.part.slots').style.width")

    tab.by_id("dial-range").send_keys(Keys.HOME)
    assert "about 8 of 128 experts" in tab.text("dial-note")
    tab.click("apply")
    tab.until(lambda: "slots for 8 of 128 experts" in tab.text("dial-answer"))
    assert engine.served.budget.total == engine.served.budget.min_bytes
    tab.until(lambda: tab.text("map-count") == "8")
    tab.until(lambda: tab.map_picture() != picture)
    assert tab.text("parts") != ledger and "768 KiB" in tab.text("parts")
    assert tab.script("return document.querySelector('.part.slots').style.width") != bar
    assert engine.stats().running == 1 and tab.text("running") == "1"

    heard = len(answer(tab))
    tab.until(lambda: len(answer(tab)) > heard + 10)
    tab.click("try-stop")
    tab.until(lambda: "Stopped" in tab.text("try-state"))
    tab.until(lambda: engine.stats().running == 0)
    engine.set_memory(engine.served.budget.all_resident_bytes)
    tokens = int(tab.text("try-state").split()[0])
    request = {"prompt": PROMPT, "max_tokens": min(tokens, 32), "temperature": 0}
    text = ask(url, "v1/completions", request)["choices"][0]["text"]
    assert answer(tab).startswith(text) and len(text) > 20, "as if the budget had stayed"


def test_server_error_is_shown(page, engine):
    tab, before = page, engine.served.budget.total
    tab.write("dial-box", "64 MiB" + Keys.ENTER)
    tab.until(lambda: "wrong" in tab.by_id("dial-answer").get_attribute("class"))
    assert "below this model's minimum" in tab.text("dial-answer")
    assert f"give at least {engine.served.budget.min_bytes} bytes" in tab.text("dial-answer")
    assert engine.served.budget.total == before
    tab.click("undo")
    assert tab.text("dial-answer") == "" and not tab.by_id("undo").is_displayed()


def test_page_shows_server_mode_and_bound(page, engine):
    tab = page
    assert tab.by_id("bound").get_attribute("value") == "0.3"
    tab.script("document.querySelector('input[value=bounded]').click()")
    tab.write("bound", "0.1" + Keys.ENTER)
    tab.until(lambda: tab.text("mode") == "bounded")
    assert (engine.served.policy.mode, engine.served.policy.bound) == ("bounded", 0.1)


def test_external_changes_are_shown(page, engine, url):
    everything = engine.served.budget.all_resident_bytes
    ask(url, "v1/memory", {"bytes": everything, "mode": "virtual"})
    page.until(lambda: page.text("mode") == "virtual")
    assert page.by_id("dial-range").get_attribute("value") == "1000"
    assert "Unlock" not in page.script("return document.body.innerText")


def test_api_key_unlocks_page(tab, engine):
    with collect_stats(engine, api_key=KEY) as url:
        tab.open(url)
        assert tab.state() == "locked"
        tab.by_id("key-input").send_keys("wrong", Keys.ENTER)
        tab.until(lambda: "Bearer" in tab.text("key-note"))
        tab.by_id("key-input").send_keys(KEY, Keys.ENTER)
        tab.until(lambda: tab.state() == "live" and tab.by_id("main").is_displayed())
        assert tab.text("map-of").startswith("of 128")
        tab.script("sessionStorage.clear()")
        tab.console()
        tab.driver.get("about:blank")
