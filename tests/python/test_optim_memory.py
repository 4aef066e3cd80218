"""Optimisers of small memory against float64 formulas, torch's optimisers and bitsandbytes' map."""

import copy
import math

import bitsandbytes
import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import budwood
from budwood import _C
from budwood.optim import (
    LISA,
    AdaLomo,
    AdamW8bit,
    BAdam,
    GaLoreAdamW,
    Lomo,
    MeZO,
    galore_groups,
)


class Net(nn.Module):
    """Blocks, a table that is also the head, and a norm."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 32)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32), nn.Dropout(dropout))
            for _ in range(4)
        )
        self.norm = nn.LayerNorm(32)

    def forward(self, ids, labels):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        logits = self.norm(x) @ self.embed.weight.T
        return nn.functional.cross_entropy(logits, labels)


def batch(step):
    generator = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(0, 50, (2, 24), generator=generator).flatten()
    return ids[:-1], ids[1:]


def pair():
    model = Net()
    return model, copy.deepcopy(model)


def distance(one, two):
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_lomo_is_sgd_with_tied_tensors_summed(clip):
    ours, theirs = pair()
    lomo = Lomo(ours, lr=0.1, clip_grad_norm=clip)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1)
    for step in range(5):
        lomo.backward(ours(*batch(step)))
        theirs(*batch(step)).backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), clip or math.inf)
        sgd.step()
        sgd.zero_grad()
        if clip:
            assert lomo.grad_norm == pytest.approx(norm.item(), rel=1e-5)
        assert all(p.grad is None for p in ours.parameters())
    assert distance(ours, theirs) < 1e-6


def test_lomo_clips_values_and_takes_no_closure():
    ours, theirs = pair()
    lomo = Lomo(ours, lr=0.1, clip_grad_value=1e-3, weight_decay=0.1)
    lomo.backward(ours(*batch(0)))
    theirs(*batch(0)).backward()
    with torch.no_grad():
        for p in theirs.parameters():
            decay = 0.1 * 0.1 if p.dim() >= 2 else 0.0
            p.mul_(1 - decay).sub_(0.1 * p.grad.clamp(-1e-3, 1e-3))
    assert distance(ours, theirs) < 1e-7
    with pytest.raises(budwood.Error, match="backward"):
        lomo.step(lambda: 0)
    ours(*batch(0)).backward()  # not its own
    with pytest.raises(budwood.Error, match="has a gradient already"):
        lomo.backward(ours(*batch(0)))
    with pytest.raises(budwood.Error, match="one number"):
        lomo.backward(torch.zeros(2, requires_grad=True))


def test_one_gradient_is_alive_at_a_time():
    model = Net()
    alive, most = 0, 0

    def seen(p):
        nonlocal alive, most
        alive = sum(q.grad.numel() for q in model.parameters() if q.grad is not None)
        most = max(most, alive)

    lomo = Lomo(model, lr=0.1)
    handles = [p.register_hook(lambda grad, p=p: seen(p)) for p in model.parameters()]
    lomo.backward(model(*batch(0)))
    assert handles
    assert most == 0  # when a gradient arrives, those before it are gone


class TwiceUsed(nn.Module):
    """A weight inside and outside of a checkpointed part."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x, reentrant):
        y = torch.utils.checkpoint.checkpoint(
            lambda t: torch.tanh(t @ self.w), x, use_reentrant=reentrant
        )
        return (y @ self.w).square().sum()


def test_a_gradient_in_two_pieces_is_refused_before_anything_changes():
    model = TwiceUsed()
    before = model.w.detach().clone()
    x = torch.randn(3, 4, requires_grad=True)
    lomo = Lomo(model, lr=0.1, clip_grad_norm=1.0)
    with pytest.raises(RuntimeError, match=r"came in two pieces.*nothing has changed"):
        lomo.backward(model(x, True))
    assert torch.equal(model.w, before)
    model.w.grad = None
    lomo.backward(model(x, False))
    assert not torch.equal(model.w, before)


