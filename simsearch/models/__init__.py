"""Backbones and pooling, one family a file, and what all families that learn share."""
