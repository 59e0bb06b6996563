"""A frozen network on the CPU through ONNX Runtime."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_STRIDE = 32
_OPSET = 17


def export_network(network: nn.Module, size: int, min_side: int | None = None) -> bytes:
    """An ONNX file of `network` for "pixels" float32 (B, 3, size, size) with any B, its output called "features".

    min_side: for images (B, 3, H, W) of any sides from `min_side` up; see `check_shapes`. Raises RuntimeError with
    the mend where the exporter cannot.
    """
    buffer = io.BytesIO()
    axes = {0: "batch"} if min_side is None else {0: "batch", 2: "height", 3: "width"}
    # Sides that differ, so that none is taken for the other.
    example = torch.zeros(2, 3, size, size if min_side is None else size + 32)
    with torch.no_grad():
        # Beyond the batch only maps have sides that vary with those of the image.
        outputs = axes if network(example).ndim == 4 else {0: "batch"}
    for name, symbolic in _SYMBOLIC.items():
        torch.onnx.register_custom_op_symbolic(name, symbolic, _OPSET)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                network,
                (example,),
                buffer,  # type: ignore[arg-type]
                input_names=["pixels"],
                output_names=["features"],
                dynamic_axes={"pixels": axes, "features": outputs},
                opset_version=_OPSET,
                dynamo=False,
            )
    except Exception as error:
        raise RuntimeError(f"cannot export the network to ONNX ({error}): set backbone.runtime=torch") from error
    finally:
        for name in _SYMBOLIC:
            torch.onnx.unregister_custom_op_symbolic(name, _OPSET)
    return buffer.getvalue()


def _adaptive_average(g: Any, features: Any, output_size: Any) -> Any:
    """Averages over a grid of cells, as two products with matrices made of the sides when the network runs.

    The exporter itself has only grids whose cells are equally large.
    """
    from torch.onnx.symbolic_helper import _get_const

    def constant(value: Any) -> Any:
        return g.op("Constant", value_t=torch.as_tensor(value))

    def shares(axis: int, cells: int) -> Any:
        """(cells, side): of each pixel, how much of it goes into the average of each cell."""
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
    """atan2, with 0 at (0, 0), where the exporter's own divides by zero: black pixels have no hue."""

    def constant(value: float) -> Any:
        return g.op("Constant", value_t=torch.tensor(value))

    zero = constant(0.0)
    slope = g.op("Div", y, g.op("Where", g.op("Equal", x, zero), constant(1e-30), x))
    turn = g.op("Where", g.op("Less", y, zero), constant(-math.pi), constant(math.pi))
    return g.op("Add", g.op("Atan", slope), g.op("Where", g.op("Less", x, zero), turn, zero))


_SYMBOLIC = {"aten::adaptive_avg_pool2d": _adaptive_average, "aten::atan2": _angle}


class OnnxFile:
    """Calls an ONNX file, or its bytes, on images float32 (B, 3, H, W) on the CPU, with as many threads as torch has.

    one_shape: whether all images have the same sides.
    """

    def __init__(self, model: bytes | Path, one_shape: bool) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        options.enable_mem_pattern = one_shape  # else a plan of the memory is kept for each shape
        # Threads that spin between calls take the processor from the next of several networks, and from torch.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        source = model if isinstance(model, bytes) else str(model)
        self.session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    def __call__(self, pixels: Tensor) -> Tensor:
        feed = {"pixels": pixels.float().contiguous().numpy()}
        return torch.from_numpy(self.session.run(["features"], feed)[0])


class OnnxNetwork(OnnxFile):
    """Calls `network`, exported once for images (B, 3, size, size) with any B, on the CPU.

    min_side: export for images (B, 3, H, W) of any sides from `min_side` up (`check_shapes`).

    Raises RuntimeError with the mend where the export fails or its features differ.
    """

    def __init__(self, network: nn.Module, size: int, min_side: int | None = None) -> None:
        super().__init__(export_network(network, size, min_side), one_shape=min_side is None)
        if min_side is not None:
            check_shapes(self, network, min_side)


def check_shapes(exported: Callable[[Tensor], Tensor], network: nn.Module, min_side: int) -> None:
    """Compares with torch's the features of a network exported for all sides from `min_side` up.

    A network may do its sums on the shape in Python (the padding of some, the windows of Swin), which an export takes
    over as constants: hence 32 shapes, every remainder of both sides by 32, the usual stride. Raises RuntimeError.
    """
    generator = torch.Generator().manual_seed(0)
    for i in range(_STRIDE):
        pixels = torch.randn(1, 3, min_side + i, min_side + _STRIDE + 5 * i % _STRIDE, generator=generator)
        with torch.no_grad():
            expected = network(pixels)
        try:
            features = exported(pixels)
            same = features.shape == expected.shape and (features - expected).norm() <= 1e-4 * expected.norm()
        except Exception:  # onnxruntime has many kinds, for operators that the shape does not fit
            same = False
        if not same:
            raise RuntimeError(
                f"the network exported to ONNX gives other features on {pixels.shape[2]} x {pixels.shape[3]} "
                "pixels than on torch: set backbone.runtime=torch"
            )
