"""Which network addresses a download may reach. Pure arithmetic: nothing here resolves names or connects."""

from __future__ import annotations

import ipaddress

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Not public, whatever this version of Python says: protocol assignments, 6to4 relays, the metadata host of one cloud,
# site-local and documentation addresses.
_REFUSED = tuple(
    map(
        ipaddress.ip_network,
        ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "fec0::/10", "3fff::/20"),
    )
)


def address_allowed(address: str, *, allow_loopback: bool = False) -> bool:
    """True for a public unicast IP address: not private, link-local, metadata, shared, multicast or reserved.

    An IPv6 address that contains an IPv4 address (mapped, 6to4, NAT64) is judged by that one. Loopback is allowed only
    with `allow_loopback`. `address` is an IP address, with or without a zone; ValueError if it is not one.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        carried = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            carried = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if carried is not None:
            return address_allowed(str(carried), allow_loopback=allow_loopback)
        if ip.teredo is not None:
            return False
    if ip.is_loopback:
        return allow_loopback
    if any(ip in network for network in _REFUSED):
        return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def host_listed(host: str, port: int, allowed: tuple[str, ...]) -> bool:
    """True if `allowed` names the host: "example.org" allows all its ports, "example.org:8080" only that one."""
    names = {name.lower() for name in allowed}
    return host.lower() in names or f"{host.lower()}:{port}" in names
