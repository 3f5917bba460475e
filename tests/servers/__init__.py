"""Servers on loopback: a hub, honest and hostile web servers."""
