"""Loaders and splits: deterministic, disjoint, right pixel for pixel on pictures made here."""

import io
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedattack.data import DATASETS, ImageData, Splits, load_dataset, split_one, split_train_test
from fedattack.data.named import default_root
from fedattack.data.resize import fit
from fedattack.errors import FedattackError, MissingDependency, UnknownName
from fedattack.registry import DATASETS as REGISTRY

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def numbered(count: int, channels: int = 3, height: int = 7, width: int = 5, users: int | None = None) -> ImageData:
    """Image i is i everywhere, so a pixel says which one it is."""
    values = torch.arange(count, dtype=torch.uint8).reshape(-1, 1, 1, 1)
    ids = None if users is None else torch.arange(count) % users
    return ImageData(
        values.repeat(1, channels, height, width), torch.arange(count) % 2, ("even", "odd"), ids, "numbered"
    )


def which(data: ImageData) -> list[int]:
    return data.pixels[:, 0, 0, 0].tolist()


def rows(splits: Splits) -> list[int]:
    return which(splits.private) + which(splits.public) + which(splits.test)


def write_npz(path: Path, **arrays: object) -> str:
    np.savez(path, **arrays)
    return str(path)


# ------------------------------------------------------------------------------------------------ ImageData, splits
def test_images_are_pixels_over_255():
    data = numbered(6)
    assert data.image_shape == (3, 7, 5)
    assert torch.equal(data.images([5, 1])[:, 0, 0, 0], torch.tensor([5, 1]) / 255)
    assert data.images(dtype=torch.float64).dtype == torch.float64
    assert data.images().max() <= 1.0


def test_subset_keeps_rows_together():
    part = numbered(10, users=5).subset([7, 2])
    assert (which(part), part.labels.tolist(), part.users.tolist()) == ([7, 2], [1, 0], [2, 2])


@pytest.mark.parametrize(
    ("pixels", "labels"),
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8)),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 2])),
    ],
)
def test_malformed_image_data_is_refused(pixels, labels):
    with pytest.raises(FedattackError, match="must be"):
        ImageData(pixels, labels, ("a", "b"))


def test_split_is_a_partition_of_the_set_and_a_function_of_the_seed():
    data = numbered(50)
    splits = split_one(data, seed=3, public_fraction=0.3, test_fraction=0.1)
    assert [len(splits.private), len(splits.public), len(splits.test)] == [30, 15, 5]
    assert sorted(rows(splits)) == list(range(50))
    assert rows(splits) == rows(split_one(data, seed=3, public_fraction=0.3, test_fraction=0.1))
    assert rows(splits) != rows(split_one(data, seed=4, public_fraction=0.3, test_fraction=0.1))


def test_split_by_user_leaves_no_user_in_two_parts():
    splits = split_one(numbered(60, users=12), seed=0, public_fraction=0.25, test_fraction=0.25, by_user=True)
    users = [set(part.users.tolist()) for part in (splits.private, splits.public, splits.test)]
    assert [len(u) for u in users] == [6, 3, 3]
    assert set.union(*users) == set(range(12))
    assert sorted(rows(splits)) == list(range(60))


def test_split_train_test_leaves_test_alone():
    train, test = numbered(20), numbered(5)
    splits = split_train_test(train, test, seed=0, public_fraction=0.5)
    assert splits.test is test
    assert sorted(which(splits.private) + which(splits.public)) == list(range(20))


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (-0.1, 0.2), (0.2, 1.0)])
def test_impossible_fractions_are_refused(fractions):
    with pytest.raises(FedattackError, match="fraction"):
        split_one(numbered(10), seed=0, public_fraction=fractions[0], test_fraction=fractions[1])


# ------------------------------------------------------------------------------------------------ resizing
def test_whole_number_shrinking_is_the_area_average():
    pixels = torch.tensor([[0, 10, 100, 200], [20, 30, 100, 200]], dtype=torch.uint8).reshape(1, 1, 2, 4)
    assert fit(pixels, (1, 2)).flatten().tolist() == [15, 150]


def test_centre_crop_keeps_the_aspect_ratio():
    row = torch.arange(6, dtype=torch.uint8).repeat(2, 1).reshape(1, 1, 2, 6)
    assert fit(row, 2)[0, 0, 0].tolist() == [2, 3]