@pytest.mark.parametrize("name", _C.update_rules())
def test_gradients_in_any_layout_are_taken(name):
    torch.manual_seed(0)
    weight, gradient = torch.randn(6, 4), torch.randn(6, 4)
    found = []
    for grad in (gradient.clone(), gradient.T.contiguous().T):
        p = weight.clone()
        rule = _C.UpdateRule(name, min_8bit_size=1, rank=2)
        rule.update(p, grad, rule.fresh(p), 0.1)
        found.append(p)
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-6)


def test_adalomo_is_its_formula_in_float64():
    ours, theirs = pair()
    theirs.double()
    adalomo = AdaLomo(ours, lr=0.05)
    states = {p: {} for p in theirs.parameters()}
    for step in range(1, 6):
        adalomo.backward(ours(*batch(step)))
        theirs(*batch(step)).backward()
        beta = 1 - step**-0.8
        for p, state in states.items():
            g, square = p.grad, p.grad**2 + 1e-30
            if p.dim() == 2:
                state["r"] = beta * state.get("r", 0) + (1 - beta) * square.mean(1)
                state["c"] = beta * state.get("c", 0) + (1 - beta) * square.mean(0)
                u = g * (state["r"] / state["r"].mean()).rsqrt()[:, None] * state["c"].rsqrt()
            else:
                state["v"] = beta * state.get("v", 0) + (1 - beta) * square
                u = g * state["v"].rsqrt()
            u = u / max(1, u.square().mean().sqrt())
            with torch.no_grad():
                p -= 0.05 * max(1e-3, p.square().mean().sqrt()) * u
            p.grad = None
    assert distance(ours, theirs) < 2e-5


def galore_reference(p, grad, state, lr, rank, gap, scale):
    """The paper's algorithm, by torch's SVD, in float64."""
    grad = grad.double()
    tall = grad.shape[0] >= grad.shape[1]
    if state.get("step", 0) % gap == 0:
        u, _, vt = torch.linalg.svd(grad, full_matrices=False)
        state["P"] = vt[:rank] if tall else u[:, :rank].T
        signs = state["P"].gather(1, state["P"].abs().argmax(1, keepdim=True)).sign()
        state["P"] = state["P"] * signs
    state["step"] = state.get("step", 0) + 1
    low = grad @ state["P"].T if tall else state["P"] @ grad
    state["m"] = 0.9 * state.get("m", 0) + 0.1 * low
    state["v"] = 0.999 * state.get("v", 0) + 0.001 * low**2
    n = state["m"] / (state["v"].sqrt() + 1e-6)
    n = n * math.sqrt(1 - 0.999 ** state["step"]) / (1 - 0.9 ** state["step"])
    return p - lr * scale * (n @ state["P"] if tall else state["P"].T @ n)


def test_galore_is_the_papers_algorithm():
    ours, theirs = pair()
    theirs.double()
    groups = galore_groups(ours, rank=8, update_proj_gap=2)
    assert len(groups[0]["params"]) == 8
    assert all(not any(p is q for q in groups[0]["params"]) for p in [ours.embed.weight])
    galore = GaLoreAdamW(groups, lr=0.01)
    plain = torch.optim.AdamW(
        [p for n, p in theirs.named_parameters() if not (".weight" in n and "layers" in n)],
        lr=0.01,
        eps=1e-6,
        weight_decay=0,
    )
    states = {n: {} for n, _ in theirs.named_parameters() if ".weight" in n and "layers" in n}
    for step in range(5):
        galore.zero_grad()
        ours(*batch(step)).backward()
        galore.step()
        theirs.zero_grad()
        theirs(*batch(step)).backward()
        plain.step()
        named = dict(theirs.named_parameters())
        for name, state in states.items():
            p = named[name]
            p.data = galore_reference(p.data, p.grad, state, 0.01, 8, 2, 0.25)
    assert distance(ours, theirs) < 1e-4
    sizes = sum(t.numel() for s in galore.state.values() for t in s.values())
    assert sizes < 2 * sum(p.numel() for p in ours.parameters())
    with pytest.raises(budwood.Error, match="has 33 rows"):
        galore_groups(ours, rank=33)


