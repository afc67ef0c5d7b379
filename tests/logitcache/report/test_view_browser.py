"""The page of logitcache view in a real browser: what it shows, by mouse, keyboard and touch, in all looks and widths."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from math import exp
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("playwright")

from playwright.sync_api import Browser, Locator, Page, expect

from logitcache import LogitCache
from logitcache.format.layout import Layout
from logitcache.format.manifest import Manifest
from logitcache.format.tail_basis import rebuilt
from logitcache.format.tail_parts import TailParts
from logitcache.report.page import view
from logitcache.report.samples import PAGE_TOKENS
from logitcache.report.statistics import ENTROPY_BARS
from logitcache.storage.folder import Folder
from tests.helpers.browser import needs_browser, opened, running_browser
from tests.helpers.readable import HOSTILE, page_data, readable_cache, write_tokenizer, write_tokenizer_json
from tests.helpers.smallcaches import COEFFICIENT_STEP, EVERYTHING, VOCAB
from tests.helpers.tokenizing import byte_level

pytestmark = [needs_browser, pytest.mark.programs]
WORDS = [f" word{i}" for i in range(50)] + ["\n", " Fox", " fox"]
PARTS = TailParts(groups=3, entropy=True, rank=2)
LAYOUT = Layout(len(WORDS), PARTS, columns={"source": "string"}).with_coefficient_step(COEFFICIENT_STEP)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    """Rows of 300 tokens, the first 5 of them prompt, with 10 to 20 entries and 3 tail groups."""
    return readable_cache(tmp_path_factory.mktemp("viewed"), WORDS, layout=LAYOUT, num_rows=8, length=300)


@pytest.fixture(scope="module")
def html(cache: LogitCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of rows 0, 3 and 6."""
    return view(cache, tmp_path_factory.mktemp("page") / "page.html", rows=["0", "3", "6"]).path


@pytest.fixture
def page(browser: Browser, html: Path) -> Iterator[Page]:
    with opened(browser, html, reduced_motion="reduce") as page:
        yield page


def token(page: Page, row: int, place: int) -> Locator:
    return page.locator(f"#row-{row} .t").nth(place)


def figures(page: Page) -> dict[str, str]:
    names, values = page.locator(".figures dt").all_inner_texts(), page.locator(".figures dd").all_inner_texts()
    return dict(zip(names, values, strict=True))


def focused(page: Page) -> int:
    """Which token of all has the focus."""
    place: int = page.evaluate("[...document.querySelectorAll('#reader .t')].indexOf(document.activeElement)")
    return place


def share(text: str) -> float:
    return float(text.removesuffix("%").removeprefix("< ")) / 100


def in_view(locator: Locator) -> bool:
    """Whether it can be seen below the toolbar."""
    box = locator.bounding_box()
    assert box is not None
    return bool(50 < box["y"] < 780)


def test_pointing_at_a_token_shows_the_distribution_that_predicted_it(page: Page, cache: LogitCache) -> None:
    for place in (5, 20, 100, 299):
        check_distribution(page, cache, place)


