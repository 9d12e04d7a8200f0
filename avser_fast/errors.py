"""Every error that a user can meet.  Each message names the item, what was expected and what came."""

from __future__ import annotations


class AvserError(Exception):
    """Base class of all errors raised on purpose by avser_fast."""


class InputError(AvserError, ValueError):
    """One item of a batch cannot be used; the message names the item."""


class ModelError(AvserError, ValueError):
    """A model file or name cannot be used."""


class ConfigError(AvserError, ValueError):
    """A configuration value lies outside what the model family admits."""


class BackendError(AvserError, RuntimeError):
    """A device, precision, instruction set or compiled part that was asked for is not there."""
