"""The live page in a real browser, before a server of any shape that may also fail."""

import pytest
from browser import browser
from page_server import Pretender, pretend
from selenium.webdriver.common.keys import Keys

from moefit.serve.budget import format_bytes, parse_bytes

MIB = 1 << 20


@pytest.fixture(scope="module")
def tab():
    with browser() as one:
        yield one


@pytest.fixture(scope="module")
def address():
    """The server stays, the model behind it is each test's own."""
    handle = {}
    with pretend(handle) as url:
        yield handle, url


@pytest.fixture
def served(tab, address):
    """Put a model of this shape behind the address; afterwards the page must have behaved."""
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


@pytest.fixture(scope="module")
def modules(tab, address):
    """The page's modules, without a look at the page."""
    handle, url = address
    handle["model"] = Pretender()
    tab.driver.get(url)
    return tab


@pytest.fixture
def page(tab, served):
    """A page before the usual stand-in."""
    model, url = served()
    tab.open(url)
    return tab, model


# What is pure


SIZES = [0, 1, 1023, 1024, 1536, 10 * MIB - 1, 99.94 * MIB, 1000 * MIB, 5046586573, 3 << 40]


def test_bytes_are_written_as_the_command_line_writes_them(modules):
    written = modules.module("numbers", "v[0].map(m.formatBytes)", SIZES)
    assert written == [format_bytes(size) for size in SIZES]


def test_bytes_are_read_as_the_server_reads_them(modules):
    texts = ["4.7GiB", "512MB", "3g", " 1.5 KiB ", "1048576", "12b", ".5mib", "2TiB"]
    assert modules.module("dial", "v[0].map(m.parseBytes)", texts) == [
        parse_bytes(t) for t in texts
    ]
    no = ["", "x", "-1", "0", "1e3", "4.7 GiB 3", "1,5GiB"]
    assert modules.module("dial", "v[0].map(m.parseBytes)", no) == [None] * len(no)


