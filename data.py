"""Pixels in, pixels out: IDX, CIFAR-10 and .npy files become uint8 tensors, tensors become images.
No pickle is loaded, no download trusted before its checksum; a damaged file is a ValueError."""
import argparse
import contextlib
import gzip
import hashlib
import math
import os
import shutil
import struct
import sys
import tarfile
import time
import urllib.request
import warnings
import zlib
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch


class Dataset(NamedTuple):
    """What a data set is and where it comes from."""
    classes: tuple  # names of the labels 0, 1, ..
    mirrors: tuple  # folders on the web
    files: dict  # split -> ((name, SHA-256 unzipped or CIFAR-10's MD5), ..)
    folders: tuple = ()  # elsewhere, or under --data-dir


def idx_files(*sha256):
    """The four files of data sets like MNIST."""
    names = [f"{split}-{content}-ubyte" for split in ("train", "t10k")
             for content in ("images-idx3", "labels-idx1")]
    files = tuple(zip(names, sha256))
    return {"train": files[:2], "test": files[2:]}


DATASETS = {
    "fashion-mnist": Dataset(
        ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
         "Ankle boot"),
        ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
         "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"),
        idx_files("c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
                  "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
                  "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
                  "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
        ("FashionMNIST/raw", "/usr/share/datasets/fashion-mnist")),
    "mnist": Dataset(
        tuple("0123456789"),
        ("https://ossci-datasets.s3.amazonaws.com/mnist/",
         "https://storage.googleapis.com/cvdf-datasets/mnist/"),
        idx_files("ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
                  "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
                  "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
                  "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
        ("MNIST/raw",)),
    "cifar10": Dataset(
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        ("https://www.cs.toronto.edu/~kriz/",),
        dict.fromkeys(("train", "test"),
                      (("cifar-10-binary.tar", "c32a1d4ab5d03f1284b67883e8d87530"),))),
}
EXCERPT = Path(__file__).parent / "assets"  # a tenth of Fashion-MNIST
TIMEOUT = 5  # seconds that a server may be silent
IDX_TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
RANK = int(os.environ.get("RANK", "0"))  # torchrun says which process this is,
WORLD = int(os.environ.get("WORLD_SIZE", "1"))  # of how many,
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))  # and which on this machine
_printed = [-math.inf]  # when progress last printed
_failed: set = set()  # mirrors not to try again


def load_dataset(name, split="train", root="data"):
    """-> images uint8 (N, C, H, W), labels int64 (N,) in 0..K-1. name is one of DATASETS, an IDX
    file, or an .npy of uint8 (N, H, W), (N, H, W, C) or (N, C, H, W), C = 1 or 3, with its
    `companions`. ValueError says what to do."""
    return load_with_classes(name, split, root)[:2]


def load_with_classes(name, split="train", root="data", only=None):
    """load_dataset's images and labels (of the class `only`), and the names of the K classes."""
    if split not in ("train", "test"):
        raise ValueError(f"split must be train or test, not {split!r}")
    if name in DATASETS:
        images, labels = load_known(name, split, root)
        classes = DATASETS[name].classes
        known = np.arange(len(classes))
    else:
        images, labels, known = load_file(Path(name).expanduser(), split)
        classes = tuple(map(str, known))
    images = as_images(images, f"{name} ({split})")
    good = labels.shape == (len(images),) and labels.dtype.kind in "iubU"
    if not good or not np.isin(labels, known).all():
        raise ValueError(f"{name} ({split}) has {labels.dtype} labels of shape {labels.shape}, not "
                         f"{len(images)} whole numbers or strings in {known[:99].tolist()}")
    labels = torch.from_numpy(np.searchsorted(known, labels))
    if only is not None:
        chosen = labels == find_label(only, classes)
        images, labels = images[chosen], labels[chosen]
    return images, labels, classes


