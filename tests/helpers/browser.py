"""A headless Chromium, and a user's actions in it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not CHROMIUM or not DRIVER:
    pytest.skip("Chromium and chromedriver are not installed", allow_module_level=True)

__all__ = ["Browser", "Keys", "browser"]
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
PATIENCE = 30


class Browser:
    """One tab that records console messages and requests."""

    def __init__(self, driver):
        self.driver = driver
        self.script = driver.execute_script

    def open(self, url: str, *, width: int = 1280, dark: bool = False, calm: bool = True) -> None:
        """Open the page and wait until it has data or requests a key."""
        self.size(width)
        features = {
            "prefers-color-scheme": "dark" if dark else "light",
            "prefers-reduced-motion": "reduce" if calm else "no-preference",
        }
        media = [{"name": name, "value": value} for name, value in features.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
        self.driver.get(url)
        self.until(lambda: self.state() in ("live", "locked"))

    def size(self, width: int, height: int = 900) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def by_id(self, name: str):
        return self.driver.find_element(By.ID, name)

    def state(self) -> str:
        return self.by_id("state").get_attribute("data-state")

    def text(self, name: str) -> str:
        return self.script("return document.getElementById(arguments[0]).textContent", name)

    def click(self, name: str) -> None:
        self.by_id(name).click()

    def write(self, name: str, text: str) -> None:
        """Replace the text of a field."""
        self.by_id(name).send_keys(Keys.CONTROL + "a", Keys.NULL, text)

    def until(self, holds):
        """Wait until the condition is truthy and return its value."""
        return WebDriverWait(self.driver, PATIENCE, poll_frequency=0.05).until(lambda _: holds())

    def module(self, name: str, expression: str, *values):
        """Evaluate an expression over a module `m` of the page and the values `v`."""
        code = """
            const [name, values, done] = arguments;
            import(`/page/${name}.js`).then((m) => done(((m, v) => (EXPRESSION))(m, values)))
              .catch((error) => done(`failed: ${error}`));
        """
        return self.driver.execute_async_script(
            code.replace("EXPRESSION", expression), name, list(values)
        )

    def map_picture(self) -> str:
        return self.script("return document.getElementById('map-canvas').toDataURL()")

    def console(self) -> list[str]:
        """Return console messages since the last call, including HTTP errors."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Return the addresses that the page has requested since it was opened."""
        return self.script(
            "return performance.getEntriesByType('resource').concat("
            "performance.getEntriesByType('navigation')).map((entry) => entry.name)"
        )


@contextmanager
def browser() -> Iterator[Browser]:
    """Start the browser for the duration of the context."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = Service(DRIVER, log_output=os.devnull)
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_script_timeout(PATIENCE)
    driver.set_page_load_timeout(PATIENCE)
    try:
        yield Browser(driver)
    finally:
        driver.quit()
