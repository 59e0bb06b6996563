"""One loss a file, called as `forward(embeddings, labels)`, like those of pytorch-metric-learning."""
