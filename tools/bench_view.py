"""`logitcache view` on a cache of a million positions: seconds, bytes of the page, and how fast it answers in a browser.

    python tools/bench_view.py

The cache is synthetic (see measure.py), with a vocabulary's tokenizer.json; it is in the page cache. The command runs in a
process of its own, start of Python included; median of three. In the browser (Chromium, where it is installed) a page of as
many tokens as fit is timed: from navigation to the end of its script, and from an event to its laid-out effect, without painting.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from measure import machine, synthetic_rows, write_synthetic_cache

from logitcache.format.layout import Layout
from logitcache.reading.cache import open_cache
from logitcache.report.token_text import TOKENIZER_NAME
from logitcache.storage.folder import Folder
from logitcache.table import aligned

K, VOCAB = 64, 151_936
POSITIONS_PER_SHARD = 1 << 16
PASSES = 3
EVENTS = {
    "point at a token": "spans[(n * 997) % spans.length].dispatchEvent("
    "new PointerEvent('pointerover', { bubbles: true, pointerType: 'mouse' }))",
    "colour by the other": "document.querySelectorAll('input[name=mode]')[n % 2 ? 0 : 1].click()",
    "next match of a search": "document.getElementById('next').click()",
}


def write_tokenizer(root: Path) -> None:
    """A vocabulary of the size of a large one, and its hash in the manifest."""
    content = json.dumps({"model": {"type": "BPE", "vocab": {f"token{i}": i for i in range(VOCAB)}}, "decoder": None})
    (root / TOKENIZER_NAME).parent.mkdir()
    (root / TOKENIZER_NAME).write_text(content)
    digest = hashlib.sha256(content.encode()).hexdigest()
    replace(open_cache(root).manifest, files={TOKENIZER_NAME: digest}).write(Folder(root))


def seconds_of_command(root: Path, page: Path, *options: str) -> float:
    command = [sys.executable, "-m", "logitcache", "view", str(root), "--out", str(page), *options]
    taken = []
    for _ in range(PASSES):
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def milliseconds_in_browser(page_path: Path, chromium: str) -> list[tuple[str, float]]:
    """Load, and the median of each kind of event."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 800}, reduced_motion="reduce")
        page.goto(page_path.resolve().as_uri())
        found = [("load", page.evaluate("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd"))]
        page.locator("#search").fill("token1")
        page.locator(".t.now").first.wait_for()
        for name, action in EVENTS.items():
            times = page.evaluate(
                f"""async () => {{
                  const spans = document.querySelectorAll('#reader .t'), times = [];
                  const painted = () => new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));
                  for (let n = 0; n < 20; n++) {{
                    await painted();
                    const began = performance.now();
                    {action};
                    document.body.getBoundingClientRect();
                    times.push(performance.now() - began);
                  }}
                  return times;
                }}"""
            )
            found.append((name, statistics.median(times)))
        browser.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shards", type=int, default=16, help=f"of {POSITIONS_PER_SHARD:,} positions each (default 16)"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root, page = Path(folder) / "cache", Path(folder) / "page.html"
        write_synthetic_cache(root, synthetic_rows(POSITIONS_PER_SHARD, K, VOCAB), Layout(VOCAB), options.shards)
        write_tokenizer(root)
        cache = open_cache(root)
        print(f"{cache.num_positions:,} synthetic positions, k = {K}, V = {VOCAB:,} ({machine()})")
        table = [["page of", "seconds", "bytes"]]
        for rows in (24, 64):
            seconds = seconds_of_command(root, page, "--num-sequences", str(rows))
            table.append([f"{rows} rows", f"{seconds:.2f}", f"{page.stat().st_size:,}"])
        print(aligned(table))
        if chromium := shutil.which("chromium") or shutil.which("google-chrome"):
            times = milliseconds_in_browser(page, chromium)
            print(aligned([["in the browser, 64 rows", "milliseconds"], *((n, f"{ms:.1f}") for n, ms in times)]))


if __name__ == "__main__":
    main()
