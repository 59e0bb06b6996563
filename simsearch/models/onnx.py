"""Runs a frozen network on the CPU through ONNX Runtime."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, TensorProto

_STRIDE = 32
_OPSET = 17


def export_network(network: nn.Module, size: int, min_side: int | None = None) -> bytes:
    """A network as an ONNX file, with input "pixels" float32 (B, 3, size, size) for any B, and output "features".

    Args:
        network: The network.
        size: Side of the images in pixels.
        min_side: Exports for images (B, 3, H, W) of any sides from `min_side` (see `check_shapes`). None for squares of
            `size`.

    Raises:
        RuntimeError: If the exporter fails. The message says what to do.
    """
    axes = {0: "batch"} if min_side is None else {0: "batch", 2: "height", 3: "width"}
    # The sides differ, so that the exporter cannot confuse them.
    example = torch.zeros(2, 3, size, size if min_side is None else size + 32)
    with torch.no_grad():
        # Besides the batch, only maps have sides that depend on the image.
        outputs = axes if network(example).ndim == 4 else {0: "batch"}
    return _export(network, example, "pixels", {"pixels": axes, "features": outputs}, _OPSET)


def export_after(model: bytes, head: nn.Module, maps: Tensor) -> bytes:
    """A model followed by a head, as one ONNX file with input "pixels" and output "features" (B, D) for any B.

    Args:
        model: An ONNX model with input "pixels" and output "features", whose other names begin with "network/" or
            "standard/".
        head: Maps the features to vectors (B, D).
        maps: Features of two images, as an example.

    Raises:
        RuntimeError: If the exporter fails.
    """
    before = parse(model, "the model")
    opset = next(entry.version for entry in before.opset_import if entry.domain in ("", "ai.onnx"))
    axes = {"maps": {0: "batch"}, "features": {0: "batch"}}
    after = parse(_export(head, maps, "maps", axes, opset), "the head")
    for node in before.graph.node:
        node.output[:] = ["maps" if name == "features" else name for name in node.output]
    before.graph.node.extend(after.graph.node)
    before.graph.initializer.extend(after.graph.initializer)
    del before.graph.output[:]
    before.graph.output.extend(after.graph.output)
    return before.SerializeToString()


def _export(network: nn.Module, example: Tensor, name: str, axes: dict[str, dict[int, str]], opset: int) -> bytes:
    """A network as an ONNX file, with the input `name` and the output "features", whose `axes` are dynamic."""
    buffer = io.BytesIO()
    for operator, symbolic in _SYMBOLIC.items():
        torch.onnx.register_custom_op_symbolic(operator, symbolic, opset)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                network,
                (example,),
                buffer,  # type: ignore[arg-type]
                input_names=[name],
                output_names=["features"],
                dynamic_axes=axes,
                opset_version=opset,
                dynamo=False,
            )
    except Exception as error:
        raise RuntimeError(f"cannot export the network to ONNX ({error}): set backbone.runtime=torch") from error
    finally:
        for operator in _SYMBOLIC:
            torch.onnx.unregister_custom_op_symbolic(operator, opset)
    return buffer.getvalue()


def _adaptive_average(g: Any, features: Any, output_size: Any) -> Any:
    """Averages over a grid of cells, as products with two matrices that are built from the sides at run time.

    The exporter itself supports only grids with cells of equal size.
    """
    from torch.onnx.symbolic_helper import _get_const

    def constant(value: Any) -> Any:
        return g.op("Constant", value_t=torch.as_tensor(value))

    def shares(axis: int, cells: int) -> Any:
        """A matrix (cells, side): the weight of each pixel in the average of each cell."""
        side = g.op("Gather", g.op("Shape", features), constant(axis), axis_i=0)
        places = g.op("Range", constant(0), side, constant(1))
        first = torch.arange(cells)[:, None]
        start = g.op("Div", g.op("Mul", constant(first), side), constant(cells))
        stop = g.op("Mul", constant(first + 1), side)
        stop = g.op("Div", g.op("Add", stop, constant(cells - 1)), constant(cells))
        inside = g.op("And", g.op("GreaterOrEqual", places, start), g.op("Less", places, stop))
        count = g.op("Cast", g.op("Sub", stop, start), to_i=1)
        return g.op("Div", g.op("Cast", inside, to_i=1), count)

    rows, columns = _get_const(output_size, "is", "output_size")
    across = g.op("MatMul", features, g.op("Transpose", shares(3, columns), perm_i=[1, 0]))
    return g.op("MatMul", shares(2, rows), across)


def _angle(g: Any, y: Any, x: Any) -> Any:
    """atan2, with 0 at (0, 0). The exporter's own divides by zero there, and black pixels have no hue."""

    def constant(value: float) -> Any:
        return g.op("Constant", value_t=torch.tensor(value))

    zero = constant(0.0)
    slope = g.op("Div", y, g.op("Where", g.op("Equal", x, zero), constant(1e-30), x))
    turn = g.op("Where", g.op("Less", y, zero), constant(-math.pi), constant(math.pi))
    return g.op("Add", g.op("Atan", slope), g.op("Where", g.op("Less", x, zero), turn, zero))


