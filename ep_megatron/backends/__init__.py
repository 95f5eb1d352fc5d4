"""How rows travel: one module per transport, one protocol."""
