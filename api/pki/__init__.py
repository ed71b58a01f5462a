"""The certificate authority: who is who on the wire (docs/security.md)."""
