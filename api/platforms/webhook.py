"""Standard Webhooks, under the name the API and the desk know; the code is the kernel's, which gateways use too."""

from citybrain.webhook import ID, SIGNATURE, TIMESTAMP, new_secret, read_secret, secret_key, sign, verify

__all__ = ["ID", "SIGNATURE", "TIMESTAMP", "new_secret", "read_secret", "secret_key", "sign", "verify"]
