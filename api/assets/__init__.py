"""The ledger (台账): assets, sensors, gateways, organisation, areas; how they come in, change, and leave."""