def test_galore_of_full_rank_projects_nothing_away():
    p, grad = torch.randn(16, 32), torch.randn(16, 32)
    rule = _C.UpdateRule("galore", rank=16, beta1=0.0, beta2=0.0, eps=1e-3, scale=1.0)
    state = rule.update(p.clone(), grad, rule.fresh(p), 0.1)
    projection = state["projection"]
    torch.testing.assert_close(projection @ projection.T, torch.eye(16), atol=1e-5, rtol=0)
    torch.testing.assert_close(projection.T @ (projection @ grad), grad, atol=1e-5, rtol=1e-5)


def test_galore_finds_the_directions_of_large_gradients():
    torch.manual_seed(0)
    grad = torch.randn(1100, 16) @ torch.randn(16, 1200) + 0.01 * torch.randn(1100, 1200)
    rule = _C.UpdateRule("galore", rank=16)
    p = torch.zeros(1100, 1200)
    projection = rule.update(p, grad.clone(), rule.fresh(p), 0.1)["projection"]
    wanted = torch.linalg.svd(grad, full_matrices=False)[0][:, :16].T
    # The same subspace: each direction of the one lies in the other.
    torch.testing.assert_close(
        (wanted @ projection.T).norm(dim=1), torch.ones(16), atol=1e-4, rtol=0
    )


def test_eight_bit_moments_use_the_published_map_and_follow_adamw():
    torch.manual_seed(0)
    p, reference = torch.randn(80, 100), None
    reference = p.clone().double()
    rule = _C.UpdateRule("adamw8bit", weight_decay=0.1, block_size=256)
    state = rule.fresh(p)
    signed = bitsandbytes.functional.create_dynamic_map(signed=True)
    unsigned = bitsandbytes.functional.create_dynamic_map(signed=False)
    m, v = torch.zeros(8000).double(), torch.zeros(8000).double()
    for step in range(1, 31):
        grad = torch.randn(80, 100)
        state = rule.update(p, grad, state, 0.01)
        g = grad.double().flatten()
        # The reference starts from what the codes say, so that differences do not add up.
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        denominator = v.sqrt() / math.sqrt(1 - 0.999**step) + 1e-8
        change = 0.01 / (1 - 0.9**step) * (m / denominator)
        reference = reference * (1 - 0.01 * 0.1) - change.view(80, 100)
        torch.testing.assert_close(p.double(), reference, atol=1e-6, rtol=0)
        scales = state["exp_avg_scale"].repeat_interleave(256)[:8000]
        decoded = signed[state["exp_avg"].flatten().long()] * scales
        assert (decoded.double() - m).abs().max() <= 0.0079 * scales.max()
        m = decoded.double()
        scales = state["exp_avg_sq_scale"].repeat_interleave(256)[:8000]
        v = (unsigned[state["exp_avg_sq"].flatten().long()] * scales).double()
        reference = p.double()
    assert state["exp_avg"].dtype == torch.uint8


def test_adamw_of_8_bits_is_saved_and_goes_on_to_the_bit():
    model, _ = pair()
    optimizer = AdamW8bit(model.parameters(), lr=0.01, min_8bit_size=1000)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 10)

    def train(model, optimizer, scheduler, steps):
        for step in steps:
            optimizer.zero_grad()
            model(*batch(step)).backward()
            optimizer.step()
            scheduler.step()

    train(model, optimizer, scheduler, range(4))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
    other = Net()
    again = AdamW8bit(other.parameters(), lr=0.01, min_8bit_size=1000)
    schedule = torch.optim.lr_scheduler.LinearLR(again, 1.0, 0.1, 10)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    schedule.load_state_dict(saved[2])
    assert again.state[other.embed.weight]["exp_avg"].dtype == torch.uint8
    assert again.state[other.norm.weight]["exp_avg"].dtype == torch.float32
    train(model, optimizer, scheduler, range(4, 8))
    train(other, again, schedule, range(4, 8))
    assert distance(model, other) == 0
    with pytest.raises(budwood.Error, match="block_size is 8"):
        AdamW8bit(model.parameters(), block_size=8)


