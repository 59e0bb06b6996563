"""Pure mathematics on tensors: ranking metrics, ties, pooling, whitening, codes, mining, re-ranking, significance."""
