"""A short clip cut from a real photograph: a window pans and zooms over it, one crop a frame."""

from pathlib import Path

import skimage
import torch
from skimage.io import imread
from torch import Tensor
from torch.nn.functional import interpolate


def load_clip(frames: int, height: int, width: int) -> Tensor:
    """Returns `[3, frames, height, width]` in -1..1, fp32, on the CPU; the same at every call.

    The photograph is scikit-image's cat, Chelsea (CC0, Stefan van der Walt, 300 x 451).
    """
    # The file lies in the wheel. `skimage.data.chelsea()` would read the same one, but it may ask
    # the network when pooch is installed and the file is not as expected.
    photograph = imread(Path(skimage.__file__).parent / "data" / "chelsea.png")
    pixels = torch.from_numpy(photograph).permute(2, 0, 1).float() / 127.5 - 1
    full_height, full_width = pixels.shape[1:]
    crops = []
    for frame in range(frames):
        progress = frame / max(frames - 1, 1)
        zoom = 0.9 - 0.35 * progress  # the part of the photograph that the window covers
        crop_height, crop_width = round(zoom * full_height), round(zoom * full_width)
        top = round((0.1 + 0.3 * progress) * (full_height - crop_height))
        left = round((0.9 - 0.6 * progress) * (full_width - crop_width))
        crop = pixels[:, top : top + crop_height, left : left + crop_width]
        crops.append(interpolate(crop[None], (height, width), mode="bilinear", antialias=True)[0])
    return torch.stack(crops, dim=1)
