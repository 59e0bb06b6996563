"""Reads runs back, tests them in pairs and shows them as a table and a page."""
