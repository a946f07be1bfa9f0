"""What can be recognised: probes with known answers, ranks by hand, galleries without copies, labels for scoring only."""

import json
import math
from random import Random

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.campaign import run_campaign
from fedattack import scoring
from fedattack.config import Settings, parse_config, recognise_problems
from fedattack.data import label_columns, load_dataset, with_label
from fedattack.errors import ConfigError, FedattackError, MissingDependency, NotApplicable
from fedattack.metrics import match_batch
from fedattack.provenance import copies
from fedattack.recognition import (
    MANY,
    NO_TRUTH,
    NOT_THERE,
    SEVERAL,
    STRANGER,
    TIED,
    Recognitions,
    _by_pixels,
    _Column,
    _Judge,
    _looked_up,
    _majority,
)
from fedattack.recognition_probes import NOISE, Features, Probe, degraded, detect_faces, parse_task, raw_features
from fedattack.report import build_report
from fedattack.report.recognition import figure, recognised_tables
from fedattack.report.revealed import revealed
from fedattack.scoring import score_run
from fedattack.seeding import derive_generator
from fedattack.store import read_rows

COLOURS = ((200, 60, 60), (60, 60, 200), (60, 180, 60))


@pytest.fixture(autouse=True)
def _no_backbone(monkeypatch, tmp_path_factory):
    """The features that need no file, so that every machine computes the same."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("no-torch-home")))


def people_file(path, *, people=2, each=30, size=(8, 8), grey=False, noise=25, seed=0):
    """Everybody has a colour (a brightness in grey); `male` is the person's parity."""
    random = np.random.default_rng(seed)
    who = np.repeat(np.arange(people), each)
    base = np.array(COLOURS)[who % 3] if not grey else np.array([[40], [210], [120]])[who % 3]
    x = base[:, None, None, :] + noise * random.standard_normal((len(who), *size, base.shape[1]))
    x = x.clip(0, 255).astype(np.uint8)
    np.savez(path, x=x[..., 0] if grey else x, identity=who + 100, male=who % 2)
    return path


def judge(path, **options):
    return _Judge(Settings(data={"dataset": f"npz:{path}", "options": options}))


def asked(found: _Judge, tasks, images: Tensor, truth: Tensor, pairs="given"):
    return found.all_of(tasks, list(images), truth, pairs)


# ------------------------------------------------------------------------------------------------ what is asked
@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("face", ("face", "")), ("attribute:male", ("attribute", "male")), ("identity", ("identity", "identity")),
        ("identity:who", ("identity", "who")),
    ],
)  # fmt: skip
def test_tasks_are_read(text, parsed):
    assert parse_task(text) == parsed


def test_all_problems_of_a_configuration_at_once_with_the_closest_name(tmp_path):
    path = people_file(tmp_path / "people.npz")
    raw = {
        "data": {"dataset": f"npz:{path}"},
        "score": {"recognise": ["fase", "attribute", "attribute:mail", "face:x", "identity", "identity"]},
    }
    with pytest.raises(ConfigError) as raised:
        parse_config(raw)
    text = str(raised.value)
    assert "score.recognise" in text
    assert "(did you mean 'face'?)" in text
    assert "attribute:COLUMN, got 'attribute'" in text
    assert "(did you mean 'male'?)" in text
    assert "face alone, got 'face:x'" in text
    assert "'identity' must be given once" in text
    assert parse_config({**raw, "score": {"recognise": ["face", "attribute:male", "identity"]}}).score.recognise


def test_a_set_without_further_labels_knows_its_classes_only():
    assert label_columns("patches") == ("class",)
    with pytest.raises(ConfigError, match="label of patches to recognise must be one of class, got 'identity'"):
        parse_config({"score": {"recognise": ["identity"]}})
    assert parse_config({"score": {"recognise": ["attribute:class"]}}).score.recognise == ("attribute:class",)


def test_a_column_may_be_missing_from_one_data_set_of_two_of_the_same_name(tmp_path):
    people = people_file(tmp_path / "people.npz")
    archive = dict(np.load(people))
    np.savez(tmp_path / "nameless.npz", x=archive["x"], male=archive["male"])
    cells = [
        Settings(data={"dataset": "npz", "options": {"path": str(path)}})
        for path in (people, tmp_path / "nameless.npz")
    ]
    assert recognise_problems(["identity"], cells) == []
    assert recognise_problems(["identity"], cells[::-1]) == []
    assert len(recognise_problems(["identity"], cells[1:])) == 1


def of_that_name(name: str = "x", column: str = "y", splits: int = 1):
    """A data set whose options have the names that `with_label` gives its own parameters."""
    return load_dataset("patches", image_size=8, max_per_picture=2 * splits)


def test_options_of_a_data_set_may_have_any_name():
    options = {"name": "a", "column": "b", "splits": 2}
    loader = f"{__name__}:of_that_name"
    assert label_columns(loader, **options) == ("class",)
    splits = of_that_name()
    assert with_label(splits, "class", loader, **options) is splits


def test_labels_of_another_column_belong_to_the_same_images(tmp_path):
    path = people_file(tmp_path / "people.npz", people=3)
    name = f"npz:{path}"
    splits = load_dataset(name, label="male")
    people = with_label(splits, "identity", name, label="male")
    assert people.private.class_names == ("identity-100", "identity-101", "identity-102")
    for part in ("private", "public", "test"):
        assert torch.equal(getattr(people, part).labels % 2, getattr(splits, part).labels)
        assert torch.equal(getattr(people, part).labels + 100, getattr(splits, part).users)
    assert torch.equal(with_label(people, "male", name).test.labels, splits.test.labels)
    assert with_label(splits, "class", name) is splits
    with pytest.raises(FedattackError, match="did you mean 'identity'"):
        with_label(splits, "identities", name)


