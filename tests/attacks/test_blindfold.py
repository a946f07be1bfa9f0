"""The blindfold: given client A's update an attack finds A, and knows nothing about B.

Every registered attack climbs the same ladder of victims and settings until one of them lets it see A clearly. On every
rung that it tried, its pictures must be no better on B's image than the mean public image is: only a leak of the truth,
or of B, could make them so.

An attack that says it makes no images sees A where it finds the timesteps that A's client drew, other ones for every pair, in
every pair, and not those that B's client drew; it must show the mean public image itself.
"""

import ctypes
import dataclasses
import inspect
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from attack_cases import UNET, Case, cheap, facts, prior_of
from torch import Tensor

from attacks import ATTACKS as BUILT_IN
from fedattack.errors import NotApplicable
from fedattack.jobs import Job, attack_update, load_outcome, reconstruction_path, run_job, save_knowledge
from fedattack.knowledge import ORACLES
from fedattack.metrics import psnr_db
from fedattack.registry import ATTACKS
from fedattack.seeding import derive_generator
from fedattack.store import FederationFolder, load_reconstruction, save_update, write_tensors
from fedattack.tasks import batch_indices
from fedattack.types import Attack, Knowledge, Private, Reconstruction, Update

CLEARLY_DB = 6.0
"""How much better than the mean image "sees A" is; a fourfold smaller error."""

TOLERANCE_DB = 0.5
PAIRS = 3


# ------------------------------------------------------------------------------------------------ the ladder
@dataclass(frozen=True, eq=False)
class Rung:
    """A victim, how long the attack may search, hyper-parameters where it has them, oracles to give, and the clients' seeds."""

    name: str
    case: Case
    most: int
    wanted: dict[str, Any] = field(default_factory=dict)
    oracles: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (5,) * PAIRS


SMOOTH = Case("mlp", "mlp", {"hidden": (32,), "activation": "sigmoid"})
LENET = Case("lenet", "lenet", {"channels": 12})
DENOISER = Case("unet", "unet", UNET, task="diffusion", task_options={"num_train_timesteps": 20})
GREY = {"start": "grey"}
FEW = {
    **GREY,
    "learning_rate": 0.1,
    "sampling_steps": 1,
    "clip": False,
}  # first-order attacks on diffusion models in few iterations
LADDER = [
    Rung("mlp", SMOOTH, 30, GREY),
    Rung("lenet", LENET, 30, GREY),
    Rung("mlp-longer", SMOOTH, 400, {**GREY, "tv_weight": 0.01}),
    Rung("lenet-longer", LENET, 600, {**GREY, "tv_weight": 0.01}),
    Rung("unet-oracles", DENOISER, 60, {**FEW, "learning_rate": 0.05}, ("noise", "timesteps")),
    Rung("unet-oracles-longer", DENOISER, 120, FEW, ("noise", "timesteps")),
    Rung("unet-oracles-longest", DENOISER, 300, {**GREY, "tv_weight": 0.01}, ("noise", "timesteps")),
    Rung("unet-alone", DENOISER, 30, GREY, seeds=(5, 6, 9)),
]


def victims(patches: Any) -> tuple[Tensor, Tensor, Tensor]:
    """PAIRS images A, as many B, and the public images. All A and B are textured and from different photographs.

    Seen from the mean public image every B lies on the other side of its A, and grey is no better on it: no blend of A,
    grey and the mean image is better on B than the mean image is, so partial success on A can never look like a leak of B.
    """
    pixels, labels, public = patches.private.images(), patches.private.labels, patches.public.images()
    mean = public.mean(0, keepdim=True)
    textured = pixels.flatten(1).std(1) > 0.15
    deviations = (pixels - mean).flatten(1)
    grey_is_no_better = psnr_db(torch.full_like(pixels, 0.5), pixels) < psnr_db(mean.expand_as(pixels), pixels)
    chosen: list[tuple[int, int]] = []
    for photograph in labels[textured].unique().tolist():
        if photograph in labels[[i for pair in chosen for i in pair]].tolist():
            continue
        a = int((textured & (labels == photograph)).nonzero()[0])
        opposite = torch.cosine_similarity(deviations, deviations[a][None]) < -0.2
        used = torch.isin(labels, labels[[i for pair in chosen for i in pair]])
        candidates = (textured & grey_is_no_better & opposite & ~used & (labels != photograph)).nonzero()
        chosen.append((a, int(candidates[0])))
        if len(chosen) == PAIRS:
            break
    assert len(chosen) == PAIRS
    return pixels[[a for a, _ in chosen]], pixels[[b for _, b in chosen]], public


