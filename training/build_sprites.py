"""Build the sprite atlas of `open_gem.data.scenes` from the glyphs of Noto Color Emoji.

    python training/build_sprites.py --font NotoColorEmoji.ttf

Writes `sprites.png` (an RGBA atlas) and `sprites.json` (which cell shows which concept) beside the
`scenes` module.  Only this script needs the font; the package reads the atlas.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

CELL = 112  # pixels a side of one atlas cell
COLUMNS = 16
STRIKE = 109  # the only size at which the font has bitmaps (136 x 128 pixels)
OUTPUT = Path(__file__).resolve().parents[1] / "src" / "open_gem" / "data"

# concept -> its glyphs.  Names are everyday English nouns; no two concepts share a shape.
GLYPHS: dict[str, str] = {
    # animals
    "cat": "🐱🐈", "dog": "🐶🐕", "monkey": "🐒🐵", "lion": "🦁", "tiger": "🐅🐯", "horse": "🐎🐴", "zebra": "🦓",
    "giraffe": "🦒", "elephant": "🐘", "cow": "🐄🐮", "pig": "🐖🐷", "sheep": "🐑", "rabbit": "🐇🐰", "panda": "🐼",
    "frog": "🐸", "koala": "🐨", "owl": "🦉", "penguin": "🐧", "duck": "🦆", "rooster": "🐓", "parrot": "🦜",
    "flamingo": "🦩", "peacock": "🦚", "turtle": "🐢", "snake": "🐍", "dinosaur": "🦕🦖", "whale": "🐳🐋",
    "shark": "🦈", "octopus": "🐙", "crab": "🦀", "snail": "🐌", "butterfly": "🦋", "bee": "🐝", "ladybug": "🐞",
    # food
    "apple": "🍎🍏", "banana": "🍌", "pineapple": "🍍", "strawberry": "🍓", "grapes": "🍇", "watermelon": "🍉",
    "lemon": "🍋", "cherries": "🍒", "kiwi": "🥝", "avocado": "🥑", "carrot": "🥕", "corn": "🌽", "broccoli": "🥦",
    "eggplant": "🍆", "pizza": "🍕", "hamburger": "🍔", "hot dog": "🌭", "french fries": "🍟", "croissant": "🥐",
    "pretzel": "🥨", "cheese": "🧀", "cupcake": "🧁", "donut": "🍩", "cookie": "🍪", "ice cream": "🍦🍨",
    "popcorn": "🍿", "birthday cake": "🎂",
    # plants and nature
    "tree": "🌳", "palm tree": "🌴", "cactus": "🌵", "sunflower": "🌻", "tulip": "🌷", "rose": "🌹", "mushroom": "🍄",
    "maple leaf": "🍁", "rainbow": "🌈", "snowman": "⛄",
    # vehicles
    "car": "🚗🚘", "bus": "🚌🚍", "fire truck": "🚒", "tractor": "🚜", "bicycle": "🚲", "motorcycle": "🏍",
    "train": "🚂", "airplane": "✈🛩", "helicopter": "🚁", "rocket": "🚀", "sailboat": "⛵",
    # music, sport, play
    "guitar": "🎸", "violin": "🎻", "trumpet": "🎺", "drum": "🥁", "soccer ball": "⚽", "basketball": "🏀",
    "football": "🏈", "tennis racket": "🎾", "balloon": "🎈", "teddy bear": "🧸",
    # things
    "umbrella": "☂☔", "clock": "⏰🕰", "camera": "📷", "telephone": "☎", "television": "📺", "laptop": "💻",
    "light bulb": "💡", "candle": "🕯", "key": "🔑", "scissors": "✂", "hammer": "🔨", "magnet": "🧲",
    "microscope": "🔬", "backpack": "🎒", "gift box": "🎁", "chair": "🪑", "traffic light": "🚦",
    "fire extinguisher": "🧯", "globe": "🌍", "book": "📕📗",
    # clothing and buildings
    "t-shirt": "👕", "sneaker": "👟", "top hat": "🎩", "crown": "👑", "sock": "🧦", "house": "🏠", "castle": "🏰",
    "tent": "⛺",
}  # fmt: skip


def draw_glyph(font: ImageFont.FreeTypeFont, glyph: str) -> Image.Image:
    """One glyph as a square RGBA sprite of CELL pixels: cropped to its ink, centred, longest side filled."""
    canvas = Image.new("RGBA", (2 * STRIKE, 2 * STRIKE))
    ImageDraw.Draw(canvas).text((20, 20), glyph, font=font, embedded_color=True)
    ink = canvas.getchannel("A").point([255 * (alpha > 8) for alpha in range(256)]).getbbox()
    if ink is None:
        raise ValueError(f"the font has no bitmap for {glyph!r}")
    sprite = canvas.crop(ink)
    scale = CELL / max(sprite.size)
    width, height = (max(1, round(side * scale)) for side in sprite.size)
    # Premultiplied alpha, so that no colour of transparent pixels bleeds into the edge.
    resized = sprite.convert("RGBa").resize((width, height), Image.Resampling.LANCZOS).convert("RGBA")
    cell = Image.new("RGBA", (CELL, CELL))
    cell.paste(resized, ((CELL - width) // 2, (CELL - height) // 2))
    return cell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--font", type=Path, required=True, help="NotoColorEmoji.ttf with CBDT bitmaps")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the two files")
    arguments = parser.parse_args()

    font = ImageFont.truetype(arguments.font, STRIKE)
    owners = [(concept, glyph) for concept, glyphs in GLYPHS.items() for glyph in glyphs]
    atlas = Image.new("RGBA", (COLUMNS * CELL, math.ceil(len(owners) / COLUMNS) * CELL))
    for index, (_, glyph) in enumerate(owners):
        row, column = divmod(index, COLUMNS)
        atlas.paste(draw_glyph(font, glyph), (column * CELL, row * CELL))
    atlas.save(arguments.output / "sprites.png", optimize=True)
    table = {"cell": CELL, "columns": COLUMNS, "sprites": [concept for concept, _ in owners]}
    (arguments.output / "sprites.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