# ------------------------------------------------------------------------------------------------ probes
def test_the_discriminant_of_two_gaussians_is_the_bayes_rule():
    """Means ±(1, 0), covariance diag(1, 100): only the first coordinate counts, and the error is Φ(−1)."""
    generator = derive_generator(0, "gaussians")
    labels = torch.arange(4000) % 2
    points = torch.randn((4000, 2), generator=generator, dtype=torch.float64) * torch.tensor([1.0, 10.0])
    points[:, 0] += 2.0 * labels - 1.0
    probe = Probe.fit(points[:2000], labels[:2000], 2)
    error = float((probe.classify(points[2000:]) != labels[2000:]).double().mean())
    best = 0.5 * math.erfc(1 / math.sqrt(2))
    assert abs(error - best) < 4 * math.sqrt(best * (1 - best) / 2000) + 0.02  # shrinkage costs a little


def test_shares_decide_where_pictures_say_nothing():
    points = torch.zeros(10, 3, dtype=torch.float64)
    labels = torch.tensor([1] * 7 + [0] * 3)
    probe = Probe.fit(points, labels, 4)
    assert probe.known.tolist() == [True, True, False, False]
    assert probe.classify(points[:2]).tolist() == [1, 1]
    assert probe.ranks(points[:1])[0, :2].tolist() == [1.5, 1.5]  # (people + 1) / 2


