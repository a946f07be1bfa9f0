"""The DDPM U-Net: size by arithmetic, agreement with diffusers, second derivatives, real-valued timesteps."""

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap

from fedattack.errors import FedattackError
from fedattack.models import build_model, parameter_count
from fedattack.models.unet import TimeProjection
from fedattack.tasks import Diffusion, simulate, simulate_gradient

TINY = {"block_out_channels": (4, 4), "norm_num_groups": 2, "attention_head_dim": 2}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def task():
    diffusion = Diffusion()
    assert diffusion.alphas_cumprod.shape == (1000,)
    return diffusion


def tiny(image_shape=(3, 4, 4), **options):
    return build_model("unet", image_shape=image_shape, num_classes=None, seed=0, **{**TINY, **options})


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def state_of(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def private_of(shape, timesteps, dtype=torch.float32):
    images = normal(len(timesteps), *shape, seed=1, dtype=dtype).sigmoid()
    return {"images": images, "noise": normal(*images.shape, seed=2, dtype=dtype), "timesteps": timesteps}


# ------------------------------------------------------------------------------------------------ size
def conv(before, after, side=3):
    return side * side * before * after + after


def linear(before, after):
    return before * after + after


def resnet(before, after, embedding):
    """Two normalised convolutions, the time embedding between them, a 1×1 shortcut where the width changes."""
    block = 2 * before + conv(before, after) + linear(embedding, after) + 2 * after + conv(after, after)
    return block + (conv(before, after, 1) if before != after else 0)


def attention(width):
    """A normalisation, then query, key, value and output."""
    return 2 * width + 4 * linear(width, width)


@pytest.mark.parametrize("side", [8, 16, 32])
def test_parameter_count(side):
    time = linear(32, 128) + linear(128, 128)
    down = resnet(32, 32, 128) + conv(32, 32) + resnet(32, 64, 128) + attention(64)
    middle = 2 * resnet(64, 64, 128) + attention(64)
    # the skips are popped from the end: 64, 32 at the lower level, 32, 32 at the upper one
    up = resnet(64 + 64, 64, 128) + resnet(64 + 32, 64, 128) + 2 * attention(64) + conv(64, 64)
    up += resnet(64 + 32, 32, 128) + resnet(32 + 32, 32, 128)
    expected = conv(3, 32) + time + down + middle + up + 2 * 32 + conv(32, 3)
    model = build_model("unet", image_shape=(3, side, side), num_classes=10, seed=0)
    assert parameter_count(model) == expected


# ------------------------------------------------------------------------------------------------ agreement
def test_time_projection_is_the_ddpm_table():
    from diffusers.models.embeddings import Timesteps

    timesteps = torch.arange(1000)
    ours = TimeProjection(32)(timesteps)
    theirs = Timesteps(32, flip_sin_to_cos=True, downscale_freq_shift=0)(timesteps)
    assert ours.dtype == torch.float64
    assert (ours - theirs).abs().max() < 1e-4
    assert torch.allclose(ours.square().sum(1), torch.full((1000,), 16.0, dtype=torch.float64))


def test_saved_and_loaded_by_diffusers_it_is_the_same_function(tmp_path):
    from diffusers import UNet2DModel

    model = build_model("unet", image_shape=(3, 16, 16), num_classes=None, seed=3).eval()
    model.unet.save_pretrained(tmp_path)
    plain = UNet2DModel.from_pretrained(tmp_path).eval()
    images, timesteps = normal(2, 3, 16, 16), torch.tensor([3, 987])
    with torch.no_grad():
        assert torch.allclose(model(images, timesteps), plain(images, timesteps).sample, atol=1e-3)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 16, 16), (3, 32, 32), (3, 4, 6)])
def test_shapes(shape):
    model = build_model("unet", image_shape=shape, num_classes=None, seed=0)
    out = model(normal(2, *shape), torch.tensor([0, 999]))
    assert out.shape == (2, *shape)
    assert torch.allclose(out, model(normal(2, *shape), torch.tensor([0.0, 999.0])))


