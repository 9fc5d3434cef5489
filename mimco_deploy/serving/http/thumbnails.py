"""Small copies of pictures, made when they are asked for and kept in memory for a while."""

from __future__ import annotations

from collections import OrderedDict

from mimco_deploy.serving.http.batching import BusyError
from mimco_deploy.serving.http.service import Service

_CACHE_BYTES = 64 * 2**20
_MOST_WAITING = 256


class Thumbnails:
    """The thumbnails of one service.

    Args:
        service: whose pictures they are of.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._kept: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._bytes = 0
        self._waiting = 0

    async def get(self, content: str, side_px: int) -> bytes:
        """One as JPEG.

        Args:
            content: SHA-256 of the picture, hexadecimal.
            side_px: the longest side.

        Raises:
            BusyError: too many are being made.
            MimcoError: as `Service.thumbnail`.
        """
        key = (content, side_px)
        found = self._kept.get(key)
        self._service.metrics.thumbnails.labels("made" if found is None else "cache").inc()
        if found is not None:
            self._kept.move_to_end(key)
            return found
        if self._waiting >= _MOST_WAITING:
            raise BusyError(1)
        self._waiting += 1
        try:
            made = await self._service.thumbnail(content, side_px)
        finally:
            self._waiting -= 1
        if key not in self._kept:
            self._kept[key] = made
            self._bytes += len(made)
        while self._bytes > _CACHE_BYTES:
            self._bytes -= len(self._kept.popitem(last=False)[1])
        return made
