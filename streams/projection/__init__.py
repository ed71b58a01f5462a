"""Values of the log, written to an InfluxDB (or what speaks its write API) for Grafana and third parties.

A projection is only ever behind the log, never beside it: it reads what is committed, writes it, and marks how far the
server has said yes. Nobody waits for it, and it may be thrown away and made anew as long as the log has the records.
"""
