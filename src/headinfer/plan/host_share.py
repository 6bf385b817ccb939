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
    """Return a plan with the CPU's share of the tokens that are not resident.

    Args:
        plan: with its residents.
        options: what the user set.
        hardware: the machine; without its measured rates the CPU has no share.
    """
    if plan.device == "cpu":
        return plan
    if options.host_attention != "auto":
        return replace(plan, host_share=options.host_attention)
    unmeasured = plan.device == "cuda" and hardware is None
    plan = replace(
        plan,
        host_share=0.0,
        verify_host_share=None,
        host_share_adapts=False,
        host_unmeasured=unmeasured,
    )
    # Data sheets do not say what the CPU reaches, so it is left out until it was measured.
    if hardware is None or not hardware.measured:
        return plan
    form, most = plan.shape.host_format, share_in_memory(plan)
    share = balanced_host_share(hardware, form=form)
    if not share:
        return plan
    shared = replace(
        plan,
        host_share=min(share, most),
        verify_host_share=min(balanced_host_share(hardware, MAX_ASKED_TOKENS, form), most),
        host_share_adapts=True,
    )
    tokens = plan.context_tokens
    if tokens and not Predictor(plan.shape, hardware).host_pays(shared.placement, tokens):
        return plan
    return shared
