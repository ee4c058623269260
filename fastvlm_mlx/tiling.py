"""How many pixels a picture gets: one square of a given or fitting size, or a grid of tiles.

Tiles are AnyRes (paper section 4, table 10; LLaVA's "flat" patch merge): the overview first, then
the tiles row by row, each with its tokens in row-major order and nothing in between. 2x2 tiles of
1024 make 5 x 256 = 1280 tokens. The overview is what the picture would be without tiles.
"""

from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import PIL.Image

from .config import SIDE_MULTIPLE
from .errors import OptionError
from .images import Fit, fit_image

__all__ = [
    "LARGEST_SIDE",
    "Grid",
    "ImageSize",
    "automatic_size",
    "check_grid",
    "check_image_size",
    "fit_tiles",
]

ImageSize: TypeAlias = int | Literal["auto"]
Grid: TypeAlias = tuple[int, int]
"""Rows and columns of tiles; (1, 1) is one square and no overview."""

LARGEST_SIDE = 2048
_SMALLEST_AUTOMATIC = 256
_MOST_TILES = 4


def check_image_size(size: Any) -> ImageSize:
    """Return `size` if it is "auto" or a side an encoder can take. Raises OptionError."""
    if isinstance(size, int) and not isinstance(size, bool):
        if 0 < size <= LARGEST_SIDE and size % SIDE_MULTIPLE == 0:
            return size
    elif size == "auto":
        return "auto"
    raise OptionError(
        f"image_size is {size!r}; expected a multiple of {SIDE_MULTIPLE} up to {LARGEST_SIDE}, or "
        "'auto'. For more pixels than that, use tiles."
    )


def check_grid(tiles: Any) -> Grid:
    """Return `tiles` as (rows, columns) of 1 to 4 each. Raises OptionError."""
    try:
        rows, columns = tiles
    except (TypeError, ValueError):
        rows = columns = 0
    fine = all(type(n) is int and 1 <= n <= _MOST_TILES for n in (rows, columns))
    if not fine or isinstance(tiles, (str, bytes)):
        raise OptionError(
            f"tiles is {tiles!r}; expected (rows, columns) from (1, 1) to "
            f"({_MOST_TILES}, {_MOST_TILES}), such as (2, 2), on the command line 2x2."
        )
    return rows, columns


def automatic_size(width: int, height: int, own: int, fit: Fit = "pad", grid: Grid = (1, 1)) -> int:
    """The side that a picture of width x height needs: no detail lost, few pixels made up.

    The smallest multiple of 64 that holds the longer side (with `crop` the shorter) of what goes
    into one tile, but at least 256 and at most `own`, the side that the checkpoint was made for.
    """
    rows, columns = grid
    longest = max if fit == "pad" else min
    needed = longest(-(-width // columns), -(-height // rows))
    holding = -(-needed // SIDE_MULTIPLE) * SIDE_MULTIPLE
    return min(max(holding, _SMALLEST_AUTOMATIC), own)


def fit_tiles(
    picture: PIL.Image.Image, size: int, fit: Fit = "pad", grid: Grid = (1, 1)
) -> list[npt.NDArray[np.uint8]]:
    """Crops of (size, size, 3) uint8: the overview, then the tiles row by row, if there are any.

    The picture is padded (or cropped) to the grid's shape and resized to it as a whole, so a tile
    continues its neighbour to the pixel. Raises ImageError as `fit_image`.
    """
    overview = fit_image(picture, size, fit)
    if grid == (1, 1):
        return [overview]
    rows, columns = grid
    whole = fit_image(picture, size, fit, grid)
    tiles = whole.reshape(rows, size, columns, size, 3).transpose(0, 2, 1, 3, 4)
    return [overview, *tiles.reshape(rows * columns, size, size, 3)]
