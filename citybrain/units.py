"""The metrics this product knows: a name carries its unit, a quantity its physical range.

A value outside `low..high` cannot come from a working sensor: ingest counts it as `out_of_range`. Ranges are
engineering choices (docs/domain.md names their sources), wide enough that no fault we detect leaves them.
"""

from __future__ import annotations

import msgspec

from citybrain.errors import NotFound


class Metric(msgspec.Struct, frozen=True):
    """One measured quantity. `name` ends in its canonical unit; `low` and `high` are in that unit.

    meanings: of a metric whose values are codes, what each says, in zh and en, from 0 on.
    """

    name: str
    unit: str
    low: float
    high: float
    zh: str
    en: str
    meanings: tuple[tuple[str, str], ...] = ()

    @property
    def suffix(self) -> str:
        """The unit as it stands behind a number, with its space; nothing where the number is a share, count or code."""
        return "" if self.unit in ("1", "0/1", "code") else f" {self.unit}"

    def meaning(self, value: float, language: str) -> str:
        """Return what a code says in `zh` or `en`, "" where that is not known."""
        known = value == int(value) and 0 <= value < len(self.meanings)
        return self.meanings[int(value)][language == "en"] if known else ""


_QUALITY = (
    ("正常", "good"),
    ("无应答", "no answer"),
    ("数据乱码", "garbled"),
    ("拒绝应答", "refused"),
    ("数据不可信", "implausible"),
    ("其他设备应答", "another device answers"),
    ("接口已断开", "unplugged"),
    ("时钟未校准", "clock not set"),
)
_ALL = (
    Metric("pressure_mpa", "MPa", -0.1, 2.5, "水压", "pressure"),
    Metric("flow_lps", "L/s", -5.0, 200.0, "流量", "flow"),
    Metric("tilt_deg", "°", 0.0, 180.0, "倾角", "tilt"),
    Metric("cap_open", "0/1", 0.0, 1.0, "闷盖打开", "cap open"),
    Metric("battery_v", "V", 0.0, 30.0, "电池电压", "battery"),
    Metric("temperature_c", "°C", -60.0, 200.0, "温度", "temperature"),
    Metric("vibration_rms_g", "g", 0.0, 50.0, "振动", "vibration"),
    # Of a window of raw samples (edge.signals.features): the worst axis, and up to four bands of frequencies.
    Metric("vibration_pp_g", "g", 0.0, 100.0, "振动峰峰值", "vibration peak to peak"),
    Metric("vibration_a95_g", "g", 0.0, 100.0, "振动 A95", "vibration A95"),
    Metric("vibration_crest", "1", 0.0, 1000.0, "振动峰值因数", "vibration crest factor"),
    Metric("vibration_kurtosis", "1", 0.0, 1e6, "振动峭度", "vibration kurtosis"),
    Metric("vibration_band_1_g", "g", 0.0, 50.0, "振动频带1", "vibration band 1"),
    Metric("vibration_band_2_g", "g", 0.0, 50.0, "振动频带2", "vibration band 2"),
    Metric("vibration_band_3_g", "g", 0.0, 50.0, "振动频带3", "vibration band 3"),
    Metric("vibration_band_4_g", "g", 0.0, 50.0, "振动频带4", "vibration band 4"),
    Metric("current_a", "A", -1000.0, 1000.0, "电流", "current"),
    Metric("voltage_v", "V", 0.0, 1000.0, "电压", "voltage"),
    Metric("door_closed", "0/1", 0.0, 1.0, "门关闭", "door closed"),
    Metric("occupied", "0/1", 0.0, 1.0, "轿厢有人", "car occupied"),
    Metric("moving", "0/1", 0.0, 1.0, "运行中", "moving"),
    Metric("floor", "floor", -20.0, 200.0, "楼层", "floor"),
    Metric("service_mode", "code", 0.0, 7.0, "服务模式", "service mode"),
    # GB/T 24476-2017 style codes; a code is an occurrence: 0 says that none is active.
    Metric("fault_code", "code", 0.0, 999.0, "故障码", "fault code"),
    Metric("trapped_certainty", "1", 0.0, 1.0, "困人可信度", "certainty of a trapped passenger"),
    # What a hydrant's edge processor makes of fast samples, and what a wet barrel with a closed cap says.
    Metric("impact_g", "g", 0.0, 200.0, "撞击", "impact"),
    Metric("hammer_mpa", "MPa", 0.0, 5.0, "水锤幅值", "water hammer amplitude"),
    Metric("hammer_count", "1", 0.0, 1e6, "水锤次数", "water hammer strokes"),
    Metric("pressure_min_mpa", "MPa", -0.1, 5.0, "最低水压", "lowest pressure"),
    Metric("pressure_max_mpa", "MPa", -0.1, 5.0, "最高水压", "highest pressure"),
    Metric("water_present", "0/1", 0.0, 1.0, "栓内有水", "water present"),
    Metric("rssi_dbm", "dBm", -150.0, 0.0, "信号强度", "signal strength"),
    Metric("level_m", "m", -10.0, 50.0, "水位", "water level"),
    # Cameras: health as shares of the normal picture, scene events as how long they have lasted in a region.
    Metric("signal", "0/1", 0.0, 1.0, "视频信号", "video signal"),
    Metric("frame_rate_fps", "1/s", 0.0, 240.0, "帧率", "frame rate"),
    Metric("brightness", "1", 0.0, 1.0, "亮度", "brightness"),
    Metric("sharpness", "1", 0.0, 10.0, "清晰度", "sharpness"),
    Metric("view_shift", "1", 0.0, 1.0, "画面偏移", "shift of the view"),
    Metric("motion", "1", 0.0, 1.0, "画面变化", "motion"),
    Metric("garbage_s", "s", 0.0, 1e7, "暴露垃圾持续", "garbage for"),
    Metric("stall_s", "s", 0.0, 1e7, "占道经营持续", "stall on the pavement for"),
    Metric("lane_blocked_s", "s", 0.0, 1e7, "消防通道占用持续", "fire lane blocked for"),
    Metric("crowd", "1", 0.0, 1.0, "人群密度", "crowd density"),
    # What the edge says of a device: how far it can be trusted (edge.driver.Quality), and a limit of its own (0: over).
    Metric("quality", "code", 0.0, 7.0, "数据质量", "quality", _QUALITY),
    Metric("local_alarm", "code", 0.0, 999.0, "就地报警", "local alarm"),
    # The first 52 bits of a picture's SHA-256: which evidence a scene event means (citybrain.wire.evidence_number).
    Metric("evidence", "1", 0.0, 2.0**52, "证据编号", "evidence number"),
    Metric("value", "1", -1e15, 1e15, "数值", "value"),
    Metric("uptime_s", "s", 0.0, 1e10, "运行时长", "uptime"),
    Metric("spooled", "messages", 0.0, 1e9, "待发消息", "spooled messages"),
    Metric("clock_offset_s", "s", -1e10, 1e10, "时钟偏差", "clock offset"),
    Metric("uplink_kb_per_h", "kB/h", 0.0, 1e9, "上行流量", "traffic of the uplink"),
    Metric("certificate_days", "d", -36_500.0, 36_500.0, "证书剩余天数", "days the certificate is still valid"),
)
METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}


def metric(name: str) -> Metric:
    """Return the metric called `name`; raises NotFound, naming near misses."""
    try:
        return METRICS[name]
    except KeyError:
        raise NotFound(f"metric {name!r}: not one of {', '.join(sorted(METRICS))}") from None


# What a source may give, and how it becomes the metric's canonical unit: value * scale + offset.
CONVERSIONS: dict[str, tuple[str, float, float]] = {
    "bar": ("MPa", 0.1, 0.0),
    "kPa": ("MPa", 0.001, 0.0),
    "psi": ("MPa", 0.006894757293168361, 0.0),
    "L/min": ("L/s", 1 / 60, 0.0),
    "m3/h": ("L/s", 1 / 3.6, 0.0),
    "mA": ("A", 0.001, 0.0),
    "mV": ("V", 0.001, 0.0),
    "cm": ("m", 0.01, 0.0),
    "mm": ("m", 0.001, 0.0),
    "m/s2": ("g", 1 / 9.80665, 0.0),
    "°F": ("°C", 5 / 9, -160 / 9),
}
