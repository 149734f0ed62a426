"""Relays AI token streams to browsers as Server-Sent Events."""

__version__ = "0.1.0"
