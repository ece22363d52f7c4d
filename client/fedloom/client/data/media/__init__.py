"""Rows that are files: pictures and recordings."""
