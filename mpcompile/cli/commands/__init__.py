"""One file per command: ``configure(parser)`` declares its options, ``run(args)`` does the work."""