def load_known(name, split, root):
    """Images and labels of one of DATASETS, or of the tenth of Fashion-MNIST in assets/."""
    files = DATASETS[name].files[split]
    if name == "cifar10":
        filename, md5 = files[0]
        return find_file(name, filename, root, partial(read_cifar10, split=split, md5=md5))
    try:
        return [find_file(name, filename, root, partial(read_idx, sha256=sha256))
                for filename, sha256 in files]
    except ValueError:
        excerpt = EXCERPT / "train-images-idx3-ubyte.gz"
        if name != "fashion-mnist" or not excerpt.is_file():
            raise
    progress("using the tenth of Fashion-MNIST in assets/. For all, put four .gz into "
             f"{Path(root, name)}, or: apt install dataset-fashion-mnist")
    return load_file(excerpt, split)[:2]


def load_file(path, split):
    """Images and labels of a file of yours, and the values of its labels."""
    if not companions(path) or not path.is_file():
        raise ValueError(f"no data set {path}: give {', '.join(DATASETS)}, FILE.npy or an IDX file")
    read = read_npy if path.suffix.lower() == ".npy" else read_idx
    labels, test, test_labels = companions(path)
    has_labels, has_test = (file.is_file() and file != path for file in (labels, test))
    known = np.unique(read(labels)) if has_labels else np.zeros(1, np.int64)
    if split == "test" and has_test:
        path, labels = test, test_labels
    elif split == "test":
        progress(f"{path} is its own test split")
    images = read(path)
    return images, read(labels) if has_labels else np.zeros(images.shape[:1], np.int64), known


def companions(path):
    """Beside a data set's file: its labels, its test split, that split's labels."""
    path = Path(path)
    if path.suffix.lower() == ".npy":
        return [path.with_suffix(f".{kind}.npy") for kind in ("labels", "test", "test.labels")]
    if "ubyte" not in path.name and ".idx" not in path.name:
        return []
    tests = (path.with_name(path.name.replace("train", kind)) for kind in ("t10k", "test"))
    test = next(filter(Path.is_file, tests), path)
    labels, test_labels = (file.with_name(
        file.name.replace("images", "labels").replace("idx3", "idx1")) for file in (path, test))
    return [labels, test, test_labels]


def as_images(array, where):
    """An array as (N, C, H, W), not copied. ValueError says what to save instead."""
    shape, ndim = array.shape, array.ndim
    first, last = (ndim == 4 and shape[axis] in (1, 3) for axis in (1, 3))
    for wrong, instead in (
            (array.dtype != np.uint8,
             "x.astype(np.uint8) if in 0..255, (255 * x).round() first if in 0..1"),
            (ndim == 2, "x.reshape(-1, H, W)"),
            (ndim == 3 and (shape[0] == 3 or shape[2] <= 4),
             "x[None] of one colour picture, x[..., None] of grey ones"),
            (first and last, "x.transpose(0, 2, 3, 1) or, if channels are last, (0, 3, 1, 2)"),
            (not (ndim == 3 or first or last) or array.size == 0,
             "(N, H, W), (N, H, W, C) or (N, C, H, W), C = 1 or 3")):
        if wrong:
            raise ValueError(f"{where} has {array.dtype} of shape {shape}: save {instead}")
    if (brightest := array[:1000].max()) < 32:
        progress(f"warning: no pixel of {where} is above {brightest} of 255")
    images = torch.from_numpy(array[:, None] if ndim == 3 else array)
    return images.permute(0, 3, 1, 2) if last else images


def find_label(text, classes):
    """The index of a class, from its name (any case) or, if no name is a number, an index."""
    indices = () if any(map(str.isdecimal, classes)) else map(str, range(len(classes)))
    names = [*classes, *indices, *map(str.lower, classes)]
    found = text if text in names else text.lower()
    if found not in names:
        raise ValueError(f"no label {text!r}: use one of {', '.join(classes[:99])}")
    return names.index(found) % len(classes)


