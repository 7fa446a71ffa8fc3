"""Text that grows token by token, without decoding all of it again for each.

Two things make this more than adding up pieces. A character may be cut between tokens, and then
the piece so far decodes to U+FFFD; and some tokenizers write the first piece of a text differently
from the later ones. So a few last tokens (a window that starts at the border of a character) are
decoded together, and text counts as certain up to where it may still change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNDECODED = "\N{REPLACEMENT CHARACTER}"
"""What bytes that are no character (yet) decode to."""
WINDOW = 12
"""Tokens that are decoded again for each new one, at most, where no character is cut for longer."""


class TextStream:
    """The text of a sequence of tokens, as it grows; and where the first stop string in it begins.

    Args:
        decode: ids to text (:meth:`corrigible.models.Renderer.decode`).
        stop: texts that end the answer; they do not belong to it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._reach = max((len(s) for s in self._stop), default=0)
        self._ids: list[int] = []  # the window: context, then what is not settled
        self._context = 0  # tokens of the window that are context
        self._context_length = 0  # characters of the context
        self._settled = ""
        self._unsettled = ""
        self._taken = 0
        self._searched = 0  # no stop string begins before this place
        self.stopped_at: int | None = None
        """Where the first stop string begins; None as long as there is none."""

    def feed(self, ids: Sequence[int]) -> bool:
        """Add tokens. True when the text now holds a stop string; nothing more is to be fed then."""
        self._ids.extend(ids)
        whole = self._decode(self._ids)
        window = whole[self._context_length :]
        if window and not window.endswith(UNDECODED):
            self._settled += window
            self._unsettled = ""
            self._context_length = len(whole)
            if len(self._ids) > WINDOW:
                # The tokens just settled are context enough for the next ones.
                del self._ids[: self._context]
                self._context_length = len(self._decode(self._ids))
            self._context = len(self._ids)
        else:
            self._unsettled = window
        return self._find_stop()

    def take(self, whole: str | None = None) -> str:
        """The text that has become certain since the last call.

        Args:
            whole: at the end, the answer's final text: the rest of it is given.
        """
        if whole is not None:
            text = whole
        else:
            text = self._settled + self._unsettled.rstrip(UNDECODED)
            text = text[: self.stopped_at if self.stopped_at is not None else len(text) - self._held(text)]
        fresh = text[self._taken :]
        self._taken = max(self._taken, len(text))
        return fresh

    def _held(self, text: str) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        for length in range(min(self._reach - 1, len(text)), 0, -1):
            end = text[-length:]
            if any(s.startswith(end) for s in self._stop if len(s) > length):
                return length
        return 0

    def _find_stop(self) -> bool:
        if not self._stop:
            return False
        text = self._settled[self._searched :] + self._unsettled
        found = [place for s in self._stop if (place := text.find(s)) >= 0]
        if found:
            self.stopped_at = self._searched + min(found)
            return True
        self._searched = max(0, len(self._settled) - self._reach + 1)
        return False