def draws_of(case: Case, image: Tensor, seed: int) -> Private:
    """What the client with `image` draws privately."""
    label, generator = torch.tensor([2]), derive_generator(seed, "client")
    return case.build_task().draw(image[None].to(case.dtype), label, generator=generator)


def gain_on_a(found: Reconstruction, a: Tensor, mean: Tensor, case: Case, seed: int) -> float:
    """By how many dB A is better than the mean image is; all or nothing where timesteps are what the attack looks for."""
    if found.represents == "timesteps":
        assert torch.allclose(found.images, mean), "it makes no images, so there is nothing to show but the mean image"
        assert found.timesteps is not None
        truth = draws_of(case, a, seed).get("timesteps")
        return CLEARLY_DB if truth is not None and torch.equal(found.timesteps, truth) else 0.0
    return float(psnr_db(found.images, a[None])) - float(psnr_db(mean, a[None]))


def climb(name: str, rung: Rung, image: Tensor, public: Tensor, seed: int) -> Reconstruction:
    """The attack on the update that the client with `image` sends."""
    case, restarts = rung.case, 2
    attack = cheap(name, most=rung.most, restarts=restarts, **rung.wanted)
    label = torch.tensor([2])
    update = case.update(image[None], label, seed=seed)
    oracles: dict[str, Tensor] = {}
    if rung.oracles:
        if case.task not in attack.tasks:
            raise NotApplicable("another task")
        drawn = draws_of(case, image, seed)
        oracles = {oracle: drawn[oracle] for oracle in rung.oracles}
    knowledge = facts(case, attack, public, **oracles)
    if "prior" in attack.needs:
        knowledge = dataclasses.replace(knowledge, prior=prior_of(case.shape, public))
    if "labels" in attack.needs:
        knowledge = dataclasses.replace(knowledge, labels=label)
    generator = derive_generator(0, "blindfold")
    return attack_update(attack, update, case.context, knowledge, generator=generator)


@pytest.mark.parametrize("name", ATTACKS.names())
def test_the_attack_sees_a_and_is_blind_to_b(name, patches):
    images_a, images_b, public = victims(patches)
    mean = public.mean(0, keepdim=True)
    tried: list[str] = []
    for rung in LADDER:
        gains: list[float] = []
        try:
            for a, b, seed in zip(images_a, images_b, rung.seeds, strict=True):
                found = climb(name, rung, a, public, seed)
                if found.represents == "timesteps" and len(set(rung.seeds)) < PAIRS:
                    raise NotApplicable("all clients draw the same timesteps")
                on_b = float(psnr_db(found.images, b[None]))
                mean_on_b = float(psnr_db(mean, b[None]))
                assert on_b <= mean_on_b + TOLERANCE_DB, f"{name} on {rung.name} knows B: {on_b:.1f} dB"
                gains.append(gain_on_a(found, a, mean, rung.case, seed))
                if found.represents == "timesteps":
                    drawn = draws_of(rung.case, b, seed + PAIRS).get("timesteps", torch.tensor([-1]))
                    assert not torch.equal(found.timesteps, drawn), f"{name} on {rung.name} knows B's timesteps"
                    if gains[-1] < CLEARLY_DB:
                        gains = gains[-1:]
                        break  # a constant is right now and then, too
                if gains[-1] < CLEARLY_DB and sum(g < CLEARLY_DB for g in gains) * 2 > PAIRS:
                    break  # this rung is lost
        except NotApplicable as reason:
            tried.append(f"{rung.name}: {reason}")
            continue
        tried.append(f"{rung.name}: {[round(gain, 1) for gain in gains]} dB over the mean image")
        if sum(gain >= CLEARLY_DB for gain in gains) * 2 > PAIRS:
            return
    pytest.fail(f"{name} saw A clearly on no rung: {tried}")


