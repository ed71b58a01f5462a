"""Speaking with other platforms: webhooks signed after Standard Webhooks, carrying CloudEvents."""
