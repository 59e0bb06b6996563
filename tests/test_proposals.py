"""Regions of photographs: quadrilaterals that hold works, and searches by them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import simsearch as run_command
from hypothesis import given, settings
from hypothesis import strategies as st
from test_verification import MODEL, saved

import simsearch
from simsearch import api
from simsearch.data.rendered.paint import paint_work
from simsearch.functional.geometry import Match, shown
from simsearch.functional.proposals import proposals, rectified
from simsearch.models.encoder import build_encoder
from simsearch.search.catalog import read_catalog, verifying
from simsearch.search.engine import Engine
from simsearch.search.query_regions import described, region_pixels, regions_of
from simsearch.search.request import Request
from simsearch.search.verdicts import SAME_WORK
from simsearch.search.verification import Verification

PLACES = ((60, 50), (330, 120))  # of two works on a wall, x and y


def overlap(a: np.ndarray, b: np.ndarray, size: int = 400) -> float:
    """Intersection over union of two quadrilaterals, by counting pixels that lie to the right of all four sides."""
    y, x = np.mgrid[0:size, 0:size] / size
    inside = []
    for quad in (a, b):
        sides = zip(quad, np.roll(quad, -1, axis=0), strict=True)
        inside.append(np.all([(q[0] - p[0]) * (y - p[1]) - (q[1] - p[1]) * (x - p[0]) >= 0 for p, q in sides], axis=0))
    return float((inside[0] & inside[1]).sum() / (inside[0] | inside[1]).sum())


@pytest.fixture(scope="module")
def works() -> torch.Tensor:
    places = [(style, 0, work) for style in (1, 2, 4, 6) for work in range(3)]
    return torch.from_numpy(np.stack([paint_work(0, *place, size=160) for place in places]))


@pytest.fixture(scope="module")
def wall(works) -> torch.Tensor:
    """Two works on a wall, uint8 (3, 360, 560)."""
    image = torch.full((3, 360, 560), 205, dtype=torch.uint8)
    noise = torch.randint(0, 12, image.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = image + noise
    for (x, y), work in zip(PLACES, (works[1], works[7]), strict=True):
        image[:, y - 6 : y + 166, x - 6 : x + 166] = 70  # a frame
        image[:, y : y + 160, x : x + 160] = work
    return image


def quad(x: float, y: float, side: float = 160) -> np.ndarray:
    return np.array([[x, y], [x + side, y], [x + side, y + side], [x, y + side]]) / (560, 360)


class TestProposals:
    def test_frames_on_a_wall_are_found(self, wall):
        found = proposals(wall)
        for x, y in PLACES:
            assert max(overlap(one, quad(x, y)) for one in found) > 0.8

    @settings(max_examples=20, deadline=None)
    @given(st.integers(0, 1000), st.integers(1, 12))
    def test_all_are_convex_and_clockwise_and_few(self, seed, most):
        generator = torch.Generator().manual_seed(seed)
        image = torch.randint(256, (3, 5, 7), generator=generator, dtype=torch.uint8)
        image = image.repeat_interleave(17, 1).repeat_interleave(13, 2)
        found = proposals(image, most)
        assert 1 <= len(found) <= most
        for one in found:
            assert one.shape == (4, 2)
            sides = np.roll(one, -1, axis=0) - one
            ahead = np.roll(sides, -1, axis=0)
            assert (sides[:, 0] * ahead[:, 1] - sides[:, 1] * ahead[:, 0] > 0).all()

    def test_a_quadrilateral_is_seen_from_the_front(self, wall, works):
        (x, y), work = PLACES[0], works[1]
        seen = rectified(wall, quad(x, y).astype(np.float32))
        assert seen.shape == (3, 160, 160)
        assert (seen.float() - work.float()).abs().mean() < 3

    def test_a_flat_image_has_the_grid_alone(self):
        assert len(proposals(torch.full((3, 50, 50), 9, dtype=torch.uint8))) == 3

    @pytest.mark.parametrize("given", [torch.zeros(3, 8, 8), torch.zeros(8, 8, 3, dtype=torch.uint8)])
    def test_other_images_are_refused(self, given):
        with pytest.raises(ValueError, match="must be uint8"):
            proposals(given)

    def test_at_least_one(self):
        with pytest.raises(ValueError, match="at least 1"):
            proposals(torch.zeros(3, 8, 8, dtype=torch.uint8), most=0)


@pytest.mark.parametrize("mirrored", [False, True])
def test_what_an_outline_covers(mirrored):
    outline = np.array([[0.5, -1], [2, -1], [2, 0.5], [0.5, 0.5]], np.float32)
    if mirrored:
        outline[:, 0] = 1 - outline[:, 0]
    match = Match(10, 0.5, 0.0, outline, np.zeros((0, 4), np.float32), mirrored)
    assert shown(match) == pytest.approx(0.25)


def test_an_outline_beyond_the_image_covers_nothing():
    outline = np.array([[2, 2], [3, 2], [3, 3], [2, 3]], np.float32)
    assert shown(Match(10, 0.5, 0.0, outline, np.zeros((0, 4), np.float32))) == 0
    whole = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32)
    assert shown(Match(10, 0.5, 0.0, whole, np.zeros((0, 4), np.float32))) == 1


@pytest.fixture(scope="module")
def catalog(works, tmp_path_factory):
    root = tmp_path_factory.mktemp("works")
    for n, work in enumerate(works):
        saved(work, root / f"{n:02d}.png")
    torch.manual_seed(5)
    encoder = api.LoadedEncoder(build_encoder({"model": MODEL}), {"model": MODEL}, "toy")
    out = tmp_path_factory.mktemp("catalogs") / "catalog"
    simsearch.build_catalog(encoder, root, out, workers=0, verification=Verification(top=1, region_top=12))
    return read_catalog(out)


class TestSearch:
    """The network has random weights, and one item is verified for the whole image: regions find the rest."""

    def test_two_works_in_a_photograph_are_found_by_its_regions(self, catalog, wall):
        opened = simsearch.open_catalog(catalog.folder)
        answer = opened.search(wall, k=5)
        assert {hit.attributes["path"] for hit in answer[:2]} == {"01.png", "07.png"}
        assert [hit.verdict == SAME_WORK for hit in answer] == [True, True, False, False, False]
        for hit in answer[:2]:
            place = quad(*PLACES[["01.png", "07.png"].index(hit.attributes["path"])])
            assert overlap(np.array(hit.outline), place) > 0.9

    def test_without_regions_the_whole_image_is_searched_alone(self, catalog, wall):
        engine = Engine(verifying(catalog, regions=0))
        assert regions_of(wall, engine.catalog.encoder, engine.catalog.verification) is None
        local = engine.catalog.verification.query(wall)
        vector = engine.vectors([4])
        answer = engine.recommend(Request(vector, k=5, local=local))
        assert sum(match is not None for match in answer.matches) <= 1

    def test_what_regions_bring_keeps_filters_and_exclusions(self, catalog, wall):
        engine = Engine(catalog)
        local, vector = catalog.verification.query(wall), engine.vectors([4])
        regions = regions_of(wall, catalog.encoder, catalog.verification)
        answer = engine.recommend(Request(vector, k=5, local=local, regions=regions, exclude=(1,)))
        assert 1 not in answer.ids.tolist()
        among = torch.arange(len(catalog)) != 7
        ids, matches = engine.verified(torch.tensor([4, 5]), local, regions, among=among)
        assert ids.tolist() == [1, 4, 5]
        assert [match is not None for match in matches] == [True, False, False]

    def test_scores_of_items_that_regions_bring_are_their_own(self, catalog, wall):
        engine = Engine(catalog)
        regions = regions_of(wall, catalog.encoder, catalog.verification)
        vector = engine.vectors([4])
        given = Request(vector, k=12, local=catalog.verification.query(wall), regions=regions, collapse=False)
        answer = engine.recommend(given)
        stored = catalog.index.reconstruct()
        expected = stored[answer.ids] @ vector[0]
        assert torch.allclose(answer.scores, expected, atol=1e-5)
        assert torch.allclose(engine.scores(vector[0], answer.ids), expected, atol=1e-5)

    def test_regions_are_not_described_if_a_work_fills_the_image(self, catalog, works):
        engine = Engine(catalog)

        def never() -> torch.Tensor:
            raise AssertionError("regions were described")

        local = catalog.verification.query(works[3])
        ids, matches = engine.verified(torch.tensor([3, 4]), local, never)
        assert ids.tolist() == [3, 4]
        assert shown(matches[0]) > 0.95

    def test_a_region_without_a_finite_descriptor_is_left_out(self):
        class Encoder(torch.nn.Module):
            bits, input_size = None, 8

            def embed(self, images):
                grey = images.float().mean((2, 3))
                return grey / grey.norm(dim=1, keepdim=True)  # of a black image 0 / 0

        black, white = np.zeros((3, 8, 8), np.uint8), np.full((3, 8, 8), 255, np.uint8)
        assert described(Encoder(), [black, white]).shape == (1, 3)
        assert described(Encoder(), [black]).shape == (0, 3)

    def test_files_and_pixels_give_the_same_regions(self, catalog, wall, tmp_path):
        path = saved(wall, tmp_path / "wall.png")
        given = {"size": 32, "fit": "square"}
        of_file = region_pixels(catalog.verification, path, **given)
        of_pixels = region_pixels(catalog.verification, wall, **given)
        assert len(of_file) == len(of_pixels) > 3
        assert all((a == b).all() for a, b in zip(of_file, of_pixels, strict=True))

    @pytest.mark.slow
    def test_the_commands_find_both_works(self, catalog, wall, tmp_path):
        path = saved(wall, tmp_path / "wall.png")
        for command in ("search", "recommend"):
            done = run_command(command, f"catalog={catalog.folder}", f"image={path}", "k=3")
            assert done.stdout.count(SAME_WORK) >= 2
            alone = run_command(command, f"catalog={catalog.folder}", f"image={path}", "k=3", "verification.regions=0")
            assert alone.stdout.count("01.png") + alone.stdout.count("07.png") < 2 or SAME_WORK not in alone.stdout
