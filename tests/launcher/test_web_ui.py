"""NNI's Web UI in a real browser shows the results of a search.

docs/web-ui.md's pictures are taken of a search that is on a port, running or at nnictl view. The
icons come from the Internet, or from a folder that `npm pack @fluentui/font-icons-mdl2` has filled:

    export SCREENSHOTS_OF=8090 ICONS=package/fonts
    python -m pytest -n 0 tests/launcher/test_web_ui.py -k screenshots
"""

import base64
import json
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

import pytest
from conftest import LIGHT_TRIAL, ROOT, SPACE
from experiment import accuracy, metric_value, parameters, printed_parameters
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Debian's packages chromium and chromium-driver"
)
# What the chart of a tab has been given to draw: the page draws it on a canvas, without elements.
SERIES = """
    let node = document.querySelector(".echarts-for-react");
    if (!node) return null;
    let fiber = node[Object.keys(node).find(key => key.startsWith("__react"))];
    while (fiber && !fiber.memoizedProps?.option?.series) fiber = fiber.return;
    return fiber && fiber.memoizedProps.option.series.map(series => [series.name, series.data]);
"""


class Page:
    """A page of the Web UI in a browser of its own."""

    def __init__(self, browser, port):
        self.browser = browser
        self.url = f"http://127.0.0.1:{port}"

    def open(self, path, shows):
        """Open a page and wait until its text contains shows."""
        self.browser.get(f"{self.url}/{path}")
        self.wait(lambda: shows in self.text())

    def wait(self, condition, seconds=60):
        return WebDriverWait(self.browser, seconds).until(lambda _: condition())

    def text(self):
        return self.browser.find_element(By.TAG_NAME, "body").text

    def all(self, selector, text=""):
        found = self.browser.find_elements(By.CSS_SELECTOR, selector)
        return [element for element in found if text in element.text]

    def click(self, selector, text=""):
        self.wait(lambda: self.all(selector, text))[0].click()


@pytest.fixture
def page():
    """Return a function that opens the Web UI on a port in a new browser, closed at the end."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-sync"
    flags += " disable-background-networking disable-component-update window-size=1280,1000"
    flags += " no-proxy-server disable-dev-shm-usage"
    for flag in flags.split():
        options.add_argument(f"--{flag}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options.add_argument(f"--user-data-dir={profile}")
        browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        try:
            yield lambda port: Page(browser, port)
        finally:
            browser.quit()


@needs_browser
def test_the_web_ui_shows_the_results_of_a_search(experiment, page):
    command = f"{LIGHT_TRIAL} | tee $NNI_OUTPUT_DIR/trial.log"  # where NNI's print writes
    changes = {"tuner": {"name": "Random"}, "searchSpace": SPACE, "maxTrialNumber": 2}
    demo = experiment("configs/demo.yml", trialCommand=command, **changes)
    trials = demo.wait(240)
    best = max(accuracy(trial) for trial in trials)
    page = page(demo.port)

    page.open("oview", shows="Best metric")
    page.wait(lambda: "DONE" in page.text())
    shown = page.text().splitlines()
    assert shown[shown.index("Status") + 1] == "DONE"
    assert float(shown[shown.index("Best metric") + 1]) == best

    page.open("detail", shows="Trial jobs")
    rows = page.wait(lambda: page.all("[data-automationid=DetailsRow]"))
    assert len(rows) == len(trials)
    for row, trial in zip(rows, trials, strict=True):
        expected = [str(trial["sequenceId"]), trial["trialJobId"], "SUCCEEDED"]
        assert [line for line in row.text.splitlines() if line in expected] == expected
        assert f"{accuracy(trial):g} (FINAL)" in row.text

    page.click("[role=tab]", "Hyper-parameter")
    axes = page.wait(lambda: {text.text for text in page.all("svg text")})
    assert {*SPACE, "default"} <= axes

    page.click("[role=tab]", "Intermediate result")
    curves = dict(page.wait(lambda: page.browser.execute_script(SERIES)))
    assert curves.keys() == {trial["trialJobId"] for trial in trials}
    for name, losses in curves.items():
        metrics = [m for m in demo.get(f"metric-data/{name}") if m["type"] == "PERIODICAL"]
        assert losses == [metric_value(metric) for metric in metrics]

    page.click("[data-automationid=DetailsRow] i[data-icon-name=ChevronRight]")
    given = parameters(trials[0])
    page.wait(lambda: page.all("[role=tab]", "Log"))
    assert all(f"{key}:{json.dumps(value)}" in page.text() for key, value in given.items())
    page.click("[role=tab]", "Log")
    page.click("button", "View trial log")
    page.wait(lambda: len(page.browser.window_handles) == 2)
    page.browser.switch_to.window(page.browser.window_handles[1])
    page.wait(lambda: "Acc: " in page.text())
    logged = page.text()
    used = printed_parameters(logged)
    assert used == used | given
    assert logged.split() == demo.trial_file(trials[0], "trial.log").split()
    page.browser.quit()  # NNI waits up to a minute for its connections
    assert demo.stop() == []


@needs_browser
@pytest.mark.skipif(not os.environ.get("SCREENSHOTS_OF"), reason="renews the pictures")
def test_screenshots(page):
    page = page(os.environ["SCREENSHOTS_OF"])

    # The names that the page gives its fonts: FabricMDL2Icons, FabricMDL2Icons-0, ...
    fonts = sorted(Path(os.environ.get("ICONS", "/nowhere")).glob("fabric-icons-*.woff"))
    style = ""
    for font in fonts:
        number = re.match(r"fabric-icons(-\d+)?-", font.name)[1] or ""
        data = base64.b64encode(font.read_bytes()).decode()
        source = f"url(data:font/woff;base64,{data}) format('woff')"
        style += f"@font-face {{font-family: 'FabricMDL2Icons{number}'; src: {source}}}\n"

    def save(name, height):
        page.browser.execute_script(
            "document.head.appendChild(document.createElement('style')).textContent = arguments[0]",
            style,
        )
        time.sleep(5)  # for what is drawn without a sign that it is done
        with tempfile.TemporaryDirectory() as folder:
            picture = Path(folder, "page.png")
            page.browser.save_screenshot(str(picture))
            image = Image.open(picture).crop((0, 0, 1270, height)).quantize(64)
            image.save(ROOT / "docs" / name, optimize=True)

    page.open("oview", shows="Best metric")
    save("overview.png", 673)
    page.open("detail", shows="Trial jobs")
    page.click("[role=tab]", "Hyper-parameter")
    page.wait(lambda: page.all("svg text"))
    page.click(".ms-Dropdown", "100%")
    page.click(".ms-Dropdown-item", "Top 20%")
    save("hyper-parameter.png", 640)
    page.click("[role=tab]", "Duration")
    page.wait(lambda: page.all("canvas"))
    save("duration.png", 590)
    page.click("[role=tab]", "Default metric")
    page.wait(lambda: page.all("canvas"))
    save("default-metric.png", 560)
    page.click("[role=tab]", "Intermediate result")
    page.wait(lambda: page.all("canvas"))
    save("intermediate-result.png", 560)
