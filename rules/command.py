"""`citybrain rules`: check rule files, test them by scenarios, print their JSON Schema, put a rule set in force."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import msgspec

from citybrain.cli import Subcommand, emit
from citybrain.config import Duration
from citybrain.errors import EXIT_CONFIG, EXIT_FAILED, NotFound
from citybrain.layout import Layout
from citybrain.mailbox import Mailbox
from citybrain.mailbox import command as make_command
from rules.files import LIBRARY, Checked, check_rules, load_rules
from streams.kinds import KINDS
from streams.registry import Index, decode_registry
from streams.ruleset import Rule, encode_ruleset

DURATION_SCHEMA = {"type": "string", "pattern": r"^\d+(\.\d+)?(ms|s|min|h|d)$", "examples": ["15s", "5min"]}


def schema() -> dict[str, Any]:
    """Return the JSON Schema of a rule file; editors complete and check with it."""
    kinds = [kind.Parameters for kind in KINDS.values()]
    (rule, *parameters), components = msgspec.json.schema_components(
        (Rule, *kinds), schema_hook=_duration_schema, ref_template="#/$defs/{name}"
    )
    for number, (name, kind) in enumerate(KINDS.items()):
        # Every kind's struct is called Parameters: msgspec keeps them apart by module; readers want the kind's name.
        old = parameters[number]["$ref"].removeprefix("#/$defs/")
        body = components.pop(old)
        body["title"] = name
        body["description"] = (kind.Parameters.__doc__ or "").strip()
        body["properties"]["kind"] = {"const": name}
        components[name] = body
    when = components["Rule"]["properties"]["when"]
    when.clear()
    when["oneOf"] = [{"$ref": f"#/$defs/{name}"} for name in KINDS]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "citybrain rules",
        "type": "object",
        "properties": {"rules": {"type": "array", "items": rule}},
        "required": ["rules"],
        "additionalProperties": False,
        "$defs": components,
    }


def _duration_schema(kind: type) -> dict[str, Any]:
    if kind is Duration:
        return DURATION_SCHEMA
    raise NotImplementedError(kind)


def _validate(args: argparse.Namespace) -> int:
    found = check_rules(args.path or LIBRARY)
    for error in found.errors:
        sys.stderr.write(f"{error}\n")
    doubts = _doubts(found, _registry(Layout(args.data)), Layout(args.data)) if args.registry else []
    errors = [str(error) for error in found.errors]
    result = {"files": found.files, "rules": len(found.rules), "errors": errors, "warnings": doubts}
    emit(result if args.json else result | {"errors": len(errors), "warnings": len(doubts)}, as_json=args.json)
    return EXIT_CONFIG if found.errors else 0


def _registry(layout: Layout) -> str:
    """Return the name of the registry in force; raises NotFound."""
    active = layout.read_active()
    if active is None or not active.registry:
        raise NotFound(f"{layout.root}: no registry is in force yet; import devices first, or leave out --registry")
    return active.registry


def _doubts(found: Checked, registry: str, layout: Layout) -> list[str]:
    """Say what is probably not meant on this registry, on stderr; return it."""
    index = Index(decode_registry(layout.get_blob(registry)), registry)
    doubts = found.doubts(index, layout.read_run().clock.now_ms())
    for doubt in doubts:
        sys.stderr.write(f"warning: {doubt}\n")
    return doubts


def _schema(args: argparse.Namespace) -> int:
    sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(schema()), indent=2) + b"\n")
    return 0


def _activate(args: argparse.Namespace) -> int:
    """Store the rule set and ask ingest to put it into every shard's log; it is in force from there on."""
    layout = Layout(args.data)
    layout.make()
    ruleset = load_rules(args.path or LIBRARY)
    name = layout.put_blob(encode_ruleset(ruleset))
    now_ms = layout.read_run().clock.now_ms()
    Mailbox(layout.mailbox("ingest")).put(make_command("ruleset", args.actor, now_ms, {"content": name}, args.reason))
    active = layout.read_active()
    doubts = (
        _doubts(check_rules(args.path or LIBRARY), active.registry, layout)
        if active is not None and active.registry
        else []
    )
    emit({"ruleset": name, "rules": len(ruleset.rules), "warnings": doubts}, as_json=args.json)
    return 0


def _test(args: argparse.Namespace) -> int:
    """Run scenarios; every one that goes otherwise than written is named with its file and line."""
    from rules.scenarios import SCENARIOS, run_scenarios  # noqa: PLC0415  the engine, which nothing else here needs

    outcomes = run_scenarios(args.path or SCENARIOS)
    wrong = [f"{it.where} {it.rule}, {it.name}: {what}" for it in outcomes for what in it.wrong]
    for text in wrong:
        sys.stderr.write(f"{text}\n")
    failed = sum(bool(it.wrong) for it in outcomes)
    result = {"scenarios": len(outcomes), "rules": len({it.rule for it in outcomes}), "failed": failed}
    emit(result | {"wrong": wrong} if args.json else result, as_json=args.json)
    return EXIT_FAILED if failed else 0


ACTIONS = {"validate": _validate, "test": _test, "schema": _schema, "activate": _activate}


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=ACTIONS, help="check files, run scenarios, print the schema, put in force")
    parser.add_argument("path", nargs="?", type=Path, help="file or folder (default: what we ship)")
    parser.add_argument("--registry", action="store_true", help="with validate: judge by the registry in force too")
    parser.add_argument("--actor", default="operator", help="who activates, for the audit")
    parser.add_argument("--reason", default="", help="why, for the audit")


def _run(args: argparse.Namespace) -> int:
    return ACTIONS[args.action](args)


command = Subcommand("check and test rule files, print their JSON Schema, put a rule set in force", _arguments, _run)
