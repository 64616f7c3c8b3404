"""Fixtures for all tests."""

from tests.fixtures.servers import etcd_server, nats_server, start_etcd, start_nats

__all__ = ["etcd_server", "nats_server", "start_etcd", "start_nats"]
