"""How long a prompt takes from its last letter to the painted map: see docs/validation/performance.md.

`open-gem serve` with the model in the package and a headless Chromium share this machine. Prompts that were never asked
before are typed letter by letter into the page, which looks at a scene; the browser itself takes the time from the
event of the last letter to the frame that has the map.
"""

import argparse
import io
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from time import sleep
from typing import Any

import numpy as np
from PIL import Image
from playwright.sync_api import sync_playwright

from open_gem.data.scenes import CONCEPTS, scene

SERVE = "from open_gem.cli import main; main()"
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
TIME = "(text) => performance.getEntriesByName('prompt to image').filter((one) => one.detail === text)[0]?.duration"


@contextmanager
def server(port: int) -> Iterator[str]:
    address = f"http://127.0.0.1:{port}/"
    process = subprocess.Popen([sys.executable, "-c", SERVE, "serve", "--model", "embedded", "--port", str(port)])
    try:
        while True:
            try:
                urllib.request.urlopen(f"{address}health")
                break
            except urllib.error.URLError:
                assert process.poll() is None, "the server ended"
                sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait()


@contextmanager
def browsing() -> Iterator[Any]:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield browser
        browser.close()


def looked_at(page: Any, side: int, compare: bool) -> None:
    """A scene in the page, with one prompt asked already: features are there, as when somebody has begun to type."""
    file = io.BytesIO()
    Image.fromarray(scene(0, side).image).save(file, format="PNG")
    page.set_checked("[name=compare]", compare)
    page.set_input_files("#file", {"name": "scene.png", "mimeType": "image/png", "buffer": file.getvalue()})
    page.fill("#prompt", "a cat")
    page.wait_for_selector(f"{'.panel:nth-child(2) ' if compare else ''}canvas[data-shows='a cat']")


def typed(page: Any, prompt: str, pause: float) -> float:
    """Milliseconds from the last letter of a prompt to its map."""
    page.fill("#prompt", "")
    page.type("#prompt", prompt, delay=pause)
    return page.wait_for_function(TIME, arg=prompt).json_value()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=30)
    parser.add_argument("--side", type=int, default=512, help="pixels of the scene's sides")
    parser.add_argument("--pause", type=float, default=80, help="milliseconds between letters")
    parser.add_argument("--port", type=int, default=8765)
    options = parser.parse_args()
    with server(options.port) as address, browsing() as browser:
        for number, compare in enumerate((False, True)):
            page = browser.new_page()
            page.goto(address)
            looked_at(page, options.side, compare)
            prompts = [f"{('a small', 'a big')[number]} {concept}" for concept in CONCEPTS[: options.prompts]]
            times = [typed(page, prompt, options.pause) for prompt in prompts]
            median, p95 = np.percentile(times, [50, 95])
            what = "two methods" if compare else "one method"
            print(
                f"{what}: {len(times)} prompts on a scene of {options.side} × {options.side}: median {median:.0f} ms, "
                f"p95 {p95:.0f} ms, most {max(times):.0f} ms",
                flush=True,
            )
            page.close()
        print(f"{os.cpu_count()} cores, shared by the server and the browser")


if __name__ == "__main__":
    main()
