"""`headinfer bench report`."""


def report() -> None:
    """Write the report."""
