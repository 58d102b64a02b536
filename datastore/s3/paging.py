"""A listing that never ends is found out: no endpoint may keep a job busy for ever."""

from typing import Final

from datastore.s3.errors import S3AnswerError
from datastore.s3.xml import Page

#: Pages without an object in a row. A bucket with many deleted objects may give some.
MAX_EMPTY_PAGES: Final = 1000


class EndlessListing:
    """Looks at the pages of one listing, which have their objects in byte order of keys."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._last = b""
        self._empty = 0

    def check(self, page: Page) -> None:
        """Look at the next page.

        Raises:
            S3AnswerError: it does not lead on, so the listing would have no end.
        """
        if not page.objects:
            self._empty += 1
            if self._empty > MAX_EMPTY_PAGES:
                raise self._endless(f"{self._empty} pages in a row have no object")
            return
        self._empty = 0
        last = max(one.key.encode() for one in page.objects)
        if last <= self._last:
            raise self._endless("a page has no key behind those of the page before")
        self._last = last

    def _endless(self, why: str) -> S3AnswerError:
        return S3AnswerError(
            "list the objects of", self._where, why, "does another server answer in between?", status=200
        )