def test_adamw_of_8_bits_stays_near_adamw():
    ours, theirs = pair()
    small = AdamW8bit(ours.parameters(), lr=1e-3, min_8bit_size=0, weight_decay=0.01)
    plain = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.01)
    start = [p.detach().clone() for p in ours.parameters()]
    for step in range(50):
        for model, optimizer in ((ours, small), (theirs, plain)):
            optimizer.zero_grad()
            model(*batch(step)).backward()
            optimizer.step()
    with torch.no_grad():
        for a, b, p in zip(ours.parameters(), theirs.parameters(), start, strict=True):
            assert (a - b).norm() < 0.2 * (b - p).norm()


def test_mezo_improves_is_replayed_and_wants_a_function(tmp_path):
    model, start = pair()
    mezo = MeZO(model, lr=5e-4, eps=1e-3, seed=3)
    losses = [mezo.step(lambda: model(*batch(0))) for _ in range(150)]
    assert sum(losses[-10:]) < sum(losses[:10])
    mezo.log.save(tmp_path / "log.safetensors")
    MeZO.replay(start, tmp_path / "log.safetensors")
    assert distance(model, start) == 0
    assert len(mezo.log.projected) == 150

    other = Net(dropout=0.5)
    with pytest.raises(budwood.Error, match="set dropout to 0"):
        MeZO(other).step(lambda: other(*batch(0)))
    with pytest.raises(budwood.Error, match="takes a closure"):
        MeZO(other).step()
    with pytest.raises(budwood.Error, match="is bfloat16, wanted float32"):
        MeZO(Net().bfloat16())
    (tmp_path / "bad").write_bytes((tmp_path / "log.safetensors").read_bytes()[:-3])
    with pytest.raises(budwood.Error):
        MeZO.replay(Net(), tmp_path / "bad")


def test_mezo_goes_on_from_its_state():
    model, other = pair()
    first, second = MeZO(model, lr=1e-3), MeZO(other, lr=1e-3)
    for _ in range(3):
        first.step(lambda: model(*batch(0)))
    other.load_state_dict(model.state_dict())
    second.load_state_dict(first.state_dict())
    for step in range(3):
        first.step(lambda step=step: model(*batch(step)))
        second.step(lambda step=step: other(*batch(step)))
    assert distance(model, other) == 0


def test_lisa_trains_so_many_blocks_and_what_is_in_none():
    model, _ = pair()
    lisa = LISA(model, lr=0.01, active=2, every=3, seed=1)
    assert lisa.blocks == [f"layers.{i}" for i in range(4)]
    seen = set()
    for step in range(30):
        before = copy.deepcopy(model.state_dict())
        active = lisa.active_blocks
        seen.update(active)
        assert len(active) == 2
        lisa.zero_grad()
        model(*batch(step)).backward()
        for name, p in model.named_parameters():
            inside = any(name.startswith(block + ".") for block in active)
            assert (p.grad is not None) == (inside or "layers" not in name)
        lisa.step()
        for name, tensor in model.state_dict().items():
            inside = any(name.startswith(block + ".") for block in active)
            assert torch.equal(tensor, before[name]) != (inside or "layers" not in name), name
    assert seen == set(lisa.blocks)
    lisa.finish()
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", [LISA, BAdam])
def test_block_optimisers_go_on_to_the_bit(kind):
    model, other = pair()
    first, second = kind(model, lr=0.01, every=3), kind(other, lr=0.01, every=3)

    def train(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            model(*batch(step)).backward()
            optimizer.step()

    train(model, first, range(7))
    other.load_state_dict(model.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(model, first, range(7, 14))
    train(other, second, range(7, 14))
    assert distance(model, other) == 0
    with pytest.raises(budwood.Error, match="has a number"):
        kind(nn.Linear(3, 3))


def test_badam_moves_every_block_once_a_round():
    model, start = pair()
    badam = BAdam(model, lr=0.01, every=2)
    for step in range(8):
        badam.zero_grad()
        model(*batch(step)).backward()
        badam.step()
    for (name, p), q in zip(model.named_parameters(), start.parameters(), strict=True):
        assert torch.equal(p, q) == ("layers" not in name)
    assert badam.never_trained == ["embed.weight", "norm.weight", "norm.bias"]
