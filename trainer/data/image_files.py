"""Images of a data set: from folders of classes, NumPy archives, or records, decoded and scaled to one size."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from trainer.errors import UserError
from trainer.experiment.data_nodes import Data
from trainer.experiment.task_nodes import Images

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing")  # usual names of parts of data
VERSION = "limbeck file version"  # field of records of files: size and time of the file, so that caches notice changes
MOST_PIXELS = 64 * 2**20  # of one image: what Pillow warns of as a decompression bomb begins at 85 million


def has_pillow() -> bool:
    """Whether files of images can be read."""
    return find_spec("PIL") is not None


def image_records(data: Data, path: str, key: str) -> datasets.Dataset | None:
    """The records of a folder with one folder for each class, or of an .npz archive; None for other data.

    An archive has `images` (n, height, width) or (n, height, width, channels), of bytes, or of floats between 0 and 1,
    and `labels` (n,): numbers or names. Its fields are named by `data.image` and `data.label`.

    Raises:
        UserError: the archive lacks an array, or they are of the wrong shape; the folders are parts of the data.
    """
    place = Path(path)
    if place.suffix == ".npz" and place.is_file():
        return _of_archive(data, place, key)
    if not place.is_dir():
        return None
    folders = sorted(one for one in place.iterdir() if one.is_dir() and not one.name.startswith("."))
    found = [(file, folder.name) for folder in folders for file in sorted(folder.rglob("*"))
             if file.suffix.lower() in ENDINGS and file.is_file()]
    if not found:
        return None
    if len(folders) > 1 and all(folder.name.lower() in SPLITS for folder in folders):
        own = next((folder for folder in folders if folder.name.lower() == "train"), folders[0])
        other = next(folder for folder in folders if folder != own)
        raise UserError(key, "its folders are no classes but parts of the data: "
                        + ", ".join(one.name for one in folders), value=path,
                        way_out=f"name one in data.path: {own}, and another in data.validation.path: {other}")
    return datasets.Dataset.from_dict({
        data.image: [str(file) for file, _ in found], data.label: [name for _, name in found],
        VERSION: [f"{file.stat().st_size} {file.stat().st_mtime_ns}" for file, _ in found]})


def _of_archive(data: Data, file: Path, key: str) -> datasets.Dataset:
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(key, f"{file} is no archive of NumPy arrays: {error}", value=str(file),
                        way_out="write it with numpy.savez(file, images=..., labels=...)") from error
    names = {"image": "images" if data.image == "image" and "image" not in arrays else data.image,
             "label": "labels" if data.label == "label" and "label" not in arrays else data.label}
    for own, name in names.items():
        if name not in arrays:
            raise UserError(f"data.{own}", f"{file} has no array of this name", value=name,
                            way_out=f"its arrays are {', '.join(arrays) or 'none'}")
    images, labels = arrays[names["image"]], arrays[names["label"]]
    if images.ndim not in (3, 4) or labels.shape != images.shape[:1] or (images.ndim == 4 and images.shape[3] not in (
            1, 3)):
        raise UserError("data.image", f"{file} has images of shape {images.shape} and labels of shape {labels.shape}",
                        value=names["image"], way_out="write images (n, height, width) or (n, height, width, channels) "
                        "and labels (n,)")
    if labels.dtype.kind not in "iuU":
        raise UserError("data.label", f"{file} has labels of type {labels.dtype}", value=names["label"],
                        way_out="write whole numbers or names")
    stat = file.stat()
    return datasets.Dataset.from_dict({
        data.image: [f"{file}#{number}" for number in range(len(images))], data.label: labels.tolist(),
        VERSION: [f"{stat.st_size} {stat.st_mtime_ns}"] * len(images)})


class ImageReader:
    """Decodes the image of a record and scales it: (channels, size, size) bytes.

    Args:
        data: the data node.
        folder: where relative paths of records begin.
    """

    def __init__(self, data: Data, folder: Path) -> None:
        self.data, self.images, self.folder = data, data.images, folder
        self._archives: dict[str, np.ndarray] = {}

    def __call__(self, record: dict[str, Any], number: int) -> np.ndarray:
        """The image of a record; `number` is for messages.

        Raises:
            UserError: it cannot be read, or has another shape.
        """
        value = record[self.data.image]
        where = value if isinstance(value, str) else f"record {number + 1}"
        try:
            return self._scaled(value, self.images)
        except UserError:
            raise
        except Exception as error:  # decoders raise all kinds of errors for damaged files
            said = (str(error).splitlines() or [type(error).__name__])[0][:200]
            said = "it is in no format that Pillow knows" if "cannot identify image file" in said else said
            raise UserError("data.image", f"{where} cannot be read as an image: {said}", value=self.data.image,
                            way_out="mend or remove it") from error

    def _scaled(self, value: Any, images: Images) -> np.ndarray:
        if isinstance(value, str) and "#" in value and value.partition("#")[0].endswith(".npz"):
            file, _, number = value.rpartition("#")
            return fitted(self._archive(file)[int(number)], images)
        if isinstance(value, str):
            file = Path(value) if Path(value).is_absolute() else self.folder / value
            if not file.is_file():
                file = Path(value)
            return self._decoded(file.read_bytes(), images)
        if isinstance(value, dict):
            content = value.get("bytes")
            return self._decoded(Path(value["path"]).read_bytes() if content is None else content, images)
        if isinstance(value, bytes):
            return self._decoded(value, images)
        if hasattr(value, "convert"):  # an image that `datasets` has decoded
            return _of_pillow(value, images)
        if value is None:
            raise ValueError("there is none")
        return fitted(np.asarray(value), images)

    def _archive(self, file: str) -> np.ndarray:
        if file not in self._archives:
            with np.load(file, allow_pickle=False) as archive:
                name = self.data.image if self.data.image in archive.files else "images"
                self._archives[file] = archive[name]
        return self._archives[file]

    def _decoded(self, content: bytes, images: Images) -> np.ndarray:
        if not has_pillow():
            raise UserError("data.image", "files of images are read by Pillow, which is not installed",
                            value=self.data.image, way_out="pip install 'limbeck[vision]'")
        from PIL import Image

        with Image.open(io.BytesIO(content)) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"it has {image.width:,} x {image.height:,} pixels, over {MOST_PIXELS:,}")
            return _of_pillow(image, images)


def _of_pillow(image: Any, images: Images) -> np.ndarray:
    from PIL import Image

    if image.mode.startswith(("I", "F")):  # converted, all values above 255 would become white
        raise ValueError(f"its pixels have more than 8 bits (Pillow's mode {image.mode}): scale them to bytes, or "
                         "write floats between 0 and 1 into an .npz archive")
    image = image.convert("RGB" if images.channels == 3 else "L")
    if image.size != (images.size, images.size):
        image = image.resize((images.size, images.size), Image.Resampling.BILINEAR)
    array = np.asarray(image, np.uint8)
    return array.transpose(2, 0, 1) if images.channels == 3 else array[None]


def fitted(array: np.ndarray, images: Images) -> np.ndarray:
    """An array (height, width) or (height, width, channels) as (channels, size, size) bytes.

    Floats are taken for values between 0 and 1, and so are truth values. Channels first, (channels, height, width), are
    accepted, too.

    Raises:
        ValueError: it has another shape, or values out of range.
    """
    if array.ndim == 3 and array.shape[2] not in (1, 3) and array.shape[0] in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3)) or not all(array.shape):
        raise ValueError(f"an image is (height, width) or (height, width, channels), not {array.shape}")
    if array.dtype.kind in "fb":
        array = array.astype(np.float32) if array.dtype.kind == "b" else array
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise ValueError(f"floats are between 0 and 1, and these from {array.min():.4g} to {array.max():.4g}: "
                             "divide by the largest value of all images")
        array = np.rint(array * 255)
    elif array.size and (array.min() < 0 or array.max() > 255):
        raise ValueError(f"whole numbers are bytes, and these from {array.min()} to {array.max()}")
    array = array.astype(np.uint8)
    array = array[:, :, None] if array.ndim == 2 else array
    if array.shape[2] != images.channels:
        array = np.repeat(array, 3, 2) if images.channels == 3 else np.rint(
            array.astype(np.float32) @ np.asarray([0.299, 0.587, 0.114], np.float32))[:, :, None].astype(np.uint8)
    if array.shape[:2] != (images.size, images.size):
        array = _resized(array, images.size)
    return np.ascontiguousarray(array.transpose(2, 0, 1))


def _resized(array: np.ndarray, size: int) -> np.ndarray:
    """Scaled by bilinear interpolation, with antialiasing where it becomes smaller."""
    import torch

    pixels = torch.from_numpy(array.transpose(2, 0, 1).copy())[None].float()
    scaled = torch.nn.functional.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
    return scaled[0].round().clamp(0, 255).to(torch.uint8).numpy().transpose(1, 2, 0)


class ImageProcessing:
    """What is saved with a classifier of images, so that transformers prepares images as in training."""

    def __init__(self, images: Images) -> None:
        self.images = images

    @property
    def settings(self) -> dict[str, Any]:
        """As in `preprocessor_config.json`."""
        size, channels = self.images.size, self.images.channels
        every: Callable[[tuple[float, ...]], list[float]] = lambda values: list(  # noqa: E731
            values * (channels if len(values) == 1 else 1))
        return {"image_processor_type": "ViTImageProcessor", "do_resize": True,
                "size": {"height": size, "width": size}, "resample": 2, "do_rescale": True, "rescale_factor": 1 / 255,
                "do_normalize": True, "image_mean": every(self.images.mean), "image_std": every(self.images.std),
                "do_convert_rgb": True if channels == 3 else None}

    def save_pretrained(self, folder: Any) -> None:
        """Write `preprocessor_config.json`."""
        import json

        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(self.settings, indent=2) + "\n")
