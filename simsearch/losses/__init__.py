"""One loss per file, called as `forward(embeddings, labels)`, like those of pytorch-metric-learning."""
