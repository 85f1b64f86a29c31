"""`StreamActorCritic` against eligibility traces written out by hand, with gradients by autograd through the past."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from states import requiring_gradients
from torch import Tensor, nn

from rjepa_triton import GRU, LRU, RNN, StreamActorCritic, TwoPointRNN

F64 = torch.float64
STEPS, BATCH, FEATURES, UNITS, ACTIONS = 14, 3, 2, 5, 4


def agent_of(
    layer: TwoPointRNN,
    optimizer: str = "SGD",
    seed: int = 0,
    lr: float = 0.05,
    bias: bool = True,
    **options: Any,
) -> StreamActorCritic:
    torch.manual_seed(seed)
    actor = nn.Linear(layer.hidden_size, ACTIONS, bias=bias, dtype=F64)
    critic = nn.Linear(layer.hidden_size, 1, bias=bias, dtype=F64)
    weights = [*layer.parameters(), *actor.parameters(), *critic.parameters()]
    chosen = getattr(torch.optim, optimizer)(weights, lr=lr)
    generator = torch.Generator().manual_seed(seed)
    return StreamActorCritic(layer, actor, critic, BATCH, optimizer=chosen, generator=generator, **options)


def given() -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(STEPS, BATCH, FEATURES, dtype=F64),
        torch.randn(STEPS, BATCH, dtype=F64),
        torch.rand(STEPS, BATCH) < 0.2,
    )


def play(agent: StreamActorCritic, x: Tensor, reward: Tensor, done: Tensor) -> list[Tensor]:
    """The actions of a stream in which nothing depends on them."""
    return [agent.step(x[t], reward[t], done[t]) if agent._acted else agent.step(x[t]) for t in range(len(x))]


def by_hand(
    layer: RNN, actor: nn.Linear, critic: nn.Linear, x: Tensor, reward: Tensor, done: Tensor, actions: list[Tensor],
    discount: Tensor, trace: Tensor, lr: float, value_weight: float, entropy: float,
) -> list[Tensor]:  # fmt: skip
    """The weights after those steps.

    Each weight is a constant, as the steps so far have left it, plus a zero that is the same at all steps: what the
    outputs depend on through that zero, at all steps of an episode, is the gradient. A unit's own past is all that RFP
    lets it go through: W h' is W stop[h'] + diag(W) (h' - stop[h']).
    """
    names = {name: p.detach().clone() for name, p in layer.named_parameters()}
    now = [*names.values(), *(p.detach().clone() for part in (actor, critic) for p in part.parameters())]
    zeros = [torch.zeros_like(p, requires_grad=True) for p in now]
    traces = [p.new_zeros(BATCH, *p.shape) for p in now]
    bonus = [torch.zeros_like(p) for p in now]
    h = torch.zeros(BATCH, UNITS, dtype=F64)
    before = torch.zeros(BATCH, dtype=F64)

    def outputs(h: Tensor) -> tuple[Tensor, Tensor]:
        *_, w_a, b_a, w_c, b_c = [p + z for p, z in zip(now, zeros, strict=True)]
        return torch.log_softmax(h @ w_a.T + b_a, -1), (h @ w_c.T + b_c)[:, 0]

    def gradients(of: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(of, zeros, retain_graph=True, materialize_grads=True))

    for t in range(len(x)):
        if t:
            h = torch.where(done[t][:, None], 0, h)
        own = {name: p + z for name, p, z in zip(names, now, zeros, strict=False)}
        w_hh, w_in, b = own["weight_hh"], own["weight_in"], own["bias"]
        recurrent = h.detach() @ w_hh.T + (h - h.detach()) * w_hh.diagonal()
        h = torch.tanh(recurrent + x[t] @ w_in.T + b)
        if t:
            value = torch.where(done[t], 0, outputs(h)[1].detach())
            error = reward[t] + discount * value - before
            for p, e, more in zip(now, traces, bonus, strict=True):
                p.add_((torch.einsum("b,b...->...", error, e) + entropy * more) * lr / BATCH)
            keep = torch.where(done[t], 0, discount * trace)
            traces = [e * keep.view(-1, *(1,) * (e.dim() - 1)) for e in traces]
        log_policy, value = outputs(h)
        before = value.detach()
        for row in range(BATCH):
            for e, g in zip(
                traces, gradients(log_policy[row, actions[t][row]] + value_weight * value[row]), strict=True
            ):
                e[row] += g
        bonus = gradients(-(log_policy.exp() * log_policy).sum())
    return now


@pytest.mark.parametrize("entropy", [0.0, 0.3])
@pytest.mark.parametrize("rows", [False, True], ids=["same", "by row"])
@pytest.mark.parametrize("recurrence", ["dense", "diagonal"])
def test_traces_are_those_written_out_by_hand(recurrence: str, rows: bool, entropy: float) -> None:
    """The weights change at each step, as do those of the sum written out."""
    layer = RNN(FEATURES, UNITS, dtype=F64)
    if recurrence == "diagonal":
        with torch.no_grad():
            layer.weight_hh.copy_(layer.weight_hh.diagonal().diag())
    discount = torch.tensor([0.9, 0.5, 1.0], dtype=F64) if rows else torch.full((BATCH,), 0.95, dtype=F64)
    trace = torch.tensor([0.0, 1.0, 0.7], dtype=F64) if rows else torch.full((BATCH,), 0.8, dtype=F64)
    agent = agent_of(
        layer,
        discount=discount if rows else 0.95,
        trace=trace if rows else 0.8,
        value_weight=0.7,
        entropy=entropy,
    )
    start = copy.deepcopy((layer, agent.actor, agent.critic))
    x, reward, done = given()
    actions = play(agent, x, reward, done)
    wanted = by_hand(*start, x, reward, done, actions, discount, trace, 0.05, 0.7, entropy)
    found = [*layer.parameters(), *agent.actor.parameters(), *agent.critic.parameters()]
    assert len(found) == len(wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine.detach(), theirs, rtol=0, atol=1e-12)
    assert not torch.equal(layer.weight_hh, start[0].weight_hh)


def test_a_policy_learns_what_pays() -> None:
    """Two actions pay 1 and -1, the other way round for each of two observations, shown two steps before."""
    torch.manual_seed(0)
    layer = GRU(2, 12, dtype=F64)
    agent = agent_of(layer, "Adam", lr=0.01, trace=0.9, discount=0.9)
    shown = torch.eye(2, dtype=F64)
    cue, paid = torch.randint(2, (BATCH,)), []
    action = agent.step(shown[cue])
    for _ in range(400):
        for t in range(3):
            last = t == 2
            reward = (
                torch.where(action % 2 == cue, 1.0, -1.0).double() if last else torch.zeros(BATCH, dtype=F64)
            )
            if last:
                paid.append(reward.mean())
                cue = torch.randint(2, (BATCH,))
            x = shown[cue] if last else torch.zeros(BATCH, 2, dtype=F64)
            action = agent.step(x, reward, torch.full((BATCH,), last))
    assert torch.stack(paid[-50:]).mean() > 0.8


@pytest.mark.parametrize("learning", ["rfp", "eprop", "rflo", "snap0"])
@pytest.mark.parametrize(
    "layer", [lambda: GRU(FEATURES, UNITS, dtype=F64), lambda: RNN(FEATURES, 6, heads=3, dtype=F64)]
)
def test_an_agent_resumes(layer: Any, learning: str) -> None:
    x, reward, done = given()
    first, second = (
        agent_of(layer(), "Adam", seed, entropy=0.1, clip_norm=0.5, learning=learning) for seed in (0, 1)
    )
    play(first, x[:8], reward[:8], done[:8])
    state = copy.deepcopy(first.state_dict())
    carried = {name: requiring_gradients(state[name]) for name in ("learner", "traces", "value")}
    second.load_state_dict({**state, **carried})
    second.generator.set_state(first.generator.get_state())
    for a, b in zip(*(play(each, x[8:], reward[8:], done[8:]) for each in (first, second)), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(first.layer.parameters(), second.layer.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(first.error, second.error)


@pytest.mark.parametrize(
    ("name", "junk"),
    [(name, junk) for name in ("layer", "actor", "critic", "learner", "optimizer", "traces", "value") for junk in (3, None)]
    + [("acted", "x"), ("bonus", 7), ("traces", [])],
)  # fmt: skip
def test_a_damaged_state_changes_nothing(name: str, junk: Any) -> None:
    agent = agent_of(GRU(FEATURES, UNITS, dtype=F64), "Adam", entropy=0.1)
    play(agent, *given())
    before = copy.deepcopy(agent.state_dict())
    state = copy.deepcopy(before)
    for value in (*state["layer"].values(), *state["actor"].values(), *state["critic"].values()):
        value.add_(1)
    state[name] = junk
    with pytest.raises((TypeError, ValueError), match="state"):
        agent.load_state_dict(state)
    for part in ("layer", "actor", "critic"):
        assert all(torch.equal(value, before[part][key]) for key, value in agent.state_dict()[part].items())


def test_frozen_weights_stay() -> None:
    layer = GRU(FEATURES, UNITS, dtype=F64)
    agent = agent_of(layer, bias=False)
    layer.weight_hn.requires_grad_(False)
    before = layer.weight_hn.clone()
    play(agent, *given())
    assert torch.equal(layer.weight_hn, before)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"actor": nn.Linear(4, 2)}, ValueError, "actor must take the layer's 5 units, got in_features=4"),
        ({"actor": nn.Sequential()}, TypeError, "actor must be a torch.nn.Linear, got Sequential"),
        ({"critic": nn.Linear(5, 2)}, ValueError, "critic must give 1 value, got out_features=2"),
        ({"critic": nn.Linear(5, 1, dtype=F64)}, TypeError, "critic must have the dtype of the layer"),
        ({"layer": LRU(2, 5)}, ValueError, "layer must have a state as its output, which LRU has not"),
        ({"learning": "rtrl"}, ValueError, "learning must be one of rfp, eprop, rflo, snap0, got 'rtrl'"),
        ({"discount": 1.1}, ValueError, r"discount must lie in \[0, 1\], got 1.1"),
        ({"trace": torch.zeros(2)}, ValueError, r"trace must be a number or \(3,\), got shape \(2,\)"),
        ({"entropy": -0.1}, ValueError, "entropy must be a number of at least 0, got -0.1"),
        ({"clip_norm": 0.0}, ValueError, "clip_norm must be a number above 0, got 0.0"),
        (
            {"optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)},
            ValueError,
            "optimizer must have the weights of layer, actor and critic",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_agent_that_cannot_be(change: dict[str, Any], error: type[Exception], says: str) -> None:
    parts = {"layer": GRU(2, 5), "actor": nn.Linear(5, 2), "critic": nn.Linear(5, 1), **change}
    layer, actor, critic = (parts.pop(name) for name in ("layer", "actor", "critic"))
    weights = [p for part in (layer, actor, critic) for p in part.parameters()]
    parts.setdefault("optimizer", torch.optim.SGD(weights, lr=0.1))
    with pytest.raises(error, match=says):
        StreamActorCritic(layer, actor, critic, 3, **parts)


def test_bad_steps_are_named_and_change_nothing() -> None:
    agent = agent_of(GRU(FEATURES, UNITS, dtype=F64))
    x, reward, done = (each[0] for each in given())
    with pytest.raises(ValueError, match="reward must be None at the first step"):
        agent.step(x, reward)
    with pytest.raises(ValueError, match="done must be None at the first step"):
        agent.step(x, None, done)
    agent.step(x)
    agent.step(x, reward)
    before = copy.deepcopy(agent.state_dict())
    for arguments, error, says in [
        ((x,), ValueError, "reward must be given at every step but the first"),
        ((x[:2], reward), ValueError, r"x must have shape \(3, 2\)"),
        ((x.float(), reward), TypeError, "x must have the dtype of the layer"),
        ((x, reward[:2]), ValueError, r"reward must have shape \(3,\)"),
        ((x, reward * torch.inf), ValueError, "reward"),
        ((x, reward, reward), TypeError, "done must have dtype torch.bool"),
    ]:
        with pytest.raises(error, match=says):
            agent.step(*arguments)
    after = agent.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(before["traces"], after["traces"], strict=True))
    assert torch.equal(before["learner"]["state"], after["learner"]["state"])