def fingerprint(images, labels):
    """A hash of all labels and of up to 1000 images."""
    some = images[torch.linspace(0, len(images) - 1, min(len(images), 1000)).long()]
    content = some.numpy().tobytes() + labels.numpy().tobytes()
    return hashlib.sha256(f"{tuple(images.shape)}".encode() + content).hexdigest()[:16]


@contextlib.contextmanager
def named_errors(path):
    """Errors become a ValueError about `path`."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: {reason[:200]}") from error


def read_idx(path, sha256=None):
    """An IDX file, gzipped or not -> ndarray; ValueError if damaged. It has two zero bytes, a type,
    the number of dimensions, their sizes and the values, big-endian: sha256 is of that."""
    with named_errors(path), open(path, "rb") as raw:
        file = gzip.GzipFile(fileobj=raw) if raw.peek(2).startswith(b"\x1f\x8b") else raw
        head = file.read(4)
        if head[:2] != b"\0\0" or head[2] not in IDX_TYPES:
            raise ValueError(f"not an IDX file, it starts with {head!r}")
        sizes = file.read(4 * head[3])
        shape, dtype = struct.unpack(f">{head[3]}I", sizes), np.dtype(IDX_TYPES[head[2]])
        size = math.prod(shape) * dtype.itemsize
        possible = min(2**31, 1100 * os.path.getsize(path))  # gzip shrinks by 1032 at best
        if size > possible or len(values := file.read(size + 1)) != size:
            raise ValueError(f"not the {size:,} bytes of its header")
        if sha256 and hashlib.sha256(head + sizes + values).hexdigest() != sha256:
            raise ValueError("wrong checksum (SHA-256)")
        return np.frombuffer(values, dtype).reshape(shape).astype(dtype.newbyteorder("="))


def read_cifar10(path, split="train", md5=None):
    """CIFAR-10's binary archive, not unpacked -> images (N, 3, 32, 32), labels (N,), uint8."""
    names = ["test_batch"] if split == "test" else [f"data_batch_{k}" for k in range(1, 6)]
    with named_errors(path), open(path, "rb") as file:
        if md5 and hashlib.md5(file.read(2**28), usedforsecurity=False).hexdigest() != md5:
            raise ValueError("wrong checksum (MD5)")
        with tarfile.open(path) as archive:
            files = [archive.extractfile(f"cifar-10-batches-bin/{name}.bin") for name in names]
            content = bytearray().join(file.read(2**25) for file in files)
        records = np.frombuffer(content, np.uint8).reshape(-1, 3073)  # label, pixels
        return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def read_npy(path):
    """An .npy array, copied from a map: no header can ask for more than there is."""
    with named_errors(path), open(path, "rb") as file:
        if b"'|O'" in file.read(128):
            raise ValueError("holds objects: images of different sizes? labels not .astype(str)?")
        return np.array(np.lib.format.open_memmap(path, mode="c"))


def find_file(name, filename, root, read):
    """read(path) of a file's first good copy, on the disk or the web."""
    dataset = DATASETS[name]
    folders = [Path(root, folder) for folder in (name, "", *dataset.folders)]
    found = [path for folder in folders for end in (".gz", "")
             for path in folder.glob(filename.replace("-idx", "?idx") + end)]  # some have .idx
    for place in [*found, *(m for m in dataset.mirrors if m not in _failed)]:
        try:
            if place in found:
                return read(place)
            return fetch(f"{place}{filename}.gz", folders[0] / f"{filename}.gz", read)
        except (OSError, ValueError) as error:
            progress(f"not used: {error}")
            _failed.add(place)
    tried = ", ".join(map(str, (*folders, *dataset.mirrors)))
    raise ValueError(f"no good {filename} in {tried}. Put its .gz into {folders[0]}, or "
                     "name its folder with --data-dir")


def fetch(url, path, read):
    """Download url to `path`, if read(file) accepts it -> what that returns."""
    progress(f"downloading {url}")
    with named_errors(url), urllib.request.urlopen(url, timeout=TIMEOUT) as response:
        content = response.read(2**28)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as file:
            file.write(content)
            file.flush()
            return read(file.name)


