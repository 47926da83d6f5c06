"""Images from folders, archives, lists of files and Parquet are the same rows; what is wrong is said with its place."""

import csv
import io
import json
import shutil

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from trainer.data.dataset import prepare_text
from trainer.errors import UserError
from trainer.experiment.load import read_experiment

COUNT = 12


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (COUNT, 6, 6)).astype(np.uint8)


def labels():
    return ["cat" if number % 2 else "dog" for number in range(COUNT)]


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def forms(pixels, tmp_path_factory):
    """The same images in each form, by its name."""
    folder = tmp_path_factory.mktemp("forms")
    files = []
    for number, (array, label) in enumerate(zip(pixels, labels(), strict=True)):
        file = folder / "folders" / label / f"{number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(array))
        files.append(str(file.relative_to(folder)))
    np.savez(folder / "archive.npz", images=pixels, labels=labels())
    np.savez(folder / "floats.npz", images=pixels[..., None] / np.float32(255), labels=labels())
    (folder / "list.jsonl").write_text("".join(json.dumps({"image": file, "label": label}) + "\n"
                                               for file, label in zip(files, labels(), strict=True)))
    with (folder / "list.csv").open("w", newline="") as handle:
        csv.writer(handle).writerows([("image", "label"), *zip(files, labels(), strict=True)])
    datasets.Dataset.from_dict({"image": [{"bytes": png(array), "path": None} for array in pixels], "label": labels()}
                               ).to_parquet(folder / "encoded.parquet")
    return folder


def prepared(write_experiment, path, **data):
    values = {"student": {"architecture": {"model_type": "resnet"}}, "data": {
        "task": "image_classification", "path": str(path), "validation": {"path": str(path), "rows": COUNT},
        "tokenizer": {"train_vocabulary": None}, "images": {"size": 6, "channels": 1}, **data}}
    return prepare_text(read_experiment(write_experiment("run", **values), []).experiment)


@pytest.mark.parametrize("form", ["folders", "archive.npz", "floats.npz", "list.jsonl", "list.csv", "encoded.parquet"])
def test_each_form_gives_the_same_rows(form, forms, pixels, write_experiment):
    text = prepared(write_experiment, forms / form)
    assert text.classes == ("cat", "dog") and len(text.train) == COUNT
    rows = {row["pixel_values"].numpy().tobytes(): int(row["targets"]) for row in map(text.train.__getitem__, range(
        COUNT))}
    expected = {((torch.from_numpy(array)[None].float() / 255 - 0.5) / 0.5).numpy().tobytes(): number % 2 == 0
                for number, array in enumerate(pixels)}
    assert rows == expected


def wrong(folder, name):
    """Data with one mistake."""
    draw = np.random.default_rng(1)
    images = draw.integers(0, 256, (4, 6, 6)).astype(np.uint8)
    if name == "unreadable":
        for label in ("cat", "dog"):
            (folder / name / label).mkdir(parents=True)
            (folder / name / label / "one.png").write_bytes(png(images[0]))
        (folder / name / "dog" / "two.png").write_bytes(b"no image")
        return folder / name
    if name in ("flat", "one class"):
        place = folder / name / ("cat" if name == "one class" else "")
        place.mkdir(parents=True)
        for number, image in enumerate(images):
            (place / f"{number}.png").write_bytes(png(image))
        return folder / name
    contents = {"shape": (draw.random((4, 6, 6, 5)), ["cat", "dog"] * 2), "single": (images, ["cat"] * 4),
                "range": (images.astype(np.float32), ["cat", "dog"] * 2)}[name]
    np.savez(folder / f"{name}.npz", images=contents[0], labels=contents[1])
    return folder / f"{name}.npz"


@pytest.mark.parametrize(("name", "said"), [("unreadable", "two.png cannot be read as an image: it is in no format"),
                                            ("flat", "put those of each class into a folder of its own"),
                                            ("one class", "put the images of at least two classes into a folder each"),
                                            ("shape", "(4, 6, 6, 5)"), ("single", "cat"),
                                            ("range", "between 0 and 1")])
def test_a_mistake_is_said_with_its_place(name, said, tmp_path, write_experiment):
    with pytest.raises(UserError) as caught:
        prepared(write_experiment, wrong(tmp_path, name))
    assert said in caught.value.problem + caught.value.way_out + str(caught.value.value)


def test_pixels_of_more_than_eight_bits_are_no_white_ones(pixels, tmp_path, write_experiment):
    """Pillow makes bytes of 16 bits by cutting off at 255, without a word."""
    deep = pixels.astype(np.uint16) * 257
    for number, (array, label) in enumerate(zip(deep, labels(), strict=True)):
        file = tmp_path / "deep" / label / f"{number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(array))
    assert np.asarray(Image.open(file)).max() > 255
    with pytest.raises(UserError) as caught:
        prepared(write_experiment, tmp_path / "deep")
    assert caught.value.key == "data.image" and "more than 8 bits (Pillow's mode I;16" in caught.value.problem


def test_truth_values_are_black_and_white(pixels, tmp_path, write_experiment):
    np.savez(tmp_path / "masks.npz", images=pixels > 127, labels=labels())
    rows = prepared(write_experiment, tmp_path / "masks.npz").train
    expected = torch.from_numpy((pixels > 127) * 2 - 1).float()
    torch.testing.assert_close(torch.stack([rows[at]["pixel_values"][0] for at in range(COUNT)]), expected)


def test_parts_of_the_data_are_no_classes(forms, tmp_path, write_experiment):
    """A folder with train/ and test/, each with the classes, as many data sets are published."""
    for part in ("train", "test"):
        shutil.copytree(forms / "folders", tmp_path / "parts" / part)
    with pytest.raises(UserError) as caught:
        prepared(write_experiment, tmp_path / "parts")
    assert caught.value.key == "data.path" and "no classes but parts of the data: test, train" in caught.value.problem
    assert f"{tmp_path / 'parts' / 'train'}, and another in data.validation.path" in caught.value.way_out
    text = prepared(write_experiment, tmp_path / "parts" / "train",
                    validation={"path": str(tmp_path / "parts" / "test"), "rows": COUNT})
    assert text.classes == ("cat", "dog")


def test_a_class_that_only_the_held_out_part_has_is_an_error(forms, pixels, tmp_path, write_experiment):
    np.savez(tmp_path / "other.npz", images=pixels[:2], labels=["cat", "fox"])
    with pytest.raises(UserError) as caught:
        prepared(write_experiment, forms / "archive.npz", validation={"path": str(tmp_path / "other.npz"), "rows": 2})
    assert "fox" in caught.value.problem
