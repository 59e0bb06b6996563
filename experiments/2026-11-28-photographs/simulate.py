"""Simulated photographs of the works of a collection: frames, walls, perspective, light, blur, occlusion, two works.

    python experiments/2026-11-28-photographs/simulate.py --art <table> --out <folder> --count 300 --seed 0

The works are divided once and for all, whatever the seed and the count: by a hash, one half is photographed by even
seeds (development) and the other by odd seeds (test), and a fifth of either half stays out of the catalog (unknown). A
third of the photographs shows unknown works, and a fifth of all shows two works. README.md says what is written.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from simsearch.data.rendered.paint import generator
from simsearch.files import read_json, replacing, sha256, write_csv, write_json

Array = NDArray[np.float32]
Rng = np.random.Generator

WORK_COLUMNS = ("work", "work_id", "group", "group_id")
PATH_COLUMNS = ("path", "image_path")
LEFT_OUT = 1 / 5  # of the works, and therefore unknown to the catalog
UNKNOWN_EVERY, TWO_EVERY = 3, 5  # each third photograph shows unknown works, each fifth two works
FRAMES = ("none", "plain", "gilded", "mat")
WALLS = ("plain", "plaster", "stripes", "damask", "panels", "bricks")
ASPECTS = (4 / 3, 3 / 2, 16 / 9, 3 / 4, 2 / 3, 1.0)
CORNERS = ("x1", "y1", "x2", "y2", "x3", "y3", "x4", "y4")  # top left, top right, bottom right, bottom left
PLACED = ("angle", "share", "visible", "frame", "glare", "occluded")  # what is known of each work in a photograph
SHOT = ("width", "height", "wall", "defocus", "motion", "noise", "quality")  # and of the whole photograph


# ---------------------------------------------------------------------------------------- the works


@dataclass(frozen=True)
class Work:
    """A work of the collection: its name and the paths of its images in the table."""

    name: str
    images: tuple[str, ...]


def read_works(table: Path) -> tuple[list[Work], list[dict[str, str]], str]:
    """The works of a table in a random order that only their names decide, its rows, and its column of paths."""
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    path = next(name for name in PATH_COLUMNS if name in rows[0])
    column = next((name for name in WORK_COLUMNS if name in rows[0]), path)
    images: dict[str, list[str]] = {}
    for row in rows:
        images.setdefault(row[column] or row[path], []).append(row[path])
    works = [Work(name, tuple(paths)) for name, paths in images.items()]
    return sorted(works, key=lambda work: draw(work.name, "order")), rows, path


def draw(name: str, what: str) -> float:
    """A number in [0, 1) that depends on a work's name alone."""
    return int.from_bytes(hashlib.sha256(f"{what} {name}".encode()).digest()[:7], "big") / 2**56


def is_left_out(work: Work) -> bool:
    return draw(work.name, "left out") < LEFT_OUT


def is_test(work: Work) -> bool:
    return draw(work.name, "test") < 1 / 2


def choose(works: list[Work], number: int) -> list[Work]:
    """The works of a photograph, the main one first, from those of its half."""
    unknown = number % UNKNOWN_EVERY == UNKNOWN_EVERY - 1
    pool = [work for work in works if is_left_out(work) == unknown]
    turn = number // UNKNOWN_EVERY if unknown else number - number // UNKNOWN_EVERY
    two = turn % TWO_EVERY == TWO_EVERY - 1
    main, other = pool[turn % len(pool)], pool[-1 - turn % len(pool)]
    return [main, other] if two and other is not main else [main]


# ---------------------------------------------------------------------------------------- the camera


@dataclass(frozen=True)
class Camera:
    """A pinhole camera before a wall. `wall` maps the wall's plane to pixels."""

    width: int
    height: int
    angle: float
    wall: NDArray[np.float64]


def rotation(yaw: float, pitch: float, roll: float) -> NDArray[np.float64]:
    (cy, sy), (cp, sp), (cr, sr) = ((np.cos(a), np.sin(a)) for a in (yaw, pitch, roll))
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_x = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    about_z = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return about_z @ about_x @ about_y


