"""Simulated devices that layers are spread over."""

from headinfer.device.simulated import SimulatedDevice


def spread(*layers: int, seed: int = 0) -> list[SimulatedDevice]:
    """Return a device for each layer, from the numbers of the devices."""
    devices = {number: SimulatedDevice(seed=seed + number) for number in sorted(set(layers))}
    return [devices[number] for number in layers]
