import numpy as np
import pytest
import torch

from simsearch.data.collection import Collection
from simsearch.data.rendered.collection import render_collection
from simsearch.data.rendered.paint import STYLES, invent_artist, paint_work, photograph

SMALL = {"styles": 4, "artists": 3, "works": 3, "photographs": 3, "size": 48}


@pytest.fixture(scope="module")
def small() -> Collection:
    return render_collection(**SMALL)


def pictures_by_work(collection: Collection) -> dict[str, set[bytes]]:
    """Work name -> the bytes of its photographs."""
    found: dict[str, set[bytes]] = {}
    for image, work in zip(collection.images, collection.column("work").tolist(), strict=True):
        found.setdefault(collection.classes[2][work], set()).add(image.numpy().tobytes())
    return found


def thumbnails(images: torch.Tensor) -> torch.Tensor:
    """A cheap descriptor (N, 192): 8 x 8 colours less their mean, normalised."""
    small = torch.nn.functional.adaptive_avg_pool2d(images.float(), 8).flatten(1)
    return torch.nn.functional.normalize(small - small.mean(1, keepdim=True), dim=1)


def test_same_seed_same_bytes_and_another_seed_other_bytes(small):
    again = render_collection(**SMALL)
    assert again.fingerprint == small.fingerprint
    assert torch.equal(again.images, small.images)
    assert torch.equal(again.labels, small.labels)
    other = render_collection(**SMALL, seed=1)
    assert not set.union(*pictures_by_work(other).values()) & set.union(*pictures_by_work(small).values())


def test_bytes_do_not_depend_on_the_number_of_threads(small):
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 3)
    try:
        assert torch.equal(render_collection(**SMALL).images, small.images)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("more", ["styles", "artists", "works", "photographs"])
def test_a_larger_collection_holds_the_smaller_one(small, more):
    larger = pictures_by_work(render_collection(**{**SMALL, more: SMALL[more] + 2}))
    for work, photographs in pictures_by_work(small).items():
        assert photographs <= larger[work]
    assert sum(map(len, larger.values())) > len(small)


def test_labels_nest_and_names_agree(small):
    assert small.name == "rendered"
    assert small.attributes == ("style", "artist", "work")
    assert small.images.shape == (4 * 3 * 3 * 3, 3, 48, 48)
    assert not small.is_test.any()
    assert [len(names) for names in small.classes] == [4, 4 * 3, 4 * 3 * 3]
    assert all(len(set(names)) == len(names) for names in small.classes)
    assert torch.bincount(small.column("work")).tolist() == [3] * 36
    assert torch.bincount(small.column("artist")).tolist() == [9] * 12
    assert torch.bincount(small.column("style")).tolist() == [27] * 4
    for style, artist, work in small.labels.tolist():
        style_name, artist_name, work_name = (
            small.classes[0][style],
            small.classes[1][artist],
            small.classes[2][work],
        )
        assert artist_name.rsplit("-", 1)[0] == style_name
        assert work_name.split("/")[0] == artist_name


def test_rows_are_not_sorted_by_class(small):
    for attribute in small.attributes:
        steps = (small.column(attribute).diff() >= 0).float().mean()
        assert 0.3 < steps < 0.8
    assert len(small.column("style")[:12].unique()) > 2


def test_photographs_of_a_work_differ_but_are_alike(small):
    assert all(len(photographs) == 3 for photographs in pictures_by_work(small).values())
    vectors, work, artist = thumbnails(small.images), small.column("work"), small.column("artist")
    alike = vectors @ vectors.T
    same_work = work[:, None] == work
    other_work = (artist[:, None] == artist) & ~same_work
    same_work.fill_diagonal_(False)
    assert alike[same_work].mean() > alike[other_work].mean() + 0.3
    assert alike[same_work].max() < 0.9999
    nearest = alike.fill_diagonal_(-1.0).argmax(1)
    assert (work[nearest] == work).float().mean() > 0.5