def test_the_images_make_a_fair_test(patches):
    """A, and every blend of A with the mean image or grey, is worse on B than the mean image is."""
    images_a, images_b, public = victims(patches)
    mean = public.mean(0, keepdim=True)
    for a, b in zip(images_a, images_b, strict=True):
        for other in (mean, torch.full_like(mean, 0.5)):
            for share in (0.05, 0.2, 0.5, 0.8, 1.0):
                blend = share * a[None] + (1 - share) * other
                assert float(psnr_db(blend, b[None])) < float(psnr_db(mean, b[None])) + 0.1
        assert float(psnr_db(mean, b[None])) < 20  # and B is textured, so an attack that knew it would show


def test_the_timesteps_make_a_fair_test(patches):
    """No constant is right twice, and B's client never draws what A's does."""
    images_a, images_b, _ = victims(patches)
    (rung,) = (rung for rung in LADDER if rung.name == "unet-alone")
    of_a = [int(draws_of(rung.case, a, seed)["timesteps"]) for a, seed in zip(images_a, rung.seeds, strict=True)]
    of_b = [
        int(draws_of(rung.case, b, seed + PAIRS)["timesteps"]) for b, seed in zip(images_b, rung.seeds, strict=True)
    ]
    assert len(set(of_a)) == PAIRS
    assert all(a != b for a, b in zip(of_a, of_b, strict=True))


def test_an_attack_that_peeks_is_caught(patches, monkeypatch):
    """The blindfold itself must be able to fail: the mean image is no attack, and B's image is no answer to A's update."""
    images_a, images_b, public = victims(patches)
    mean = public.mean(0, keepdim=True)
    wrong = {"timesteps": torch.tensor([20]), "represents": "timesteps"}  # of 0 … 19
    answers: list[Callable[[Tensor], Reconstruction]] = [
        lambda a: Reconstruction(mean),  # sees nothing
        lambda a: Reconstruction(images_b[[i for i in range(PAIRS) if torch.equal(images_a[i], a)]]),  # knows B
        lambda a: Reconstruction(mean, **wrong),  # sees no timesteps
        lambda a: Reconstruction(a[None], **wrong),  # sees A, and says that it makes no images
        lambda a: Reconstruction(mean, timesteps=torch.tensor([16]), represents="timesteps"),  # right in one pair
    ]
    complaints = ("on no rung", "knows B", "on no rung", "nothing to show", "on no rung")
    for answer, complaint in zip(answers, complaints, strict=True):
        monkeypatch.setattr(
            sys.modules[__name__],
            "climb",
            lambda name, rung, image, public, seed, answer=answer: answer(image),
        )
        with pytest.raises(BaseException, match=complaint) as caught:
            test_the_attack_sees_a_and_is_blind_to_b("dlg", patches)
        assert not isinstance(caught.value, KeyboardInterrupt)


# ------------------------------------------------------------------------------------------------ structure
def test_no_type_that_reaches_an_attack_has_a_place_for_the_truth():
    assert [f.name for f in dataclasses.fields(Update)] == [
        "round",
        "client",
        "sent",
        "received",
        "kind",
        "num_examples",
    ]
    assert {"labels", "timesteps", "noise"} == ORACLES
    assert {f.name for f in dataclasses.fields(Knowledge)} - ORACLES == {
        "image_shape",
        "batch_size",
        "num_classes",
        "learning_rate",
        "local_steps",
        "local_batch_size",
        "proximal_mu",
        "defense",
        "prior",
        "public_images",
        "history",  # updates that the server holds, no more
    }
    assert "images" not in {f.name for f in dataclasses.fields(Knowledge)}
    wanted = ["self", "update", "model", "task", "knowledge", "generator", "progress"]
    assert list(inspect.signature(Attack.reconstruct).parameters) == wanted
    assert set(BUILT_IN) <= set(ATTACKS.names())


