"""The report in a real Chromium, at the width of a desk and of a phone: it works, reads well, and loads nothing.

Skipped where no Chromium or Chrome is installed.
"""

import itertools
import re
import shutil

import pandas as pd
import pytest

from medkit.reporting import tables

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (in the dev extra)")

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
DESK, PHONE, SMALL_PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}, {"width": 360, "height": 640}

# every line of visible text as [left, top, right, bottom, text], cut to the boxes that scroll. Formulas are left out:
# the line boxes of sub- and superscripts are taller than their glyphs and overlap by design
TEXT_BOXES = """() => {
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, parent = node.parentElement;
    if (!node.data.trim() || parent.closest("math, script, style, noscript, select, .skip")) continue;
    if (!parent.checkVisibility({visibilityProperty: true, opacityProperty: true})) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const line of range.getClientRects()) {
      let [left, top, right, bottom] = [line.left, line.top, line.right, line.bottom];
      for (let box = parent; box; box = box.parentElement) {
        if (getComputedStyle(box).overflowX === "visible") continue;
        const clip = box.getBoundingClientRect();
        left = Math.max(left, clip.left); right = Math.min(right, clip.right);
      }
      const text = node.data.trim().slice(0, 60);
      if (right - left > 1 && bottom - top > 1) found.push([left, top + scrollY, right, bottom + scrollY, text]);
    }
  }
  return found;
}"""

# contrast of every visible text with what lies behind it, as the web's accessibility guideline (WCAG 2) defines it
CONTRASTS = """() => {
  const shade = (colour) => {
    const linear = (x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = colour.match(/[\\d.]+/g).map((x) => linear(x / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = new Map();
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!own || !node.checkVisibility() || node.closest("script, style, noscript, :disabled, .skip")) continue;
    let behind = node;
    while (behind && getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
    const [a, b] = [shade(getComputedStyle(node).color), shade(getComputedStyle(behind).backgroundColor)];
    found.set(`${node.tagName}.${node.className}`, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
  }
  return [...found];
}"""


