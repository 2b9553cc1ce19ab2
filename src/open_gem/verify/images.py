"""The images that numbers were published for: downloaded once, taken from a folder, or drawn."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from PIL import Image, ImageDraw

from open_gem.errors import ImageError
from open_gem.files import write_file
from open_gem.images.pixels import read_image

TIMEOUT = 20  # seconds for one image

_HUB = "https://huggingface.co"
_DOCUMENTATION = f"{_HUB}/datasets/huggingface/documentation-images/resolve/main/transformers/tasks"
_RAW = "https://raw.githubusercontent.com"

CATS, CATS_PNG, DIAGRAM, BEACH = "000000039769.jpg", "000000039769.png", "CLIP.png", "demo.jpg"
OWL, CAR, CAT, ASTRONAUT = "owl.jpg", "car.jpg", "cat.png", "astronaut.png"
STREET, TRUCK, GROCERIES, LAPTOP = "sam-car.png", "truck.jpg", "groceries.jpg", "000000077595.jpg"
URLS = {
    CATS: "http://images.cocodataset.org/val2017/000000039769.jpg",
    CATS_PNG: f"{_RAW}/huggingface/transformers/main/tests/fixtures/tests_samples/COCO/000000039769.png",
    DIAGRAM: f"{_RAW}/openai/CLIP/main/CLIP.png",
    BEACH: f"{_HUB}/hf-internal-testing/blip-test-image/resolve/main/demo.jpg",
    OWL: f"{_DOCUMENTATION}/owl.jpg",
    CAR: f"{_DOCUMENTATION}/car.jpg",
    ASTRONAUT: f"{_HUB}/spaces/adirik/OWL-ViT/resolve/main/assets/astronaut.png",
    STREET: f"{_HUB}/ybelkada/segment-anything/resolve/main/assets/car.png",
    TRUCK: f"{_HUB}/datasets/hf-internal-testing/sam2-fixtures/resolve/main/truck.jpg",
    GROCERIES: f"{_HUB}/datasets/hf-internal-testing/sam2-fixtures/resolve/main/groceries.jpg",
    LAPTOP: "http://images.cocodataset.org/val2017/000000077595.jpg",
    CAT: f"{_RAW}/facebookresearch/perception_models/main/apps/pe/docs/assets/cat.png",
}
"""Name of a file → where it is."""


def draw_circle(side: int) -> Image.Image:
    """Draw the circle of transformers' tests of SigLIP 2: blue with a green outline, on red."""
    image, half = Image.new("RGB", (side, side), "red"), side // 2
    radius = 7 * (half // 8)
    box = (half - radius, half - radius, half + radius, half + radius)
    ImageDraw.Draw(image).ellipse(box, fill="blue", outline="green", width=side // 20)
    return image


SMALL_CIRCLE, LARGE_CIRCLE = "circle of 224 pixels", "circle of 1024 pixels"
DRAWN: dict[str, Callable[[], Image.Image]] = {
    SMALL_CIRCLE: lambda: draw_circle(224),
    LARGE_CIRCLE: lambda: draw_circle(1024),
}
"""Name of an image that was published as a program → that program."""


def cache_folder() -> Path:
    """Return the folder in which downloaded images are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "open_gem" / "verify"


@dataclass
class ImageStore:
    """Images by name, from `folder`; with `downloads`, missing ones are downloaded into it. `announce` gets one line
    before each download."""

    folder: Path
    downloads: bool = True
    announce: Callable[[str], None] = lambda line: None

    def __post_init__(self) -> None:
        self._errors: dict[str, str] = {}  # what failed once is not tried again

    def __call__(self, name: str) -> Image.Image:
        """Return the image as RGB. Raises ImageError that says why it cannot be loaded."""
        if name in DRAWN:
            return DRAWN[name]()
        path = self.folder / name
        if not path.is_file():
            if name not in self._errors:
                self._errors[name] = self._download(name)
            if self._errors[name]:
                raise ImageError(self._errors[name])
        return read_image(path)

    def _download(self, name: str) -> str:
        """Put the image into the folder; returns why it could not be, or nothing."""
        if not self.downloads:
            return f"image {name} is not in {str(self.folder)!r}"
        self.announce(f"downloading {URLS[name]}")
        try:
            with urlopen(URLS[name], timeout=TIMEOUT) as response:
                write_file(self.folder / name, response.read())
        except HTTPError as error:
            return f"image {URLS[name]} cannot be downloaded: {error}"
        except (URLError, OSError) as error:
            return f"images cannot be downloaded: {getattr(error, 'reason', error)}; name a folder with them (--images)"
        return ""
