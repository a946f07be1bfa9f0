"""Labels from the gradient of the last dense layer, without any search.

For mean cross entropy the bias gradient of class k is p̄_k − n_k/B: the mean predicted probability less the share of the
class in the batch. With one image the entry of its class is the only negative one, which is iDLG's rule and exact.
"""

import torch
from torch import Tensor, nn

from fedattack.errors import NotApplicable
from fedattack.tasks import bind
from fedattack.types import Knowledge, State, Update


def infer_labels(update: Update, model: nn.Module, knowledge: Knowledge, *, generator: torch.Generator) -> Tensor:
    """Class indices (B,) in ascending order of class, from the update alone.

    Source: one image: Zhao et al., iDLG (arXiv 2001.02610), Eq. 4-5, exact. Batches: n_k = B·(p̄_k − ∂L/∂b_k), rounded by
    largest remainders, with p̄ estimated on public images, or on uniform noise where there are none (the idea of Wainakh
    et al., LLG, arXiv 2105.09369); after several local steps it is an approximation. Raises NotApplicable where the model
    has no dense layer with one output a class.
    """
    batch, classes = knowledge.batch_size or 1, knowledge.num_classes
    if batch > 1 and update.kind == "weights" and knowledge.learning_rate is None:
        raise NotApplicable("learning_rate must be known to count the labels of a batch in a weight difference")
    steps = knowledge.local_steps or 1
    gradient = {name: value / steps for name, value in update.gradient(knowledge.learning_rate).items()}
    weight, bias = last_dense(model, gradient, classes)
    if bias is None:
        if batch > 1:
            raise NotApplicable("labels of a batch cannot be read off a last dense layer without a bias")
        rows = gradient[weight].double()
        if (
            len(rows) == 2
        ):  # ±(p − 1)·features: only the sign of the features, mostly not negative, tells which is which
            return rows.sum(1).argmin().reshape(1)
        return (rows @ rows.T).fill_diagonal_(0.0).sum(1).argmin().reshape(1)
    observed = gradient[bias].double()
    if batch == 1:
        return observed.argmin().reshape(1)
    counts = batch * (_mean_probability(update.sent, model, knowledge, generator) - observed)
    return _round_to_total(counts.clamp_min(0.0), batch)


def last_dense(model: nn.Module, gradient: State, classes: int | None) -> tuple[str, str | None]:
    """Names of weight and bias of the last Linear with `classes` outputs whose gradient was sent."""
    found: tuple[str, str | None] | None = None
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and classes in (None, module.out_features):
            prefix = f"{name}." if name else ""
            if f"{prefix}weight" in gradient:
                bias = f"{prefix}bias"
                found = (f"{prefix}weight", bias if module.bias is not None and bias in gradient else None)
    if found is None:
        raise NotApplicable(f"the model has no dense layer with {classes} outputs to read the labels from")
    return found


def _mean_probability(sent: State, model: nn.Module, knowledge: Knowledge, generator: torch.Generator) -> Tensor:
    if knowledge.public_images is not None:
        images = knowledge.public_images[:256]
    elif knowledge.image_shape is not None:
        images = torch.rand((64, *knowledge.image_shape), generator=generator)
    else:
        raise NotApplicable("image_shape or public_images must be known to infer the labels of a batch")
    some = next(t for t in sent.values() if t.is_floating_point())
    state = {name: tensor.clone() for name, tensor in sent.items()}
    with torch.no_grad():
        logits = bind(model, state)(images.to(some.device, some.dtype))
    return logits.double().softmax(-1).mean(0)


def _round_to_total(shares: Tensor, total: int) -> Tensor:
    """Non-negative shares -> class indices, `total` of them, by largest remainders."""
    scaled = shares * (total / shares.sum().clamp_min(1e-12))
    counts = scaled.floor()
    missing = total - int(counts.sum())
    counts[(scaled - counts).argsort(descending=True)[:missing]] += 1
    return torch.repeat_interleave(torch.arange(len(counts)), counts.long().cpu())
