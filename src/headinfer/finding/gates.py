"""Scores of heads by optimisation: a gate for each KV head, between all tokens and few.

This is DuoAttention's way (Xiao et al., 2024). A head's output is its gate's share of full
attention, and streaming attention for the rest. The gates are trained so that hidden states at the
answers are those of the model itself, while an L1 term pulls every gate down. The weights stay. We
differ in one thing: errors are shares of the hidden states' squares, so that models need no tuning.
"""

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from headinfer.finding.attention import LayerCall, attending_by
from headinfer.finding.masked import within_reach
from headinfer.finding.shape import HeadShape, Rows
from headinfer.finding.texts import Texts

LEARNING_RATE, PULL = 0.05, 0.05
_RAMP = 0.2
"""Share of the steps in which the learning rate rises, and in which it falls at the end."""


class Gates:
    """A set of gates in training, from 1 for all tokens to 0 for few.

    Args:
        model: a causal language model of transformers, not attached.
        texts: where examples are from.
        heads: of the model.
        steps: of the training in all.
    """

    def __init__(self, model: PreTrainedModel, texts: Texts, heads: HeadShape, steps: int) -> None:
        self._model = model
        self._texts = texts
        self._heads = heads
        self._steps = steps
        count = sum(heads.kv_heads[layer] for layer in heads.layers)
        self._gates = torch.ones(count, device=model.device, requires_grad=True)
        self._adam = torch.optim.Adam([self._gates], lr=LEARNING_RATE)

    def rows(self) -> Rows:
        """Return the gates as they are."""
        return self._heads.rows(
            {layer: gates.tolist() for layer, gates in self._by_layer().items()}
        )

    def state(self) -> dict[str, Any]:
        """Return what the training goes on from, as JSON values."""
        moments = self._adam.state.get(self._gates, {})
        return {"gates": self._gates.tolist()} | {
            name: value.tolist() for name, value in moments.items()
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state that another process had."""
        with torch.no_grad():
            self._gates.copy_(torch.tensor(state["gates"]))
        if "step" in state:
            self._adam.state[self._gates] = {
                name: torch.tensor(state[name], device=device)
                for name, device in (
                    ("step", "cpu"),
                    ("exp_avg", self._gates.device),
                    ("exp_avg_sq", self._gates.device),
                )
            }

    def step(self, number: int, tokens: int, seed: str) -> float:
        """Train on one example.

        Args:
            number: of the step, from 0.
            tokens: the most tokens of the example.
            seed: of the example.

        Returns:
            The squared difference of the hidden states, as a share of their squares.
        """
        example = self._texts.example(tokens, seed)
        # The last token predicts what comes after the answer, which nobody asks.
        ids = torch.tensor([example.ids[:-1]], device=self._model.device)
        asking = [token.at - 1 for token in example.copied]
        with torch.no_grad():
            wanted = self._hidden(ids, asking)
        frozen = [one for one in self._model.parameters() if one.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            with torch.enable_grad(), attending_by(self._model, self._attend):
                difference = (self._hidden(ids, asking) - wanted).square().mean()
                difference = difference / wanted.square().mean()
                loss = difference + PULL * self._gates.abs().mean()
            self._adam.zero_grad()
            loss.backward()
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
        for group in self._adam.param_groups:
            group["lr"] = LEARNING_RATE * self._share_of_rate(number)
        self._adam.step()
        with torch.no_grad():
            self._gates.clamp_(0, 1)
        return float(difference)

    def _share_of_rate(self, number: int) -> float:
        ramp = max(1.0, _RAMP * self._steps)
        return min(1.0, (number + 1) / ramp, (self._steps - number) / ramp)

    def _hidden(self, ids: torch.Tensor, asking: list[int]) -> torch.Tensor:
        """Return the last hidden states at some tokens, `[tokens, hidden_size]`, float32."""
        out = self._model.base_model(input_ids=ids, use_cache=False)
        hidden: torch.Tensor = out.last_hidden_state[0, asking].float()
        return hidden

    def _by_layer(self) -> dict[int, torch.Tensor]:
        counts = [self._heads.kv_heads[layer] for layer in self._heads.layers]
        return dict(zip(self._heads.layers, self._gates.split(counts), strict=True))

    def _attend(self, call: LayerCall) -> torch.Tensor:
        gates = self._by_layer().get(call.layer)
        if gates is None:
            return _attention(call, call.seen)
        near = within_reach(call, slice(None), self._heads.sink_tokens, self._heads.recent_tokens)
        full, few = _attention(call, call.seen), _attention(call, call.seen & near)
        gate = gates.to(full.dtype)[:, None, None, None]
        return gate * full + (1 - gate) * few


def _attention(call: LayerCall, seen: torch.Tensor) -> torch.Tensor:
    """Return attention whose gradients can be computed, without keeping its weights for them."""
    if call.softcap is None and call.sinks is None:
        out: torch.Tensor = scaled_dot_product_attention(
            call.query.flatten(1, 2),
            call.keys.repeat_interleave(call.query.shape[2], 1),
            call.values.repeat_interleave(call.query.shape[2], 1),
            attn_mask=seen.flatten(1, 2),
            scale=call.scale,
        )
        grouped: torch.Tensor = out.unflatten(1, call.query.shape[1:3])
        return grouped
    parts = [
        checkpoint(
            lambda rows: call.attended(call.weights(rows, seen[..., rows, :])),
            rows,
            use_reentrant=False,
        )
        for rows in call.blocks
    ]
    return torch.cat(parts, -2)
