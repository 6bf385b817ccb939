"""The CPU's share of a decode step's attention: none where the link alone is sooner."""

from dataclasses import replace

from headinfer.plan.below_host import share_in_memory
from headinfer.plan.format import Format
from headinfer.plan.hardware import Hardware
from headinfer.plan.options import Options
from headinfer.plan.plan import Plan
from headinfer.plan.predict import Predictor
from headinfer.schedule.route import MAX_ASKED_TOKENS


def balanced_host_share(
    hardware: Hardware, new_tokens: int = 1, form: Format = Format.DENSE
) -> float:
    """Return the share with which the host's attention and the link finish together.

    Where host memory is the limit of both, they are slowed down alike.

    Args:
        hardware: the machine.
        new_tokens: that attend at once.
        form: of tokens in host memory.
    """
    link, host = hardware.link_bytes_per_s, hardware.host_attention_at(new_tokens, form)
    if not link or hardware.host_and_link_bytes_per_s <= link:
        return 0.0  # the link alone takes all that the memory gives
    return host / (host + link)


def with_host_share(plan: Plan, options: Options, hardware: Hardware | None) -> Plan:
    """Return a plan with the CPU's share of the tokens that are not resident, balanced.

    Args:
        plan: with its residents.
        options: what the user set.
        hardware: the machine; without its measured rates the CPU has no share.
    """
    if plan.device == "cpu":
        return plan
    if options.host_attention != "auto":
        return replace(plan, host_share=options.host_attention)
    # Data sheets do not say what the CPU reaches, so it is left out until it was measured.
    measured = hardware if hardware is not None and hardware.measured else None
    form = plan.shape.host_format
    share = balanced_host_share(measured, form=form) if measured else 0.0
    verified = balanced_host_share(measured, MAX_ASKED_TOKENS, form) if measured and share else None
    most = share_in_memory(plan)
    return replace(
        plan,
        host_share=min(share, most),
        verify_host_share=None if verified is None else min(verified, most),
        host_share_adapts=share > 0,
        host_unmeasured=plan.device == "cuda" and hardware is None,
        host_left_out=False,
    )


def where_the_host_pays(plan: Plan, hardware: Hardware | None) -> Plan:
    """Return a plan without the balanced share where its steps are sooner by the link alone.

    Args:
        plan: what `with_host_share` returned.
        hardware: the machine.
    """
    tokens = plan.context_tokens
    if hardware is None or not tokens or not plan.host_share_adapts:
        return plan
    if Predictor(plan.shape, hardware).host_pays(plan.placement, tokens):
        return plan
    return replace(
        plan,
        host_share=0.0,
        verify_host_share=None,
        host_share_adapts=False,
        host_left_out=True,
    )