def test_ranks_by_hand():
    """Angles in the plane: people at 0°, 90°, 180° and one without images; equals share their places."""
    means = torch.tensor([[2.0, 0.0], [0.0, 1.0], [-3.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    probe = Probe(torch.eye(2, dtype=torch.float64), means, torch.tensor([0.5, 0.25, 0.25, 0.0]))
    points = torch.tensor([[1.0, 0.1], [-0.5, 0.6], [0.0, 5.0], [0.0, 0.0]], dtype=torch.float64)
    ranks = probe.ranks(points)
    assert ranks[:, :3].tolist() == [[1, 2, 3], [3, 1, 2], [2.5, 1, 2.5], [2, 2, 2]]
    assert bool(ranks[:, 3].isnan().all())


def test_two_people_of_distinct_colours_are_told_apart_and_noise_is_chance(tmp_path):
    found = judge(people_file(tmp_path / "people.npz", each=40))
    private = found._splits.private
    truth = private.images()
    tasks = ("identity", "attribute:male")
    right = asked(found, tasks, truth, truth)["recognised"]
    for task in tasks:
        assert set(right[task]["hit"]) == {True}
        assert right[task]["clean"] == right[task]["noisy"] == 1.0
        assert right[task]["left_out"] == {}
    assert right["identity"]["rank"] == [1.0] * len(truth)
    assert (right["identity"]["people"], right["identity"]["chance"], right["identity"]["chance_rank"]) == (2, 0.5, 1.5)
    shares = torch.bincount(private.labels).double() / len(private)
    assert right["attribute:male"]["chance"] == pytest.approx(float(shares.max()))
    noise = torch.rand(truth.shape, generator=derive_generator(0, "noise"))
    wrong = asked(found, tasks, noise, truth)["recognised"]
    for task in tasks:
        hits, expected = sum(wrong[task]["hit"]), sum(wrong[task]["expected"])
        deviation = math.sqrt(len(truth) * 0.25)
        assert abs(hits - expected) < 4 * deviation, (task, hits, expected)
        assert abs(expected / len(truth) - 0.5) < 0.15
    assert sum(wrong["identity"]["expected_rank"]) / len(truth) == pytest.approx(1.5, abs=0.15)


def test_one_picture_for_everybody_scores_its_own_expectation(tmp_path):
    """A prior's sample is always of someone: `expected` averages to what it scores over the private part, exactly."""
    found = judge(people_file(tmp_path / "people.npz", people=3))
    truth = found._splits.private.images()
    same = found._splits.test.images([0]).expand(truth.shape)
    facts = asked(found, ("identity", "attribute:male"), same, truth)["recognised"]
    for values in facts.values():
        assert sum(values["hit"]) == pytest.approx(sum(values["expected"]))
    assert sum(facts["identity"]["rank"]) == pytest.approx(sum(facts["identity"]["expected_rank"]))
    commonest = facts["attribute:male"]["commonest"]
    assert sum(commonest) / len(commonest) == pytest.approx(facts["attribute:male"]["chance"])


def test_pairs_that_the_truth_chose_come_without_a_chance_level(campaign):
    """Unrelated pictures in batches of 8, each put beside the true image it is nearest to: they must stay within the bounds
    of the chance that stands beside them, or none may stand there."""
    run, experiment = campaign
    splits = judge(run.path.parent / "people.npz", label="male")._splits
    generator, hits, expected = derive_generator(0, "batches"), 0, []
    for number in range(4):
        truth = splits.private.images(torch.randperm(len(splits.private), generator=generator)[:8])
        pictures = splits.test.images(torch.randperm(len(splits.test), generator=generator)[:8])
        row = {"status": "ok", "job": f"unrelated-{number}", "assignment": match_batch(pictures, truth).tolist()}
        found = Recognitions(run, experiment).beside(row, experiment.cells[0], {"images": truth}, pictures)
        for task in ("identity", "attribute:male"):
            facts = found["recognised"][task]
            assert "chance" not in facts or "expected" in facts
        hits += sum(facts["hit"])
        expected += facts.get("expected", [])
    assert hits > 18, "matching favours pictures that have nothing to do with the truth"
    if expected:
        assert abs(hits - sum(expected)) < 3 * math.sqrt(32 / 4)
    assert facts["pairs"] == "chosen"


def test_grey_pictures_and_odd_sizes(tmp_path):
    found = judge(people_file(tmp_path / "grey.npz", size=(7, 5), grey=True))
    assert found._splits.image_shape == (1, 7, 5)
    truth = found._splits.private.images()
    facts = asked(found, ("face", "identity"), truth, truth)
    assert set(facts["recognised"]["identity"]["hit"]) == {True}
    assert facts["missing"] == {"face": "image sides for faces must be at least 16 pixels, got '7x5'"}


def test_everything_is_the_same_twice(tmp_path):
    path = people_file(tmp_path / "people.npz", noise=60)
    state = torch.random.get_rng_state()
    truth = judge(path)._splits.private.images()
    noise = torch.rand(truth.shape, generator=derive_generator(0, "noise"))
    first, second = (asked(judge(path), ("identity", "attribute:male"), noise, truth) for _ in range(2))
    assert first == second
    assert torch.equal(state, torch.random.get_rng_state())


def test_degraded_copies_keep_range_and_mean():
    image = torch.rand((2, 3, 20, 12), generator=derive_generator(0, "x"))
    noisy, blurred = degraded(image, generator=derive_generator(0, "y"))
    for copy in (noisy, blurred):
        assert copy.shape == image.shape
        assert 0 <= float(copy.min()) <= float(copy.max()) <= 1
    flat = torch.full((1, 1, 9, 9), 0.3)
    torch.testing.assert_close(degraded(flat, generator=derive_generator(0, "y"))[1], flat)
    assert float(blurred.std()) < 0.5 * float(image.std())


def test_components_keep_all_distances_between_the_images_they_were_made_of():
    images = torch.rand((6, 3, 9, 9), generator=derive_generator(0, "x"))
    space = Features.fit(images, "pixels")
    points = space(images)
    assert points.shape == (6, 5)
    from fedattack.recognition_probes import _joined, raw_features

    raw = _joined(raw_features(images, "pixels"), space.scales)
    torch.testing.assert_close(torch.cdist(points, points), torch.cdist(raw, raw))


def test_activations_are_kept_of_few_images_at_a_time(monkeypatch):
    asked_for = []

    def activations(images):
        asked_for.append(len(images))
        return tuple(images * (1 + layer) for layer in range(7))

    monkeypatch.setattr("fedattack.recognition_probes.perceptual_features", activations)
    images = torch.rand((150, 3, 64, 64), generator=derive_generator(0, "x"))
    blocks = raw_features(images, "squeezenet")
    assert max(asked_for) <= 64
    assert sum(asked_for) == 150
    for block, factor in zip(blocks, (2, 3), strict=True):
        pooled = torch.nn.functional.adaptive_avg_pool2d(images * factor, 4).flatten(1)
        torch.testing.assert_close(block, pooled)


def test_degraded_copies_are_made_of_few_images_at_a_time(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "fedattack.recognition.degraded", lambda images, **k: seen.append(len(images)) or degraded(images, **k)
    )
    found = judge(people_file(tmp_path / "many.npz", each=120), public_fraction=0.6)
    space, points = found._features
    public = found._splits.public.images(found._gallery[0])
    assert len(public) > 64 >= max(seen)
    assert len(points) == 3 * len(public)
    torch.testing.assert_close(points[: len(public)], space(public))  # first the images as they are


# ------------------------------------------------------------------------------------------------ galleries
def test_copies_are_found_after_recompression_and_others_are_not():
    import io

    from PIL import Image

    pixels = load_dataset("patches", image_size=32).public.pixels[:20]
    again = []
    for image in pixels[:4]:
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=85)
        again.append(torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1))
    assert copies(torch.cat([torch.stack(again), pixels[4:12]]), pixels[:4]).tolist() == [True] * 4 + [False] * 8
    assert copies(pixels.flip(-1)[:8], pixels[:4]).tolist() == [True] * 4 + [False] * 4  # mirrored
    assert copies(pixels, pixels[:0]).tolist() == [False] * 20


def test_an_attacked_image_is_taken_out_of_the_gallery(tmp_path):
    """The public part holds a copy of a private image under another name: it must not be what is found."""
    path = people_file(tmp_path / "people.npz")
    clean = judge(path)
    archive = dict(np.load(path))
    splits = clean._splits

    def row(part, index):
        wanted = part.pixels[index].permute(1, 2, 0).numpy()
        return next(i for i, x in enumerate(archive["x"]) if np.array_equal(x, wanted))

    archive["x"][row(splits.public, 0)] = archive["x"][row(splits.private, 0)]
    np.savez(tmp_path / "planted.npz", **archive)
    # the split goes by the file's name and length
    (tmp_path / "other").mkdir()
    (tmp_path / "planted.npz").rename(tmp_path / "other" / "people.npz")
    planted = judge(tmp_path / "other" / "people.npz")
    assert torch.equal(planted._splits.private.pixels, splits.private.pixels)
    assert clean._gallery[1] == 0
    assert planted._gallery[1] == 1
    assert planted._gallery[0].tolist() == clean._gallery[0].tolist()[1:]
    gallery = planted._splits.public.pixels[planted._gallery[0]]
    assert not bool((gallery.unsqueeze(0) == splits.private.pixels.unsqueeze(1)).flatten(2).all(2).any())
    truth = splits.private.images([0])
    assert asked(planted, ("identity",), truth, truth)["recognised"]["identity"]["copies_left_out"] == 1


# ------------------------------------------------------------------------------------------------ who is on a true image
def test_people_without_public_images_are_left_out_and_counted(tmp_path):
    path = people_file(tmp_path / "people.npz")
    archive = dict(np.load(path))
    x = np.concatenate([archive["x"], archive["x"][:1] // 2 + 90])  # a third person with one image
    index = len(x) - 1
    seed = next(seed for seed in range(50) if bool((_split_of(x, tmp_path, archive, seed).private.users == 102).any()))
    splits = _split_of(x, tmp_path, archive, seed)
    place = int((splits.private.users == 102).nonzero()[0])
    assert np.array_equal(splits.private.pixels[place].permute(1, 2, 0).numpy(), x[index])
    found = judge(tmp_path / "three.npz", seed=seed)
    truth = splits.private.images([place, 0])
    values = asked(found, ("identity",), truth, truth)["recognised"]["identity"]
    assert values["hit"] == [None, True]
    assert values["people"] == 2
    assert values["left_out"] == {STRANGER: 1}


def test_where_public_images_were_drawn_the_reason_says_so(tmp_path, monkeypatch):
    found = judge(people_file(tmp_path / "people.npz", people=6, each=12))
    monkeypatch.setattr("fedattack.recognition.MOST_PUBLIC", 3)
    truth = found._splits.private.images()
    values = asked(found, ("identity",), truth, truth)["recognised"]["identity"]
    total = len(found._splits.public)
    assert (values["public_images"], values["drawn_of"]) == (3, total)
    assert list(values["left_out"]) == [f"{STRANGER} among the 3 drawn of {total}"]


def _split_of(x, folder, archive, seed):
    identity = np.concatenate([archive["identity"], [102]])
    np.savez(folder / "three.npz", x=x, identity=identity, male=np.concatenate([archive["male"], [0]]))
    return load_dataset(f"npz:{folder / 'three.npz'}", seed=seed)


def test_where_no_person_is_in_two_parts_identity_says_so(tmp_path):
    found = judge(people_file(tmp_path / "people.npz", people=6, each=6), by_user=True)
    truth = found._splits.private.images()
    facts = asked(found, ("identity", "attribute:male"), truth, truth)
    assert facts["missing"] == {"identity": "nobody of the private part is in the public part, by identity"}
    assert set(facts["recognised"]) == {"attribute:male"}


def test_what_the_federation_learns_is_marked(tmp_path):
    path = people_file(tmp_path / "people.npz", people=3)
    tasks = ("attribute:male", "attribute:class", "identity")

    def learned(**settings):
        found = _Judge(Settings(data={"dataset": f"npz:{path}", "options": {"label": "male"}}, **settings))
        truth = found._splits.private.images([0, 1])
        return [asked(found, tasks, truth, truth)["recognised"][task].get("learned", False) for task in tasks]

    assert learned() == [True, True, False]
    assert learned(task={"name": "diffusion"}, model={"name": "unet"}) == [False] * 3


def test_a_true_image_is_looked_up_by_its_pixels(tmp_path):
    data = load_dataset(f"npz:{people_file(tmp_path / 'people.npz')}", label="identity").private
    about = _Column(data.class_names, None, None, _by_pixels(data), {})
    for dtype in (torch.float32, torch.float64):
        assert [_looked_up(about, image) for image in data.images(dtype=dtype)] == data.labels.tolist()
    assert _looked_up(about, data.images([0])[0] * 0.999) == NOT_THERE
    assert _looked_up(about, 1 - data.images([0])[0]) == NOT_THERE
    twice = data.subset([0, 0, 1])
    twice.labels[1] = 1 - twice.labels[0]
    about = _Column(data.class_names, None, None, _by_pixels(twice), {})
    assert _looked_up(about, data.images([0])[0]) == SEVERAL
    assert _looked_up(about, data.images([1])[0]) == int(data.labels[1])


def test_one_image_for_a_batch_stands_for_its_commonest_label(tmp_path):
    assert _majority([3, 1, 3, NOT_THERE]) == 3
    assert _majority([3, 1, 1, 3]) == TIED
    assert _majority([NOT_THERE]) == NOT_THERE
    found = judge(people_file(tmp_path / "people.npz"))
    private = found._splits.private
    zero, one = ((private.labels == label).nonzero().flatten() for label in (0, 1))
    truth = private.images([*zero[:2], one[0]])
    for index, hit in ((zero[5], True), (one[5], False)):
        values = asked(found, ("identity",), private.images([int(index)]), truth, "majority")
        assert values["recognised"]["identity"]["hit"] == [hit]
        assert not any(name.startswith("expected") for name in values["recognised"]["identity"])
    male = asked(found, ("attribute:male",), private.images([0]), truth, "majority")["recognised"]["attribute:male"]
    assert not {"expected", "chance"} & set(male)  # shares are those of single images
    gap = found.all_of(("identity",), [None, truth[2]], truth[[0, 2]], "given")["recognised"]["identity"]
    assert gap["hit"] == [None, True]
    tied = private.images([int(zero[0]), int(one[0])])
    values = asked(found, ("identity",), private.images([0]), tied, "majority")["recognised"]["identity"]
    assert (values["hit"], values["left_out"]) == ([None], {TIED: 1})


# ------------------------------------------------------------------------------------------------ faces
def test_a_photograph_of_a_face_is_found_and_noise_is_not():
    import skimage.data

    astronaut = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1).float() / 255
    face = torch.nn.functional.interpolate(astronaut[None, :, 20:220, 120:320], size=(48, 48), mode="area")
    noise = torch.rand((3, 3, 48, 48), generator=derive_generator(0, "noise"))
    flat = torch.full((1, 3, 48, 48), 0.5)
    assert detect_faces(torch.cat([face, noise, flat])).tolist() == [True, False, False, False, False]
    small = torch.nn.functional.interpolate(face, size=(24, 20), mode="area")
    assert detect_faces(small).tolist() == [True]
    assert detect_faces(face.mean(1, keepdim=True)).tolist() == [True]
    assert detect_faces(face[:0]).tolist() == []
    with pytest.raises(NotApplicable, match="at least 16 pixels, got '7x5'"):
        detect_faces(torch.zeros(1, 3, 7, 5))


def test_without_its_file_faces_are_missing_with_the_reason(tmp_path, monkeypatch):
    import skimage.data

    monkeypatch.setattr(skimage.data, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(MissingDependency, match="lbpcascade"):
        detect_faces(torch.zeros(1, 3, 32, 32))
    found = judge(people_file(tmp_path / "people.npz", size=(16, 16)))
    truth = found._splits.private.images([0])
    facts = asked(found, ("face", "identity"), truth, truth)
    assert "lbpcascade" in facts["missing"]["face"]
    assert facts["recognised"]["identity"]["hit"] == [True]


def test_yardsticks_of_faces_stand_beside(tmp_path, monkeypatch):
    monkeypatch.setattr("fedattack.recognition.MOST_FACES", 30)
    found = judge(people_file(tmp_path / "people.npz", size=(20, 16), each=10, noise=3))
    truth = found._splits.private.images([0, 1])
    values = found.all_of(("face",), [truth[0], None], truth, "given")["recognised"]["face"]
    assert values["hit"] == [False, None]
    assert values["chance"] == max(values["noise"], values["non_faces"]) < 0.1
    assert (values["clean"], values["clean_images"]) == (0.0, len(found._splits.test))  # coloured squares are no faces


# ------------------------------------------------------------------------------------------------ a run
@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recognised")
    wanted = {
        "data": {"dataset": f"npz:{people_file(folder / 'people.npz')}", "options": {"label": "male"}},
        "model": {"name": "mlp", "options": {"hidden": [16]}},
        "federation": {"clients": 2, "rounds": 1},
        "score": {"lpips": [], "floor": "off", "recognise": ["face", "attribute:male", "identity"]},
        "attack": ["linear-leak", {"name": "linear-leak", "control": "unrelated-update"}],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(folder))
        experiment = parse_config(wanted)
        return run_campaign(experiment, folder / "run").run, experiment


def test_rows_say_what_is_recognised_beside_chance_and_clean_images(campaign):
    run, _ = campaign
    rows = list(read_rows(run.rows))
    attack = [row for row in rows if row["kind"] == "attack"]
    assert len(attack) == 2
    for row in attack:
        assert row["recognised"]["identity"]["hit"] == [True]
        assert row["recognised"]["attribute:male"]["hit"] == [True]
        assert row["recognised"]["identity"]["clean"] == 1.0
        assert row["missing"]["recognise face"].startswith("image sides for faces must be")
    assert {row["attack"] for row in rows if "identity" in row.get("recognised", {})} >= {
        "linear-leak", "mean-image", "nearest-public", "noise", "linear-leak, unrelated-update",
    }  # fmt: skip


def test_kept_values_are_used_again_and_only_for_the_same_pictures(campaign, monkeypatch):
    run, experiment = campaign
    before = list(read_rows(run.rows))
    monkeypatch.setattr(_Judge, "all_of", lambda *_: pytest.fail("computed again"))
    score_run(run, experiment)
    assert list(read_rows(run.rows)) == before
    settings, row = experiment.cells[0], next(row for row in before if row["kind"] == "attack")
    truth = {"images": torch.zeros(1, 3, 8, 8)}
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        Recognitions(run, experiment).beside(row, settings, truth)


def _once(run, experiment, job):
    """A row of one picture, whose values are computed unless they were kept for this job."""
    private = load_dataset(f"npz:{run.path.parent / 'people.npz'}").private.images([0])
    row = {"status": "ok", "job": job, "assignment": [0]}
    found = Recognitions(run, experiment).beside(row, experiment.cells[0], {"images": private}, private)
    path = run.scores / f"{job}--recognised.json"
    return found, path.read_text() if path.exists() else None


def test_what_a_machine_lacks_for_now_is_not_kept(campaign, monkeypatch):
    run, experiment = campaign
    tasks = ("face", "identity")
    experiment = experiment.model_copy(update={"score": experiment.score.model_copy(update={"recognise": tasks})})

    def away(*_, **__):
        raise MissingDependency("the data set is away")

    with monkeypatch.context() as patch:
        patch.setattr("fedattack.recognition.load_splits", away)
        found, kept = _once(run, experiment, "away")
        assert found["missing"]["recognise identity"] == "the data set is away"
        assert kept is None
    found, kept = _once(run, experiment, "away")
    assert found["recognised"]["identity"]["hit"] == [True]
    assert set(found["missing"]) == {"recognise face"}  # too small: it will be so tomorrow, too
    assert kept is not None
    with monkeypatch.context() as patch:
        patch.setattr("fedattack.recognition.load_splits", away)
        assert _once(run, experiment, "away") == (found, kept)


def test_values_of_better_features_are_not_replaced_by_those_of_worse_ones(campaign, monkeypatch):
    run, experiment = campaign
    first, pixels = _once(run, experiment, "features")
    monkeypatch.setattr("fedattack.recognition_probes.perceptual_features", lambda images: (images,) * 7)
    with monkeypatch.context() as patch:  # the backbone is there now, but something else is not
        patch.setattr("fedattack.recognition.load_splits", _raises)
        assert _once(run, experiment, "features") == (first, pixels)
    better, kept = _once(run, experiment, "features")
    assert (first["recognised"]["identity"]["features"], better["recognised"]["identity"]["features"]) == (
        "pixels", "squeezenet",
    )  # fmt: skip
    monkeypatch.undo()
    assert _once(run, experiment, "features") == (better, kept)


def _raises(*_, **__):
    raise MissingDependency("away")


def test_without_photographs_chance_is_not_that_of_noise_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("fedattack.recognition.load_dataset", _raises)
    monkeypatch.setattr("fedattack.recognition.MOST_FACES", 2)
    found = judge(people_file(tmp_path / "people.npz", size=(16, 16), each=10))
    truth = found._splits.private.images([0])
    assert asked(found, ("face",), truth, truth)["missing"] == {"face": "away"}


def test_the_same_picture_gets_the_same_figures_as_attack_and_as_baseline(campaign):
    run, experiment = campaign
    private = judge(run.path.parent / "people.npz")._splits.private
    truth = private.images([*(private.labels == 1).nonzero().flatten()[:2], *(private.labels == 0).nonzero()[:1, 0]])
    mean = truth.mean(0, keepdim=True)
    row = {"status": "ok", "assignment": [0, 0, 0]}
    recognitions, cell = Recognitions(run, experiment), experiment.cells[0]
    attack = {**row, "job": "its-mean", "represents": "user", "attack": "user-level"}
    found = recognitions.beside(attack, cell, {"images": truth}, mean)
    for name in ("batch-mean", "mean-image"):
        images = mean.expand(truth.shape).clone()
        baseline = {**row, "job": name, "kind": "baseline", "attack": name, "assignment": [2, 1, 0]}
        assert recognitions.beside(baseline, cell, {"images": truth}, images, one_for_all=True) == found
    for name in ("noise", "nearest-public"):
        baseline = {**row, "job": name, "kind": "baseline", "attack": name}
        left = recognitions.beside(baseline, cell, {"images": truth}, truth, one_for_all=True)
        assert left == {"recognised": {}, "missing": {f"recognise {task}": MANY for task in experiment.score.recognise}}
    alone = recognitions.beside(
        {**row, "job": "noise", "assignment": [0], "attack": "noise"}, cell, {"images": truth[:1]}, truth[:1],
        one_for_all=True,
    )  # fmt: skip
    assert alone["recognised"]["identity"]["expected"]  # a batch of one image is that image


def test_baselines_beside_one_image_for_the_batch_are_judged_like_it(campaign, monkeypatch):
    run, experiment = campaign
    told = []

    class Listening(Recognitions):
        def beside(self, row, settings, witnessed, images=None, *, one_for_all=False):
            told.append((row["attack"], one_for_all))
            return {}

    real = scoring._attack_row
    monkeypatch.setattr(scoring, "_attack_row", lambda *a: real(*a) | {"represents": "user"})
    monkeypatch.setattr(scoring, "Recognitions", Listening)
    monkeypatch.setattr(scoring, "write_rows", lambda *_: None)
    score_run(run, experiment)
    baselines = {name: flag for name, flag in told if name in ("batch-mean", "mean-image", "noise", "nearest-public")}
    assert len(baselines) == 4
    assert all(baselines.values())


def test_without_truth_everything_is_missing_and_nothing_asked_is_nothing(campaign):
    run, experiment = campaign
    row = next(row for row in read_rows(run.rows) if row["kind"] == "attack")
    found = Recognitions(run, experiment).beside(row, experiment.cells[0], None)
    assert found["recognised"] == {}
    assert found["missing"]["recognise identity"] == NO_TRUTH
    silent = experiment.model_copy(update={"score": experiment.score.model_copy(update={"recognise": ()})})
    assert (
        Recognitions(run, silent).beside(row, experiment.cells[0], truth := {"images": torch.zeros(1, 3, 8, 8)}) == {}
    )
    failed = {**row, "status": "failed"}
    assert Recognitions(run, experiment).beside(failed, experiment.cells[0], truth) == {}


def test_a_row_of_one_image_for_a_user_has_one_value(campaign):
    run, experiment = campaign
    private = judge(run.path.parent / "people.npz")._splits.private
    batch = private.images((private.labels == 1).nonzero().flatten()[:3])
    row = {"status": "ok", "job": "one-for-all", "represents": "user", "assignment": [0, 0, 0]}
    found = Recognitions(run, experiment).beside(
        row, experiment.cells[0], {"images": batch}, batch.mean(0, keepdim=True)
    )
    assert found["recognised"]["identity"]["hit"] == [True]
    assert found["recognised"]["attribute:male"]["seen"] == ["male-1"]


def test_nothing_of_it_reaches_a_job(campaign):
    run, _ = campaign
    jobs = list(run.jobs.glob("*.json"))
    assert len(jobs) == 4
    for path in jobs:
        text = path.read_text().replace(str(run.path.parent), "")
        assert not any(word in text for word in ("identity", "recognise", "male"))


# ------------------------------------------------------------------------------------------------ the report
def told(attack, kind="attack", client="client-0", **recognised):
    return {"case": "c", "defense": "none", "attack": attack, "kind": kind, "client": client, "federation": "f", "round": 1,
            "status": "ok", "psnr_db": [10.0], "recognised": recognised}  # fmt: skip


def test_the_table_counts_images_and_sets_chance_beside():
    person = {"clean": 0.6, "noisy": 0.5, "chance": 0.01, "clean_rank": 1.0, "chance_rank": 50.5, "people": 100}
    rows = [
        told(
            "dlg",
            face={"hit": [True, None, False], "clean": 0.98, "chance": 0.005},
            **{"attribute:male": {"hit": [True, True], "expected": [0.8, 0.6], "commonest": [True, False], "chance": 0.8}},
            identity={
                **person, "hit": [True, False, None], "rank": [1.0, 9.0, None], "expected": [0.02, 0.01], "top5": [True, False],
                "expected_rank": [40.0, 50.0], "left_out": {STRANGER: 1}, "features": "pixels", "public_images": 7,
            },
        ),
        told("dlg", client="client-1", identity={**person, "hit": [True], "rank": [3.0], "expected_rank": [60.0]}),
        told("mean-image", "baseline", face={"hit": [True], "chance": 0.005}),
        {"case": "c", "attack": "broken", "recognised": "x", "status": "ok"},
    ]  # fmt: skip
    (table,) = recognised_tables(rows)
    assert [head for head, _ in table.heads] == ["Face", "male", "Person", "Person", "Person"]
    ((defense, (dlg, mean)),) = table.blocks
    assert (defense, dlg.cell.attack, mean.cell.attack) == ("none", "dlg", "mean-image")
    assert [entry.shown for entry in dlg.entries] == [
        "50 % (1 of 2)",
        "100 % (2 of 2)",
        "67 % (2 of 3)",
        "50 % (1 of 2)",
        "3",
    ]
    assert dlg.entries[1].note == "chance 70 %; commonest 50 %"
    assert dlg.entries[2].note == "chance 1.5 %"
    assert dlg.entries[4].note == "chance 50"
    assert [entry.shown for entry in mean.entries] == ["100 % (1 of 1)", "–", "–", "–", "–"]
    yardsticks = dict(table.yardsticks)
    assert yardsticks["chance"] == ("0.50 %", "80 %", "1.0 %", "–", "50.5")
    assert yardsticks["clean images of the test part"] == ("98 %", "–", "60 %", "–", "1")
    assert f"identity: 1 true image left out: {STRANGER}." in table.notes
    assert recognised_tables([{"case": "c", "attack": "dlg"}]) == []


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0 %"), (0.00634, "0.63 %"), (0.000634, "0.063 %"), (0.00999, "1.0 %"), (0.0634, "6.3 %"), (0.5, "50 %"),
        (0.996, "99.6 %"), (0.99999, "99.9 %"), (0.994, "99 %"), (1.0, "100 %"),
    ],
)  # fmt: skip
def test_shares_keep_two_digits_and_are_never_rounded_up_to_all(value, shown):
    assert figure(value, True) == shown


def test_the_table_says_how_pairs_were_made_and_what_is_learned():
    majority = {"hit": [True], "commonest": [True], "pairs": "majority", "learned": True}
    chosen = {"hit": [True, False], "commonest": [True, False], "pairs": "chosen", "learned": True}
    drawn = {"features": "pixels", "public_images": 3, "drawn_of": 9}
    rows = [
        told("user-level", **{"attribute:male": majority | {"left_out": {TIED: 1}}}),
        told("dlg", **{"attribute:male": chosen | drawn}),
    ]
    (table,) = recognised_tables(rows)
    entries = {line.cell.attack: line.entries[0] for _, lines in table.blocks for line in lines}
    assert (entries["user-level"].shown, entries["user-level"].note) == ("100 % (1 of 1 batch)", "commonest 100 %")
    assert (entries["dlg"].shown, entries["dlg"].note) == (
        "50 % (1 of 2)",
        "pairs chosen; commonest 50 %",
    )
    notes = " ".join(table.notes)
    assert "attribute:male: this is what the federation learns; the update tells it without a picture." in notes
    assert "pixels features of 3 public images, drawn of 9" in notes
    assert f"attribute:male: 1 batch left out: {TIED}." in notes
    assert dict(table.yardsticks)["chance"] == ("pairs chosen with the truth: compare with the controls",)
    assert "attribute:male, batches above 1: pairs chosen with the truth: compare with the controls" in notes
    assert dict(recognised_tables(rows[:1])[0].yardsticks)["chance"] == ("–",)
    assert f"the same with noise of {NOISE:g}" in dict(table.yardsticks)


def test_the_page_has_the_table(campaign):
    run, _ = campaign
    page = build_report(run.path).read_text()
    assert "What can be recognised" in page
    assert "nearest of 2 people" in page
    assert "100 % (2 of 2)" in page
    assert "clean images of the test part" in page


# ------------------------------------------------------------------------------------------------ the headline's verdict
def ranks(attack, values, kind="attack", *, pairs="given", control=None, **facts):
    """One row a client."""
    found = {"people": 100, "expected_rank": [50.5], "pairs": pairs} | facts
    return [
        told(attack, kind, identity=found | {"rank": [float(value)]})
        | {"client": f"client-{number}", "control": control}
        for number, value in enumerate(values)
    ]


def classes(attack, hits, kind="attack", *, commonest=True, **facts):
    facts = {"expected": [0.5], "pairs": "given"} | facts
    return [
        told(attack, kind, **{"attribute:male": facts | {"hit": [hit], "commonest": [commonest]}})
        | {"client": f"client-{number}"}
        for number, hit in enumerate(hits)
    ]


def verdict(*groups):
    ((case, (found,)),) = revealed([row for group in groups for row in group]).items()
    assert case == "c"
    return found


NEAR, FAR = [1, 2, 1, 3, 2, 70], [55, 30, 70, 90, 20, 60]


def test_a_person_is_told_where_ranks_beat_chance_and_every_blind_picture():
    found = verdict(ranks("dlg", NEAR), ranks("mean-image", FAR, "baseline"))
    assert found.told
    assert "Person: dlg puts the right person at median rank 2 of 100 (chance 50.5; 57.5 at best" in found.words
    assert (
        "6 clients, p = 0.031)" in found.words
    )  # of 64 signs the right ones, and all plus: the sixth gain is the smallest
    same = verdict(ranks("dlg", NEAR), ranks("mean-image", FAR, "baseline"), ranks("noise", NEAR, "baseline"))
    assert same.badge == "not shown"
    assert "p = 1)" in same.words


def test_a_picture_that_shows_the_commonest_person_tells_nothing():
    """Nine in ten images show one person and every picture does: better than chance, not than a picture that knows nothing."""
    random, claims = Random(0), 0
    for _ in range(200):
        common = [random.random() < 0.9 for _ in range(8)]
        own = [1 if it else 50 for it in common]
        blind = [rank + random.choice((0, 0, 1)) for rank in own] if random.random() < 0.5 else own
        assert not verdict(ranks("dlg", own)).told  # without any control nothing is claimed
        claims += verdict(
            ranks("dlg", own), ranks("mean-image", own, "baseline"), ranks("noise", blind, "baseline")
        ).told
    assert claims == 0


def test_guesses_are_rarely_told():
    random = Random(1)

    def guesses():
        return [random.randint(1, 100) for _ in range(8)]

    claims = sum(verdict(ranks("dlg", guesses()), ranks("noise", guesses(), "baseline")).told for _ in range(200))
    assert claims <= 20


def test_what_was_chosen_with_the_truth_is_no_control_and_gives_no_chance():
    found = verdict(
        ranks("dlg", NEAR), ranks("nearest-public", NEAR, "baseline"), ranks("batch-mean", NEAR, "baseline"),
        ranks("mean-image", FAR, "baseline"),
    )  # fmt: skip
    assert found.told
    chosen = ranks("dlg", NEAR, pairs="chosen")
    assert revealed(chosen) == {}
    assert revealed([*chosen, *ranks("mean-image", FAR, "baseline", pairs="majority")]) == {}
    assert (
        revealed([*chosen, *ranks("mean-image", FAR, "baseline", pairs="chosen")]) == {}
    )  # as good whatever it is paired with
    found = verdict(chosen, ranks("gg-cdm", FAR, "baseline", pairs="chosen", control="prior-alone"))
    assert found.told
    assert "chance" not in found.words


def test_a_client_counts_once_whatever_it_sent_and_attacks_pay_for_each_other():
    near, blind = [1, 2, 1, 3, 2], ranks("noise", [60, 50, 70, 80, 90], "baseline")
    rounds = [row | {"round": n, "federation": f"f{n}"} for n in range(3) for row in ranks("dlg", near)]
    found = verdict(rounds, blind)
    assert found.told
    assert "5 clients, p = 0.031)" in found.words
    found = verdict(rounds, ranks("idlg", near), blind)
    assert (found.badge, "p = 0.062 for 2 attacks" in found.words) == ("too few clients", True)
    found = verdict(ranks("dlg", [1]), blind)
    assert (found.badge, "1 client, p = 0.5)" in found.words) == ("too few clients", True)


def test_a_class_must_beat_the_commonest_one_and_chance():
    blind = classes("noise", [False, True] * 8, "baseline")
    found = verdict(classes("dlg", [True] * 16), blind)
    assert found.badge == "not shown"
    assert "Male: the most telling attack, dlg, shows the right one in 100 % (chance 100 %; 50 % at best" in found.words
    balanced = [row for half in (True, False) for row in classes("dlg", [True] * 16, commonest=half)]
    found = verdict(balanced, blind)
    assert found.told
    assert "(chance 50 %; 50 % at best in pictures made without this update; 16 clients, p = 0.004" in found.words
    assert revealed([told("dlg", face={"hit": [True], "chance": 0.005})]) == {}
    noisy = [row | {"defense": "gaussian-noise(sigma=0.1)"} for row in classes("dlg", [True])]
    assert verdict(noisy).words.startswith("Male, gaussian-noise σ=0.1: ")


def test_labels_that_were_given_are_not_told_by_pictures():
    blind = classes("noise", [False] * 8, "baseline", commonest=False)
    known = [row | {"oracles": ["labels"]} for row in classes("dlg", [True] * 8, commonest=False, learned=True)]
    found = verdict(known, blind)
    assert not found.told
    assert "it was given the labels, which say so" in found.words
    found = verdict(classes("dlg", [True] * 8, commonest=False, learned=True), blind)
    assert found.told
    assert "the update tells without a picture" in found.words
    found = verdict([row | {"oracles": ["noise"]} for row in ranks("dlg", NEAR)], ranks("noise", FAR, "baseline"))
    assert "it was given what a real server does not have: noise" in found.words


def test_the_headline_says_what_is_told(tmp_path):
    rows = [*ranks("dlg", NEAR), *ranks("mean-image", FAR, "baseline")]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row | {"psnr_db": [12.0]}) for row in rows))
    page = build_report(tmp_path).read_text()
    assert '<span class="badge v-recognisable">told</span> Person: dlg puts the right person' in page
    assert "paired permutation test" in page
