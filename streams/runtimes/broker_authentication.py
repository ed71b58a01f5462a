"""Who may use the built-in broker: clients on this machine, for this product's topics, and nobody else.

There is no password: whoever may open a loopback connection on this machine may publish (docs/operations.md). Between
machines, use mosquitto or EMQX with client certificates.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from amqtt.contexts import Action
from amqtt.plugins.base import BaseAuthPlugin, BaseTopicPlugin
from amqtt.session import Session

PREFIX = "cb/v1/"


def on_this_machine(address: str | None) -> bool:
    """Return whether a peer's address is a loopback one."""
    try:
        return address is not None and ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


class Loopback(BaseAuthPlugin, BaseTopicPlugin):  # type: ignore[misc]  # amqtt is untyped to us
    """Lets in loopback peers that name themselves, and keeps everybody to `cb/v1/…`."""

    @dataclass
    class Config:
        """It has no options."""

    async def authenticate(self, *, session: Session) -> bool | None:
        """Return whether the client may connect."""
        return bool(session.client_id) and on_this_machine(session.remote_address)

    async def topic_filtering(
        self, *, session: Session | None = None, topic: str | None = None, action: Action | None = None
    ) -> bool | None:
        """Return whether the client may subscribe to, publish to or receive from the topic."""
        return session is not None and topic is not None and topic.startswith(PREFIX)
