"""Rows of a study trained and checked again."""