@pytest.mark.parametrize("size", [1, 3, 4, 9, (7, 5), (5, 7)])
def test_resizing_a_constant_keeps_it(size):
    out = fit(torch.full((3, 2, 7, 5), 77, dtype=torch.uint8), size)
    assert out.dtype == torch.uint8
    assert out.shape[-2:] == ((size, size) if isinstance(size, int) else size)
    assert (out == 77).all()


@pytest.mark.parametrize("size", [0, (3,), (3, -1), "32"])
def test_bad_sizes_are_refused(size):
    with pytest.raises(FedattackError, match="image_size"):
        fit(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), size)


# ------------------------------------------------------------------------------------------------ names
def test_every_name_of_the_table_can_be_looked_up():
    assert sorted(DATASETS) == sorted(name for name in REGISTRY.names() if name in DATASETS)
    for name in DATASETS:
        assert callable(REGISTRY.get(name))
        assert REGISTRY.summary(name)


def test_typos_get_the_closest_name():
    with pytest.raises(UnknownName, match="did you mean 'patches'"):
        load_dataset("patchs")
    with pytest.raises(FedattackError, match=r"image_sise.*did you mean 'image_size'"):
        load_dataset("patches", image_sise=32)
    with pytest.raises(FedattackError, match="'path' must be given"):
        load_dataset("npz")
    with pytest.raises(FedattackError, match="given once"):
        load_dataset("npz:a.npz", path="b.npz")


def test_a_loader_of_the_users_own_is_found_and_checked():
    with pytest.raises(FedattackError, match=r"must be fedattack\.data\.Splits, got 'NoneType'"):
        load_dataset("fedattack.data.splitting:check_fractions", public_fraction=0.1, test_fraction=0.1)
    with pytest.raises(UnknownName, match="cannot be imported"):
        load_dataset("no_such_module:loader")


# ------------------------------------------------------------------------------------------------ patches
@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_patches(size):
    splits = load_dataset("patches", image_size=size)
    again = load_dataset("patches", image_size=size)
    assert splits.image_shape == (3, size, size)
    assert splits.num_classes == 8
    for part in ("private", "public", "test"):
        assert torch.equal(getattr(splits, part).pixels, getattr(again, part).pixels)
    together = torch.cat([splits.private.labels, splits.public.labels, splits.test.labels])
    counts = torch.bincount(together, minlength=8)
    assert counts.max() <= 120
    assert counts.min() >= 20
    assert (splits.private.images().mean(1).flatten(1).std(1, correction=0) >= 0.03).all()


def test_patches_are_pieces_of_the_photograph_and_do_not_overlap():
    from skimage.data import astronaut

    splits = load_dataset("patches", image_size=32, max_per_picture=1000)
    parts = [part.pixels[part.labels == 0] for part in (splits.private, splits.public, splits.test)]
    cut = {patch.permute(1, 2, 0).numpy().tobytes() for patch in torch.cat(parts)}
    picture = astronaut()
    grid = [picture[r : r + 32, c : c + 32].tobytes() for r in range(0, 512, 32) for c in range(0, 512, 32)]
    assert len(cut) == sum(len(part) for part in parts)
    assert cut <= set(grid)


def test_another_seed_gives_another_split():
    first, second = (load_dataset("patches", image_size=64, seed=seed).private.pixels for seed in (0, 1))
    assert not torch.equal(first, second)


# ------------------------------------------------------------------------------------------------ npz
def hwc(count: int, height: int = 7, width: int = 5) -> np.ndarray:
    return numbered(count, 3, height, width).pixels.permute(0, 2, 3, 1).numpy()


def test_npz_with_a_test_part(tmp_path):
    path = write_npz(
        tmp_path / "set.npz",
        x_train=hwc(20),
        y_train=np.arange(20, dtype=np.uint8) % 2,
        x_test=hwc(6),
        y_test=np.arange(6, dtype=np.uint8) % 2,
        class_names=np.array(["even", "odd", "never"]),
    )
    splits = load_dataset(f"npz:{path}", public_fraction=0.25)
    assert [len(splits.private), len(splits.public), len(splits.test)] == [15, 5, 6]
    assert splits.image_shape == (3, 7, 5)
    assert splits.private.class_names == ("even", "odd", "never")
    for part in (splits.private, splits.public, splits.test):
        assert part.labels.tolist() == [i % 2 for i in which(part)]
    assert sorted(which(splits.private) + which(splits.public)) == list(range(20))
    assert len(load_dataset("npz", path=path, limit=4).test) == 4
    assert load_dataset("npz", path=path, image_size=4).image_shape == (3, 4, 4)


