"""Tables of the desk, the one writer. Times are Unix ms UTC (platform time unless a column says otherwise).

`json` columns hold text written by msgspec. Ids are given in order by the desk, never at random, so that replaying its
journal gives the same rows.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

metadata = MetaData()
Id = BigInteger().with_variant(Integer, "sqlite")  # SQLite only counts INTEGER PRIMARY KEY by itself


def _number(table: str, name: str = "id") -> Column[int]:
    """Return a table's own number: one more than the last, in the transaction that writes the row.

    There is one writer, so nobody needs a sequence; and a sequence would leave gaps where a transaction fails, so that
    a replay of the journal would give other rows.
    """
    return Column(name, Id, primary_key=True, default=text(f"(SELECT coalesce(max({name}), 0) + 1 FROM {table})"))


# Keys of `meta` that no desk works beside (docs/database.md).
MOVING = "moving"  # here: a copy from elsewhere has not ended
MOVED = "moved"  # here: what there was goes on elsewhere

meta = Table(
    "meta",
    metadata,
    Column("key", String, primary_key=True),
    Column("value", Text, nullable=False),
)

lease = Table(
    "lease",
    metadata,
    Column("name", String, primary_key=True),  # desk
    Column("holder", String, nullable=False),
    Column("generation", BigInteger, nullable=False),  # one more with every change of the holder
    Column("until", BigInteger, nullable=False),  # by the database's clock; 0 where a file lock decides (SQLite)
    comment="who may write: locked and compared in every transaction of a writer",
)

consumed = Table(
    "consumed",
    metadata,
    Column("shard", Integer, primary_key=True, autoincrement=False),
    Column("offset", BigInteger, nullable=False),  # next offset of the shard's transition log
    Column("source", BigInteger, nullable=False, server_default="-1"),  # (source, index) of the last transition:
    Column("index", BigInteger, nullable=False, server_default="-1"),  # a repeat under another offset is known by it
    comment="how far the desk is; written in the same transaction as what it did",
)

journal = Table(
    "journal",
    metadata,
    _number("journal", "n"),
    Column("at", BigInteger, nullable=False),  # the `now` of this input's decisions
    Column("source", String, nullable=False),  # registry | transition | command | timer | delivery
    Column("shard", Integer),
    Column("offset", BigInteger),  # of a transition
    Column("body", Text),  # json, of the others
)

alarms = Table(
    "alarms",
    metadata,
    _number("alarms"),
    Column("rule", String, nullable=False),
    Column("ruleset", String, nullable=False),
    Column("subject", String, nullable=False),
    Column("state", String, nullable=False),  # streams.alarms.ALARM
    Column("open", Integer, nullable=False),  # 1 until the machine's final state
    Column("active", Integer, nullable=False),  # 1 while the condition holds
    Column("urgency", String, nullable=False),
    Column("raised_at", BigInteger, nullable=False),  # event time
    Column("received_at", BigInteger, nullable=False),
    Column("opened_at", BigInteger, nullable=False),
    Column("last_at", BigInteger, nullable=False),
    Column("cleared_at", BigInteger),
    Column("due_at", BigInteger),  # when a cleared alarm is let go
    Column("acknowledged_at", BigInteger),
    Column("acknowledged_by", String),
    Column("count", Integer, nullable=False),
    Column("shard", Integer, nullable=False),
    Column("source", BigInteger, nullable=False),  # log offset that raised it
    Column("evidence", Text, nullable=False),  # json Evidence of the latest raise
    Column("incident", BigInteger, ForeignKey("incidents.id")),
    Column("why", String, nullable=False, server_default=""),  # reason code of its membership
    Index(
        "one_open_alarm",
        "rule",
        "subject",
        unique=True,
        sqlite_where=text("open = 1"),
        postgresql_where=text("open = 1"),
    ),
    Index("alarms_by_incident", "incident"),
    Index("alarms_by_subject", "subject"),
    Index(
        "alarms_due",
        "due_at",
        sqlite_where=text("due_at IS NOT NULL"),
        postgresql_where=text("due_at IS NOT NULL"),
    ),
)

incidents = Table(
    "incidents",
    metadata,
    _number("incidents"),
    Column("state", String, nullable=False),  # streams.incidents.INCIDENT
    Column("open", Integer, nullable=False),
    Column("kind", String, nullable=False, server_default="case"),  # case | maintenance; they never mix
    Column("cause", String, nullable=False),
    Column("by", String, nullable=False),
    Column("key", String, nullable=False),  # the zone, building, gateway or device that members share
    Column("urgency", String, nullable=False),
    Column("opened_at", BigInteger, nullable=False),
    Column("first_at", BigInteger, nullable=False, server_default="0"),  # event time of the earliest raise
    Column("last_at", BigInteger, nullable=False),  # event time of the latest
    Column("due_at", BigInteger),  # when its policy looks again
    Column("quiet_at", BigInteger),  # when it ends, if none of its alarms comes back until then
    Column("confirmed_at", BigInteger),
    Column("confirmed_by", String),
    Column("reason", String, nullable=False, server_default=""),
    Index("open_incidents", "cause", "key", sqlite_where=text("open = 1"), postgresql_where=text("open = 1")),
    Index(
        "incidents_due",
        "due_at",
        sqlite_where=text("due_at IS NOT NULL"),
        postgresql_where=text("due_at IS NOT NULL"),
    ),
)

cases = Table(
    "cases",
    metadata,
    _number("cases"),
    Column("number", String, nullable=False, unique=True),
    Column("kind", String, nullable=False),  # case | rescue | maintenance
    Column("incident", BigInteger, ForeignKey("incidents.id"), nullable=False),
    Column("alarm", BigInteger, ForeignKey("alarms.id"), nullable=False),  # the one that leads
    Column("subject", String, nullable=False),
    Column("category", String, nullable=False),
    Column("edition", String, nullable=False),
    Column("code", String, nullable=False),
    Column("title_zh", String, nullable=False),
    Column("title_en", String, nullable=False),
    Column("urgency", String, nullable=False),
    Column("lon", Float, nullable=False),
    Column("lat", Float, nullable=False),
    Column("cell", String, nullable=False),
    Column("grid", String, nullable=False),
    Column("street", String, nullable=False),
    Column("address", String, nullable=False),
    Column("workstation", String, nullable=False, server_default=""),
    Column("community", String, nullable=False, server_default=""),
    Column("road", String, nullable=False, server_default=""),
    Column("road_chief", String, nullable=False, server_default=""),
    Column("unit", String, nullable=False),
    Column("area_owner", String, nullable=False),
    Column("stage", String, nullable=False),  # api.cases.CASE
    Column("owner_system", String, nullable=False),  # native | external
    Column("external_id", String),
    Column("observed_at", BigInteger, nullable=False),
    Column("opened_at", BigInteger, nullable=False),
    Column("deadline", BigInteger, nullable=False),
    Column("rescued_at", BigInteger),  # 解困; closed_at is the other clock
    Column("closed_at", BigInteger),
    Column("verdict", String),  # confirmed | false_alarm | duplicate
    Column("verdict_reason", String),
    Column("evidence", Text, nullable=False),  # json: members with reasons
    Index(
        "one_case",
        "incident",
        unique=True,
        sqlite_where=text("kind <> 'rescue'"),
        postgresql_where=text("kind <> 'rescue'"),
    ),
    Index(
        "one_rescue",
        "alarm",
        unique=True,
        sqlite_where=text("kind = 'rescue'"),
        postgresql_where=text("kind = 'rescue'"),
    ),
)

timeline = Table(
    "timeline",
    metadata,
    _number("timeline"),
    Column("at", BigInteger, nullable=False),
    Column("entity", String, nullable=False),  # alarm | incident | case | asset | register
    Column("entity_id", BigInteger, nullable=False),
    Column("event", String, nullable=False),
    Column("before", String, nullable=False),
    Column("after", String, nullable=False),
    Column("reason", String, nullable=False),  # reason code
    Column("actor", String, nullable=False),
    Column("details", Text, nullable=False, server_default="{}"),
    Index("timeline_of", "entity", "entity_id"),
)

outbox = Table(
    "outbox",
    metadata,
    Column("id", String, primary_key=True),  # the webhook-id: what makes a repeat harmless
    Column("n", Id, nullable=False, unique=True),
    Column("case_id", BigInteger, ForeignKey("cases.id"), nullable=False),
    Column("type", String, nullable=False),
    Column("body", Text, nullable=False),  # the exact bytes that are signed
    Column("urgent", Integer, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("state", String, nullable=False),  # pending | delivered | dead
    Column("attempts", Integer, nullable=False),
    Column("next_at", BigInteger, nullable=False),  # real time
    Column("delivered_at", BigInteger),
    Column("last_error", String),
    Index("outbox_due", "state", "next_at"),
    Index("outbox_by_case", "case_id"),
)

commands = Table(
    "commands",
    metadata,
    Column("id", String, primary_key=True),
    Column("kind", String, nullable=False),
    Column("actor", String, nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("applied_at", BigInteger, nullable=False),
    Column("result", String, nullable=False),  # applied | refused
    Column("message", String, nullable=False),
    Column("reason", String, nullable=False),
)

# --- the ledger (台账): docs/ledger.md. Its version stands in `meta`; every row is also in the change that brought it.

assets = Table(
    "assets",
    metadata,
    _number("assets"),
    Column("code", String, nullable=False, unique=True),
    Column("kind", String, nullable=False),
    Column("name", String, nullable=False),
    Column("state", String, nullable=False),  # api.assets.book.ASSET
    Column("lon", Float, nullable=False),  # degrees, CGCS2000
    Column("lat", Float, nullable=False),
    Column("cell", String, nullable=False),
    Column("grid", String, nullable=False),  # of the cell, for lists
    Column("street", String, nullable=False),
    Column("road", String, nullable=False),
    Column("address", String, nullable=False),
    Column("zone", String, nullable=False),
    Column("building", String, nullable=False),
    Column("gateway", String, nullable=False),
    Column("maintainer", String, nullable=False),
    Column("sensor", String, nullable=False),  # what it carries now
    Column("since", BigInteger, nullable=False),
    Column("until", BigInteger),
    Column("body", Text, nullable=False),  # json api.assets.book.Asset
    Index("assets_by_kind", "kind", "code"),
    Index("assets_by_sensor", "sensor"),
)

sensors = Table(
    "sensors",
    metadata,
    _number("sensors"),
    Column("sensor", String, nullable=False),  # its name on the wire
    Column("asset", String, nullable=False),
    Column("installed_at", BigInteger, nullable=False),
    Column("removed_at", BigInteger),
    Column("reason", String, nullable=False),
    UniqueConstraint("asset", "sensor", "installed_at"),
    Index("sensors_by_name", "sensor"),
)

organisation = Table(
    "organisation",
    metadata,
    _number("organisation"),
    Column("kind", String, nullable=False),  # gateways | units | areas | zones | cells | roads | shapes
    Column("key", String, nullable=False),
    Column("body", Text, nullable=False),  # json of its struct
    UniqueConstraint("kind", "key"),
    comment="what stands around the assets: read and written whole, looked up by key",
)

registers = Table(
    "registers",
    metadata,
    _number("registers"),
    Column("kind", String, nullable=False),  # use | maintenance
    Column("subject", String, nullable=False),
    Column("rules", Text, nullable=False),  # json
    Column("from_ms", BigInteger, nullable=False),
    Column("until_ms", BigInteger, nullable=False),
    Column("actor", String, nullable=False),
    Column("reason", String, nullable=False),
    Column("entered_at", BigInteger, nullable=False),
    Column("state", String, nullable=False),  # api.assets.book.REGISTER
    Column("cancelled_by", String, nullable=False, server_default=""),
    Index("registers_by_subject", "subject"),
)

orders = Table(
    "orders",
    metadata,
    _number("orders"),
    Column("command", String, nullable=False, unique=True),  # its id on the wire
    Column("gateway", String, nullable=False),
    Column("what", String, nullable=False),
    Column("body", Text, nullable=False),  # json
    Column("actor", String, nullable=False),
    Column("reason", String, nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("until", BigInteger, nullable=False),
    Column("state", String, nullable=False),  # asked | done | failed
    Column("answer", Text, nullable=False),
    Column("answered_at", BigInteger),
    Index("orders_by_gateway", "gateway", "id"),
)

asked = Table(
    "asked",
    metadata,
    _number("asked"),
    Column("at", BigInteger, nullable=False),
    Column("kind", String, nullable=False),  # registry | override | order
    Column("body", Text, nullable=False),  # json
    Column("actor", String, nullable=False),
    Column("reason", String, nullable=False),
    Column("done", Integer, nullable=False, server_default="0"),
    Index("asked_waiting", "done", sqlite_where=text("done = 0"), postgresql_where=text("done = 0")),
    comment="what ingest is to write into the logs; done once it lies in ingest's mailbox",
)
