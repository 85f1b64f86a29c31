"""Actor and critic on one recurrent layer, which learn at every step by eligibility traces on top of Γ.

With h(t) the layer's output, v(t) = critic(h(t)), π(t) = softmax(actor(h(t))), a(t) ~ π(t), for each batch row b:

    δ_b(t) = r_b(t) + γ v_b(t+1) - v_b(t)                                       v_b(t+1) is 0 after a last step
    e_b(t) = γλ e_b(t-1) + ∇ [log π_b(a(t)) + c v_b(t)]                         0 at the start of an episode
    W ← optimizer's step by the gradient -(1/B) Σ_b [δ_b(t) e_b(t) + β ∇ H(π_b(t))]

The gradient of an output with respect to the layer's weights is its credit times Γ(t), which the rule carries forward.
So memory doesn't grow with time, and credit reaches as far back as Γ does within the layer's state, and as γλ does
beyond. (Sutton & Barto 2018, section 13.6, with Γ in place of the gradient through time.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks as check
from ..layers.layer import TwoPointRNN
from ..rules import rfp
from . import checkpoint
from .learner import OnlineLearner
from .options import Learning
from .sensitivity import PerUnit

__all__ = ["StreamActorCritic"]


class StreamActorCritic:
    """Learns to act from a stream, without a history.

        agent = StreamActorCritic(layer, actor, critic, batch_size, optimizer=torch.optim.Adam(weights, 1e-3))
        action = agent.step(x)                              # x (B, F) → a (B,)
        while True:
            x, reward, done = environment(action)           # where done, x begins the next episode
            action = agent.step(x, reward, done)

    The weights of `layer`, `actor` and `critic` change in place at every step from the second on.

    Args:
        layer: the recurrent layer, whose output is a state of its cell.
        actor: nn.Linear from its N units to A actions; critic: nn.Linear to 1 value.
        batch_size: B, the number of environments that run side by side.
        optimizer: of the weights of all three.
        discount: γ, a number in [0, 1] or one for each row (B,). trace: λ, likewise.
        value_weight: c, how much more the layer learns for the critic than for the actor; the critic's own weights
            learn by c as well.
        entropy: β, the weight of the policy's entropy, which has no trace.
        clip_norm: the largest norm of all weights' gradient; None: no limit.
        learning: "rfp", "eprop", "rflo" or "snap0"; None: the layer's own.
        generator: of the actions drawn; None: torch's.

    Attributes: error (B,), the last δ; value (B,), the last v; policy (B, A), the last π.

    Raises TypeError or ValueError for an argument out of its range.
    """

    error: Tensor
    value: Tensor
    policy: Tensor

    def __init__(
        self,
        layer: TwoPointRNN,
        actor: nn.Linear,
        critic: nn.Linear,
        batch_size: int = 1,
        *,
        optimizer: torch.optim.Optimizer,
        discount: float | Tensor = 0.99,
        trace: float | Tensor = 0.9,
        value_weight: float = 0.5,
        entropy: float = 0.0,
        clip_norm: float | None = None,
        learning: Learning | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.learner = OnlineLearner(layer, batch_size, learning=learning, form="step")
        if self.learner.learning not in rfp.RULES:
            raise ValueError(f"learning must be one of {', '.join(rfp.RULES)}, got {self.learner.learning!r}")
        if type(layer).readout is not TwoPointRNN.readout:
            raise ValueError(f"layer must have a state as its output, which {type(layer).__name__} has not")
        self.layer, self.actor, self.critic, self.optimizer = layer, actor, critic, optimizer
        self.batch_size, self.generator = self.learner.batch_size, generator
        weight = layer.weights()[0]
        for name, part in (("actor", actor), ("critic", critic)):
            if not isinstance(part, nn.Linear):
                raise TypeError(f"{name} must be a torch.nn.Linear, got {type(part).__name__}")
            if part.in_features != layer.hidden_size:
                raise ValueError(
                    f"{name} must take the layer's {layer.hidden_size} units, got in_features={part.in_features}"
                )
            check.like(name, part.weight, "the layer", weight)
        if critic.out_features != 1:
            raise ValueError(f"critic must give 1 value, got out_features={critic.out_features}")
        self._heads = [p for part in (actor, critic) for p in (part.weight, part.bias) if p is not None]
        known = {p for group in optimizer.param_groups for p in group["params"]}
        if known != {*layer.parameters(), *self._heads}:
            raise ValueError("optimizer must have the weights of layer, actor and critic, and no others")
        self.discount, self.trace = (
            self._rows(name, value) for name, value in (("discount", discount), ("trace", trace))
        )
        for name, value in (("value_weight", value_weight), ("entropy", entropy)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
        if clip_norm is not None and not 0 < clip_norm < float("inf"):
            raise ValueError(f"clip_norm must be a number above 0, got {clip_norm!r}")
        self.value_weight, self.entropy, self.clip_norm = float(value_weight), float(entropy), clip_norm
        # e of each group of the layer's matrices (B, K, N, M), and of each weight of the heads.
        self._layer_traces = [torch.zeros_like(group.gammas[0]) for group in self._carried().groups]
        self._head_traces = [p.new_zeros(self.batch_size, *p.shape) for p in self._heads]
        self._bonus: list[Tensor] | None = None  # ∇ Σ_b H of the last step, by matrix and head
        self._acted = False
        self.error = self.value = weight.new_zeros(self.batch_size)
        self.policy = weight.new_zeros(self.batch_size, actor.out_features)

    def _carried(self) -> PerUnit:
        sensitivity = self.learner.lend()[1]
        assert isinstance(sensitivity, PerUnit)
        return sensitivity

    def _rows(self, name: str, value: float | Tensor) -> Tensor:
        weight = self.layer.weights()[0]
        rows = torch.as_tensor(value, dtype=weight.dtype, device=weight.device)
        if rows.shape not in ((), (self.batch_size,)):
            raise ValueError(
                f"{name} must be a number or ({self.batch_size},), got shape {tuple(rows.shape)}"
            )
        if not bool(((rows >= 0) & (rows <= 1)).all()):
            raise ValueError(f"{name} must lie in [0, 1], got {value!r}")
        return rows.expand(self.batch_size).clone()

    @torch.no_grad()
    def step(self, x: Tensor, reward: Tensor | None = None, done: Tensor | None = None) -> Tensor:
        """Learn from what the last action brought, and take the next: x (B, F) → actions (B,) int64.

        reward: (B,), of the last action; None at the first step of all. done: (B,) bool: rows whose episode that action
        has ended, so that x is the first of another; None: no row.

        Raises TypeError or ValueError, with nothing changed, for an argument that doesn't fit.
        """
        layer, rows = self.layer, (self.batch_size,)
        check.shape("x", check.tensor("x", x), (*rows, layer.fan_in), "to match the agent")
        check.like("x", x, "the layer", layer.weights()[0])
        if (reward is None) == self._acted:
            raise ValueError(
                "reward must be given at every step but the first, which has none"
                if self._acted
                else "reward must be None at the first step, before which there was no action"
            )
        if done is not None:
            done = check.mask("done", done, rows, x.device)
            if not self._acted:
                raise ValueError("done must be None at the first step, before which there was no action")
        if reward is not None:
            check.shape("reward", check.tensor("reward", reward), rows, "one for each batch row")
            check.like("reward", reward, "the layer", layer.weights()[0])
            check.finite("reward", reward)
            if done is not None and bool(done.any()):
                self.learner.reset(done)
        h = self.learner.step(x)
        if reward is not None:
            self._update(h, reward, done)
        return self._act(h)

    def _update(self, h: Tensor, reward: Tensor, done: Tensor | None) -> None:
        """A step of the optimizer by δ and the traces, which then decay."""
        value = self.critic(h)[:, 0]
        if done is not None:
            value = value.masked_fill(done, 0)
        self.error = reward + self.discount * value - self.value
        weights, batch = self.layer.weights(), self.batch_size
        found: dict[Tensor, Tensor] = {}
        for group, trace in zip(self._carried().groups, self._layer_traces, strict=True):
            totals = torch.einsum("b,bknm->knm", self.error, trace)
            for k, index in enumerate(group.indices):
                found[weights[index]] = totals[k].view(group.shape)
        for weight, trace in zip(self._heads, self._head_traces, strict=True):
            found[weight] = torch.einsum("b,b...->...", self.error, trace)
        if self._bonus is not None:
            for weight, more in zip((*weights, *self._heads), self._bonus, strict=True):
                found[weight] += self.entropy * more
        self.optimizer.zero_grad()
        for weight, total in found.items():
            if weight.requires_grad:
                weight.grad = -total / batch
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(found), self.clip_norm)
        self.optimizer.step()
        keep = self.discount * self.trace
        if done is not None:
            keep = keep.masked_fill(done, 0)
        for trace in (*self._layer_traces, *self._head_traces):
            trace.mul_(keep.view(-1, *(1,) * (trace.dim() - 1)))

    def _act(self, h: Tensor) -> Tensor:
        """Draw an action at h (B, N), and add its gradients to the traces."""
        log_policy = torch.log_softmax(self.actor(h), -1)
        self.policy, self.value = log_policy.exp(), self.critic(h)[:, 0]
        action = torch.multinomial(self.policy, 1, generator=self.generator)[:, 0]
        chosen = torch.nn.functional.one_hot(action, self.policy.shape[1]).to(h.dtype)
        rows = h.new_full((self.batch_size, 1), self.value_weight)
        credit = self._credit(chosen - self.policy, rows)
        for group, trace in zip(self._carried().groups, self._layer_traces, strict=True):
            trace.addcmul_(credit[:, None, :, None], group.gammas[self.layer.cell.outputs[0]])
        for trace, gradient in zip(
            self._head_traces, self._of_heads(chosen - self.policy, rows, h), strict=True
        ):
            trace.add_(gradient)
        if self.entropy:
            uncertain = -(self.policy * log_policy).sum(-1, keepdim=True)
            by = -self.policy * (log_policy + uncertain)  # ∂H/∂logits
            states = h.new_zeros(len(self.layer.cell.states), *h.shape)
            states[self.layer.cell.outputs[0]] = self._credit(by, torch.zeros_like(rows))
            heads = [each.sum(0) for each in self._of_heads(by, torch.zeros_like(rows), h)]
            self._bonus = [*(each.clone() for each in self._carried().read(states)), *heads]
        self._acted = True
        return action

    def _credit(self, logits: Tensor, value: Tensor) -> Tensor:
        """What gradients of the logits (B, A) and the value (B, 1) give to h, (B, N)."""
        return logits @ self.actor.weight + value @ self.critic.weight

    def _of_heads(self, logits: Tensor, value: Tensor, h: Tensor) -> list[Tensor]:
        """What they give to each weight of the heads, in each row."""
        found = []
        for part, by in ((self.actor, logits), (self.critic, value)):
            found.append(by[:, :, None] * h[:, None])
            if part.bias is not None:
                found.append(by)
        return found

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed agent needs: weights, Γ, the optimizer's state and the traces; tensors are shared."""
        return {
            "layer": self.layer.state_dict(),
            "actor": self.actor.state_dict(),
            "critic": self.critic.state_dict(),
            "learner": self.learner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "traces": [*self._layer_traces, *self._head_traces],
            "bonus": self._bonus,
            "acted": self._acted,
            "value": self.value,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the agent that made `state` was. Raises TypeError or ValueError if it doesn't fit."""
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be what state_dict() gave, got {type(state).__name__}")
        own = self.state_dict()
        missing = [name for name in own if name not in state]
        if missing:
            raise ValueError(f"state must be what state_dict() gave, and lacks {', '.join(missing)}")
        self.learner.refuse_foreign(state["learner"])
        traces = [*self._layer_traces, *self._head_traces]
        checkpoint.refuse_agent(state, own, [*self.layer.weights(), *self._heads])
        names = ("layer", "actor", "critic", "optimizer")
        checkpoint.load_all({name: getattr(self, name) for name in names}, state)
        self.learner.load_state_dict(state["learner"])
        for mine, given in zip(traces, state["traces"], strict=True):
            mine.copy_(given.detach())
        self._bonus, self._acted, self.value = state["bonus"], state["acted"], state["value"].detach().clone()
