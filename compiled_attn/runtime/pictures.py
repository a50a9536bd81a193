"""A picture file as the input of an image model of the zoo."""

from __future__ import annotations

from pathlib import Path

import torch

from compiled_attn.ir.errors import CompiledAttnError

# Mean and standard deviation of ImageNet's pictures by channel, in 0..1: what DeiT and its kin are trained with.
IMAGENET_MEAN: tuple[float, ...] = (0.485, 0.456, 0.406)
IMAGENET_STD: tuple[float, ...] = (0.229, 0.224, 0.225)
CROP = 224 / 256  # share of the shorter side that the reference's evaluation keeps
# What the carried weights for scikit-learn's digits are trained with (bench/train_digits.py).
DIGITS_MEAN: tuple[float, ...] = (0.3,)
DIGITS_STD: tuple[float, ...] = (0.38,)


def read_picture(path: str | Path, size: int, channels: int = 3) -> torch.Tensor:
    """The picture as float32 [1, channels, size, size], normalised as the models were trained.

    channels 3: the shorter side becomes size / 0.875 bicubically, the centre is cut out, ImageNet's mean and deviation.
    channels 1: grey, the whole picture resized bicubically, bright strokes on black as in scikit-learn's digits.
    Raises CompiledAttnError where pillow is missing or the file is no picture.
    """
    picture = _opened(Path(path), "RGB" if channels == 3 else "L")
    if channels == 3:
        width, height = picture.size
        scale = size / CROP / min(width, height)
        resized = picture.resize((max(size, round(width * scale)), max(size, round(height * scale))), 3)
        left, top = (resized.size[0] - size) // 2, (resized.size[1] - size) // 2
        cut, mean, std = resized.crop((left, top, left + size, top + size)), IMAGENET_MEAN, IMAGENET_STD
    else:
        cut, mean, std = picture.resize((size, size), 3), DIGITS_MEAN, DIGITS_STD
    values = torch.frombuffer(bytearray(cut.tobytes()), dtype=torch.uint8).reshape(size, size, channels)
    values = values.permute(2, 0, 1).float() / 255
    return ((values - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])[None]


def _opened(path: Path, mode: str):  # type: ignore[no-untyped-def]
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise CompiledAttnError(
            "reading pictures needs pillow",
            where=str(path),
            facts="it is not installed; compiled_attn itself does without",
            do="pip install pillow",
        ) from None
    try:
        with Image.open(path) as picture:
            return picture.convert(mode)
    except (OSError, UnidentifiedImageError) as error:
        raise CompiledAttnError(
            "the picture can not be read",
            where=str(path),
            facts=f"{type(error).__name__}: {error}",
            do="give a JPEG, PNG or other file that pillow reads",
        ) from None
