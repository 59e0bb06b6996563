"""Backbones and pooling, one file for each family, and what all trained families share."""
