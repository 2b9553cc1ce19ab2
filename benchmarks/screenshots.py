"""The screenshots of the page in docs: `python benchmarks/screenshots.py docs/images`."""

import io
import sys
from pathlib import Path
from typing import Any

from page import browsing, server
from PIL import Image

from open_gem.data.scenes import scene

COLORS = 256  # of an image: scenes are noisy, and files in a repository should be small


def save(page: Any, path: Path, **options: Any) -> None:
    """What is seen, once it has come to rest."""
    page.wait_for_timeout(700)
    shot = Image.open(io.BytesIO(page.screenshot(**options))).convert("RGB")
    shot.quantize(palette=shot.quantize(COLORS), dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)
    print(f"{path}: {shot.width} × {shot.height}, {path.stat().st_size / 1000:.0f} kB")


def pick(page: Any, sample: int) -> None:
    page.click(f"#samples li:nth-child({sample}) button")
    page.wait_for_selector("canvas:not([data-shows=''])")


def drag(page: Any, box: tuple[float, float, float, float]) -> None:
    """Draw a box, in pixels of an image of 448 pixels' width."""
    frame = page.locator("#panels canvas").bounding_box()
    left, top, right, bottom = (side * frame["width"] / 448 for side in box)
    page.mouse.move(frame["x"] + left, frame["y"] + top)
    page.mouse.down()
    page.mouse.move(frame["x"] + right, frame["y"] + bottom)
    page.mouse.up()
    page.mouse.move(0, 0)


def main(folder: Path, port: int = 8766) -> None:
    with server(port) as address, browsing() as browser:

        def opened(width: int, height: int, scheme: str = "light") -> Any:
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            page.goto(address)
            page.wait_for_selector("#samples li:nth-child(6)")
            return page

        page = opened(1040, 600)
        save(page, folder / "serve-empty.png")
        pick(page, 3)
        page.type("#prompt", "fire engine", delay=60)
        save(page, folder / "serve-typing.png")

        page = opened(1120, 700, "dark")
        pick(page, 3)
        page.check("[name=compare]")
        page.click(".chip:nth-child(2) .choose")
        page.hover("canvas >> nth=1", position={"x": 120, "y": 150})
        save(page, folder / "serve-compare.png")

        page = opened(1120, 700)
        for seed in (2, 44):
            file = io.BytesIO()
            Image.fromarray(scene(seed, (336, 448)).image).save(file, format="PNG")
            page.set_input_files("#file", {"name": f"{seed}.png", "mimeType": "image/png", "buffer": file.getvalue()})
            if seed == 2:
                page.fill("#prompt", "rabbit")
                page.press("#prompt", "Enter")
                page.wait_for_selector("canvas[data-shows=rabbit]")
                drag(page, (35, 115, 169, 244))
        page.wait_for_selector("canvas[data-shows='box 1 in 2.png']")
        save(page, folder / "serve-box.png")

        page = opened(360, 900)
        pick(page, 2)
        page.check("[name=mask]")
        page.uncheck("[name=heat]")
        page.check("[name=all]")
        page.evaluate("scrollTo(0, 0)")
        save(page, folder / "serve-phone.png")

        page = opened(1120, 600)
        pick(page, 4)
        page.context.set_offline(True)
        page.type("#prompt", "octopus and tent")
        page.wait_for_selector("#trouble:not([hidden])")
        save(page, folder / "serve-error.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