_SYMBOLIC = {"aten::adaptive_avg_pool2d": _adaptive_average, "aten::atan2": _angle}


def parse(data: bytes, name: str) -> ModelProto:
    """The ONNX model in the bytes of a file, which holds all of its tensors itself.

    Args:
        data: The bytes.
        name: Name of the file, for messages.

    Raises:
        ValueError: If the bytes are no ONNX model, or if a tensor lies in another file, whose path the model chooses.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_model_from_string(data)
    except DecodeError as error:
        raise ValueError(f"{name} is no ONNX file, or a damaged one ({error})") from error
    if not model.graph.node:
        raise ValueError(f"{name} is no ONNX file, or one without a graph")
    for tensor in tensors_of(model):
        if onnx.external_data_helper.uses_external_data(tensor):
            raise ValueError(f"{name} keeps tensors in another file (first {tensor.name!r}): save it as one file")
    return model


def tensors_of(model: ModelProto) -> Iterator[TensorProto]:
    """Yields all constant tensors of an ONNX model, those of nested graphs and functions included.

    Args:
        model: The model.
    """
    graphs: list[GraphProto] = [model.graph]
    nodes = [node for function in model.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes += graph.node
        for attribute in (attribute for node in nodes for attribute in node.attribute):
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            graphs += [attribute.g, *attribute.graphs]
        nodes = []


class OnnxFile:
    """Runs an ONNX file on images float32 (B, 3, H, W) on the CPU, with as many threads as torch uses.

    Args:
        model: The path of the file, or its bytes.
        one_shape: Whether all images have the same sides.
    """

    def __init__(self, model: bytes | Path, one_shape: bool) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        options.enable_mem_pattern = one_shape  # otherwise onnxruntime keeps a memory plan for each shape
        # Threads that spin between calls would take the processor from other networks and from torch.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        source = model if isinstance(model, bytes) else str(model)
        self.session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    def __call__(self, pixels: Tensor) -> Tensor:
        feed = {"pixels": pixels.float().contiguous().numpy()}
        return torch.from_numpy(self.session.run(["features"], feed)[0])


class OnnxNetwork(OnnxFile):
    """Exports a network once and runs it on the CPU.

    Args:
        network: Maps images float32 (B, 3, H, W) to features.
        size: Side of the images in pixels.
        min_side: Exports for images of any sides from `min_side` (see `check_shapes`). None for squares of `size`.

    Raises:
        RuntimeError: If the export fails or its features differ from those of torch. The message says what to do.
    """

    def __init__(self, network: nn.Module, size: int, min_side: int | None = None) -> None:
        super().__init__(export_network(network, size, min_side), one_shape=min_side is None)
        if min_side is not None:
            check_shapes(self, network, min_side)


def check_shapes(exported: Callable[[Tensor], Tensor], network: nn.Module, min_side: int) -> None:
    """Checks that a network exported for all sides from `min_side` gives the features of torch.

    A network may compute with the shape in Python (the padding of some, the windows of Swin), which an export turns
    into constants. Therefore 32 shapes are tried, with every remainder of both sides by 32, the usual stride.

    Args:
        exported: The exported network, a function of images.
        network: The network.
        min_side: The smallest side in pixels.

    Raises:
        RuntimeError: If features differ by more than 1e-4 of their norm.
    """
    generator = torch.Generator().manual_seed(0)
    for i in range(_STRIDE):
        pixels = torch.randn(1, 3, min_side + i, min_side + _STRIDE + 5 * i % _STRIDE, generator=generator)
        with torch.no_grad():
            expected = network(pixels)
        try:
            features = exported(pixels)
            same = features.shape == expected.shape and (features - expected).norm() <= 1e-4 * expected.norm()
        except Exception:  # onnxruntime raises many kinds of errors if an operator does not fit the shape
            same = False
        if not same:
            raise RuntimeError(
                f"the network exported to ONNX gives other features for {pixels.shape[2]} x {pixels.shape[3]} "
                "pixels than on torch: set backbone.runtime=torch"
            )
