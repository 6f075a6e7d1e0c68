"""Serves a registry file over HTTP (`server.app`); `python -m server` runs it."""
