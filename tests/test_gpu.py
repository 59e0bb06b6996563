"""What runs on an accelerator gives what the CPU gives: functions, descriptors, rankings, trainings."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from conftest import simsearch
from test_resume import DATA, DIR, DSH, HASHING, RANDOM
from torch import Tensor, nn

from simsearch import saved_run
from simsearch.callbacks.training import StepSeed
from simsearch.files import read_json
from simsearch.functional.codes import pack_codes, unpack_codes
from simsearch.functional.mining import batch_hard, hardest_triplets
from simsearch.functional.pooling import gem, mac, rmac, spoc
from simsearch.functional.whitening import Moments, whitening_matrix
from simsearch.losses.dsh import DSHLoss
from simsearch.metrics.retrieval import RetrievalMetrics
from simsearch.models.backbones import Backbone, timm_backbone
from simsearch.models.cifar import cifar_backbone
from simsearch.models.dir import RegionNetwork
from simsearch.models.dsh import DSHNetwork
from simsearch.models.hashing import HashNetwork
from simsearch.models.pooling import MAC, RMAC
from simsearch.search.describe import encode

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def _whole_precision():
    """Products of float32 in float32, not in TF32."""
    places = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = False
    yield
    for place, value in zip(places, before, strict=True):
        place.allow_tf32 = value


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def labels(count: int, classes: int = 7) -> Tensor:
    return torch.randint(0, classes, (count,), generator=torch.Generator().manual_seed(1))


def loss_and_gradient(codes: Tensor) -> Tensor:
    codes = codes.clone().requires_grad_(True)
    loss = DSHLoss()(codes, labels(len(codes)).to(codes.device))
    loss.backward()
    return torch.cat([loss.detach()[None], codes.grad.flatten()])


def whitened(vectors: Tensor) -> Tensor:
    moments = Moments.zeros(vectors.shape[1])
    moments.add(vectors)
    _, values, rows = moments.principal()
    return whitening_matrix(values, rows, 4, power=1.0)


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "spoc": (spoc, drawn(4, 16, 7, 7)),
    "mac": (mac, drawn(4, 16, 7, 7)),
    "gem": (lambda x: gem(x, 3.0), drawn(4, 16, 7, 7)),
    "rmac": (lambda x: rmac(x, 3), drawn(4, 16, 7, 9)),
    "pack": (pack_codes, drawn(64, 12)),
    "unpack": (lambda x: unpack_codes(pack_codes(x), 12), drawn(64, 12)),
    "hardest": (lambda x: hardest_triplets(x, labels(len(x)).to(x.device), margin=1.0)[1], drawn(100, 8)),
    "batch hard": (lambda x: torch.stack(batch_hard(x, labels(len(x)).to(x.device))), drawn(100, 8)),
    "whitening": (whitened, drawn(100, 8)),
    "dsh loss": (loss_and_gradient, drawn(60, 12)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_gives_what_it_gives_on_the_cpu(name):
    function, argument = FUNCTIONS[name]
    found, wanted = function(argument.to(DEVICE)).cpu(), function(argument)
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def small_backbone() -> Backbone:
    return timm_backbone("test_efficientnet", "random", 64)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "dsh": lambda: DSHNetwork(16),
    "hashing": lambda: HashNetwork(cifar_backbone(24), MAC(), 16),
    "dir": lambda: RegionNetwork(small_backbone(), RMAC(levels=2), 8),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_describes_as_on_the_cpu(name):
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    images = torch.randint(0, 256, (40, 3, network.input_size, network.input_size), dtype=torch.uint8)
    if name == "dsh":
        network.prepare(images, torch.arange(len(images)))
    with torch.inference_mode():
        wanted = network.embed(images)
        stored = encode(network, images)
        found = network.to(DEVICE).embed(images.to(DEVICE)).cpu()
    scale = float(wanted.abs().max())
    torch.testing.assert_close(found / scale, wanted / scale, rtol=0, atol=1e-4)
    on_device = encode(network, images)
    if network.bits is None:
        torch.testing.assert_close(on_device, stored, rtol=0, atol=1e-4)
    else:  # a sign may only differ where the code is next to nothing
        sure = wanted.abs() > 1e-3 * scale
        assert torch.equal(unpack_codes(on_device, 16)[sure], unpack_codes(stored, 16)[sure])


@pytest.mark.parametrize("bits", [None, 16])
def test_what_lies_on_the_device_ranks_as_on_the_cpu(bits):
    vectors, classes, rows = drawn(300, 16), labels(300), torch.arange(300)
    if bits is None:
        vectors = nn.functional.normalize(vectors)
    found, health = [], []
    for device in ("cpu", DEVICE):
        metrics = RetrievalMetrics((1, 10), bits, exclude_self=True).to(device)
        for part, some in (("query", rows[:50]), ("gallery", rows)):
            metrics.update(part, *(values[some].to(device) for values in (vectors, classes, rows)))
        found.append(metrics.per_query())
        health.append(metrics.code_statistics())
    for name, wanted in found[0].items():
        assert torch.equal(found[1][name].nan_to_num(-1), wanted.nan_to_num(-1)), name
    assert health[1] == pytest.approx(health[0], abs=1e-12)


FAMILIES = {
    "frozen": ("model=frozen", *RANDOM, "backbone.size=32", "model.whitening.dimension=8"),
    "dsh": DSH,
    "hashing": HASHING,
    "dir": DIR,
}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_trains_and_its_checkpoint_opens_on_the_cpu(family, precision, tmp_path):
    data = [*DATA[: DATA.index("logger.mode=disabled") + 4]] if family == "frozen" else DATA
    length = [] if family == "frozen" else ["trainer.max_steps=2", f"trainer.precision={precision}"]
    if family == "frozen" and precision != "32-true":
        pytest.skip("nothing trains")
    run = tmp_path / "run"
    simsearch("train", *data, *FAMILIES[family], *length, "trainer.accelerator=gpu", f"run_dir={run}")
    assert read_json(run / "run.json")["device"] == torch.cuda.get_device_name()

    model = saved_run.load_model(saved_run.open_run(run))
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    assert model.embed(images).isfinite().all()

    values = []
    for accelerator in ("gpu", "cpu"):
        folder = tmp_path / accelerator
        (run / "config.yaml").write_text(
            (run / "config.yaml").read_text().replace("accelerator: gpu", f"accelerator: {accelerator}")
        )
        simsearch("evaluate", f"run={run}", f"run_dir={folder}")
        values.append(read_json(folder / "metrics.json")["test"]["metrics"]["mAP"])
    assert values[0] == pytest.approx(values[1], abs=0.05)


def test_a_step_is_seeded_on_the_device_too():
    trainer = SimpleNamespace(global_rank=0, strategy=SimpleNamespace(root_device=torch.device(DEVICE)))
    StepSeed(3).on_train_start(trainer, None)
    own = torch.rand(4, device=DEVICE), torch.rand(4)
    torch.manual_seed(torch.initial_seed())
    assert torch.equal(torch.rand(4, device=DEVICE), own[0])
    assert torch.equal(torch.rand(4), own[1])
