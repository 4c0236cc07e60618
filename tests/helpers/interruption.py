"""An interrupt at a chosen point of the code under test."""

from __future__ import annotations

import dis
import sys
from collections.abc import Collection
from types import FrameType
from typing import Any


class Interruption:
    """Raises KeyboardInterrupt at the n-th point of code in some files, where one can come.

    Python looks for signals after calls, at the start of functions and where loops turn back.
    """

    def __init__(self, at: int, files: Collection[str], functions: Collection[str] = ()) -> None:
        """Counts the points in these functions of the files; in all where none is given."""
        self.left, self.fired, self.files, self.functions = at, False, files, functions

    def __enter__(self) -> Interruption:
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, argument: object) -> Any:
        code = frame.f_code
        if code.co_filename not in self.files:
            return None
        if self.functions and code.co_name not in self.functions:
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        before = ""

        def trace(frame: FrameType, event: str, argument: object) -> Any:
            nonlocal before
            if event == "opcode" and not self.fired:
                if before.startswith(("CALL", "RESUME", "JUMP_BACKWARD", "JUMP_ABSOLUTE")):
                    self.left -= 1
                if self.left < 0:
                    self.fired = True
                    raise KeyboardInterrupt
                before = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            return trace

        return trace
