"""One file per command: ``add(commands)`` declares its options, ``run(args)`` does the work."""
