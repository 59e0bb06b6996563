"""A frozen network on the CPU through ONNX Runtime."""

from __future__ import annotations

import io
import warnings

import torch
from torch import Tensor, nn

_STRIDE = 32


class OnnxNetwork:
    """Calls `network`, exported once for images (B, 3, size, size) with any B, on the CPU.

    min_side: export for images (B, 3, H, W) of any sides from `min_side` up. A network may do its
    sums on the shape in Python (the padding of some, the windows of Swin), which an export takes over
    as constants: its features are therefore compared with torch's at 32 shapes, every remainder of both
    sides by 32, the usual stride.

    Raises RuntimeError with the mend where the export fails or its features differ.
    """

    def __init__(self, network: nn.Module, size: int, min_side: int | None = None) -> None:
        import onnxruntime

        buffer = io.BytesIO()
        axes = {0: "batch"} if min_side is None else {0: "batch", 2: "height", 3: "width"}
        # Sides that differ, so that none is taken for the other.
        example = torch.zeros(2, 3, size, size if min_side is None else size + 32)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.onnx.export(
                    network,
                    (example,),
                    buffer,
                    input_names=["pixels"],
                    output_names=["features"],
                    dynamic_axes={"pixels": axes, "features": axes},
                    dynamo=False,
                )
        except Exception as error:
            raise RuntimeError(f"cannot export the network to ONNX ({error}): set backbone.runtime=torch") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        options.enable_mem_pattern = min_side is None  # else a plan of the memory is kept for each shape
        self.session = onnxruntime.InferenceSession(buffer.getvalue(), options, providers=["CPUExecutionProvider"])
        if min_side is not None:
            self._check_shapes(network, min_side)

    def __call__(self, pixels: Tensor) -> Tensor:
        feed = {"pixels": pixels.float().contiguous().numpy()}
        return torch.from_numpy(self.session.run(["features"], feed)[0])

    def _check_shapes(self, network: nn.Module, min_side: int) -> None:
        generator = torch.Generator().manual_seed(0)
        for i in range(_STRIDE):
            pixels = torch.randn(1, 3, min_side + i, min_side + _STRIDE + 5 * i % _STRIDE, generator=generator)
            with torch.no_grad():
                expected = network(pixels)
            try:
                features = self(pixels)
                same = features.shape == expected.shape and (features - expected).norm() <= 1e-4 * expected.norm()
            except Exception:  # onnxruntime has many kinds, for operators that the shape does not fit
                same = False
            if not same:
                raise RuntimeError(
                    f"the network exported to ONNX gives other features on {pixels.shape[2]} x {pixels.shape[3]} "
                    "pixels than on torch: set backbone.runtime=torch"
                )
