"""The reference district: the structure of the reference city's, at full size, invented in everything else."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from citybrain.model import Registry
from simulators.world import areas, assets, mains, roads
from simulators.world.boxes import connect
from simulators.world.city import District, grouped
from simulators.world.organisation import organisation


def build_reference(seed: int) -> District:
    """Return the reference district of a seed: 14 streets, 2,000 hydrants, 600 elevators, 400 cameras, 64 gateways."""

    def dice(topic: str) -> random.Random:  # each topic its own, so that a change in one moves nothing in another
        return random.Random(f"{seed}/reference/{topic}")

    ground = areas.survey(dice("areas"))
    land = assets.Land(ground.cells, mains.zones(dice("zones")), roads.lay(dice("roads")))
    hydrants = assets.hydrants(dice("hydrants"), land)
    lifts, floors = assets.elevators(dice("elevators"), land)
    cameras, pumps = assets.cameras(dice("cameras"), land), assets.pump_rooms(dice("pump rooms"), land)
    wired = connect([*hydrants, *lifts, *cameras, *pumps], land)
    devices = {device.id: device for device in wired.devices}
    return District(
        seed,
        Registry(
            tuple(wired.gateways),
            tuple(wired.devices),
            tuple(ground.cells[node] for node in sorted(ground.cells, key=lambda node: ground.cells[node].code)),
            organisation(ground.areas),
            ground.areas,
            tuple(line.road for line in land.lines),
        ),
        devices,
        grouped([asset.device for asset in hydrants], "zone"),
        grouped([asset.device for asset in lifts], "building"),
        floors,
        {cell.code: cell for cell in ground.cells.values()},
        wired.metres,
        behind=grouped([device for device in wired.devices if device.kind != "gateway"], "gateway"),
        pipes=_pipes(hydrants, mains.Network(land.lines, land.zone_of)),
        boxes={cell.code: areas.box_of(node) for node, cell in ground.cells.items()},
        zone_cells=_zone_cells(land),
        lines={line.road.code: line.ends for line in land.lines},
        pump_rooms={asset.device.zone: asset.device.id for asset in pumps},
        size="reference",
    )


def _pipes(hydrants: Sequence[assets.Asset], network: mains.Network) -> dict[str, NDArray[np.float64]]:
    return {
        mains.zone_name(zone): network.distances(zone, [(asset.spot.line, asset.spot.along) for asset in inside])
        for zone, inside in groupby(hydrants, key=lambda asset: asset.zone)
    }


def _zone_cells(land: assets.Land) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {mains.zone_name(zone): [] for zone in range(mains.ZONES)}
    for node, zone in land.zone_of.items():
        found[mains.zone_name(zone)].append(land.cells[node].code)
    return {zone: tuple(sorted(codes)) for zone, codes in found.items()}