def test_npz_grey_without_labels(tmp_path):
    path = write_npz(tmp_path / "grey.npz", x=hwc(10)[..., 0])
    splits = load_dataset(f"npz:{path}")
    assert splits.image_shape == (1, 7, 5)
    assert splits.private.class_names == ("all",)


def test_npz_values_that_only_one_part_has_are_numbered_alike(tmp_path):
    y_train, y_test = np.array([5, 9, 5, 9]), np.array([9, 12])
    path = write_npz(tmp_path / "odd.npz", x_train=hwc(4), y_train=y_train, x_test=hwc(2), y_test=y_test)
    splits = load_dataset(f"npz:{path}", public_fraction=0.0)
    assert splits.private.class_names == ("y-5", "y-9", "y-12")
    assert (splits.private.labels.tolist(), splits.test.labels.tolist()) == ([0, 1, 0, 1], [1, 2])


def test_npz_people(tmp_path):
    identity, male = np.arange(12, dtype=np.int32) % 4 * 10, np.arange(12, dtype=np.uint8) % 2
    path = write_npz(tmp_path / "people.npz", x=hwc(12), identity=identity, male=male)
    by_identity = load_dataset(f"npz:{path}", by_user=True, public_fraction=0.25, test_fraction=0.25)
    assert by_identity.private.class_names == ("identity-0", "identity-10", "identity-20", "identity-30")
    assert set(by_identity.private.users.tolist()).isdisjoint(by_identity.public.users.tolist())
    by_gender = load_dataset(f"npz:{path}", label="male")
    assert by_gender.private.labels.tolist() == [i % 2 for i in which(by_gender.private)]
    with pytest.raises(FedattackError, match="did you mean 'male'"):
        load_dataset(f"npz:{path}", label="mael")


