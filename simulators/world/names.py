"""Invented names, in Chinese and English."""

from __future__ import annotations

import random

Name = tuple[str, str]  # Chinese, English

# Within a line no two syllables are spelt alike, so that English names are as distinct as Chinese ones.
_FIRST, _FIRST_EN = (
    "青望白长云松芦石星碧春枫桂海禾锦兰柳梅南平瑞桐渔",
    "qing wang bai chang yun song lu shi xing bi chun feng gui hai he jin lan liu mei nan ping rui tong yu",
)
_SECOND, _SECOND_EN = (
    "潮鹭堤栈涛苇桥川溪湾山林泉岭月霞田塘汀洲屿荫岸风",
    "chao lu di zhan tao wei qiao chuan xi wan shan lin quan ling yue xia tian tang ting zhou yu yin an feng",
)
_STREETS, _STREETS_EN = "甲乙丙丁戊己庚辛壬癸子丑寅卯", "jia yi bing ding wu ji geng xin ren gui zi chou yin mao"
_SURNAMES = "赵钱孙李周吴郑王冯陈褚卫蒋沈韩杨朱秦许何吕施张孔曹严华金魏陶姜"
_GIVEN = ("知远", "若水", "明川", "思齐", "允中", "静之", "怀瑾", "长青", "一舟", "清和", "守正", "望舒")
_ROAD_SUFFIXES = (("路", "Road"), ("街", "Street"), ("巷", "Lane"))
_HOME_SUFFIXES = (("苑", "Court"), ("里", "Close"), ("新村", "Village"), ("园", "Garden"), ("坊", "Square"))


def _stems(dice: random.Random, count: int) -> list[Name]:
    firsts, seconds = zip(_FIRST, _FIRST_EN.split(), strict=True), list(zip(_SECOND, _SECOND_EN.split(), strict=True))
    pairs = [(zh + zh2, (en + en2).capitalize()) for zh, en in firsts for zh2, en2 in seconds]
    return dice.sample(pairs, count)


def roads(dice: random.Random, main: int, others: int) -> list[Name]:
    """Return names of roads, those of the main ones first."""
    found = []
    for index, (zh, en) in enumerate(_stems(dice, main + others)):
        suffix = ("大道", "Avenue") if index < main else dice.choice(_ROAD_SUFFIXES)
        found.append((zh + suffix[0], f"{en} {suffix[1]}"))
    return found


def communities(dice: random.Random, count: int) -> list[Name]:
    """Return names of residential areas."""
    chosen = ((stem, dice.choice(_HOME_SUFFIXES)) for stem in _stems(dice, count))
    return [(zh + suffix[0], f"{en} {suffix[1]}") for (zh, en), suffix in chosen]


def streets() -> list[Name]:
    """Return the names of the fourteen streets."""
    pairs = zip(_STREETS, _STREETS_EN.split(), strict=True)
    return [(f"{zh}浦街道", f"{en.capitalize()}pu Street") for zh, en in pairs]


def people(dice: random.Random, count: int) -> list[str]:
    """Return names of persons who do not exist."""
    return dice.sample([surname + given for surname in _SURNAMES for given in _GIVEN], count)