def check_distribution(page: Page, cache: LogitCache, place: int) -> None:
    token(page, 3, place).hover()
    sequence = cache[3]
    targets = sequence.targets[(sequence.positions == place - 1).nonzero()[0]]
    (count,) = targets.num_entries.tolist()
    ids, masses = targets.token_ids[0, :count].tolist(), [exp(p) for p in targets.logprobs[0, :count]]
    expect(page.locator(".where")).to_have_text(f"Row 3, token {place}, id {sequence.input_ids[place]}")
    expect(page.locator("#panel")).to_contain_text(f"Position {place - 1}, which has seen tokens 0 to {place - 1}")

    lines = page.locator(".entries").first.locator("li")
    shown = min(count, 16)
    for j in range(shown):
        assert (lines.nth(j).locator(".entry").text_content() or "").removesuffix("actual") == WORDS[ids[j]].replace(
            "\n", ""
        )
        assert share(lines.nth(j).locator(".mass").inner_text()) == pytest.approx(masses[j], rel=0.01, abs=1e-4)
    tail = page.locator("li.tail .mass").inner_text()
    assert share(tail) == pytest.approx(exp(targets.tail_logprob[0]), rel=0.01, abs=1e-4)
    assert page.locator("li.sum", has_text="more entries").count() == (count > 16)
    if count > 16:
        more = page.locator("li.sum", has_text="more entries")
        expect(more).to_contain_text(f"{count - 16} more")
        assert share(more.locator(".mass").inner_text()) == pytest.approx(sum(masses[16:]), rel=0.01, abs=1e-4)

    actual = int(sequence.input_ids[place])
    assert page.locator("li.actual").count() == 1
    if actual in ids:
        rank = ids.index(actual)
        assert figures(page)["Rank"] == f"{rank + 1} of {count}"
        assert float(figures(page)["Log-prob"].replace("−", "-")) == pytest.approx(targets.logprobs[0, rank], abs=2e-3)
    else:
        assert figures(page)["Log-prob"] == "in the tail"
        assert figures(page)["Rank"] == f"> {count}"
    assert targets.group_logprobs is not None
    assert page.locator("li.group").count() == (targets.group_logprobs[0] > -1e9).sum()
    basis = cache.tail_basis
    assert basis is not None
    outside = np.delete(np.exp(rebuilt(targets, basis)[0]), ids)
    shares = [share(line.inner_text()) for line in page.locator("li.rebuilt .mass").all()]
    assert shares == pytest.approx(np.sort(outside)[:-5:-1], rel=0.01, abs=1e-4)
    expect(page.locator("#panel")).to_contain_text("rebuilt from its coefficients, not stored")


def test_a_prompt_token_says_that_nothing_is_stored_and_looks_other_than_by_colour(page: Page) -> None:
    token(page, 0, 3).hover()
    expect(page.locator("#panel")).to_contain_text("Prompt: this token is not trained")
    assert page.locator(".figures").count() == 0
    style = "element => getComputedStyle(element).borderBottomStyle"
    assert token(page, 0, 3).evaluate(style) == "dashed"
    assert token(page, 0, 30).evaluate(style) == "none"
    token(page, 0, 0).hover()
    expect(page.locator("#panel")).to_contain_text("The first token")


def test_a_click_keeps_the_panel_until_the_next_click_on_it(page: Page) -> None:
    token(page, 0, 20).click()
    token(page, 0, 30).hover()
    expect(page.locator(".where")).to_contain_text("token 20,")
    token(page, 0, 20).click()
    token(page, 0, 30).hover()
    expect(page.locator(".where")).to_contain_text("token 30,")


def test_arrow_keys_move_from_token_to_token_and_the_panel_follows(page: Page) -> None:
    assert page.locator("#reader .t[tabindex='0']").count() == 1
    token(page, 0, 0).focus()
    for _ in range(7):
        page.keyboard.press("ArrowRight")
    expect(page.locator(".where")).to_contain_text("Row 0, token 7,")
    page.keyboard.press("ArrowLeft")
    assert focused(page) == 6
    assert page.locator("#reader .t[tabindex='0']").count() == 1
    page.keyboard.press("End")
    expect(page.locator(".where")).to_contain_text("Row 0, token 299,")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".where")).to_contain_text("Row 3, token 0,")
    page.keyboard.press("PageDown")
    expect(page.locator(".where")).to_contain_text("Row 6, token 0,")
    page.keyboard.press("End")
    page.keyboard.press("ArrowRight")
    assert focused(page) == 899
    assert in_view(token(page, 6, 299))
    page.keyboard.press("Home")
    assert focused(page) == 600


def test_up_and_down_go_to_the_nearest_token_of_the_next_line(page: Page) -> None:
    token(page, 0, 30).click()
    before = token(page, 0, 30).bounding_box()
    page.keyboard.press("ArrowDown")
    after = page.locator(".t:focus").bounding_box()
    assert before is not None
    assert after is not None
    assert 10 < after["y"] - before["y"] < 40
    assert abs(after["x"] - before["x"]) < 80
    page.keyboard.press("ArrowUp")
    assert abs(focused(page) - 30) <= 1