def test_npz_jpegs(tmp_path):
    from PIL import Image

    blobs = []
    for grey in range(0, 250, 25):
        buffer = io.BytesIO()
        Image.new("RGB", (89, 109), (grey, grey, grey)).save(buffer, "JPEG", quality=95)
        blobs.append(buffer.getvalue())
    path = write_npz(
        tmp_path / "faces.npz",
        jpeg=np.frombuffer(b"".join(blobs), dtype=np.uint8),
        offset=np.cumsum([0, *map(len, blobs)]),
        identity=np.arange(10, dtype=np.int32) // 2,
        attributes=np.stack([np.arange(10) % 2, np.arange(10) < 5], axis=1).astype(np.uint8),
        attribute_names=np.array(["Male", "Young"]),
    )
    splits = load_dataset(f"npz:{path}", image_size=8)
    assert splits.image_shape == (3, 8, 8)
    assert splits.private.class_names == ("not Male", "Male")
    found = (splits.private.pixels[:, 0, 0, 0].float() / 25).round().long()
    assert splits.private.labels.tolist() == (found % 2).tolist()
    assert splits.private.users.tolist() == (found // 2).tolist()
    assert load_dataset(f"npz:{path}").image_shape == (3, 74, 74)
    young = load_dataset(f"npz:{path}", label="Young", limit=5)
    assert len(young.private) + len(young.public) + len(young.test) == 5
    with pytest.raises(FedattackError, match="did you mean 'Male'"):
        load_dataset(f"npz:{path}", label="Mail")


def test_npz_errors(tmp_path):
    with pytest.raises(MissingDependency, match=r"existing \.npz"):
        load_dataset(f"npz:{tmp_path / 'none.npz'}")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(FedattackError, match="cannot be read"):
        load_dataset(f"npz:{tmp_path / 'text.npz'}")
    with pytest.raises(FedattackError, match=r"keys of nothing\.npz"):
        load_dataset("npz:" + write_npz(tmp_path / "nothing.npz", z=np.zeros(3)))
    with pytest.raises(FedattackError, match="missing x_test"):
        load_dataset("npz:" + write_npz(tmp_path / "half.npz", x_train=hwc(4), y_train=np.zeros(4, dtype=int)))
    with pytest.raises(FedattackError, match="uint8"):
        load_dataset("npz:" + write_npz(tmp_path / "float.npz", x=np.zeros((4, 3, 3))))
    with pytest.raises(FedattackError, match="shape"):
        load_dataset("npz:" + write_npz(tmp_path / "short.npz", x=hwc(4), y=np.zeros(3, dtype=int)))
    with pytest.raises(FedattackError, match="pickle"):
        load_dataset("npz:" + write_npz(tmp_path / "object.npz", x=hwc(2), y=np.array([{}, {}], dtype=object)))


@pytest.mark.parametrize(
    ("file", "parameters", "shape", "num_classes"),
    [
        ("cifar10_subset.npz", {"limit": 50}, (3, 32, 32), 10),
        ("fashion_mnist_subset.npz", {"limit": 50}, (1, 28, 28), 10),
        ("natural64.npz", {"limit": 50, "image_size": 32}, (3, 32, 32), 10),
        ("lfw64.npz", {"by_user": True}, (3, 64, 64), 158),
        ("celeba10k_jpeg.npz", {"limit": 50, "image_size": 64}, (3, 64, 64), 2),
    ],
)
def test_the_shared_sets(file, parameters, shape, num_classes):
    if not (SHARED / file).is_file():
        pytest.skip(f"{file} is not in shared/data beside the checkout")
    splits = load_dataset(f"npz:{SHARED / file}", **parameters)
    assert (splits.image_shape, splits.num_classes) == (shape, num_classes)
    assert 0.1 < splits.private.images().mean() < 0.9


# ------------------------------------------------------------------------------------------------ folders
def test_folder_of_labelled_pictures(tmp_path):
    from PIL import Image

    for label in ("b", "a"):
        (tmp_path / label).mkdir()
        for i in range(5):
            grey = (100 if label == "b" else 0) + i
            Image.new("RGB", (5, 7), (grey, grey, grey)).save(tmp_path / label / f"{i}.png")
    splits = load_dataset(f"images:{tmp_path}")
    assert splits.image_shape == (3, 7, 5)
    assert splits.private.class_names == ("a", "b")
    assert sorted(rows(splits)) == [0, 1, 2, 3, 4, 100, 101, 102, 103, 104]
    assert splits.private.labels.tolist() == [int(i >= 100) for i in which(splits.private)]
    assert load_dataset(f"images:{tmp_path}", image_size=4, grey=True).image_shape == (1, 4, 4)

    Image.new("L", (9, 9)).save(tmp_path / "a" / "9.png")
    with pytest.raises(FedattackError, match=r"image_size must be given.*a/9\.png"):
        load_dataset(f"images:{tmp_path}")
    (tmp_path / "a" / "10.png").write_text("no picture")
    with pytest.raises(FedattackError, match=r"a/10\.png"):
        load_dataset(f"images:{tmp_path}", image_size=4)


def test_flat_folder_has_one_class_and_an_empty_one_is_refused(tmp_path):
    from PIL import Image

    with pytest.raises(MissingDependency, match="holding pictures"):
        load_dataset(f"images:{tmp_path}")
    with pytest.raises(MissingDependency, match="existing folder"):
        load_dataset(f"images:{tmp_path / 'none'}")
    for i in range(4):
        Image.new("L", (6, 6), i).save(tmp_path / f"{i}.jpg")
    assert load_dataset(f"images:{tmp_path}").private.class_names == ("all",)


# ------------------------------------------------------------------------------------------------ named sets
def test_cifar_arrays_become_splits(monkeypatch):
    import torchvision.datasets

    def fake(root, train, download):
        count = 10 if train else 4
        return FakeSet(hwc(count, 32, 32), [i % 3 for i in range(count)], ["a", "b", "c"])

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fake)
    splits = load_dataset("cifar10", public_fraction=0.3, image_size=16)
    assert [len(splits.private), len(splits.public), len(splits.test)] == [7, 3, 4]
    assert splits.image_shape == (3, 16, 16)
    assert splits.private.labels.tolist() == [i % 3 for i in which(splits.private)]


