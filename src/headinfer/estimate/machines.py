"""Machines known by name, from data sheets.

The rates of a data sheet are ceilings. How much of a ceiling a kernel reaches is measured by
`headinfer probe`. Without a measurement the attainable rates below hold: the shares of the ceilings
that good kernels reach.
"""

from headinfer.errors import OptionError
from headinfer.plan.hardware import THIS, Hardware
from headinfer.units import parse_bytes

_ATTAINABLE = 0.8
"""Share of a ceiling that fused attention kernels and plain copies reach on current machines."""

_HOST_ATTAINABLE = 0.5
"""The same for attention on the CPU, whose loads compete with its arithmetic."""


def _from_data_sheet(
    name: str,
    description: str,
    *,
    memory: str,
    tflops: float,
    memory_gb_per_s: float,
    link_gb_per_s: float,
    host_gb_per_s: float,
    host_memory: str = "512GiB",
    peer_gb_per_s: float | None = None,
) -> Hardware:
    matmul, device = tflops * 1e12, memory_gb_per_s * 1e9
    link, host = link_gb_per_s * 1e9, host_gb_per_s * 1e9
    return Hardware(
        name=name,
        description=description,
        device_memory_bytes=parse_bytes(memory),
        host_memory_bytes=parse_bytes(host_memory),
        matmul_flops_per_s=matmul,
        device_bytes_per_s=device,
        link_bytes_per_s=link,
        link_back_bytes_per_s=link,
        host_bytes_per_s=host,
        prefill_attention_flops_per_s=_ATTAINABLE * matmul,
        decode_attention_bytes_per_s=_ATTAINABLE * device,
        host_attention_bytes_per_s=_HOST_ATTAINABLE * host,
        peer_bytes_per_s=None if peer_gb_per_s is None else _ATTAINABLE * peer_gb_per_s * 1e9,
    )


_PRESETS = (
    # The paper's machine (section 4 and Table 12): 165 TFLOP/s, 1 TB/s, PCIe 4.0 x16 at 25 GB/s,
    # an EPYC 7V12 with eight channels of DDR4-3200, 1 TB of host memory, 512 GB of it for KV.
    _from_data_sheet(
        "rtx-4090",
        "NVIDIA GeForce RTX 4090, PCIe 4.0 x16",
        memory="24GiB",
        tflops=165,
        memory_gb_per_s=1000,
        link_gb_per_s=25,
        host_gb_per_s=140,
    ),
    _from_data_sheet(
        "rtx-3090",
        "NVIDIA GeForce RTX 3090, PCIe 4.0 x16",
        memory="24GiB",
        tflops=71,
        memory_gb_per_s=936,
        link_gb_per_s=25,
        host_gb_per_s=60,
        host_memory="128GiB",
    ),
    _from_data_sheet(
        "rtx-5090",
        "NVIDIA GeForce RTX 5090, PCIe 5.0 x16",
        memory="32GiB",
        tflops=209,
        memory_gb_per_s=1792,
        link_gb_per_s=50,
        host_gb_per_s=80,
        host_memory="128GiB",
    ),
    _from_data_sheet(
        "a100-80gb",
        "NVIDIA A100 80GB, PCIe 4.0 x16",
        memory="80GiB",
        tflops=312,
        memory_gb_per_s=2000,
        link_gb_per_s=25,
        host_gb_per_s=140,
        peer_gb_per_s=300,
    ),
    _from_data_sheet(
        "h100-80gb",
        "NVIDIA H100 SXM 80GB, PCIe 5.0 x16",
        memory="80GiB",
        tflops=989,
        memory_gb_per_s=3350,
        link_gb_per_s=50,
        host_gb_per_s=250,
        peer_gb_per_s=450,
    ),
    _from_data_sheet(
        "h200",
        "NVIDIA H200 SXM 141GB, PCIe 5.0 x16",
        memory="141GB",
        tflops=989,
        memory_gb_per_s=4800,
        link_gb_per_s=50,
        host_gb_per_s=250,
        peer_gb_per_s=450,
    ),
)

HARDWARE: dict[str, Hardware] = {preset.name: preset for preset in _PRESETS}
"""The machines known by name."""


def preset_hardware(name: str) -> Hardware:
    """Return a machine known by name.

    Raises:
        OptionError: there is none of that name.
    """
    if name not in HARDWARE:
        known = ", ".join([*HARDWARE, THIS])
        raise OptionError(f"hardware {name!r} is not known; use one of {known}")
    return HARDWARE[name]