def test_a_focused_token_is_spoken_with_its_numbers(page: Page) -> None:
    token(page, 0, 20).focus()
    label = token(page, 0, 20).get_attribute("aria-label")
    assert label is not None
    assert re.fullmatch(r" ?word20, (in the tail|probability .*%, rank \d+), entropy \d\.\d\d nats", label)


SPOKEN = {
    "\n": "line break",
    "\n\n\n": "3 line breaks",
    "\t": "tab",
    " ": "space",
    "   ": "3 spaces",
    "\n    ": "line break 4 spaces",
    ";\n\t}": "; line break tab }",
    " a b ": "a b",
    "\u202ex": "‹U+202E›x",
    "": "‹empty›",
}


def test_tokens_without_letters_are_spoken_in_words(browser: Browser, tmp_path: Path) -> None:
    cache = readable_cache(tmp_path / "c", [*SPOKEN], entries=1)
    with opened(browser, view(cache, tmp_path / "page.html").path) as page:
        for place, words in enumerate(SPOKEN.values(), len(SPOKEN)):
            token(page, 0, place).focus()
            assert (token(page, 0, place).get_attribute("aria-label") or "").startswith(f"{words}, ")


def test_long_runs_of_line_breaks_are_one_sign_with_their_number(browser: Browser, tmp_path: Path) -> None:
    texts = ["\n" * 200, "\t" * 9, "\n" * 8, "\u202e" * 100]
    with opened(browser, view(readable_cache(tmp_path / "c", texts, entries=1), tmp_path / "page.html").path) as page:
        signs = [
            token(page, 0, i).locator("i").evaluate_all("all => all.map(i => i.dataset.sign ?? i.textContent)")
            for i in range(4)
        ]
    assert signs == [["↵×200"], ["⇥×9"], ["↵"] * 8, ["‹U+202E×100›"]]


def test_a_page_of_odd_long_tokens_has_not_millions_of_elements(browser: Browser, tmp_path: Path) -> None:
    words = [f"{i}{text}" for i in range(3) for text in ("\n" * 250, "\u200b\x00" * 125, "x " * 125)]
    cache = readable_cache(tmp_path / "c", words, num_rows=8, length=2048, entries=1)
    with opened(browser, view(cache, tmp_path / "page.html").path) as page:
        assert page.locator("#reader .t").count() == PAGE_TOKENS
        assert page.locator("*").count() < 300_000
        assert page.evaluate("document.getElementById('reader').textContent.length") < 2_000_000
        token(page, 7, 2000).dispatch_event("pointerover", {"pointerType": "mouse"})
        expect(page.locator(".where")).to_contain_text("Row 7, token 2,000,")


def test_search_finds_text_across_tokens_counts_it_and_goes_there(page: Page) -> None:
    page.locator("#search").fill("WORD9 word10 ")
    expect(page.locator("#matches")).to_have_text(re.compile(r"1 of \d+"))
    found = page.locator("#matches").inner_text()
    everywhere = sum(text.count("word9 word10 ") for text in page.locator(".tokens").all_text_contents())
    assert found == f"1 of {everywhere}"
    assert page.locator(".t.now").count() == 3
    first = page.locator(".t.now").first
    assert in_view(first)
    page.keyboard.press("Enter")
    expect(page.locator("#matches")).to_have_text(f"2 of {everywhere}")
    assert in_view(page.locator(".t.now").first)
    page.keyboard.press("Shift+Enter")
    page.locator("#previous").click()
    expect(page.locator("#matches")).to_have_text(f"{everywhere} of {everywhere}")
    page.locator("#search").fill("fox")
    expect(page.locator("#matches")).to_have_text(re.compile("1 of"))
    assert page.locator(".t.hit").count() == sum(
        text.lower().count("fox") for text in page.locator(".tokens").all_text_contents()
    )
    page.locator("#search").fill("wolf")
    expect(page.locator("#matches")).to_have_text("none")
    assert page.locator(".t.hit, .t.now").count() == 0