class FakeSet(SimpleNamespace):
    """What torchvision's array data sets have in common."""

    def __init__(self, data, targets, classes):
        super().__init__(data=data, targets=targets, classes=classes)

    def __len__(self):
        return len(self.data)


def test_fashion_mnist_is_read_from_its_own_files(tmp_path, monkeypatch):
    """The IDX format by hand: magic number, sizes big-endian, bytes."""
    import torchvision.datasets

    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 10), ("t10k", 4)):
        pixels = np.repeat(np.arange(count, dtype=np.uint8), 28 * 28)
        header = b"".join(n.to_bytes(4, "big") for n in (0x803, count, 28, 28))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        header = b"".join(n.to_bytes(4, "big") for n in (0x801, count))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + bytes(i % 10 for i in range(count)))
    splits = load_dataset("fashion-mnist", root=str(tmp_path), download=False)
    assert splits.image_shape == (1, 28, 28)
    assert splits.num_classes == 10
    assert splits.private.labels.tolist() == which(splits.private)
    assert torchvision.datasets.FashionMNIST.__name__ == "FashionMNIST"


def test_celeba_is_cropped_and_labelled(monkeypatch):
    import torchvision.datasets
    from PIL import Image

    class FakeCelebA:
        attr_names = ("Male", "Young", "")
        attr = torch.stack([torch.arange(20) % 2, torch.ones(20, dtype=torch.int64)], dim=1)
        identity = (torch.arange(20) // 4).reshape(-1, 1)

        def __init__(self, root, **arguments):
            assert arguments["split"] == "all"

        def __len__(self):
            return 20

        def __getitem__(self, index):
            picture = Image.new("RGB", (178, 218), (255, 0, 0))
            picture.paste((index, index, index), (15, 35, 163, 183))
            return picture, None

    monkeypatch.setattr(torchvision.datasets, "CelebA", FakeCelebA)
    splits = load_dataset("celeba", image_size=8, by_user=True)
    assert sorted(rows(splits)) == list(range(20))
    assert (splits.private.pixels == splits.private.pixels[:, :1, :1, :1]).all()
    assert splits.private.labels.tolist() == [i % 2 for i in which(splits.private)]
    assert splits.private.users.tolist() == [i // 4 for i in which(splits.private)]
    with pytest.raises(FedattackError, match="did you mean 'Young'"):
        load_dataset("celeba", label="Youngg")


def test_lsun_is_read_from_its_databases(tmp_path, monkeypatch):
    from PIL import Image

    def blob(grey):
        buffer = io.BytesIO()
        Image.new("RGB", (20, 16), (grey, grey, grey)).save(buffer, "PNG")
        return buffer.getvalue()

    class Database:
        def __init__(self, path, **arguments):
            self.base = 100 if "tower" in path else 0

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        begin = __enter__

        def cursor(self):
            return ((str(i).encode(), blob(self.base + i)) for i in range(9))

    monkeypatch.setitem(sys.modules, "lmdb", SimpleNamespace(open=Database))
    with pytest.raises(MissingDependency, match="kitchen_train_lmdb"):
        load_dataset("lsun", root=str(tmp_path), categories=["kitchen"])
    for category in ("kitchen", "tower"):
        (tmp_path / f"{category}_train_lmdb").mkdir()
    splits = load_dataset("lsun", root=str(tmp_path), categories=["kitchen", "tower"], limit=5, image_size=8)
    assert sorted(rows(splits)) == [0, 1, 2, 3, 4, 100, 101, 102, 103, 104]
    assert splits.private.labels.tolist() == [int(i >= 100) for i in which(splits.private)]


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion-mnist", "celeba"])
def test_without_a_network_the_error_says_what_to_do(name, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(MissingDependency, match=r"put torchvision's files.*npz:PATH"):
        load_dataset(name, root=str(tmp_path))
    assert socket.getdefaulttimeout() is None


def test_default_root(monkeypatch, tmp_path):
    monkeypatch.delenv("FEDATTACK_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_root() == tmp_path / "fedattack"
    monkeypatch.setenv("FEDATTACK_DATA", str(tmp_path / "mine"))
    assert default_root() == tmp_path / "mine"
