"""Who may ask: one token for scores, another for the student."""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Iterable
from dataclasses import dataclass, field

from acqsynth.serve.errors import ForbiddenError, UnauthorizedError

OPEN = frozenset({"/health"})  #: routes that tell nothing and ask for no token
ADMIN = frozenset({"/student"})  #: routes of the admin token


@dataclass(frozen=True)
class Access:
    """The tokens of a server; without ``token`` scores are for everybody, without ``admin_token`` the student is for
    nobody to change."""

    token: str | None = field(default=None, repr=False)
    admin_token: str | None = field(default=None, repr=False)

    def check(self, path: str, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """
        Args:
            path: of the request, decoded.
            headers: of the request, names in lower case.

        Raises:
            UnauthorizedError: no token or a wrong one. ForbiddenError: an admin's route of a server without such a
                token.
        """
        if path in OPEN:
            return
        expected = self.admin_token if path in ADMIN else self.token
        if expected is None:
            if path in ADMIN:
                raise ForbiddenError("the student cannot be changed: the server was started without an admin token")
            return
        given = [value for name, value in headers if name == b"authorization"]
        secret = _secret(given[0]) if len(given) == 1 else None
        if secret is None:
            raise UnauthorizedError("expected the header 'Authorization: Bearer <token>'")
        if not hmac.compare_digest(secret, expected.encode("ascii")):
            raise UnauthorizedError("the token is wrong")


def _secret(header: bytes) -> bytes | None:
    """The token of a bearer header, or the password of a basic one: OpenRLHF can send no header of its own, but a URL
    ``http://user:token@host`` makes a basic one."""
    scheme, _, rest = header.strip().partition(b" ")
    if scheme.lower() == b"bearer":
        return rest.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(rest.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            return None
    return None
