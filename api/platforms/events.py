"""What we tell the grid platform: CloudEvents 1.0, structured JSON (`application/cloudevents+json`).

`data` is the case as it stands when the event is written. The event's id is the webhook's id, so (source, id) is
unique and a repeat is harmless. Times in `data` are Unix ms UTC, the envelope's is ISO 8601.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from citybrain.clock import iso

SOURCE = "urn:citybrain:desk"
CONTENT_TYPE = "application/cloudevents+json"
CASE_CREATED = "cn.citybrain.case.created"
RESCUE_CREATED = "cn.citybrain.rescue.created"
CASE_UPDATED = "cn.citybrain.case.updated"  # category, place or evidence changed, or what had ended came back
CASE_RECOVERED = "cn.citybrain.case.recovered"  # the sensors say that it is over (a rescue: 解困)


PLACE = (
    "lon", "lat", "cell", "grid", "workstation", "community", "street", "road", "road_chief", "address",
)  # fmt: skip


class CloudEvent(msgspec.Struct, frozen=True, omit_defaults=False):
    """The envelope. `subject` is the case's number; `time` is platform time."""

    id: str
    type: str
    time: str
    subject: str
    data: dict[str, Any]
    source: str = SOURCE
    specversion: str = "1.0"
    datacontenttype: str = "application/json"


def case_data(
    case: Mapping[str, Any], unit: tuple[str, str], owner: tuple[str, str], *, active: bool
) -> dict[str, Any]:
    """Return a case as events carry it; `unit` and `owner` are names (zh, en); `active`: the sensors still say so."""
    evidence = msgspec.json.decode(case["evidence"])
    return {
        "number": case["number"],
        "kind": case["kind"],
        "category": case["category"],
        "class": {"edition": case["edition"], "code": case["code"]},
        "title": {"zh": case["title_zh"], "en": case["title_en"]},
        "urgency": case["urgency"],
        "device": case["subject"],
        "members": sorted({line["device"] for line in evidence}),
        "place": {name: case[name] for name in PLACE},
        "unit": {"code": case["unit"], "zh": unit[0], "en": unit[1]},
        "area_owner": {"code": case["area_owner"], "zh": owner[0], "en": owner[1]},
        "incident": case["incident"],
        "stage": case["stage"],
        "observed_at": case["observed_at"],
        "opened_at": case["opened_at"],
        "deadline": case["deadline"],
        "rescued_at": case["rescued_at"],
        "active": active,
        "evidence": evidence,
    }


def encode(id: str, kind: str, at_ms: int, data: Mapping[str, Any]) -> bytes:
    """Return the event's bytes: what is stored, signed and sent."""
    return msgspec.json.encode(CloudEvent(id, kind, iso(at_ms), str(data["number"]), dict(data)), order="deterministic")
