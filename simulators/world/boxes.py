"""Which gateway a device speaks through: a Pi nearby, or the cloud of its operator."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby

import msgspec

from citybrain.model import Device, Gateway
from simulators.world.assets import Asset, Land
from simulators.world.city import Metres
from simulators.world.mains import SHARDS, ZONES_A_SHARD
from simulators.world.organisation import contractors
from simulators.world.roads import Spot

PI_GATEWAYS = 60
PIS_A_SHARD = PI_GATEWAYS // SHARDS
GATEWAY_METRICS = ("uptime_s", "spooled", "clock_offset_s", "uplink_kb_per_h", "certificate_days", "quality")


class Wired(msgspec.Struct, frozen=True):
    """Gateways, all devices with their gateway (the gateways themselves among them), and where they stand."""

    gateways: list[Gateway]
    devices: list[Device]
    metres: dict[str, Metres]


def shard_of(zone: int) -> int:
    """Return the shard of zone 0..47 and of all that stands in it."""
    return zone // ZONES_A_SHARD


def connect(assets: Sequence[Asset], land: Land) -> Wired:
    """Return the assets with their gateways: cloud-0..3, one a shard, for those on battery, a Pi for all others.

    A building is never cut in two; the Pis of a shard serve nearly the same number of devices, those of
    neighbouring zones together.
    """
    gateway_of: dict[str, str] = {}
    cabinets: dict[str, Spot] = {}
    for shard in range(SHARDS):
        mine = [asset for asset in assets if shard_of(asset.zone) == shard]
        served = {f"cloud-{shard}": [asset for asset in mine if on_battery(asset)]} | _pis(shard, mine)
        gateway_of |= {asset.device.id: name for name, group in served.items() for asset in group}
        cabinets |= {name: _cabinet(group) for name, group in served.items()} | {f"cloud-{shard}": _cabinet(mine)}
    gateways = [
        Gateway(
            name, shard_of(land.zone(spot)), land.place(spot, "云平台接入" if name.startswith("cloud-") else "机柜")
        )
        for name, spot in sorted(cabinets.items())
    ]
    devices = [msgspec.structs.replace(asset.device, gateway=gateway_of[asset.device.id]) for asset in assets]
    metres = {asset.device.id: asset.spot.at for asset in assets} | {name: spot.at for name, spot in cabinets.items()}
    return Wired(gateways, devices + [_vitals(gateway) for gateway in gateways], metres)


def on_battery(asset: Asset) -> bool:
    """Say whether an asset reports through its operator's cloud."""
    return "battery" in asset.device.tags


def _pis(shard: int, assets: Sequence[Asset]) -> dict[str, list[Asset]]:
    """Return what each Pi of a shard serves."""
    near = sorted(
        (asset for asset in assets if not on_battery(asset)),
        key=lambda asset: (asset.zone, asset.spot.at, asset.device.id),
    )
    served: dict[str, list[Asset]] = defaultdict(list)
    done = 0
    for _, together in groupby(near, key=lambda asset: asset.device.building or asset.device.id):
        group = list(together)
        number = int((done + len(group) / 2) * PIS_A_SHARD / len(near))
        served[f"gw-{shard * PIS_A_SHARD + number + 1:02d}"] += group
        done += len(group)
    return served


def _cabinet(served: Sequence[Asset]) -> Spot:
    """Return where a gateway stands: in a building with elevators if it has one, else in a pump room, else outside."""
    order = ("elevator", "pump_room", "camera", "hydrant")
    return min(served, key=lambda asset: order.index(asset.device.kind)).spot


def _vitals(gateway: Gateway) -> Device:
    keepers = contractors("sensor-ops")
    label = gateway.id.removeprefix("gw-")
    name = f"网关{label}" if label != gateway.id else f"云接入{gateway.id.removeprefix('cloud-')}"
    keeper = keepers[gateway.shard % len(keepers)].code
    return Device(gateway.id, "gateway", gateway.id, gateway.place, GATEWAY_METRICS, name=name, maintainer=keeper)