# ------------------------------------------------------------------------------------------------ the file system
IN_OPEN, IN_ACCESS = 0x20, 0x1


@contextmanager
def watched(folder: Path):
    """Gives a list that holds, once the block is left, the name of every file of `folder` that was opened meanwhile.

    inotify sees what any code of any language opens; Python's audit hooks do not see the Rust inside safetensors.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "inotify_init1"):
        pytest.skip("needs inotify (Linux)")
    queue = libc.inotify_init1(os.O_NONBLOCK)
    assert queue >= 0
    assert libc.inotify_add_watch(queue, os.fsencode(folder), IN_OPEN | IN_ACCESS) >= 0
    opened: list[str] = []
    try:
        yield opened
        try:
            events = os.read(queue, 1 << 16)
        except BlockingIOError:
            events = b""
        while events:
            length = int.from_bytes(events[12:16], sys.byteorder)
            opened.append(os.fsdecode(events[16 : 16 + length].rstrip(b"\0")) or str(folder))
            events = events[16 + length :]
    finally:
        os.close(queue)


def federation_with_a_truth(root: Path, case: Case, image: Tensor) -> tuple[FederationFolder, Path]:
    """A run's federation folder as a simulation leaves it: an update and, in the next folder, the truth about it."""
    federation = FederationFolder(root / "federations" / "f")
    path = federation.updates / "0-round-1.safetensors"
    save_update(path, case.update(image[None], torch.tensor([2])), case.context)
    truth = {"images": image[None], "labels": torch.tensor([2])}
    write_tensors(federation.truth / "0-round-1.safetensors", truth, {"type": "truth"})
    return federation, path


@pytest.mark.parametrize("name", ATTACKS.names())
def test_a_job_opens_no_file_of_the_truth(name, tmp_path, patches, monkeypatch):
    attack = cheap(name)
    case = DENOISER if "classification" not in attack.tasks else SMOOTH
    federation, update = federation_with_a_truth(tmp_path, case, patches.private.images([0])[0])
    monkeypatch.chdir(federation.path)
    public = federation.public_images
    write_tensors(public, {"images": patches.public.images()[:8]}, {"type": "public"})
    knowledge = dataclasses.replace(facts(case, attack), public_images=None)
    tensors = tmp_path / "jobs" / "j.safetensors"
    job = Job(
        job="j",
        update=str(update),
        attack=name,
        parameters={f.name: getattr(attack, f.name) for f in dataclasses.fields(attack)},
        knowledge=save_knowledge(tensors, knowledge),
        tensors=str(tensors) if tensors.exists() else "",
        public_images=str(public),
        device="cpu",
    )
    with watched(federation.truth) as opened:
        outcome = run_job(job, tmp_path / "results")
    assert outcome.status in ("ok", "not-applicable"), outcome.error
    assert opened == []
    assert load_outcome(tmp_path / "results", "j") == outcome
    if outcome.status == "ok":
        found = load_reconstruction(reconstruction_path(tmp_path / "results", "j"))
        assert found.images.shape == (1, *case.shape)


def test_the_watch_sees_what_safetensors_opens(tmp_path, patches):
    """Otherwise the test above could never fail."""
    from safetensors import safe_open

    federation, _ = federation_with_a_truth(tmp_path, SMOOTH, patches.private.images([0])[0])
    with watched(federation.truth) as opened, safe_open(federation.truth / "0-round-1.safetensors", "pt") as file:
        file.get_tensor("images")
    assert "0-round-1.safetensors" in opened


def test_the_ladder_matches_the_clients_schedule():
    """One image, one step: the oracles given on the last rungs are the very draws of the client."""
    assert batch_indices(1, 1, 1) == [[0]]
