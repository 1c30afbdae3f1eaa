"""The text of the tokens of a run."""

from __future__ import annotations

from dataclasses import dataclass

from lazarus.reading import Reading
from lazarus.sites import Position, tokens_of
from lazarus.tokens import token_text


@dataclass(frozen=True)
class TokenReader:
    """The text of tokens, by the tokenizers of a run."""

    reading: Reading
    position: Position

    def compared(self, prompt: int) -> tuple[list[int], list[str]]:
        """Return the indices of the compared tokens in a prompt, and the text of each."""
        read = self.reading.base[prompt]
        positions = list(tokens_of(read, self.position))
        return positions, [self.token(read.ids[i], 0) for i in positions]

    def token(self, token_id: int, side: int) -> str:
        """Return the text of a token of base (0) or of the fine-tuned model (1)."""
        return token_text(self.reading.tokenizers[side], token_id)
