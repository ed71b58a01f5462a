"""The district as a clerk's lists: assets as a workbook with a sheet a kind and as CSV; units and gateways as CSV."""

from __future__ import annotations

import csv
import io
import re
import zipfile
from collections.abc import Iterable, Sequence

import openpyxl
from openpyxl.cell import WriteOnlyCell
from openpyxl.styles import Font
from openpyxl.utils import get_column_letter

from citybrain.model import Device, Gateway, Place, Unit

Row = Sequence[str | int | float]

KINDS = {"hydrant": "消火栓", "elevator": "电梯", "camera": "摄像机", "pump_room": "泵房", "gateway": "网关"}
PLACE_HEADER = ("经度(°)", "纬度(°)", "坐标系", "地址", "单元网格", "道路编号")
ASSET_HEADER = ("编号", "类型", "名称", "传感器编号", "网关", *PLACE_HEADER, "压力分区", "楼宇", "维保单位", "标签")
GATEWAY_HEADER = ("编号", "分片", *PLACE_HEADER)
UNIT_HEADER = ("编号", "名称", "英文名称", "街道", "部门")
CRS = "CGCS2000"
TAGS_BETWEEN = ";"


def assets_xlsx(devices: Sequence[Device]) -> bytes:
    """Return a workbook of assets, one sheet a kind with a header line; codes are text, degrees are numbers."""
    book = openpyxl.Workbook(write_only=True)
    for kind, title in KINDS.items():
        rows = [asset_row(device) for device in devices if device.kind == kind]
        if rows:
            sheet = book.create_sheet(title)
            sheet.freeze_panes = "A2"
            for column, name in enumerate(ASSET_HEADER, start=1):
                width = max(2 * len(name), *(len(str(row[column - 1])) for row in rows[:100])) + 2
                sheet.column_dimensions[get_column_letter(column)].width = width
            sheet.append([_bold(sheet, name) for name in ASSET_HEADER])
            for row in rows:
                sheet.append(list(row))
    file = io.BytesIO()
    book.save(file)
    return _undated(file.getvalue())


def assets_csv(devices: Iterable[Device]) -> bytes:
    """Return all assets in one table."""
    return _csv(ASSET_HEADER, (asset_row(device) for device in devices))


def gateways_csv(gateways: Iterable[Gateway]) -> bytes:
    """Return the gateways with their shard."""
    return _csv(GATEWAY_HEADER, ((each.id, each.shard, *_place_row(each.place)) for each in gateways))


def organisation_csv(units: Iterable[Unit]) -> bytes:
    """Return the units: a street's own office names a street, a contractor a department, a stationed office both."""
    return _csv(UNIT_HEADER, ((unit.code, unit.zh, unit.en, unit.street, unit.department) for unit in units))


def asset_row(device: Device) -> Row:
    """Return a device under ASSET_HEADER; an empty sensor number says that the wire names it by its own number."""
    return (
        device.id,
        KINDS[device.kind],
        device.name,
        device.sensor,
        device.gateway,
        *_place_row(device.place),
        device.zone,
        device.building,
        device.maintainer,
        TAGS_BETWEEN.join(device.tags),
    )


def _place_row(place: Place) -> Row:
    return place.lon, place.lat, CRS, place.address, place.cell, place.road


def _undated(workbook: bytes) -> bytes:
    """Return a workbook without the times at which its parts were written, so that one seed gives the same bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(workbook)) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "docProps/core.xml":
                content = re.sub(rb"\d{4}-\d\d-\d\dT[\d:.]+Z", b"2000-01-01T00:00:00Z", content)
            new.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)  # its usual date is 1980-01-01
    return file.getvalue()


def _bold(sheet: object, text: str) -> object:
    cell = WriteOnlyCell(sheet, text)
    cell.font = Font(bold=True)
    return cell


def _csv(header: Row, rows: Iterable[Row]) -> bytes:
    """Return a table in UTF-8 with a byte order mark, without which spreadsheets take Chinese for something else."""
    file = io.StringIO(newline="")
    csv.writer(file).writerows([header, *rows])
    return file.getvalue().encode("utf-8-sig")
