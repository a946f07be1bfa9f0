"""Timesteps of a federated DDPM's private batch, read off the time embedding's gradient by linear algebra.

The first time-embedding layer is linear, so its gradient is ∂L/∂[W, b] = Σ_b δ_b [τ(t_b), 1]: its rows span the embeddings
of the batch's own timesteps, whatever the images and the noise were. τ is public; its T rows are obtained by probing the
model. Without noise the members are the t whose embedding lies in that span. With noise they maximise the likelihood
of G_i ~ N(0, σ²·I + Σ_b s_b²·τ_b τ_bᵀ), one i.i.d. row i per output of the layer: δ is integrated out, the members'
strengths s_b have a log-normal prior that is fitted along (trained U-Nets spread them over a factor of ten).

The second layer's input is a public function of t too (of the weights that were sent), with more dimensions and a richer
span: for one local step it takes over where the first one cannot separate the members, and under noise both likelihoods add.

Source: own derivation. The row-space argument is that of linear layers (Phong et al. 2018; Geiping et al. 2020, Prop. 3.1), the
span test MUSIC (Schmidt 1986), the likelihood that of sparse Bayesian learning with several measurements (Wipf, Rao 2007)
on a known number of atoms. GIDM (arXiv 2405.20380) searches t by the argmax of a softmax, which passes no gradient.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedattack.errors import FedattackError, NotApplicable, must
from fedattack.seeding import derive_generator, seeded_default_generator
from fedattack.tasks import Task, bind, parameter_names, schedule
from fedattack.types import Knowledge, State, Update

ROUNDING = 64.0  # noise below so many units in the last place is taken for the client's own rounding
LAYERS = 2  # tried in turn: linear_1 and linear_2 of a U-Net; behind them the table costs a pass over images
WIDTH_LEAST, WIDTH_MOST = 0.25, 1.0  # spread of log s among members: untrained U-Nets 0.15, trained ones 0.6 to 0.9


@dataclass(frozen=True)
class TimestepEstimate:
    """What the update says about its K = batch · local steps timesteps. Float tensors are float64.

    timesteps (K,) int64 ascending, in no relation to the order of the images. posterior (K,T): row k is the probability of
    every t for member k, the others held at their estimates: the full posterior where K = 1, a lower bound on the doubt
    elsewhere. log_likelihood (T,): of the best set in which one member is t (K = 1: of t), up to a constant; where `exact`,
    −½ residual in units of the noise, no more than a score. residuals (T,): 1 − ‖Vᵀτ̂(t)‖², the share of embedding t
    outside the row space. singular_values: of the layer's gradient as it was weighted. rank: distinct timesteps found.
    sigma: the noise assumed, in the update's units (rounding where there is no other). exact: the residuals alone tell
    `rank` members from all others, and these explain the update down to rounding; which of them occur twice (rank < K) is
    still a guess, by power. layer: the layers used, joined by " + "; residuals, singular values and sigma are the first one's.
    """

    timesteps: Tensor
    posterior: Tensor
    log_likelihood: Tensor
    residuals: Tensor
    singular_values: Tensor
    rank: int
    sigma: float
    exact: bool
    layer: str

    def credible_set(self, member: int = 0, mass: float = 0.99) -> Tensor:
        """The fewest timesteps, ascending, that hold the given posterior mass of one member."""
        order = self.posterior[member].argsort(descending=True)
        before = self.posterior[member][order].cumsum(0) - self.posterior[member][order]
        return order[before < mass].sort().values


def infer_timesteps(
    update: Update, model: nn.Module, task: Task, knowledge: Knowledge, *, sigma: float | None = None, sweeps: int = 6
) -> TimestepEstimate:
    """The timesteps of all images of all local steps, from the update and the public embedding alone.

    sigma: standard deviation of Gaussian noise on every entry of the update's gradient (`update.gradient(learning_rate)`);
    None estimates it from the smallest singular values. sweeps: most passes of the coordinate search, run under noise
    only. Several local steps of plain SGD (FedProx too) only add members, since the embedding does not depend on the
    weights. Weight decay, Adam, pruning and quantisation leave the span and count as noise. A class embedding that is
    added behind the layer changes nothing; a model that cannot be called without the class is refused.

    Raises NotApplicable for other tasks, where no dense layer sees the timestep and nothing else, where it was
    not sent, and where the members fill the layer's dimensions; MissingKnowledge for batch_size and image_shape.
    """
    if sigma is not None and not sigma >= 0:
        raise FedattackError(must("sigma", "zero or positive, or None", sigma))
    steps = getattr(task, "num_train_timesteps", None)
    if task.name != "diffusion" or not isinstance(steps, int):
        raise NotApplicable(must("the task", "diffusion: no other has timesteps", task.name))
    members = sum(len(indices) for indices in schedule(knowledge))
    assert knowledge.image_shape is not None
    gradient = update.gradient(knowledge.learning_rate)
    several = (knowledge.local_steps or 1) > 1
    usable: list[_Fit] = []
    refusals: list[NotApplicable] = []
    names = set(gradient)
    for _ in range(LAYERS):
        try:
            layer, table = timestep_table(model, update.sent, names, knowledge.image_shape, steps, several)
            names -= {f"{layer}.weight"}
            fit = _weigh(layer, gradient, table, members, sigma)
        except NotApplicable as reason:
            refusals.append(reason)
            continue
        if (found := _by_span(fit, members)) is not None:
            return found
        usable.append(fit)
    if not usable:
        raise refusals[0]
    return _by_likelihood(usable, members, sweeps)


def with_timesteps(
    update: Update, model: nn.Module, task: Task, knowledge: Knowledge, *, sigma: float | None = None
) -> Knowledge:
    """`knowledge` with its timesteps filled in by `infer_timesteps`: an estimate of the attacker, no oracle.

    Timesteps that are known already stay. The pairing with images is arbitrary: members come ascending, the client's order
    is not in the layer's gradient (a sum), so for batches an attack must search the permutation, or let each image follow
    its timestep: images are only defined up to order anyway with ONE local step. With several local steps the assignment of
    members to steps matters too and is unknown. Raises what `infer_timesteps` raises.
    """
    if knowledge.timesteps is not None:
        return knowledge
    return replace(knowledge, timesteps=infer_timesteps(update, model, task, knowledge, sigma=sigma).timesteps)


# ------------------------------------------------------------------------------------------------ the public table
class _Enough(Exception):
    """Stops a probing forward pass behind the layer it was made for."""


def timestep_table(
    model: nn.Module,
    sent: State,
    received: set[str],
    image_shape: tuple[int, int, int],
    steps: int,
    several: bool = False,
) -> tuple[str, Tensor]:
    """Name of the first dense layer that sees the timestep and nothing else, and its inputs for t = 0 … T−1, (T,D) float64.

    Found by two images at equal and different timesteps, weights `sent` in their own precision (so that a float32 table is
    the client's own). The forward pass stops at the layer. `received`: names of the tensors that were sent back; `several`
    local steps: refuses a layer whose input moves with trained weights. Raises NotApplicable with the reason.
    """
    linear: dict[nn.Module, str] = {
        module: name for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    dtype = next(t.dtype for t in sent.values() if t.is_floating_point())
    device = next(t.device for t in sent.values() if t.is_floating_point())
    images = torch.rand((2, *image_shape), generator=derive_generator(0, "timestep-probe")).to(device, dtype)
    low, middle, high = 0, steps // 2, steps - 1
    times = torch.tensor([low, low, middle, middle, high, high], device=device)
    pairs = images[torch.tensor([0, 1, 0, 1, 0, 1], device=device)]
    unsent: list[str] = []
    chosen: list[str] = []

    def examine(module: nn.Module, seen: Tensor) -> None:
        if not _only_time(seen):
            return
        if f"{linear[module]}.weight" not in received:
            unsent.append(linear[module])
            return
        chosen.append(linear[module])
        raise _Enough

    _probe(model, sent, pairs, times, list(linear), examine)
    if not chosen and unsent:
        raise NotApplicable(f"the update does not hold {unsent[0]}.weight, the layer that sees the timestep")
    if not chosen:
        raise NotApplicable("no dense layer of the model sees the timestep and nothing else")
    (name,) = chosen
    module = next(module for module, called in linear.items() if called == name)

    def inputs_of(state: State) -> Tensor:
        kept: list[Tensor] = []

        def keep(_: nn.Module, seen: Tensor) -> None:
            kept.append(seen.detach().double())
            raise _Enough

        for first in range(0, steps, 256):
            times = torch.arange(first, min(first + 256, steps), device=device)
            _probe(model, state, images[:1].expand(len(times), *image_shape), times, [module], keep)
        return torch.cat(kept)

    table = inputs_of(sent)
    if several:
        trained = set(parameter_names(model)) & received
        moved = {key: 1.25 * value + 0.01 if key in trained else value for key, value in sent.items()}
        if not torch.allclose(inputs_of(moved), table, rtol=1e-5, atol=1e-6):
            raise NotApplicable(f"the input of layer {name!r} moves with the weights, so local steps do not add up")
    return name, table


def _only_time(seen: Tensor) -> bool:
    """Whether six inputs (images 0, 1, 0, 1, 0, 1 at three timesteps) depend on the timestep and on it alone."""
    if seen.ndim != 2 or len(seen) != 6 or not bool(seen.isfinite().all()):
        return False
    first, second = seen[0::2].double(), seen[1::2].double()
    scale = float(seen.abs().max())
    same = float((first - second).abs().max()) <= 1e-6 * scale
    apart = torch.pdist(first)
    return same and float(apart.min()) > 1e-4 * scale


def _probe(
    model: nn.Module,
    state: State,
    images: Tensor,
    times: Tensor,
    modules: Sequence[nn.Module],
    look: Callable[[nn.Module, Tensor], None],
) -> None:
    """One forward pass without gradients that calls look(module, input) in front of each of `modules`; hooks go again."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        look(module, inputs[0])

    handles = [module.register_forward_pre_hook(hook) for module in modules]
    copies = {name: tensor.clone() for name, tensor in (dict(model.named_buffers()) | state).items()}
    try:
        with torch.no_grad(), seeded_default_generator(0):
            bind(model, copies)(images, times)
    except _Enough:
        pass
    except (TypeError, ValueError) as reason:
        raise NotApplicable(f"the model cannot be probed with images and timesteps alone: {reason}") from reason
    finally:
        for handle in handles:
            handle.remove()


# ------------------------------------------------------------------------------------------------ from span to members
@dataclass(frozen=True)
class _Fit:
    """One layer's gradient rows compressed to (k,D), table (T,D), `count` true rows, noise of an entry, in one weighting.

    clean: nothing but rounding; then rows and columns are weighed by their size, as rounding is. power is of the rows as
    they came (`raw` (n,D), `columns` (T,D)); unit: what an entry of 1 is in the update's units.
    """

    layer: str
    rows: Tensor
    table: Tensor
    count: int
    sigma: float
    clean: bool
    unit: float
    raw: Tensor
    columns: Tensor


def _weigh(layer: str, gradient: State, table: Tensor, members: int, sigma: float | None) -> _Fit:
    """G = ∂L/∂[W, b] and the table [τ, 1] in the weighting that its noise asks for."""
    weight = gradient[f"{layer}.weight"]
    raw, eps = weight.double(), torch.finfo(weight.dtype).eps
    if (bias := gradient.get(f"{layer}.bias")) is not None:
        raw = torch.cat([raw, bias.double()[:, None]], dim=1)
        table = torch.cat([table, torch.ones_like(table[:, :1])], dim=1)
    if not bool(raw.isfinite().all()) or not float(raw.abs().max()) > 0:
        raise NotApplicable(f"the gradient of layer {layer!r} is zero or not finite: it says nothing about timesteps")
    if members >= (most := min(raw.shape)):
        raise NotApplicable(f"{members} timesteps fill the {most} dimensions that layer {layer!r} tells apart")
    unit = float(raw.square().mean().sqrt())
    sizes = table.square().mean(0).sqrt()
    sizes = torch.where(sizes > 0, sizes, 1.0)
    strength = (raw / sizes).square().mean(1).sqrt()
    alive = strength > 1e-12 * strength.max()
    relative = raw[alive] / sizes / strength[alive, None]
    tail = _tail(relative, members)
    clean = tail < ROUNDING * eps if sigma is None else sigma < ROUNDING * eps * unit
    if clean:
        rows, seen, noise = relative, table / sizes, max(tail, eps / 4, 4e-15)  # double precision itself ends there
    else:
        rows, seen = raw / unit, table
        noise = _tail(rows, members) if sigma is None else sigma / unit
    count = len(rows)
    if count > rows.shape[1]:
        rows = torch.linalg.qr(rows, mode="r").R
    return _Fit(layer, rows, seen, count, noise, clean, unit, raw, table)


def _span(fit: _Fit, members: int) -> tuple[Tensor, int, Tensor]:
    """Singular values of the rows, how many of at most `members` stand above the noise, residuals (T,) from their span."""
    _, values, basis = torch.linalg.svd(fit.rows, full_matrices=False)
    rank = min(members, int((values > fit.sigma * (fit.count**0.5 + fit.table.shape[1] ** 0.5)).sum()))
    return values, rank, _residuals(fit.table, basis[: max(rank, 1)])


def _by_span(fit: _Fit, members: int) -> TimestepEstimate | None:
    """The estimate where the span alone tells the members from all others, or None."""
    if not fit.clean:
        return None
    values, rank, residuals = _span(fit, members)
    if (distinct := _separated(fit, residuals, rank)) is None:
        return None
    powers = torch.linalg.lstsq(fit.columns[distinct].T, fit.raw.T).solution.square().sum(1)
    chosen = _multiplied(distinct, powers, members)
    return TimestepEstimate(
        timesteps=chosen,
        posterior=nn.functional.one_hot(chosen, len(fit.table)).double(),
        log_likelihood=-0.5 * residuals * float(values[len(distinct) - 1] / fit.sigma) ** 2,
        residuals=residuals,
        singular_values=values,
        rank=len(distinct),
        sigma=fit.sigma * fit.unit,
        exact=True,
        layer=fit.layer,
    )


def _by_likelihood(fits: Sequence[_Fit], members: int, sweeps: int) -> TimestepEstimate:
    """The estimate by the likeliest multiset of members; layers are independent given it. Figures are the first layer's."""
    values, _, residuals = _span(fits[0], members)
    if members == 1:
        chosen, scores, posterior = _single(fits)
    else:
        chosen, scores, posterior = _search(fits, members, residuals, sweeps)
    return TimestepEstimate(
        timesteps=chosen,
        posterior=posterior,
        log_likelihood=scores,
        residuals=residuals,
        singular_values=values,
        rank=len(set(chosen.tolist())),
        sigma=fits[0].sigma * fits[0].unit,
        exact=False,
        layer=" + ".join(fit.layer for fit in fits),
    )


def _tail(rows: Tensor, members: int) -> float:
    """Rms of an entry of the noise in rows (n,D), from the singular values behind the first `members`."""
    freedom = (rows.shape[0] - members) * (rows.shape[1] - members)
    return float(torch.linalg.svdvals(rows)[members:].square().sum() / freedom) ** 0.5 if freedom > 0 else 0.0


def _residuals(table: Tensor, basis: Tensor) -> Tensor:
    """Share of every row of the table outside the span of the orthonormal rows of `basis`, (T,)."""
    unit = table / table.norm(dim=1, keepdim=True)
    outside: Tensor = (unit - unit @ basis.T @ basis).square().sum(1)
    return outside


def _separated(fit: _Fit, residuals: Tensor, rank: int) -> Tensor | None:
    """The members, ascending, if their residuals stand apart from all others and they explain the rows; else None.

    Rounding is not white: `rank` may count a direction of it beside the members' own, so fewer members are tried too.
    """
    order = residuals.argsort()[: rank + 1]
    jumps = residuals[order[1:]] / residuals[order[:-1]].clamp_min(1e-32)
    allowed = 4.0 * fit.sigma**2 * fit.count * fit.table.shape[1]
    for members in range(len(jumps), 0, -1):
        if jumps[members - 1] < 25.0:
            continue
        chosen = order[:members].sort().values
        span = torch.linalg.qr(fit.table[chosen].T).Q
        if float((fit.rows - fit.rows @ span @ span.T).square().sum()) <= allowed:
            return chosen
    return None


def _multiplied(distinct: Tensor, powers: Tensor, members: int) -> Tensor:
    """Members with repetition: every extra goes where the power ‖δ_t‖² per member is largest, ascending."""
    counts = torch.ones_like(distinct)
    for _ in range(members - len(distinct)):
        counts[(powers / (counts * (counts + 1))).argmax()] += 1
    return torch.repeat_interleave(distinct, counts)


# ------------------------------------------------------------------------------------------------ likelihood
def _single(fits: Sequence[_Fit]) -> tuple[Tensor, Tensor, Tensor]:
    """One member: the exact posterior over t under a flat prior, every layer's s integrated over a log-uniform grid."""
    scores = torch.zeros_like(fits[0].table[:, 0])
    for fit in fits:
        energy = (fit.rows @ fit.table.T).square().sum(0) / fit.sigma**4
        length = fit.table.square().sum(1) / fit.sigma**2
        grid = _grid(fit)[:, None] ** 2
        at = 0.5 * grid * energy / (1 + grid * length) - 0.5 * fit.count * torch.log1p(grid * length)
        scores = scores + at.logsumexp(0)
    return scores.argmax()[None], scores - scores.max(), scores.softmax(0)[None]


def _grid(fit: _Fit) -> Tensor:
    """Plausible s: from where `count` rows of noise begin to hide a member to twice the whole observed power in one."""
    length = float(fit.table.square().sum(1).mean())
    most = (float(fit.rows.square().sum()) / fit.count / length) ** 0.5
    least = min(0.5 * fit.sigma / length**0.5 / fit.count**0.25, 0.5 * most)
    span = torch.linspace(0.0, 1.0, 121, dtype=torch.float64, device=fit.table.device)
    grid: Tensor = 2.0 * most * (least / (2.0 * most)) ** span
    return grid


@dataclass(frozen=True)
class _Prior:
    """log s of a member is normal around log(center), with standard deviation width."""

    center: float
    width: float

    def grid(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Nine values of s within ±2.5 standard deviations and their log-probabilities."""
        steps = torch.linspace(-2.5, 2.5, 9, dtype=torch.float64, device=like.device)
        return self.center * (self.width * steps).exp(), (-0.5 * steps.square()).log_softmax(0)


def _gains(fit: _Fit, chosen: Tensor, spreads: Tensor, prior: _Prior) -> tuple[Tensor, Tensor]:
    """By how much the log-likelihood rises when t joins `chosen` with their s `spreads`, (T,), and t's own best s, (T,).

    With C = σ²I + Σ s_b²τ_b τ_bᵀ it is ½·s²‖G C⁻¹τ‖²/(1 + s²τᵀC⁻¹τ) − n/2·log(1 + s²τᵀC⁻¹τ), s integrated over its
    prior; C^(−½) by singular values, which holds down to σ near the precision itself.
    """
    rows, table = fit.rows / fit.sigma, fit.table / fit.sigma
    if len(chosen):
        scaled = fit.table[chosen] * spreads[:, None] / fit.sigma
        _, values, basis = torch.linalg.svd(scaled, full_matrices=False)
        shrink = 1.0 - (1.0 + values.square()).rsqrt()
        rows = rows - (rows @ basis.T * shrink) @ basis
        table = table - (table @ basis.T * shrink) @ basis
    length, energy = table.square().sum(1), (table @ rows.T).square().sum(1)
    grid, weight = prior.grid(table)
    squares = grid[:, None].square()
    scores = 0.5 * squares * energy / (1 + squares * length) - 0.5 * fit.count * torch.log1p(squares * length)
    scores = scores + weight[:, None]
    return scores.logsumexp(0), grid[scores.argmax(0)]


def _search(fits: Sequence[_Fit], members: int, residuals: Tensor, sweeps: int) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest multiset: from the smallest residuals and from a greedy start, refined one member at a time."""
    priors = [_Prior(_power(fit, members), 0.5) for fit in fits]
    starts = [residuals.argsort()[:members], _greedy(fits, members, priors)]
    ends = [_refine(fits, start, priors, sweeps) for start in starts]
    chosen, _, gains = max(ends, key=lambda end: end[1])
    chosen, order = chosen.sort()
    gains = gains[order]
    base = gains.gather(1, chosen[:, None])
    return chosen, (gains - base).max(0).values, gains.softmax(1)


def _power(fit: _Fit, members: int) -> float:
    """s of a member from the total power over what noise alone would leave."""
    total = float(fit.rows.square().sum()) / fit.count
    signal = max(total - fit.sigma**2 * fit.table.shape[1], 1e-3 * total)
    return math.sqrt(signal / members / float(fit.table.square().sum(1).mean()))


def _joint(
    fits: Sequence[_Fit], chosen: Tensor, spreads: Sequence[Tensor], priors: Sequence[_Prior]
) -> tuple[Tensor, list[Tensor]]:
    """`_gains` summed over layers, and every layer's best s (T,)."""
    each = [_gains(fit, chosen, own, prior) for fit, own, prior in zip(fits, spreads, priors, strict=True)]
    return torch.stack([gains for gains, _ in each]).sum(0), [best for _, best in each]


def _greedy(fits: Sequence[_Fit], members: int, priors: Sequence[_Prior]) -> Tensor:
    chosen = torch.zeros(0, dtype=torch.int64, device=fits[0].table.device)
    spreads = [fit.table.new_zeros(0) for fit in fits]
    for _ in range(members):
        gains, best = _joint(fits, chosen, spreads, priors)
        t = gains.argmax()[None]
        chosen = torch.cat([chosen, t])
        spreads = [torch.cat([own, found[t]]) for own, found in zip(spreads, best, strict=True)]
    return chosen


def _score(fit: _Fit, chosen: Tensor, spreads: Tensor, prior: _Prior) -> float:
    """Joint log-density of the rows and the members' s, up to a constant."""
    scaled = fit.table[chosen] * spreads[:, None] / fit.sigma
    _, values, basis = torch.linalg.svd(scaled, full_matrices=False)
    ratio = values.square()
    seen = (fit.rows @ basis.T).square().sum(0) / fit.sigma**2
    fitted = (0.5 * seen * ratio / (1 + ratio) - 0.5 * fit.count * torch.log1p(ratio)).sum()
    off = (spreads / prior.center).log() / prior.width
    return float(fitted - 0.5 * off.square().sum()) - len(chosen) * math.log(prior.width)


def _refine(
    fits: Sequence[_Fit], chosen: Tensor, priors: Sequence[_Prior], sweeps: int
) -> tuple[Tensor, float, Tensor]:
    """Every member in turn replaced by the likeliest t, until a sweep changes nothing: members, score, gains (K,T)."""
    chosen = chosen.clone()
    spreads = [torch.full_like(fit.table[chosen, 0], prior.center) for fit, prior in zip(fits, priors, strict=True)]
    gains = fits[0].table.new_zeros(len(chosen), len(fits[0].table))
    for _ in range(sweeps):
        before = chosen.clone()
        for member in range(len(chosen)):
            others = torch.arange(len(chosen), device=chosen.device) != member
            gains[member], best = _joint(fits, chosen[others], [own[others] for own in spreads], priors)
            t = gains[member].argmax()
            if gains[member, t] > gains[member, chosen[member]] + 1e-9:
                chosen[member] = t
            for own, found in zip(spreads, best, strict=True):
                own[member] = found[chosen[member]]
        logs = [own.log() for own in spreads]
        priors = [_Prior(float(x.mean().exp()), float(x.std().clamp(WIDTH_LEAST, WIDTH_MOST))) for x in logs]
        if torch.equal(chosen, before):
            break
    score = sum(_score(fit, chosen, own, prior) for fit, own, prior in zip(fits, spreads, priors, strict=True))
    return chosen, score, gains