def test_options():
    assert not [key for key in tiny(attention=(), mid_attention=False).state_dict() if "to_q" in key]
    everywhere = [key for key in tiny(attention=(0, 1), layers_per_block=2).state_dict() if "to_q.weight" in key]
    assert len(everywhere) == 2 * 2 + 1 + 2 * 3
    assert (
        tiny((1, 7, 5), block_out_channels=(4,), attention=())(normal(2, 1, 7, 5), torch.tensor([1, 2])).shape[-1] == 5
    )
    for options, text in (
        ({"block_out_channels": (4, 4, 4, 4)}, "multiple of 8"),
        ({"attention": (2,)}, "levels in 0 … 1"),
        ({"norm_num_groups": 3}, "divisible"),
        ({"atention": (0,)}, "did you mean 'attention'"),
    ):
        with pytest.raises(FedattackError, match=text):
            tiny(**options)


# ------------------------------------------------------------------------------------------------ derivatives
def test_double_backward_through_the_task(task):
    shape = (3, 8, 8)
    model = build_model("unet", image_shape=shape, num_classes=None, seed=0)
    private = private_of(shape, torch.tensor([10.5, 500.0]))
    unknowns = [tensor.requires_grad_() for tensor in private.values()]
    gradient = simulate_gradient(model, state_of(model), task, [private])
    for key, tensor in gradient.items():
        assert tensor.isfinite().all(), key
        if not key.endswith("to_k.bias"):  # the softmax is blind to it: it adds one number to a whole row of scores
            assert tensor.abs().max() > 1e-8, key
    loss = sum(tensor.square().sum() for tensor in gradient.values())
    for second in torch.autograd.grad(loss, unknowns):
        assert second.isfinite().all()
        assert (second.reshape(2, -1).abs().max(1).values > 0).all()


def test_second_derivatives_are_right(task):
    """gradcheck, float64, attention and real-valued timesteps included."""
    shape = (1, 2, 2)
    model = tiny(shape).double()
    state = state_of(model)
    weights = {
        key: normal(2, *tensor.shape, seed=i, dtype=torch.float64) for i, (key, tensor) in enumerate(state.items())
    }

    def projected(images, noise, timesteps):
        private = {"images": images, "noise": noise, "timesteps": timesteps}
        gradient = simulate_gradient(model, state, task, [private])
        return sum((weights[key] * tensor).flatten(1).sum(1) for key, tensor in gradient.items())

    private = private_of(shape, torch.tensor([20.3, 400.7], dtype=torch.float64), torch.float64)
    inputs = tuple(tensor.requires_grad_() for tensor in private.values())
    assert torch.autograd.gradcheck(projected, inputs)


def test_torch_func_composes():
    """vmap over per-example gradients, and jvp over the gradient, against loops and differences."""
    shape = (3, 4, 4)
    model = tiny(shape).double()
    state = state_of(model)
    images, timesteps = normal(3, *shape, dtype=torch.float64), torch.tensor([1.0, 300.0, 999.0], dtype=torch.float64)

    def gradient(image, timestep):
        def loss(weights):
            return functional_call(model, weights, (image[None], timestep[None])).square().mean()

        return grad(loss)(state)

    at_once = vmap(gradient)(images, timesteps)
    for i in range(3):
        for key, tensor in gradient(images[i], timesteps[i]).items():
            assert torch.allclose(at_once[key][i], tensor, atol=1e-12), key

    direction = normal(*shape, seed=4, dtype=torch.float64)
    _, tangent = jvp(lambda image: gradient(image, timesteps[0]), (images[0],), (direction,))
    step = 1e-5
    above, below = (gradient(images[0] + sign * step * direction, timesteps[0]) for sign in (1, -1))
    for key in tangent:
        assert torch.allclose(tangent[key], (above[key] - below[key]) / (2 * step), atol=1e-8), key
    mapped = vmap(lambda d: jvp(lambda image: gradient(image, timesteps[0]), (images[0],), (d,))[1])(
        torch.stack([direction, 2 * direction])
    )
    assert all(torch.allclose(mapped[key][1], 2 * tangent[key], atol=1e-12) for key in tangent)


def test_simulation_leaves_the_model_untouched(task):
    model = tiny()
    before = state_of(model)
    private = private_of((3, 4, 4), torch.tensor([5, 700]))
    received = simulate(model, state_of(model), task, [private, private], kind="weights", learning_rate=0.1)
    assert set(received) == set(before)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_float64_weights_may_be_handed_in():
    """The state decides the precision, also where the module itself holds float32."""
    model = tiny()
    state = {key: tensor.double() for key, tensor in state_of(model).items()}
    out = functional_call(model, state, (normal(2, 3, 4, 4, dtype=torch.float64), torch.tensor([1, 2])))
    assert out.dtype == torch.float64
