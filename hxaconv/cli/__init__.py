"""The command line: parses, calls the functions of the package, and shows what came of it."""
