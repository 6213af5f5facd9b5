"""The page in a real browser, against a simulated server of any shape that may fail."""

import re

import pytest
from browser import Keys
from page_server import Pretender

from moefit.serve.memory.budget import format_bytes


@pytest.fixture
def served(tab, address):
    handle, url = address

    def serve(*shape, **settings):
        handle["model"] = Pretender(*shape, **settings)
        return handle["model"], url

    yield serve
    assert [
        line for line in tab.console() if "the server responded with a status" not in line
    ] == []
    assert [asked for asked in tab.requests() if not asked.startswith(url)] == []
    tab.script("sessionStorage.clear()")


@pytest.fixture
def page(tab, served):
    """A page connected to the default simulated server."""
    model, url = served()
    tab.open(url)
    return tab, model


# What is seen


MAP_WIDTH = "return document.getElementById('map-canvas').offsetWidth"
MAP_HIDDEN = """
    const one = document.getElementById('map-scroll');
    return one.scrollWidth - one.clientWidth;
"""


@pytest.mark.parametrize("shape", [(4, 8), (8, 16), (48, 256)])
def test_page_fits_window_width(tab, served, shape):
    model, url = served(*shape, mixed=True)
    tab.open(url)
    assert tab.text("map-of") == f"of {model.layers * model.experts:,}"
    for width in (1280, 800, 360):
        tab.size(width)
        tab.until(lambda: tab.script(MAP_WIDTH))
        assert tab.script("return document.documentElement.scrollWidth") <= width
        assert tab.script(MAP_WIDTH) / model.experts >= 4
        assert width < 1280 or tab.script(MAP_HIDDEN) <= 0, "a desktop shows the map whole"


def test_page_shows_server_values(page):
    tab, model = page
    memory = model.memory()
    resident = sum(len(block["resident"]) for block in memory["blocks"])
    assert tab.text("model") == memory["model"]
    assert tab.text("map-count") == str(resident)
    for key in ("process", "tokenizer", "weights", "kv_cache", "workspace", "staging"):
        assert format_bytes(memory["budget"][key]) in tab.text("parts"), key
    assert format_bytes(memory["slot_bytes"]) in tab.text("parts")
    assert format_bytes(memory["peak_process_bytes"]) in tab.text("parts")
    assert tab.driver.title == f"{memory['model']} · moefit"


