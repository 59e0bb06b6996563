"""The ranking metrics as torchmetrics Metrics."""
