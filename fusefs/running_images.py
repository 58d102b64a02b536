"""How many processes of a mount read disk images at a time."""

from collections import OrderedDict
from typing import Final

from diskfs.client import LookedInto

#: Each takes about 50 MiB, and at most what `diskfs.worker` allows.
MAX_RUNNING: Final = 6


class RunningImages:
    """The images that were looked into last: only these keep a process."""

    def __init__(self) -> None:
        self._images: OrderedDict[LookedInto, None] = OrderedDict()

    async def use(self, image: LookedInto) -> None:
        """`image` is used now. The process of one that was not used for longest ends, and starts again when needed."""
        self._images[image] = None
        self._images.move_to_end(image)
        if len(self._images) > MAX_RUNNING:
            oldest = next((one for one in self._images if not one.is_busy and one is not image), None)
            if oldest is not None:
                del self._images[oldest]
                await oldest.aclose()
