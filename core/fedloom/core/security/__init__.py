"""Certificates, the names in them, and addresses."""
