"""The distributed runtime: the shards' logs are topics of Kafka. Nothing here is imported unless it is asked for."""
