"""Adapters against PyTorch's own modules and optimiser, image by image, and the numbers of AnoVL.

NUMBERS were computed by AnoVL (commit 3a70bfd, TextAdapter and Adapter of model.py, loop and loss
of vl_test.py) on what `case` draws.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zsad.methods.adaptation import (
    PSEUDO,
    SIMILARITY,
    adapt,
    adapt_in_order,
    adapt_together,
    as_they_are,
    descend,
    discriminative_loss,
    draw_noise,
    dual_adapt,
    expand_per_image,
    pseudo_loss,
    synthesis_loss,
)
from zsad.methods.adapters import (
    ACTIVATIONS,
    ADAPTERS,
    TanhSum,
    anomaly_logit,
    code_adapter,
    draw_start,
    linear_adapter,
    start_shapes,
    text_adapter,
)
from zsad.methods.clip_baseline import anomaly_score


def gap(a, b):
    assert a.shape == b.shape, (a.shape, b.shape)
    return (a.double() - b.double()).abs().max().item()


def setting(B=4, N=9, C=16, K=5, S=5, seed=0, length=1.0):
    "Tokens, pair, sentences and noise of B images, each with sentences of its own."
    g = torch.Generator().manual_seed(seed)

    def n(*s):
        return torch.randn(*s, generator=g)

    T = F.normalize(0.5 * n(B, 1, C) + n(B, 2 * K, C), dim=-1)
    pair = F.normalize(torch.stack([T[:, :K].mean(1), T[:, K:].mean(1)], 1), dim=-1)
    return length * F.normalize(n(B, N, C), dim=-1), pair, T, 0.2 * n(B, S, N, C)


IDS = ['a', 'b', 'c', 'd']


def start_of(adapter, T, ids=IDS):
    return None if adapter in ('text', 'softmax') else draw_start(ids, adapter, T)


# --- one image at a time, with PyTorch's modules


class OneImage(nn.Module):
    "The adapter of one image as PyTorch would have it."

    def __init__(self, adapter, T, start):
        super().__init__()
        self.kind, self.T = adapter, T
        self.layer = nn.Linear(
            T.shape[1],
            T.shape[1] if adapter == 'linear' else len(T),
            bias=adapter in ('code', 'linear'),
        )
        with torch.no_grad():
            for a, b in zip(self.layer.parameters(), (T,) if start is None else start):
                a.copy_(b)

    def forward(self, p):
        if self.kind in ('text', 'softmax'):
            return (
                p
                + getattr(torch, 'tanh' if self.kind == 'text' else 'softmax')(
                    self.layer(p), *([] if self.kind == 'text' else [1])
                )
                @ self.T
            )
        answer = self.layer(p / p.norm(dim=1, keepdim=True))
        return 0.5 * p + 0.5 * (answer if self.kind == 'linear' else torch.tanh(answer) @ self.T)


def probability(p, pair, tau):
    return torch.softmax(F.normalize(p, dim=1) @ pair.T / tau, 1)[:, 1]


def train(module, optimizer, p, pair, noise, steps, pseudo, tau=1.0):
    "Train on one image; give unit tokens and losses."
    y, losses = probability(p, pair, tau), []
    for s in range(steps):
        a, b = (
            probability(module(p), pair, tau),
            probability(module(p + noise[s % len(noise)]), pair, tau),
        )
        loss = -((1 - a).log() + b.log()).mean() / 2
        if pseudo == 'printed':
            loss = loss - (a * a.log()).mean()
        elif pseudo == 'entropy':
            loss = loss - (a * a.log() + (1 - a) * (1 - a).log()).mean()
        else:
            loss = loss - (y * a.log() + (1 - y) * (1 - a).log()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        return F.normalize(module(p), dim=1), losses


def slow(p, pair, T, noise, adapter, pseudo, start, steps=5, lr=1e-3, tau=1.0):
    "In float64."
    out, curves = [], []
    for i in range(len(p)):
        m = OneImage(
            adapter, T[i].double(), None if start is None else [w[i] for w in start]
        ).double()
        tokens, losses = train(
            m,
            torch.optim.AdamW(m.parameters(), lr),
            p[i].double(),
            pair[i].double(),
            noise[i].double(),
            steps,
            pseudo,
            tau,
        )
        out.append(tokens)
        curves.append(losses)
    return torch.stack(out), torch.tensor(curves).T


@pytest.mark.parametrize('pseudo', list(PSEUDO))
@pytest.mark.parametrize('adapter', list(ADAPTERS))
def test_as_with_modules_and_an_optimiser_for_each_image(adapter, pseudo):
    p, pair, T, noise = setting(length=1 if adapter in ('text', 'softmax') else 3)
    start = start_of(adapter, T)
    for steps, lr, tau, draws in (
        (5, 1e-3, 1.0, noise),
        (3, 0.02, 0.2, noise[:, :1]),
        (1, 1e-3, 0.07, noise),
    ):
        want, losses = slow(p, pair, T, draws, adapter, pseudo, start, steps, lr, tau)
        got = adapt(
            p,
            pair,
            T,
            draws if draws.shape[1] > 1 else draws[:, 0],
            steps,
            lr,
            adapter,
            pseudo,
            tau,
            start,
        )
        assert gap(got, want) < 2e-6
        assert (
            gap(
                adapt_together(
                    *expand_per_image(p, pair, T, draws, start),
                    steps=steps,
                    lr=lr,
                    adapter=adapter,
                    pseudo=pseudo,
                    tau=tau,
                )[2],
                losses,
            )
            < 2e-6
        )
        assert gap(got, adapt(p, pair, T, draws, 0)) > 1e-3  # and they moved


# --- parts, written out


def test_logit_is_that_of_the_score_and_length_does_not_count():
    p, pair, *_ = setting()
    for tau in (1.0, 0.07):
        assert gap(anomaly_logit(p, pair, tau).sigmoid(), anomaly_score(p, pair, tau)) < 1e-6
        assert gap(anomaly_logit(5 * p, pair, tau), anomaly_logit(p, pair, tau)) < 1e-5
    for b in range(4):
        for i in range(9):
            assert (
                abs(
                    anomaly_logit(p, pair)[b, i].item()
                    - float(p[b, i] @ pair[b, 1] - p[b, i] @ pair[b, 0])
                )
                < 1e-6
            )
    assert gap(anomaly_logit(p, pair[2])[2], anomaly_logit(p, pair)[2]) < 1e-6
    assert gap(anomaly_logit(p, pair.flip(1)), -anomaly_logit(p, pair)) < 1e-6


def test_adapters_token_by_token():
    p, _, T, _ = setting(B=2, N=3, C=4, K=2, length=2.0)
    g = torch.Generator().manual_seed(1)
    w, b = torch.randn(2, 4, 4, generator=g), torch.randn(2, 4, generator=g)
    for i in range(2):
        for k in range(3):
            t, u, rows = p[i, k], p[i, k] / 2, T[i]
            called = [math.tanh(float(w[i, r] @ t)) for r in range(4)]
            assert (
                gap(text_adapter(p, T, w)[i, k], t + sum(c * rows[r] for r, c in enumerate(called)))
                < 1e-5
            )
            weights = [math.exp(float(w[i, r] @ t)) for r in range(4)]
            assert (
                gap(
                    text_adapter(p, T, w, 'softmax')[i, k],
                    t + sum(c / sum(weights) * rows[r] for r, c in enumerate(weights)),
                )
                < 1e-5
            )
            called = [math.tanh(float(w[i, r] @ u + b[i, r])) for r in range(4)]
            assert (
                gap(
                    code_adapter(p, T, w, b)[i, k],
                    0.5 * t + 0.5 * sum(c * rows[r] for r, c in enumerate(called)),
                )
                < 1e-5
            )
            for mix in (0.5, 0.2, 1.0):
                assert (
                    gap(
                        linear_adapter(p, w, b, mix)[i, k],
                        (1 - mix) * t
                        + mix * torch.stack([w[i, r] @ u + b[i, r] for r in range(4)]),
                    )
                    < 1e-5
                )
    assert gap(text_adapter(p, T[0], w)[0], text_adapter(p, T, w)[0]) < 1e-6  # one text for all
    assert set(ACTIVATIONS) == {'tanh', 'softmax'}


def exact_sum(p, T, w):
    return torch.tanh(p @ w.mT) @ T + p


@pytest.mark.parametrize('shared', [False, True])
def test_the_sum_over_prompts_has_the_gradients_of_its_equation(shared):
    "For every argument alone and for all, in float64; values within one millionth in float32."
    g = torch.Generator().manual_seed(0)
    shapes = (2, 3, 4), (5, 4) if shared else (2, 5, 4), (2, 5, 4)
    arguments = [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]
    for needed in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)):
        given = [t.clone().requires_grad_(bool(n)) for t, n in zip(arguments, needed)]
        assert torch.autograd.gradcheck(TanhSum.apply, given)
        torch.testing.assert_close(TanhSum.apply(*given), exact_sum(*given))
    for scale in (1e-4, 1, 30):
        p, T, w = (t.float() for t in arguments)
        far = gap(TanhSum.apply(p, T, scale * w), exact_sum(p, T, scale * w))
        assert far < 2e-6


def test_losses_number_by_number_and_where_they_saturate():
    S = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.9, 0.2]], dtype=torch.float64)
    R = S.flip(0)
    z, r = S.logit(), R.logit()
    y = torch.tensor([[0.5, 1.0, 0.0], [0.2, 0.7, 0.9]], dtype=torch.float64)
    for b in range(2):
        triples = list(zip(S[b].tolist(), R[b].tolist(), y[b].tolist()))
        log = math.log
        assert (
            abs(discriminative_loss(z, r)[b] - -sum(log(1 - s) + log(q) for s, q, _ in triples) / 6)
            < 1e-12
        )
        assert abs(pseudo_loss(z, y)[b] - -sum(s * log(s) for s, _, _ in triples) / 3) < 1e-12
        assert (
            abs(
                pseudo_loss(z, y, 'entropy')[b]
                - -sum(s * log(s) + (1 - s) * log(1 - s) for s, _, _ in triples) / 3
            )
            < 1e-12
        )
        assert (
            abs(
                pseudo_loss(z, y, 'frozen')[b]
                - -sum(t * log(s) + (1 - t) * log(1 - s) for s, _, t in triples) / 3
            )
            < 1e-12
        )
    mask = torch.tensor([[True, False, True], [False, True, False]])
    assert (
        gap(
            synthesis_loss(z, mask),
            -torch.stack([(S[0, 0].log() + S[0, 2].log()) / 2, S[1, 1].log()]),
        )
        < 1e-12
    )
    z = torch.tensor([[-300.0, 300.0, 0.0]], requires_grad=True)
    for loss in (
        discriminative_loss(z, -z),
        synthesis_loss(z, z < 1),
        *(pseudo_loss(z, torch.tensor([[1.0, 0.0, 0.5]]), k) for k in PSEUDO),
    ):
        assert loss.isfinite().all() and torch.autograd.grad(loss.sum(), z)[0].isfinite().all()


def test_similarities():
    S, J = torch.tensor([[0.2, 0.4], [1.0, 0.0]]), torch.tensor([[0.1, 0.2], [0.0, 1.0]])
    assert gap(SIMILARITY['square'](S, J), torch.tensor([(0.01 + 0.04) / 2, 1.0])) < 1e-7
    assert gap(SIMILARITY['cosine'](S, J), torch.tensor([0.0, 1.0])) < 1e-6


# --- steps


def written_out(w, g, m, v, t, lr):
    "Take one AdamW step as its equation is printed; changes w, m and v in place."
    m.lerp_(g, 0.1)
    v.mul_(0.999).addcmul_(g, g, value=0.001)
    root = v.sqrt().div_((1 - 0.999**t) ** 0.5).add_(1e-8)
    w.mul_(1 - 0.01 * lr).addcdiv_(m, root, value=-lr / (1 - 0.9**t))


@pytest.mark.parametrize('transposed', [False, True])
def test_steps_are_adamw_written_out(transposed):
    "Gradients from 1e-9 to 100, also where they lie transposed in memory."
    g = torch.Generator().manual_seed(0)
    w = torch.randn(3, 4, generator=g)
    powers = torch.randint(-9, 3, (11, 3, 4), generator=g)
    gradients = torch.randn(11, 3, 4, generator=g) * 10.0**powers

    def loss(s, x):
        if transposed:
            x = (torch.eye(4)[None] @ x[None].mT)[0].T  # its gradient has strides 1, 3
        return (gradients[s] * x).sum(1)

    given = w.T.contiguous().T if transposed else w
    (got,), (steps, (first,), (second,)), _ = descend([given], loss, 11, 0.03)
    m, v = torch.zeros(2, 3, 4)
    for t in range(11):
        written_out(w, gradients[t], m, v, t + 1, 0.03)
    assert steps == 11
    for a, b in ((got, w), (first, m), (second, v)):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=0)


def test_steps_of_a_batch_are_those_of_each_image_even_where_epsilon_matters():
    c = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    for scale in (1.0, 1e-8):

        def loss(rows):
            return lambda s, w: scale * ((w - c[rows]) ** 2).sum(1)

        together = descend([torch.zeros(4, 6)], loss(slice(None)), 9, 0.01)[0][0]
        for i in range(4):
            assert (
                gap(
                    descend([torch.zeros(1, 6)], loss(slice(i, i + 1)), 9, 0.01)[0][0],
                    together[i : i + 1],
                )
                < 1e-7
            )
        assert together.abs().max() > 1e-2


def test_descend_leaves_its_arguments_alone_and_can_be_broken():
    c, w0 = torch.arange(6.0).view(2, 3) - 2.5, [torch.zeros(2, 3), torch.ones(2, 1)]

    def loss(s, w, b):
        return ((w * b - c) ** 2).sum(1)

    whole = descend(w0, loss, 7, 0.1)
    first = descend(w0, loss, 3, 0.1)
    kept = [t.clone() for part in first[1][1:] for t in part]
    continued = descend(first[0], loss, 4, 0.1, first[1])
    assert (
        all(gap(a, b) < 1e-6 for a, b in zip(whole[0], continued[0]))
        and whole[1][0] == continued[1][0] == 7
    )
    assert gap(torch.cat([first[2], continued[2]]), whole[2]) < 1e-5 and whole[2].shape == (7, 2)
    assert (
        all(torch.equal(a, b) for a, b in zip(kept, [t for part in first[1][1:] for t in part]))
        and first[1][0] == 3
    )
    assert (
        torch.equal(w0[0], torch.zeros(2, 3))
        and not w0[0].requires_grad
        and not whole[0][0].requires_grad
    )
    fresh = descend(first[0], loss, 4, 0.1)
    assert gap(fresh[0][0], continued[0][0]) > 1e-3


# --- a batch


@pytest.mark.parametrize('adapter', list(ADAPTERS))
def test_a_batch_is_its_images_in_any_order_and_company(adapter):
    p, pair, T, noise = setting()
    start = start_of(adapter, T)
    a = adapt(p, pair, T, noise, adapter=adapter, start=start)

    def rows(i):
        return dict(adapter=adapter, start=None if start is None else [w[i] for w in start])

    for i in range(4):
        assert (
            gap(
                adapt(
                    p[i : i + 1],
                    pair[i : i + 1],
                    T[i : i + 1],
                    noise[i : i + 1],
                    **rows(slice(i, i + 1)),
                ),
                a[i : i + 1],
            )
            < 1e-6
        )
    assert (
        gap(
            adapt(p.flip(0), pair.flip(0), T.flip(0), noise.flip(0), **rows([3, 2, 1, 0])),
            a.flip(0),
        )
        < 1e-6
    )
    for chunk in (1, 2, 3, 4, 99):
        assert gap(adapt(p, pair, T, noise, adapter=adapter, start=start, chunk=chunk), a) < 1e-6
    broken = p.clone()
    broken[[0, 1, 3]] = float('nan')
    b = adapt(broken, pair, T, noise, adapter=adapter, start=start, chunk=4)
    assert gap(b[2], a[2]) < 1e-6 and b[0].isnan().all()


def test_no_chunk_is_larger_than_asked(monkeypatch):
    import zsad.methods.adaptation as module

    p, pair, T, noise = setting()
    seen, real = [], module.adapt_together
    monkeypatch.setattr(
        module, 'adapt_together', lambda p, *a, **k: seen.append(len(p)) or real(p, *a, **k)
    )
    for chunk, sizes in ((3, [3, 1]), (1, [1] * 4), (None, [4])):
        seen.clear()
        adapt(p, pair, T, noise, chunk=chunk)
        assert seen == sizes
    seen.clear()
    adapt(p, pair[0], torch.zeros(2**15, 16), noise, steps=1, start=[torch.zeros(4, 2**15, 16)])
    assert seen == [2, 2]  # 2**20 numbers


def test_one_text_for_all_is_that_text_for_each():
    p, pair, T, noise = setting()
    each = adapt(p, pair[:1].expand(4, -1, -1), T[:1].expand(4, -1, -1), noise)
    assert gap(adapt(p, pair[0], T[0], noise), each) < 1e-6
    assert gap(adapt(p, pair, T, noise), each) > 1e-3


def test_no_step_gives_the_tokens_as_they_are():
    p, pair, T, noise = setting()
    assert torch.equal(adapt(p, pair, T, noise, 0), p) and torch.equal(
        adapt(p, pair, T, noise[:, 0], steps=0), p
    )
    for scale in (0.1, 30.0):
        assert gap(adapt(scale * p, pair, T, noise, 0), p) < 1e-6
    mixed = p.clone()
    mixed[1] *= 3
    assert torch.equal(as_they_are(mixed)[0], p[0]) and gap(as_they_are(mixed), p) < 1e-6
    start = draw_start(IDS, 'code', T)
    tokens, moments = adapt_in_order(p, pair[0], T[0], noise, start, steps=0)
    assert torch.equal(tokens, p) and moments is None


def test_noise_of_each_step_is_used_once_or_one_for_all():
    p, pair, T, noise = setting(S=7)
    a = adapt(p, pair, T, noise, 5)
    assert torch.equal(
        adapt(p, pair, T, noise[:, :5], 5), a
    )  # more draws than steps: the first ones
    assert torch.equal(adapt(p, pair, T, noise[:, :1], 5), adapt(p, pair, T, noise[:, 0], 5))
    for s in range(5):
        other = noise.clone()
        other[2, s] += 0.3
        b = adapt(p, pair, T, other, 5)
        assert gap(b[2], a[2]) > 1e-6 and gap(b[[0, 1, 3]], a[[0, 1, 3]]) < 1e-7


def test_every_switch_switches():
    p, pair, T, noise = setting()
    a = adapt(p, pair, T, noise)
    for change in (
        dict(steps=6),
        dict(lr=2e-3),
        dict(adapter='softmax'),
        dict(pseudo='entropy'),
        dict(pseudo='frozen'),
        dict(tau=0.1),
        dict(start=[-T]),
    ):
        n = torch.cat([noise, noise[:, :1]], 1)
        assert gap(adapt(p, pair, T, n, **change), a) > 1e-5, change


@pytest.mark.parametrize('outer', [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_under_any_mode_and_from_inference_tensors_and_nothing_is_left_behind(outer):
    p, pair, T, noise = setting()
    w, b = draw_start(IDS, 'code', T)
    a = adapt(p, pair, T, noise)
    c = adapt(p, pair, T, noise, adapter='code', start=(w, b))
    with torch.inference_mode():
        frozen = [t.clone() for t in (p, pair, T, noise, w, b)]
    state = torch.random.get_rng_state()
    with outer():
        got = adapt(*frozen[:4]), adapt(*frozen[:4], adapter='code', start=frozen[4:])
        ordered, _ = adapt_in_order(frozen[0], frozen[1][0], frozen[2][0], frozen[3], frozen[4:])
        dual = dual_adapt(
            *frozen[:1],
            frozen[0] + frozen[3][:, 0],
            frozen[0][..., 0] > -1,
            anomaly_score(frozen[0], frozen[1]),
            frozen[1],
        )
    assert torch.equal(got[0], a) and torch.equal(got[1], c)
    assert torch.equal(torch.random.get_rng_state(), state) and not any(
        t.requires_grad or t.is_inference() for t in (*got, ordered, dual)
    )
    assert all(torch.equal(x, y) for x, y in zip(frozen, (p, pair, T, noise, w, b)))


def test_gradients_reach_the_adapter_only():
    given = [t.requires_grad_() for t in setting()]
    a = adapt(*given)
    assert not a.requires_grad
    dual_adapt(
        given[0],
        given[0] + given[3][:, 0],
        torch.ones(4, 9, dtype=torch.bool),
        torch.zeros(4, 9),
        given[1],
    )
    assert all(t.grad is None for t in given)


def test_tokens_of_half_precision_are_adapted_in_float32():
    p, pair, T, noise = setting()
    a = adapt(p.bfloat16(), pair, T, noise)
    assert a.dtype == torch.float32 and gap(a, adapt(p.bfloat16().float(), pair, T, noise)) == 0


@pytest.mark.parametrize(
    'change,words',
    [
        (dict(pseudo='soft'), r"pseudo='soft'.*'printed', 'entropy', 'frozen'"),
        (dict(adapter='mlp'), r"adapter='mlp'.*'text', 'softmax', 'code', 'linear'"),
        (dict(steps=-1), r'steps=-1.*whole number'),
        (dict(steps=2.5), r'steps=2.5.*whole number'),
        (dict(steps=9), r'noise: \[4, 5, 9, 16\].*steps=9.*draw_noise\(ids, \(9, 9, 16\)\)'),
        (dict(noise=torch.zeros(4, 8, 16)), r'noise: \[4, 8, 16\].*draw_noise\(ids, \(9, 16\)\)'),
        (dict(noise=torch.zeros(3, 5, 9, 16)), 'noise: .*does not fit'),
        (
            dict(adapter='code'),
            r'start: \[\[4, 10, 16\]\].*\[\[4, 10, 16\], \[4, 10\]\].*draw_start',
        ),
        (dict(adapter='linear'), 'start: .*draw_start'),
        (dict(start=[torch.zeros(3, 10, 16)]), 'start: .*leave it out'),
        (dict(adapter='linear', start=(torch.zeros(4, 16, 16), torch.zeros(4, 10))), 'start: '),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    p, pair, T, noise = setting()
    with pytest.raises(ValueError, match=words):
        adapt(p, pair, T, **{'noise': noise, **change})


# --- draws


def test_noise_belongs_to_seed_and_id():
    n = draw_noise(IDS, (50, 64), 3)
    assert n.shape == (4, 50, 64) and n.dtype == torch.float32
    assert torch.equal(draw_noise(IDS[::-1], (50, 64), 3), n.flip(0)) and torch.equal(
        draw_noise(['c'], (50, 64), 3)[0], n[2]
    )
    assert (
        torch.equal(draw_noise(['c'], (5, 50, 64), 3)[0, 0], n[2])
        and gap(draw_noise(IDS, (50, 64), 3, 0.055), 1.1 * n) < 1e-6
    )
    rows = torch.cat([n, draw_noise(IDS, (50, 64), 4)]).flatten(1)
    corr = torch.corrcoef(rows) - torch.eye(8)
    assert (
        corr.abs().max() < 0.1
        and abs(rows.std().item() - 0.05) < 1e-3
        and abs(rows.mean().item()) < 1e-3
    )


def test_starts_are_those_of_a_fresh_linear_layer():
    T = torch.zeros(2, 300, 64)
    w, b = draw_start(IDS, 'code', T, 1)
    layer = nn.Linear(64, 300)
    assert w.shape == (4, 300, 64) and b.shape == (4, 300) and w.dtype == torch.float32
    for t, u in ((w[0], layer.weight), (b.flatten(), layer.bias)):
        assert (
            abs(t.abs().max() - u.abs().max()) < 2e-3
            and abs(t.std() - u.std()) < 6e-3
            and t.abs().max() <= 0.125
        )
    repeated = draw_start(['d', 'b'], 'code', T, 1)
    assert torch.equal(repeated[0], w[[3, 1]]) and torch.equal(repeated[1], b[[3, 1]])
    assert gap(draw_start(IDS, 'code', T, 2)[0], w) > 0.1 and gap(w[0], w[1]) > 0.1
    assert [t.shape[1:] for t in draw_start(IDS, 'linear', T)] == [(64, 64), (64,)] and [
        t.shape for t in draw_start(IDS, 'text', T[0])
    ] == [(4, 300, 64)]
    assert start_shapes('softmax', T) == ((300, 64),)
    with pytest.raises(ValueError, match=r"adapter='x'"):
        draw_start(IDS, 'x', T)


# --- in order


@pytest.mark.parametrize(
    'adapter,pseudo',
    [('code', 'entropy'), ('linear', 'entropy'), ('code', 'printed'), ('text', 'frozen')],
)
def test_in_order_is_one_optimiser_whose_layer_is_set_anew_for_each_image(adapter, pseudo):
    p, pair, T, noise = setting(length=2.0)
    start = start_of(adapter, T[0])
    m = OneImage(adapter, T[0], None if start is None else [w[0] for w in start])
    o, out = torch.optim.AdamW(m.parameters(), 1e-3), []
    for i in range(4):
        with torch.no_grad():
            for a, w in zip(
                m.layer.parameters(), [T[0]] if start is None else [w[i] for w in start]
            ):
                a.copy_(w)
        out.append(train(m, o, p[i], pair[0], noise[i], 5, pseudo)[0])
    got, moments = adapt_in_order(p, pair[0], T[0], noise, start, adapter=adapter, pseudo=pseudo)
    assert gap(got, torch.stack(out)) < 2e-5 and moments[0] == 20
    first, middle = adapt_in_order(
        p[:3],
        pair[0],
        T[0],
        noise[:3],
        None if start is None else [w[:3] for w in start],
        adapter=adapter,
        pseudo=pseudo,
    )
    last, _ = adapt_in_order(
        p[3:],
        pair[0],
        T[0],
        noise[3:],
        None if start is None else [w[3:] for w in start],
        middle,
        adapter=adapter,
        pseudo=pseudo,
    )
    assert gap(torch.cat([first, last]), got) < 1e-6
    alone = adapt(p, pair[0], T[0], noise, adapter=adapter, pseudo=pseudo, start=start)
    assert gap(alone[0], got[0]) < 1e-6 and gap(alone[1:], got[1:]) > 1e-5
    turned, _ = adapt_in_order(
        p.flip(0),
        pair[0],
        T[0],
        noise.flip(0),
        None if start is None else [w.flip(0) for w in start],
        adapter=adapter,
        pseudo=pseudo,
    )
    assert gap(turned.flip(0), got) > 1e-5


# --- Dual-Image+


def dual_setting():
    p, pair, _, noise = setting()
    g = torch.Generator().manual_seed(5)
    mask = torch.rand(4, 9, generator=g) > 0.6
    mask[:, 0] = True
    mask[0] = False
    mask[0, 4] = True
    return p, F.normalize(p + noise[:, 0], dim=-1), mask, torch.rand(4, 9, generator=g), pair


@pytest.mark.parametrize(
    'steps,lr,lam,tau,similarity',
    [(2, 1e-3, 1.0, 0.07, 'square'), (4, 0.01, 0.3, 0.2, 'cosine'), (1, 0.02, 5.0, 1.0, 'square')],
)
def test_dual_as_with_a_linear_layer_for_each_image(steps, lr, lam, tau, similarity):
    p, p_syn, mask, joint, pair = dual_setting()
    got = dual_adapt(p, p_syn, mask, joint, pair, steps, lr, lam, tau, similarity)
    assert got.shape == (4, 9) and gap(got, anomaly_score(p, pair, tau)) > 1e-3
    for i in range(4):
        layer = nn.Linear(16, 16)
        o = torch.optim.AdamW(layer.parameters(), lr)
        with torch.no_grad():
            layer.weight.copy_(torch.eye(16))
            layer.bias.zero_()
        for _ in range(steps):
            S, S_syn = (
                probability(layer(p[i]), pair[i], tau),
                probability(layer(p_syn[i]), pair[i], tau),
            )
            like = (
                ((S - joint[i]) ** 2).mean()
                if similarity == 'square'
                else 1 - F.cosine_similarity(S, joint[i], dim=0)
            )
            loss = -S_syn[mask[i]].log().mean() + lam * like
            o.zero_grad()
            loss.backward()
            o.step()
        assert gap(probability(layer(p[i]), pair[i], tau), got[i]) < 1e-5 / tau


def test_dual_images_do_not_influence_each_other():
    p, p_syn, mask, joint, pair = dual_setting()
    got = dual_adapt(p, p_syn, mask, joint, pair)
    for i in range(4):
        assert (
            gap(dual_adapt(*(t[i : i + 1] for t in (p, p_syn, mask, joint, pair))), got[i : i + 1])
            < 1e-6
        )
    bad = p_syn.clone()
    bad[[0, 1, 3]] = float('nan')
    assert gap(dual_adapt(p, bad, mask, joint, pair)[2], got[2]) < 1e-6


def test_dual_off_positions_and_what_each_argument_does():
    p, p_syn, mask, joint, pair = dual_setting()
    got = dual_adapt(p, p_syn, mask, joint, pair)
    assert torch.equal(
        dual_adapt(p, p_syn, mask, joint, pair, steps=0), anomaly_score(p, pair, 0.07)
    )
    elsewhere = torch.where(mask[..., None], p_syn, -p_syn)
    assert (
        gap(dual_adapt(p, elsewhere, mask, joint, pair), got) < 1e-6
    )  # patches that are not painted do not count
    assert gap(dual_adapt(p, -p_syn, mask, joint, pair), got) > 1e-3
    assert (
        gap(
            dual_adapt(p, p_syn, mask, 1 - joint, pair, lam=0.0),
            dual_adapt(p, p_syn, mask, joint, pair, lam=0.0),
        )
        == 0
        and gap(dual_adapt(p, p_syn, mask, 1 - joint, pair), got) > 1e-3
    )
    text = anomaly_score(p, pair, 0.07)

    def far(lam):
        return (dual_adapt(p, p_syn, mask, text, pair, 20, lam=lam) - text).square().mean().item()

    assert far(0.0) > far(1.0) > far(100.0)
    up = dual_adapt(p, p, torch.ones(4, 9, dtype=torch.bool), text, pair, lam=0.0)
    assert (up.log().mean(1) > text.log().mean(1)).all()  # everything painted: everything rises
    for change in (dict(steps=3), dict(lr=2e-3), dict(tau=0.1), dict(similarity='cosine')):
        assert gap(dual_adapt(p, p_syn, mask, joint, pair, **change), got) > 1e-4
    assert gap(dual_adapt(p, p_syn, mask, joint, pair[0])[0], got[0]) < 1e-6


def test_dual_refuses_what_does_not_fit():
    p, p_syn, mask, joint, pair = dual_setting()
    empty = mask.clone()
    empty[2] = False
    for change, words in (
        (dict(mask=empty), r'images \[2\].*patch_mask.*force=True'),
        (dict(mask=mask.float()), r'float32.*bool'),
        (dict(p_syn=p_syn[:, :5]), r'p_syn: \[4, 5, 16\].*\[4, 9, 16\]'),
        (dict(joint=joint[:3]), r'joint: \[3, 9\].*\[4, 9\]'),
        (dict(mask=mask[:, :4]), 'mask: '),
        (dict(steps=-2), 'steps=-2'),
        (dict(similarity='bce'), r"similarity='bce'.*'square', 'cosine'"),
    ):
        with pytest.raises(ValueError, match=words):
            dual_adapt(**{**dict(p=p, p_syn=p_syn, mask=mask, joint=joint, pair=pair), **change})


# --- the numbers of AnoVL


def case():
    "Tokens, pair, prompts, noise and starts of both adapters: three images, 4 x 4, C = 32, K = 20."
    rng = np.random.default_rng(111)

    def n(*s):
        return torch.tensor(rng.standard_normal(s), dtype=torch.float32)

    def u(*s):
        return torch.tensor(rng.uniform(-1, 1, s) / 32**0.5, dtype=torch.float32)

    p, centre = 0.3 * n(3, 16, 32), n(1, 32)
    T = F.normalize(centre + n(40, 32), dim=-1)
    pair = torch.stack([F.normalize(T[:20].mean(0), dim=-1), F.normalize(T[20:].mean(0), dim=-1)])
    return (
        p,
        pair,
        T,
        0.055 * n(3, 5, 16, 32),
        dict(code=(u(3, 40, 32), u(3, 40)), linear=(u(3, 32, 32), u(3, 32))),
    )


NUMBERS = dict(
    losses=[
        1.3853168,
        1.3858951,
        1.3864944,
        1.3868302,
        1.3858504,
    ],  # of the first image, TextAdapter
    code_kept=[
        [
            0.4788726,
            0.5006747,
            0.5141975,
            0.5157807,
            0.4888307,
            0.4861043,
            0.5051476,
            0.5051931,
            0.4833976,
            0.4989929,
            0.4938779,
            0.4857548,
            0.5019114,
            0.5203371,
            0.4879691,
            0.4971185,
        ],
        [
            0.4875430,
            0.4967687,
            0.5060095,
            0.5062129,
            0.4921148,
            0.4903480,
            0.4880535,
            0.4995560,
            0.5049238,
            0.4907186,
            0.5040128,
            0.4828257,
            0.4994187,
            0.4933900,
            0.4995898,
            0.4950698,
        ],
        [
            0.4898581,
            0.5021093,
            0.4855360,
            0.5126458,
            0.4993758,
            0.5155451,
            0.4922707,
            0.5143822,
            0.5058185,
            0.4898507,
            0.4977258,
            0.5089811,
            0.5001503,
            0.5133938,
            0.5125692,
            0.5107917,
        ],
    ],
    code_fresh=[
        [
            0.4788726,
            0.5006747,
            0.5141975,
            0.5157807,
            0.4888307,
            0.4861043,
            0.5051476,
            0.5051931,
            0.4833976,
            0.4989929,
            0.4938779,
            0.4857548,
            0.5019114,
            0.5203371,
            0.4879691,
            0.4971185,
        ],
        [
            0.4868024,
            0.4961816,
            0.5058364,
            0.5062670,
            0.4917763,
            0.4902436,
            0.4878423,
            0.4991299,
            0.5047534,
            0.4906893,
            0.5038551,
            0.4831266,
            0.4989046,
            0.4926990,
            0.4988963,
            0.4946685,
        ],
        [
            0.4896862,
            0.5023358,
            0.4846942,
            0.5128733,
            0.4997755,
            0.5151137,
            0.4922110,
            0.5145384,
            0.5065994,
            0.4893690,
            0.4973603,
            0.5096858,
            0.4998326,
            0.5138562,
            0.5126494,
            0.5104391,
        ],
    ],
    linear_kept=[
        [
            0.4778748,
            0.4993860,
            0.5103201,
            0.5114653,
            0.4821575,
            0.4864176,
            0.4988393,
            0.4948431,
            0.4808077,
            0.4950177,
            0.4886802,
            0.4781280,
            0.4980537,
            0.5093008,
            0.4920410,
            0.4902004,
        ],
        [
            0.4878985,
            0.4953010,
            0.5022170,
            0.5021927,
            0.4926108,
            0.4922270,
            0.4819675,
            0.5057400,
            0.4995201,
            0.4846512,
            0.5048217,
            0.4799959,
            0.4948451,
            0.4903148,
            0.5026026,
            0.4977490,
        ],
        [
            0.4924254,
            0.4941776,
            0.4880502,
            0.5117574,
            0.4986103,
            0.5130697,
            0.4865942,
            0.5045652,
            0.5128664,
            0.4865308,
            0.4970323,
            0.5029237,
            0.4943186,
            0.5143373,
            0.5025296,
            0.5194081,
        ],
    ],
    linear_fresh=[
        [
            0.4778748,
            0.4993860,
            0.5103201,
            0.5114653,
            0.4821575,
            0.4864176,
            0.4988393,
            0.4948431,
            0.4808077,
            0.4950177,
            0.4886802,
            0.4781280,
            0.4980537,
            0.5093008,
            0.4920410,
            0.4902004,
        ],
        [
            0.4871951,
            0.4949165,
            0.5022039,
            0.5021765,
            0.4923133,
            0.4922340,
            0.4818448,
            0.5054058,
            0.4992131,
            0.4847619,
            0.5047250,
            0.4803578,
            0.4944137,
            0.4897653,
            0.5021371,
            0.4972981,
        ],
        [
            0.4922498,
            0.4942611,
            0.4878362,
            0.5116365,
            0.4993031,
            0.5130724,
            0.4866517,
            0.5047014,
            0.5135620,
            0.4859629,
            0.4969123,
            0.5037968,
            0.4942453,
            0.5149117,
            0.5027416,
            0.5195396,
        ],
    ],
)


@pytest.mark.parametrize('adapter', ['code', 'linear'])
def test_numbers_of_anovl(adapter):
    p, pair, T, noise, starts = case()
    want = {k: torch.tensor(t) for k, t in NUMBERS.items()}
    kept, _ = adapt_in_order(p, pair, T, noise, starts[adapter], adapter=adapter)
    fresh = adapt(p, pair, T, noise, adapter=adapter, pseudo='entropy', start=starts[adapter])
    assert (
        gap(anomaly_score(kept, pair), want[f'{adapter}_kept']) < 2e-6
        and gap(anomaly_score(fresh, pair), want[f'{adapter}_fresh']) < 2e-6
    )
    assert (
        gap(want[f'{adapter}_kept'], want[f'{adapter}_fresh']) > 5e-4
        and gap(anomaly_score(fresh, pair), anomaly_score(as_they_are(p), pair)) > 1e-3
    )
    if adapter == 'code':
        assert (
            gap(
                adapt_together(
                    *expand_per_image(p, pair, T, noise, starts['code']),
                    adapter='code',
                    pseudo='entropy',
                )[2][:, 0],
                want['losses'],
            )
            < 1e-6
        )
