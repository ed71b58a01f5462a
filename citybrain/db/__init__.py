"""The relational schema: alarms, incidents, cases and everything that must commit with them."""
