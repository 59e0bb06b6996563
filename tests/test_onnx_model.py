"""Image encoders of others as ONNX files: what they give, what is refused, and catalogs that hold them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from conftest import simsearch as command
from onnx import TensorProto, helper
from torch import Tensor, nn

import simsearch
from simsearch.models.encoder import build, build_encoder
from simsearch.models.onnx_model import OnnxModel, onnx_backbone
from simsearch.search.catalog import read_catalog
from simsearch.serving.backend_choice import choose_runtime
from simsearch.trust import ENCODERS

C, SIDE, PATCH = 8, 32, 8
CELLS = SIDE // PATCH
GIVEN = {"channels": C, "size": SIDE}
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def weight() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((C, 3, PATCH, PATCH)).astype(np.float32) / PATCH


def network(
    kind: str = "vectors",
    layout: str = "NCHW",
    floats: int = TensorProto.FLOAT,
    batch: object = "n",
    side: object = SIDE,
    colours: object = 3,
    more: Callable[[str], list] = lambda name: [],
) -> onnx.ModelProto:
    """A convolution of patches as an ONNX model: vectors (n, C), tokens (n, 1 + patches, C), or maps; or all three."""
    kernel = onnx.numpy_helper.from_array(weight(), "kernel")
    numbers = {"as_tokens": [0, C, -1], "as_token": [0, C, 1], "as_vector": [0, -1]}
    constants = [helper.make_tensor(n, TensorProto.INT64, [len(v)], v) for n, v in numbers.items()]
    shape = [batch, colours, side, side] if layout == "NCHW" else [batch, side, side, colours]
    given = helper.make_tensor_value_info("features", floats, shape)  # as the standard form names its output
    nodes = [
        helper.make_node("Cast", ["features"], ["as_float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["as_float"], ["planes"], perm=[0, 3, 1, 2]) if layout == "NHWC" else
        helper.make_node("Identity", ["as_float"], ["planes"]),
        helper.make_node("Conv", ["planes", "kernel"], ["cells"], strides=[PATCH, PATCH]),
        helper.make_node("GlobalAveragePool", ["cells"], ["mean"]),
        helper.make_node("Reshape", ["mean", "as_vector"], ["vector"]),
        helper.make_node("Reshape", ["mean", "as_token"], ["token"]),
        helper.make_node("Reshape", ["cells", "as_tokens"], ["patches"]),
        helper.make_node("Concat", ["token", "patches"], ["columns"], axis=2),
        helper.make_node("Transpose", ["columns"], ["rows"], perm=[0, 2, 1]),
        helper.make_node("Transpose", ["cells"], ["pixels"], perm=[0, 2, 3, 1]) if layout == "NHWC" else
        helper.make_node("Identity", ["cells"], ["pixels"]),
    ]  # fmt: skip
    names = {"vectors": ("vector", 2), "tokens": ("rows", 3), "maps": ("pixels", 4)}
    chosen = names if kind == "all" else {kind: names[kind]}
    nodes += [node for name, _ in chosen.values() for node in more(name)]
    last = "changed" if more("x") else ""
    nodes += [helper.make_node("Cast", [last or name], [f"of_{k}"], to=floats) for k, (name, _) in chosen.items()]
    outputs = [helper.make_tensor_value_info(f"of_{k}", floats, [None] * rank) for k, (_, rank) in chosen.items()]
    graph = helper.make_graph(nodes, "network", [given], outputs, [kernel, *constants])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def saved(path: Path, model: onnx.ModelProto) -> str:
    onnx.save(model, path)
    return str(path)


def images(n: int = 3) -> Tensor:
    small = torch.rand(n, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    return (255 * F.interpolate(small, (SIDE, SIDE), mode="bilinear")).to(torch.uint8)


def cells(given: Tensor) -> Tensor:
    """The convolution by torch, of images in 0..255."""
    pixels = (given.float() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    return F.conv2d(pixels, torch.from_numpy(weight()), stride=PATCH)


# --------------------------------------------------------------------------------------- what a file gives


@pytest.mark.parametrize("floats", [TensorProto.FLOAT, TensorProto.FLOAT16], ids=["float32", "float16"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(
    ("kind", "tokens"), [("vectors", "cls"), ("tokens", "cls"), ("tokens", "patch"), ("maps", "cls")]
)
def test_every_form_of_output_becomes_the_map_that_torch_computes(kind, tokens, layout, floats, tmp_path):
    path = saved(tmp_path / "a.onnx", network(kind, layout, floats))
    backbone = onnx_backbone(path, **GIVEN, mean=MEAN, std=STD, layout=layout, tokens=tokens)
    expected = cells(images())
    if kind == "vectors" or (kind, tokens) == ("tokens", "cls"):
        expected = expected.mean((2, 3), keepdim=True)
    found = backbone(images())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if floats == TensorProto.FLOAT else 2e-2)
    torch.testing.assert_close(backbone(images(1)), found[:1], rtol=0, atol=1e-5)
    assert backbone.channels == C


def test_one_of_several_outputs_is_chosen(tmp_path):
    path = saved(tmp_path / "a.onnx", network("all"))
    backbone = onnx_backbone(path, **GIVEN, mean=MEAN, std=STD, output="of_maps")
    torch.testing.assert_close(backbone(images()), cells(images()), rtol=0, atol=1e-5)


def test_what_torch_exports_is_taken(tmp_path):
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Conv2d(3, C, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    axes = {"x": {0: "n"}, "y": {0: "n"}}
    torch.onnx.export(
        theirs, (torch.zeros(1, 3, SIDE, SIDE),), tmp_path / "a.onnx", input_names=["x"], output_names=["y"],
        dynamic_axes=axes, dynamo=False,
    )  # fmt: skip
    backbone = onnx_backbone(str(tmp_path / "a.onnx"), **GIVEN, mean=(0, 0, 0), std=(1, 1, 1))
    with torch.no_grad():
        expected = theirs(images() / 255)
    torch.testing.assert_close(backbone(images())[:, :, 0, 0], expected, rtol=0, atol=1e-5)


def test_tensors_beside_the_file_are_read_into_it(tmp_path):
    onnx.save(network(), tmp_path / "a.onnx", save_as_external_data=True, location="a.data", size_threshold=0)
    backbone = onnx_backbone(str(tmp_path / "a.onnx"), **GIVEN, mean=MEAN, std=STD)
    (tmp_path / "a.data").unlink()
    torch.testing.assert_close(backbone(images())[:, :, 0, 0], cells(images()).mean((2, 3)), rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------ what is refused


def over_the_batch(name: str) -> list:
    return [
        helper.make_node("ReduceMean", [name], ["of_batch"], axes=[0]),
        helper.make_node("Sub", [name, "of_batch"], ["changed"]),
    ]


def of_two_images(name: str) -> list:
    shape = helper.make_tensor("two", TensorProto.INT64, [2], [2, -1])
    return [
        helper.make_node("Constant", [], ["shape_of_two"], value=shape),
        helper.make_node("Reshape", [name, "shape_of_two"], ["changed"]),
    ]


REFUSED = {
    "batch": (network(batch=1), {}, r"takes \(1, 3, 32, 32\), batches of 1 alone: export it with a dynamic batch"),
    "size": (network(), {"size": 64}, r"images of another size than 64 pixels: set backbone\.size=32"),
    "runs": (network(side="s", kind="tokens"), {"size": 4}, "does not run on images of 4 pixels"),
    "channels": (network(), {"channels": 9}, r"gives 8 channels .*: set backbone\.channels=8"),
    "layout": (network(), {"layout": "NHWC"}, r"is not NHWC of RGB images: set backbone\.layout=NCHW"),
    "colours": (network(colours=1), {}, "which is not NCHW of RGB images: it must take three colours"),
    "type": (network(floats=TensorProto.DOUBLE), {}, "takes pixels of type double: export it for float32 or float16"),
    "outputs": (network("all"), {}, r"several outputs: set backbone\.output to one of of_vectors \(\?, \?\);"),
    "output": (network(), {"output": "x"}, r"no output 'x': set backbone\.output to one of of_vectors"),
    "mixed": (network(more=over_the_batch), {}, "another output in a batch of two than alone"),
    "fixed": (network(more=of_two_images), {}, "does not run on images|another output|two images"),
    "not finite": (network(more=lambda name: [helper.make_node("Log", [name], ["changed"])]), {}, "not finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_does_not_fit_is_named_in_one_line(case, tmp_path):
    model, settings, message = REFUSED[case]
    path = saved(tmp_path / "a.onnx", model)
    with pytest.raises(ValueError, match=message) as caught:
        onnx_backbone(path, **(GIVEN | settings))
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_two_inputs_are_refused(tmp_path):
    model = network()
    model.graph.input.append(helper.make_tensor_value_info("text", TensorProto.INT64, ["n", 77]))
    with pytest.raises(ValueError, match="has the inputs features, text, and pixels alone are given"):
        onnx_backbone(saved(tmp_path / "a.onnx", model), **GIVEN)


def test_what_is_no_onnx_file_is_refused(tmp_path):
    with pytest.raises(simsearch.WeightsError, match=r"no weights at .*: give the path of an ONNX file"):
        onnx_backbone(str(tmp_path / "a.onnx"), **GIVEN)
    torch.save({"weight": torch.ones(3)}, tmp_path / "a.pth")
    (tmp_path / "empty.onnx").touch()
    for name in ("a.pth", "empty.onnx"):
        with pytest.raises(ValueError, match=r"cannot be read as an ONNX file \(.*\)$"):
            onnx_backbone(str(tmp_path / name), **GIVEN)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fit": "longest"}, "use backbone.fit=square"),
        ({"layout": "CHWN"}, "layout must be NCHW or NHWC, got 'CHWN'"),
        ({"tokens": "all"}, "tokens must be cls or patch, got 'all'"),
        ({"size": 0}, "size and backbone.channels must be at least 1, got 0 and 8"),
        ({"std": (1, 0, 1)}, "three numbers, std above 0"),
    ],
)
def test_arguments_out_of_range_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        onnx_backbone(saved(tmp_path / "a.onnx", network()), **(GIVEN | settings))


def test_another_scale_is_refused(tmp_path):
    backbone = onnx_backbone(saved(tmp_path / "a.onnx", network(side="s")), **GIVEN)
    with pytest.raises(ValueError, match=r"takes images of 32 pixels \(backbone\.size\), not 64"):
        backbone(images(), 64)


def test_without_a_file_there_is_nothing_to_run():
    backbone = onnx_backbone("random", **GIVEN)
    assert backbone.channels == C
    with pytest.raises(simsearch.WeightsError, match=r"there is no network: give backbone\.weights=<the path"):
        backbone(images())


# ------------------------------------------------------------------------- runs, catalogs, exports, folders of others

SETTINGS = (
    "data.styles=2", "data.artists=2", "data.works=3", "data.photographs=3", "data.size=48", "backbone=onnx",
    f"backbone.channels={C}", f"backbone.size={SIDE}", f"backbone.mean={list(MEAN)}", f"backbone.std={list(STD)}",
    "model.whitening.dimension=4", "pooling=average", "logger=none", "protocol=rendered-work",
)  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return Path(saved(tmp_path_factory.mktemp("theirs") / "theirs.onnx", network()))


@pytest.fixture(scope="module")
def run(file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    command("train", *SETTINGS, f"backbone.weights={file}", f"run_dir={folder}")
    return folder


@pytest.mark.slow
def test_train_measures_it_and_the_catalog_holds_it(run, tmp_path, file, monkeypatch):
    monkeypatch.setattr("simsearch.commands.export.speed", lambda describe, image, batch: 1.0)  # it takes seconds
    moved = Path(shutil.move(file, tmp_path / "away.onnx"))
    try:
        image = f"{run}/figures/queries/00.png"
        arguments = [f"catalog={run}/catalog", f"image={image}", "k=3", "format=json"]
        found = json.loads(command("search", *arguments).stdout)["results"]
        assert found[0]["score"] == pytest.approx(1, abs=1e-4)
        command("export", f"catalog={run}/catalog", f"out={tmp_path}/onnx", "sample=6", "k=3")
        exported = json.loads(command("search", *arguments, f"encoder={tmp_path}/onnx").stdout)["results"]
        assert [item["path"] for item in exported] == [item["path"] for item in found]
        done = command("index", f"run={run}", f"images={run}/figures/queries", f"out={tmp_path}/catalog", expect=1)
        assert "no weights at" in done.stderr
    finally:
        shutil.move(moved, file)
    command("index", f"run={run}", f"images={run}/figures/queries", f"out={tmp_path}/catalog")
    one, two = (read_catalog(folder).about["encoder_fingerprint"] for folder in (run / "catalog", tmp_path / "catalog"))
    assert one == two


def test_a_run_refuses_another_file(run, file, tmp_path):
    shutil.copy(file, tmp_path / "kept.onnx")
    try:
        model = onnx.load(file)
        model.graph.initializer[0].CopyFrom(
            helper.make_tensor("kernel", TensorProto.FLOAT, weight().shape, 2 * weight().ravel())
        )
        saved(file, model)
        with pytest.raises(ValueError, match=r"was fitted on weights .* give backbone\.weights the same ones"):
            simsearch.load_encoder(run)
    finally:
        shutil.copy(tmp_path / "kept.onnx", file)


def test_it_runs_in_onnx_runtime_whatever_the_server_measures(run):
    encoder = read_catalog(run / "catalog").encoder
    assert choose_runtime(encoder, 4).runtime == "onnx"
    assert encoder.backbone.runtime == "torch"  # never exported again


def node(weights: object, channels: int = C) -> dict:
    backbone = {"_target_": "simsearch.models.onnx_model.onnx_backbone", "weights": weights, "channels": channels}
    pooling = {"_target_": "simsearch.models.pooling.Average"}
    return {
        "_target_": "simsearch.models.frozen.FrozenRetriever",
        "backbone": {**backbone, "size": SIDE},
        "pooling": pooling,
    }


@pytest.mark.parametrize("weights", ["elsewhere", {"a": "elsewhere"}, ["elsewhere"], None])
def test_a_catalogs_config_reads_no_file(weights, file, monkeypatch):
    monkeypatch.setattr("simsearch.models.onnx_model.read_model", lambda path: pytest.fail(f"{path} is read"))
    named = json.loads(json.dumps(weights).replace("elsewhere", str(file)))
    if isinstance(weights, dict):  # weights of parts, which this is not
        with pytest.raises(ValueError, match="backbone"):
            build_encoder({"model": node(named)})
    else:
        with pytest.raises(simsearch.WeightsError, match="there is no network"):
            build_encoder({"model": node(named)}).embed(images())


def test_a_catalogs_model_reads_no_file(file):
    """What somebody else put into encoder.safetensors may name a file of tensors: it stays closed."""
    own = build({**node(str(file))}, ENCODERS)
    model = onnx.load_model_from_string(own.backbone.network.data)
    (kernel,) = (tensor for tensor in model.graph.initializer if tensor.name.endswith("kernel"))
    kernel.ClearField("raw_data")
    kernel.ClearField("float_data")
    kernel.data_location = TensorProto.EXTERNAL
    kernel.external_data.add(key="location", value="/etc/passwd")
    other = build_encoder({"model": node("elsewhere")})
    state = own.state_dict() | {
        "backbone.network.model": torch.tensor(list(model.SerializeToString()), dtype=torch.uint8)
    }
    other.load_state_dict(own.state_dict())
    torch.testing.assert_close(other.embed(images()), own.embed(images()))
    other.load_state_dict(state)
    with pytest.raises(ValueError, match="the ONNX model keeps tensors in another file"):
        other.embed(images())
    state["backbone.network.model"] = own.backbone.network.model[:-40]
    other.load_state_dict(state)
    with pytest.raises(ValueError, match="the ONNX model is no ONNX file, or a damaged one"):
        other.embed(images())


def test_the_width_is_that_of_the_config(file):
    own = OnnxModel(build(node(str(file)), ENCODERS).backbone.network.data, SIDE, C + 1)
    with pytest.raises(ValueError, match=r"gives \(3, 8, 1, 1\), not maps of 9 channels"):
        own(torch.zeros(3, 3, SIDE, SIDE))
