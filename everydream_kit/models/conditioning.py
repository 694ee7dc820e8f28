"""What a denoiser is conditioned on, and joining rows of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(slots=True)
class Conditioning:
    """What the denoiser is conditioned on.

    Attributes:
        encoder_hidden_states: (B, L, D), the text encoders' output; for CLIP, L is 77 times the number of chunks.
        pooled: (B, P), the pooled text embedding of families that use it.
        lengths: how many tokens of each row are text, for families whose texts differ in length; what follows is padding.
        guidance: (B,), the scale for denoisers with embedded guidance; None: 1, as in training.
    """

    encoder_hidden_states: torch.Tensor
    pooled: torch.Tensor | None = None
    lengths: tuple[int, ...] | None = None
    guidance: torch.Tensor | None = None

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        pooled = None if self.pooled is None else self.pooled.to(device=device, dtype=dtype)
        states = self.encoder_hidden_states.to(device=device, dtype=dtype)
        return replace(self, encoder_hidden_states=states, pooled=pooled)

    def rows(self, picked: list[int]) -> Conditioning:
        """The rows of these numbers, in their order; a row may be picked several times."""
        pooled = None if self.pooled is None else self.pooled[picked]
        lengths = None if self.lengths is None else tuple(self.lengths[row] for row in picked)
        guidance = None if self.guidance is None else self.guidance[picked]
        return Conditioning(self.encoder_hidden_states[picked], pooled, lengths, guidance)

    def mask(self, device: torch.device) -> torch.Tensor | None:
        """(B, L), True where a token is text; None where all are."""
        if self.lengths is None:
            return None
        places = torch.arange(self.encoder_hidden_states.shape[1], device=device)
        return torch.stack([places < length for length in self.lengths])

    def texts(self) -> list[torch.Tensor]:
        """Each row's own tokens (L_row, D)."""
        lengths = self.lengths or (self.encoder_hidden_states.shape[1],) * len(self.encoder_hidden_states)
        return [row[:length] for row, length in zip(self.encoder_hidden_states, lengths, strict=True)]


def join_conditioning(rows: Sequence[Conditioning]) -> Conditioning:
    """Rows of any lengths as one batch: shorter ones are padded with zeros, and `lengths` says from where on."""
    longest = max(row.encoder_hidden_states.shape[1] for row in rows)
    states = torch.cat([_padded(row.encoder_hidden_states, longest) for row in rows])
    pooled = None if rows[0].pooled is None else torch.cat([row.pooled for row in rows if row.pooled is not None])
    lengths = [
        length for row in rows for length in row.lengths or [row.encoder_hidden_states.shape[1]] * _num_rows(row)
    ]
    return Conditioning(states, pooled, None if min(lengths) == longest else tuple(lengths))


def _num_rows(conditioning: Conditioning) -> int:
    return len(conditioning.encoder_hidden_states)


def _padded(values: torch.Tensor, length: int) -> torch.Tensor:
    """(B, L, ...) with zeros at the end of the second dimension."""
    missing = length - values.shape[1]
    return values if not missing else torch.cat([values, values.new_zeros(len(values), missing, *values.shape[2:])], 1)
