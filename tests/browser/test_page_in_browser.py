"""The report and the server's page in a real Chromium, on a desk and on a phone: they load nothing and fit the screen.

Skipped where no Chromium or Chrome is installed.
"""

import pytest
from app_thread import running_app

from medkit.inference.serve import make_router
from medkit.inference.server_engine import ServerAddress
from medkit.stage import DISCLAIMER

DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
# contrast of every visible text with what lies behind it, as the accessibility guideline WCAG 2 defines it
CONTRASTS = """() => {
  const luminance = (colour) => {
    const linear = (x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = colour.match(/[\\d.]+/g).map((x) => linear(x / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const text = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!text || !node.checkVisibility()) continue;
    let behind = node;
    while (behind && getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
    const a = luminance(getComputedStyle(node).color);
    const b = luminance(getComputedStyle(behind || document.documentElement).backgroundColor);
    found.push([node.tagName + "." + node.className, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]);
  }
  return found;
}"""


@pytest.fixture
def visit(chromium, built):
    """visit(page, viewport, scheme) → the open page; at the end no page may have sent a request or run a script."""
    contexts, requests = [], []

    def open_page(page, viewport=DESK, scheme="light"):
        contexts.append(chromium.new_context(viewport=viewport, color_scheme=scheme))
        tab = contexts[-1].new_page()
        tab.on("requestfinished", lambda request: requests.append(request.url))
        tab.goto((built / page).as_uri())
        return tab

    yield open_page
    attacked = [tab.evaluate("window.attacked") for context in contexts for tab in context.pages]
    for context in contexts:
        context.close()
    assert set(attacked) == {None}
    assert [url for url in requests if not url.startswith(("data:", built.as_uri()))] == []


@pytest.mark.parametrize(("viewport", "scheme"), [(DESK, "light"), (PHONE, "dark")], ids=["desk", "phone in the dark"])
def test_the_report_fits_the_screen_and_every_text_of_it_can_be_read(visit, viewport, scheme):
    tab = visit("report.html", viewport, scheme)
    assert tab.locator(".steps li").count() > 5
    assert tab.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    contrasts = tab.evaluate(CONTRASTS)
    assert len(contrasts) > 50 and [one for one in contrasts if one[1] < 4.5] == []


def test_a_notebook_opens_from_the_report_and_leads_back(visit):
    tab = visit("report.html")
    tab.get_by_role("link", name="01_data").click()
    assert tab.locator("h1").inner_text().startswith("1 · Data")
    assert tab.locator("math").count() == 2 and tab.get_by_text("Research and teaching only").is_visible()
    tab.get_by_role("link", name="report of the run").click()
    assert tab.title() == "medkit · run toy"


@pytest.fixture(scope="module")
def served():
    """The server's page; its model was taught nothing, so that the router answers alone."""
    router = make_router(ServerAddress("http://127.0.0.1:9/v1", "none"), "a key", tasks=[])
    with running_app(router) as url:
        yield f"{url}/"


@pytest.mark.parametrize("viewport", [DESK, PHONE], ids=["desk", "phone"])
def test_a_person_asks_on_the_page_of_the_server(chromium, served, viewport):
    """The key is asked for when it is needed, and what a person writes stays text."""
    tab = chromium.new_page(viewport=viewport)
    problems = []
    tab.on("console", lambda message: problems.append(message.text))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.goto(served)
    assert tab.get_by_text(DISCLAIMER).is_visible() and not tab.get_by_label("API key").is_visible()
    tab.get_by_label("Your question").fill("<img src=x onerror='window.attacked=1'> Who are you?")
    tab.get_by_role("button", name="Ask").click()
    tab.get_by_text("Error: the API key is wrong or missing").wait_for()
    tab.get_by_label("API key").fill("a key")
    tab.get_by_role("button", name="Ask").click()
    tab.get_by_text("I am a research model").last.wait_for()
    tab.get_by_label("Your question").fill("My father is not breathing")
    tab.get_by_role("button", name="Ask").click()
    tab.locator("article", has_text="My father").get_by_text("may be an emergency").wait_for()
    assert tab.evaluate("window.attacked") is None and tab.locator("img").count() == 0
    assert tab.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    assert [one for one in tab.evaluate(CONTRASTS) if one[1] < 4.5] == []
    assert [problem for problem in problems if "401" not in problem] == []
    tab.close()
