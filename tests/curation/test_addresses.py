"""Which addresses a download may reach."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.addresses import address_allowed, host_listed

REFUSED = [
    "10.0.0.1",
    "172.16.5.4",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "0.0.0.0",
    "224.0.0.1",
    "255.255.255.255",
    "fe80::1",
    "fe80::1%eth0",
    "fc00::1",
    "fd00:ec2::254",
    "::",
    "ff02::1",
    "::ffff:10.0.0.1",
    "::ffff:169.254.169.254",
    "2002:0a00:0001::1",
    "64:ff9b::a9fe:a9fe",
    "2001:0:53aa:64c:0:0:0:1",
    "fec0::1",
    "3fff::1",
    "192.0.0.8",
    "192.88.99.1",
    "168.63.129.16",
    "::ffff:168.63.129.16",
    "64:ff9b:1::a9fe:a9fe",
]


@pytest.mark.parametrize("address", REFUSED)
def test_private_and_special_addresses_are_refused_even_where_loopback_is_allowed(address):
    assert not address_allowed(address, allow_loopback=True)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1"])
def test_loopback_needs_permission(address):
    assert not address_allowed(address)
    assert address_allowed(address, allow_loopback=True)


@pytest.mark.parametrize("address", ["93.184.215.14", "2606:2800:21f:cb07::1", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses_are_allowed(address):
    assert address_allowed(address)


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_is_judged_the_same_in_its_ipv6_clothes(address):
    assert address_allowed(f"::ffff:{address}") == address_allowed(str(address))


def test_a_host_is_listed_for_every_port_or_for_one():
    assert host_listed("Example.org", 8080, ("example.org",))
    assert host_listed("example.org", 8080, ("EXAMPLE.org:8080",))
    assert not host_listed("example.org", 8081, ("example.org:8080",))
    assert not host_listed("sub.example.org", 443, ("example.org",))
    assert not host_listed("example.org", 443, ())