def aim(rng: Rng, size: int, boxes: list[Array], share: float) -> Camera:
    """A camera that sees the largest of some rectangles (4, 2) on the wall as `share` of its picture, or less.

    Less where the works would not be seen nearly whole: at a slant nothing fills a picture.
    """
    long = int(rng.integers(round(0.625 * size), size + 1))
    aspect = ASPECTS[rng.integers(len(ASPECTS))] if len(boxes) == 1 else ASPECTS[rng.integers(3)]
    width, height = (long, round(long / aspect)) if aspect >= 1 else (round(long * aspect), long)
    yaw = np.deg2rad(50 * rng.random() ** 1.3) * rng.choice([-1, 1])
    pitch, roll = np.deg2rad(rng.uniform(-12, 12)), np.deg2rad(rng.normal(0, 2.5))
    turn = rotation(yaw, pitch, roll)
    angle = float(np.rad2deg(np.arccos(np.clip(turn[2, 2], -1, 1))))
    focal = rng.uniform(0.9, 1.6) * long
    lens = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1.0]])
    every = np.concatenate(boxes)
    middle = (every.min(0) + every.max(0)) / 2
    off = rng.uniform(-1, 1, 2)

    def at(distance: float, shift: NDArray[np.float64]) -> NDArray[np.float64]:
        away = np.array([shift[0], shift[1], distance]) - turn[:, :2] @ middle
        return lens @ np.stack([turn[:, 0], turn[:, 1], away], axis=1)

    distance = float(np.sqrt(max(area(box) for box in boxes) / share))
    for _ in range(60):
        plane = at(distance, np.zeros(2))
        seen = [project(plane, box) for box in boxes]
        points = np.concatenate(seen)
        room = np.array([width, height]) - np.ptp(points, axis=0)
        fits = (room > -0.04 * np.array([width, height])).all()
        if fits and max(area(quad) for quad in seen) <= share * width * height:
            break
        distance *= 1.04
    # A translation of the whole wall to where there is room, in pixels and back.
    centre = (points.min(0) + points.max(0)) / 2
    target = np.array([width, height]) / 2 + 0.5 * off * np.maximum(room, 0) * 0.9
    shift = (target - centre) / focal * distance
    return Camera(width, height, angle, at(distance, shift))


def project(plane: NDArray[np.float64], points: Array) -> Array:
    found = np.column_stack([points, np.ones(len(points))]) @ plane.T
    return (found[:, :2] / found[:, 2:]).astype(np.float32)


def area(quad: Array) -> float:
    x, y = quad[:, 0].astype(float), quad[:, 1].astype(float)
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


# ---------------------------------------------------------------------------------------- what hangs on the wall


@dataclass(frozen=True)
class Framed:
    """A work with its frame, float32 (H, W, 3) in 0..1, and the box of the painting in it in pixels."""

    picture: Array
    left: int
    top: int
    width: int
    height: int
    frame: str