def test_each_style_paints_by_its_own_rule_and_uses_the_canvas():
    """From one stream (same artist, same work) the styles give pictures that are neither alike nor flat."""
    works = [paint_work(0, style, 1, 2, size=64) for style in range(len(STYLES))]
    vectors = thumbnails(torch.from_numpy(np.stack(works)))
    assert (vectors @ vectors.T - torch.eye(len(works))).max() < 0.9
    for work in works:
        assert work.shape == (3, 64, 64)
        assert work.dtype == np.uint8
        assert work.std(axis=(1, 2)).max() > 5


@pytest.mark.parametrize("style", range(len(STYLES)), ids=STYLES)
def test_a_work_keeps_its_composition_at_another_size(style):
    large, small = (torch.from_numpy(paint_work(3, style, 0, 0, size=size))[None] for size in (160, 80))
    other = torch.from_numpy(paint_work(3, style, 0, 1, size=80))[None]
    large, small, other = map(thumbnails, (large, small, other))
    assert (large * small).sum() > max(0.9, float((large * other).sum()))


def test_artists_of_a_style_are_strangers_and_their_traits_are_shares():
    artists = [invent_artist(0, 2, number) for number in range(12)]
    for artist in artists:
        assert artist.palette.shape == (6, 3)
        assert 0 <= artist.palette.min() <= artist.palette.max() <= 1
        lightness = artist.palette.sum(1)
        assert lightness.argmin() == 5
    traits = np.array([(a.scale, a.angle, a.weight, a.order, a.spread, a.grain) for a in artists])
    assert 0 <= traits.min() <= traits.max() < 1
    apart = np.abs(traits[:, None] - traits[None]).max(2) + np.eye(12)
    assert apart.min() > 0.1
    assert invent_artist(0, 2, 5).palette.tobytes() == artists[5].palette.tobytes()


def test_a_photograph_shows_its_work_right_way_up():
    """A work of four quarters of different colours keeps each colour in its corner, on average."""
    quarters = torch.zeros((1, 3, 64, 64), dtype=torch.uint8)
    quarters[:, 0, :32, :32] = quarters[:, 1, :32, 32:] = quarters[:, 2, 32:, :32] = 200
    keys = [(0, 0, 0, number) for number in range(40)]
    shots = photograph(quarters.expand(40, -1, -1, -1), keys=keys, seed=0, size=32)
    assert shots.shape == (40, 3, 32, 32)
    assert shots.dtype == torch.uint8
    mean = shots.float().mean(0)
    for channel, (row, column) in enumerate(
        ((slice(0, 8), slice(0, 8)), (slice(0, 8), slice(24, 32)), (slice(24, 32), slice(0, 8)))
    ):
        corner = mean[:, row, column].mean((1, 2))
        assert corner.argmax() == channel
        assert corner[channel] > 3 * corner.sum() / 4


def test_extreme_sizes():
    for size in (16, 130):
        collection = render_collection(styles=len(STYLES), artists=1, works=1, photographs=1, size=size)
        assert collection.images.shape == (len(STYLES), 3, size, size)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"styles": 0}, r"styles must be between 1 and \d+, got 0: raise it"),
        ({"styles": len(STYLES) + 1}, r"styles must be between 1 and \d+, got \d+: lower it"),
        ({"artists": 0}, "artists must be at least 1, got 0"),
        ({"works": -3}, "works must be at least 1, got -3"),
        ({"photographs": 0}, "photographs must be at least 1, got 0"),
        ({"photographs": 2.0}, "photographs must be an integer, got 2.0"),
        ({"works": True}, "works must be an integer, got True"),
        ({"size": 8}, "size must be between 16 and 512, got 8: raise it"),
        ({"size": 1024}, "size must be between 16 and 512, got 1024: lower it"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_wrong_arguments_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        render_collection(**wrong)
