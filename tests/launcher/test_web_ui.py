"""NNI's Web UI in a real browser shows the results of a search."""

import json
import shutil
import tempfile

import pytest
from conftest import LIGHT_TRIAL, SPACE
from experiment import accuracy, metric_value, parameters, printed_parameters
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
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
        elements = self.browser.find_elements(By.CSS_SELECTOR, selector)
        return [element for element in elements if text in element.text]

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


@pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Debian's packages chromium and chromium-driver"
)
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
    proposed = parameters(trials[0])
    page.wait(lambda: page.all("[role=tab]", "Log"))
    assert all(f"{key}:{json.dumps(value)}" in page.text() for key, value in proposed.items())
    page.click("[role=tab]", "Log")
    page.click("button", "View trial log")
    page.wait(lambda: len(page.browser.window_handles) == 2)
    page.browser.switch_to.window(page.browser.window_handles[1])
    page.wait(lambda: "Acc: " in page.text())
    logged = page.text()
    used = printed_parameters(logged)
    assert used == used | proposed
    assert logged.split() == demo.trial_file(trials[0], "trial.log").split()
    page.browser.quit()  # NNI waits up to a minute for its connections
    assert demo.stop() == []