def framed(rng: Rng, painting: Array, side: int) -> Framed:
    """A painting at a longest side of `side` pixels, behind a mat or in a frame."""
    scale = side / max(painting.shape[:2])
    kind = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    height, width = (max(8, round(n * scale)) for n in painting.shape[:2])
    painting = cv2.resize(painting, (width, height), interpolation=kind).clip(0, 1)
    name = FRAMES[rng.choice(len(FRAMES), p=[0.15, 0.25, 0.4, 0.2])]
    border = {"none": 0.0, "plain": 0.02 + 0.05 * rng.random(), "gilded": 0.06 + 0.12 * rng.random(), "mat": 0.03}
    wide = round(border[name] * side)
    mat = round(rng.uniform(0.06, 0.2) * side) if name == "mat" else 0
    out = wide + mat
    picture = np.zeros((height + 2 * out, width + 2 * out, 3), np.float32)
    if out:
        # The distance to the outer edge, in 0..1 over the frame, is the profile's coordinate.
        y, x = np.mgrid[: picture.shape[0], : picture.shape[1]].astype(np.float32)
        edges = np.stack([x, y, picture.shape[1] - 1 - x, picture.shape[0] - 1 - y])
        depth, face = edges.min(0), edges.argmin(0)
        colour = moulding(rng, name, depth / max(wide, 1), face, x / side, y / side)
        paper = np.float32([0.93, 0.91, 0.86]) * rng.uniform(0.85, 1.05)
        paper = paper * (1 + 0.02 * rng.standard_normal(picture.shape[:2])[..., None])
        bevel = np.where(depth > out - max(2, side // 150), 0.75, 1.0)[..., None]
        picture[:] = np.where((depth < wide)[..., None], colour, paper * bevel)
        inner = np.exp(-(depth - wide).clip(0) / (0.012 * side)) * (depth >= wide)  # the frame's own shadow
        picture *= (1 - 0.35 * inner)[..., None]
    picture[out : out + height, out : out + width] = painting
    if out and name != "mat":
        inside = picture[out : out + height, out : out + width]
        fall = np.exp(-np.arange(height, dtype=np.float32) / (0.015 * side))[:, None, None]
        inside *= 1 - 0.4 * fall  # light comes from above
    return Framed(picture.clip(0, 1).astype(np.float32), out, out, width, height, name)


def moulding(rng: Rng, name: str, depth: Array, face: Array, x: Array, y: Array) -> Array:
    """The colours (H, W, 3) of a frame: a flat lath, or a gilded profile with ornaments."""
    if name != "gilded":
        wood = np.float32([[0.08, 0.07, 0.07], [0.3, 0.17, 0.08], [0.9, 0.9, 0.88], [0.5, 0.36, 0.2]])[rng.integers(4)]
        grain = 1 + 0.08 * np.sin(2 * np.pi * (40 * y + 3 * np.sin(9 * x + rng.uniform(0, 6))))
        light = np.float32([0.95, 1.12, 0.9, 0.8])[face]
        return wood * (grain * light)[..., None]
    gold = np.float32([0.72, 0.55, 0.24]) * rng.uniform(0.7, 1.15) * (1 + rng.uniform(-0.1, 0.1, 3))
    steps = rng.integers(2, 5)
    slope = np.cos(2 * np.pi * (depth * steps * rng.uniform(0.8, 1.2) + rng.random()))
    light = 1 + 0.35 * slope * np.float32([0.8, 1.0, -0.6, -0.8])[face]
    along = np.where(face % 2 == 0, y, x)
    beat = rng.uniform(15, 50)
    ornament = np.sin(2 * np.pi * beat * along) * np.sin(np.pi * steps * depth) * (rng.random() < 0.6)
    worn = smooth_noise(rng, depth.shape, 60)
    light = light * (1 + 0.25 * ornament) * (1 + 0.2 * worn)
    groove = np.where(np.abs(depth - rng.uniform(0.55, 0.85)) < 0.05, 0.45, 1.0)
    return gold * (light * groove)[..., None]


def smooth_noise(rng: Rng, shape: tuple[int, ...], cells: int) -> Array:
    """Noise (H, W) of about unit deviation that changes about `cells` times over the longer side."""
    height, width = shape[:2]
    step = max(height, width) / cells
    small = rng.standard_normal((int(height / step) + 3, int(width / step) + 3)).astype(np.float32)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def hang(rng: Rng, works: list[Framed]) -> list[Array]:
    """The outer rectangles (4, 2) of works side by side on the wall, whose unit is the first work's longer side."""
    boxes, x = [], 0.0
    for number, work in enumerate(works):
        size = 1.0 if number == 0 else rng.uniform(0.6, 1.0)
        scale = size / max(work.width, work.height)
        width, height = work.picture.shape[1] * scale, work.picture.shape[0] * scale
        top = -height / 2 + (0 if number == 0 else rng.uniform(-0.1, 0.1))
        corners = [[x, top], [x + width, top], [x + width, top + height], [x, top + height]]
        boxes.append(np.float32(corners))
        x += width + rng.uniform(0.08, 0.35)
    if len(boxes) == 2 and rng.random() < 0.5:  # the main work hangs on the right as often
        flip = np.float32([-1, 1])
        boxes = [(box * flip)[[1, 0, 3, 2]] for box in boxes]
    return boxes


def painting_corners(work: Framed, outer: Array) -> Array:
    """The corners (4, 2) on the wall of the painting inside its frame."""
    height, width = work.picture.shape[:2]
    xs, ys = np.float32([work.left, work.left + work.width]) / width, np.float32([work.top, work.top + work.height])
    ys = ys / height
    at = np.float32([[xs[0], ys[0]], [xs[1], ys[0]], [xs[1], ys[1]], [xs[0], ys[1]]])
    return outer[0] + at * (outer[2] - outer[0])


# ---------------------------------------------------------------------------------------- the wall


def paint_wall(rng: Rng, camera: Camera) -> tuple[Array, str]:
    """The empty wall as the camera sees it, float32 (H, W, 3), and the kind of wall."""
    name = WALLS[rng.choice(len(WALLS), p=[0.3, 0.25, 0.12, 0.13, 0.12, 0.08])]
    y, x = np.mgrid[: camera.height, : camera.width].astype(np.float32)
    back = np.linalg.inv(camera.wall)
    below = back[2, 0] * x + back[2, 1] * y + back[2, 2]
    u = ((back[0, 0] * x + back[0, 1] * y + back[0, 2]) / below).astype(np.float32)
    v = ((back[1, 0] * x + back[1, 1] * y + back[1, 2]) / below).astype(np.float32)
    palette = np.float32(
        [[0.9, 0.89, 0.86], [0.75, 0.75, 0.73], [0.45, 0.12, 0.12], [0.2, 0.32, 0.25], [0.25, 0.28, 0.4]]
    )
    colour = palette[rng.choice(5, p=[0.35, 0.2, 0.17, 0.14, 0.14])] * (1 + rng.uniform(-0.08, 0.08, 3))
    pattern = np.zeros_like(u)
    if name == "plaster":
        tile = smooth_noise(rng, (256, 256), 64) + 0.6 * smooth_noise(rng, (256, 256), 128)
        both = [np.abs(n * 400 % 510 - 255).astype(np.float32) for n in (u, v)]  # the tile mirrored has no seam
        pattern = 0.03 * cv2.remap(tile, both[0], both[1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    elif name == "stripes":
        pattern = 0.1 * np.tanh(6 * np.sin(2 * np.pi * rng.uniform(4, 12) * u))
    elif name == "damask":
        a, b = 2 * np.pi * rng.uniform(3, 7) * u, 2 * np.pi * rng.uniform(2, 5) * v
        leaf = np.sin(a) * np.sin(b) + 0.5 * np.sin(2 * a + np.sin(b)) * np.sin(3 * b)
        pattern = 0.08 * np.tanh(5 * leaf)
    elif name == "panels":
        edge = np.minimum(np.abs(u * 0.8 % 1 - 0.5), np.abs((v - 0.3) * 0.8 % 1 - 0.5))
        pattern = 0.15 * np.exp(-((edge / 0.01) ** 2)) - 0.25 * np.exp(-(((edge - 0.015) / 0.01) ** 2))
    elif name == "bricks":
        row = np.floor(v * 9)
        joint = np.minimum(np.abs(v * 9 % 1 - 0.5), 2 * np.abs((u * 4 + 0.5 * (row % 2)) % 1 - 0.5))
        joint = 0.5 - joint
        shade = np.sin(127.1 * row + 311.7 * np.floor(u * 4 + 0.5 * (row % 2)))
        pattern = 0.06 * shade - 0.25 * (joint < 0.04)
    wall = colour * (1 + pattern)[..., None]
    if rng.random() < 0.35:  # the floor, with a skirting board above it
        edge = v - rng.uniform(0.75, 1.1)
        board = np.float32([0.85, 0.84, 0.8]) * rng.uniform(0.3, 1.1)
        floor = np.float32([0.45, 0.32, 0.2]) * rng.uniform(0.5, 1.2) * (1 + 0.1 * np.sin(25 * u))[..., None]
        wall = np.where((edge > 0)[..., None], board, wall)
        wall = np.where((edge > 0.12)[..., None], floor, wall)
    return wall.clip(0, 1).astype(np.float32), name


# ---------------------------------------------------------------------------------------- the photograph


Facts = dict[str, Any]


def shoot(rng: Rng, size: int, paintings: list[Array]) -> tuple[NDArray[np.uint8], list[Facts], Facts]:
    """A photograph uint8 (H, W, 3) in RGB, the facts of each work in it, and the facts of the photograph."""
    share = rng.uniform(0.15, 0.9) if len(paintings) == 1 else rng.uniform(0.15, 0.4)
    works = [framed(rng, painting, round(size * np.sqrt(share))) for painting in paintings]
    outers = hang(rng, works)
    corners = [painting_corners(work, outer) for work, outer in zip(works, outers, strict=True)]
    camera = aim(rng, size, corners, share)
    scene, wall = paint_wall(rng, camera)
    quads = [project(camera.wall, box) for box in corners]
    inside = [filled(camera, quad) for quad in quads]
    for work, outer in zip(works, outers, strict=True):
        scene = put(rng, scene, camera, work, outer)
    for outer in outers:
        if rng.random() < 0.5:
            scene = put_label(rng, scene, camera, outer)
    scene = light(rng, scene)
    glare = reflect(rng, camera, quads)
    scene = 1 - (1 - scene) * (1 - glare[..., None])

    pixel = max(camera.width, camera.height) / 1600
    defocus = float(pixel * 4 * rng.random() ** 2 * (rng.random() < 0.6))
    motion = float(pixel * 14 * rng.random() ** 2 * (rng.random() < 0.3))
    scene = blurred(rng, scene, defocus, motion)
    scene, hidden = occlude(rng, scene, camera, quads, pixel)
    noise = float(rng.uniform(0.002, 0.03))
    scene = develop(rng, scene, noise)
    facts = [
        {
            "angle": round(camera.angle, 1),
            "share": round(area(quad) / (camera.width * camera.height), 4),
            "visible": round(min(1.0, float(mask.sum()) / max(area(quad), 1)), 3),
            "frame": work.frame,
            "glare": round(covered(glare > 0.25, mask), 3),
            "occluded": round(covered(hidden > 0.5, mask), 3),
            "quad": [round(float(n), 1) for n in quad.ravel()],
        }
        for work, quad, mask in zip(works, quads, inside, strict=True)
    ]
    about = {"width": camera.width, "height": camera.height, "wall": wall, "defocus": round(defocus, 2)}
    about |= {"motion": round(motion, 2), "noise": round(noise, 4), "quality": int(rng.integers(60, 93))}
    return (scene * 255).round().astype(np.uint8), facts, about


def filled(camera: Camera, quad: Array) -> NDArray[np.bool_]:
    mask = np.zeros((camera.height, camera.width), np.uint8)
    cv2.fillConvexPoly(mask, quad.round().astype(np.int32), 1)
    return mask > 0


def covered(part: NDArray[np.bool_], mask: NDArray[np.bool_]) -> float:
    return float((part & mask).sum() / max(mask.sum(), 1))


def put(rng: Rng, scene: Array, camera: Camera, work: Framed, outer: Array) -> Array:
    """The scene with a framed work, which throws a shadow on the wall."""
    height, width = work.picture.shape[:2]
    flat = np.float32([[0, 0], [width, 0], [width, height], [0, height]])
    plane = cv2.getPerspectiveTransform(flat, project(camera.wall, outer))
    over = (camera.width, camera.height)
    cover = cv2.warpPerspective(np.ones((height, width), np.float32), plane, over, flags=cv2.INTER_LINEAR)
    picture = cv2.warpPerspective(work.picture, plane, over, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    reach = 0.02 * rng.uniform(0.3, 1.5) * max(over)
    moved = np.float32([[1, 0, reach * rng.uniform(-1, 1)], [0, 1, reach]])
    shadow = cv2.GaussianBlur(cv2.warpAffine(cover, moved, over), (0, 0), max(0.5, 0.6 * reach))
    scene = scene * (1 - rng.uniform(0.2, 0.6) * shadow)[..., None]
    return scene + (picture - scene) * cover[..., None]


def put_label(rng: Rng, scene: Array, camera: Camera, outer: Array) -> Array:
    """The scene with a small card beside a work, with lines of text."""
    card = np.full((90, 140, 3), 0.93 if rng.random() < 0.8 else 0.12, np.float32)
    ink = 1 - card[0, 0, 0]
    for line in range(int(rng.integers(3, 7))):
        y, end = 14 + 11 * line, int(rng.integers(50, 128))
        for x in range(12, end, 7):
            if rng.random() < 0.85:
                card[y : y + 5, x : x + int(rng.integers(3, 7))] = ink
    wide = rng.uniform(0.1, 0.2)
    left, top = outer[2] + np.float32([rng.uniform(0.03, 0.08), -wide * 0.64])
    box = np.float32([[left, top], [left + wide, top], [left + wide, top + 0.64 * wide], [left, top + 0.64 * wide]])
    plane = cv2.getPerspectiveTransform(np.float32([[0, 0], [140, 0], [140, 90], [0, 90]]), project(camera.wall, box))
    over = (camera.width, camera.height)
    cover = cv2.warpPerspective(np.ones(card.shape[:2], np.float32), plane, over, flags=cv2.INTER_AREA)
    picture = cv2.warpPerspective(card, plane, over, flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REPLICATE)
    return scene + (picture - scene) * cover[..., None]


def light(rng: Rng, scene: Array) -> Array:
    """The scene under uneven light of some colour, as the camera exposes it."""
    height, width = scene.shape[:2]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    turn = rng.uniform(0, 2 * np.pi)
    field = 1 + rng.uniform(0, 0.35) * (np.cos(turn) * x + np.sin(turn) * y)
    if rng.random() < 0.5:  # a lamp
        cx, cy, wide = rng.uniform(-0.8, 0.8), rng.uniform(-1.0, 0.3), rng.uniform(0.5, 1.2)
        field = field * (0.75 + 0.5 * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / wide**2))
    field = field * (1 - rng.uniform(0, 0.2) * (x**2 + y**2) / 2)  # the lens darkens corners
    warm = rng.normal(0, 0.09)
    gains = np.float32([1 + warm, 1 + rng.normal(0, 0.02), 1 - warm]) * rng.uniform(0.6, 1.25)
    return (scene * gains * field[..., None]).clip(0, 1).astype(np.float32)


def reflect(rng: Rng, camera: Camera, quads: list[Array]) -> Array:
    """The reflections (H, W) in 0..1 on glass or varnish: lamps, or a window."""
    found = np.zeros((camera.height, camera.width), np.float32)
    for quad in quads:
        if rng.random() > 0.35:
            continue
        low, wide = quad.min(0), np.ptp(quad, axis=0)
        spot = np.zeros_like(found)
        if rng.random() < 0.6:
            for _ in range(int(rng.integers(1, 4))):
                at, axes = low + wide * rng.uniform(0.1, 0.9, 2), wide.min() * rng.uniform(0.02, 0.1, 2)
                ellipse = (int(at[0]), int(at[1])), (int(axes[0]) + 1, int(axes[1]) + 1)
                cv2.ellipse(spot, *ellipse, float(rng.uniform(0, 180)), 0, 360, float(rng.uniform(0.5, 1)), -1)
            soft = 0.02 * float(wide.min())
        else:
            at, size = low + wide * rng.uniform(0, 0.7, 2), wide * rng.uniform(0.15, 0.45, 2)
            lean = np.float32([rng.uniform(-0.2, 0.2) * size[0], 0])
            panes = np.float32([at, (at[0] + size[0], at[1]), at + size, (at[0], at[1] + size[1])])
            panes[:2] += lean
            cv2.fillConvexPoly(spot, panes.round().astype(np.int32), float(rng.uniform(0.2, 0.55)))
            bar = (panes[0] + panes[1]) / 2, (panes[2] + panes[3]) / 2
            thick = max(2, int(size[0] / 12))
            cv2.line(spot, *(tuple(int(n) for n in end) for end in bar), 0.0, thick)
            soft = 0.01 * float(wide.min())
        spot = cv2.GaussianBlur(spot, (0, 0), max(0.6, soft))
        mask = filled(camera, quad).astype(np.float32)
        found = np.maximum(found, spot * mask)
    return found


def blurred(rng: Rng, scene: Array, defocus: float, motion: float) -> Array:
    """The scene out of focus by a disc of some radius, and moved along a line of some length, both in pixels."""
    if defocus > 0.5:
        scene = cv2.filter2D(scene, -1, disc(defocus), borderType=cv2.BORDER_REFLECT)
    if motion > 1:
        reach = int(np.ceil(motion / 2)) + 1
        turn = rng.uniform(0, np.pi)
        kernel = np.zeros((2 * reach + 1, 2 * reach + 1), np.float32)
        for step in np.linspace(-motion / 2, motion / 2, 8 * reach):
            x, y = reach + step * np.cos(turn), reach + step * np.sin(turn)
            i, j = int(y), int(x)
            for di, dj in ((0, 0), (0, 1), (1, 0), (1, 1)):
                kernel[i + di, j + dj] += (1 - abs(y - i - di)) * (1 - abs(x - j - dj))
        scene = cv2.filter2D(scene, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REFLECT)
    return scene


def disc(radius: float) -> Array:
    reach = int(np.ceil(radius)) + 1
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    weight = (radius + 0.5 - np.sqrt(x**2 + y**2)).clip(0, 1).astype(np.float32)
    return weight / weight.sum()


def occlude(rng: Rng, scene: Array, camera: Camera, quads: list[Array], pixel: float) -> tuple[Array, Array]:
    """The scene with a visitor before it at times, and what the visitor hides (H, W) in 0..1."""
    mask = np.zeros((camera.height, camera.width), np.float32)
    if rng.random() < 0.25:
        quad = quads[rng.integers(len(quads))]
        low, high = quad.min(0), quad.max(0)
        head = rng.uniform(0.05, 0.11) * max(camera.width, camera.height)
        at = (int(rng.uniform(low[0], high[0])), int(rng.uniform(low[1] + 0.45 * (high[1] - low[1]), high[1])))
        cv2.ellipse(mask, at, (int(0.8 * head), int(head)), float(rng.uniform(-8, 8)), 0, 360, 1.0, -1)
        neck = np.float32([[-0.35, 0], [0.35, 0], [0.45, 1.3], [2, 1.8], [2.4, 4], [2.5, 40], [-2.5, 40], [-2.4, 4]])
        body = np.concatenate([neck, np.float32([[-2, 1.8], [-0.45, 1.3]])])
        cv2.fillPoly(mask, [(np.float32(at) + head * body).round().astype(np.int32)], 1.0)
        mask = cv2.GaussianBlur(mask, (0, 0), rng.uniform(1.5, 6) * pixel)
        cloth = rng.uniform(0.02, 0.35, 3).astype(np.float32)
        folds = 1 + 0.25 * smooth_noise(rng, mask.shape, 25)
        skin = np.float32([0.25, 0.17, 0.12]) * rng.uniform(0.3, 1.5)
        above = (np.arange(camera.height) < at[1] + head)[:, None, None]
        scene = scene + (np.where(above, skin, cloth) * folds[..., None] - scene) * mask[..., None]
    return scene, mask


def develop(rng: Rng, scene: Array, noise: float) -> Array:
    """The scene with the camera's tone curve and the noise of its sensor, which grows with the light."""
    scene = scene.clip(0, 1)
    scene = scene + rng.uniform(-0.25, 0.35) * scene * (1 - scene)
    grain = rng.standard_normal(scene.shape, dtype=np.float32)
    return (scene + noise * (0.5 + np.sqrt(scene)) * grain).clip(0, 1)


# ---------------------------------------------------------------------------------------- files


def read_painting(path: Path) -> Array:
    pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
    if pixels is None:
        raise ValueError(f"{path} is no image that can be read: leave its row out of the table")
    return pixels[..., ::-1].astype(np.float32) / 255


def take(folder: Path, number: int, art: Path, works: list[Work], seed: int, size: int) -> None:
    """Takes one photograph and notes its facts, unless it was taken before."""
    name = f"{number:05d}"
    facts = folder / "facts" / f"{name}.json"
    if facts.exists():
        return
    rng = generator(seed, number)
    chosen = choose(works, number)
    images = [work.images[rng.integers(len(work.images))] for work in chosen]
    pixels, placed, about = shoot(rng, size, [read_painting(art.parent / image) for image in images])
    shown = [
        {"work": work.name, "image": image, "known": not is_left_out(work), **fact}
        for work, image, fact in zip(chosen, images, placed, strict=True)
    ]
    with replacing(folder / "photographs" / f"{name}.jpg") as temporary:
        done, data = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, about["quality"]])
        if not done:
            raise OSError(f"{temporary} cannot be encoded")
        temporary.write_bytes(data.tobytes())
    write_json(facts, {"path": f"photographs/{name}.jpg", "works": shown, **about})


def write_tables(folder: Path, count: int, rows: list[dict[str, str]], path: str, works: list[Work]) -> None:
    """Writes photographs.csv, works.csv, left_out.csv and catalog.csv."""
    shots = [read_json(folder / "facts" / f"{number:05d}.json") for number in range(count)]
    asked, placed = [], []
    for shot in shots:
        for place, work in enumerate(shot["works"]):
            own = [work[name] for name in PLACED]
            if work["known"] or place == 0:
                named = work["image"] if work["known"] else ""
                asked.append([shot["path"], named, work["work"], *own, len(shot["works"]), *(shot[n] for n in SHOT)])
            placed.append([shot["path"], work["image"], work["work"], int(work["known"]), *work["quad"], *own])
    write_csv(folder / "photographs.csv", ["path", "work", "unit", *PLACED, "works", *SHOT], asked, exact=True)
    write_csv(folder / "works.csv", ["photograph", "work", "unit", "known", *CORNERS, *PLACED], placed, exact=True)
    unknown = [work for work in works if is_left_out(work)]
    left_out = sorted((image, work.name) for work in unknown for image in work.images)
    write_csv(folder / "left_out.csv", ["path", "work"], left_out, exact=True)
    out = {image for image, _ in left_out}
    kept = [list(row.values()) for row in rows if row[path] not in out]
    write_csv(folder / "catalog.csv", list(rows[0]), kept, exact=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--art", type=Path, required=True, help="table of images; its paths are relative to its folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; the same command again goes on")
    parser.add_argument("--count", type=int, default=300, help="photographs (default 300)")
    parser.add_argument("--seed", type=int, default=0, help="even: development works; odd: test works (default 0)")
    parser.add_argument("--size", type=int, default=1600, help="the longest side in pixels, at most (default 1600)")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    works, rows, path = read_works(arguments.art)
    half = [work for work in works if is_test(work) == bool(arguments.seed % 2)]
    told = {"art": sha256(arguments.art), "seed": arguments.seed, "size": arguments.size}
    about = arguments.out / "simulation.json"
    if about.exists() and (before := read_json(about)) != told:
        raise SystemExit(f"{arguments.out} holds other photographs ({before}): give another --out")
    write_json(about, told)
    for number in tqdm(range(arguments.count), unit="photo", disable=None):
        take(arguments.out, number, arguments.art, half, arguments.seed, arguments.size)
    write_tables(arguments.out, arguments.count, rows, path, works)
    print(f"photographs: {arguments.out / 'photographs.csv'}")


if __name__ == "__main__":
    main()
