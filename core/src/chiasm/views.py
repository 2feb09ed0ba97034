"""From one image to its views: the whole image, or tiles on the best-fitting grid with the whole image before them.

Shape letters: V views of one image, N visual tokens of one view, H and W pixels, E width of the language model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F

from chiasm.config import ImageConfig
from chiasm.encoder import Encoder
from chiasm.errors import CombinationError
from chiasm.features import Grid, SequenceSpec
from chiasm.image import ImageSpec, Resize, fit, to_bytes


class Views:
    """How the images of one model become views, and how many visual tokens each view has.

    OmniFusion's grid split (arXiv 2404.06212, section 3.2) and LLaVA-NeXT's anyres: the image is fitted into the best
    canvas of tiles, each tile is a view of the encoder's own size, and the whole image is one view more. Every encoder
    cuts at its own size; the grid is the same for all, chosen for the first one's tiles.

    Args:
        config: the run's choice.
        tile: the first encoder's pixels.
        sequence: the visual tokens of one view, as the adapter gives them.

    Raises:
        CombinationError: tiles are pooled, and the visual tokens have no grid, or one that `pool` does not divide.
    """

    def __init__(self, config: ImageConfig, tile: ImageSpec, sequence: SequenceSpec) -> None:
        self.config = config
        self.tile = (tile.height, tile.width)
        self.view_tokens = sequence.tokens
        self.grids = candidate_grids(config)
        grid, pool = sequence.grid, config.pool
        if pool > 1 and (grid is None or grid[0] % pool or grid[1] % pool):
            found = "no grid" if grid is None else f"the grid {grid}"
            raise CombinationError(
                f"pool: {pool} wants visual tokens on a grid that {pool} divides, they have {found}; "
                "choose another pool, adapter or image size"
            )
        self.tile_tokens = sequence.tokens // pool**2

    def grid(self, image: Image) -> Grid:
        """Rows and columns of tiles for an image; (1, 1) stands for the whole image alone."""
        return best_grid((image.height, image.width), self.tile, self.grids) if self.grids else (1, 1)

    def count(self, image: Image) -> int:
        """Views of an image."""
        rows, columns = self.grid(image)
        return rows * columns + (rows * columns > 1 and self.config.whole)

    def tokens(self, count: int) -> tuple[int, ...]:
        """The visual tokens of each view of an image with `count` views."""
        if count == 1:
            return (self.view_tokens,)
        first = (self.view_tokens,) if self.config.whole else ()
        return (*first, *[self.tile_tokens] * (count - len(first)))

    @property
    def counts(self) -> tuple[int, int]:
        """The fewest and the most views that an image can have."""
        tiles = [rows * columns for rows, columns in self.grids] or [1]
        counts = [n + (n > 1 and self.config.whole) for n in tiles]
        return min(counts), max(counts)

    @property
    def most_tokens(self) -> int:
        """The most visual tokens that an image can have."""
        return max(sum(self.tokens(count)) for count in self.counts)

    def pixels(self, image: Image, encoder: Encoder) -> Tensor:
        """The views of an image for one encoder, `[V, 3, H, W]` float32: the whole image first, then tiles by row."""
        return self._views(image, encoder.geometry.image, encoder.preprocess)

    def bytes(self, image: Image, encoder: Encoder) -> Tensor:
        """The same as uint8, before `normalise`; for an encoder that preprocesses as `Encoder` does."""
        spec = encoder.geometry.image
        return self._views(image, spec, lambda images, resize: to_bytes(images, spec, resize))

    def _views(self, image: Image, spec: ImageSpec, preprocess: Callable[[Sequence[Image], Resize], Tensor]) -> Tensor:
        rows, columns = self.grid(image)
        resize = self.config.resize
        if rows * columns == 1:
            return preprocess([image], resize)
        # a published processor knows no tiles; of a canvas the whole image is kept
        policy = "pad" if resize == "native" else resize
        canvas = fit(image, (rows * spec.height, columns * spec.width), policy, spec)
        tiles = [
            canvas.crop((x, y, x + spec.width, y + spec.height))
            for y in range(0, canvas.height, spec.height)
            for x in range(0, canvas.width, spec.width)
        ]
        # tiles have the encoder's size already, so that squashing leaves them as they are
        views = [preprocess(tiles, "squash")]
        if self.config.whole:
            views.insert(0, preprocess([image], resize))
        return torch.cat(views)


def candidate_grids(config: ImageConfig) -> tuple[Grid, ...]:
    """The grids that an image may be cut on; none where images are not cut."""
    if config.views == "whole":
        return ()
    if config.grids is not None:
        return config.grids
    most = config.max_tiles
    return tuple((rows, columns) for rows in range(1, most + 1) for columns in range(1, most // rows + 1))


def best_grid(size: tuple[int, int], tile: tuple[int, int], grids: Sequence[Grid]) -> Grid:
    """The grid whose canvas keeps most of an image, and of those the one that wastes least (LLaVA-NeXT's rule).

    What a canvas keeps is the area of the image in it, at most its own area; what it wastes is the rest of the canvas.

    Args:
        size: height and width of the image.
        tile: height and width of a tile.
        grids: rows and columns to choose from; the first of equally good ones is taken.
    """
    height, width = size

    def merit(grid: Grid) -> tuple[int, int]:
        canvas = (grid[0] * tile[0], grid[1] * tile[1])
        scale = min(canvas[1] / width, canvas[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - canvas[0] * canvas[1]

    return max(grids, key=merit)


def pool_tokens(visual_VNE: Tensor, grid: Grid, pool: int) -> Tensor:
    """The mean over squares of `pool` x `pool` neighbours: `[V, N, E]` to `[V, N / pool**2, E]`."""
    map_VEhw = torch.unflatten(visual_VNE.transpose(1, 2), 2, grid)
    return F.avg_pool2d(map_VEhw, pool).flatten(2).transpose(1, 2)
