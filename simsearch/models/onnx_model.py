"""An image encoder that comes as an ONNX file: checked, brought to one form, and run by ONNX Runtime on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from simsearch.models.backbones import Backbone, Tokens, WeightsError
from simsearch.models.onnx import OnnxFile, parse
from simsearch.types import Fit

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto

Layout = Literal["NCHW", "NHWC"]
_SAME = 1e-3  # largest difference of an image's output alone and in a batch, relative to its norm


class OnnxModel(nn.Module):
    """Feature maps float32 (B, C, h, w) of normalised pixels float32 (B, 3, size, size), by an ONNX model.

    The bytes of the model are a buffer. Thus a catalog holds the model itself, and its fingerprint covers it.

    Args:
        model: The model in the form that `standard_form` returns. Empty if load_state_dict brings it.
        size: Side of the images in pixels.
        channels: C.
    """

    model: Tensor

    def __init__(self, model: bytes, size: int, channels: int) -> None:
        super().__init__()
        self.size, self.channels = size, channels
        data = torch.from_numpy(np.frombuffer(model, np.uint8).copy())
        self.register_buffer("model", data)
        self._file: OnnxFile | None = None

    @property
    def data(self) -> bytes:
        """The ONNX model, input `pixels`, output `features`.

        Raises:
            WeightsError: If there is none.
        """
        if not len(self.model):
            raise WeightsError("there is no network: give backbone.weights=<the path of an ONNX file>")
        return self.model.cpu().numpy().tobytes()

    def forward(self, pixels: Tensor) -> Tensor:
        """The feature maps, float32 (B, C, h, w).

        Args:
            pixels: Normalised images float32 (B, 3, size, size).

        Raises:
            ValueError: If the images have another size, or if the model gives something else than such maps.
            WeightsError: If there is no model.
        """
        if tuple(pixels.shape[2:]) != (self.size, self.size):
            raise ValueError(
                f"this ONNX file takes images of {self.size} pixels (backbone.size), not {pixels.shape[3]}: use "
                "model.scales=[1.0]"
            )
        if self._file is None:
            parse(data := self.data, "the ONNX model")  # it may come from somebody else: no tensors in other files
            self._file = OnnxFile(data, one_shape=True)
        features = self._file(pixels.cpu()).to(pixels.device)
        if features.ndim != 4 or features.shape[:2] != (len(pixels), self.channels):
            raise ValueError(f"the ONNX model gives {tuple(features.shape)}, not maps of {self.channels} channels")
        return features

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        stored = state_dict.get(f"{prefix}model")
        if isinstance(stored, Tensor) and stored.dtype == torch.uint8 and stored.ndim == 1:
            self.model, self._file = torch.empty_like(stored, device=self.model.device), None
        super()._load_from_state_dict(state_dict, prefix, *rest)


def onnx_backbone(
    weights: str,
    channels: int,
    size: int = 224,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
    layout: Layout = "NCHW",
    output: str | None = None,
    tokens: Tokens = "cls",
    fit: Fit = "square",
) -> Backbone:
    """An image encoder in an ONNX file as a Backbone. It does not train, and it runs on the CPU.

    Args:
        weights: The path of the file. "random" builds it without a network, which load_state_dict brings.
        channels: Width of the output.
        size: Side of the images in pixels.
        mean: Mean of the channels R, G, B, of values in 0..1.
        std: Standard deviation of the channels, of values in 0..1.
        layout: Order of the axes of the input, and of an output of maps.
        output: Name of the output. None if there is only one.
        tokens: Of an output (B, tokens, C): "cls" takes the first token, "patch" the last tokens that fill a square, as
            a map.
        fit: Only "square".

    Raises:
        ValueError: If an argument is out of range, or if the model does not fit the arguments.
        WeightsError: If the file is missing.
    """
    if fit != "square":
        raise ValueError(f"backbone.fit={fit}: an ONNX file takes images of one size alone: use backbone.fit=square")
    if layout not in ("NCHW", "NHWC"):
        raise ValueError(f"backbone.layout must be NCHW or NHWC, got {layout!r}")
    if tokens not in ("cls", "patch"):
        raise ValueError(f"backbone.tokens must be cls or patch, got {tokens!r}")
    if min(size, channels) < 1:
        raise ValueError(f"backbone.size and backbone.channels must be at least 1, got {size} and {channels}")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(
            f"backbone.mean and std must hold three numbers, std above 0, got {list(mean)} and {list(std)}"
        )
    import onnxruntime

    model = b""
    if weights != "random":
        path = Path(weights).expanduser()
        try:
            model = standard_form(
                read_model(path), channels=channels, size=size, layout=layout, output=output, tokens=tokens
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return Backbone(
        OnnxModel(model, size, channels),
        name="onnx",
        size=size,
        mean=[255 * value for value in mean],
        std=[255 * value for value in std],
        provenance={"weights": weights, "source": weights, "library": f"onnxruntime {onnxruntime.__version__}"},
        runtime="torch",  # it is in ONNX Runtime already
        channels=None if model else channels,
    )


def read_model(path: Path) -> ModelProto:
    """The ONNX model in a file. Tensors that it keeps in files beside it are read too.

    Args:
        path: The file.

    Raises:
        ValueError: If it is no ONNX file, or if a file of tensors is missing or lies elsewhere.
        WeightsError: If it is missing.
    """
    import onnx

    if not path.is_file():
        raise WeightsError(f"no weights at {path}: give the path of an ONNX file")
    try:
        model = onnx.load(path)
        return parse(model.SerializeToString(), "it")
    except Exception as error:  # of protobuf, of the files beside it, of more than 2 GB
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"cannot be read as an ONNX file ({reason})") from error


def standard_form(
    model: ModelProto, *, channels: int, size: int, layout: Layout, output: str | None, tokens: Tokens
) -> bytes:
    """An image encoder as an ONNX model with input `pixels` float32 (B, 3, size, size), output `features` (B, C, h, w).

    Args:
        model: The encoder.
        channels: C.
        size: Side of the images in pixels.
        layout: Order of the axes of the encoder's input.
        output: Name of its output. None if there is only one.
        tokens: What is taken of an output (B, tokens, C), as in `onnx_backbone`.

    Raises:
        ValueError: If the encoder has other inputs or outputs than the arguments say, a fixed batch, or gives an image
            another output in a batch than alone.
    """
    from onnx import TensorProto, compose, helper

    given = _input_of(model, layout, size)
    floats = given.type.tensor_type.elem_type
    taken = _output_of(model, output)
    found = _tried(model, given.name, taken, layout, size, np.float16 if floats == TensorProto.FLOAT16 else np.float32)
    width = found.shape[{2: 1, 3: 2, 4: 1 if layout == "NCHW" else 3}[found.ndim]]
    if width != channels:
        raise ValueError(f"gives {width} channels (output {taken!r}, {found.shape[1:]}): set backbone.channels={width}")

    side = math.isqrt(found.shape[1])
    steps: list[tuple[str, list[int] | None, dict[str, Any]]] = [("Cast", None, {"to": TensorProto.FLOAT})]
    if found.ndim == 4 and layout == "NHWC":
        steps += [("Transpose", None, {"perm": [0, 3, 1, 2]})]
    if found.ndim == 3 and tokens == "patch":
        steps += [("Gather", list(range(found.shape[1] - side**2, found.shape[1])), {"axis": 1})]
        steps += [("Transpose", None, {"perm": [0, 2, 1]}), ("Reshape", [0, 0, side, side], {})]
    elif found.ndim == 3:
        steps += [("Gather", [0], {"axis": 1})]
    if found.ndim == 2 or (found.ndim == 3 and tokens == "cls"):
        steps += [("Reshape", [0, -1, 1, 1], {})]

    graph = (model := compose.add_prefix(model, "network/")).graph
    before, after, name = [], [], "pixels"
    if layout == "NHWC":
        name = "standard/layout"
        before.append(helper.make_node("Transpose", ["pixels"], [name], perm=[0, 2, 3, 1]))
    before.append(helper.make_node("Cast", [name], [f"network/{given.name}"], to=floats))
    name = f"network/{taken}"
    for i, (kind, numbers, attributes) in enumerate(steps):
        inputs, name = [name], f"standard/{i}" if i + 1 < len(steps) else "features"
        if numbers is not None:
            inputs.append(f"standard/numbers-{i}")
            graph.initializer.append(helper.make_tensor(inputs[-1], TensorProto.INT64, [len(numbers)], numbers))
        after.append(helper.make_node(kind, inputs, [name], **attributes))
    nodes = [*before, *graph.node, *after]
    inputs_left = [entry for entry in graph.input if entry.name != f"network/{given.name}"]  # constants, in old files
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, size, size])
    features = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", channels, "height", "width"])
    for field, entries in ((graph.node, nodes), (graph.input, [pixels, *inputs_left]), (graph.output, [features])):
        del field[:]
        field.extend(entries)
    return model.SerializeToString()


def _input_of(model: ModelProto, layout: Layout, size: int) -> ValueInfoProto:
    """The input for pixels. Raises ValueError if its type or shape is another than the arguments say."""
    from onnx import TensorProto

    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [entry for entry in model.graph.input if entry.name not in constants]
    if len(inputs) != 1:
        names = ", ".join(entry.name for entry in inputs) or "none"
        raise ValueError(f"has the inputs {names}, and pixels alone are given: export the image encoder by itself")
    tensor = inputs[0].type.tensor_type
    if tensor.elem_type not in (TensorProto.FLOAT, TensorProto.FLOAT16):
        kind = TensorProto.DataType.Name(tensor.elem_type).lower()
        raise ValueError(f"takes pixels of type {kind}: export it for float32 or float16")
    if not tensor.HasField("shape"):
        return inputs[0]
    shape = [axis.dim_value or axis.dim_param or "?" for axis in tensor.shape.dim]
    shown = f"({', '.join(map(str, shape))})"
    if len(shape) != 4:
        raise ValueError(f"takes {shown}, no batch of images: it must take four axes, {layout}")
    batch, colours, sides = shape[0], shape[layout.index("C")], [shape[layout.index(axis)] for axis in "HW"]
    if isinstance(colours, int) and colours != 3:
        other = "NHWC" if layout == "NCHW" else "NCHW"
        mend = f"set backbone.layout={other}" if shape[other.index("C")] == 3 else "it must take three colours"
        raise ValueError(f"takes {shown}, which is not {layout} of RGB images: {mend}")
    if isinstance(batch, int):
        raise ValueError(f"takes {shown}, batches of {batch} alone: export it with a dynamic batch")
    if fixed := [side for side in sides if isinstance(side, int) and side != size]:
        mend = f"set backbone.size={fixed[0]}" if len(set(sides)) == 1 else "it must take squares"
        raise ValueError(f"takes {shown}, images of another size than {size} pixels: {mend}")
    return inputs[0]


def _output_of(model: ModelProto, output: str | None) -> str:
    """The name of the output. Raises ValueError if there are several to choose from, or none of that name."""
    known = {
        entry.name: [axis.dim_value or axis.dim_param or "?" for axis in entry.type.tensor_type.shape.dim]
        for entry in model.graph.output
    }
    if output is None and len(known) == 1:
        return next(iter(known))
    if output is None or output not in known:
        listed = "; ".join(f"{name} ({', '.join(map(str, shape))})" for name, shape in known.items())
        what = "has several outputs" if output is None else f"has no output {output!r}"
        raise ValueError(f"{what}: set backbone.output to one of {listed}")
    return output


def _tried(model: ModelProto, given: str, taken: str, layout: Layout, size: int, kind: type) -> np.ndarray:
    """The output for a batch of two images. Raises ValueError if it is none of an image encoder."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    shape = (2, 3, size, size) if layout == "NCHW" else (2, size, size, 3)
    images: np.ndarray = np.random.default_rng(0).standard_normal(shape).astype(kind)
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        both = session.run([taken], {given: images})[0]
        alone = [session.run([taken], {given: image[None]})[0] for image in images]
    except Exception as error:  # onnxruntime has many kinds
        reason = " ".join(str(error).split())
        raise ValueError(f"does not run on images of {size} pixels ({reason[:300]})") from error
    if not isinstance(both, np.ndarray) or both.dtype.kind != "f":
        raise ValueError(f"gives {taken!r} as {getattr(both, 'dtype', type(both).__name__)}: float32 is asked")
    if both.ndim not in (2, 3, 4) or len(both) != 2 or any(one.shape != both[:1].shape for one in alone):
        raise ValueError(
            f"gives {taken!r} as {both.shape} for two images: vectors (2, C), tokens (2, N, C) or maps of four axes "
            "are asked"
        )
    both, found = both.astype(np.float64), np.concatenate(alone).astype(np.float64)
    if not np.isfinite(both).all():
        raise ValueError(f"gives values in {taken!r} that are not finite")
    if not np.linalg.norm(both - found) <= _SAME * np.linalg.norm(found):
        raise ValueError("gives an image another output in a batch of two than alone: export it with a dynamic batch")
    return both
