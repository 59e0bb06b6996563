"""Engines in which a catalog is searched past one machine: one small interface, and one module for each engine."""
