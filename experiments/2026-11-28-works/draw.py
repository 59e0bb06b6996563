"""Pictures that look alike and are different works, and copies of paintings that are one: a test for `data ingest`.

    python draw.py --art <art>/metadata.csv --out pictures --seed 1
    simsearch data ingest images=pictures/pictures.csv root=pictures out=ingested
    python count.py --pictures pictures --ingested ingested --table works.csv

Six sets of --count different works each: pages of text under one heading, coins of one design with other legends and
heads, pencil sketches, night skies, stamps and book covers of one series. The first 20 of each have a second scan
(turned by 1 degree, a margin cut off, other light, JPEG): both are one work. Then --copies paintings for each kind of
copy, other paintings for each kind, drawn from all of --art by the seed. Drawings are made here, of lines and letters.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont

DOUBLES = 20
LETTERS = list("aaabcdeeeefghiiilmnnoooprrsssttttuv")


def word(rng: np.random.Generator, least: int = 2, most: int = 9) -> str:
    return "".join(rng.choice(LETTERS, rng.integers(least, most)))


def page(rng: np.random.Generator) -> Image.Image:
    image = Image.new("RGB", (320, 440), (244, 239, 226))
    draw = ImageDraw.Draw(image)
    draw.text((60, 12), "THE EVENING POST", fill=(25, 22, 20), font=ImageFont.load_default(size=22))
    draw.line((16, 46, 304, 46), fill=(25, 22, 20), width=2)
    size, top = int(rng.integers(10, 13)), 56
    for left in (16, 166):
        for line in range(int((420 - top) / (size + 3))):
            text = ""
            while len(text) < 22:
                text += word(rng) + " "
            place = (left, top + line * (size + 3))
            draw.text(place, text[:24], fill=(40, 36, 33), font=ImageFont.load_default(size=size))
    return image


def coin(rng: np.random.Generator) -> Image.Image:
    image = Image.new("RGB", (320, 320), (232, 232, 236))
    draw = ImageDraw.Draw(image)
    metal = np.array([150, 120, 70]) + rng.integers(-12, 13, 3)
    draw.ellipse((14, 14, 306, 306), fill=tuple((metal - 40).tolist()))
    draw.ellipse((20, 20, 300, 300), fill=tuple(metal.tolist()))
    for angle in np.linspace(0, 2 * math.pi, 72, endpoint=False):  # the beads of the rim are those of all coins
        x, y = 160 + 132 * math.cos(angle), 160 + 132 * math.sin(angle)
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=tuple((metal + 45).tolist()))
    for number, letter in enumerate((word(rng, 5, 9) + " " + word(rng, 5, 9)).upper()[:16]):
        angle = math.pi * (0.9 + 1.2 * number / 16)
        glyph = Image.new("L", (28, 28))
        ImageDraw.Draw(glyph).text((6, 2), letter, fill=255, font=ImageFont.load_default(size=20))
        turned = glyph.rotate(-math.degrees(angle) - 90, Image.Resampling.BICUBIC)
        place = (int(146 + 108 * math.cos(angle)), int(146 + 108 * math.sin(angle)))
        image.paste(Image.new("RGB", turned.size, tuple((metal - 70).tolist())), place, turned)
    angles = np.linspace(0, 2 * math.pi, 28, endpoint=False)
    radii = 62 + 9 * np.cos(angles) + rng.normal(0, 7, 28)  # a head
    outline = [(160 + r * math.cos(a), 168 + 1.15 * r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]
    draw.polygon(outline, fill=tuple((metal + 30).tolist()), outline=tuple((metal - 60).tolist()))
    for _ in range(9):  # hair and face
        x, y = rng.uniform(115, 200), rng.uniform(110, 220)
        arc = (x, y, x + rng.uniform(10, 40), y + rng.uniform(10, 40))
        draw.arc(arc, rng.uniform(0, 180), rng.uniform(180, 360), fill=tuple((metal - 50).tolist()), width=2)
    return noisy(image, rng, 5)


def sketch(rng: np.random.Generator) -> Image.Image:
    image = Image.new("RGB", (360, 280), (238, 234, 224))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(14, 30)):
        start, turn = rng.uniform((20, 20), (340, 260)), rng.uniform(0, 2 * math.pi)
        points = [start]
        for _ in range(rng.integers(4, 20)):
            turn += rng.normal(0, 0.5)
            points.append(points[-1] + rng.uniform(4, 14) * np.array([math.cos(turn), math.sin(turn)]))
        grey = int(rng.integers(60, 150))
        draw.line([tuple(p) for p in points], fill=(grey, grey, grey), width=int(rng.integers(1, 3)))
    return noisy(image.filter(ImageFilter.GaussianBlur(0.6)), rng, 4)


def night(rng: np.random.Generator) -> Image.Image:
    rows = np.linspace(0, 1, 260)[:, None, None]
    sky = (1 - rows) * np.array([8, 10, 28]) + rows * np.array([30, 34, 60])
    image = Image.fromarray(np.broadcast_to(sky, (260, 360, 3)).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(40, 160)):
        x, y = rng.uniform((0, 0), (360, 220))
        size = abs(rng.normal(0, 0.9))
        draw.ellipse((x - size, y - size, x + size, y + size), fill=(int(rng.integers(150, 256)),) * 3)
    x, y = rng.uniform((40, 30), (320, 90))
    draw.ellipse((x - 16, y - 16, x + 16, y + 16), fill=(235, 232, 210))
    hills = [(0, 260), *((i * 40, 225 + rng.uniform(-15, 15)) for i in range(10)), (360, 260)]
    draw.polygon(hills, fill=(10, 12, 14))
    return noisy(image, rng, 2)


def stamp(rng: np.random.Generator) -> Image.Image:
    """Of a series: one frame and one legend; a vignette of its own."""
    image = Image.new("RGB", (300, 360), (236, 230, 214))
    draw = ImageDraw.Draw(image)
    for place in range(10, 300, 16):  # perforation
        for x, y in ((place, 4), (place, 356), (4, place + 20), (296, place + 20)):
            draw.ellipse((x - 5, y - 5, x + 5, y + 5), fill=(90, 90, 92))
    ink = (120, 30, 36)
    draw.rectangle((22, 22, 278, 338), outline=ink, width=3)
    draw.rectangle((30, 30, 270, 330), outline=ink, width=1)
    draw.text((62, 36), "POSTAGE  REVENUE", fill=ink, font=ImageFont.load_default(size=18))
    draw.text((40, 296), "2d", fill=ink, font=ImageFont.load_default(size=26))
    draw.text((226, 296), "2d", fill=ink, font=ImageFont.load_default(size=26))
    for _ in range(14):
        corners = rng.uniform((60, 70), (240, 285), (rng.integers(3, 6), 2))
        shade = tuple((np.array(ink) + rng.uniform(0, 0.8) * (np.array([236, 230, 214]) - ink)).astype(int).tolist())
        draw.polygon([tuple(c) for c in corners], fill=shade)
    return noisy(image, rng, 3)


def cover(rng: np.random.Generator) -> Image.Image:
    """Of a series of books: one layout, other words."""
    image = Image.new("RGB", (280, 420), (24, 62, 96))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 300, 280, 420), fill=(226, 196, 84))
    draw.text((24, 386), "COLLECTED WORKS", fill=(24, 62, 96), font=ImageFont.load_default(size=20))
    draw.line((24, 378, 256, 378), fill=(24, 62, 96), width=2)
    draw.ellipse((196, 312, 252, 368), outline=(24, 62, 96), width=4)
    for line in range(3):
        text = word(rng, 4, 10).title()
        draw.text((24, 60 + 54 * line), text, fill=(240, 236, 224), font=ImageFont.load_default(size=40))
    name = f"{word(rng, 3, 8).title()} {word(rng, 4, 10).title()}"
    draw.text((24, 320), name, fill=(24, 62, 96), font=ImageFont.load_default(size=18))
    return noisy(image, rng, 3)


def noisy(image: Image.Image, rng: np.random.Generator, deviation: float) -> Image.Image:
    pixels = np.asarray(image, dtype=np.float32) + rng.normal(0, deviation, (image.height, image.width, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def scan(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The same sheet scanned again."""
    turned = image.rotate(1, Image.Resampling.BICUBIC, expand=False)
    margin = int(0.02 * min(image.size))
    cut = turned.crop((margin, margin, image.width - margin, image.height - margin))
    light = ImageEnhance.Brightness(ImageEnhance.Color(cut).enhance(0.85)).enhance(1.08)
    return noisy(light, rng, 3)