def test_sizes_that_differ_by_a_step_are_written_differently(modules):
    sizes = [375 * MIB + step * MIB // 16 for step in range(40)]
    texts = modules.module(
        "numbers", "v[0].map((size) => m.formatFine(size, v[1]))", sizes, MIB / 16
    )
    assert len(set(texts)) == len(sizes)
    assert modules.module("numbers", "m.formatFine(27 * 2 ** 30, 2 ** 28)") == "27.0 GiB"


def test_the_ends_of_the_dial_are_exact_and_each_position_finds_itself(modules):
    ends = {"floor": 393347073, "top": 405143553}
    there = modules.module("dial", "[...Array(1001).keys()].map((p) => m.bytesAt(p, v[0]))", ends)
    assert (there[0], there[-1]) == (ends["floor"], ends["top"])
    assert sorted(there) == there
    back = modules.module("dial", "v[0].map((size) => m.positionOf(size, v[1]))", there, ends)
    assert back == list(range(1001))
    ticks = modules.module("dial", "m.ticks(v[0])", ends)
    assert 2 <= len(ticks) <= 6 and all(ends["floor"] < size < ends["top"] for size in ticks)
    assert modules.module("dial", "m.ticks({ floor: 5, top: 5 })") == []


def test_only_what_differs_is_asked_for(modules):
    force = {"bytes": 100, "mode": "exact"}
    cases = [
        ({}, None),
        ({"bytes": 100, "mode": "exact"}, None),
        ({"bytes": "4GiB"}, {"bytes": "4GiB"}),
        ({"bytes": 90, "mode": "virtual"}, {"bytes": 90, "mode": "virtual"}),
        ({"bound": 0.2}, None),
        ({"mode": "bounded", "bound": 0.2}, {"mode": "bounded", "bound": 0.2}),
    ]
    asked = modules.module(
        "dial", "v[0].map((one) => m.change(one, v[1]))", [c[0] for c in cases], force
    )
    assert asked == [body for _, body in cases]


@pytest.mark.parametrize("total", [None, 383 * MIB, 500 * MIB])
def test_the_ledgers_parts_fill_the_budget_and_follow_each_other(modules, total):
    model = Pretender()
    model.total = total
    memory = model.memory()
    view = modules.module("ledger", "m.ledger(v[0])", memory)
    assert sum(part["bytes"] for part in view["parts"]) == view["total"]
    edges = [0.0] + [part["to"] for part in view["parts"]]
    assert [part["from"] for part in view["parts"]] == edges[:-1]
    assert edges[-1] * view["axis"] == pytest.approx(view["total"])
    assert all(0 <= share <= 1 for share in view["marks"].values())


def test_layers_are_told_apart_by_the_shortest_names(modules):

    def short(*names):
        return modules.module("residency", "m.shortNames(v[0])", names)

    assert short("model.layers.3.mlp", "model.layers.11.mlp") == ["3", "11"]
    assert short("encoder.block.1.layer.1.mlp", "decoder.block.1.layer.2.mlp") == ["enc 1", "dec 1"]
    assert short("a.1.b", "a.1.c") == ["0", "1"]


def test_events_are_whole_wherever_the_stream_is_cut(modules):
    stream = 'data: {"text": "é\\n"}\r\n\r\n: comment\n\ndata:a\ndata: b\n\ndata: [DONE]\n\n'
    code = """[...Array(v[0].length).keys()].map((cut) => {
      const reader = new m.EventReader();
      return [...reader.push(v[0].slice(0, cut)), ...reader.push(v[0].slice(cut))];
    })"""
    for events in modules.module("events", code, stream):
        assert events == ['{"text": "é\\n"}', "a\nb", "[DONE]"]


def test_a_history_draws_gaps_where_nothing_was_known(modules):
    code = """(() => { const h = new m.History(5);
      v[0].forEach((value) => h.push(value)); return h.path(40, 11); })()"""
    assert (
        modules.module("history", code, [1, 2, None, 4, 0])
        == "M0.0 7.8L10.0 5.5M30.0 1.0L40.0 10.0"
    )
    assert modules.module("history", code, [None]) == ""


def test_rates_come_of_what_the_counters_gained(modules):
    before = {"hits": 10, "fetches": 0, "bytes_read": 100}
    now = {"hits": 13, "fetches": 1, "bytes_read": 300}
    code = "m.between(v[0], v[1], v[2])"
    assert modules.module("history", code, before, now, 2) == {"hitRate": 0.75, "bytesRead": 100}
    idle = {"hitRate": None, "bytesRead": 0}
    assert modules.module("history", code, now, now, 2) == idle
    assert modules.module("history", code, now, before, 2) == {"hitRate": None, "bytesRead": None}


def test_pauses_between_tries_grow_and_end_growing(modules):
    pauses = modules.module("poller", "[0, 1, 2, 3, 4, 5, 50].map(m.pause)")
    assert pauses == [1000, 1000, 2000, 4000, 8000, 15000, 15000]


# What is seen


@pytest.mark.parametrize("shape", [(4, 8), (8, 16), (48, 256)])
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_window(tab, served, shape, width):
    model, url = served(*shape, mixed=True)
    tab.open(url, width=width)
    tab.until(lambda: tab.script("return document.getElementById('map-canvas').width > 300 / 4"))
    assert tab.script("return document.documentElement.scrollWidth") <= width
    assert tab.text("map-of") == f"of {model.layers * model.experts:,}"
    cells = tab.script("return document.getElementById('map-canvas').offsetWidth") / model.experts
    assert cells >= 4


def test_figures_are_the_servers(page):
    tab, model = page
    memory = model.memory()
    resident = sum(len(block["resident"]) for block in memory["blocks"])
    assert tab.text("model") == memory["model"]
    assert tab.text("map-count") == str(resident)
    for key in ("process", "weights", "kv_cache", "workspace", "staging"):
        assert format_bytes(memory["budget"][key]) in tab.text("parts"), key
    assert format_bytes(memory["slot_bytes"]) in tab.text("parts")
    assert format_bytes(memory["peak_process_bytes"]) in tab.text("parts")
    assert tab.driver.title == f"{memory['model']} · moefit"


def test_the_map_is_read_out_cell_by_cell_with_the_keyboard(tab, served):
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
    assert "in memory as" in tab.text("map-readout")
    assert "int4" in tab.text("map-legend")
    assert "4 layers" in tab.text("map-summary")


def test_a_pointed_at_cell_is_read_out(page):
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


def test_everything_that_can_be_used_has_a_name(page):
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


def test_nothing_moves_for_those_who_ask_for_calm(tab, served):
    _, url = served()
    code = "return getComputedStyle(document.querySelector('.part')).transitionDuration"
    tab.open(url, calm=True)
    assert tab.script(code) == "0s"
    tab.open(url, calm=False)
    assert tab.script(code) != "0s"


# What is done


def test_what_is_being_set_stays_while_the_world_changes(page):
    tab, model = page
    slider = tab.by_id("dial-range")
    slider.send_keys(Keys.PAGE_DOWN, Keys.ARROW_LEFT)
    wanted, written = slider.get_attribute("value"), tab.by_id("dial-box").get_attribute("value")
    model.total = model.everything  # somebody else
    tab.until(lambda: tab.text("map-count") == "128")
    assert slider.get_attribute("value") == wanted
    assert tab.by_id("dial-box").get_attribute("value") == written
    tab.click("undo")
    assert slider.get_attribute("value") == "1000"
    assert not tab.by_id("apply").is_enabled()
    assert model.changes == []


def test_a_mode_and_its_bound_are_set(page):
    tab, model = page
    tab.script("document.querySelector('input[value=bounded]').click()")
    tab.write("bound", "0.2")
    tab.click("apply")
    tab.until(lambda: tab.text("mode") == "bounded")
    assert model.changes == [{"mode": "bounded", "bound": 0.2}]
    assert not tab.by_id("undo").is_displayed()


def test_a_server_that_goes_away_is_waited_for(page):
    tab, model = page
    shown = tab.text("map-count")
    model.fails = True
    tab.until(lambda: tab.state() == "reconnecting")
    assert "the model is away" in tab.text("trouble") and tab.by_id("trouble").is_displayed()
    assert tab.text("map-count") == shown
    model.fails = False
    tab.until(lambda: tab.state() == "live")
    assert not tab.by_id("trouble").is_displayed()


def test_a_hidden_page_asks_for_nothing(page):
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


def test_an_answer_is_text_whatever_it_says(page):
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
    assert tab.text("try-state").startswith("15 tokens, the first after ")
    assert tab.text("try-pace").endswith(" tokens/s")


def test_stop_hangs_up(page):
    tab, model = page
    tab.write("try-tokens", "5000")
    tab.click("try-run")
    tab.until(lambda: "word3" in tab.text("try-answer"))
    assert model.running == 1
    tab.click("try-stop")
    tab.until(lambda: "Stopped" in tab.text("try-state"))
    tab.until(lambda: model.running == 0)
    assert tab.by_id("try-run").is_enabled()


def test_an_error_within_a_stream_is_shown(page):
    tab, model = page
    model.breaks_after = 3
    tab.click("try-run")
    tab.until(lambda: tab.text("try-state") == "a shard could not be read")
    assert "word2" in tab.text("try-answer")


def test_a_key_is_asked_for_and_kept_in_this_tab_only(tab, served):
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
