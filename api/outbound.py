"""Requests that this server makes to addresses that its users name: which are allowed, and how they are made.

A name is looked up once, every address that it has is judged, and the connection goes to one that was judged:
who answers for a name can't have another address for the second look.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

import httpx

from shared.errors import InvalidRequest
from shared.settings import Settings, matches
from shared.spec import CONTROL_CHARACTERS

SECONDS = 10.0
MAX_URL = 2000
MAX_ADDRESSES = 4
HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|[0-9A-Fa-f:.]{2,45}")
PORTS = {"https": 443, "http": 80}


class Unreachable(Exception):
    """Nobody could be reached under this URL, or nobody who may be; the message says which."""


@dataclass(frozen=True)
class Target:
    """A URL that may be called, by its form."""

    url: SplitResult
    host: str
    port: int


def check_url(url: str, settings: Settings) -> Target:
    """What can be said of a URL without looking its name up.

    Raises:
        InvalidRequest: it is no proper URL, or its scheme, host or address is not allowed on this server.
    """
    if len(url) > MAX_URL or CONTROL_CHARACTERS.search(url) or " " in url or not url.isascii():
        raise _refused(f"should be a URL of at most {MAX_URL} printable ASCII characters")
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError as error:
        raise _refused("is not a proper URL") from error
    schemes = ("https", "http") if settings.webhook_private else ("https",)
    if parts.scheme not in schemes:
        raise _refused(f"should begin with {' or '.join(f'{scheme}://' for scheme in schemes)}")
    if not HOST.fullmatch(host) or parts.username is not None or parts.fragment or "\\" in url:
        raise _refused("should have a host, and neither a user nor a fragment")
    if not matches(settings.webhook_allow.lower(), host):
        raise _refused(
            f"has a host that is not allowed here, where these are: {settings.webhook_allow}. The server's "
            "operator sets TUNEYARD_WEBHOOK_ALLOW",
            code="webhook_not_allowed",
        )
    if _is_address(host) and not address_allowed(host, settings):
        raise _refused(
            "has an address that is not public. The server's operator sets TUNEYARD_WEBHOOK_PRIVATE",
            code="webhook_not_allowed",
        )
    return Target(parts, host, port or PORTS[parts.scheme])


def address_allowed(address: str, settings: Settings) -> bool:
    """Whether this server may connect to it: public ones, others only if its operator says so."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo[1] if found.teredo else None)
        if inner is not None:
            return address_allowed(str(inner), settings)
        # Reserved ones hold IPv4 addresses that some networks translate.
        if found.is_site_local or found.is_reserved:
            return settings.webhook_private and not found.is_unspecified
    if found.is_multicast or found.is_unspecified:
        return False
    return found.is_global or settings.webhook_private


async def post(url: str, body: str, headers: Mapping[str, str], settings: Settings) -> int:
    """Post the body and return the status of the answer; no redirect is followed, no content read.

    Raises:
        Unreachable: not allowed any more, no such name, no address that is allowed, no answer in time.
    """
    try:
        target = check_url(url, settings)
    except InvalidRequest as error:
        raise Unreachable(error.message) from error
    try:
        async with asyncio.timeout(SECONDS):
            addresses = await _addresses(target, settings)
            return await _post_to_first(target, addresses, body, headers)
    except TimeoutError as error:
        raise Unreachable(f"No answer within {SECONDS:.0f} s.") from error


async def _addresses(target: Target, settings: Settings) -> list[str]:
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise Unreachable(f"The name {target.host} could not be looked up.") from error
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    # All of them: a name with a private address beside a public one is up to no good.
    if not addresses or not all(address_allowed(address, settings) for address in addresses):
        raise Unreachable(f"The name {target.host} has an address that is not public.")
    return addresses[:MAX_ADDRESSES]


async def _post_to_first(target: Target, addresses: list[str], body: str, headers: Mapping[str, str]) -> int:
    # No proxy of the environment: it would look the name up by itself.
    async with httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=SECONDS) as client:
        for address in addresses:
            place = f"[{address}]" if ":" in address else address
            url = target.url._replace(netloc=f"{place}:{target.port}").geturl()
            # The certificate must be the name's, whatever address answers for it.
            tls = {} if _is_address(target.host) else {"sni_hostname": target.host}
            told = {**headers, "host": target.url.netloc}
            try:
                async with client.stream("POST", url, content=body, headers=told, extensions=tls) as answer:
                    return answer.status_code
            except httpx.ConnectError:
                continue
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise Unreachable(f"No proper answer ({type(error).__name__}).") from error
    raise Unreachable("No connection.")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _refused(why: str, code: str | None = None) -> InvalidRequest:
    return InvalidRequest(f"url {why}.", param="url", code=code)
