"""Where what is visible lies in feature maps."""

import torch
from torch import Tensor
from torch.nn import functional

from mtl.errors import UserError
from mtl.pretraining.targets import resize_mask
from mtl.pretraining.token_drop import visible_indices


class Visibility:
    """Where the visible positions of a batch are, in maps of every resolution.

    Args:
        mask: (B, h, w) bool, True where hidden, equally many in each image.

    Raises:
        ValueError: Images have different numbers of visible patches, or none.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self.count = visible_indices(mask).shape[1]
        self._shares: dict[tuple[torch.Size, torch.dtype], Tensor] = {}
        self._indices: dict[tuple[int, int], Tensor] = {}

    def covers(self, height: int, width: int) -> bool:
        """Return whether a map has at least one position for each patch: a smaller one speaks for the whole image."""
        return height >= self.mask.shape[1] and width >= self.mask.shape[2]

    def share(self, x: Tensor) -> Tensor:
        """Return a factor (B, 1, H, W) of a map's type: 1 where visible, 0 where hidden.

        What a map (B, C, H, W) has beyond whole patches is padding at its right and lower edges, and visible.
        """
        key = (x.shape[-2:], x.dtype)
        if key not in self._shares:
            (height, width), (rows, columns) = x.shape[-2:], self.mask.shape[1:]
            factor = height // rows
            visible = (~resize_mask(self.mask, (factor * rows, factor * columns))).unsqueeze(1).to(x.dtype)
            if (beyond := (0, width - factor * columns, 0, height - factor * rows)) != (0, 0, 0, 0):
                if max(beyond) >= factor or min(beyond) < 0:
                    raise self._misfit(height, width)
                visible = functional.pad(visible, beyond, value=1.0)
            self._shares[key] = visible
        return self._shares[key]

    def indices(self, height: int, width: int) -> Tensor:
        """Return where the n visible positions of each image are in a map, row by row (B, n)."""
        if (height, width) not in self._indices:
            try:
                mask = resize_mask(self.mask, (height, width))
            except ValueError:
                raise self._misfit(height, width) from None
            factor = height // self.mask.shape[1]
            self._indices[height, width] = visible_indices(mask, self.count * factor**2)
        return self._indices[height, width]

    def gather(self, x: Tensor) -> Tensor:
        """Return the visible positions (B, C, n, 1) of a map (B, C, H, W), in its memory format."""
        batch, channels, height, width = x.shape
        indices = self.indices(height, width)
        if x.is_contiguous(memory_format=torch.channels_last):
            rows = x.permute(0, 2, 3, 1).reshape(-1, channels).index_select(0, _rows(indices, height * width))
            return rows.view(batch, -1, 1, channels).permute(0, 3, 1, 2)
        return x.flatten(2).gather(2, indices.unsqueeze(1).expand(-1, channels, -1)).unsqueeze(-1)

    def scatter(self, x: Tensor, height: int, width: int) -> Tensor:
        """Return a map (B, C, H, W) with given visible positions (B, C, n, 1), and 0 where hidden."""
        batch, channels = x.shape[:2]
        indices, area = self.indices(height, width), height * width
        if x.is_contiguous(memory_format=torch.channels_last):
            rows = x.permute(0, 2, 3, 1).reshape(-1, channels)
            full = rows.new_zeros(batch * area, channels).index_copy(0, _rows(indices, area), rows)
            return full.view(batch, height, width, channels).permute(0, 3, 1, 2)
        full = x.new_zeros(batch, channels, area)
        return full.scatter(2, indices.unsqueeze(1).expand(-1, channels, -1), x.flatten(2)).view(
            -1, channels, height, width
        )

    def _misfit(self, height: int, width: int) -> UserError:
        return UserError(
            f"--mask.method convolution: a map of {height}x{width} inside this backbone cannot be cut into "
            f"{self.mask.shape[1]}x{self.mask.shape[2]} patches; use --mask.method input"
        )


def _rows(indices: Tensor, area: int) -> Tensor:
    """Return where positions (B, n) of each image are among those of all images (B * n)."""
    return (indices + area * torch.arange(len(indices), device=indices.device).unsqueeze(1)).flatten()
