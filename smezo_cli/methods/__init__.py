"""One file a method; the loop asks of each what :class:`smezo_cli.methods.base.Method` lists."""