def test_residency_map_is_keyboard_accessible(tab, served):
    _, url = served(4, 8, mixed=True)
    tab.open(url)
    canvas = tab.by_id("map-canvas")
    canvas.send_keys(Keys.HOME)
    assert tab.text("map-readout").startswith("Layer 0, expert 0: in ")
    canvas.send_keys(Keys.ARROW_DOWN, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert tab.text("map-readout").startswith("Layer 1, expert 2: in ")
    canvas.send_keys(Keys.END, Keys.ARROW_RIGHT, Keys.PAGE_DOWN, Keys.ARROW_DOWN)
    assert tab.text("map-readout").startswith("Layer 3, expert 7: in ")
    tab.script("document.getElementById('map-sort').click()")
    canvas.send_keys(Keys.HOME)
    tab.until(lambda: tab.text("map-readout").endswith(", 1st of 8"))
    assert "in memory" in tab.text("map-readout")
    assert "int4" in tab.text("map-legend")
    assert "4 layers" in tab.text("map-summary")


def test_hovered_cell_is_described(page):
    tab, _ = page
    tab.script("""
        const canvas = document.getElementById('map-canvas');
        const box = canvas.getBoundingClientRect();
        const clientX = box.left + box.width * 2.5 / 16;
        const clientY = box.top + 18 + (box.height - 18) * 5.5 / 8;
        const event = { clientX, clientY, pointerType: 'touch', bubbles: true };
        canvas.dispatchEvent(new PointerEvent('pointerdown', event));
    """)
    assert tab.text("map-readout").startswith("Layer 5, expert 2: ")


CONTRAST = """
    const parse = (text) => text.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
      .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const ground = (one) => {
      for (; one; one = one.parentElement) {
        const colour = parse(getComputedStyle(one).backgroundColor);
        if (colour.length < 4 || colour[3] > 0) return colour;
      }
      return [255, 255, 255];
    };
    const poor = [];
    for (const one of document.querySelectorAll('body *')) {
      const text = [...one.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
      if (!text || !one.checkVisibility() || one.closest(':disabled, noscript')) continue;
      const [a, b] = [light(parse(getComputedStyle(one).color)), light(ground(one))];
      const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      if (ratio < 4.5) poor.push(`${one.tagName} ${one.textContent.slice(0, 30)} ${ratio}`);
    }
    return poor;
"""


@pytest.mark.parametrize("dark", [False, True])
def test_text_is_readable_in_light_and_dark(tab, served, dark):
    _, url = served()
    tab.open(url, dark=dark)
    ground = tab.script("return getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(14, 19, 21)") is dark
    assert tab.script(CONTRAST) == []
    tab.write("dial-box", "1MiB" + Keys.ENTER)
    tab.until(lambda: "at least" in tab.text("dial-answer"))
    assert tab.script(CONTRAST) == []


def test_controls_have_accessible_names(page):
    tab, _ = page
    nodes = tab.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = {
        "button",
        "textbox",
        "slider",
        "radio",
        "checkbox",
        "spinbutton",
        "link",
        "application",
    }
    used = [n for n in nodes if n.get("role", {}).get("value") in roles and not n["ignored"]]
    assert {n["role"]["value"] for n in used} == roles
    assert [n for n in used if not n["name"].get("value")] == []


def test_reduced_motion_is_respected(tab, served):
    _, url = served()
    code = "return getComputedStyle(document.querySelector('.part')).transitionDuration"
    tab.open(url, calm=True)
    assert tab.script(code) == "0s"
    tab.open(url, calm=False)
    assert tab.script(code) != "0s"


# What is done


def test_edited_value_is_not_overwritten(page):
    tab, model = page
    slider = tab.by_id("dial-range")
    slider.send_keys(Keys.PAGE_DOWN, Keys.ARROW_LEFT)
    wanted, written = slider.get_attribute("value"), tab.by_id("dial-box").get_attribute("value")
    model.total = model.all_resident_bytes  # somebody else
    tab.until(lambda: tab.text("map-count") == "128")
    assert slider.get_attribute("value") == wanted
    assert tab.by_id("dial-box").get_attribute("value") == written
    tab.click("undo")
    assert slider.get_attribute("value") == "1000"
    assert not tab.by_id("apply").is_enabled()
    assert model.changes == []


LABELS = """
    return [...document.querySelectorAll('#ticks > span:not(.bare)')].map((one) => one.textContent);
"""


def test_slider_extends_to_best_format(tab, served):
    model, url = served(4, 8, mixed=True, auto=True, slot=8 << 20)
    model.total = model.all_resident_bytes_in["int4"]
    tab.open(url)
    for width in (1280, 360):
        tab.size(width)
        tab.until(lambda: tab.script(LABELS))
        assert tab.script("return document.documentElement.scrollWidth") <= width
        labels = tab.script(LABELS)
        assert labels[0].startswith("min ") and labels[1].startswith("all native "), labels
    tab.size(1280)
    tab.until(lambda: [one.split()[0] for one in tab.script(LABELS)[2:]] == ["int4", "int8"])
    assert tab.text("budget-note").endswith("for all experts at native precision")
    slider = tab.by_id("dial-range")
    slider.send_keys(Keys.END)
    assert "all 32 experts at native precision" in tab.text("dial-note")
    slider.send_keys(Keys.PAGE_DOWN)
    assert "all 32 experts, at int8 or better" in slider.get_attribute("aria-valuetext")
    tab.by_id("dial-range").send_keys(Keys.HOME)
    assert "about 4 of 32 experts" in tab.text("dial-note")
    slider.send_keys(Keys.END)
    tab.click("apply")
    tab.until(lambda: model.changes)
    assert model.changes == [{"bytes": model.most}]


def test_slider_is_usable_with_large_budget(tab, served):
    model, url = served()
    model.total = 20 * model.all_resident_bytes
    tab.open(url)
    every = tab.text("budget-note").removeprefix("of ").removesuffix(" for all experts")
    tab.until(lambda: tab.script(LABELS))
    assert tab.script(LABELS)[1] == f"all {every}"
    slider = tab.by_id("dial-range")
    assert slider.get_attribute("value") == slider.get_attribute("max")
    assert "GiB" in tab.text("budget") and not tab.by_id("apply").is_enabled()
    slider.send_keys(Keys.PAGE_DOWN)
    assert re.search(r"about \d+ of 128 experts", slider.get_attribute("aria-valuetext"))
    tab.click("apply")
    tab.until(lambda: model.changes)
    assert model.min_bytes < model.changes[0]["bytes"] < model.all_resident_bytes


def test_mode_and_bound_are_set(page):
    tab, model = page
    tab.script("document.querySelector('input[value=bounded]').click()")
    tab.write("bound", "0.2")
    tab.click("apply")
    tab.until(lambda: tab.text("mode") == "bounded")
    assert model.changes == [{"mode": "bounded", "bound": 0.2}]
    assert not tab.by_id("undo").is_displayed()
    tab.click("dial-box")
    assert "Prompts are processed in exact mode" in tab.text("dial-note")


def test_page_waits_for_server(page):
    tab, model = page
    shown = tab.text("map-count")
    model.fails = True
    tab.until(lambda: tab.state() == "reconnecting")
    assert "the model is away" in tab.text("trouble") and tab.by_id("trouble").is_displayed()
    assert tab.text("map-count") == shown
    model.fails = False
    tab.until(lambda: tab.state() == "live")
    assert not tab.by_id("trouble").is_displayed()


def test_errors_are_shown_until_resolved(page):
    tab, model = page
    assert not tab.by_id("problems").is_displayed()
    model.problems = ["experts cannot be read"]
    tab.until(lambda: tab.state() == "degraded")
    assert tab.text("problems").startswith("experts cannot be read. 8 reads failed so far, 7 of")
    model.problems = []
    tab.until(lambda: tab.state() == "live")
    assert not tab.by_id("problems").is_displayed()


def test_hidden_page_does_not_poll(page):
    tab, model = page
    hide = """
        Object.defineProperty(document, 'hidden', { get: () => arguments[0], configurable: true });
        document.dispatchEvent(new Event('visibilitychange'));
    """
    tab.script(hide.replace("arguments[0]", "true"))
    tab.driver.execute_async_script("setTimeout(arguments[0], 100)")
    model.asked.clear()
    tab.driver.execute_async_script("setTimeout(arguments[0], 1500)")
    assert model.asked == []
    tab.script(hide.replace("arguments[0]", "false"))
    tab.until(lambda: model.asked)


MARKUP = "<img src=x onerror=document.title='no'>"


def test_requests_are_shown_and_cancelled(page):
    tab, model = page
    tab.until(lambda: tab.text("requests-count").startswith("none"))
    model.going = {
        7: {"request_id": "first", "key": "alice", "choices": 2},
        8: {"request_id": "next", "state": "waiting", "waits_for": "1 request before it"},
        9: {"request_id": "third", "state": "prompt", "computed_tokens": 128},
    }
    tab.until(lambda: tab.text("requests-count").startswith("3"))
    shown = tab.text("requests-list")
    assert "answering, 17 of at most 128 tokens, 2 choices" in shown and "key alice" in shown
    assert "waits for 1 request before it" in shown
    assert "reading the prompt, 128 of 400 tokens" in shown
    tab.until(lambda: "steps wait for experts" in tab.text("requests-count"))
    button = tab.script("return document.querySelector('#requests-list button')")
    assert button.accessible_name == "Cancel request first"
    button.click()
    tab.until(lambda: list(model.going) == [8, 9])
    tab.until(lambda: "first" not in tab.text("requests-list"))
    model.going.clear()
    tab.until(lambda: tab.text("requests-count").startswith("none"))
    assert tab.text("requests-list") == ""


def test_refused_cancelling_is_shown(page):
    tab, model = page
    model.going = {7: {"request_id": "first"}}

    def refuse(number):
        raise ValueError(f"no request {number} of yours")

    model.cancel = refuse
    tab.until(lambda: "first" in tab.text("requests-list"))
    tab.script("document.querySelector('#requests-list button').click()")
    tab.until(lambda: tab.text("requests-answer") == "no request 7 of yours")
    assert tab.script("return document.querySelector('#requests-list button').disabled") is False


def test_what_users_send_is_text_and_fits_a_phone(page):
    tab, model = page
    long = "x" * 128
    model.going = {
        number: {"request_id": f"{MARKUP}{long}", "key": MARKUP, "path": MARKUP, "state": "waiting",
                 "waits_for": MARKUP}
        for number in range(40)
    }  # fmt: skip
    entry = {"at": 1.8e9, "text": MARKUP + long, "by": MARKUP, "request_id": MARKUP}
    model.happened, model.failed = [entry], [entry]
    tab.until(lambda: tab.text("errors").count(MARKUP) == 3)
    assert tab.text("requests-list").count(MARKUP) == 4 * 40
    assert f"{MARKUP}{long} by {MARKUP}" in tab.text("changes")
    assert tab.script("return document.querySelectorAll('.requests img').length") == 0
    assert tab.driver.title == "pretender-8x16 · moefit"
    for width in (360, 1280):
        tab.size(width)
        assert tab.script("return document.documentElement.scrollWidth") <= width
    assert tab.script(CONTRAST) == []


def test_history_is_for_operators(page):
    tab, model = page
    assert tab.by_id("history").is_displayed()
    assert tab.text("errors") == "No request has failed."
    model.operator = False
    tab.until(lambda: not tab.by_id("history").is_displayed())


def test_output_is_shown_as_text(page):
    tab, _ = page
    tab.write("try-prompt", "<i>p</i>")
    tab.write("try-tokens", "15")
    tab.click("try-run")
    tab.until(lambda: "Max tokens reached" in tab.text("try-state"))
    assert tab.text("try-answer").startswith("<i>p</i>word0 word1 ")
    assert tab.text("try-answer").count("<b>x</b>") == 2
    assert (
        tab.script("return document.querySelectorAll('#try-answer b, #try-answer i').length") == 0
    )
    assert tab.text("try-state").startswith("15 tokens, first token after ")
    assert tab.text("try-pace").endswith(" tokens/s")


def test_stop_disconnects(page):
    tab, model = page
    tab.write("try-tokens", "5000")
    tab.click("try-run")
    tab.until(lambda: "word3" in tab.text("try-answer"))
    assert model.running == 1
    tab.click("try-stop")
    tab.until(lambda: "Stopped" in tab.text("try-state"))
    tab.until(lambda: model.running == 0)
    assert tab.by_id("try-run").is_enabled()


def test_stream_error_is_shown(page):
    tab, model = page
    model.breaks_after = 3
    tab.click("try-run")
    tab.until(lambda: tab.text("try-state") == "a shard could not be read")
    assert "word2" in tab.text("try-answer")


def test_truncated_stream_is_reported(page):
    tab, model = page
    model.ends_after = 2
    tab.click("try-run")
    tab.until(lambda: "ended the stream early" in tab.text("try-state"))


def test_api_key_is_kept_in_tab(tab, served):
    model, url = served()
    model.key = "sesame"
    tab.open(url)
    assert tab.state() == "locked" and not tab.by_id("main").is_displayed()
    tab.by_id("key-input").send_keys("wrong", Keys.ENTER)
    tab.until(lambda: "not the server's" in tab.text("key-note"))
    tab.by_id("key-input").send_keys("sesame", Keys.ENTER)
    tab.until(lambda: tab.state() == "live")
    assert not tab.by_id("key-form").is_displayed()
    assert tab.script("return Object.values(sessionStorage)") == ["sesame"]
    kept = tab.script("return [document.cookie, localStorage.length, location.href]")
    assert kept == ["", 0, url]