# ---- What every script needs


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is a ValueError."""

    def __init__(self, description):
        super().__init__(
            description=description, allow_abbrev=False, usage="%(prog)s [flags]",
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, 28))

    def error(self, message):
        raise ValueError(message)

    def section(self, title):
        """-> a function that adds a flag: its default sets its type, and is shown."""
        group = self.add_argument_group(title)

        def flag(name, default, help, **options):
            if default is False:
                options["action"] = "store_true"
            elif "action" not in options:
                types = {int: positive_integer, float: float}
                kind = options.setdefault("type", types.get(type(default), os.path.expanduser))
                names = {int: "N", positive_integer: "N", positive_integers: "N,N", float: "F"}
                options["metavar"] = names.get(kind)
            if type(default) in (int, float, str):
                help += f" (default: {default})"
            group.add_argument(name, default=default, help=help, **options)

        return flag


def positive_integer(text):
    """argparse errors show this name."""
    if not 0 < int(text) < 2**63:
        raise ValueError
    return int(text)


def positive_integers(text):
    """N,N,.. as a tuple."""
    return tuple(map(positive_integer, text.split(",")))


def run_script(main):
    """Run a script's main. What a person can mend is one line, no traceback."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    warnings.filterwarnings("ignore", "Grad strides do not match")  # of 1 x 1 convolutions
    torch.empty(2**25 - 2**16, dtype=torch.uint8)  # freed, it makes glibc reuse memory: faster
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        reason = str(error)
        if isinstance(error, MemoryError) or "allocate " in reason:
            reason = "out of memory: try a smaller --batch-size or network"
        elif type(error).__module__.startswith("torch._"):
            reason = f"--compile does not work here: {reason.splitlines()[0]}"
        elif isinstance(error, RuntimeError):
            raise
        sys.exit(f"{os.path.basename(sys.argv[0])}: {reason}")
    finally:
        if WORLD > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def progress(text, passing=False):
    """Print a line, in process 0. If passing, the next replaces it in a terminal; a log gets one
    every ten seconds."""
    terminal = bool(sys.stdout) and sys.stdout.isatty()
    if RANK == 0 and (not passing or time.monotonic() > _printed[0] + (0.1 if terminal else 10)):
        _printed[0] = time.monotonic()
        end = "\r" if terminal and passing else "\n"
        with contextlib.suppress(OSError):  # nobody reads it
            print(text, end="\033[K" * terminal + end, flush=True)


@contextlib.contextmanager
def atomic(path):
    """A file to write to. It gets its name when all is written, and not before."""
    target = os.path.realpath(path)  # a link stays a link
    part = f"{target}.{os.getpid()}.part"
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except RuntimeError as error:  # of torch.save, for a full disk or Ctrl-C
        raise error.__context__ or error
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        Path(part).unlink(missing_ok=True)


def keep_older(path):
    """Keep what will be replaced: as FILE.old, FILE.old2, .."""
    k = 1
    while os.path.exists(kept := f"{path}.old{k if k > 1 else ''}"):
        k += 1
    with atomic(kept) as file:
        shutil.copy2(path, file.name)
    progress(f"older {path} is now {kept}")


def check_outputs(outputs, inputs):
    """ValueError for a file that cannot be written or is used twice."""
    def files(path):  # A.png and a.png may be one
        return {os.path.realpath(file).casefold() for file in (path, *companions(path))}

    taken = set().union(*map(files, filter(None, inputs)))
    for path in filter(None, outputs):
        if files(path) & taken:
            raise ValueError(f"{path} (or its labels) is used twice")
        taken |= files(path)
        folder = os.path.dirname(os.path.realpath(path))
        if not os.access(folder, os.W_OK) or (os.path.exists(path) and not os.path.isfile(path)):
            raise ValueError(f"{path} cannot be written: no folder, no permission, or not a file")


