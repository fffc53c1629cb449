"""Photographs: the colour pictures that scikit-image and scikit-learn carry in their packages.

Eleven real pictures without a download: enough to look at reconstructions and to try any size, not to
train on. They stay in the installed packages, under the licences stated there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from illume_lightning.data.image import Dropped, canonical
from illume_lightning.data.part import Lost, Sample
from illume_lightning.data.store import Manifest
from illume_lightning.data.writer import write_stores


@dataclass(frozen=True)
class Photograph:
    """A picture: the package and file it is in, and a caption."""

    package: str
    file: str
    caption: str

    @property
    def name(self) -> str:
        """The file's name without its suffix."""
        return Path(self.file).stem


PHOTOGRAPHS = (
    Photograph("skimage", "data/astronaut.png", "a portrait of a smiling astronaut in an orange suit"),
    Photograph("skimage", "data/chelsea.png", "a close-up of the face of a tabby cat"),
    Photograph("skimage", "data/coffee.png", "a cup of coffee on a saucer with a spoon"),
    Photograph("skimage", "data/hubble_deep_field.jpg", "many distant galaxies in a black sky"),
    Photograph("skimage", "data/ihc.png", "stained tissue under a microscope, brown and blue"),
    Photograph("skimage", "data/motorcycle_left.png", "a motorcycle in a garage, from the left eye"),
    Photograph("skimage", "data/motorcycle_right.png", "a motorcycle in a garage, from the right eye"),
    Photograph("skimage", "data/retina.jpg", "the retina of an eye with its blood vessels"),
    Photograph("skimage", "data/rocket.jpg", "a rocket on a launch pad at dusk"),
    Photograph("sklearn", "datasets/images/china.jpg", "a Chinese temple with a tiled roof"),
    Photograph("sklearn", "datasets/images/flower.jpg", "an orange flower in front of dark green leaves"),
)
HELD_OUT = frozenset({"chelsea", "coffee", "china"})
"""Names of the pictures of the split "val". The two motorcycles show one scene, so they stay together."""


def prepare_photographs(output: str | Path, *, overwrite: bool = False) -> dict[str, Manifest]:
    """Write the photographs to `<output>/train` (8) and `<output>/val` (3).

    Args:
        output: The folder to make.
        overwrite: Replace stores that were made with other options.

    Returns:
        The manifests, by split.

    Raises:
        ModuleNotFoundError: If scikit-image or scikit-learn is not installed.
        ValueError: If `output` holds something else.
    """
    identity = {"kind": "photographs", "names": [photograph.name for photograph in PHOTOGRAPHS]}
    part = PhotographsPart(PHOTOGRAPHS)
    part.folders()
    return write_stores(output, identity, lambda: [part], splits=("train", "val"), overwrite=overwrite)


@dataclass(frozen=True)
class PhotographsPart:
    """Some of the photographs."""

    photographs: tuple[Photograph, ...]

    @property
    def num_items(self) -> int:
        """Number of photographs."""
        return len(self.photographs)

    def folders(self) -> dict[str, Path]:
        """Where the packages are, without importing them.

        Raises:
            ModuleNotFoundError: If one is not installed.
        """
        found = {}
        for package in {photograph.package for photograph in self.photographs}:
            spec = find_spec(package)
            if spec is None or not spec.submodule_search_locations:
                raise ModuleNotFoundError(
                    f"the photographs are in the package '{package}': pip install scikit-image scikit-learn"
                )
            found[package] = Path(spec.submodule_search_locations[0])
        return found

    def read(self) -> Iterator[Sample | Lost]:
        """Read the photographs."""
        folders = self.folders()
        for photograph in self.photographs:
            split = "val" if photograph.name in HELD_OUT else "train"
            path = folders[photograph.package] / photograph.file
            image = (
                canonical(path.read_bytes()) if path.is_file() else Dropped("not in the installed package")
            )
            if isinstance(image, Dropped):
                yield Lost(photograph.name, image.reason, split)
                continue
            yield Sample(
                photograph.name,
                image.data,
                photograph.caption,
                "{}",
                image.height,
                image.width,
                image.converted,
                split,
            )