def test_jump_goes_to_a_row_by_its_number_or_id_and_says_where_there_is_none(page: Page, cache: LogitCache) -> None:
    for wanted in ("6", cache[3].row_id, cache[6].row_id[:8]):
        page.locator("#jump").fill(wanted)
        page.keyboard.press("Enter")
        row = 6 if wanted == "6" or cache[6].row_id.startswith(wanted) else 3
        assert page.evaluate("document.activeElement.id") == f"row-{row}"
        assert in_view(page.locator(f"#row-{row} h3"))
        expect(page.locator("#jump-problem")).to_be_hidden()
    page.locator("#jump").fill("5")
    page.keyboard.press("Enter")
    expect(page.locator("#jump-problem")).to_have_text(re.compile("Row 5 is not on this page.*view CACHE --rows 5"))


def test_jump_takes_numbers_as_headings_have_them_and_few_digits_for_no_id(browser: Browser, tmp_path: Path) -> None:
    layout = Layout(len(WORDS))
    cache = readable_cache(tmp_path / "c", WORDS, layout=layout, num_rows=1002, length=6, entries=1)
    numbers = [number for number in range(1002) if cache[number].row_id[:2].isdecimal()][:3]
    page_of = view(cache, tmp_path / "page.html", rows=["1000", *map(str, numbers)]).path
    with opened(browser, page_of, reduced_motion="reduce") as page:

        def jump(wanted: str) -> str:
            page.evaluate("document.activeElement.blur()")
            page.locator("#jump").fill(wanted)
            page.locator("#jump").press("Enter")
            went: str = page.evaluate("document.activeElement.id")
            return went

        for wanted in ("1000", "1,000", "row 1000", "Row 1,000", " 1000 "):
            assert jump(wanted) == "row-1000"
        digits = cache[numbers[0]].row_id[:2]
        assert jump(digits) == (f"row-{digits}" if int(digits) in numbers else "jump")
        assert jump(cache[numbers[0]].row_id.upper()) == f"row-{numbers[0]}"
        assert jump("1,001") == "jump"
        expect(page.locator("#jump-problem")).to_contain_text("--rows 1001 shows it")
        for wanted in ("1,002", "x; rm"):
            assert jump(wanted) == "jump"
            expect(page.locator("#jump-problem")).to_contain_text("The cache has no such row: its 1,002 rows")


BACKGROUND = "element => getComputedStyle(element).backgroundColor"


def test_the_toggle_colours_by_entropy_or_by_the_actual_tokens_probability(page: Page, html: Path) -> None:
    arrays = page_data(html)["arrays"]
    spans = page.locator("#reader .t:not(.prompt)")

    def colours() -> list[str]:
        found: list[str] = spans.evaluate_all(f"all => all.map({BACKGROUND})")
        return found

    by_entropy = colours()
    page.locator(".modes label", has_text="Log-prob").click()
    by_probability = colours()
    assert by_entropy != by_probability
    for values, found in ((arrays["entropy"], by_entropy), (arrays["actual"], by_probability)):
        order = sorted(range(len(values)), key=lambda i, values=values: values[i])  # type: ignore[misc]
        runs = [found[i] for n, i in enumerate(order) if n == 0 or found[i] != found[order[n - 1]]]
        assert len(runs) == len(set(runs)) > 3  # each colour is one range of values
    in_tail = spans.nth(arrays["rank"].tolist().index(0))
    assert in_tail.evaluate("element => getComputedStyle(element).boxShadow") != "none"
    expect(page.locator("#legend")).to_contain_text("in the tail")
    page.locator(".modes label", has_text="Entropy").click()
    assert colours() == by_entropy


