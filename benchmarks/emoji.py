"""``python -m benchmarks.emoji FOLDER``: 300 captioned images that nobody tuned for, for ``forgetrace init --data``.

Noto Color Emoji with their Unicode names. The font is Google's (SIL Open Font License) and comes with Debian's package
``fonts-noto-color-emoji``; what was rendered for the README was its version 2.042.
"""

import argparse
import json
import unicodedata
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
CODES = [*range(0x1F300, 0x1F650), *range(0x1F680, 0x1F700), *range(0x1F900, 0x1FA00)]
COUNT, SIDES = 300, (136, 128)  # the font's bitmaps
COLOURS = 40  # of a picture at least: a glyph that the font lacks is a box


def main() -> None:
    """Write the images and their ``metadata.jsonl``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--font", default=FONT)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    font = ImageFont.truetype(arguments.font, 109)
    rows = []
    for code in CODES:
        name = unicodedata.name(chr(code), "").lower()
        image = Image.new("RGB", SIDES, "white")
        ImageDraw.Draw(image).text((0, 0), chr(code), font=font, embedded_color=True)
        if not name or "modifier" in name or len(image.getcolors(2**20)) < COLOURS:
            continue
        rows.append({"file_name": f"{code:x}.png", "text": name})
        image.save(arguments.folder / rows[-1]["file_name"])
        if len(rows) == COUNT:
            break
    (arguments.folder / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
