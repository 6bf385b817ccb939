"""Caches that have plans for answers, beside stock transformers that is given the same tokens."""

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

import headinfer
from headinfer.device.simulated import SimulatedDevice
from headinfer.offload import Offload
from headinfer.plan.memory import resident_bytes
from headinfer.plan.plan import Plan
from tiny_models import random_tokens, tiny_model

PROMPT, CHUNK, MAX_TOKENS, RESIDENT = 2600, 1536, 6000, 600
LONG, SHORT = 1100, 100
"""New tokens of a call that only a prompt's plan is for, and of one that both are for."""

SIZES: dict[str, Any] = {
    "device": "simulated",
    "chunk_tokens": CHUNK,
    "tile_heads": 2,
    "tile_tokens": 512,
    "host_attention": "off",
}


def long_model(name: str = "llama3", **changes: Any) -> PreTrainedModel:
    """Return a tiny model for some thousand tokens."""
    changes = {"num_hidden_layers": 2, "max_position_embeddings": 2**14} | changes
    return tiny_model(name, **changes)


def device_memory(model: PreTrainedModel, **options: Any) -> str:
    """Return the memory of devices, with which a prompt's plan keeps `RESIDENT` tokens."""
    with headinfer.attach(model, **{**SIZES, **options, "resident_tokens": 0}) as offload:
        plans = offload.session.plan_for(1, MAX_TOKENS).of_devices
    return ",".join(
        f"{plan.total_device_bytes + 256 * len(plan.shape.full_layers) + kept}B"
        for plan in plans
        for kept in (resident_bytes(plan.shape, resident_tokens=RESIDENT, batch=1),)
    )


def attached(model: PreTrainedModel, **options: Any) -> Offload:
    """Attach with so much memory."""
    where = {name: options[name] for name in ("device", "simulated_device") if name in options}
    memory = {} if "device_memory" in options else {"device_memory": device_memory(model, **where)}
    return headinfer.attach(model, **SIZES | memory | options)


class Chat:
    """A cache that is given tokens, with what stock transformers is to be given.

    Args:
        model: attached.
        offload: its attachment.
        seed: of the tokens.
        beside: others whose memory counts, too.
    """

    def __init__(
        self, model: PreTrainedModel, offload: Offload, seed: int = 0, *beside: "Chat"
    ) -> None:
        self.model, self.offload, self.beside = model, offload, [*beside]
        for other in beside:
            other.beside.append(self)
        self.cache: Any = offload.new_cache(MAX_TOKENS)
        self.said = random_tokens(1, 0)
        self.last: torch.Tensor | None = None
        self._tokens = random_tokens(1, 2 * MAX_TOKENS, seed=seed + 1)
        self._taken = 0

    @property
    def plan(self) -> Plan:
        """What the cache has now."""
        plan: Plan = self.cache.state.engine.plan
        return plan

    @property
    def answers(self) -> bool:
        """Whether it is a plan for answers."""
        return any(part.prompt_plan is not None for part in self.plan.of_devices)

    def take(self, count: int, **arguments: Any) -> None:
        """Pass some tokens in one call, and check that no device has more than its plan."""
        tokens = self._tokens[:, self._taken : self._taken + count]
        self._taken += count
        self.said = torch.cat([self.said, tokens], dim=1)
        arguments = {"logits_to_keep": 1, **arguments}
        with torch.no_grad():
            keywords = self.cache.as_keyword() | arguments
            self.last = self.model(tokens.to(self.model.device), **keywords).logits[:, -1]
        engines = [each.cache.state.engine for each in (self, *self.beside)]
        for parts in zip(*(engine.parts for engine in engines), strict=True):
            device = parts[0].device
            held = sum(part.plan.kv_device_bytes for part in parts if not part.parked)
            if isinstance(device, SimulatedDevice):
                device.memory.check()
                assert device.memory.blocks.allocated_bytes <= held
            working = max(part.plan.activation_bytes for part in parts if not part.parked)
            given = self.given[device]
            assert given is None or parts[0].plan.shape.weights_bytes + held + working <= given

    @property
    def given(self) -> dict[object, int | None]:
        """The memory of each device."""
        parts = self.offload.session.parts
        return {part.device: part.options.device_memory_bytes for part in parts}

    def steps(self, count: int) -> None:
        """Pass some tokens, each in a call of its own."""
        for _ in range(count):
            self.take(1)

    def steps_to_answer(self, most: int = 40) -> int:
        """Pass steps until one has a plan for answers; return how many."""
        for number in range(1, most + 1):
            self.steps(1)
            if self.answers:
                return number
        raise AssertionError(f"no plan for answers in {most} steps")

    def crop(self, tokens: int) -> None:
        """Keep so many tokens."""
        self.cache.crop(tokens - self.said.shape[1])
        self.said = self.said[:, :tokens]

    def check(self, apart: float = 1e-3) -> None:
        """Compare the last logits with what stock gives for all tokens in one call."""
        model = tiny_model_like(self.model)
        with torch.no_grad():
            said, cache = self.said.to(model.device), DynamicCache(config=model.config)
            stock = model(said, past_key_values=cache, logits_to_keep=1).logits
        torch.testing.assert_close(self.last, stock[:, -1], rtol=apart, atol=apart)


def tiny_model_like(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of the same weights that is not attached."""
    config = type(model.config).from_dict(model.config.to_dict())
    other = type(model)(config).to(model.device, model.dtype).eval()
    other.load_state_dict(model.state_dict())
    other.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    return other
