"""All chosen disks of a VM as of one instant: what every flavour hands over to a backup."""

from collections.abc import Sequence

from hypervisor.discovery import Capabilities, LeftOut
from hypervisor.flavours import FlavourName
from hypervisor.live_source import LiveSource


class FrozenView:
    """All chosen disks of a VM as of one instant; made by `vm.frozen_view` and `provided.provided_view`."""

    def __init__(
        self,
        flavour: FlavourName,
        able: Capabilities,
        *,
        instant: float,
        frozen_s: float = 0.0,
        left_out: Sequence[LeftOut] = (),
        warnings: list[str] | None = None,
    ) -> None:
        self.sources: list[LiveSource] = []  #: in QEMU's order
        self.flavour = flavour  #: who made it
        self.capabilities = able
        self.instant = instant  #: Unix seconds of the instant
        self.frozen_s = frozen_s  #: seconds from freeze sent to thaw answered, 0 without a freeze
        self.left_out = left_out  #: block devices that are not part of the view, with the reason
        #: Sentences for the report; complete when the block has been left.
        self.warnings = [] if warnings is None else warnings
        self._committed = False

    @property
    def committed(self) -> bool:
        """Whether `commit` was called."""
        return self._committed

    def commit(self) -> None:
        """The snapshot is finished in the datastore: the new bitmaps take over when the block is left.

        Without this the old ones go on, whatever else happened.
        """
        self._committed = True
