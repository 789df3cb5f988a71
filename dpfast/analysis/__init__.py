"""Audits of the guarantee on a user's own model."""
