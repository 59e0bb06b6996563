"""Trains the rows of a study and checks their values."""
