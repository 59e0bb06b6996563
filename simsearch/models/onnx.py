"""A frozen network on the CPU through ONNX Runtime."""

from __future__ import annotations

import io
import warnings

import torch
from torch import Tensor, nn


class OnnxNetwork:
    """Calls `network`, exported once for images (B, 3, size, size) with any B, on the CPU.

    Raises RuntimeError with the mend where the export fails.
    """

    def __init__(self, network: nn.Module, size: int) -> None:
        import onnxruntime

        buffer = io.BytesIO()
        example = torch.zeros(2, 3, size, size)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.onnx.export(
                    network,
                    (example,),
                    buffer,
                    input_names=["pixels"],
                    output_names=["features"],
                    dynamic_axes={"pixels": {0: "batch"}, "features": {0: "batch"}},
                    dynamo=False,
                )
        except Exception as error:
            raise RuntimeError(f"cannot export the network to ONNX ({error}): set backbone.runtime=torch") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(buffer.getvalue(), options, providers=["CPUExecutionProvider"])

    def __call__(self, pixels: Tensor) -> Tensor:
        feed = {"pixels": pixels.float().contiguous().numpy()}
        return torch.from_numpy(self.session.run(["features"], feed)[0])