def bordered(image: Image.Image, share: float, colour: tuple[int, int, int], inner: int = 0) -> Image.Image:
    edge = int(share * min(image.size))
    outer = Image.new("RGB", (image.width + 2 * edge, image.height + 2 * edge), colour)
    if inner:
        gold = (edge // 3, edge // 3, outer.width - edge // 3, outer.height - edge // 3)
        ImageDraw.Draw(outer).rectangle(gold, fill=(176, 138, 62), outline=(92, 66, 22), width=inner)
    outer.paste(image, (edge, edge))
    return outer


def cropped(image: Image.Image, share: float) -> Image.Image:
    x, y = int(share * image.width), int(share * image.height)
    return image.crop((x, y, image.width - x, image.height - y))


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "rotated 10": lambda i: i.rotate(10, Image.Resampling.BICUBIC, expand=True),
    "rotated 45": lambda i: i.rotate(45, Image.Resampling.BICUBIC, expand=True),
    "rotated 90": lambda i: i.transpose(Image.Transpose.ROTATE_90),
    "mirrored": lambda i: i.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "crop 15 % a side": lambda i: cropped(i, 0.15),
    "frame": lambda i: bordered(i, 0.12, (70, 46, 24), inner=2),
    "border 15 %": lambda i: bordered(i, 0.15, (250, 250, 250)),
    "half the size": lambda i: i.resize((i.width // 2, i.height // 2), Image.Resampling.LANCZOS),
    "grey": lambda i: i.convert("L").convert("RGB"),
}
SETS = {
    "pages": page,
    "coins": coin,
    "sketches": sketch,
    "night skies": night,
    "stamps": stamp,
    "book covers": cover,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--art", type=Path, required=True, help="a table with the columns image_path and group_id")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=120)
    parser.add_argument("--copies", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    (args.out / "images").mkdir(parents=True, exist_ok=True)
    rows: list[tuple[str, str, str]] = []

    def keep(image: Image.Image, name: str, kind: str, truth: str) -> None:
        path = f"images/{name}.jpg"
        image.convert("RGB").save(args.out / path, quality=88)
        rows.append((path, kind, truth))

    for number, (kind, drawn) in enumerate(SETS.items()):
        for work in range(args.count):
            image = drawn(np.random.default_rng((args.seed, number, work)))
            truth = f"{kind.replace(' ', '-')}-{work:03d}"
            keep(image, truth, kind, truth)
            if work < DOUBLES:
                keep(scan(image, np.random.default_rng((args.seed, number, work, 1))), f"{truth}-scan", kind, truth)
    with args.art.open(newline="") as file:
        art = {row["group_id"]: row["image_path"] for row in csv.DictReader(file)}  # one image a work
    paths = sorted(art.values())
    chosen = np.random.default_rng(args.seed).choice(len(paths), args.copies * len(COPIES), replace=False)
    for place, which in enumerate(chosen):
        kind = list(COPIES)[place // args.copies]
        image = Image.open(args.art.parent / paths[which]).convert("RGB")
        truth = f"painting-{place:04d}"
        keep(image, truth, kind, truth)
        keep(COPIES[kind](image), f"{truth}-copy", kind, truth)
    with (args.out / "pictures.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("path", "set", "truth"))
        writer.writerows(rows)
    print(f"{len(rows)} pictures in {args.out}")


if __name__ == "__main__":
    main()