@pytest.fixture(scope="module")
def chromium():
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if binary is None:
        pytest.skip("no chromium or google-chrome on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, built):
    """visit(name, viewport, scheme): an open page. At the end of the test it must have been silent and asked for
    nothing but itself."""
    contexts, complaints = [], []

    def request(asked):
        if not asked.url.startswith(("data:", built.as_uri())):
            complaints.append(f"asked for {asked.url}")

    def open_page(name="report.html", viewport=DESK, scheme="light", **more):
        contexts.append(chromium.new_context(viewport=viewport, color_scheme=scheme, **more))
        tab = contexts[-1].new_page()
        tab.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", request)
        tab.goto((built / name).as_uri())
        return tab

    yield open_page
    attacked = [tab.evaluate("window.attacked") for context in contexts for tab in context.pages]
    for context in contexts:
        context.close()
    assert complaints == []
    assert set(attacked) <= {None}


def overlaps(boxes: list) -> list[tuple[str, str]]:
    """Pairs of texts that share more than two pixels in both directions."""
    boxes, found = sorted(boxes, key=lambda box: box[1]), []
    for i, (left, _, right, bottom, text) in enumerate(boxes):
        for other in itertools.takewhile(lambda box, end=bottom: box[1] < end - 2, boxes[i + 1 :]):
            if min(right, other[2]) - max(left, other[0]) > 2 and min(bottom, other[3]) - other[1] > 2:
                found.append((text, other[4]))
    return found


def count(tab, name: str) -> list[int]:
    """The numbers in a list's line of counts."""
    return [
        int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", tab.locator(f"#{name}-count").inner_text())
    ]


def column(tab, place: int) -> list[str]:
    return tab.locator(f"#claims-list tr td:nth-child({place})").all_inner_texts()


# --- how it looks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["report.html", "notebooks/01_data.html"])
@pytest.mark.parametrize("viewport", [DESK, PHONE, SMALL_PHONE], ids=["desk", "phone", "small phone"])
def test_texts_do_not_overlap_and_nothing_sticks_out(visit, name, viewport):
    tab = visit(name, viewport)
    tab.locator("details").evaluate_all("all => all.forEach((one) => { one.open = true; })")
    boxes = tab.evaluate(TEXT_BOXES)
    assert len(boxes) > 30
    assert overlaps(boxes) == []
    width = tab.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width[0] <= width[1]
    assert all(left >= 0 and right <= width[1] + 1 for left, _, right, *_ in boxes)


def test_the_overlap_check_sees_an_overlap(visit):
    tab = visit(viewport=PHONE)
    tab.evaluate("document.querySelector('#tables-title').style.marginTop = '-3rem'")
    assert overlaps(tab.evaluate(TEXT_BOXES)) != []


@pytest.mark.parametrize("name", ["report.html", "notebooks/01_data.html"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(visit, name, scheme):
    tab = visit(name, scheme=scheme)
    dark = tab.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    weak = {node: round(ratio, 2) for node, ratio in tab.evaluate(CONTRASTS) if ratio < 4.5}
    assert weak == {}


def test_figures_are_drawn_and_fit(visit):
    tab = visit(viewport=PHONE)
    sizes = tab.locator("figure img").evaluate_all("all => all.map((one) => [one.naturalWidth, one.clientWidth])")
    assert len(sizes) == 3
    assert all(natural > 0 and 0 < shown <= PHONE["width"] for natural, shown in sizes)


# --- how it works ----------------------------------------------------------------------------------------------------


def test_claims_are_searched_chosen_sorted_and_turned(visit, built):
    tab = visit()
    shown, total = count(tab, "claims")
    assert shown == total == len(tables.load_results(built / "results.json")[0])
    assert len(column(tab, 1)) == 25
    tab.fill("#claims-search", "EXAM generated")
    assert 0 < count(tab, "claims")[0] < total
    assert all("exam" in claim for claim in column(tab, 1)) and set(column(tab, 4)) == {"generated"}
    tab.fill("#claims-search", "")
    tab.select_option("#claims-family", "accuracy")
    tab.select_option("#claims-variant", label="+\xa0LoRA")
    assert count(tab, "claims")[0] == 6
    assert {claim.split("/")[0] for claim in column(tab, 1)} == {"accuracy"}
    tab.select_option("#claims-family", "")
    tab.select_option("#claims-variant", "")

    head = tab.locator("#claims-table th", has_text="value")
    for direction, reverse in (("ascending", False), ("descending", True)):
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == direction
        values = [float(text.replace("−", "-").replace(",", "")) for text in column(tab, 5)]
        assert values == sorted(values, reverse=reverse)
    tab.locator("#claims-table th", has_text="interval").get_by_role("button").click()
    assert "–" not in column(tab, 6)  # what has none comes last
    assert head.get_attribute("aria-sort") is None

    first = column(tab, 1) + column(tab, 2)
    tab.click("#claims-on")
    assert tab.locator("#claims-place").inner_text() == f"26 to 50 of {total}"
    assert column(tab, 1) + column(tab, 2) != first
    tab.click("#claims-back")
    assert column(tab, 1) + column(tab, 2) == first
    assert tab.locator("#claims-back").is_disabled()
    tab.fill("#claims-search", "no such claim")
    assert column(tab, 1) == [] and tab.locator("#claims-place").inner_text() == "none"


def test_flips_are_filtered_and_marked(visit, built):
    tab = visit()
    assert [tab.input_value(f"#flips-{name}") for name in ("source", "scoring")] == ["chapters", "option_text"]
    gained, lost, _, listed = count(tab, "flips")
    assert gained + lost == listed > 10
    assert tab.locator("#flips-list article").count() == 10
    for kind, number in (("gained", gained), ("lost", lost)):
        tab.select_option("#flips-kind", kind)
        assert count(tab, "flips")[-1] == number
        for flip in tab.locator("#flips-list article").all():
            right = flip.locator("li.right")
            chosen = right.get_by_text("chosen after" if kind == "gained" else "chosen before")
            assert right.count() == chosen.count() == 1
    tab.select_option("#flips-kind", "")
    tab.select_option("#flips-step", label="teacher, uncorrected → teacher")
    of_step = count(tab, "flips")
    assert of_step[0] + of_step[1] == of_step[-1] < listed
    for name in ("step", "source", "scoring"):
        tab.select_option(f"#flips-{name}", "")
    everything = count(tab, "flips")[-1]
    assert everything > listed
    flips = pd.read_parquet(built / "06_evaluation/flips.parquet")
    patient, drug = (int(flips.id[flips.source == source].iloc[0].split("-")[1]) for source in ("exam", "trials"))
    tab.fill("#flips-search", f"window.attacked exam-{patient:04}")
    assert count(tab, "flips")[-1] == (flips.id == f"exam-{patient:04}").sum()
    question = f"A patient of {patient} years is seen. <script>window.attacked"
    assert question in tab.locator("#flips-list").inner_text()
    assert tab.locator("#flips-list script, #flips-list img").count() == 0
    tab.fill("#flips-search", f"does drug {drug} help")
    tab.locator("#flips-list summary").first.click()
    assert f"of {drug} patients" in tab.locator("#flips-list details p").first.inner_text()


def test_a_keyboard_reaches_every_control(visit):
    tab = visit()
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    assert tab.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.id") == "content"
    controls = "input, select, th button, #claims-on, #flips-on, main summary, .scroll"
    find = f"() => [...document.querySelectorAll('{controls}')].filter((one) => one.checkVisibility())"
    reached = set()
    for _ in range(200):
        tab.keyboard.press("Tab")
        place = tab.evaluate(f"({find})().indexOf(document.activeElement)")
        if place >= 0:
            reached.add(place)
            assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
        if tab.evaluate("document.activeElement === document.body"):
            break
    assert len(reached) == tab.evaluate(f"({find})().length") > 20
    tab.focus("#claims-table th button")
    tab.keyboard.press("Enter")
    assert tab.locator("#claims-table th").first.get_attribute("aria-sort") == "ascending"


def test_every_control_has_a_name(visit):
    tab = visit()
    names = tab.locator("input, select").evaluate_all("all => all.map((one) => one.labels.length)")
    assert names and set(names) == {1}
    assert tab.locator("img:not([alt]), [role=region]:not([aria-label])").count() == 0


def test_it_prints(visit, tmp_path):
    tab = visit()
    tab.pdf(path=tmp_path / "report.pdf", prefer_css_page_size=True)
    content = (tmp_path / "report.pdf").read_bytes()
    assert content.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", content)) > 2
    tab.emulate_media(media="print")
    assert not tab.locator("nav, .controls").first.is_visible()
    tab.set_viewport_size({"width": 700, "height": 990})  # an A4 page between its margins
    boxes = tab.evaluate(TEXT_BOXES)
    assert overlaps(boxes) == []
    assert all(right <= 701 for _, _, right, *_ in boxes)


def test_without_its_script_it_says_where_the_rows_are(visit):
    tab = visit(java_script_enabled=False)
    assert tab.locator("#claims").get_by_role("link", name="results.json").is_visible()
    assert tab.locator("#flips").get_by_text("06_evaluation/flips.parquet").is_visible()
    assert tab.locator("#summary .card").count() == 8


def test_a_notebook_leads_back_to_the_report(visit, built):
    tab = visit("notebooks/01_data.html")
    tab.get_by_text("the run's report").click()
    assert tab.url == (built / "report.html").as_uri()
    tab.get_by_role("link", name="executed notebook").first.click()
    assert tab.url == (built / "notebooks/01_data.html").as_uri()
