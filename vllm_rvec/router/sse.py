"""Server-sent events, as far as a proxy must know them: where one ends.

When an engine breaks off in the middle of an event, the client must get an error event. Behind
half an event it would be read as a part of it, and a blank line between the two would hand the
client half a JSON text. So a begun event waits here for its end; complete ones never wait, and
the bytes are the same either way.
"""

from __future__ import annotations

__all__ = ["EventGate"]

BLANK_LINES = (b"\n\n", b"\r\n\r\n", b"\r\r")
"""What ends an event, in each of the three line endings that the HTML standard allows."""

LONGEST_BLANK_LINE_BYTES = 4

HELD_BYTES = 16 * 2**20
"""The longest event that is held. `response.completed` of `/v1/responses` repeats the whole answer
and stays far below; beyond, memory matters more than a well-formed error."""


class EventGate:
    r"""Lets complete events through and holds the begun one.

    >>> gate = EventGate()
    >>> gate.feed(b"data: 1\n\ndata: 2")
    b'data: 1\n\n'
    >>> gate.held
    b'data: 2'
    """

    def __init__(self) -> None:
        self._held = bytearray()
        self._let_part_through = False

    @property
    def held(self) -> bytes:
        """The begun event, as far as it has come and was not let through."""
        return bytes(self._held)

    @property
    def is_between_events(self) -> bool:
        """Whether what was let through ends with a complete event."""
        return not self._let_part_through

    def feed(self, chunk: bytes) -> bytes:
        """Take what the upstream sent and give back what may go on.

        Args:
            chunk: The next bytes, cut anywhere.

        Returns:
            All bytes up to the end of the last complete event; empty when none ended.
        """
        if not self._held and chunk.endswith(b"\n\n"):
            self._let_part_through = False
            return chunk  # as engines send them, whole
        searched = max(0, len(self._held) - LONGEST_BLANK_LINE_BYTES + 1)
        self._held += chunk
        if end := _end_of_last_event(self._held, searched):
            self._let_part_through = False
        elif self._let_part_through or len(self._held) > HELD_BYTES:
            end = len(self._held)
            self._let_part_through = True
        passed = bytes(self._held[:end])
        del self._held[:end]
        return passed


def _end_of_last_event(buffer: bytearray, start: int) -> int:
    """Where the last blank line at or behind `start` ends; 0 where there is none."""
    found = ((buffer.rfind(blank, start), len(blank)) for blank in BLANK_LINES)
    return max((at + length for at, length in found if at >= 0), default=0)
