"""Runs read back, tested in pairs, shown as a table and a page."""