CONTRASTS = """
() => {
  const context = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const luminance = (colour) => {
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const result = {};
  const paper = luminance(getComputedStyle(document.body).backgroundColor);
  for (const element of document.querySelectorAll('#reader .t, .remark, .tiles small, .tick, #panel .where')) {
    const style = getComputedStyle(element);
    const own = element.matches('.t:not(.prompt)');
    const text = luminance(element.matches('.tick') ? style.fill : style.color);
    const key = own ? style.backgroundColor : element.className.baseVal ?? element.className;
    const value = contrast(text, own ? luminance(style.backgroundColor) : paper);
    result[key] = Math.min(result[key] ?? 99, value);
  }
  return result;
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_contrast_in_both_looks_and_modes(browser: Browser, html: Path, scheme: str) -> None:
    with opened(browser, html, color_scheme=scheme) as page:
        token(page, 0, 20).hover()
        for mode in ("Entropy", "Log-prob"):
            page.locator(".modes label", has_text=mode).click()
            contrasts = page.evaluate(CONTRASTS)
            assert len(contrasts) > 6
            assert min(contrasts.values()) >= 4.5, contrasts


def test_the_look_follows_the_system_and_the_button_turns_it(browser: Browser, html: Path) -> None:
    with opened(browser, html, color_scheme="light") as page:
        light = page.locator("body").evaluate(BACKGROUND)
        expect(page.locator("#theme")).to_have_text("Dark")
        page.locator("#theme").click()
        dark = page.locator("body").evaluate(BACKGROUND)
        assert dark != light
        expect(page.locator("#theme")).to_have_text("Light")
        page.locator("#theme").click()
        assert page.locator("body").evaluate(BACKGROUND) == light
    with opened(browser, html, color_scheme="dark") as page:
        assert page.locator("body").evaluate(BACKGROUND) == dark
        expect(page.locator("#theme")).to_have_text("Light")
        page.emulate_media(color_scheme="light")
        assert page.locator("body").evaluate(BACKGROUND) == light


@pytest.mark.parametrize("width", [375, 320, 768])
def test_on_a_phone_nothing_scrolls_sideways_and_a_tap_opens_a_sheet(browser: Browser, html: Path, width: int) -> None:
    with opened(browser, html, width, 780, has_touch=True, is_mobile=True, reduced_motion="reduce") as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        panel = page.locator("#panel")
        expect(panel).to_be_hidden()
        token(page, 3, 150).tap()
        expect(panel).to_be_visible()
        expect(page.locator(".where")).to_contain_text("Row 3, token 150,")
        sheet, tapped = panel.bounding_box(), token(page, 3, 150).bounding_box()
        assert sheet is not None
        assert tapped is not None
        assert sheet["y"] + sheet["height"] == pytest.approx(780, abs=1)
        assert tapped["y"] + tapped["height"] < sheet["y"]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.locator(".close").tap()
        expect(panel).to_be_hidden()


@pytest.mark.parametrize(("preference", "behavior"), [("reduce", "instant"), ("no-preference", "smooth")])
def test_nothing_moves_where_less_motion_is_asked_for(
    browser: Browser, html: Path, preference: str, behavior: str
) -> None:
    with opened(browser, html, 375, 780, reduced_motion=preference) as page:
        page.evaluate(
            "() => { window.asked = []; window.scrollTo = (options) => window.asked.push(options.behavior); }"
        )
        page.locator("#jump").fill("6")
        page.keyboard.press("Enter")
        assert page.evaluate("window.asked") == [behavior]
        duration = page.locator("#panel").evaluate("element => getComputedStyle(element).transitionDuration")
        assert (duration == "0s") == (preference == "reduce")


def test_charts_say_what_is_pointed_at_and_have_tables_of_their_numbers(page: Page, html: Path) -> None:
    found = page_data(html)["statistics"]
    mass = page.locator(".card", has_text="Mass covered by the k most probable")
    before = mass.locator(".readout").inner_text()
    mass.locator("svg").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(mass.locator(".readout")).to_have_text(f"The 2 most probable: {100 * found['mass_covered'][1]:.1f}%")
    page.keyboard.press("Tab")
    expect(mass.locator(".readout")).to_have_text(before)
    mass.locator("svg").hover()
    expect(mass.locator(".readout")).to_have_text(re.compile(r"The \d+ most probable"))
    mass.locator("summary").click()
    assert mass.locator("tbody tr").count() == len(found["ks"])
    expect(mass.locator("tbody tr").first).to_contain_text(f"{100 * found['mass_covered'][0]:.1f}%")

    entropy = page.locator(".card", has_text="Entropy of the teacher")
    assert entropy.locator("rect.mark").count() == ENTROPY_BARS
    heights = [
        float(h) for h in entropy.locator("rect.mark").evaluate_all("all => all.map(r => r.getAttribute('height'))")
    ]
    counts = found["entropy_histogram"]["counts"]
    assert heights.index(max(heights)) == counts.index(max(counts))
    assert [h > 0 for h in heights] == [n > 0 for n in counts]

    entries = page.locator(".card", has_text="Entries per position")
    entries.locator("summary").click()
    rows = entries.locator("tbody tr").all_inner_texts()
    shown = {int(row.split()[0]): int(row.split()[2].replace(",", "")) for row in rows}
    assert shown == dict(found["entries_per_position"])
    expect(page.locator(".card", has_text="Bytes by column")).to_contain_text("levels_above_lowest")


def test_a_hostile_cache_is_text_and_nothing_else(browser: Browser, tmp_path: Path) -> None:
    texts = [text.encode("utf-8", "ignore").decode() for text in HOSTILE]  # a kept column holds no half of a surrogate
    root = tmp_path / "<img src=x onerror=alert(0)>"
    readable_cache(root, texts, layout=Layout(len(HOSTILE), columns={"c": "string"}), length=len(HOSTILE))
    write_tokenizer(root, HOSTILE)
    with opened(browser, view(root, tmp_path / "page.html").path) as page:
        spans = page.locator("#row-0 .t")
        shown = spans.all_text_contents()
        assert len(shown) == len(HOSTILE)
        codes = {
            "\x00": "‹U+0000›",
            "\x1b[31m": "‹U+001B›[31m",
            "\ud800": "‹U+D800›",
            "a\udfffb": "a‹U+DFFF›b",
            "\u202eevil\u202c": "‹U+202E›evil‹U+202C›",
            "\u2067rtl": "‹U+2067›rtl",
            "\u2028": "‹U+2028›",
            "\u2029": "‹U+2029›",
            "\ufeff": "‹U+FEFF›",
            "\u200b": "‹U+200B›",
            "\r\n": "‹U+000D›\n",
            "": "‹empty›",
        }
        for text, found in zip(HOSTILE, shown, strict=True):
            assert found == codes.get(text, text)
        for i in range(len(HOSTILE)):
            spans.nth(i).dispatch_event("pointerover", {"pointerType": "mouse"})
        assert page.locator("h1").inner_text() == "<img src=x onerror=alert(0)>"
        assert page.locator("img, iframe, b:has(*)").count() == 0
        assert page.locator("script").count() == 2
        assert page.evaluate("document.documentElement.scrollWidth") <= 1280
        isolated = spans.evaluate_all("all => all.every(span => getComputedStyle(span).unicodeBidi === 'isolate')")
        assert isolated
        page.locator("#search").fill("</script><script>")
        expect(page.locator("#matches")).to_have_text(re.compile("1 of"))


def test_a_row_of_many_kept_columns_says_how_many_more_there_are(browser: Browser, tmp_path: Path) -> None:
    layout = Layout(len(WORDS), columns={f"column{i}": "string" for i in range(20)})
    cache = readable_cache(tmp_path / "c", WORDS, layout=layout, num_rows=1)
    with opened(browser, view(cache, tmp_path / "page.html").path) as page:
        assert page.locator("#row-0 .columns-of-row b").count() == 16
        expect(page.locator("#row-0 .columns-of-row")).to_contain_text("and 4 more")


def test_the_policy_refuses_any_other_script_and_any_request(browser: Browser, html: Path) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(html.resolve().as_uri())
    page.evaluate("""() => {
      const script = document.createElement('script');
      script.textContent = 'window.ran = true';
      document.body.append(script);
    }""")
    assert page.evaluate("window.ran") is None
    refused = page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'answered', (error) => error.message)")
    assert "Failed to fetch" in refused
    blocked = page.evaluate("""() => new Promise((resolve) => {
      document.addEventListener('securitypolicyviolation', (event) => resolve(event.effectiveDirective));
      new Image().src = 'http://127.0.0.1:9/x.png';
    })""")
    assert blocked == "img-src"
    context.close()


def test_a_character_in_several_tokens_is_shown_as_bytes_and_found_as_itself(browser: Browser, tmp_path: Path) -> None:
    tokenizer = byte_level()
    size = tokenizer.get_vocab_size()
    order = tokenizer.encode("so 🦖 roars; ").ids
    root = tmp_path / "c"
    readable_cache(
        root, [str(i) for i in range(size)], layout=Layout(size), num_rows=1, length=3 * len(order), order=order
    )
    write_tokenizer_json(root, tokenizer.to_str())
    with opened(browser, view(root, tmp_path / "page.html").path) as page:
        shown = page.locator("#row-0 .t").all_text_contents()
        code = "".join(text for text in shown if "‹" in text)
        assert re.sub("[‹› ]", "", code) == "🦖".encode().hex() * 3
        page.locator("#search").fill("o 🦖 r")
        expect(page.locator("#matches")).to_have_text("1 of 3")
        assert [text for text in page.locator(".t.now").all_text_contents() if "‹" in text]


def test_a_page_of_10_000_tokens_answers_at_both_ends(browser: Browser, tmp_path: Path) -> None:
    cache = readable_cache(tmp_path / "c", WORDS, num_rows=4, length=3000, entries=3)
    with opened(browser, view(cache, tmp_path / "page.html").path, reduced_motion="reduce") as page:
        assert 10_000 < page.locator("#reader .t").count() == 12_000 <= PAGE_TOKENS
        expect(page.locator("#shown")).to_contain_text("4 of 4 rows, 12,000 tokens")
        page.locator("#jump").fill("3")
        page.keyboard.press("Enter")
        token(page, 3, 0).focus()
        page.keyboard.press("End")
        expect(page.locator(".where")).to_contain_text("Row 3, token 2,999,")
        assert in_view(token(page, 3, 2999))
        page.locator("#search").fill("word")
        expect(page.locator("#matches")).to_have_text(re.compile(r"1 of 11,\d{3}"))
        assert in_view(page.locator(".t.now").first)
        page.locator(".modes label", has_text="Log-prob").click()
        assert page.locator("#reader").get_attribute("data-mode") == "logprob"


def test_everything_that_a_cache_can_hold_has_a_page(browser: Browser, tmp_path: Path) -> None:
    layout = replace(EVERYTHING, vocab_size=len(WORDS), columns={})
    cache = readable_cache(tmp_path / "c", WORDS, layout=layout)
    with opened(browser, view(cache, tmp_path / "page.html").path) as page:
        token(page, 0, 10).hover()
        assert "≥" not in figures(page)["Entropy"]
        expect(page.locator("#panel")).to_contain_text("Heaviest groups of the tail")
        expect(page.locator("#panel")).to_contain_text("Group 2, 51 ids")


def test_caches_without_rows_or_without_entries_have_pages(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    Manifest(Layout(VOCAB), {}, (), {}, "tests").write(Folder(tmp_path / "none"))
    with opened(browser, view(tmp_path / "none", tmp_path / "none.html").path) as page:
        expect(page.locator("#shown")).to_have_text("This cache has no rows.")
    cache = readable_cache(tmp_path / "c", WORDS, entries=0)
    with opened(browser, view(cache, tmp_path / "page.html").path) as page:
        token(page, 0, 10).hover()
        assert figures(page)["Log-prob"] == "in the tail"
        expect(page.locator("li.tail")).to_contain_text("100.0%")
