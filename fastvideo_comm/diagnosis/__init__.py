"""Ranks compare their calls before they send, so that a mistake is an error and not a hang."""

from ..errors import MismatchError
from .comparison import Diagnosis, Validate, is_due

__all__ = ["Diagnosis", "MismatchError", "Validate", "is_due"]