def check_suffix(path, allowed):
    """A file's suffix in small letters. ValueError if it is not one of `allowed`."""
    suffix = Path(path).suffix.lower()
    if suffix not in allowed:
        raise ValueError(f"{path} must end in {' or '.join(allowed)}")
    return suffix


def to_model(images):
    """uint8 0..255 -> float32 in [-1, 1], linearly (Section 3.3)."""
    return images.float() / 127.5 - 1


def to_pixels(x):
    """float in [-1, 1] -> uint8, by rounding: truncation would change 63 of 256 grey levels."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).byte()


def grid(images, columns=None, zoom=1, gap=2):
    """Images (N, C, H, W) -> one picture (h, w, C) uint8, `gap` white pixels apart."""
    if (N := len(images)) == 0:
        raise ValueError("no images to draw")
    images = images if images.dtype == torch.uint8 else to_pixels(images)
    cells = images.cpu().permute(0, 2, 3, 1).numpy().repeat(zoom, 1).repeat(zoom, 2)
    columns = min(columns or math.ceil(math.sqrt(N)), N)
    white = ((0, -N % columns), (0, gap), (0, gap), (0, 0))
    cells = np.pad(cells, white, constant_values=255 if gap else 0)
    _, h, w, C = cells.shape
    picture = cells.reshape(-1, columns, h, w, C).swapaxes(1, 2).reshape(-1, columns * w, C)
    return picture[:len(picture) - gap, :columns * w - gap]


def save_image(path, images, columns=None, zoom=1, gap=2):
    """Images (N, C, H, W), uint8 or float in [-1, 1], as a grid: .pgm if C = 1, .ppm or .png if
    C = 1 or 3, or else ValueError."""
    suffix = check_suffix(path, (".pgm", ".ppm", ".png"))
    picture = grid(images, columns, zoom, gap)
    H, W, C = picture.shape
    if C not in (1, 3) or (suffix == ".pgm" and C == 3):
        raise ValueError(f"{path} cannot have {C} channels")
    kind, pixels = ("P6", picture.repeat(3 // C, 2)) if suffix == ".ppm" else ("P5", picture)
    parts = (f"{kind}\n{W} {H}\n255\n".encode(), pixels.tobytes())
    with atomic(path) as file:
        file.writelines(png([picture]) if suffix == ".png" else parts)


def save_movie(path, frames, columns=None, zoom=1):
    """Frames, each (N, C, H, W), as an animated .png of 6 seconds, the last 2 the final frame."""
    with atomic(path) as file:
        file.writelines(png([grid(frame, columns, zoom) for frame in frames]))


def png(pictures):
    """Pictures (H, W, 1 or 3) uint8 -> the chunks of a PNG; several make an animation (APNG)."""
    def chunk(kind, layout, *numbers, data=b""):
        body = kind + struct.pack(">" + layout, *numbers) + data
        return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))

    N, (H, W, C) = len(pictures), pictures[0].shape
    yield b"\x89PNG\r\n\x1a\n"
    yield chunk(b"IHDR", "2I5B", W, H, 8, 0 if C == 1 else 2, 0, 0, 0)
    if N > 1:
        yield chunk(b"acTL", "2I", N, 0)  # 0: for ever
    for k, picture in enumerate(pictures):
        rows = np.pad(picture.reshape(H, -1), ((0, 0), (1, 0)))  # filter 0 before each row
        data = zlib.compress(rows.tobytes(), 9)
        if N > 1:
            wait = round(4000 / N + 2000 * (k == N - 1))  # milliseconds
            yield chunk(b"fcTL", "5I2H2B", max(2 * k - 1, 0), W, H, 0, 0, wait, 1000, 0, 0)
        yield chunk(b"fdAT", "I", 2 * k, data=data) if k else chunk(b"IDAT", "", data=data)
    yield chunk(b"IEND", "")